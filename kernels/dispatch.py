"""Which function an op ends in, cpu → C++ and cuda → gpu.py (Triton or CUDA C++), and how ops are registered."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sgm_engine.kernels.arguments import Norm, NormBackward, Update


class Launchers(NamedTuple):
    """Unchecked functions of one device type; arguments.py has what they take.

    noise_fill(out, seed, sample_id, draw, stream, kind)
    """

    noise_fill: Callable[..., None]
    langevin_update: Callable[[Update], None]
    norm: Callable[[Norm], None]
    norm_workspace_size: Callable[[Tensor], int]
    norm_backward: Callable[[NormBackward], None]


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
            raise RuntimeError(f"a CUDA tensor needs Triton >= 3.6 ({error}): pip install 'sgm-engine[gpu]'") from error
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
