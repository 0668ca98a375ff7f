"""Instructions that a C++ kernel executes a call, counted by callgrind: the same on a busy machine as on a quiet one.

A process that makes 1 call and one that makes 1 + CALLS differ by CALLS calls and nothing else. Valgrind knows no
AVX-512, so what is counted is the AVX2 build (the portable one on other machines).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CALLS = 256
CASES = ("update", "noise", "norm nhwc", "norm nchw")


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


def count(case: str, env: dict[str, str], cwd: Path) -> int | None:
    """Instructions a call of ``case`` with the package that ``env`` names, None where it cannot run the case."""
    totals = []
    for calls in (1, 1 + CALLS):
        with tempfile.NamedTemporaryFile(suffix=".callgrind") as out:
            command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out.name}", sys.executable]
            command += ["-m", "bench.instructions", case, str(calls)]
            done = subprocess.run(command, cwd=cwd, env=env | {"PYTHONHASHSEED": "0"}, capture_output=True, text=True)
            if done.returncode:
                return None
            totals.append(int(re.search(r"^(?:summary|totals): (\d+)", Path(out.name).read_text(), re.M)[1]))
    return (totals[1] - totals[0]) // CALLS


if __name__ == "__main__":
    os.environ.pop("SGM_ISA", None)
    call = kernel(sys.argv[1])
    for _ in range(int(sys.argv[2])):
        call()
