"""The ops: every argument checked, outputs allocated, then cpu → C++ and cuda → Triton or CUDA C++.

Each is a torch.library op of namespace ``sgm_engine``, with a fake implementation for torch.compile and a gradient
where it has one. ``launchers(device.type)`` is what they end in: the same functions without checks, for a loop whose
tensors have been checked once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_engine.kernels.arguments import Update
from sgm_engine.kernels.checks import (
    STATE,
    check,
    check_dense,
    check_known,
    check_noise,
    check_update,
    check_vector,
    dense,
    like,
)
from sgm_engine.kernels.dispatch import launchers, library, register
from sgm_engine.kernels.in_place import check_apart, check_no_gradient, mark_written
from sgm_engine.kernels.norm_op import inference_norm, noise_conditioned_norm

__all__ = [
    "NO_BAD_ROW",
    "inference_norm",
    "langevin_update",
    "langevin_update_",
    "launchers",
    "noise_conditioned_norm",
    "noise_fill_",
]

NO_BAD_ROW = 2**63 - 1


# The ops -------------------------------------------------------------------------------------------------------------


def noise_fill_(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    """Fill out [B, C, H, W] (float32, NCHW or NHWC dense) with the noise of docs/noise.md.

    seed: int64 [B], any bits. sample_id: int64 [B], in [0, 2^56). draw: 0 ≤ draw < 2^32. stream: a tag of
    ``noise.STREAM``. kind: "normal" or "uniform" (on [0, 1)). Ids are checked on the CPU only.
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
    known: Tensor | None = None,
    known_sigma: Tensor | None = None,
    known_draw: Tensor | None = None,
) -> None:
    """x ← a·x + b·score + c·z (+ d·previous) in every slot with row < stop, whose row then goes up by one.

    x: float32 [B, C, H, W], written in place; score: float32, bfloat16 or float16 of that shape; previous: like x. Each
    is NCHW or NHWC on its own. coef: float32 [R, 4], (a, b, c, d) of each row of the plan; draw: int32 [R], the bits of
    the uint32 draw of z. row, stop, seed, sample_id, bad_row: int64 [B]. bad_row (start it at NO_BAD_ROW) is lowered to
    the row that gave a result that is not finite. An idle slot (row >= stop) is left as it is. Rounded as csrc/update.h
    says; z is the noise of stream "sample". Rows and ids of live slots are checked on the CPU only: on a GPU that would
    wait for it. score, and previous without keep, may be x itself; nothing else may share memory with what is written.
    keep: float32 [R, 2], (e, f) of each row; unless both are 0, previous is then written: e·x + f·score, of the x that
    was. gain: float32 [B]; b is then (b·gain)·gain, c is c·gain.
    known (inpainting): float32 like x, NaN where a pixel is not known. Elsewhere x becomes what the next row's network
    is to see, known + σ·z: known_sigma float32 [R], that σ, 0 after a plan's last row, which leaves known itself;
    known_draw int32 [R], the draw of z, whose stream is "inpaint".
    """
    torch.ops.sgm_engine.langevin_update_(
        x, score, coef, draw, row, stop, seed, sample_id, bad_row, previous, keep, gain, known, known_sigma, known_draw
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


# Registration --------------------------------------------------------------------------------------------------------


def _noise_fill_(out, seed, sample_id, draw, stream, kind):
    check_noise(out, seed, sample_id, draw, stream, kind)
    tensors = {"out": out, "seed": seed, "sample_id": sample_id}
    check_no_gradient("noise_fill_", tensors)
    check_apart(tensors, ("out",))
    launchers(out.device.type).noise_fill(out, seed, sample_id, draw, stream, kind)
    mark_written(out)


def _fake_noise_fill_(out, seed, sample_id, draw, stream, kind):
    check_noise(out, seed, sample_id, draw, stream, kind)


def _check_update_(*arguments) -> Update:
    """The update in place that the arguments of the schema ask for."""
    *slots, previous, keep, gain, known, known_sigma, known_draw = *arguments, *[None] * (15 - len(arguments))
    u = Update(*slots, previous, slots[0], True, keep, gain, known, known_sigma, known_draw)
    check_update(u)
    check_dense("x", u.x)
    check_vector("stop", u.stop, u.x, torch.int64, u.x.shape[0])
    check_vector("bad_row", u.bad_row, u.x, torch.int64, u.x.shape[0])
    if keep is not None:
        if previous is None:
            raise ValueError("previous is None, but keep stores into it: pass a tensor like x")
        check_dense("previous", previous)
        check("keep", keep, u.x, STATE, (u.draw.shape[0], 2))
        if not keep.is_contiguous():
            raise ValueError(f"keep must be contiguous, got strides {list(keep.stride())}: call keep.contiguous()")
    if gain is not None:
        check_vector("gain", gain, u.x, torch.float32, u.x.shape[0])
    check_known(u)
    return u


def _langevin_update_(*arguments) -> None:
    u = _check_update_(*arguments)
    score, previous, known = dense(u.score), dense(u.previous), None if u.known is None else like(u.x, u.known)
    if score is not u.score or previous is not u.previous or known is not u.known:
        u = u._replace(score=score, previous=previous, known=known)
    tensors = u._asdict()
    del tensors["out"], tensors["advance"]
    check_no_gradient("langevin_update_", tensors, ", or use langevin_update")
    written = ("x", "row", "bad_row") if u.keep is None else ("x", "row", "bad_row", "previous")
    check_apart(tensors, written, aligned=("score", "previous"))
    launchers(u.x.device.type).langevin_update(u)
    mark_written(*(tensors[name] for name in written))


def _check_pure(x, score, coef, draw, row, seed, sample_id, previous=None) -> Update:
    """The update of every slot into a new tensor."""
    u = Update(x, score, coef, draw, row, None, seed, sample_id, None, previous, x, False)
    check_update(u)
    return u._replace(x=dense(x))


def _langevin_update(*arguments) -> Tensor:
    u = _check_pure(*arguments)
    u = u._replace(score=dense(u.score), previous=dense(u.previous), out=torch.empty_like(u.x))
    launchers(u.x.device.type).langevin_update(u)
    return u.out


def _fake_langevin_update(*arguments) -> Tensor:
    return torch.empty_like(_check_pure(*arguments).x)


def _save_update(ctx, inputs, output):
    _, score, coef, _, row, *_ = inputs
    if coef.requires_grad:
        raise RuntimeError("langevin_update has no gradient in coef: pass coef.detach()")
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


register(
    "noise_fill_(Tensor(a!) out, Tensor seed, Tensor sample_id, int draw, int stream, str kind) -> ()",
    _noise_fill_,
    _fake_noise_fill_,
)
register(
    "langevin_update_(Tensor(a!) x, Tensor score, Tensor coef, Tensor draw, Tensor(b!) row, Tensor stop, Tensor seed, "
    "Tensor sample_id, Tensor(c!) bad_row, Tensor(d!)? previous=None, Tensor? keep=None, Tensor? gain=None, "
    "Tensor? known=None, Tensor? known_sigma=None, Tensor? known_draw=None) -> ()",
    _langevin_update_,
    lambda *arguments: _check_update_(*arguments) and None,
)
register(
    "langevin_update(Tensor x, Tensor score, Tensor coef, Tensor draw, Tensor row, Tensor seed, Tensor sample_id, "
    "Tensor? previous=None) -> Tensor",
    _langevin_update,
    _fake_langevin_update,
)
torch.library.register_autograd(
    "sgm_engine::langevin_update", _backward_update, setup_context=_save_update, lib=library
)
