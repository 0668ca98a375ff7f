"""The ops: every argument checked, outputs allocated, then cpu → C++ and cuda → Triton.

Each is a torch.library op of namespace ``sgm_engine``, with a fake implementation for torch.compile and a gradient
where it has one. ``launchers(device.type)`` is what they end in: the same functions without checks, for a loop whose
tensors have been checked once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sgm_engine.kernels import reference

NO_BAD_ROW = 2**63 - 1
STATE = (torch.float32,)
NETWORK = (torch.float32, torch.bfloat16, torch.float16)


class Launchers(NamedTuple):
    """Unchecked functions of one device type; their tensors must be as the ops below ask, and dense.

    noise_fill(out, seed, sample_id, draw, stream, kind)
    langevin_update(x, score, coef, draw, row, stop, seed, sample_id, bad_row, previous, out, advance, keep, gain)
    norm(x, gamma, alpha, beta, level, activation, residual, eps, out, sum_out, workspace, groups=None)
    norm_workspace_size(x) → float32 elements
    norm_backward(grad, x, gamma, beta, activation, eps, groups, dx, dgamma, dbeta), all NCHW
    """

    noise_fill: Callable[..., None]
    langevin_update: Callable[..., None]
    norm: Callable[..., None]
    norm_workspace_size: Callable[[Tensor], int]
    norm_backward: Callable[..., None]


@cache
def launchers(device_type: str) -> Launchers:
    if device_type == "cpu":
        from sgm_engine.kernels import cpu

        return Launchers(cpu.noise_fill, cpu.langevin_update, cpu.norm, cpu.norm_workspace_size, cpu.norm_backward)
    if device_type == "cuda":
        try:
            from sgm_engine.kernels import triton_noise, triton_norm, triton_norm_backward, triton_update
        except ImportError as error:
            raise RuntimeError(f"a CUDA tensor needs Triton >= 3.6 ({error}): pip install triton") from error
        return Launchers(
            triton_noise.noise_fill,
            triton_update.langevin_update,
            triton_norm.norm,
            triton_norm.norm_workspace_size,
            triton_norm_backward.norm_backward,
        )
    raise ValueError(f"tensors must be on cpu or cuda, got {device_type}")


# The ops -------------------------------------------------------------------------------------------------------------


def noise_fill_(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    """Fill out [B, C, H, W] (float32, NCHW or NHWC dense) with the noise of docs/noise.md.

    seed: int64 [B], any bits. sample_id: int64 [B], in [0, 2^56). draw: 0 ≤ draw < 2^32. stream: a tag of
    ``noise.STREAM``. kind: "normal" or "uniform" (on [0, 1)).
    """
    torch.ops.sgm_engine.noise_fill_(out, seed, sample_id, draw, stream, kind)


def langevin_update_(
    x: Tensor,
    score: Tensor,
    coef: Tensor,
    draw: Tensor,
    row: Tensor,
    stop: Tensor,
    seed: Tensor,
    sample_id: Tensor,
    bad_row: Tensor,
    previous: Tensor | None = None,
    keep: Tensor | None = None,
    gain: Tensor | None = None,
) -> None:
    """x ← a·x + b·score + c·z (+ d·previous) in every slot with row < stop, whose row then goes up by one.

    x: float32 [B, C, H, W], written in place; score: float32, bfloat16 or float16 of that shape; previous: like x. Each
    is NCHW or NHWC on its own. coef: float32 [R, 4], (a, b, c, d) of each row of the plan; draw: int32 [R], the bits of
    the uint32 draw of z. row, stop, seed, sample_id, bad_row: int64 [B]. bad_row (start it at NO_BAD_ROW) is lowered to
    the row that gave a result that is not finite. An idle slot (row >= stop) is left as it is. Rounded as csrc/update.h
    says; z is the noise of stream "sample". Rows are checked on the CPU only: on a GPU that would wait for it.
    keep: float32 [R, 2], (e, f) of each row; unless both are 0, previous is then written: e·x + f·score, of the x that
    was. gain: float32 [B]; b is then (b·gain)·gain, c is c·gain.
    """
    if torch.is_grad_enabled() and (x.requires_grad or score.requires_grad):
        raise RuntimeError("langevin_update_ has no gradient: call it under torch.no_grad(), or use langevin_update")
    torch.ops.sgm_engine.langevin_update_(
        x, score, coef, draw, row, stop, seed, sample_id, bad_row, previous, keep, gain
    )


def langevin_update(
    x: Tensor,
    score: Tensor,
    coef: Tensor,
    draw: Tensor,
    row: Tensor,
    seed: Tensor,
    sample_id: Tensor,
    previous: Tensor | None = None,
) -> Tensor:
    """As langevin_update_, but returns a new x [B, C, H, W] and changes nothing. There is no stop: every slot is live.

    Differentiable in x, score and previous.
    """
    return torch.ops.sgm_engine.langevin_update(x, score, coef, draw, row, seed, sample_id, previous)


def noise_conditioned_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    level: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    eps: float = 1e-5,
    groups: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(γ·(x̂ + α·ms) + β) with the level's own γ, α, β: InstanceNorm++, see reference.noise_conditioned_norm.

    x: float32, bfloat16 or float16 [N, C, H, W]; the result has its dtype and layout. gamma, alpha, beta: float32 [C],
    or [L, C] (rows may be strided) gathered by level, int64 [N]; None leaves the term out. residual: like x; the norm
    is then of x + residual, rounded to x's dtype, and (y, x + residual) is returned. activation: one of
    reference.ACTIVATIONS. groups: GroupNorm, statistics over that many groups of channels; it must divide C, and alpha
    must be None. Statistics in float32, centred. Differentiable, twice, by recomputation; the first gradient of a
    GroupNorm without levels or residual is one kernel. Levels are checked on the CPU only.
    """
    if residual is None:
        return torch.ops.sgm_engine.noise_conditioned_norm(x, gamma, alpha, beta, level, activation, eps, groups)
    return torch.ops.sgm_engine.noise_conditioned_norm_residual(
        x, residual, gamma, alpha, beta, level, activation, eps, groups
    )


