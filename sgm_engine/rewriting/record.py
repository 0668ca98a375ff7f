"""Record what a module computes: every aten call of one run of it, on real tensors, in order.

A run follows whatever Python does on its way: branches on shapes, functions held by modules, dataclasses, einops,
numpy scalars, checkpointing, hooks. Parameters stay what they are, live; what a forward changes in place is replayed in
place. A value is of one of three kinds: constant, of the level (which of the levels an image is at), or of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

CONSTANT, LEVEL, IMAGE = 0, 1, 2  # LEVEL | IMAGE is of the image
READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
FILLED = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1, "empty_like": 0, "new_empty": 0,
          "full_like": None, "new_full": None}  # fmt: skip


class Untraceable(ValueError):
    """The run does something that no list of calls repeats; the message says what."""


class Ref(NamedTuple):
    """One output of a node."""

    node: int
    item: int = 0


@dataclass
class Node:
    """One call. op: an aten operator; a module or a function recorded as one call; None: a tensor
    from outside, which is ``tensor``.

    args, kwargs: as called, tensors replaced by Ref. shapes, dtypes: of its outputs. deps: nodes to run before it.
    base: node → of which storage its first output is. kind: of what it depends on.
    """

    op: object
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    kind: int = CONSTANT
    deps: tuple[int, ...] = ()
    base: int = -1
    writes: bool = False
    stale: bool = False  # it reads an image value through an alias that was changed in place
    tensor: Tensor | None = None

    @property
    def name(self) -> str:
        """Of a function, without overload: "add", "convolution"."""
        if isinstance(self.op, torch._ops.OpOverload):
            return self.op.overloadpacket.__name__
        return getattr(self.op, "__name__", "").strip("_")

    def refs(self) -> list[Ref]:
        return [a for a in pytree.tree_leaves((self.args, self.kwargs), is_leaf=is_ref) if is_ref(a)]


def is_ref(what: object) -> bool:
    return isinstance(what, Ref)


@dataclass
class Recording:
    """nodes in order; x, level: the inputs' nodes; output: what the run returned. batch: how many images it ran on.

    asked: constants whose values the forward asked for as Python numbers: another value may be another network.
    """

    nodes: list[Node]
    x: Ref
    level: Ref
    output: Ref
    batch: int
    asked: list[Tensor]

    def ancestors(self, wanted: list[Ref]) -> list[int]:
        """The nodes that must run for these, in order."""
        found, todo = set(), [ref.node for ref in wanted]
        while todo:
            top = todo.pop()
            if top not in found:
                found.add(top)
                todo += self.nodes[top].deps
        return sorted(found)

    def outside(self, wanted: list[Ref]) -> tuple[Tensor, ...]:
        """The live tensors that these depend on."""
        return tuple(t for i in self.ancestors(wanted) if (t := self.nodes[i].tensor) is not None)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.nodes[ref.node].shapes[ref.item]

    def kind(self, what: object) -> int:
        return self.nodes[what.node].kind if isinstance(what, Ref) else CONSTANT


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.seen = WeakTensorKeyDictionary()  # tensor → Ref
        self.writers: dict[int, list[int]] = {}  # storage, by its first node → nodes that changed it
        self.asked: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        kind = 0
        for t in tensors:
            kind |= self._kind(self._ref(t))
        if func.overloadpacket.__name__ in READS:
            if kind != CONSTANT:
                what = "images" if kind & IMAGE else "levels"
                raise Untraceable(f"it asks for values of its {what} ({func.overloadpacket.__name__})")
            self.asked += [t for ref in map(self._ref, tensors) for t in self._outside(ref)]
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.overloadpacket.__name__:
            raise Untraceable(f"it draws random numbers ({func.overloadpacket.__name__}): call model.eval() first")
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in FILLED:  # by a number, however large the tensor is that it is to be like
            value = args[1] if name == "full_like" else args[2] if name == "new_full" else FILLED[name]
            self.note(torch.full, (tuple(out.shape), value), {"dtype": out.dtype, "device": out.device}, out)
        else:
            self.note(func, args, kwargs, out, _written(func, args, kwargs))
        return out

    def note(self, op: object, args: tuple, kwargs: dict, out: object, written: list[Tensor] | None = None) -> None:
        """Record one call and what it returned."""
        outs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if not outs:
            return
        args, kwargs = pytree.tree_map(lambda a: self._ref(a) if isinstance(a, Tensor) else a, (args, kwargs))
        node = Node(op, args, kwargs, tuple(tuple(t.shape) for t in outs), tuple(t.dtype for t in outs))
        index, refs = len(self.nodes), node.refs()
        bases = {ref: self.nodes[ref.node].base for ref in refs}
        node.deps = tuple({i for ref in refs for i in (ref.node, *self.writers.get(bases[ref], ()))})
        for i in node.deps:
            node.kind |= self.nodes[i].kind
        node.stale = any(self._stale(ref) for ref in refs)
        aliased = refs[0] if refs and _aliases(op) else None
        node.base = bases[aliased] if aliased is not None else index
        self.nodes.append(node)
        for t in written or ():
            base = bases[self._ref(t)]
            if self.nodes[base].tensor is not None and self.nodes[base].op is None:
                raise Untraceable(f"it changes a tensor of its own in place ({node.name})")
            node.writes, node.base = True, base
            self.writers.setdefault(base, []).append(index)
        for i, t in enumerate(outs):
            self.seen[t] = Ref(index, i)

    def outsider(self, t: Tensor, kind: int) -> Ref:
        """A tensor that no recorded call made."""
        index = len(self.nodes)
        node = Node(None, (), {}, (tuple(t.shape),), (t.dtype,), kind, (), index)
        node.tensor = t if kind == CONSTANT else None
        self.nodes.append(node)
        ref = self.seen[t] = Ref(index)
        return ref

    def _ref(self, t: Tensor) -> Ref:
        return self.seen[t] if t in self.seen else self.outsider(t, CONSTANT)

    def _kind(self, ref: Ref) -> int:
        node = self.nodes[ref.node]
        kind = node.kind
        for i in self.writers.get(node.base, ()):
            kind |= self.nodes[i].kind
        return kind

    def _stale(self, ref: Ref) -> bool:
        """Whether a value of an image was changed through another name than this."""
        writers = self.writers.get(self.nodes[ref.node].base, ())
        return bool(writers) and writers[-1] > ref.node and bool(self._kind(ref) & IMAGE)

    def _outside(self, ref: Ref) -> tuple[Tensor, ...]:
        return Recording(self.nodes, ref, ref, ref, 0, []).outside([ref])


class _Whole(TorchFunctionMode):
    """Functions that are one node: those whose calls say less than their name. With it, modules take no fast path."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.pad and (args[2] if len(args) > 2 else kwargs.get("mode")) == "circular":
            self.recorder.note(func, args, kwargs, out)
        return out


