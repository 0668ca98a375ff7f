"""What views do to an image: a tensor's dimensions as products of the axes of the [channels, height, width] behind it.

``[B, C, H, W]`` seen as ``[B·heads, H·W, C/heads]`` is the dimensions (b, c of heads), (h, w), (c within a head). Views
split, join and reorder axes; nothing moves in memory until a layer reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from sgm_engine.executors.native.norm import Unsupported


class Axis(NamedTuple):
    """Part of an axis: ``size`` places, ``step`` apart.

    name: "b" images, "c" channels, "h" rows, "w" columns; "H", "W" a second image's (keys of attention); "C" a second
    one's channels; "r" a repetition, "z" zeros after the first place.
    """

    name: str
    size: int
    step: int = 1


Dims = tuple[tuple[Axis, ...], ...]


def image_dims(batch: int, channels: int, height: int, width: int) -> Dims:
    """Of [B, C, H, W]."""
    named = zip("bchw", (batch, channels, height, width), strict=True)
    return tuple((Axis(name, size),) if size > 1 else () for name, size in named)


def sizes(dims: Dims) -> tuple[int, ...]:
    return tuple(prod(a.size for a in dim) for dim in dims)


def joined(dim: Sequence[Axis]) -> tuple[Axis, ...]:
    """Neighbours that are one axis as one axis; those of size 1 left out."""
    found: list[Axis] = []
    for axis in dim:
        if axis.size == 1:
            continue
        last = found[-1] if found else None
        if last and last.name == axis.name and last.step == axis.size * axis.step and axis.name not in "rz":
            found[-1] = Axis(axis.name, last.size * axis.size, axis.step)
        else:
            found.append(axis)
    return tuple(found)


def reshape(dims: Dims, shape: Sequence[int]) -> Dims:
    """The same elements in the same order, as ``shape``. Raises Unsupported if it cuts an axis unevenly."""
    todo = [axis for dim in dims for axis in dim][::-1]
    total = prod(sizes(dims))
    shape = [total // -prod(shape) if n == -1 else n for n in shape]
    found = []
    for n in shape:
        dim: list[Axis] = []
        while n > 1:
            if not todo:
                raise Unsupported(f"a view of {sizes(dims)} as {tuple(shape)}")
            axis = todo.pop()
            if axis.size > n:
                if axis.size % n:
                    raise Unsupported(f"a view of {sizes(dims)} as {tuple(shape)}")
                rest = axis.size // n
                todo.append(Axis(axis.name, rest, axis.step))
                axis = Axis(axis.name, n, axis.step * rest)
            elif n % axis.size:
                raise Unsupported(f"a view of {sizes(dims)} as {tuple(shape)}")
            dim.append(axis)
            n //= axis.size
        found.append(joined(dim))
    return tuple(found)


def offsets(axes: Sequence[Axis], name: str = "c") -> list[int]:
    """Where the places along these axes lie on the axis called ``name``, in order."""
    steps = [range(0, a.size * a.step, a.step) for a in axes if a.name == name]
    return [sum(at) for at in product(*steps)]


def names(dim: Sequence[Axis]) -> str:
    """ "bc" for (b, c, c)."""
    return "".join(dict.fromkeys(a.name for a in dim))


def only(dim: Sequence[Axis], name: str) -> bool:
    """Whether all of its axes are called so."""
    return all(a.name == name for a in dim)


def renamed(dim: Sequence[Axis], names_: dict[str, str]) -> tuple[Axis, ...]:
    return tuple(Axis(names_.get(a.name, a.name), a.size, a.step) for a in dim)


def normal(dim: int, count: int) -> int:
    """A dimension's place, counted from the front."""
    return dim % count


def dense(parts: Sequence[Sequence[Axis]], name: str = "c") -> list[tuple[Axis, ...]]:
    """Axes of these sizes on a fresh axis that runs through them in order, the last one fastest."""
    step = prod(a.size for part in parts for a in part)
    found = []
    for part in parts:
        axes = []
        for a in part:
            step //= a.size
            axes.append(Axis(name, a.size, step))
        found.append(joined(axes))
    return found
