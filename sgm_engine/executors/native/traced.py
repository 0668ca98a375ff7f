"""Any module as layers of the native executor: torch.fx's graph of it, as ``accelerate`` rewrites it, walked once.

What depends on the level alone (embeddings, tables of sigmas, networks of the time) is no part of the walk: it is
evaluated for every level when weights are packed, and becomes a table. The rest must be layers of ``Graph``. A norm, an
activation or a scale waits at its value for whoever reads it; a convolution waits for its addends.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import fx, nn

from sgm_engine.executors.native.calls import Call, batch_norm
from sgm_engine.executors.native.graph import Graph, Value
from sgm_engine.executors.native.levels import LevelTables
from sgm_engine.executors.native.norm import Norm, Table, Unsupported, affine, norm_of
from sgm_engine.models.score_model import checked_score
from sgm_engine.rewriting.acceleration import Accelerated, Traced
from sgm_engine.rewriting.recognise import FusedNorm
from sgm_engine.rewriting.rewrite import PooledConv
from sgm_engine.rewriting.trace import untraceable

IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in evaluation mode, which accelerate asks for
SAME = {"float", "contiguous", "clone", "detach", "to", "type_as"}  # methods that leave float32 values as they are
ADD = (operator.add, torch.add, operator.iadd, "add", "add_")
SUB = (operator.sub, torch.sub, operator.isub, "sub", "sub_")
MUL = (operator.mul, torch.mul, operator.imul, "mul", "mul_")
DIV = (operator.truediv, torch.div, operator.itruediv, "div", "div_")
ONE, ZERO, MINUS_ONE = (Table.of(n) for n in (1, 0, -1))


@dataclass(frozen=True)
class Read:
    """activation(norm(x)), which the reading layer computes."""

    x: Value
    norm: Norm | None = None
    activation: str = "none"

    def then(self, scale: Table, shift: Table) -> Read:
        """scale·x + shift, of a value without activation."""
        return Read(self.x, (self.norm or affine(self.x.channels)).then(scale, shift))


@dataclass(frozen=True)
class Waiting:
    """A layer that takes addends, not emitted yet."""

    emit: Callable[[list[Value]], Value]
    add: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Input:
    """scale·x + shift of the network's input."""

    scale: float = 1.0
    shift: float = 0.0


Form = Read | Waiting | Input


class _Last(NamedTuple):
    conv: fx.Node
    nodes: list[fx.Node]  # it and what follows
    divisor: Table | None


def lower_traced(graph: Graph, model: nn.Module, shape: tuple[int, int, int], levels: int) -> None:
    """As lower_recorded, which says more of why it cannot."""
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        raise Unsupported("it holds no convolution")
    accelerated = model if isinstance(model, Accelerated) else Accelerated(model)
    if reason := untraceable(accelerated.source):
        raise Unsupported(reason)
    x = torch.zeros(1, *shape, dtype=torch.float32, device="cpu")
    level = torch.zeros(1, dtype=torch.int64, device="cpu")
    try:
        with torch.no_grad():
            traced = accelerated.traced(accelerated.norms(), x, level)
    except Exception as error:  # whatever the user's forward does that tracing cannot follow
        raise Unsupported(f"its forward cannot be traced ({type(error).__name__}: {str(error)[:120]})") from error
    if traced.left:
        raise Unsupported(traced.left)
    try:
        _Walk(graph, traced, shape, levels).run()
    except Unsupported:
        raise
    except ValueError as reason:  # of the C++: a shape that has no layer
        raise Unsupported(str(reason)) from reason


