"""Emits the forms of a recorded network as layers of a graph."""

from __future__ import annotations

from dataclasses import replace

from sgm_engine.executors.native.forms import (
    ONE,
    ZERO,
    Addend,
    Channelwise,
    Conv,
    Form,
    Input,
    Layer,
    Read,
    View,
    factor_of,
    identity,
)
from sgm_engine.executors.native.graph import Graph, Value
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.layout import Axis, Dims, joined, names, offsets
from sgm_engine.executors.native.norm import Table, Unsupported


class Forms:
    """Emits forms into a graph, each at most once if it is shared."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._made: dict[int, tuple[Form, Value]] = {}

    def value(self, form: Form) -> Value:
        """The form in memory."""
        if id(form) not in self._made:
            self._made[id(form)] = form, self._emit(form)
        return self._made[id(form)][1]

    def is_made(self, form: Form) -> bool:
        return id(form) in self._made

    def _emit(self, form: Form) -> Value:
        if isinstance(form, Conv):
            read = form.read
            return self.graph.conv(read.x, form.kernel, read.norm, read.activation, form.add)
        if isinstance(form, Layer):
            return form.emit(form.add)
        if isinstance(form, Channelwise):
            settings = (form.groups, form.centred, form.eps, form.floor, form.after, form.scale, form.shift)
            return self.graph.channel_norm(form.x, *settings, form.activation, form.add)
        if isinstance(form, Input):
            return self.graph.load(*form.shape, form.scale, form.shift)
        if form.norm is None and form.activation == "none":
            return form.x
        return self.graph.activate(form.x, form.activation, form.norm)

    def read(self, form: Form, gain: float = 1.0) -> Read:
        """gain · form, for a layer with a prologue."""
        if gain != 1:
            form = self.scaled(form, gain)
        return form if isinstance(form, Read) and not form.shared else Read(self.value(form))

    def conv(self, read: Read, kernel: Kernel, shared: bool = False) -> Conv:
        if kernel.c_in != read.x.channels:
            raise Unsupported(f"a convolution of {kernel.c_in} channels reads {read.x.channels}")
        return Conv(read, kernel, (kernel.c_out, *kernel.output(read.x.height, read.x.width)), (), shared)

    def scaled(self, form: Form, number: float) -> Form:
        """number · form."""
        if number == 1:
            return form
        if isinstance(form, Input):
            return replace(form, scale=form.scale * number, shift=form.shift * number, shared=False)
        if isinstance(form, Conv) and not form.shared:
            add = tuple((value, number * s) for value, s in form.add)
            return replace(form, kernel=form.kernel.scaled(number), add=add)
        return self.affine(form, Table.of(number), ZERO)

    def affine(self, form: Form, scale: Table, shift: Table) -> Form:
        """scale·form + shift, by channel and level."""
        plain = scale is ONE
        if plain and isinstance(form, Conv) and not form.shared:
            return replace(form, kernel=form.kernel.shifted(shift))
        tables = [t for t in (scale, shift) if t.rows > 1 or t.tensors or t.make().numel() > 1]
        if isinstance(form, Input) and not tables:
            a, b = scale.make().item(), shift.make().item()
            return Input(form.shape, a * form.scale, a * form.shift + b)
        if isinstance(form, Channelwise) and form.activation == "none" and not (form.shared or form.add):
            return form.then(scale, shift)
        read = self.read(form)
        read = read if read.activation == "none" else Read(self.value(read))
        return read.then(scale, shift)

    def total(self, a: Form, b: Form, scale: float = 1.0, other: float = 1.0, shared: bool = False) -> Form:
        """scale·a + other·b: the one that waits takes the other as an addend."""
        if self._waits(b) and not self._waits(a):
            a, b, scale, other = b, a, other, scale
        if self._waits(a) and (scale == 1 or isinstance(a, Conv)):
            a = self.scaled(a, scale)
            return replace(a, add=(*a.add, self.addend(b, other)), shared=shared)
        if isinstance(b, Read) and not b.shared and not isinstance(a, Read):
            a, b, scale, other = b, a, other, scale
        read, added = self.read(a, scale), self.addend(b, other)
        emit = self.graph.activate
        return Layer(a.shape, lambda add: emit(read.x, read.activation, read.norm, add), (added,), shared)

    def _waits(self, form: Form) -> bool:
        waiting = isinstance(form, (Conv, Layer, Channelwise)) and not form.shared and not self.is_made(form)
        return waiting and len(form.add) < 2

    def addend(self, form: Form, scale: float) -> Addend:
        """A value and what it is multiplied by."""
        number = factor_of(form)
        if number is not None:
            return form.x, scale * number
        return self.value(form), scale

    def selected(self, form: Form, channels: list[int]) -> Form:
        """These channels of a form, in this order."""
        if channels == list(range(form.shape[0])):
            return form
        shape = (len(channels), *form.shape[1:])
        free = isinstance(form, Conv) and not form.add and form.kernel.groups == 1 and not self.is_made(form)
        if free and (not form.shared or len(channels) <= form.shape[0] // 2):
            return Conv(form.read, form.kernel.rearranged(channels), shape)
        x, first, emit = self.value(form), channels[0], self.graph.slice  # self keeps the layer: no circle
        if channels == list(range(first, first + len(channels))):
            return Layer(shape, lambda add: emit(x, first, len(channels), add))
        return self.conv(Read(x), identity(form.shape[0]).rearranged(channels))

    def settled(self, view: View) -> View:
        """The same elements as all channels of a form in its own order: no part of it, nothing repeated, no gain."""
        form, flat = view.form, [a for dim in view.dims for a in dim]
        if any(a.name not in "bchwr" for a in flat):
            raise Unsupported(f"a view of {names(flat)} where images are read")
        form = self.selected(form, view.channels()) if self._part(view) else form
        repeated = [a.size for a in flat if a.name == "r"]
        dims = _densely(view.dims)
        if repeated:
            form = self._repeated(form, flat, repeated)
            dims = tuple(joined(d) for d in _merged(dims))
        _, height, width = form.shape
        flat = [a for dim in dims for a in dim]
        rows, cols = offsets(flat, "h"), offsets(flat, "w")
        if rows == list(range(0, height, 2)) and cols == list(range(0, width, 2)) and height > 1:
            form, dims = self.strided(form), tuple(tuple(_halved(a) for a in dim) for dim in dims)
        elif rows != list(range(height)) or cols != list(range(width)):
            raise Unsupported("a view that cuts or turns images")
        return replace(view, form=form, dims=dims, start=0)

    def strided(self, form: Form) -> Form:
        """Every second pixel of every second row."""
        if isinstance(form, Conv) and not (form.shared or form.add or self.is_made(form)):
            return self.conv(form.read, replace(form.kernel, stride=2 * form.kernel.stride))
        return self.conv(self.read(form), replace(identity(form.shape[0]), stride=2))

    def _part(self, view: View) -> bool:
        return view.channels() != list(range(view.form.shape[0]))

    def _repeated(self, form: Form, flat: list[Axis], repeated: list[int]) -> Form:
        order = "".join(a.name for a in flat if a.name in "hwr")
        if order != "hrwr":
            raise Unsupported("a repetition that is no nearest upsampling")
        return self.nearest(form, form.shape[1] * repeated[0], form.shape[2] * repeated[1])

    def nearest(self, form: Form, height: int, width: int, shared: bool = False) -> Form:
        """Every pixel repeated a whole number of times."""
        if height % form.shape[1] or width % form.shape[2]:
            raise Unsupported(f"nearest upsampling of {form.shape[1]}×{form.shape[2]} to {height}×{width}")
        x = self.value(form)
        emit = self.graph.nearest
        return Layer((form.shape[0], height, width), lambda add: emit(x, height, width, add), (), shared)


def _halved(axis: Axis) -> Axis:
    return Axis(axis.name, axis.size, axis.step // 2) if axis.name in "hw" else axis


def _densely(dims: Dims) -> Dims:
    """The channel axes as those of a value that holds them alone, in order."""
    step, found = 1, []
    for axis in [a for dim in dims for a in dim][::-1]:
        found.append(Axis("c", axis.size, step) if axis.name == "c" else axis)
        step *= axis.size if axis.name == "c" else 1
    queue = iter(found[::-1])
    return tuple(joined([next(queue) for _ in dim]) for dim in dims)


def _merged(dims: Dims) -> Dims:
    """Rows and columns repeated, as rows and columns of what is as large."""
    factors = [a.size for dim in dims for a in dim if a.name == "r"]
    of = dict(zip("hw", factors, strict=True))
    found, last = [], ""
    for dim in dims:
        axes = []
        for a in dim:
            last = a.name if a.name in "hw" else last
            step = a.step * of.get(a.name, 1)
            axes.append(Axis(last, a.size, 1) if a.name == "r" else Axis(a.name, a.size, step))
        found.append(tuple(axes))
    return tuple(found)