# Checks --------------------------------------------------------------------------------------------------------------


def _check(name: str, t: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if t.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {t.dtype}: convert it with {name}.to(…)")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors, got {t.device}")


def _check_vector(name: str, t: Tensor, like: Tensor, dtype: torch.dtype, n: int) -> None:
    _check(name, t, like, (dtype,), (n,))
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {t.stride()}: call {name}.contiguous()")


def _check_images(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape [batch, channels, height, width], got {list(x.shape)}")
    _check(name, x, x, dtypes, x.shape)
    if x.shape[1] * x.shape[2] * x.shape[3] > 2**34:
        raise ValueError(f"{name} must have at most 2^34 elements a sample, got shape {list(x.shape)}")


def _check_dense(name: str, x: Tensor) -> None:
    if not _is_dense(x):
        raise ValueError(
            f"{name} is written in place and must be dense, NCHW or NHWC (channels_last); "
            f"got shape {list(x.shape)} with strides {list(x.stride())}: pass {name}.contiguous() and copy back"
        )


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor | None) -> Tensor | None:
    """x itself if dense, else a copy: an input may be any view."""
    return x if x is None or _is_dense(x) else x.contiguous()


def _like(x: Tensor, t: Tensor) -> Tensor:
    """t in the layout of x, which is dense."""
    return t.contiguous() if x.is_contiguous() else t.contiguous(memory_format=torch.channels_last)