class _Walk:
    def __init__(self, graph: Graph, traced: Traced, shape: tuple[int, int, int], levels: int):
        self.graph, self.modules, self.values, self.shape = graph, traced.modules, traced.values, shape
        self.nodes = list(traced.graph.nodes)
        self.tables = LevelTables(traced, levels)
        self.forms: dict[fx.Node, Form] = {}

    def run(self) -> None:
        end = self.nodes[-1].args[0]
        if not isinstance(end, fx.Node) or self.tables.has(end):
            raise Unsupported("its output does not depend on x")
        last = self._last(end)
        for node in self.nodes[:-1]:
            if not self.tables.has(node) and not self._is_pair(node) and not (last and node in last.nodes):
                form = self._lower(node)
                shared = len(node.users) > 1 and not isinstance(form, Input)  # computed once
                self.forms[node] = Read(self._emit(form)) if shared else form
        read = self._read(last.conv.args[0] if last else end)
        conv = self._module(last.conv) if last else self._identity(read.x)
        self.graph.store(read.x, conv, read.norm, read.activation)
        if last and last.divisor:
            self.graph.divide_by(last.divisor)

    def _identity(self, x: Value) -> nn.Conv2d:
        """A convolution that changes nothing, for an output that is none."""
        if x[1:] != self.shape:
            raise Unsupported(f"its output is {x[1:]}, and x is {self.shape}")
        conv = nn.Conv2d(x.channels, x.channels, 1, bias=False)
        with torch.no_grad():
            conv.weight.copy_(torch.eye(x.channels)[:, :, None, None])
        return conv

    def _last(self, end: fx.Node) -> _Last | None:
        """The convolution that ends the network and what it is divided by, if nothing else reads it."""
        nodes, divisor, node = [end], None, end
        while type(self._module(node)) is not nn.Conv2d:
            inner = node.args[0] if self._is_identity(node) else None
            if node.target in DIV + MUL and len(node.args) == 2 and divisor is None:
                for one, other in (node.args, node.args[::-1])[: 1 + (node.target in MUL)]:
                    if not self.tables.has(one) and (table := self.tables.scalars(other)):
                        inner, divisor = one, table.map(torch.reciprocal) if node.target in MUL else table
            if not isinstance(inner, fx.Node) or len(inner.users) != 1:
                return None
            nodes.append(node := inner)
        same = self._module(node).stride == (1, 1) and self.values[node].shape[1:] == self.shape
        return _Last(node, nodes, divisor) if same and self._size(node) == self._size(node.args[0]) else None

    def _is_identity(self, node: fx.Node) -> bool:
        if node.op == "call_method" and node.target in SAME:
            return self.values[node].dtype == torch.float32
        return isinstance(self._module(node), IDENTITIES) or node.target is checked_score

    def _lower(self, node: fx.Node) -> Form:
        if node.op == "placeholder":
            return Input()
        module, call = self._module(node), Call(node, self._module(node))
        if isinstance(module, PooledConv) or type(module) is nn.Conv2d:
            return self._conv(node, module)
        if isinstance(module, FusedNorm):
            return self._norm(node)
        if type(module) is nn.BatchNorm2d and module.track_running_stats:
            return self._scaled(self._form(node.args[0]), *batch_norm(module))
        if self._is_identity(node):
            return self._form(node.args[0])
        if node.target is operator.getitem and self._is_pair(node.args[0]):
            return self._norm_of_sum(node)
        if activation := call.activation():
            read = self._read(node.args[0])
            return replace(read if read.activation == "none" else Read(self._emit(read)), activation=activation)
        if module is None and node.target in (*ADD, *SUB, *MUL, *DIV, operator.neg):
            return self._arithmetic(node)
        if node.target is torch.cat and (node.args[1:] or [node.kwargs.get("dim", 0)])[0] in (1, -3):
            first, *rest = (self._emit(self._form(n)) for n in node.args[0])
            for value in rest:
                first = self.graph.concat(first, value)
            return Read(first)
        return self._resized(node, call)

    def _conv(self, node: fx.Node, module: nn.Module) -> Form:
        pool = isinstance(module, PooledConv)
        conv, read = module._conv[0] if pool else module, self._read(node.args[0])
        if pool and conv.kernel_size != (3, 3):
            return Read(self.graph.mean_pool(self.graph.conv(read.x, conv, read.norm, read.activation)))
        return Waiting(lambda add: self.graph.conv(read.x, conv, read.norm, read.activation, add, pool))

    def _norm(self, node: fx.Node) -> Form:
        if set(node.kwargs) - {"activation"} or len(node.args) > 2:
            raise Unsupported(f"{self._name(node)}: a norm called with more than (x, level, activation)")
        return Read(self._emit(self._form(node.args[0])), self._norm_of(node), node.kwargs.get("activation", "none"))

    def _norm_of(self, node: fx.Node) -> Norm:
        """The norm that ``node`` calls, its rows in the order of the network's levels."""
        norm = norm_of(self._module(node))
        index = self.tables.index(node.args[1]) if norm.rows > 1 else None
        return norm if index is None else norm.at(index)

    def _is_pair(self, node: object) -> bool:
        """Whether it is a norm that makes the sum as well, and returns both."""
        return isinstance(self._module(node), FusedNorm) and "residual" in node.kwargs

    def _norm_of_sum(self, node: fx.Node) -> Form:
        both = node.args[0]
        if both not in self.forms:
            total = self._sum(self._form(both.args[0]), self._form(both.kwargs["residual"]))
            self.forms[both] = Read(self._emit(total))
        if node.args[1] == 1:
            return self.forms[both]
        return replace(self.forms[both], norm=self._norm_of(both), activation=both.kwargs.get("activation", "none"))

    def _arithmetic(self, node: fx.Node) -> Form:
        target = node.target
        if target is operator.neg:
            return self._scaled(self._form(node.args[0]), MINUS_ONE, ZERO)
        if node.kwargs or len(node.args) != 2:
            raise Unsupported(f"{self._name(node)} with keyword arguments")
        a, b = node.args
        if not self.tables.has(a) and not self.tables.has(b):
            if target not in ADD + SUB:
                raise Unsupported(f"{self._name(node)} of two feature maps")
            form = self._form(b)
            return self._sum(self._form(a), self._scaled(form, MINUS_ONE, ZERO) if target in SUB else form)
        left = self.tables.has(a)
        known, form = (a, self._form(b)) if left else (b, self._form(a))
        if self.values[node].shape[1:] != self.values[b if left else a].shape[1:]:
            raise Unsupported(f"{self._name(node)} that enlarges a feature map")
        table = self.tables.of(known, self.values[node].shape[1])
        if target in ADD:
            return self._scaled(form, ONE, table)
        if target in MUL:
            return self._scaled(form, table, ZERO)
        if target in SUB:
            return self._scaled(form, MINUS_ONE, table) if left else self._scaled(form, ONE, table.map(torch.neg))
        if left:
            raise Unsupported(f"{self._name(node)}: a division by a feature map")
        return self._scaled(form, table.map(torch.reciprocal), ZERO)

    def _scaled(self, form: Form, scale: Table, shift: Table) -> Form:
        """scale·form + shift."""
        if isinstance(form, Input) and not any(t.rows > 1 or t.tensors or t.make().numel() > 1 for t in (scale, shift)):
            a, b = scale.make().item(), shift.make().item()
            return Input(a * form.scale, a * form.shift + b)
        read = form if isinstance(form, Read) else Read(self._emit(form))
        return (read if read.activation == "none" else Read(self._emit(read))).then(scale, shift)

    def _sum(self, a: Form, b: Form) -> Form:
        """a + b: the one that waits takes the other as an addend."""
        if isinstance(b, Waiting) and not isinstance(a, Waiting):
            a, b = b, a
        if isinstance(a, Waiting) and len(a.add) < 2:
            return replace(a, add=(*a.add, self._emit(b)))
        if isinstance(b, Read) and not isinstance(a, Read):
            a, b = b, a
        read, added = (a if isinstance(a, Read) else Read(self._emit(a))), self._emit(b)
        return Waiting(lambda add: self.graph.activate(read.x, read.activation, read.norm, add), (added,))

    def _resized(self, node: fx.Node, call: Call) -> Form:
        """Pools and upsampling, by what they are called with."""
        if call.is_pool("mean", 2, 2, 0):
            read = self._read(node.args[0])
            return Read(self.graph.mean_pool(read.x, read.norm, read.activation))
        for kind in ("mean", "max"):
            if call.is_pool(kind, 5, 1, 2):
                read = self._read(node.args[0])
                return Read(self.graph.pool5(read.x, kind, read.norm, read.activation))
        mode = call.interpolation()
        if mode is not None:
            x, (height, width) = self._emit(self._form(node.args[0])), self._size(node)
            if mode == "bilinear":
                return Waiting(lambda add: self.graph.upsample(x, height, width, add))
            if height % x.height == 0 and width % x.width == 0:
                return Waiting(lambda add: self.graph.nearest(x, height, width, add))
        raise Unsupported(f"{self._name(node)} has no layer")

    def _form(self, node: object) -> Form:
        if not isinstance(node, fx.Node) or node not in self.forms:
            raise Unsupported(f"{node} where a feature map is expected")
        return self.forms[node]

    def _read(self, node: object) -> Read:
        form = self._form(node)
        return form if isinstance(form, Read) else Read(self._emit(form))

    def _emit(self, form: Form) -> Value:
        """The value of a form, in memory."""
        if isinstance(form, Waiting):
            return form.emit(list(form.add))
        if isinstance(form, Input):
            return self.graph.load(*self.shape, form.scale, form.shift)
        plain = form.norm is None and form.activation == "none"
        return form.x if plain else self.graph.activate(form.x, form.activation, form.norm)

    def _module(self, node: object) -> nn.Module | None:
        return self.modules.get(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _size(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.values[node].shape[2:])

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self._module(node)).__name__} {node.target.removeprefix('module.')}"
        return getattr(node.target, "__name__", str(node.target))