def _written(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a call changes."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    if len(found) > 1:
        raise Untraceable(f"it changes several tensors in one call ({func.overloadpacket.__name__})")
    return found


def _aliases(op: object) -> bool:
    """Whether a call's output is a view of its first argument."""
    return isinstance(op, torch._ops.OpOverload) and any(r.alias_info is not None for r in op._schema.returns)


@torch.no_grad()
def record(module: Callable[[Tensor, Tensor], Tensor], leaves: set[nn.Module], x: Tensor, level: Tensor) -> Recording:
    """The calls of module(x, level). leaves: modules each call of which is one node.

    Raises Untraceable, and whatever the module raises.
    """
    recorder, hooks = _Recorder(), []
    inputs = recorder.outsider(x, IMAGE), recorder.outsider(level, LEVEL)

    def leaf(called: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
        recorder.note(called, args, kwargs, out)

    try:
        for m in leaves:
            hooks.append(m.register_forward_hook(leaf, with_kwargs=True))
        with recorder, _Whole(recorder):
            out = module(x, level)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(out, Tensor) or out not in recorder.seen:
        raise Untraceable("its output is no tensor that it computed")
    return Recording(recorder.nodes, *inputs, recorder.seen[out], len(x), recorder.asked)


def replay(recording: Recording, indices: Iterator[int] | list[int], values: dict[Ref, Tensor]) -> None:
    """Run these nodes in order and put their outputs into ``values``, where their inputs are."""
    for i in indices:
        node = recording.nodes[i]
        if node.op is None:
            if node.tensor is not None:
                values[Ref(i)] = node.tensor.detach()
            continue
        args, kwargs = pytree.tree_map(
            lambda a: values[a] if is_ref(a) else a, (node.args, node.kwargs), is_leaf=is_ref
        )
        outs = [t for t in pytree.tree_leaves(node.op(*args, **kwargs)) if isinstance(t, Tensor)]
        values.update({Ref(i, n): t for n, t in enumerate(outs)})
