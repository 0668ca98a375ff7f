"""A convolution whose bias a norm adds: on a GPU PyTorch adds one in a kernel of its own, after cuDNN's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


class BiasFree(nn.Module):
    """``conv`` without its bias. In a copy for precision="float8" it may be a Float8Conv."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return without_bias(self.conv, x)


class BiasOf(nn.Module):
    """() → the bias of ``conv``, float32 [C], read where it lies at every call."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self) -> Tensor:
        return self.conv.bias


def without_bias(conv: nn.Module, x: Tensor) -> Tensor:
    """Hooks that look at a copy's inputs, as a calibration sets them, see x; a user's keep their convolution whole."""
    if isinstance(conv, nn.Conv2d):
        for hook in conv._forward_pre_hooks.values():
            hook(conv, (x,))
        return conv._conv_forward(x, conv.weight, None)
    return conv(x, biased=False)


def folded(network: nn.Module) -> Iterator[Tensor]:
    """The biases that the norms of a rewritten network add, in float32 whatever its precision."""
    return (part.conv.bias for part in network.modules() if isinstance(part, BiasOf))