def _check_noise(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    _check_images("out", out, STATE)
    _check_dense("out", out)
    _check_vector("seed", seed, out, torch.int64, out.shape[0])
    _check_vector("sample_id", sample_id, out, torch.int64, out.shape[0])
    if not 0 <= draw < 2**32:
        raise ValueError(f"draw must be in [0, 2^32), got {draw}")
    if not 0 <= stream < 2**32 or stream % 2**24:
        raise ValueError(f"stream must be a tag of noise.STREAM (its top 8 bits of 32), got {stream:#x}")
    if kind not in ("normal", "uniform"):
        raise ValueError(f"kind must be 'normal' or 'uniform', got {kind!r}")


def _check_update(x, score, coef, draw, row, seed, sample_id, previous) -> None:
    _check_images("x", x, STATE)
    _check("score", score, x, NETWORK, x.shape)
    if previous is not None:
        _check("previous", previous, x, STATE, x.shape)
    rows = draw.shape[0] if draw.dim() == 1 else 0
    _check_vector("draw", draw, x, torch.int32, rows)
    _check("coef", coef, x, STATE, (rows, 4))
    if not coef.is_contiguous():
        raise ValueError(f"coef must be contiguous, got strides {list(coef.stride())}: call coef.contiguous()")
    for name, t in (("row", row), ("seed", seed), ("sample_id", sample_id)):
        _check_vector(name, t, x, torch.int64, x.shape[0])


def _check_norm(x, gamma, alpha, beta, level, activation, residual, groups) -> None:
    _check_images("x", x, NETWORK)
    batch, channels, height, width = x.shape
    if height * width == 0 or channels == 0:
        raise ValueError(f"x must have at least one channel and one pixel, got shape {list(x.shape)}")
    if residual is not None:
        _check("residual", residual, x, (x.dtype,), x.shape)
    if alpha is not None and channels < 2:
        raise ValueError(f"alpha needs at least 2 channels for a variance across them, got {channels}: pass alpha=None")
    if groups is not None and (groups < 1 or channels % groups):
        raise ValueError(f"groups must divide the channels evenly, got {groups} groups of {channels} channels")
    if groups is not None and alpha is not None:
        raise ValueError("alpha must be None with groups: it weighs the means of single channels, which a group merges")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(reference.ACTIVATIONS)}, got {activation!r}")
    parameters = {k: p for k, p in (("gamma", gamma), ("alpha", alpha), ("beta", beta)) if p is not None}
    tables = [p.shape[0] for p in parameters.values() if p.dim() == 2]  # number of levels, as each says
    if any(levels != tables[0] for levels in tables):
        raise ValueError(f"gamma, alpha and beta must have as many rows as one another, got {tables}")
    for name, p in parameters.items():
        _check(name, p, x, STATE, (tables[0], channels) if p.dim() == 2 else (channels,))
        if p.stride(-1) != 1 and channels > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {list(p.stride())}")
    if tables and level is None:
        raise ValueError("level must be given when gamma, alpha or beta is [levels, channels]")
    if level is not None:
        if not tables:
            raise ValueError("level must be None when gamma, alpha and beta are [channels] or None")
        _check_vector("level", level, x, torch.int64, batch)


# Registration --------------------------------------------------------------------------------------------------------

_library = torch.library.Library("sgm_engine", "DEF")


