"""CUDA C++: the launchers of csrc/cuda, which nvcc builds into one library that knows neither torch nor Python.

They take what the Triton launchers take (triton/noise.py, update.py, norm.py) and write the same bits of
noise. The library is loaded when first asked for, never at import; its absence is an answer (``library()`` is None).
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sgm_engine.kernels.triton.launch import is_channels_last

PATH = Path(sys.modules["sgm_engine"].__file__).parent / "_cuda" / "libsgm_cuda.so"
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION = {"none": 0, "elu": 1, "relu": 2, "silu": 3}
VARIANT = {"auto": 0, "portable": 1, "cluster": 2}  # of the norm

_P = c_void_p
_SIGNATURES = {
    "sgm_cuda_error": (c_char_p, [c_int]),
    "sgm_cuda_noise_fill": (c_int, [_P, _P, _P, c_int64, c_int64, c_int64, c_int, c_uint32, c_uint32, c_int, _P]),
    "sgm_cuda_langevin_update": (
        c_int,
        [_P, _P, c_int, *[_P] * 14, c_int64, c_int64, c_int64, c_int, c_int, _P],
    ),
    "sgm_cuda_norm": (
        c_int,
        [
            *[_P] * 4,
            c_int,
            c_int,
            *[_P] * 3,
            *[c_int64] * 3,
            _P,
            *[c_int] * 2,
            c_float,
            c_int64,
            *[c_int32] * 5,
            _P,
            c_int,
            _P,
        ],
    ),
    "sgm_cuda_norm_workspace": (c_int64, [c_int64, c_int32, c_int32, c_int]),
}


@cache
def library(path: Path = PATH) -> ctypes.CDLL | None:
    """The library, loaded once; None if it was not built (no nvcc, or SGM_WITH_CUDA=0)."""
    if not path.exists():
        return None
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def noise_fill(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    """Fill out, float32 [B, C, H, W] (NCHW or NHWC, dense), with the "normal" or "uniform" noise of each sample.

    seed, sample_id: int64 [B]. draw: 0 … 2³²−1. stream: a tag of ``noise.STREAM``. Checks and allocates nothing.
    """
    batch, channels, height, width = out.shape
    if out.numel():
        pointers = (out.data_ptr(), seed.data_ptr(), sample_id.data_ptr())
        normal = {"normal": 1, "uniform": 0}[kind]
        sizes = (batch, channels, height * width, is_channels_last(out))
        _call("sgm_cuda_noise_fill", out, *pointers, *sizes, draw, stream, normal)


def langevin_update(
    x: Tensor,
    score: Tensor,
    coef: Tensor,
    draw: Tensor,
    row: Tensor,
    stop: Tensor | None,
    seed: Tensor,
    sample_id: Tensor,
    bad_row: Tensor | None,
    previous: Tensor | None,
    out: Tensor,
    advance: bool,
    keep: Tensor | None = None,
    gain: Tensor | None = None,
    known: Tensor | None = None,
    known_sigma: Tensor | None = None,
    known_draw: Tensor | None = None,
) -> None:
    """out ← a·x + b·score + c·z + d·previous for every live slot; an idle one (row ≥ stop) is neither read nor written.

    x, previous, out: float32 [B, C, H, W]; score: float32, bfloat16 or float16; each NCHW or NHWC, dense; out may be x.
    coef: float32 [R, 4]; draw: int32 [R]; row, stop, seed, sample_id, bad_row: int64 [B]. stop None: all slots live.
    bad_row: lowered to the slot's row where a result is not finite. advance: row goes up by 1 in every live slot.
    keep: float32 [R, 2], (e, f): previous ← e·x + f·score, of the old x, unless both are 0. gain: float32 [B]: b·gain²,
    c·gain.
    known: float32 in the layout of out, NaN where not known; elsewhere out is known + known_sigma[row]·z, z of
    draw known_draw[row] in stream "inpaint". known_sigma: float32 [R]; known_draw: int32 [R].
    Checks and allocates nothing; pointers may be captured in a CUDA graph.
    """
    batch, channels, height, width = x.shape
    if batch == 0:
        return
    layouts = sum(
        bit for bit, t in ((1, x), (2, score), (4, previous), (8, out)) if t is not None and is_channels_last(t)
    )
    pointers = (x.data_ptr(), score.data_ptr(), DTYPE[score.dtype], coef.data_ptr(), draw.data_ptr(), row.data_ptr())
    slots = (_pointer(stop), seed.data_ptr(), sample_id.data_ptr(), _pointer(bad_row), _pointer(previous))
    slots += tuple(_pointer(t) for t in (keep, gain, known, known_sigma, known_draw))
    sizes = (batch, channels, height * width)
    _call("sgm_cuda_langevin_update", x, *pointers, *slots, out.data_ptr(), *sizes, layouts, advance)


def norm_workspace_size(x: Tensor) -> int:
    """Elements of the float32 workspace that norm() of x needs."""
    batch, channels, height, width = x.shape
    return library().sgm_cuda_norm_workspace(batch, channels, height * width, is_channels_last(x))


def norm(
    x: Tensor,
    gamma: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    level: Tensor | None,
    activation: str,
    residual: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
    workspace: Tensor,
    groups: int | None = None,
    before: str = "none",
    pool: bool = False,
    variant: str = "auto",
) -> None:
    """out ← act(norm(s)), s = before(x + residual), which is written to sum_out; without either, s is x.

    x: float32, bfloat16 or float16 [N, C, H, W], NCHW or NHWC, dense; residual, out, sum_out: like x; out may be x or
    sum_out, and sum_out may be x or residual. gamma, alpha, beta: float32 [C], or [L, C] with dense rows; None leaves
    the term out. level: int64 [N], the row of [L, C]. workspace: float32, norm_workspace_size(x) elements, any content.
    groups: divides C, statistics are then over a group's channels; alpha is None. pool: out is the 5×5 mean of norm(s),
    stride 1, padding counted as zeros; activation is then "none" and out neither x nor sum_out.
    variant: "auto" takes the one-pass cluster kernel where device and shape allow; "portable"; "cluster" or an error.
    Checks and allocates nothing; refuses more channels than shared memory holds (6,000 at least, 3,000 with groups).
    """
    batch, channels, height, width = x.shape
    if x.numel() == 0:
        return
    strides = [0 if p is None or p.dim() == 1 else p.stride(0) for p in (gamma, alpha, beta)]
    tensors = (x.data_ptr(), _pointer(residual), out.data_ptr(), _pointer(sum_out), DTYPE[x.dtype], is_channels_last(x))
    parameters = (_pointer(gamma), _pointer(alpha), _pointer(beta), *strides, _pointer(level))
    how = (ACTIVATION[before], ACTIVATION[activation], eps, batch, channels, height * width, width, groups or 0, pool)
    _call("sgm_cuda_norm", x, *tensors, *parameters, *how, workspace.data_ptr(), VARIANT[variant])


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _call(name: str, on: Tensor, *arguments: object) -> None:
    """Launch on the current stream of on's device."""
    loaded = library()
    with torch.cuda.device_of(on):
        stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else None
        error = getattr(loaded, name)(*arguments, stream)
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}, {loaded.sgm_cuda_error(error).decode()}")
