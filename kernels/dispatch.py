"""Which function an op ends in, cpu → C++ and cuda → gpu.py (Triton or CUDA C++), and how ops are registered."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Launchers(NamedTuple):
    """Unchecked functions of one device type; their tensors must be as the ops below ask, and dense.

    noise_fill(out, seed, sample_id, draw, stream, kind)
    langevin_update(x, score, coef, draw, row, stop, seed, sample_id, bad_row, previous, out, advance, keep, gain,
        known, known_sigma, known_draw), known in the layout of out
    norm(x, gamma, alpha, beta, level, activation, residual, eps, out, sum_out, workspace, groups=None), and on CUDA
        before="none", pool=False, inverse=None, slab=None after them (inverse: out is float8; slab: of given partials)
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
            from sgm_engine.kernels import gpu
            from sgm_engine.kernels.triton import norm_backward as triton_norm_backward
        except ImportError as error:
            raise RuntimeError(f"a CUDA tensor needs Triton >= 3.6 ({error}): pip install triton") from error
        backward = triton_norm_backward.norm_backward
        return Launchers(gpu.noise_fill, gpu.langevin_update, gpu.norm, gpu.norm_workspace_size, backward)
    raise ValueError(f"tensors must be on cpu or cuda, got {device_type}")


library = torch.library.Library("sgm_engine", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """define and impl: a call costs about 7 µs, through the custom_op decorator about 50."""
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        library.impl(name, implementation, key)
    torch.library.register_fake(f"sgm_engine::{name}", fake, lib=library)
