"""A convolution that asks the table of tuned shapes who computes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChosenConv(nn.Module):
    """``conv``, by the Triton kernel where sgm_engine.kernels.conv_table has its shape, else by PyTorch, that is cuDNN.

    The choice depends on the shape alone, and is the same in a capture as out of it. Under a gradient it is PyTorch's.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        from sgm_engine.kernels import conv_table, triton_conv

        conv, weight = self.conv, self.conv.weight
        if type(conv) is not nn.Conv2d:  # in a copy of the network for precision="float8": a Float8Conv
            return conv(x)
        learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        tile = None if learns else conv_table.choose(x, weight, conv.dilation[0])
        if tile is None or triton_conv.refusal(x, weight, tile):
            return conv(x)
        out = torch.empty_like(x[:, :1].expand(-1, len(weight), -1, -1), memory_format=torch.channels_last)
        triton_conv.convolution(x, weight, conv.bias, None, conv.dilation[0], out, None, tile)
        return out


def chosen(module: nn.Module, device: torch.device) -> nn.Module:
    """``module``, wrapped if it is a convolution that the kernel could do and something is tuned for this device."""
    if device.type != "cuda" or type(module) is not nn.Conv2d:
        return module
    from sgm_engine.kernels import conv_table

    k, d = module.kernel_size[0], module.dilation[0]
    same = module.kernel_size in ((1, 1), (3, 3)) and module.dilation == (d, d) and module.stride == (1, 1)
    plain = same and module.groups == 1 and module.padding_mode == "zeros" and module.padding == (k // 2 * d,) * 2
    hooked = module._forward_hooks or module._forward_pre_hooks
    tuned = conv_table.table().get(torch.cuda.get_device_name(device))
    return ChosenConv(module) if plain and not hooked and tuned else module
