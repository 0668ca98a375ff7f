"""What a call in a traced graph is to the native executor: a pool, an interpolation, an activation, an affine map."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sgm_engine.executors.native.norm import Table
from sgm_engine.rewriting.norms import ACTIVATIONS

POOLS = {"mean": (nn.AvgPool2d, (F.avg_pool2d,)), "max": (nn.MaxPool2d, (F.max_pool2d, torch.max_pool2d))}


class Call:
    """A call of a module or of a function, and its arguments by name."""

    def __init__(self, node: fx.Node, module: nn.Module | None):
        self.node, self.module = node, module

    def get(self, name: str, position: int, default: object = None) -> object:
        if self.module is not None:
            return getattr(self.module, name, default)
        args = self.node.args
        return args[position] if len(args) > position else self.node.kwargs.get(name, default)

    def activation(self) -> str | None:
        """Its name, if the executor has it."""
        name = ACTIVATIONS.get(self.node.target if self.module is None else type(self.module))
        return None if name == "elu" and self.get("alpha", 1, 1.0) != 1 else name

    def is_pool(self, kind: str, kernel: int, stride: int, padding: int) -> bool:
        """Whether it is the "mean" or "max" of square windows, none of them cut off."""
        module, functions = POOLS[kind]
        if type(self.module) is not module and self.node.target not in functions:
            return False
        size = self.get("kernel_size", 1)
        found = [_single(size), _single(self.get("stride", 2) or size), _single(self.get("padding", 3, 0))]
        if kind == "max":
            plain = _single(self.get("dilation", 4, 1)) == 1 and not self.get("return_indices", 6, False)
            plain = plain and not self.get("ceil_mode", 5, False)
        else:
            plain = self.get("count_include_pad", 5, True) and self.get("divisor_override", 6) is None
            plain = plain and not self.get("ceil_mode", 4, False)
        return found == [kernel, stride, padding] and bool(plain)

    def interpolation(self) -> str | None:
        """ "nearest", "bilinear" with aligned corners, or None."""
        if self.node.target is not F.interpolate and type(self.module) is not nn.Upsample:
            return None
        mode = self.get("mode", 3, "nearest")
        if self.module is None and self.get("antialias", 6, False):
            return None
        return mode if mode == "nearest" or (mode == "bilinear" and self.get("align_corners", 4)) else None


def batch_norm(module: nn.BatchNorm2d) -> tuple[Table, Table]:
    """Scale and shift of its evaluation mode."""
    tensors = tuple(t for t in (module.running_mean, module.running_var, module.weight, module.bias) if t is not None)

    def scale() -> Tensor:
        rstd = (module.running_var + module.eps).rsqrt()
        return (rstd if module.weight is None else module.weight * rstd)[None]

    def shift() -> Tensor:
        return (0 if module.bias is None else module.bias) - module.running_mean * scale()

    return Table(scale, 1, tensors), Table(shift, 1, tensors)


def _single(value: object) -> object:
    """n of n or (n, n)."""
    return value[0] if isinstance(value, (tuple, list)) and len(set(value)) == 1 else value
