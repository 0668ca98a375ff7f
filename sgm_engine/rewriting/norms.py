"""Exact rewrites round a norm: what is done before and after it becomes part of the fused op."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sgm_engine.rewriting.altered import altered
from sgm_engine.rewriting.biases import BiasOf
from sgm_engine.rewriting.chosen_conv import ConvNorm
from sgm_engine.rewriting.recognise import FusedNorm

ADDS = (operator.add, torch.add)
POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
KEEPS_CONSTANTS = ("nearest", "bilinear")  # ways to upsample: of the same everywhere they make the same everywhere
ACTIVATIONS = {
    F.elu: "elu", F.silu: "silu", F.relu: "relu", torch.relu: "relu", torch.relu_: "relu",
    "relu": "relu", "relu_": "relu", nn.ELU: "elu", nn.ReLU: "relu", nn.SiLU: "silu",
}  # fmt: skip


class NormRewrites:
    """The part of Rewriter (rewrite.py) that is about norms."""

    def _residual(self, node: fx.Node) -> None:
        """norm(a + b) → the norm makes the sum too, and returns both. It moves to where the sum was."""
        if not isinstance(self._module(node), FusedNorm) or {"residual", "before"} & set(node.kwargs):
            return
        total, *level = node.args
        if not self._is_sum(total) or self._is_late(level, total):
            return
        a, b = total.args
        with self.graph.inserting_before(total):
            both = self.graph.call_module(node.target, (a, *level), {**node.kwargs, "residual": b})
        self.report("sum fused into the norm", node.target)
        self._returns_both(both, node, total)

    def _activation(self, node: fx.Node) -> None:
        """norm → activation, where nothing else reads the norm."""
        name = self._activation_name(node)
        norm = node.args[0] if name else None
        call = self._norm_call(norm)
        if call is None or "activation" in call.kwargs:
            return
        call.kwargs = {**call.kwargs, "activation": name}
        self.report(f"norm with {name}", call.target)
        node.replace_all_uses_with(norm)
        self.graph.erase_node(node)

    def _before(self, node: fx.Node) -> None:
        """norm(act(a)) or norm(act(a + b)) → the norm activates, and returns that too. It moves to where act was."""
        name = self._activation_name(node.args[0]) if isinstance(self._module(node), FusedNorm) else None
        if not name or name == "none" or {"residual", "before"} & set(node.kwargs):
            return
        activated, *level = node.args
        a, extra = activated.args[0], {}
        if self._is_sum(a) and len(a.users) == 1:
            a, extra["residual"] = a.args
        if self._is_late(level, activated) or self._shape(a) is None:
            return
        with self.graph.inserting_before(activated):
            both = self.graph.call_module(node.target, (a, *level), {**node.kwargs, "before": name, **extra})
        self.report(f"{name} before the norm, with its sum" if extra else f"{name} before the norm", node.target)
        self._returns_both(both, node, activated)

    def _returns_both(self, both: fx.Node, y: fx.Node, x: fx.Node) -> None:
        """both = (y, x), in place of these two."""
        with self.graph.inserting_after(both):
            second = self.graph.call_function(operator.getitem, (both, 1))
            first = self.graph.call_function(operator.getitem, (both, 0))
        self._replace(y, first)
        self._replace(x, second)
        self.values[both] = (self.values[first], self.values[second])

    def _is_late(self, level: list, end: fx.Node) -> bool:
        """Whether the level is made only after ``end``, where the norm is to move."""
        return any(self.places.get(n, 1 << 60) > self.places.get(end, -1) for n in level)

    def _is_sum(self, node: object) -> bool:
        """a + b of two tensors of one shape and dtype."""
        if not self._is_add(node) or not all(isinstance(n, fx.Node) for n in node.args):
            return False
        a, b = node.args
        return a is not b and self._shape(a) == self._shape(b) == self._shape(node)

    def _pool(self, node: fx.Node) -> None:
        """norm → 5×5 mean of stride 1, where nothing else reads the norm."""
        module = self._module(node)
        if not (isinstance(module, nn.AvgPool2d) or node.target is F.avg_pool2d) or not node.args:
            return
        norm = node.args[0]
        call = self._norm_call(norm)
        if call is None or mean_window(node, module) != (5, 1, 2) or "activation" in call.kwargs:
            return
        call.kwargs = {**call.kwargs, "pool": True}
        self.report("5×5 mean of a norm", call.target)
        node.replace_all_uses_with(norm)
        self.graph.erase_node(node)

    def _upsampled(self, node: fx.Node) -> None:
        """upsampling → norm of its sum with a convolution's result, which rounds the sum to that one's 16 bits."""
        if node.op != "call_function" or node.target is not F.interpolate or len(node.users) != 1:
            return
        (norm,) = node.users
        if not isinstance(self._module(norm), FusedNorm) or "residual" not in norm.kwargs:
            return
        other = norm.kwargs["residual"] if norm.args[0] is node else norm.args[0]
        if isinstance(self._module(other), nn.Conv2d):
            node.target = upsampled
            self.report("upsampling in 16 bits, for the sum after it", node.name)

    def _biases(self, norm: fx.Node) -> None:
        """norm of conv(x), a + conv(x) or a + upsampled(conv(x)) → it adds conv's bias, if nothing else reads conv."""
        if not isinstance(self._module(norm), FusedNorm):
            return
        for name, source in (("bias", norm.args[0]), ("residual_bias", norm.kwargs.get("residual"))):
            conv = self._biased(source)
            if conv is None:
                continue
            with self.graph.inserting_before(conv):
                bias, free = f"bias_of_{conv.name}", f"free_{conv.name}"
                self.modules[bias], self.modules[free] = BiasOf(self._convolution(conv)), self._freed(conv)
                norm.kwargs = {**norm.kwargs, name: self.graph.call_module(bias, ())}
                self.report("bias of a convolution added by the norm", conv.target)
                self._replace(conv, self.graph.call_module(free, conv.args))

    def _biased(self, source: object) -> fx.Node | None:
        """The call of a convolution that ``source`` is or is upsampled from, if it has a bias and one reader."""
        if isinstance(source, fx.Node) and source.target in (F.interpolate, upsampled) and _is_plain(source):
            source = source.args[0] if source.kwargs.get("mode") in KEEPS_CONSTANTS else None
        conv = self._convolution(source)
        if type(conv) is not nn.Conv2d or conv.bias is None or conv.bias.dtype != torch.float32 or altered(conv):
            return None
        return source if _is_plain(source) and not source.kwargs else None

    def _norm_call(self, norm: object) -> fx.Node | None:
        return norm_call(norm, self._module)

    def _activation_name(self, node: fx.Node) -> str | None:
        if not isinstance(node, fx.Node) or node.op not in ("call_module", "call_function", "call_method"):
            return None
        module = self._module(node)
        name = ACTIVATIONS.get(type(module) if module is not None else node.target)
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        alpha = getattr(module, "alpha", node.kwargs.get("alpha", node.args[1] if len(node.args) > 1 else 1.0))
        return None if name == "elu" and alpha != 1.0 else name

    def _is_add(self, node: object) -> bool:
        return (
            isinstance(node, fx.Node)
            and node.op == "call_function"
            and node.target in ADDS
            and len(node.args) == 2
            and not node.kwargs
        )


