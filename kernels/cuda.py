"""CUDA C++: the launchers of csrc/cuda, which nvcc builds into one library that knows neither torch nor Python.

They write the same bits of noise as Triton's. The library is loaded when first asked for, never at import; its absence
is an answer (``library()`` is None).
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sgm_engine.kernels.arguments import Norm, Update
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
            *[_P] * 6,
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


def langevin_update(u: Update) -> None:
    """Pointers may be captured in a CUDA graph."""
    batch, channels, height, width = u.x.shape
    if batch == 0:
        return
    layouts = sum(
        bit for bit, t in ((1, u.x), (2, u.score), (4, u.previous), (8, u.out)) if t is not None and is_channels_last(t)
    )
    pointers = (u.x.data_ptr(), u.score.data_ptr(), DTYPE[u.score.dtype], u.coef.data_ptr(), u.draw.data_ptr())
    slots = (u.row, u.stop, u.seed, u.sample_id, u.bad_row, u.previous)
    more = (u.keep, u.gain, u.known, u.known_sigma, u.known_draw, u.out)
    sizes = (batch, channels, height * width, layouts, u.advance)
    _call("sgm_cuda_langevin_update", u.x, *pointers, *map(_pointer, slots + more), *sizes)


def norm_workspace_size(x: Tensor) -> int:
    """Elements of the float32 workspace that norm() of x needs."""
    batch, channels, height, width = x.shape
    return library().sgm_cuda_norm_workspace(batch, channels, height * width, is_channels_last(x))


def norm(n: Norm, variant: str = "auto") -> None:
    """variant: "auto" takes the one-pass cluster kernel where device and shape allow; "portable"; "cluster" or error.

    Refuses more channels than shared memory holds (6,000 at least, 3,000 with groups); takes no inverse and no slab.
    """
    batch, channels, height, width = n.x.shape
    if n.x.numel() == 0:
        return
    images = (n.x.data_ptr(), _pointer(n.residual), n.out.data_ptr(), _pointer(n.sum_out))
    images += (_pointer(n.bias), _pointer(n.residual_bias))
    form = (DTYPE[n.x.dtype], is_channels_last(n.x))
    parameters = (*map(_pointer, n.parameters), *n.row_strides, _pointer(n.level))
    how = (ACTIVATION[n.before], ACTIVATION[n.activation], n.eps)
    sizes = (batch, channels, height * width, width, n.groups or 0, n.pool)
    workspace = (n.workspace.data_ptr(), VARIANT[variant])
    _call("sgm_cuda_norm", n.x, *images, *form, *parameters, *how, *sizes, *workspace)


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
