"""How far long work has come: lines with a rate and a time left, once it has taken a while, and every while after that.

The library says them through ``logging``, as INFO of "sgm_engine"; a program that asks for none hears nothing. At DEBUG
there are more of them, enough for a bar. Such a record has a ``pace``.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

FIRST, EVERY = 10.0, 30.0  # seconds until the first line, and between two
BAR_FIRST, BAR_EVERY = 1.0, 0.2  # until a bar appears, and between two looks of it
T = TypeVar("T")
log = logging.getLogger("sgm_engine")


class Pace(NamedTuple):
    """n of total done after so many seconds; doing: what."""

    doing: str
    n: int
    total: int
    units: str
    seconds: float


def clock(seconds: float) -> str:
    """A time left, "1 d 02:03:04"."""
    days = f"{int(seconds // 86400)} d " if seconds >= 86400 else ""
    return f"{days}{time.strftime('%H:%M:%S', time.gmtime(seconds % 86400))}"


def line(n: int, total: int | None, units: str, seconds: float) -> str:
    """What ``n`` of ``total`` (None: not known) after so many seconds mean."""
    rate = n / seconds
    if total is None:
        return f"{n} {units}, {rate:.3g} {units}/s"
    left = f", {clock((total - n) / rate)} left" if rate else ""
    return f"{n} of {total} {units}, {rate:.3g} {units}/s{left}"


class Lines:
    """What stands for a bar where nobody watches: after FIRST seconds, then every EVERY, a line on stderr.

    total: how many there will be, None where that is not known. units: of what.
    """

    def __init__(self, total: int | None, units: str = "samples"):
        self.total, self.units, self.n = total, units, 0
        self._began = time.monotonic()
        self._next = self._began + FIRST

    def update(self, n: int) -> None:
        self.n += n
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY
            print(f"sgm: {line(self.n, self.total, self.units, now - self._began)}", file=sys.stderr, flush=True)


def paced(things: Iterable[T], total: int, doing: str, units: str) -> Iterator[T]:
    """Each of ``things``, of which there are ``total``; says how far it has come as the next one is asked for."""
    return _told(things, total, doing, units) if log.isEnabledFor(logging.INFO) else iter(things)


def _told(things: Iterable[T], total: int, doing: str, units: str) -> Iterator[T]:
    began = time.monotonic()
    for_line, for_bar = began + FIRST, began + BAR_FIRST
    barred = False
    for n, thing in enumerate(things):
        now = time.monotonic()
        extra = {"pace": Pace(doing, n, total, units, now - began)}
        if now >= for_bar:
            for_bar, barred = now + BAR_EVERY, True
            log.debug("%s", doing, extra=extra)
        if now >= for_line:
            for_line = now + EVERY
            log.info("%s: %s", doing, line(n, total, units, now - began), extra=extra)
        yield thing
    if barred:
        log.debug("%s", doing, extra={"pace": Pace(doing, total, total, units, time.monotonic() - began)})
