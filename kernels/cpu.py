"""CPU launchers: they hand the addresses of tensors that ops.py has checked to C++. Nothing is checked or allocated."""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_engine import _C

DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/dtype.h
KIND = {"normal": 0, "uniform": 1}
ACTIVATION = {"none": 0, "elu": 1, "relu": 2, "silu": 3}


def noise_fill(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    """Fill out, float32 [B, C, H, W], with the "normal" or "uniform" noise of each sample."""
    b, c, h, w = out.shape
    _C.noise_fill(
        out.data_ptr(), _nhwc(out), b, c, h * w, seed.data_ptr(), sample_id.data_ptr(), draw, stream, KIND[kind]
    )


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
    """out ← a·x + b·score + c·z + d·previous in every live slot, then previous (see csrc/update.h); out may be x.

    known lies in memory as out does.
    """
    b, c, h, w = x.shape
    _C.langevin_update(
        x.data_ptr(), _nhwc(x), score.data_ptr(), _nhwc(score), DTYPE[score.dtype],
        _address(previous), previous is not None and _nhwc(previous), out.data_ptr(), _nhwc(out), b, c, h * w,
        coef.data_ptr(), draw.data_ptr(), draw.shape[0], row.data_ptr(), _address(stop), seed.data_ptr(),
        sample_id.data_ptr(), _address(bad_row), advance, _address(keep), _address(gain), _address(known),
        _address(known_sigma), _address(known_draw),
    )  # fmt: skip


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
) -> None:
    """out ← act(norm(x)), or act(norm(x + residual)) with the sum written to sum_out (see csrc/cpu/norm.h).

    All images in one dtype and one layout. workspace: float32, norm_workspace_size(x) elements, any content.
    """
    n, c, h, w = x.shape
    _C.norm(
        x.data_ptr(), _address(residual), out.data_ptr(), _address(sum_out),
        *(_address(p) for p in (gamma, alpha, beta)), *(_row_stride(p) for p in (gamma, alpha, beta)), _address(level),
        workspace.data_ptr(), n, c, h * w, eps, DTYPE[x.dtype], ACTIVATION[activation], _nhwc(x),
        groups or 0,
    )  # fmt: skip


def norm_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
    eps: float,
    groups: int,
    dx: Tensor,
    dgamma: Tensor,
    dbeta: Tensor,
) -> None:
    """The gradient of a GroupNorm with activation (see csrc/cpu/norm_backward.h): dx, and each sample's part [N, C].

    grad, x, dx: one dtype, NCHW. gamma, beta: float32 [C], dense; dgamma, dbeta: float32 [N, C].
    """
    n, c, h, w = x.shape
    _C.norm_backward(
        x.data_ptr(), grad.data_ptr(), dx.data_ptr(), _address(gamma), _address(beta), dgamma.data_ptr(),
        dbeta.data_ptr(), n, c, h * w, groups, eps, DTYPE[x.dtype], ACTIVATION[activation],
    )  # fmt: skip


def norm_workspace_size(x: Tensor) -> int:
    return _C.norm_workspace_size(x.shape[0], x.shape[1])


def _row_stride(p: Tensor | None) -> int:
    return p.stride(0) if p is not None and p.dim() == 2 else 0


def _nhwc(x: Tensor) -> bool:
    """Dense in [N, H, W, C] order (and not also in [N, C, H, W] order)."""
    return not x.is_contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
