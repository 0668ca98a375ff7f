"""One pass over a recorded network's calls, each handed to what knows it as a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from sgm_engine.executors.native.emit import Forms
from sgm_engine.executors.native.forms import Conv, Form, Input, Read, View, identity, is_plain
from sgm_engine.executors.native.graph import Graph
from sgm_engine.executors.native.layout import image_dims
from sgm_engine.executors.native.norm import Unsupported, norm_of
from sgm_engine.executors.native.program import Program
from sgm_engine.rewriting.record import IMAGE, Node, Recording, Ref

WEIGHTED = {"convolution", "mm", "addmm", "bmm", "baddbmm"}
VIEWS = {"view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
         "clone", "alias", "detach", "_to_copy", "slice", "select", "split", "split_with_sizes", "unbind",
         "lift_fresh", "repeat", "_reshape_copy"}  # fmt: skip


class Walk:
    """values: node's output → View, or what ``products`` and ``moments`` make of it."""

    def __init__(
        self,
        graph: Graph,
        recording: Recording,
        shape: tuple[int, int, int],
        levels: int,
        handlers: dict[str, Callable],
    ):
        self.graph, self.recording, self.shape = graph, recording, shape
        self.forms, self.program = Forms(graph), Program(recording, levels)
        self.values: dict[Ref, object] = {}
        self.handlers = handlers
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
            Input(self.shape, shared=self.readers[self.recording.x.node] > 1),
            image_dims(self.recording.batch, *self.shape),
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
        if view.dims != image_dims(self.recording.batch, *view.form.shape):
            raise Unsupported("a view that is no image [B, C, H, W]")
        return view

    def made(self, form: Form) -> View:
        """A form as [B, C, H, W]."""
        return View(form, image_dims(self.recording.batch, *form.shape))
