"""Norms over the channels of a pixel, however they are written: moments, and what is divided by them, as one layer.

A moment is factor·(f(max(m, floor) + eps) + after), m the mean of squares (about the mean, if centred) over a group of
channels and f nothing, the root, or its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from sgm_engine.executors.native.forms import Channelwise, Form, View
from sgm_engine.executors.native.layout import Dims, names, normal, only
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.native.walk import Walk
from sgm_engine.rewriting.record import Node


@dataclass(frozen=True)
class Moment:
    """Of a form over the channels of its dimension ``dim``. what: "mean", "square", "root" or "inverse"."""

    form: Form
    source: Dims
    dim: int
    what: str
    centred: bool = False
    factor: float = 1.0
    eps: float = 0.0
    floor: float = 0.0
    after: float = 0.0


@dataclass(frozen=True)
class Square:
    """x²."""

    view: View


@dataclass(frozen=True)
class Centred:
    """x less its mean over a group of channels."""

    view: View
    dim: int


def _moment(walk: Walk, view: View, dims: object, what: str, centred: bool = False) -> tuple[Moment, int]:
    """Over one dimension of channels, and how many it has."""
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if len(dims) != 1:
        raise Unsupported("a moment over several dimensions")
    dim = normal(dims[0], len(view.dims))
    if not only(view.dims[dim], "c") or not view.dims[dim]:
        raise Unsupported(f"a moment over a dimension of {names(view.dims[dim]) or 'one place'}")
    count = prod(a.size for a in view.dims[dim])
    return Moment(view.form, view.dims, dim, what, centred), count


def vector_norm(walk: Walk, i: int, node: Node) -> Moment:
    order = node.args[1] if len(node.args) > 1 else 2
    if order != 2:
        raise Unsupported(f"a norm of order {order}")
    found, count = _moment(walk, walk.settled(node.args[0]), node.args[2] if len(node.args) > 2 else None, "root")
    return replace(found, factor=count**0.5)


def mean(walk: Walk, i: int, node: Node) -> object:
    from sgm_engine.executors.native.resampling import mean_of_blocks

    found, dims = walk.values[node.args[0]], node.args[1]
    factor = 1.0
    if isinstance(found, Square):
        moment, count = _moment(walk, found.view, dims, "square")
        factor = count if node.name == "sum" else 1.0
        return replace(moment, factor=factor)
    if isinstance(found, View) and node.name == "mean":
        over = [found.dims[normal(d, len(found.dims))] for d in dims]
        if [(a.name, a.size, a.step) for dim in over for a in dim] == [("h", 2, 1), ("w", 2, 1)]:
            return _blocks(walk, found, [normal(d, len(found.dims)) for d in dims], node, mean_of_blocks)
        return _moment(walk, walk.settled(node.args[0]), dims, "mean")[0]
    raise Unsupported(f"a {node.name} of something else than channels")


def _blocks(walk: Walk, found: View, dims: list[int], node: Node, mean_of_blocks) -> View:
    kept = [dim for n, dim in enumerate(found.dims) if n not in dims]
    if [names(d) for d in kept] not in (["b", "c", "h", "w"], ["b", "", "h", "w"]) or found.channels() != list(
        range(found.form.shape[0])
    ):
        raise Unsupported("means of blocks of something else than images")
    view = walk.made(mean_of_blocks(walk, walk.forms.scaled(found.form, found.gain)))
    keeps = bool(node.args[2]) if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if not keeps:
        return view
    left = iter(view.dims)
    return replace(view, dims=tuple(() if n in dims else next(left) for n in range(len(found.dims))))


def variance(walk: Walk, i: int, node: Node) -> object:
    dims = node.args[1] if len(node.args) > 1 else None
    biased = node.kwargs.get("correction", 1) == 0 or (len(node.args) > 2 and node.args[2] is False)
    if not biased or isinstance(dims, bool):
        raise Unsupported("a variance by n − 1")
    view = walk.settled(node.args[0])
    found, _ = _moment(walk, view, dims, "square", centred=True)
    return [found, replace(found, what="mean", centred=False)] if node.name == "var_mean" else found


def power(walk: Walk, i: int, node: Node) -> object:
    found, exponent = walk.values[node.args[0]], walk.program.number(node.args[1])
    if isinstance(found, View) and exponent == 2:
        return Square(walk.settled(node.args[0]))
    if isinstance(found, Moment) and exponent in (0.5, -0.5):
        return root(walk, i, node)
    raise Unsupported(f"a power of {exponent}")


def root(walk: Walk, i: int, node: Node) -> Moment:
    found = walk.values[node.args[0]]
    if not isinstance(found, Moment) or found.what != "square" or found.after:
        raise Unsupported("a root of something else than a variance")
    inverse = node.name == "rsqrt" or (node.name == "pow" and walk.program.number(node.args[1]) < 0)
    factor = found.factor**0.5
    return replace(found, what="inverse" if inverse else "root", factor=1 / factor if inverse else factor)


def clamped(found: Moment, least: float) -> Moment:
    if found.what == "root" and not (found.eps or found.after or found.floor):
        return replace(found, floor=(least / found.factor) ** 2)
    if found.what == "square" and not (found.eps or found.floor):
        return replace(found, floor=least / found.factor)
    raise Unsupported("a moment clamped")


def added(found: Moment, number: float) -> Moment:
    if found.what == "root":
        return replace(found, after=found.after + number / found.factor)
    if found.what == "square":
        return replace(found, eps=found.eps + number / found.factor)
    raise Unsupported("a moment and a number")


def scaled(found: Moment, number: float) -> Moment:
    return replace(found, factor=found.factor * number)


def centred(walk: Walk, view: View, found: Moment) -> Centred:
    if found.what != "mean" or found.form is not view.form or found.source != view.dims:
        raise Unsupported("a feature map less a moment of another")
    return Centred(view, found.dim)


def normalised(walk: Walk, i: int, of: object, by: Moment) -> View:
    """of / by, or of · by if it is an inverse."""
    view, about = (of.view, True) if isinstance(of, Centred) else (of, False)
    if by.what not in ("root", "inverse") or by.form is not view.form or by.source != view.dims or by.centred != about:
        raise Unsupported("a feature map by a moment of another")
    if isinstance(of, Centred) and of.dim != by.dim:
        raise Unsupported("a feature map less a mean of other channels")
    # Last among its channels' dimensions, so that a group's channels are neighbours.
    channels = [n for n, dim in enumerate(view.dims) if "c" in names(dim)]
    order = [n for n in range(len(view.dims)) if n != by.dim]
    order.insert(channels[-1], by.dim)
    moved = walk.forms.settled(View(view.form, tuple(view.dims[n] for n in order)))
    x, groups = walk.forms.value(moved.form), _groups(moved, channels[-1])
    form = Channelwise(x, groups, by.centred, by.eps, by.floor, by.after, shared=walk.shared(i))
    gain = by.factor if by.what == "inverse" else 1 / by.factor
    dims = tuple(moved.dims[order.index(n)] for n in range(len(order)))
    return View(walk.forms.scaled(form, gain), dims)


def _groups(view: View, dim: int) -> int:
    """How many groups of neighbouring channels its dimension is one of."""
    count = prod(a.size for a in view.dims[dim])
    first = [a for d in view.dims[:dim] for a in d if a.name == "c"]
    if any(a.name == "c" for d in view.dims[dim + 1 :] for a in d):
        raise Unsupported("a norm over channels that are no neighbours")
    return view.form.shape[0] // count if first else 1


def layer_norm(walk: Walk, i: int, node: Node) -> list:
    """Over the channels of a pixel, or over all of an image without parameters."""
    x, shape, weight, bias, eps = node.args
    view = walk.settled(x)
    over = view.dims[len(view.dims) - len(shape) :]
    if len(shape) != 1 or not only(over[0], "c"):
        raise Unsupported("a LayerNorm over something else than channels")
    groups = _groups(view, len(view.dims) - 1)
    form = Channelwise(walk.forms.value(view.form), groups, True, eps, shared=walk.shared(i))
    for ref, name in ((weight, "scale"), (bias, "shift")):
        if ref is not None:
            form = replace(form, **{name: walk.program.table(ref, view.dims, form.shape[0])})
    return [replace(view, form=form)]


HANDLERS = {
    "linalg_vector_norm": vector_norm, "mean": mean, "sum": mean, "var": variance, "var_mean": variance, "pow": power,
    "sqrt": root, "rsqrt": root, "native_layer_norm": layer_norm,
}  # fmt: skip
