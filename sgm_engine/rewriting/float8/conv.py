"""A convolution in float8 (e4m3), from weights that it quantises itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sgm_engine.kernels.reference import E4M3_MAX, float8_convolution, quantised

if TYPE_CHECKING:
    from sgm_engine.kernels.triton.conv import ConvTile

FLOAT8 = torch.float8_e4m3fn


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    tile: ConvTile,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    partials: bool = False,
    residual_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(x ∗ weight + residual + biases in ``dtype``, the partials of a norm of it if asked for), by Triton."""
    from sgm_engine.kernels.triton import conv as triton_conv

    if residual_bias is not None:
        bias = residual_bias if bias is None else bias + residual_bias
    n, _, height, width = x.shape
    y = torch.empty(n, len(weight), height, width, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    slabs = (n, height * width // tile.pixels, 2, len(weight))
    left = torch.empty(slabs, dtype=torch.float32, device=x.device) if partials else None
    triton_conv.convolution(x, weight, bias, residual, dilation, y, left, tile, scale)
    return y, left


class Float8Conv(nn.Module):
    """3×3, stride 1, size kept: x and weight in float8, products summed in float32, bias added, bfloat16 out.

    inverse: what x is multiplied by before it becomes float8. weight: float8 [Cout, Cin, 3, 3], channels_last;
    scale: float32 [Cout], what a product of two float8 is worth. ``load`` writes them, in place.
    """

    def __init__(self, conv: nn.Conv2d, inverse: float, emulate: bool):
        super().__init__()
        self.inverse, self.emulate, self.dilation = inverse, emulate, conv.dilation[0]
        weight = torch.empty_like(conv.weight, dtype=FLOAT8, memory_format=torch.channels_last, requires_grad=False)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.empty(len(weight), dtype=torch.float32, device=weight.device))
        self.register_buffer("bias", None if conv.bias is None else torch.empty_like(self.scale))

    @torch.no_grad()
    def load(self, conv: nn.Conv2d) -> None:
        """Quantise conv's weights as they are now, each output channel by its largest."""
        weight = conv.weight.float()
        scale = weight.abs().amax((1, 2, 3)).div_(E4M3_MAX).clamp_min_(torch.finfo(torch.float32).tiny)
        self.weight.copy_(quantised(weight / scale[:, None, None, None], 1.0))
        self.scale.copy_(scale / self.inverse)
        if self.bias is not None:
            self.bias.copy_(conv.bias)

    def forward(self, x: Tensor, biased: bool = True) -> Tensor:
        """x: any float [N, Cin, H, W], or already what quantised(x, inverse) is → bfloat16 [N, Cout, H, W].

        biased: the bias is added here, and not by a norm.
        """
        bias = self.bias if biased else None
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("precision='float8' has no gradient: use precision='bfloat16' where one is needed")
        if self.emulate:
            with torch.autocast(x.device.type, enabled=False):
                y = float8_convolution(x, self.weight, self.scale, self.inverse, bias, None, self.dilation)
            return y.to(torch.bfloat16)
        from sgm_engine.kernels.tables import conv as conv_table
        from sgm_engine.kernels.triton import conv as triton_conv

        c_out, c_in, *_ = self.weight.shape
        tile = conv_table.choose(x, self.weight, self.dilation) or triton_conv.float8_tile(c_in, c_out)
        return self._launch(self._quantised(x), tile, bias)[0]

    def tuned(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        then: str,
        residual_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """(x ∗ weight + residual + biases, the partials of a norm ``then``) if the table has that, or None."""
        from sgm_engine.kernels.tables import conv as conv_table
        from sgm_engine.kernels.triton import conv as triton_conv

        tile = None if self.emulate else conv_table.choose(x, self.weight, self.dilation, then)
        if tile is None or triton_conv.refusal(x8 := self._quantised(x), self.weight, tile, bool(then), residual):
            return None
        return self._launch(x8, tile, bias, residual, bool(then), residual_bias)

    def _quantised(self, x: Tensor) -> Tensor:
        from sgm_engine.kernels.triton import float8 as triton_float8

        x = x.contiguous(memory_format=torch.channels_last)
        if x.dtype == FLOAT8:
            return x
        x8 = torch.empty_like(x, dtype=FLOAT8)
        triton_float8.quantise(x, self.inverse, x8)
        return x8

    def _launch(
        self,
        x8: Tensor,
        tile: ConvTile,
        bias: Tensor | None,
        residual: Tensor | None = None,
        partials: bool = False,
        residual_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        given = (x8, self.weight, bias, self.dilation, tile, torch.bfloat16, self.scale)
        return launch(*given, residual, partials, residual_bias)
