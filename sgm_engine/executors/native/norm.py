"""Norms as the native executor takes them: what is normalised, and tables of γ, α and β by level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sgm_engine.rewriting.recognise import FusedNorm, recognise


class Unsupported(ValueError):
    """The module holds something that the native executor has no layer for."""


@dataclass(frozen=True)
class Table:
    """make() → float [rows, C or 1] from ``tensors``, which may change; rows: one a level, or one for all levels."""

    make: Callable[[], Tensor]
    rows: int = 1
    tensors: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, number: float) -> Table:
        return cls(lambda: torch.full((1, 1), float(number)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Table:
        return replace(self, make=lambda: function(self.make()))


@dataclass(frozen=True)
class Norm:
    """y = γ·(x̂ + α·ms) + β: x̂ is x normalised in ``groups`` groups of channels, or x itself if groups is 0.

    source: a tensor of γ, then β, for each image, in the place of parts.
    parts: γ, α and β; None: 1, 0, 0. ms: the channel means, standardised across channels (InstanceNorm++).
    by_pixel: of each pixel's channels, x̂ = (x − mean)/(after + √(max(variance, floor) + eps)); not centred: mean = 0.
    """

    channels: int
    groups: int
    eps: float
    parts: tuple[Table | None, Table | None, Table | None] = (None, None, None)
    by_pixel: bool = False
    centred: bool = True
    floor: float = 0.0
    after: float = 0.0
    source: tuple | None = None  # a graph's Value

    @property
    def rows(self) -> int:
        """1, or the least number of levels that a part has."""
        return min((part.rows for part in self.parts if part and part.rows > 1), default=1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple({id(t): t for part in self.parts if part for t in part.tensors}.values())

    @property
    def has_alpha(self) -> bool:
        return self.parts[1] is not None

    def table(self) -> Tensor:
        """γ, α, β: float32 [rows, 3, C]."""
        parts = [part or Table.of(default) for part, default in zip(self.parts, (1, 0, 0), strict=True)]
        filled = [part.make()[: self.rows].float().expand(self.rows, self.channels) for part in parts]
        return torch.stack(filled, 1).contiguous()

    def then(self, scale: Table, shift: Table) -> Norm:
        """scale·y + shift."""
        gamma, alpha, beta = self.parts
        gamma = scale if gamma is None else _combined(torch.mul, gamma, scale)
        beta = shift if beta is None else _combined(torch.add, _combined(torch.mul, beta, scale), shift)
        return replace(self, parts=(gamma, alpha, beta))

    def at(self, index: Table) -> Norm:
        """The norm whose row at a level is this one's row at index [levels]."""

        def looked_up(part: Table | None) -> Table | None:
            if part is None or part.rows == 1:
                return part
            return Table(lambda: part.make()[index.make()], index.rows, part.tensors + index.tensors)

        return replace(self, parts=tuple(map(looked_up, self.parts)))


def affine(channels: int) -> Norm:
    """y = x, to be followed by ``then``."""
    return Norm(channels, 0, 0.0)


def film(channels: int, source: tuple) -> Norm:
    """y = γ·x + β of each image's own γ and β, source [2·channels, 1, 1]."""
    return Norm(channels, 0, 0.0, source=source)


def norm_of(module: nn.Module) -> Norm:
    """A norm module as the executor takes it. Raises Unsupported."""
    fused = module if isinstance(module, FusedNorm) else recognise(module)
    if not isinstance(fused, FusedNorm):
        raise Unsupported(f"{type(module).__name__}: {fused or 'not a norm that the native executor knows'}")

    def part(role: str) -> Table | None:
        if role not in fused.roles:
            return None
        if not fused.conditional:
            vector = getattr(fused.source, fused.roles[role])
            return Table(lambda: vector[None], 1, (vector,))
        weight, at = fused.embedding.weight, tuple(fused.roles).index(role)
        return Table(lambda: weight.split(fused.channels, dim=1)[at], len(weight), (weight,))

    return Norm(fused.channels, fused.groups or fused.channels, fused.eps, tuple(map(part, ("gamma", "alpha", "beta"))))


def _combined(function: Callable[[Tensor, Tensor], Tensor], a: Table, b: Table) -> Table:
    rows = max(a.rows, b.rows) if 1 in (a.rows, b.rows) else min(a.rows, b.rows)
    return Table(lambda: function(a.make()[:rows], b.make()[:rows]), rows, a.tensors + b.tensors)
