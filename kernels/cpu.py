"""CPU launchers: they hand the addresses of tensors that ops.py has checked to C++. Nothing is checked or allocated."""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_engine import _C
from sgm_engine.kernels.arguments import Norm, NormBackward, Update

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/dtype.h
KIND = {"normal": 0, "uniform": 1}
ACTIVATION = {"none": 0, "elu": 1, "relu": 2, "silu": 3}


def noise_fill(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    """Fill out, float32 [B, C, H, W], with the "normal" or "uniform" noise of each sample."""
    b, c, h, w = out.shape
    _C.noise_fill(
        out.data_ptr(), _nhwc(out), b, c, h * w, seed.data_ptr(), sample_id.data_ptr(), draw, stream, KIND[kind]
    )


def langevin_update(u: Update) -> None:
    """csrc/update.h, in every live slot."""
    b, c, h, w = u.x.shape
    _C.langevin_update(
        u.x.data_ptr(), _nhwc(u.x), u.score.data_ptr(), _nhwc(u.score), DTYPE[u.score.dtype],
        _address(u.previous), u.previous is not None and _nhwc(u.previous), u.out.data_ptr(), _nhwc(u.out), b, c, h * w,
        u.coef.data_ptr(), u.draw.data_ptr(), u.draw.shape[0], u.row.data_ptr(), _address(u.stop), u.seed.data_ptr(),
        u.sample_id.data_ptr(), _address(u.bad_row), u.advance, _address(u.keep), _address(u.gain), _address(u.known),
        _address(u.known_sigma), _address(u.known_draw),
    )  # fmt: skip


def norm(n: Norm) -> None:
    """csrc/cpu/norm.h: all images in one dtype and one layout, nothing before it, no pool."""
    samples, c, h, w = n.x.shape
    _C.norm(
        n.x.data_ptr(), _address(n.residual), n.out.data_ptr(), _address(n.sum_out), *map(_address, n.parameters),
        *n.row_strides, _address(n.level), n.workspace.data_ptr(), samples, c, h * w, n.eps, DTYPE[n.x.dtype],
        ACTIVATION[n.activation], _nhwc(n.x), n.groups or 0,
    )  # fmt: skip


def norm_backward(n: NormBackward) -> None:
    """csrc/cpu/norm_backward.h."""
    samples, c, h, w = n.x.shape
    _C.norm_backward(
        n.x.data_ptr(), n.grad.data_ptr(), n.dx.data_ptr(), _address(n.gamma), _address(n.beta), n.dgamma.data_ptr(),
        n.dbeta.data_ptr(), samples, c, h * w, n.groups, n.eps, DTYPE[n.x.dtype], ACTIVATION[n.activation],
    )  # fmt: skip


def norm_workspace_size(x: Tensor) -> int:
    return _C.norm_workspace_size(x.shape[0], x.shape[1])


def _nhwc(x: Tensor) -> bool:
    """Dense in [N, H, W, C] order (and not also in [N, C, H, W] order)."""
    return not x.is_contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
