"""Which calls of a recorded network are which layers: arithmetic, activations and norms here, the rest by file."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from sgm_engine.executors.native import convs, moments, products, resampling, views
from sgm_engine.executors.native.forms import ONE, ZERO, Channelwise, Conv, Form, Read, View, factor_of
from sgm_engine.executors.native.layout import names
from sgm_engine.executors.native.moments import Centred, Moment
from sgm_engine.executors.native.norm import Norm, Table, Unsupported
from sgm_engine.executors.native.products import Context, Product, Softmax
from sgm_engine.executors.native.walk import Walk
from sgm_engine.rewriting.record import LEVEL, Node, Ref


def add(walk: Walk, i: int, node: Node) -> object:
    a, b = node.args[:2]
    alpha = float(node.kwargs.get("alpha", 1))
    alpha = -alpha if node.name in ("sub", "sub_", "rsub") else alpha
    if node.name == "rsub":
        a, b = b, a
    first = second = 1.0
    first, second = (1.0, alpha)
    if walk.program.has(a):
        a, b, first, second = b, a, second, first
    if walk.program.has(b):
        found = walk.values[a]
        if isinstance(found, Moment):
            return moments.added(moments.scaled(found, first), second * _number(walk, b))
        view = walk.settled(a)
        table = walk.program.table(b, view.dims, view.form.shape[0])
        form = walk.forms.scaled(view.form, first)
        return replace(view, form=_kept(walk, i, walk.forms.affine(form, ONE, _times(table, second))))
    if isinstance(walk.values.get(b), Moment):
        return moments.centred(walk, walk.settled(a), walk.values[b]) if (first, second) == (1, -1) else _refuse(node)
    views_ = [walk.forms.settled(walk.view(ref)) for ref in (a, b)]
    if views_[0].dims != views_[1].dims:
        raise Unsupported("a sum of feature maps of different shapes")
    scales = first * views_[0].gain, second * views_[1].gain
    return View(walk.forms.total(views_[0].form, views_[1].form, *scales, walk.shared(i)), views_[0].dims)


def lerp(walk: Walk, i: int, node: Node) -> View:
    """(1 − t)·a + t·b."""
    a, b = (walk.forms.settled(walk.view(ref)) for ref in node.args[:2])
    t = _number(walk, node.args[2])
    if a.dims != b.dims:
        raise Unsupported("a sum of feature maps of different shapes")
    return View(walk.forms.total(a.form, b.form, (1 - t) * a.gain, t * b.gain, walk.shared(i)), a.dims)


def multiply(walk: Walk, i: int, node: Node) -> object:
    a, b = node.args[:2]
    divides = node.name in ("div", "div_", "true_divide")
    if divides and node.kwargs.get("rounding_mode"):
        raise Unsupported("a division that rounds")
    if walk.program.has(a) and not divides:
        a, b = b, a
    if not walk.program.has(b):
        return _by_moment(walk, i, walk.values.get(a), walk.values.get(b), divides)
    number = walk.program.number(b)
    found = walk.values[a]
    if number is not None:
        number = 1 / number if divides else number
        if isinstance(found, Moment):
            return moments.scaled(found, number)
        if isinstance(found, (Product, Softmax, Context)):
            return products.scaled(found, number)
        view = walk.view(a)
        return _scaled(walk, i, a, view, number)
    view = walk.settled(a)
    table = walk.program.table(b, view.dims, view.form.shape[0])
    per_image = prod(walk.recording.shape(b)) == walk.recording.batch and walk.recording.kind(b) == LEVEL
    if walk.readers[i] == 0 and isinstance(view.form, Conv) and per_image:  # the network's output
        return replace(view, divisor=table if divides else table.map(torch.reciprocal))
    table = table.map(torch.reciprocal) if divides else table
    return replace(view, form=_kept(walk, i, walk.forms.affine(view.form, table, ZERO)))


def _by_moment(walk: Walk, i: int, a: object, b: object, divides: bool) -> View:
    if isinstance(a, Moment) and not divides:
        a, b = b, a
    if isinstance(b, Moment) and isinstance(a, (View, Centred)) and (b.what == "root") == divides:
        of = walk.forms.settled(a) if isinstance(a, View) else a
        if isinstance(of, View) and of.gain != 1:
            raise Unsupported("a scaled feature map by its norm")
        return moments.normalised(walk, i, of, b)
    raise Unsupported("a product of two feature maps")


def _scaled(walk: Walk, i: int, a: Ref, view: View, number: float) -> View:
    """number · view: within the convolution, if it is all that reads it, and all there is of the view."""
    form = view.form
    if isinstance(form, Conv) and view.memory is None and len(walk.users[a.node]) == 1 and not walk.forms.is_made(form):
        form = replace(walk.forms.scaled(replace(form, shared=False), number * view.gain), shared=form.shared)
        return replace(view, form=form, gain=1.0)
    return replace(view, gain=view.gain * number)


def _kept(walk: Walk, i: int, form: Form) -> Form:
    """Shared, if several layers read what costs more than an affine map to read."""
    costs = isinstance(form, Conv) or getattr(form, "activation", "none") != "none"
    return replace(form, shared=walk.shared(i) and costs)


def negate(walk: Walk, i: int, node: Node) -> View:
    return _scaled(walk, i, node.args[0], walk.view(node.args[0]), -1.0)


def _times(table: Table, number: float) -> Table:
    return table if number == 1 else table.map(lambda t: t * number)


def _number(walk: Walk, what: object) -> float:
    number = walk.program.number(what)
    if number is None:
        raise Unsupported("something else than a number")
    return number


def _refuse(node: Node) -> None:
    raise Unsupported(f"{node.name} of something else than feature maps")


def activation(walk: Walk, i: int, node: Node) -> View:
    kind = node.name.rstrip("_")
    rest = [walk.program.number(a) for a in node.args[1:]]
    if kind == "elu" and any(r not in (None, 1) for r in rest):
        raise Unsupported("an ELU whose α is not 1")
    if kind == "gelu" and node.kwargs.get("approximate", "none") == "tanh":
        kind = "gelu_tanh"
    if kind == "leaky_relu":
        kind = ("leaky_relu", float(rest[0]) if rest else 0.01)
    view = walk.settled(node.args[0])
    return replace(view, form=activated(walk, view.form, kind, walk.shared(i)))


def activated(walk: Walk, form: Form, kind: object, shared: bool) -> Form:
    if isinstance(form, Channelwise) and form.activation == "none" and not form.add and not form.shared:
        return replace(form, activation=kind, shared=shared)
    read = walk.forms.read(form)
    read = read if read.activation == "none" else Read(walk.forms.value(read))
    return Read(read.x, read.norm, kind, shared)


def clamp(walk: Walk, i: int, node: Node) -> object:
    found = walk.values[node.args[0]]
    low, high = ([*node.args[1:], None, None][:2]) if node.name != "clamp_min" else (node.args[1], None)
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    if isinstance(found, Moment) and high is None:
        return moments.clamped(found, _number(walk, low))
    low, high = (None if n is None else walk.program.number(n) for n in (low, high))
    view = walk.settled(node.args[0])
    if (low, high) == (0, None):
        return replace(view, form=activated(walk, view.form, "relu", walk.shared(i)))
    if low is None or high is None or low != -high:
        raise Unsupported(f"a clip to [{low}, {high}]")
    return replace(view, form=activated(walk, view.form, ("clip", float(high)), walk.shared(i)))


def group_norm(walk: Walk, i: int, node: Node) -> list:
    x, weight, bias, images, channels, _, groups, eps = node.args
    view = walk.forms.settled(walk.view(x))
    if images != walk.recording.batch or names(view.dims[0]) != "b" or view.form.shape[0] != channels:
        raise Unsupported("a GroupNorm of something else than images")
    return [_normalised(walk, view, groups, eps, weight, bias)]


def _normalised(walk: Walk, view: View, groups: int, eps: float, weight: Ref | None, bias: Ref | None) -> View:
    """A norm over pixels and groups of channels; a factor of its input only changes ε."""
    form, gain = view.form, view.gain
    if (number := factor_of(form)) is not None:
        x, gain = form.x, gain * number
    else:
        x = walk.forms.value(form)
    if gain <= 0:
        x, gain = walk.forms.value(walk.forms.scaled(view.form, view.gain)), 1.0
    by_channel = (tuple(a for dim in view.dims for a in dim if a.name == "c"),)
    parts = [None if ref is None else walk.program.table(ref, by_channel, x.channels) for ref in (weight, bias)]
    return View(Read(x, Norm(x.channels, groups, eps / gain**2, (parts[0], None, parts[1]))), view.dims)


def batch_norm(walk: Walk, i: int, node: Node) -> list:
    """In evaluation mode, an affine map; over each image's own channels, InstanceNorm."""
    x, weight, bias, mean, var, training, _, eps = node.args
    view = walk.forms.settled(walk.view(x))
    if training:
        if names((*view.dims[0], *view.dims[1])) not in ("bc", "b") or mean is not None:
            raise Unsupported("a BatchNorm in training mode: call model.eval() first")
        c, batch = view.form.shape[0], walk.recording.batch
        parts = [None if ref is None else _first(walk, ref, batch, c) for ref in (weight, bias)]
        read = walk.forms.read(view.form, view.gain)
        x = read.x if read.norm is None and read.activation == "none" else walk.forms.value(read)
        return [View(Read(x, Norm(c, c, eps, (parts[0], None, parts[1]))), view.dims)]
    view = walk.settled(x)
    tables = [None if ref is None else walk.program.table(ref, view.dims[1:2], view.form.shape[0])
              for ref in (weight, bias, mean, var)]  # fmt: skip
    weight, bias, mean, var = tables

    def scale() -> torch.Tensor:
        rstd = (var.make().double() + eps).rsqrt()
        return (rstd if weight is None else weight.make() * rstd).float()

    def shift() -> torch.Tensor:
        return ((0 if bias is None else bias.make()) - mean.make() * scale()).float()

    tensors = tuple(t for table in tables if table for t in table.tensors)
    return [replace(view, form=walk.forms.affine(view.form, Table(scale, 1, tensors), Table(shift, 1, tensors)))]