def _register(schema: str, implementation: Callable, fake: Callable) -> None:
    """define and impl: a call costs about 7 µs, through the custom_op decorator about 50."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"sgm_engine::{name}", fake, lib=_library)


def _noise_fill_(out, seed, sample_id, draw, stream, kind):
    _check_noise(out, seed, sample_id, draw, stream, kind)
    if out.device.type == "cpu" and (((sample_id >> 56) != 0).any()):
        raise ValueError(f"sample_id must be in [0, 2^56), got {sample_id.tolist()}")
    launchers(out.device.type).noise_fill(out, seed, sample_id, draw, stream, kind)


def _fake_noise_fill_(out, seed, sample_id, draw, stream, kind):
    _check_noise(out, seed, sample_id, draw, stream, kind)


def _check_update_(x, score, coef, draw, row, stop, seed, sample_id, bad_row, previous=None, keep=None, gain=None):
    _check_update(x, score, coef, draw, row, seed, sample_id, previous)
    _check_dense("x", x)
    _check_vector("stop", stop, x, torch.int64, x.shape[0])
    _check_vector("bad_row", bad_row, x, torch.int64, x.shape[0])
    if keep is not None:
        if previous is None:
            raise ValueError("previous is None, but keep stores into it: pass a tensor like x")
        _check_dense("previous", previous)
        _check("keep", keep, x, STATE, (draw.shape[0], 2))
        if not keep.is_contiguous():
            raise ValueError(f"keep must be contiguous, got strides {list(keep.stride())}: call keep.contiguous()")
    if gain is not None:
        _check_vector("gain", gain, x, torch.float32, x.shape[0])


def _langevin_update_(x, score, coef, draw, row, stop, seed, sample_id, bad_row, previous=None, keep=None, gain=None):
    _check_update_(x, score, coef, draw, row, stop, seed, sample_id, bad_row, previous, keep, gain)
    update = launchers(x.device.type).langevin_update
    update(x, _dense(score), coef, draw, row, stop, seed, sample_id, bad_row, _dense(previous), x, True, keep, gain)


def _langevin_update(x, score, coef, draw, row, seed, sample_id, previous=None):
    _check_update(x, score, coef, draw, row, seed, sample_id, previous)
    x = _dense(x)
    out = torch.empty_like(x)
    update = launchers(x.device.type).langevin_update
    update(x, _dense(score), coef, draw, row, None, seed, sample_id, None, _dense(previous), out, False)
    return out


def _fake_langevin_update(x, score, coef, draw, row, seed, sample_id, previous=None):
    _check_update(x, score, coef, draw, row, seed, sample_id, previous)
    return torch.empty_like(_dense(x))


def _save_update(ctx, inputs, output):
    _, score, coef, _, row, *_ = inputs
    ctx.save_for_backward(coef, row)
    ctx.score_dtype = score.dtype


def _backward_update(ctx, grad):
    coef, row = ctx.saved_tensors
    a, b, _, d = coef[row].T[..., None, None, None]
    x, score, *_, previous = ctx.needs_input_grad
    return (
        a * grad if x else None,
        (b * grad).to(ctx.score_dtype) if score else None,
        *(None,) * 5,
        d * grad if previous else None,
    )


def _norm(x, residual, gamma, alpha, beta, level, activation, eps, groups=None):
    _check_norm(x, gamma, alpha, beta, level, activation, residual, groups)
    tables = [p for p in (gamma, alpha, beta) if p is not None and p.dim() == 2]
    if level is not None and level.numel() and level.device.type == "cpu":
        low, high = (int(v) for v in level.aminmax())
        if low < 0 or high >= tables[0].shape[0]:
            raise ValueError(f"level must be in [0, {tables[0].shape[0]}), got values from {low} to {high}")
    x = _dense(x)
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    residual = None if residual is None else _like(x, residual)
    launch = launchers(x.device.type)
    workspace = torch.empty(launch.norm_workspace_size(x), dtype=torch.float32, device=x.device)
    launch.norm(x, gamma, alpha, beta, level, activation, residual, eps, out, total, workspace, groups)
    return out, total


def _fake_norm(x, residual, gamma, alpha, beta, level, activation, eps, groups=None):
    _check_norm(x, gamma, alpha, beta, level, activation, residual, groups)
    return torch.empty_like(_dense(x)), None if residual is None else torch.empty_like(_dense(x))


def _save_norm(ctx, inputs, output):
    *tensors, ctx.activation, ctx.eps, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _norm_backward(grad, x, gamma, beta, activation, eps, groups):
    """(dx, dγ, dβ) of act(γ·x̂ + β): dx like x but NCHW, dγ and dβ float32 [N, C], each sample's own part."""
    x, grad = x.contiguous(), grad.to(x.dtype).contiguous()
    dx, dgamma, dbeta = torch.empty_like(x), *(x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    launchers(x.device.type).norm_backward(grad, x, gamma, beta, activation, eps, groups, dx, dgamma, dbeta)
    return dx, dgamma, dbeta


def _fake_norm_backward(grad, x, gamma, beta, activation, eps, groups):
    parts = [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *parts


def _is_fused(ctx, inputs) -> bool:
    """Whether the one-kernel gradient of GroupNorm is what is asked for: once, no residual, one row of γ and β."""
    vectors = all(p is None or (p.dim() == 1 and p.is_contiguous()) for p in inputs[1:-1])
    return ctx.groups is not None and len(inputs) == 5 and vectors and not torch.is_grad_enabled()


def _backward_norm(ctx, *grads):
    """Recompute through the reference, in float32; under create_graph the result is itself differentiable."""
    if _is_fused(ctx, ctx.saved_tensors):
        x, gamma, _, beta, _ = ctx.saved_tensors
        dx, *parts = torch.ops.sgm_engine.norm_backward(grads[0], x, gamma, beta, ctx.activation, ctx.eps, ctx.groups)
        dgamma, dbeta = (
            part.sum(0) if need else None for part, need in zip(parts, ctx.needs_input_grad[1:4:2], strict=True)
        )
        return dx, dgamma, None, dbeta, *[None] * (len(ctx.needs_input_grad) - 4)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: where x was computed from the residual, the gradient must not find its way back through that history.
        inputs = [t if t is None else t.view_as(t) for t in ctx.saved_tensors]
        x, residual, gamma, alpha, beta, level = (inputs[0], None, *inputs[1:]) if len(inputs) == 5 else inputs
        residual = residual if residual is None else residual.float()
        out = reference.noise_conditioned_norm(
            x.float(), gamma, alpha, beta, level, ctx.activation, residual, ctx.eps, ctx.groups
        )
        out = (out,) if residual is None else out
        wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
        grads = [g.to(o.dtype) for g, o in zip(grads, out, strict=True)]
        found = iter(torch.autograd.grad(out, wanted, grads, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad)


_register(
    "noise_fill_(Tensor(a!) out, Tensor seed, Tensor sample_id, int draw, int stream, str kind) -> ()",
    _noise_fill_,
    _fake_noise_fill_,
)
_register(
    "langevin_update_(Tensor(a!) x, Tensor score, Tensor coef, Tensor draw, Tensor(b!) row, Tensor stop, Tensor seed, "
    "Tensor sample_id, Tensor(c!) bad_row, Tensor(d!)? previous=None, Tensor? keep=None, Tensor? gain=None) -> ()",
    _langevin_update_,
    _check_update_,
)
_register(
    "langevin_update(Tensor x, Tensor score, Tensor coef, Tensor draw, Tensor row, Tensor seed, Tensor sample_id, "
    "Tensor? previous=None) -> Tensor",
    _langevin_update,
    _fake_langevin_update,
)
torch.library.register_autograd(
    "sgm_engine::langevin_update", _backward_update, setup_context=_save_update, lib=_library
)
_norm_arguments = (
    "Tensor? gamma, Tensor? alpha, Tensor? beta, Tensor? level, str activation, float eps, int? groups=None"
)
_register(
    f"noise_conditioned_norm(Tensor x, {_norm_arguments}) -> Tensor",
    lambda x, *rest: _norm(x, None, *rest)[0],
    lambda x, *rest: _fake_norm(x, None, *rest)[0],
)
_register(
    f"noise_conditioned_norm_residual(Tensor x, Tensor residual, {_norm_arguments}) -> (Tensor, Tensor)",
    _norm,
    _fake_norm,
)
_register(
    "norm_backward(Tensor grad, Tensor x, Tensor? gamma, Tensor? beta, str activation, float eps, int groups) -> "
    "(Tensor, Tensor, Tensor)",
    _norm_backward,
    _fake_norm_backward,
)
for _name in ("noise_conditioned_norm", "noise_conditioned_norm_residual"):
    torch.library.register_autograd(f"sgm_engine::{_name}", _backward_norm, setup_context=_save_norm, lib=_library)
