"""Calls that move nothing: views of a recorded network's values, and what they do to dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from sgm_engine.executors.native.forms import View
from sgm_engine.executors.native.layout import Axis, Dims, names, normal, only, reshape, sizes
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.executors.native.walk import Walk
from sgm_engine.rewriting.record import Node

FLOATS = (None, torch.float32, torch.float64)


@dataclass(frozen=True)
class Padded:
    """A view whose images have a border, for the convolution that reads it. sides: top, bottom, left, right."""

    view: View
    sides: tuple[int, int, int, int]
    mode: str = "zeros"


def seen(walk: Walk, ref: object) -> object:
    """Whatever has dimensions."""
    found = walk.values.get(ref)
    if not hasattr(found, "dims"):
        raise Unsupported("a view of something that waits for the layer that reads it")
    return found


def view(walk: Walk, i: int, node: Node) -> object:
    found = seen(walk, node.args[0])
    return replace(found, dims=reshape(found.dims, node.shapes[0]))


def permute(walk: Walk, i: int, node: Node) -> object:
    found = seen(walk, node.args[0])
    count = len(found.dims)
    if node.name == "permute":
        order = [normal(d, count) for d in node.args[1]]
    else:
        order = list(range(count))
        a, b = (normal(d, count) for d in (node.args[1:] if node.name == "transpose" else (0, count - 1)))
        order[a], order[b] = order[b], order[a]
    return replace(found, dims=tuple(found.dims[d] for d in order))


def same(walk: Walk, i: int, node: Node) -> object:
    """Copies, and casts that keep the precision."""
    dtype = node.kwargs.get("dtype")
    if dtype not in FLOATS:
        raise Unsupported(f"a cast to {dtype}")
    found = walk.values.get(node.args[0])
    if found is None:
        raise Unsupported("a copy of no feature map")
    return found


def expand(walk: Walk, i: int, node: Node) -> object:
    """Dimensions of size 1 repeated."""
    found = walk.values.get(node.args[0])
    if not isinstance(found, View):
        return found  # a moment, which has no size
    dims, shape = found.dims, node.shapes[0]
    dims = ((),) * (len(shape) - len(dims)) + tuple(dims)
    repeated = [dim if n == m else (Axis("r", n),) for dim, n, m in zip(dims, shape, sizes(dims), strict=True)]
    return replace(found, dims=tuple(repeated))


def repeat(walk: Walk, i: int, node: Node) -> object:
    found, times = walk.view(node.args[0]), node.args[1]
    dims = ((),) * (len(times) - len(found.dims)) + tuple(found.dims)
    if any(n > 1 and dim for n, dim in zip(times, dims, strict=True)):
        raise Unsupported("images repeated one after another")
    return replace(found, dims=tuple((Axis("r", n),) if n > 1 else dim for n, dim in zip(times, dims, strict=True)))


def pick(found: View, dim: int, start: int, length: int, step: int = 1) -> View:
    """Places start, start + step, … of a dimension."""
    dim = normal(dim, len(found.dims))
    axes = found.dims[dim]
    if (start, length, step) == (0, prod(a.size for a in axes), 1):
        return found
    if len(axes) > 1 and step == 1 and start % length == 0 and prod(a.size for a in axes) % length == 0:
        total = prod(a.size for a in axes)
        outer, axes = reshape((axes,), (total // length, length))
        place, offset = start // length, 0
        for axis in outer[::-1]:
            offset += place % axis.size * axis.step
            place //= axis.size
        kept = axes
        if not only(outer, "c"):
            raise Unsupported("a part of an image")
    elif len(axes) == 1 and (
        axes[0].name == "c" or (axes[0].name in "hw" and start == 0 and length * step >= axes[0].size)
    ):
        offset, kept = start * axes[0].step, (Axis(axes[0].name, length, axes[0].step * step),) if length > 1 else ()
    else:
        raise Unsupported(f"a part of a dimension of {names(axes)}")
    return replace(found, dims=(*found.dims[:dim], kept, *found.dims[dim + 1 :]), start=found.start + offset)


def _is_stride(axis: Axis, start: int, length: int, step: int) -> bool:
    """Whether it is every so many places, from the first to the last."""
    return start == 0 and length * step >= axis.size


def slice_(walk: Walk, i: int, node: Node) -> View:
    found = walk.view(node.args[0])
    dim, start, _, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    dim = normal(dim, len(found.dims))
    total = sizes(found.dims)[dim]
    start = 0 if start is None else min(start + total if start < 0 else start, total)
    return pick(found, dim, start, node.shapes[0][dim], step)


def select(walk: Walk, i: int, node: Node) -> View:
    found = walk.view(node.args[0])
    dim = normal(node.args[1], len(found.dims))
    return _one(found, dim, node.args[2] % sizes(found.dims)[dim])


def unbind(walk: Walk, i: int, node: Node) -> list:
    found = walk.view(node.args[0])
    dim = normal(node.args[1] if len(node.args) > 1 else 0, len(found.dims))
    return [_one(found, dim, n) for n in range(len(node.shapes))]


def split(walk: Walk, i: int, node: Node) -> list:
    found = walk.view(node.args[0])
    dim = normal(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0), len(found.dims))
    parts, start = [], 0
    for shape in node.shapes:
        parts.append(pick(found, dim, start, shape[dim]))
        start += shape[dim]
    return parts


def pad(walk: Walk, i: int, node: Node) -> object:
    """Zeros, or a border, around images; or zeros between pixels: a dimension of one place that is padded behind."""
    found, amounts = walk.view(node.args[0]), list(node.args[1])
    mode = {"reflection_pad2d": "reflect", "replication_pad2d": "replicate"}.get(node.name, "zeros")
    if not isinstance(node.op, torch._ops.OpOverload):
        mode = node.args[2] if len(node.args) > 2 else node.kwargs["mode"]
    elif mode == "zeros" and len(node.args) > 2 and node.args[2]:
        raise Unsupported(f"a border of {node.args[2]}")
    sides = {"h": (0, 0), "w": (0, 0)}
    dims = list(found.dims)
    for n, dim in enumerate(range(len(dims) - 1, len(dims) - 1 - len(amounts) // 2, -1)):
        before, after = amounts[2 * n : 2 * n + 2]
        if (before, after) == (0, 0):
            continue
        name = names(dims[dim])
        if not dims[dim] and before == 0 and mode == "zeros":
            dims[dim] = (Axis("z", after + 1),)
        elif name and name.rstrip("zr") in ("h", "w") and min(before, after) >= 0:
            sides[name[0]] = (before, after)
        else:
            raise Unsupported("padding of something else than images")
    found = replace(found, dims=tuple(dims))
    if sides == {"h": (0, 0), "w": (0, 0)}:
        return found
    return Padded(found, (*sides["h"], *sides["w"]), mode)


def _one(found: View, dim: int, place: int) -> View:
    found = pick(found, dim, place, 1)
    dims: Dims = (*found.dims[:dim], *found.dims[dim + 1 :])
    return replace(found, dims=dims)


def of_padded(value: object) -> Sequence:
    """A view and its border."""
    if isinstance(value, Padded):
        return value.view, value.sides, value.mode
    if not isinstance(value, View):
        raise Unsupported("something else than a feature map where one is expected")
    return value, (0, 0, 0, 0), "zeros"


def unshuffle(walk: Walk, i: int, node: Node) -> View:
    """The pixels of a block as channels: a view that the convolution reading it takes."""
    found, n = walk.view(node.args[0]), node.args[1]
    b, c, h, w = found.dims
    (h, rows), (w, columns) = (reshape((dim,), (sizes((dim,))[0] // n, n)) for dim in (h, w))
    return replace(found, dims=(b, c + rows + columns, h, w))


HANDLERS = {
    "pixel_unshuffle": unshuffle,
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "unsqueeze", "squeeze"), view),
    **dict.fromkeys(("permute", "transpose", "t"), permute),
    **dict.fromkeys(("clone", "alias", "detach", "_to_copy", "lift_fresh", "contiguous"), same),
    **dict.fromkeys(("split", "split_with_sizes"), split),
    **dict.fromkeys(("constant_pad_nd", "reflection_pad2d", "replication_pad2d", "pad"), pad),
    "expand": expand, "repeat": repeat, "slice": slice_, "select": select, "unbind": unbind,
}  # fmt: skip