def _is_plain(node: fx.Node) -> bool:
    """Of one argument without a name, and read once."""
    return len(node.args) == 1 and len(node.users) == 1


def upsampled(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    """F.interpolate in x's dtype: a GPU's autocast would do it in float32, with a cast before and one after it."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, *args, **kwargs)


def norm_call(norm: object, module: Callable[[fx.Node], nn.Module | None]) -> fx.Node | None:
    """The call of a fused norm whose result ``norm`` is, if it has one reader. module: what a node calls."""
    if not isinstance(norm, fx.Node) or len(norm.users) != 1:
        return None
    picked = norm.op == "call_function" and norm.target is operator.getitem
    call = norm.args[0] if picked else norm
    if not isinstance(module(call), (FusedNorm, ConvNorm)) or (picked and norm.args[1] != 0):
        return None
    return call


def mean_window(node: fx.Node, module: nn.Module | None) -> tuple[int, int, int] | None:
    """(kernel, stride, padding) of a square mean pool that counts its padding; None if it is another."""
    if isinstance(module, nn.AvgPool2d):
        given = {name: getattr(module, name) for name in POOL[:6]}
    else:
        given = dict(zip(POOL, node.args[1:], strict=False)) | {k: v for k, v in node.kwargs.items() if k != "input"}
    kernel, stride, padding = given["kernel_size"], given.get("stride"), given.get("padding", 0)
    if given.get("ceil_mode") or given.get("divisor_override") is not None:
        return None
    window = [
        n if isinstance(n, int) else n[0] if len(set(n)) == 1 else None for n in (kernel, stride or kernel, padding)
    ]
    if None in window or (window[2] and not given.get("count_include_pad", True)):
        return None
    return tuple(window)
