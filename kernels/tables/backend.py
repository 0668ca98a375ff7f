"""Which backend runs an op on a GPU, Triton or the CUDA C++ library: a table that is measured offline.

backend.json beside this: {"sm_90": {case: backend}}. A case is an op, its form, dtype, layout, and shape or size,
up to a factor of two: "norm residual bfloat16 NHWC 128×32×32 at 2^7" is of 128 to 255 samples. Triton runs what is not
there, and everything where the library was not built. Nothing is ever timed while a network runs.
``python -m bench.gpu --only backends`` writes it. It is empty: nothing has been measured, and Triton runs all ops.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sgm_engine.kernels import cuda
from sgm_engine.kernels.tables import measured
from sgm_engine.kernels.triton.launch import is_channels_last

PATH = Path(__file__).parent / "backend.json"
TRITON = "Triton"
BACKENDS = (TRITON, "CUDA", "CUDA portable", "CUDA cluster")  # the last two: of the norm
Table = measured.Table[str]


def read(path: Path = PATH) -> Table:
    def backend(value: object) -> str:
        if value not in BACKENDS:
            raise ValueError(f"{value!r} is none of {', '.join(BACKENDS)}")
        return str(value)

    return measured.read(path, "backends", backend)


def write(table: Table, path: Path = PATH) -> None:
    measured.write(table, path, str)


@cache
def table() -> Table:
    return read()


@cache
def of_device(device: torch.device) -> dict[str, str]:
    """case → backend on this GPU; empty where the library is not built."""
    return table().get(capability(device), {}) if cuda.library() is not None else {}


def capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# The cases ------------------------------------------------------------------------------------------------------------


def noise_case(out: Tensor, kind: str) -> str:
    return f"noise_fill {kind} {_layout(out)} {_size(out.numel())}"


def update_case(x: Tensor, score: Tensor) -> str:
    """What the update spends its time on are bytes, whatever the coefficients."""
    return f"langevin_update {_layout(x)} {_dtype(score)} {_layout(score)} {_size(x.numel())}"


def norm_case(x: Tensor, residual: bool, groups: int | None, before: str, pool: bool) -> str:
    given = (("residual", residual), ("before", before != "none"), ("pool", pool), ("groups", groups is not None))
    form = "".join(f" {word}" for word, there in given if there)
    return f"norm{form} {_dtype(x)} {_layout(x)} {'×'.join(map(str, x.shape[1:]))} at {_size(len(x))}"


def summary(op: str, device: torch.device) -> str:
    """The backend of ``op`` there, in words: "CUDA cluster in 12 measured cases, Triton in all others"."""
    if cuda.library() is None:
        return f"{TRITON} (the CUDA library is not built)"
    found = Counter(backend for case, backend in of_device(device).items() if case.split()[0] == op)
    faster = [f"{backend} in {count} measured cases" for backend, count in sorted(found.items()) if backend != TRITON]
    others = "in all others" if found else f"(nothing was measured on {capability(device)})"
    return ", ".join([*faster, f"{TRITON} {others}"])


def _layout(x: Tensor) -> str:
    return "NHWC" if is_channels_last(x) else "NCHW"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _size(count: int) -> str:
    return f"2^{max(0, count.bit_length() - 1)}"
