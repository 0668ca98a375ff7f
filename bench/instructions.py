"""Instructions and allocations of a call, counted by callgrind: the same on a busy machine as on a quiet one.

The C++ kernels, one evaluation of whole networks and the packing of their weights. A process that makes 1 call and one
that makes more differ by those calls and nothing else. Valgrind knows no AVX-512, so what is counted is the AVX2 build
(the portable one on other machines). PyTorch's import would take it minutes, so a network is what Python tells the C++
executor: recorded outside of valgrind, told again without PyTorch.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

KERNELS, NETWORKS = ("update", "noise", "norm nhwc", "norm nchw"), ("ncsn", "unet2d", "cdm")
CASES = (*KERNELS, *(f"{what} {network}" for network in NETWORKS for what in ("evaluate", "pack")))
CALLS = {"evaluate": 2, "pack": 2}  # of a kernel: 256
NAMED, CALLED = re.compile(r"^c?fn=\((\d+)\) (.+)$", re.M), re.compile(r"^cfn=\((\d+)\).*\ncalls=(\d+)", re.M)
ALLOCATE = ("malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "memalign")


def kernel(case: str):
    """A call of one raw kernel on numpy buffers, without torch, whose import would take valgrind minutes."""
    import numpy as np

    from sgm_engine import _C

    generator = np.random.default_rng(0)
    batch, channels, pixels = 2, 32, 256
    buffers = {
        name: generator.standard_normal((batch, channels, pixels), dtype=np.float32) for name in ("x", "score", "out")
    }
    address = {name: buffer.ctypes.data for name, buffer in buffers.items()}
    sizes = {"channels": channels, "pixels": pixels}
    slots = {name: np.zeros(batch, np.int64) for name in ("seed", "sample_id", "row", "level")}
    slots |= {"stop": np.full(batch, 2**40), "bad_row": np.full(batch, 2**63 - 1)}
    ids = {name: slots[name].ctypes.data for name in ("seed", "sample_id")}
    if case == "noise":
        call = lambda: _C.noise_fill(address["out"], False, batch=batch, **sizes, **ids, draw=1, stream=0, kind=0)  # noqa: E731
    elif case == "update":
        coef, draw = np.array([[1, 1e-3, 1e-2, 0]], np.float32), np.ones(1, np.int32)
        rest = {name: slots[name].ctypes.data for name in ("row", "stop", "bad_row")} | ids | sizes
        rest |= {"coef": coef.ctypes.data, "draw": draw.ctypes.data, "rows": 1, "batch": batch, "advance": False}
        tensors = {"x": address["x"], "score": address["score"], "previous": 0, "out": address["out"], "score_dtype": 0}
        tensors |= {f"{name}_nhwc": False for name in ("x", "score", "previous", "out")}
        call = lambda: (coef, draw, _C.langevin_update(**tensors, **rest))  # noqa: E731
    else:
        parameters = generator.standard_normal((10, 3 * channels), dtype=np.float32)
        workspace = np.zeros(_C.norm_workspace_size(batch, channels), np.float32)
        rest = {name: parameters.ctypes.data + 4 * channels * i for i, name in enumerate(("gamma", "alpha", "beta"))}
        rest |= {f"{name}_stride": 3 * channels for name in ("gamma", "alpha", "beta")} | sizes
        rest |= {"level": slots["level"].ctypes.data, "workspace": workspace.ctypes.data, "samples": batch}
        rest |= {"eps": 1e-5, "dtype": 0, "activation": 1, "channels_last": case == "norm nhwc"}
        tensors = {"x": address["x"], "residual": 0, "y": address["out"], "total": 0}
        call = lambda: (parameters, workspace, buffers, slots, _C.norm(**tensors, **rest))  # noqa: E731
    return lambda: (buffers, slots, call())


def record(network: str, file: str) -> None:
    """What Python tells the executor of a network of bench.small, with the arrays that it points to → ``file``."""
    import torch

    from bench import small
    from sgm_engine import _C
    from sgm_engine.executors.native.executor import NativeNetwork

    told: list[tuple[str, list, dict]] = []

    def plain(value: object, method: str) -> object:
        if type(value).__module__.endswith("_C"):
            return Member(type(value).__name__, value.name)
        if method.startswith("set_") and isinstance(value, tuple):
            size = 8 if method in ("set_embedding", "set_potential") else 4
            return Array(ctypes.string_at(value[0], size * value[1]) if value[0] else b"", value[1])
        return value

    def keeping(method: str, real: Callable) -> Callable:
        def call(self, *args, **kwargs):
            if method == "__init__":  # a front that gives up leaves its layers behind
                told.clear()
            told.append((method, [plain(a, method) for a in args], {k: plain(v, method) for k, v in kwargs.items()}))
            return real(self, *args, **kwargs)

        return call

    kept = {name for name in dir(_C.NativeExecutor) if not name.startswith("_")} - {
        "run",
        "run_steps",
        "bytes",
        "algorithm",
    }
    methods = {name: keeping(name, getattr(_C.NativeExecutor, name)) for name in (*kept, "__init__")}
    _C.NativeExecutor = type("Recorder", (_C.NativeExecutor,), methods)
    torch.manual_seed(0)
    model = getattr(small, network)().eval()
    NativeNetwork(model, 1, *model.shape[1:])
    Path(file).write_bytes(pickle.dumps((model.shape, told)))


class Member(tuple):
    """(enumeration of _C, name)"""

    def __new__(cls, *of: str):
        return super().__new__(cls, of)

    def __reduce__(self):
        return Member, tuple(self)


class Array(Member):
    """(bytes, how many numbers)"""

    def __reduce__(self):
        return Array, tuple(self)


def replayed(what: str, file: str) -> Callable[[], object]:
    """One evaluation of a recorded network, or all of its weights packed again, as a call."""
    import numpy as np

    from sgm_engine import _C

    shape, told = pickle.loads(Path(file).read_bytes())
    arrays: list[np.ndarray] = []

    def given(value: object) -> object:
        if isinstance(value, Array):
            arrays.append(np.frombuffer(value[0], np.uint8))
            return (arrays[-1].ctypes.data if value[0] else 0, value[1])
        return getattr(getattr(_C, value[0]), value[1]) if isinstance(value, Member) else value

    calls = [(name, [given(a) for a in args], {k: given(v) for k, v in kwargs.items()}) for name, args, kwargs in told]
    executor = _C.NativeExecutor(*calls[0][1], **calls[0][2])
    for name, args, kwargs in calls[1:]:
        getattr(executor, name)(*args, **kwargs)
    if what == "pack":
        packing = [(getattr(executor, name), args, kwargs) for name, args, kwargs in calls if name.startswith("set_")]
        return lambda: (arrays, [method(*args, **kwargs) for method, args, kwargs in packing])
    x, level, score = np.full(shape, 0.5, np.float32), np.zeros(1, np.int64), np.empty(shape, np.float32)
    return lambda: (arrays, executor.run(x.ctypes.data, level.ctypes.data, score.ctypes.data, 1))


def count(case: str, env: dict[str, str], program: Callable[..., list[str]]) -> dict[str, int] | None:
    """instructions and allocations of a call of ``case`` with the package that ``env`` names; None: it cannot run it.

    program: (module, arguments …) → the command that runs a module of this bench.
    """
    env, what = env | {"PYTHONHASHSEED": "0"}, case.partition(" ")[0]
    with tempfile.TemporaryDirectory() as folder:
        out, recording = Path(folder, "callgrind"), str(Path(folder, "recording"))
        if what in CALLS:
            done = subprocess.run(
                program("instructions", "record", case.split()[1], recording), env=env, capture_output=True
            )
            if done.returncode:
                return None
        totals = []
        for calls in (1, 1 + CALLS.get(what, 256)):
            command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
            command += program("instructions", case, calls, recording)
            if subprocess.run(command, env=env, capture_output=True).returncode:
                return None
            totals.append(read(out.read_text()))
        return {key: (totals[1][key] - totals[0][key]) // CALLS.get(what, 256) for key in totals[0]}


def read(profile: str) -> dict[str, int]:
    """What a file of callgrind's says in all."""
    name = dict(NAMED.findall(profile))
    allocations = sum(int(calls) for which, calls in CALLED.findall(profile) if name[which] in ALLOCATE)
    return {
        "instructions": int(re.search(r"^(?:summary|totals): (\d+)", profile, re.M)[1]), "allocations": allocations
    }  # fmt: skip


def main(case: str, *rest: str) -> None:
    if case == "record":
        return record(*rest)
    os.environ.pop("SGM_ISA", None)
    what = case.split()[0]
    call = replayed(what, rest[1]) if what in CALLS else kernel(case)
    for _ in range(int(rest[0])):
        call()


if __name__ == "__main__":
    from bench import instructions

    instructions.main(*sys.argv[1:])  # by its name: a recording holds classes of it