def _first(walk: Walk, ref: Ref, batch: int, channels: int) -> Table:
    """A parameter that InstanceNorm repeats for every image."""

    program = walk.program  # the walk holds the graph, which holds what packs

    def make() -> torch.Tensor:
        rows = program.constant(ref).reshape(-1, channels)
        if len(rows) != batch or not torch.equal(rows, rows[:1].expand_as(rows)):
            raise Unsupported("an InstanceNorm with parameters by image")
        return rows[:1].float()

    make()
    return Table(make, 1, walk.program.outside(ref))


ACTIVATIONS = ("silu", "relu", "elu", "gelu", "tanh", "sigmoid", "leaky_relu")
HANDLERS = {
    **views.HANDLERS, **convs.HANDLERS, **products.HANDLERS, **moments.HANDLERS, **resampling.HANDLERS,
    **dict.fromkeys(("add", "add_", "sub", "sub_", "rsub"), add),
    **dict.fromkeys(("mul", "mul_", "div", "div_", "true_divide"), multiply),
    **{name: activation for kind in ACTIVATIONS for name in (kind, f"{kind}_")},
    **dict.fromkeys(("clamp", "clamp_", "clamp_min", "hardtanh"), clamp),
    "neg": negate, "lerp": lerp, "native_group_norm": group_norm, "native_batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
}  # fmt: skip
