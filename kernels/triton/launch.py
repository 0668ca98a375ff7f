"""A Triton launch, described before it is made, so that what aot/ compiles is what the launchers run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Launch:
    """One kernel call: ``arguments`` are passed at run time, ``constants`` are compiled in, like every None."""

    kernel: Any  # a triton.jit function
    programs: int  # every grid here has one axis: the others end at 65,535 programs
    arguments: dict[str, Tensor | TensorDescriptor | int | float | None]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps and the like

    def __call__(self) -> None:
        if self.programs:  # nothing to do for an empty batch, and CUDA refuses an empty grid
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


def is_channels_last(x: Tensor) -> bool:
    """True if [N, C, H, W] lies in memory as [N, H, W, C]; False if as it reads (and where both are the same)."""
    return not x.is_contiguous()
