"""Attention over pixels, however it is written: two products of images with a softmax between, as one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from sgm_engine.executors.native.forms import Conv, Form, Read, View
from sgm_engine.executors.native.graph import Value
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.layout import Axis, Dims, dense, names, normal, only, renamed
from sgm_engine.executors.native.norm import Table, Unsupported
from sgm_engine.executors.native.walk import Walk
from sgm_engine.rewriting.record import Node

SECOND = {"h": "H", "w": "W", "n": "N"}


@dataclass(frozen=True)
class Softmax:
    """gain · softmax of a view over a dimension: its channels (of a head), or its pixels."""

    of: View
    dims: Dims
    over: str  # "c" or "pixels"
    gain: float = 1.0

    @property
    def view(self) -> View:
        """What it is of, with the dimensions that it has."""
        return replace(self.of, dims=self.dims)


@dataclass(frozen=True)
class Product:
    """gain · qᵀk by head, and its softmax over the pixels of one of them. dims: the second one's pixels are H and W."""

    left: View
    right: View
    heads: tuple[Axis, ...]  # with the images: the dimension that both have in common
    dims: Dims
    gain: float
    over: str = ""  # names of the axes of its softmax
    weight: float = 1.0  # what follows the softmax


@dataclass(frozen=True)
class Context:
    """k·vᵀ by head, of keys that are a softmax over pixels. dims: channels of v are "C"."""

    keys: Softmax
    values: View
    heads: tuple[Axis, ...]
    dims: Dims
    gain: float


def pixels(dim: tuple[Axis, ...]) -> bool:
    return names(dim) in ("h", "w", "hw", "n", "")


def softmax(walk: Walk, i: int, node: Node) -> object:
    found, dim = walk.values[node.args[0]], node.args[1]
    dim = found.dims[normal(dim, len(found.dims))]
    if isinstance(found, Product) and not found.over and names(dim) in ("hw", "HW", "h", "H", "N", "n"):
        return replace(found, over=names(dim))
    if isinstance(found, View) and only(dim, "c"):
        return Softmax(found, found.dims, "c")
    if isinstance(found, View) and pixels(dim):
        return Softmax(found, found.dims, "pixels")
    raise Unsupported("a softmax over something else than pixels or channels")


def scaled(found: object, number: float) -> object:
    """number · a part of attention."""
    if isinstance(found, Product) and found.over:
        return replace(found, weight=found.weight * number)
    return replace(found, gain=found.gain * number)


def contracted(walk: Walk, i: int, a: object, b: object, alpha: float) -> object:
    """bmm(a, b) of two things that depend on images."""
    if a.dims[0] != b.dims[0] and [x.size for x in a.dims[0]] != [x.size for x in b.dims[0]]:
        raise Unsupported("a product of images with different heads")
    inner = a.dims[2], b.dims[1]
    if isinstance(a, View) and isinstance(b, View) and all(only(d, "c") for d in inner):
        if not pixels(a.dims[1]) or not pixels(b.dims[2]):
            raise Unsupported("a product over channels of something else than pixels")
        dims = (a.dims[0], a.dims[1], renamed(b.dims[2], SECOND))
        return Product(a, b, a.dims[0], dims, alpha * a.gain * b.gain)
    if isinstance(a, Product) or isinstance(b, Product):
        return _attention_of(walk, a, b)
    if isinstance(a, Context) or isinstance(b, Context):
        return _linear_attention_of(walk, a, b)
    keys, values = (a, b) if isinstance(a, Softmax) else (b, a)
    if isinstance(keys, Softmax) and keys.over == "pixels" and isinstance(values, View) and all(map(pixels, inner)):
        of_v = b.dims[2] if values is b else a.dims[1]
        named = renamed(of_v, {"c": "C"})
        dims = (a.dims[0], a.dims[1], named) if values is b else (a.dims[0], named, b.dims[2])
        return Context(keys, values, a.dims[0], dims, keys.gain * values.gain * alpha)
    raise Unsupported("a product of two feature maps that is no part of attention")


def _attention_of(walk: Walk, a: object, b: object) -> View:
    """The product of weights over pixels with what they weigh."""
    p, v = (a, b) if isinstance(a, Product) else (b, a)
    if not isinstance(v, View) or not p.over or p.dims[0] != p.heads:
        raise Unsupported("a product that is no part of attention")
    keys, queries = (p.dims[2], p.dims[1]) if p is a else (p.dims[1], p.dims[2])
    pixel, channel = (v.dims[1], v.dims[2]) if p is a else (v.dims[2], v.dims[1])
    if names(keys) != p.over or not pixels(pixel) or not only(channel, "c"):
        raise Unsupported("attention over something else than pixels")
    q, k = (p.left, p.right) if p.over in ("HW", "H", "N") else (p.right, p.left)
    form, heads, part = attention(walk, q, k, v, p.heads, channel, p.gain)
    queries = renamed(queries, {"H": "h", "W": "w"})
    dims = ((*_images(p.heads), *heads), queries, part) if p is a else ((*_images(p.heads), *heads), part, queries)
    return View(form, dims, 0, p.weight * v.gain)


