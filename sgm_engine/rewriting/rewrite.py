"""Exact rewrites of a traced network: norms with their activation and sum, pooling, upsampling, sums from zero."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sgm_engine.kernels.digest import digests
from sgm_engine.rewriting.altered import altered
from sgm_engine.rewriting.biases import BiasFree
from sgm_engine.rewriting.norms import ADDS, NormRewrites, mean_window

ZEROS = (torch.zeros, torch.zeros_like)
FRESH = (*ADDS, *ZEROS, operator.mul, operator.truediv, operator.sub, F.interpolate, F.elu, F.relu, F.silu,
         F.avg_pool2d, F.max_pool2d, F.conv2d, torch.conv2d)  # fmt: skip


class Left(Exception):
    """Why a graph is not rewritten."""


class PooledConv(nn.Module):
    """conv, then a 2×2 mean, as one convolution of stride 2 whose kernel is one wider: ¼·Σ of the four shifted kernels.

    kernel: a buffer derived from conv.weight. It is rewritten, in place, as soon as the weight's version or memory has
    changed; under a gradient to the weight it is derived anew, differentiably. biased: conv's bias is added.
    """

    def __init__(self, conv: nn.Conv2d, biased: bool = True):
        super().__init__()
        self._conv = (conv,)  # in a tuple: the user's, not registered here
        self.biased = biased
        self.register_buffer("kernel", widened(conv.weight.detach()), persistent=False)
        self._seen = self._version()

    def __deepcopy__(self, memo: dict) -> PooledConv:
        new, given = PooledConv.__new__(PooledConv), id(self.kernel) in memo
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        # A copy that is given the buffer (a cast copy of the network) leaves it to whom it comes from.
        new._seen = None if given else new._version()
        return new

    def _version(self) -> tuple:
        weight = self._conv[0].weight
        return weight._version, weight.data_ptr(), weight.dtype, self.kernel.data_ptr(), digests([weight])

    def stale(self) -> bool:
        return self._seen is not None and self._seen != self._version()

    @torch.no_grad()
    def sync(self) -> None:
        if self._seen is not None:
            weight = self._conv[0].weight
            if self.kernel.dtype != weight.dtype or self.kernel.device != weight.device:
                self.kernel = self.kernel.to(weight)
            self.kernel.copy_(widened(weight))
            self._seen = self._version()

    def forward(self, x: Tensor) -> Tensor:
        conv = self._conv[0]
        if torch.is_grad_enabled() and conv.weight.requires_grad:
            kernel = widened(conv.weight)
        else:
            if self.stale():
                self.sync()
            kernel = self.kernel
        bias = conv.bias if self.biased else None
        return F.conv2d(x, kernel, bias, stride=2, padding=conv.padding, groups=conv.groups)


def widened(weight: Tensor) -> Tensor:
    """[O, I, k, k] → [O, I, k+1, k+1], the mean of the kernel at its four places."""
    return sum(F.pad(weight, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)) / 4


class Rewriter(NormRewrites):
    """Rewrites one graph in place. modules: name → module of the call_module nodes; report(action, where, what)."""

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        values: dict,
        report: Callable[[str, str], None],
        around_norms: bool = False,
    ):
        """around_norms: also an activation before a norm, a 5×5 mean after it, and the bias of a convolution before it
        become part of it, and what is upsampled for one stays in 16 bits."""
        self.around_norms = around_norms
        self.graph, self.modules, self.values = graph, modules, values
        self.report = lambda what, where: report(what, where.removeprefix("module."))
        self.places: dict[fx.Node, int] = {}  # of the nodes that were there when a rewrite began

    def run(self) -> None:
        self._drop_unused()
        self._make_additions_functional()
        norms = (self._residual, self._activation)
        if self.around_norms:
            norms = (self._before, *norms, self._pool, self._upsampled, self._biases)
        for rewrite in (self._upsampling, self._zero_sum, self._mean_pool, *norms):
            self.places = {node: i for i, node in enumerate(self.graph.nodes)}
            for node in list(self.graph.nodes):
                if not node._erased:
                    rewrite(node)
            self._drop_unused()

    def _shape(self, node: object) -> tuple | None:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None

    def _module(self, node: object) -> nn.Module | None:
        return self.modules.get(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        self.values.setdefault(new, self.values.get(old))
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def _drop_unused(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("output", "placeholder") and not _in_place(node, self._module(node)):
                self.graph.erase_node(node)

    def _make_additions_functional(self) -> None:
        """a += b → a + b where nothing else sees a change; any other change in place could make a rewrite wrong."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in list(self.graph.nodes):
            if not _in_place(node, self._module(node)) or self._shape(node.args[0]) is None:
                continue
            target = node.args[0]
            others = [user for user in target.users if user is not node]
            fresh = all(self._is_fresh(n) for n in (target, *others))
            if not fresh or any(order[user] > order[node] for user in others):
                raise Left(f"{node.name} changes in place what is used elsewhere")
            if node.target is operator.iadd or node.target == "add_":
                node.op, node.target = "call_function", operator.add
            elif others:
                raise Left(f"{node.name} changes in place what is used elsewhere")

    def _is_fresh(self, node: object) -> bool:
        """Its result is memory of its own, not a view."""
        if not isinstance(node, fx.Node) or _in_place(node, self._module(node)):
            return False
        if node.op == "call_module":
            return not isinstance(self._module(node), (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout))
        return node.op == "call_function" and node.target in FRESH

    def _upsampling(self, node: fx.Node) -> None:
        module = self._module(node)
        mode = node.kwargs.get("mode") if node.target is F.interpolate else getattr(module, "mode", None)
        if not (node.target is F.interpolate or isinstance(module, nn.Upsample)) or not node.args:
            return
        if mode in ("bilinear", "nearest") and self._shape(node) == self._shape(node.args[0]):
            self.report("identity upsampling removed", node.name)
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)

    def _zero_sum(self, node: fx.Node) -> None:
        if not self._is_add(node):
            return
        for zero, other in (node.args, node.args[::-1]):
            is_zero = isinstance(zero, fx.Node) and zero.op == "call_function" and zero.target in ZEROS
            if is_zero and self._shape(other) == self._shape(node):
                self.report("sum from zero removed", node.name)
                node.replace_all_uses_with(other)
                self.graph.erase_node(node)
                return

    def _mean_pool(self, node: fx.Node) -> None:
        """conv → mean pool: one strided convolution; for a 1×1 kernel the pool goes first."""
        source = self._pooled(node)
        conv = self._module(source)
        if type(conv) is not nn.Conv2d or len([u for u in source.users if self._feeds_only(u, node)]) != len(
            source.users
        ):
            return
        plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        if not plain or isinstance(conv.padding, str) or altered(conv):
            self.report("left: a pooled convolution with stride, dilation, padding mode or hooks", source.target)
            return
        with self.graph.inserting_before(node):
            if conv.kernel_size == (1, 1) and conv.padding == (0, 0):
                pool = self.graph.call_function(F.avg_pool2d, (source.args[0], 2))
                new = self.graph.call_module(source.target, (pool,))
                self.report("2×2 mean before a 1×1 convolution", source.target)
            else:
                name = f"pooled_{source.name}"
                self.modules[name] = PooledConv(conv)
                new = self.graph.call_module(name, (source.args[0],))
                self.report("convolution and 2×2 mean as one", source.target)
        self._replace(node, new)

    def _convolution(self, node: object) -> nn.Module | None:
        """The user's convolution that a call computes, by itself or with a 2×2 mean."""
        module = self._module(node)
        return module._conv[0] if isinstance(module, PooledConv) else module

    def _freed(self, node: fx.Node) -> nn.Module:
        """What computes a convolution without its bias."""
        conv, module = self._convolution(node), self._module(node)
        return PooledConv(conv, biased=False) if isinstance(module, PooledConv) else BiasFree(conv)

    def _feeds_only(self, user: fx.Node, end: fx.Node) -> bool:
        """All that becomes of ``user`` is ``end``."""
        return user is end or (bool(user.users) and all(self._feeds_only(u, end) for u in user.users))

    def _pooled(self, node: fx.Node) -> fx.Node | None:
        """What ``node`` is the 2×2 mean of, written as a pool or as a quarter of the four strided slices."""
        module = self._module(node)
        if isinstance(module, nn.AvgPool2d) or node.target is F.avg_pool2d:
            return node.args[0] if mean_window(node, module) == (2, 2, 0) else None
        if node.target not in (operator.truediv, torch.div, operator.mul, torch.mul) or len(node.args) != 2:
            return None
        if node.args[1] not in ((4, 4.0) if node.target in (operator.truediv, torch.div) else (0.25,)):
            return None
        terms = list(self._terms(node.args[0]))
        sources = {t.args[0] for t in terms if isinstance(t, fx.Node) and t.target is operator.getitem}
        places = {p for t in terms if isinstance(t, fx.Node) and (p := _phase(t)) is not None}
        even = len(sources) == 1 and all(n % 2 == 0 for n in self._shape(next(iter(sources)))[0][2:])
        return sources.pop() if len(terms) == 4 and len(places) == 4 and even else None

    def _terms(self, node: object) -> Iterator[object]:
        """The terms of a sum, without zeros."""
        if self._is_add(node):
            for arg in node.args:
                yield from self._terms(arg)
        elif node != 0:
            yield node


def _phase(node: fx.Node) -> tuple[int, int] | None:
    """(row, column) of the slice t[:, :, row::2, column::2]."""
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or len(index) != 4 or any(i != slice(None) for i in index[:2]):
        return None
    if any(
        not isinstance(i, slice) or i.step != 2 or i.stop is not None or i.start not in (None, 0, 1) for i in index[2:]
    ):
        return None
    return tuple(i.start or 0 for i in index[2:])


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        return bool(node.kwargs.get("inplace")) or in_place or node.target in (
            operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.setitem)  # fmt: skip
    return bool(getattr(module, "inplace", False))
