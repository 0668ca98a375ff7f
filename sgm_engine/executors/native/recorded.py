"""Any module as layers of the native executor: the aten calls of one run of it, walked once.

What depends on the level alone (embeddings, tables of sigmas, networks of the time) is no part of the walk: it is
evaluated for every level when weights are packed, and becomes a table (program.py). Views move nothing (layout.py). The
rest are calls that ``calls.py``, ``products.py`` and ``moments.py`` know as layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sgm_engine.executors.native.emit import Forms
from sgm_engine.executors.native.forms import Conv, Form, Input, Read, View, identity, is_plain
from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.layout import image_dims
from sgm_engine.executors.native.norm import Unsupported, norm_of
from sgm_engine.executors.native.program import Program
from sgm_engine.rewriting.recognise import FusedNorm, recognise
from sgm_engine.rewriting.record import IMAGE, Node, Recording, Ref, Untraceable, record
from sgm_engine.rewriting.trace import MODAL

BATCH = 3  # images of the recorded run; no size is told from another by it
WEIGHTED = {"convolution", "mm", "addmm", "bmm", "baddbmm"}
VIEWS = {"view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
         "clone", "alias", "detach", "_to_copy", "slice", "select", "split", "split_with_sizes", "unbind",
         "lift_fresh", "repeat", "_reshape_copy"}  # fmt: skip


def lower_recorded(graph: Graph, model: nn.Module, shape: tuple[int, int, int], levels: int) -> list[Tensor]:
    """Emit the layers of ``model`` for x [*shape], level in [0, levels); the tensors whose values chose them.

    Raises Unsupported for what has no layer.
    """
    if reason := _unfit(model):
        raise Unsupported(reason)
    random = torch.Generator("cpu").manual_seed(1)
    x = torch.rand(BATCH, *shape, generator=random, dtype=torch.float32, device="cpu")
    level = torch.arange(BATCH, device="cpu") % levels
    try:
        recording = record(model, own_norms(model), x, level)
    except Untraceable as reason:
        raise Unsupported(str(reason)) from reason
    except Exception as error:  # whatever the user's forward does that it cannot do in evaluation mode
        raise Unsupported(f"its forward raises {type(error).__name__}: {str(error)[:120]}") from error
    own = {id(p) for p in model.parameters()}
    if any(isinstance(t, nn.Parameter) and id(t) not in own for t in recording.outside([recording.output])):
        raise Unsupported("it reads parameters that are not its own: pass the nn.Module that holds them")
    try:
        Walk(graph, recording, shape, levels).run()
    except Unsupported:
        raise
    except ValueError as reason:  # of the C++: a shape that has no layer
        raise Unsupported(str(reason)) from reason
    return recording.asked


def _unfit(model: nn.Module) -> str | None:
    """Why a recorded run would not be what the module computes in float32 on the CPU."""
    for name, part in model.named_modules():
        if part.training and isinstance(part, MODAL):
            return f"{name} is in training mode: call model.eval() first"
    for p in model.parameters():
        if p.device.type != "cpu" or (p.is_floating_point() and p.dtype != torch.float32):
            return f"its parameters must be float32 on the CPU, and one is {p.dtype} on {p.device}"
    return None


def own_norms(model: nn.Module) -> set[nn.Module]:
    """Norms that ``recognise`` knows and aten has no call for."""
    found = {m: recognise(m) for m in model.modules()}
    return {
        m for m, norm in found.items() if isinstance(norm, FusedNorm) and (norm.conditional or "alpha" in norm.roles)
    }


def has_own_norms(model: nn.Module) -> bool:
    return bool(own_norms(model))


class Walk:
    """values: node's output → View, or what ``products`` and ``moments`` make of it."""

    def __init__(self, graph: Graph, recording: Recording, shape: tuple[int, int, int], levels: int):
        from sgm_engine.executors.native.handlers import HANDLERS

        self.graph, self.recording, self.shape = graph, recording, shape
        self.forms, self.program = Forms(graph), Program(recording, levels)
        self.values: dict[Ref, object] = {}
        self.handlers: dict[str, Callable] = HANDLERS
        live = set(recording.ancestors([recording.output]))
        self.live = [i for i in sorted(live) if recording.nodes[i].kind & IMAGE]
        self._as_silu()
        self.users: dict[int, list[int]] = {i: [] for i in self.live}
        for i in self.live:
            for n in {ref.node for ref in recording.nodes[i].refs()} & set(self.users):
                self.users[n].append(i)
        self.readers: dict[int, int] = {}  # node → how many layers read it, seen through views
        for i in reversed(self.live):
            self.readers[i] = sum(self.readers[u] if self.is_view(u) else 1 for u in self.users[i])

    def _as_silu(self) -> None:
        """x·sigmoid(x) as one call."""
        nodes = self.recording.nodes
        for i in self.live:
            node = nodes[i]
            for x, gate in (node.args[:2], node.args[1::-1]) if node.name == "mul" and len(node.args) == 2 else ():
                if isinstance(gate, Ref) and nodes[gate.node].name == "sigmoid" and nodes[gate.node].args == (x,):
                    nodes[i] = replace(node, op=torch.ops.aten.silu.default, args=(x,), deps=(x.node,))
        live = set(self.recording.ancestors([self.recording.output]))
        self.live = [i for i in self.live if i in live]

    def run(self) -> None:
        if not self.recording.kind(self.recording.output) & IMAGE:
            raise Unsupported("its output does not depend on x")
        if not any(self.recording.nodes[i].name in WEIGHTED for i in self.live):
            raise Unsupported("it holds no convolution")
        if stale := [self.recording.nodes[i].name for i in self.live if self.recording.nodes[i].stale]:
            raise Unsupported(f"{stale[0]} reads a part of an image that was changed in place")
        self.values[self.recording.x] = View(
            Input(self.shape, shared=self.readers[self.recording.x.node] > 1), image_dims(BATCH, *self.shape)
        )
        for i in self.live:
            node = self.recording.nodes[i]
            if node.op is None:
                continue
            self._lower(i, node)
        self._end()

    def _lower(self, i: int, node: Node) -> None:
        if isinstance(node.op, nn.Module):
            outs = self._norm(node)
        else:
            handler = self.handlers.get(node.name)
            if handler is None:
                raise Unsupported(f"{node.name} has no layer")
            try:
                outs = handler(self, i, node)
            except Unsupported as reason:
                raise Unsupported(f"{reason} ({node.name} of {node.shapes[0]})") from None
        for n, out in enumerate(outs if isinstance(outs, list) else [outs]):
            self.values[Ref(i, n)] = out

    def _norm(self, node: Node) -> View:
        """A norm that ``recognise`` knows, recorded as one call."""
        view = self.image(node.args[0])
        norm = norm_of(node.op)
        if norm.rows > 1:
            levels = self.program.index(node.args[1])
            norm = norm if levels is None else norm.at(levels)
        activation = node.args[2] if len(node.args) > 2 else node.kwargs.get("activation", "none")
        if set(node.kwargs) - {"activation"} or len(node.args) > 3 or not isinstance(activation, str):
            raise Unsupported("a norm called with more than (x, level, activation)")
        return replace(view, form=Read(self.forms.value(view.form), norm, activation))

    def _end(self) -> None:
        """The network's output."""
        end = self.view(self.recording.output)
        divisor = end.divisor
        view = self.image(self.recording.output)
        form = view.form
        if form.shape != self.shape:
            raise Unsupported(f"its output is {form.shape}, and x is {self.shape}")
        if isinstance(form, Conv) and is_plain(form.kernel) and not form.add and not self.forms.is_made(form):
            self.graph.store(form.read.x, form.kernel, form.read.norm, form.read.activation)
        else:
            read = self.forms.read(form)
            self.graph.store(read.x, identity(read.x.channels), read.norm, read.activation)
        if divisor is not None:
            self.graph.divide_by(divisor)

    def is_view(self, i: int) -> bool:
        """Whether a node moves and computes nothing, but for a factor."""
        node = self.recording.nodes[i]
        if node.name in VIEWS:
            return True
        second = node.args[1] if len(node.args) > 1 else None
        return node.name in ("mul", "div") and self.program.number(second) is not None

    def shared(self, i: int) -> bool:
        return self.readers[i] > 1

    def view(self, ref: object) -> View:
        """What a handler reads as an image, seen however it is."""
        found = self.values.get(ref) if isinstance(ref, Ref) else None
        if not isinstance(found, View):
            raise Unsupported("something else than a feature map where one is expected")
        return found

    def settled(self, ref: object) -> View:
        """All channels of a form in its own order, seen however they are; gain 1."""
        view = self.forms.settled(self.view(ref))
        return view if view.gain == 1 else View(self.forms.scaled(view.form, view.gain), view.dims)

    def image(self, ref: object) -> View:
        """The same as [B, C, H, W]."""
        view = self.settled(ref)
        if view.dims != image_dims(BATCH, *view.form.shape):
            raise Unsupported("a view that is no image [B, C, H, W]")
        return view

    def made(self, form: Form) -> View:
        """A form as [B, C, H, W]."""
        return View(form, image_dims(BATCH, *form.shape))