def attention(
    walk: Walk, q: View, k: View, v: View, heads: tuple[Axis, ...], channel: tuple[Axis, ...], scale: float
) -> tuple[Form, tuple[Axis, ...], tuple[Axis, ...]]:
    """The layer, and the axes of its output's heads and of a head's channels."""
    count, size = prod(a.size for a in heads if a.name == "c"), prod(a.size for a in channel)
    x = _side_by_side(walk, (q, k, v))
    memory = _memory(walk, k, v, count, size)
    if x.channels != 3 * count * size:
        raise Unsupported("attention whose values are of another size than its keys")
    out = walk.graph.attention(x, count * size, count, scale, memory)
    axes = dense([tuple(a for a in heads if a.name == "c"), channel])
    return Read(out), *axes


def _linear_attention_of(walk: Walk, a: object, b: object) -> View:
    context, q = (a, b) if isinstance(a, Context) else (b, a)
    if not isinstance(q, Softmax) or q.over != "c" or context.dims[0] != context.heads:
        raise Unsupported("linear attention without a softmax over the channels of its queries")
    left = context is a
    inner, channel = (context.dims[2], context.dims[1]) if left else (context.dims[1], context.dims[2])
    if not only(inner, "c") or not only(channel, "C"):
        raise Unsupported("a product of images that is no linear attention")
    k, v = context.keys.view, context.values
    heads = tuple(axis for axis in context.heads if axis.name == "c")
    count, size = prod(axis.size for axis in heads), prod(axis.size for axis in channel)
    x = _side_by_side(walk, (q.view, k, v))
    if x.channels != 3 * count * size or q.view.gain != 1 or k.gain != 1:
        raise Unsupported("linear attention of scaled keys, or whose values are of another size than its keys")
    out = walk.graph.linear_attention(x, count * size, count, context.gain * q.gain, _memory(walk, k, v, count, size))
    of_heads, part = dense([heads, channel])
    queries = q.dims[2] if left else q.dims[1]
    common = (*_images(context.heads), *of_heads)
    return View(Read(out), (common, part, queries) if left else (common, queries, part))


def _images(heads: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return tuple(a for a in heads if a.name == "b")


def _side_by_side(walk: Walk, views: tuple[View, View, View]) -> Value:
    """q, k and v as the channels of one value: heads come first among their dimensions, then those of a head."""
    rows = [view.channels() for view in views]
    forms = [view.form for view in views]
    convs = all(isinstance(f, Conv) and not f.add and f.kernel.groups == 1 for f in forms)
    if convs and forms[0] is forms[1] is forms[2]:
        if walk.forms.is_made(forms[0]) and rows[0] + rows[1] + rows[2] == list(range(forms[0].shape[0])):
            return walk.forms.value(forms[0])
        return walk.forms.value(walk.forms.conv(forms[0].read, forms[0].kernel.rearranged(rows[0] + rows[1] + rows[2])))
    reads = {(f.read.x.id, f.read.activation, id(f.read.norm)) for f in forms} if convs else ()
    if len(reads) == 1:
        kernels = [f.kernel.rearranged(r) for f, r in zip(forms, rows, strict=True)]
        return walk.forms.value(walk.forms.conv(forms[0].read, Kernel.stacked(kernels)))
    values = [walk.forms.value(walk.forms.selected(f, r)) for f, r in zip(forms, rows, strict=True)]
    return walk.graph.concat(walk.graph.concat(values[0], values[1]), values[2])


def _memory(walk: Walk, k: View, v: View, heads: int, size: int) -> Table | None:
    """Constant keys and values before the pixels': [2, heads, n, channels of a head]."""
    if k.memory is None and v.memory is None:
        return None
    if k.memory is None or v.memory is None:
        raise Unsupported("keys with a constant before them, and values without")

    program = walk.program  # the walk holds the graph, which holds what packs

    def one(ref: object, dim: int) -> Tensor:
        found = program.constant(ref)[0]
        return (found.movedim(dim - 1, -2) if found.dim() > 2 else found[None]).reshape(heads, -1, size)

    def make() -> Tensor:
        return torch.stack([one(*k.memory), one(*v.memory)]).float()

    return Table(make, 1, walk.program.outside(k.memory[0], v.memory[0]))


def sdpa(walk: Walk, i: int, node: Node) -> list:
    """torch's own, [B, heads, pixels, channels of a head]."""
    q, k, v = (walk.view(ref) for ref in node.args[:3])
    if any(node.args[3:]) or node.kwargs.get("attn_mask") is not None:
        raise Unsupported("attention with dropout or a mask")
    scale = node.kwargs.get("scale")
    size = prod(a.size for a in q.dims[3])
    scale = q.gain * k.gain * (size**-0.5 if scale is None else scale)
    if not all(only(x.dims[3], "c") and only(x.dims[1], "c") and pixels(x.dims[2]) for x in (q, k, v)):
        raise Unsupported("attention over something else than pixels")
    form, heads, part = attention(walk, q, k, v, q.dims[1], v.dims[3], scale)
    return [View(form, (q.dims[0], heads, q.dims[2], part), 0, v.gain)]


HANDLERS = {
    "_softmax": softmax,
    "_safe_softmax": softmax,
    "_scaled_dot_product_flash_attention_for_cpu": sdpa,
}
