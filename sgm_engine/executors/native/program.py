"""What a recorded network computes from the level alone, and from nothing: evaluated when weights are packed.

The level's part is run for all levels, as many at a time as the recorded run had images, so that sizes it was told as
numbers stay true.
"""

from __future__ import annotations

import threading
from numbers import Number

import torch
from torch import Tensor

from sgm_engine.executors.native.layout import Dims, names, offsets, sizes
from sgm_engine.executors.native.norm import Table, Unsupported
from sgm_engine.rewriting.record import CONSTANT, IMAGE, LEVEL, Recording, Ref, replay


class Program:
    """Values of a recording that depend on no image."""

    def __init__(self, recording: Recording, levels: int):
        self.recording, self.levels = recording, levels
        self.wanted: list[tuple[Ref, int]] = []  # what depends on the level, and the dimension that its images are
        self._known: dict[tuple[Ref, int], Tensor] = {}
        self._lock = threading.Lock()

    def has(self, what: object) -> bool:
        """Whether it is a number, or a tensor that depends on no image."""
        return isinstance(what, Number) or (isinstance(what, Ref) and not self.recording.kind(what) & IMAGE)

    def constant(self, ref: Ref) -> Tensor:
        """Its value as the parameters are. Raises Unsupported if it depends on the level."""
        if self.recording.kind(ref) != CONSTANT:
            raise Unsupported("weights that depend on the level")
        node = self.recording.nodes[ref.node]
        if node.op is None:
            return node.tensor.detach()
        values: dict[Ref, Tensor] = {}
        with torch.no_grad():
            replay(self.recording, self.recording.ancestors([ref]), values)
        return values[ref]

    def outside(self, *refs: Ref | None) -> tuple[Tensor, ...]:
        """The live tensors behind these."""
        return self.recording.outside([r for r in refs if r is not None])

    def number(self, what: object) -> float | None:
        """Of a Python number, or of a constant tensor made of nothing but numbers."""
        if isinstance(what, Number):
            return float(what)
        if isinstance(what, Ref) and self.recording.kind(what) == CONSTANT and not self.outside(what):
            value = self.constant(what)
            return float(value.flatten()[0]) if value.numel() == 1 else None
        return None

    def table(self, what: Ref | Number, dims: Dims, channels: int) -> Table:
        """What is broadcast against an image of these dimensions, [rows, channels or 1]."""
        if isinstance(what, Number):
            return Table.of(what)
        shape = self.recording.shape(what)
        shape = (1,) * (len(dims) - len(shape)) + shape
        kinds = tuple(names(dim) if n > 1 else "" for n, dim in zip(shape, dims, strict=True))
        if len(shape) != len(dims) or any(n not in (1, m) for n, m in zip(shape, sizes(dims), strict=True)):
            raise Unsupported(f"a table of shape {shape} against images seen as {sizes(dims)}")
        if any(kind not in ("", "b", "c", "h", "w", "hw") for kind in kinds) or kinds.count("b") > 1:
            raise Unsupported(f"a table of shape {shape} that varies within an image")
        flat = [n for n, kind in enumerate(kinds) if kind in ("h", "w", "hw")]
        images = kinds.index("b") if "b" in kinds else None
        varies = self.recording.kind(what) == LEVEL
        if varies and images is None:
            raise Unsupported("a table by level that is the same for all images of a batch")
        if varies and (what, images - len(dims)) not in self.wanted:
            self.wanted.append((what, images - len(dims)))
        places = offsets([axis for kind, dim in zip(kinds, dims, strict=True) if kind == "c" for axis in dim])
        if any(kind == "c" for kind in kinds) and len(places) != channels:
            raise Unsupported(f"a table of shape {shape} that holds a part of the channels")
        order = torch.tensor(places).argsort()

        def make() -> Tensor:
            found = self._at_levels(what, images - len(dims)) if varies else self.constant(what)
            found = found.reshape((1,) * (len(dims) - found.dim()) + tuple(found.shape))
            for dim in flat:  # repeated for every pixel
                found = _one_place(found, dim)
            rows = found.movedim(images, 0).flatten(1) if images is not None else found.flatten()[None]
            rows = rows if varies else _one_row(rows)
            return (rows if rows.shape[1] == 1 else rows[:, order]).float()

        table = Table(make, self.levels if varies else 1, self.outside(what))
        if flat or not varies:
            make()  # refuses at once what is no table
        return table

    def index(self, ref: Ref) -> Table | None:
        """int64 [levels], which row of an embedding is looked up; None if it is the level itself."""
        if ref == self.recording.level:
            return None
        if self.recording.kind(ref) == CONSTANT or self.recording.shape(ref) != (self.recording.batch,):
            raise Unsupported("a norm whose level is not one number an image")
        self.wanted.append((ref, 0))
        return Table(lambda: self._at_levels(ref, 0), self.levels, self.outside(ref))

    @torch.no_grad()
    def _at_levels(self, ref: Ref, dim: int) -> Tensor:
        """Its value with one image at every level. All that is wanted is made in one go, and kept until ``forget``."""
        with self._lock:
            if (ref, dim) not in self._known:
                self._known = self._run()
            return self._known[ref, dim]

    def _run(self) -> dict[tuple[Ref, int], Tensor]:
        recording, batch = self.recording, self.recording.batch
        needed = recording.ancestors([ref for ref, _ in self.wanted])
        changing = {recording.nodes[i].base for i in needed if recording.nodes[i].kind == LEVEL}
        once = [i for i in needed if recording.nodes[i].base not in changing and recording.nodes[i].kind == CONSTANT]
        often = sorted(set(needed) - set(once))
        values: dict[Ref, Tensor] = {}
        replay(recording, once, values)
        level = torch.arange(self.levels + -self.levels % batch).clamp_max(self.levels - 1)
        parts: list[list[Tensor]] = [[] for _ in self.wanted]
        for chunk in level.split(batch):
            values[recording.level] = chunk.to(recording.nodes[recording.level.node].dtypes[0])
            replay(recording, often, values)
            for part, (ref, _) in zip(parts, self.wanted, strict=True):
                part.append(values[ref].clone())
        return {
            key: torch.cat(part, key[1]).narrow(key[1], 0, self.levels)
            for key, part in zip(self.wanted, parts, strict=True)
        }

    def forget(self) -> None:
        """Let go of the tables that were made: weights may change now, and the next packing makes them again."""
        with self._lock:
            self._known = {}


def _one_place(found: Tensor, dim: int) -> Tensor:
    """What is the same all along a dimension, once."""
    one = found.narrow(dim, 0, 1)
    if not torch.equal(found, one.expand_as(found)):
        raise Unsupported(f"a table of shape {tuple(found.shape)} that varies within an image")
    return one


def _one_row(rows: Tensor) -> Tensor:
    """The row that all of them are."""
    if len(rows) > 1 and not torch.equal(rows, rows[:1].expand_as(rows)):
        raise Unsupported("a constant that differs from image to image")
    return rows[:1]
