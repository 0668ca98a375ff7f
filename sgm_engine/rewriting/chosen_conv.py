"""Convolutions that ask the table of tuned shapes who computes them, and whether with the norm that follows."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from sgm_engine.rewriting.altered import altered
from sgm_engine.rewriting.biases import BiasFree, without_bias
from sgm_engine.rewriting.float8.conv import Float8Conv, launch
from sgm_engine.rewriting.recognise import FusedNorm


class ChosenConv(nn.Module):
    """``conv``, by the Triton kernel where kernels/tables/conv.py has its shape, else by PyTorch, that is cuDNN.

    The choice depends on the shape alone, and is the same in a capture as out of it. Under a gradient it is PyTorch's.
    conv: the user's, or in a copy of the network for precision="float8" a Float8Conv, which chooses its own tile.
    biased: its bias is added here, and not by a norm.
    """

    def __init__(self, conv: nn.Conv2d, biased: bool = True):
        super().__init__()
        self.conv, self.biased = conv, biased

    def forward(self, x: Tensor) -> Tensor:
        found = None if isinstance(self.conv, Float8Conv) else self.tuned(x, self.conv.bias if self.biased else None)
        if found is not None:
            return found[0]
        return self.conv(x) if self.biased else without_bias(self.conv, x)

    def tuned(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        then: str = "",
        residual_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """(x ∗ weight + residual + biases, the partials of a norm ``then``) if the table has that, or None."""
        from sgm_engine.kernels.tables import conv as conv_table
        from sgm_engine.kernels.triton import conv as triton_conv

        conv = self.conv
        if _learns(self, x, residual):
            return None
        if isinstance(conv, Float8Conv):
            return conv.tuned(x, bias, residual, then, residual_bias)
        tile = conv_table.choose(x, conv.weight, conv.dilation[0], then)
        if tile is None or triton_conv.refusal(x, conv.weight, tile, bool(then), residual):
            return None
        given = (x, conv.weight, bias, conv.dilation[0], tile, x.dtype, None)
        return launch(*given, residual, bool(then), residual_bias)


class ConvNorm(nn.Module):
    """conv(x) + residual, then norm, whose statistics the convolution leaves where the table has the two together.

    Takes what the norm takes and returns (norm, conv(x) + residual). bias: the convolution's, if the norm is to add it;
    residual_bias: of the residual. The one kernel adds both.
    """

    def __init__(self, conv: ChosenConv, norm: FusedNorm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(
        self,
        x: Tensor,
        level: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
        residual_bias: Tensor | None = None,
        **options: object,
    ):
        then = "norm" if residual is None else "sum and norm"
        found = None
        if not _learns(self.norm, residual_bias):
            found = self.conv.tuned(x, self.conv.conv.bias, residual, then, residual_bias)
        if found is not None:
            total, partials = found
            return self.norm(total, level, partials=partials, **options), total
        x = self.conv(x)
        y = self.norm(x, level, residual=residual, bias=bias, residual_bias=residual_bias, **options)
        return (y, x) if residual is None else y


def chosen(module: nn.Module, device: torch.device) -> nn.Module:
    """``module``, wrapped if it is a convolution that the kernel could do and something is tuned for this device."""
    if isinstance(module, BiasFree):
        found = chosen(module.conv, device)
        return ChosenConv(module.conv, biased=False) if isinstance(found, ChosenConv) else module
    if device.type != "cuda" or type(module) is not nn.Conv2d:
        return module
    from sgm_engine.kernels.tables import conv as conv_table

    k, d = module.kernel_size[0], module.dilation[0]
    same = module.kernel_size in ((1, 1), (3, 3)) and module.dilation == (d, d) and module.stride == (1, 1)
    plain = same and module.groups == 1 and module.padding_mode == "zeros" and module.padding == (k // 2 * d,) * 2
    hooked = altered(module)
    tuned = conv_table.table().get(torch.cuda.get_device_name(device))
    return ChosenConv(module) if plain and not hooked and tuned else module


def join_norms(graph: fx.Graph, modules: dict[str, nn.Module], report: Callable[[str, str], None]) -> None:
    """In place: a norm of a ChosenConv's result, or of its sum with something, becomes a ConvNorm with it."""
    places = {node: i for i, node in enumerate(graph.nodes)}
    for norm in list(graph.nodes):
        if not isinstance(_called(norm, modules), FusedNorm) or "before" in norm.kwargs:
            continue
        (conv, *level), options = norm.args, dict(norm.kwargs)
        residual, biases = options.get("residual"), [options.pop(name, None) for name in ("bias", "residual_bias")]
        if residual is not None and not _added(conv, modules):
            conv, residual, biases = residual, conv, biases[::-1]
        options |= {"residual": residual, "bias": biases[0], "residual_bias": biases[1]}
        if residual is None:  # others may read the convolution before the norm: it moves to where that was
            joins = isinstance(_called(conv, modules), ChosenConv) and all(places[n] < places[conv] for n in level)
        else:
            joins = _added(conv, modules)
        if not joins:
            continue
        name = f"{conv.target}_{norm.target}"
        modules[name] = ConvNorm(modules[conv.target], modules[norm.target])
        report("norm with the convolution before it, where the table has both", norm.target.removeprefix("module."))
        with graph.inserting_before(conv if residual is None else norm):
            options = {name: value for name, value in options.items() if value is not None}
            both = graph.call_module(name, (*conv.args, *level), options)
        if residual is None:
            with graph.inserting_after(both):
                y, total = (graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
            norm.replace_all_uses_with(y)
            conv.replace_all_uses_with(total, lambda user, norm=norm: user is not norm)
        else:
            norm.replace_all_uses_with(both)
        graph.erase_node(norm)
        graph.erase_node(conv)


def _learns(module: nn.Module, *tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for, which the kernels do not have."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *module.parameters()))


def _called(node: object, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules.get(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _added(conv: object, modules: dict[str, nn.Module]) -> bool:
    """A convolution whose result becomes part of a sum and nothing else."""
    return isinstance(_called(conv, modules), ChosenConv) and len(conv.users) == 1
