"""Arguments of the ops, checked: every error names the argument, the value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_engine.kernels import reference
from sgm_engine.kernels.arguments import Update

STATE = (torch.float32,)
NETWORK = (torch.float32, torch.bfloat16, torch.float16)


def check(name: str, t: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    check_given(name, t)
    if t.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {t.dtype}: convert it with {name}.to(…)")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors, got {t.device}")


def check_given(name: str, t: Tensor | None) -> None:
    if t is None:  # which torch.library lets through for any Tensor
        raise TypeError(f"{name} must be a tensor, got None")


def check_vector(name: str, t: Tensor, like: Tensor, dtype: torch.dtype, n: int) -> None:
    check(name, t, like, (dtype,), (n,))
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {t.stride()}: call {name}.contiguous()")


def check_images(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_given(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape [batch, channels, height, width], got {list(x.shape)}")
    check(name, x, x, dtypes, x.shape)
    if x.shape[1] * x.shape[2] * x.shape[3] > 2**34:
        raise ValueError(f"{name} must have at most 2^34 elements a sample, got shape {list(x.shape)}")


def check_dense(name: str, x: Tensor) -> None:
    if not is_dense(x):
        raise ValueError(
            f"{name} is written in place and must be dense, NCHW or NHWC (channels_last); "
            f"got shape {list(x.shape)} with strides {list(x.stride())}: pass {name}.contiguous() and copy back"
        )


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor | None) -> Tensor | None:
    """x itself if dense, else a copy: an input may be any view."""
    return x if x is None or is_dense(x) else x.contiguous()


def like(x: Tensor, t: Tensor) -> Tensor:
    """t in the layout of x, which is dense."""
    return t.contiguous() if x.is_contiguous() else t.contiguous(memory_format=torch.channels_last)


def check_noise(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    check_images("out", out, STATE)
    check_dense("out", out)
    check_vector("seed", seed, out, torch.int64, out.shape[0])
    check_vector("sample_id", sample_id, out, torch.int64, out.shape[0])
    if not 0 <= draw < 2**32:
        raise ValueError(f"draw must be in [0, 2^32), got {draw}")
    if not 0 <= stream < 2**32 or stream % 2**24:
        raise ValueError(f"stream must be a tag of noise.STREAM (its top 8 bits of 32), got {stream:#x}")
    if kind not in ("normal", "uniform"):
        raise ValueError(f"kind must be 'normal' or 'uniform', got {kind!r}")


def check_known(u: Update) -> None:
    """What inpainting adds to an update, all of it or nothing."""
    if u.known is None and u.known_sigma is None and u.known_draw is None:
        return
    given = {name: getattr(u, name) for name in ("known", "known_sigma", "known_draw")}
    missing = [name for name, t in given.items() if t is None]
    if missing:
        there = next(name for name, t in given.items() if t is not None)
        raise ValueError(f"{missing[0]} is None, but {there} is not: pass known, known_sigma and known_draw, or none")
    check("known", u.known, u.x, STATE, u.x.shape)
    check_vector("known_sigma", u.known_sigma, u.x, torch.float32, len(u.draw))
    check_vector("known_draw", u.known_draw, u.x, torch.int32, len(u.draw))


def check_update(u: Update) -> None:
    x = u.x
    check_images("x", x, STATE)
    check("score", u.score, x, NETWORK, x.shape)
    if u.previous is not None:
        check("previous", u.previous, x, STATE, x.shape)
    check_given("draw", u.draw)
    rows = u.draw.shape[0] if u.draw.dim() == 1 else 0
    check_vector("draw", u.draw, x, torch.int32, rows)
    check("coef", u.coef, x, STATE, (rows, 4))
    if not u.coef.is_contiguous():
        raise ValueError(f"coef must be contiguous, got strides {list(u.coef.stride())}: call coef.contiguous()")
    for name in ("row", "seed", "sample_id"):
        check_vector(name, getattr(u, name), x, torch.int64, x.shape[0])


def check_norm_backward(grad, x, gamma, beta, activation, groups) -> None:
    check_images("x", x, NETWORK)
    for name, p in (("gamma", gamma), ("beta", beta)):
        if p is not None and p.dim() != 1:
            raise ValueError(f"{name} must have shape [{x.shape[1]}], got {list(p.shape)}")
    check_norm(x, gamma, None, beta, None, activation, None, groups, False, "none")
    check("grad", grad, x, NETWORK, x.shape)


def check_norm(x, gamma, alpha, beta, level, activation, residual, groups, pool, before) -> None:
    check_images("x", x, NETWORK)
    batch, channels, height, width = x.shape
    if height * width == 0 or channels == 0:
        raise ValueError(f"x must have at least one channel and one pixel, got shape {list(x.shape)}")
    if residual is not None:
        check("residual", residual, x, (x.dtype,), x.shape)
    if alpha is not None and channels < 2:
        raise ValueError(f"alpha needs at least 2 channels for a variance across them, got {channels}: pass alpha=None")
    if groups is not None and (groups < 1 or channels % groups):
        raise ValueError(f"groups must divide the channels evenly, got {groups} groups of {channels} channels")
    if groups is not None and alpha is not None:
        raise ValueError("alpha must be None with groups: it weighs the means of single channels, which a group merges")
    for name, value in (("activation", activation), ("before", before)):
        if value not in reference.ACTIVATIONS:
            raise ValueError(f"{name} must be one of {sorted(reference.ACTIVATIONS)}, got {value!r}")
    if pool and activation != "none":
        raise ValueError(f"activation must be 'none' with pool, got {activation!r}: activate the result instead")
    parameters = {k: p for k, p in (("gamma", gamma), ("alpha", alpha), ("beta", beta)) if p is not None}
    tables = [p.shape[0] for p in parameters.values() if p.dim() == 2]  # number of levels, as each says
    if any(levels != tables[0] for levels in tables):
        raise ValueError(f"gamma, alpha and beta must have as many rows as one another, got {tables}")
    for name, p in parameters.items():
        check(name, p, x, STATE, (tables[0], channels) if p.dim() == 2 else (channels,))
        if p.stride(-1) != 1 and channels > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {list(p.stride())}")
    if tables and level is None:
        raise ValueError("level must be given when gamma, alpha or beta is [levels, channels]")
    if level is not None:
        if not tables:
            raise ValueError("level must be None when gamma, alpha and beta are [channels] or None")
        check_vector("level", level, x, torch.int64, batch)


def check_biases(x: Tensor, residual: Tensor | None, bias: Tensor | None, residual_bias: Tensor | None) -> None:
    """What a norm adds to x and to residual."""
    if residual is None and residual_bias is not None:
        raise ValueError("residual_bias must be None without residual, got a tensor: pass it as bias")
    for name, t in (("bias", bias), ("residual_bias", residual_bias)):
        if t is not None:
            check_vector(name, t, x, torch.float32, x.shape[1])
