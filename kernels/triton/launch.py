"""A Triton launch, described before it is made, so that what aot/ compiles is what the launchers run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Launch:
    """One kernel call: ``arguments`` are passed at run time, ``constants`` are compiled in, like every None.

    Every product and sum is rounded by itself, but for what a kernel writes as tl.fma: of a sum of squares that the
    compiler fuses as it likes, threads that should hold one value hold several, and a − a·b need not be 0 where b is 1.
    """

    kernel: Any  # a triton.jit function
    programs: int  # every grid here has one axis: the others end at 65,535 programs
    arguments: dict[str, Tensor | TensorDescriptor | int | float | None]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)  # num_warps and the like

    @property
    def settings(self) -> dict[str, Any]:
        """What Triton is told; its default for fusion depends on its version."""
        return {"enable_fp_fusion": False, **self.options}

    def __call__(self) -> None:
        if self.programs:  # nothing to do for an empty batch, and CUDA refuses an empty grid
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.settings)


def is_channels_last(x: Tensor) -> bool:
    """True if [N, C, H, W] lies in memory as [N, H, W, C]; False if as it reads (and where both are the same)."""
    return not x.is_contiguous()
