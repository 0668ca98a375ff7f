"""Sample ids as text and as ranges: ``0-63,1000``. A million ids take as much memory as one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from numbers import Integral

MAX_ID = 2**56


class SampleIds(Sequence[int]):
    """Distinct sample ids in a given order, kept as ``ranges`` that go up. ``str`` and ``parse`` are inverse."""

    def __init__(self, ranges: Iterable[range]):
        """ValueError for a range with a step other than 1, an id outside [0, 2**56), or one that comes twice."""
        self.ranges = tuple(r for r in ranges if len(r))
        for r in self.ranges:
            if r.step != 1 or r.start < 0 or r.stop > MAX_ID:
                raise ValueError(f"sample ids go up by 1 and are at least 0 and below 2**56, got {r}")
        self._ends = list(accumulate(len(r) for r in self.ranges))
        for low, high in pairwise(sorted(self.ranges, key=lambda r: r.start)):
            if high.start < low.stop:
                raise ValueError(f"sample id {high.start} comes twice")

    @classmethod
    def parse(cls, text: str) -> SampleIds:
        """ "0-63,100" → 0, …, 63, 100. ValueError says what is wrong with a text."""
        ranges = []
        for part in text.split(",") if text else ():
            first, dash, last = part.partition("-")
            low = _number(first)
            high = _number(last) if dash else low
            if high < low:
                raise ValueError(f"a range goes up, got {part!r}")
            ranges.append(range(low, high + 1))
        return cls(ranges)

    @classmethod
    def of(cls, ids: Iterable[int]) -> SampleIds:
        """The same ids in the same order, neighbours joined."""
        if isinstance(ids, SampleIds):
            return ids
        if isinstance(ids, range) and ids.step == 1:
            return cls([ids])
        starts, stops = [], []
        for i in map(int, ids):
            if stops and stops[-1] == i:
                stops[-1] += 1
            else:
                starts.append(i)
                stops.append(i + 1)
        return cls(map(range, starts, stops))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[int]:
        for r in self.ranges:
            yield from r

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"sample ids are sliced with step 1, got {step}")
            return self._slice(start, max(start, stop))
        position = range(len(self))[index]
        i = bisect_right(self._ends, position)
        return self.ranges[i][position - (self._ends[i] - len(self.ranges[i]))]

    def __contains__(self, sample_id: object) -> bool:
        return self._range_of(sample_id) is not None

    def index(self, sample_id: int, *limits) -> int:
        """The position of sample_id; ValueError if it is not among them."""
        if (k := self._range_of(sample_id)) is None:
            raise ValueError(f"sample id {sample_id} is not among {self}")
        return self._ends[k] - len(self.ranges[k]) + self.ranges[k].index(sample_id)

    @cached_property
    def _rising(self) -> tuple[list[int], list[int]]:
        """The first ids of the ranges, ascending, and which range each one begins."""
        order = sorted(range(len(self.ranges)), key=lambda k: self.ranges[k].start)
        return [self.ranges[k].start for k in order], order

    def _range_of(self, sample_id: object) -> int | None:
        if not isinstance(sample_id, Integral):
            return None
        starts, order = self._rising
        place = bisect_right(starts, sample_id) - 1
        return order[place] if place >= 0 and sample_id in self.ranges[order[place]] else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SampleIds) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        joined: list[range] = []
        for r in self.ranges:
            if joined and joined[-1].stop == r.start:
                joined[-1] = range(joined[-1].start, r.stop)
            else:
                joined.append(r)
        return ",".join(f"{r.start}-{r.stop - 1}" if len(r) > 1 else f"{r.start}" for r in joined)

    def __repr__(self) -> str:
        return f"SampleIds.parse({str(self)!r})"

    def _slice(self, start: int, stop: int) -> SampleIds:
        first, last = bisect_right(self._ends, start), bisect_left(self._ends, stop)
        parts = []
        for r, end in zip(self.ranges[first : last + 1], self._ends[first : last + 1], strict=True):
            offset = end - len(r)
            parts.append(r[max(0, start - offset) : stop - offset])
        return SampleIds(parts)


def _number(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"must be an integer, got {text!r}") from None
    if not 0 <= value < MAX_ID:
        raise ValueError(f"must be at least 0 and below 2**56, got {value}")
    return value
