"""One workload of two trees, in live processes that take turns, until it is clear whether this tree is slower.

A round: each tree starts a fresh process, which sets the workload up; then they take five pairs of turns or more (three
of long ones), in an order drawn anew for each pair. Its figure is the median of the pairs' ratios, this tree's time
over the base's. Where its memory lies makes a process some per cent faster or slower for as long as it lives, and no
number of pairs removes that: a round is one observation. Its processes are forks of live ones, replaced after four.
Rounds go on until the bounds of bench.sequential decide: SLOWER, the median ratio lies above 1.015 (wrong twice in a
thousand); ok, it lies below 1.035 (wrong once in a hundred); undecided, the time is over.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.counts import COUNTS
from bench.sequential import bounds
from bench.workloads import WORKLOADS

ABOVE, BELOW = (1.015, 0.002), (1.035, 0.01)  # the ratio, and how often its bound may be wrong
LIVES = 4  # rounds of a live process
PAIRS, TURN, SECONDS, STUCK = (5, 25), 0.04, 55.0, 240.0  # pairs: at least, at most
FAIL = ("SLOWER", "MORE")
NOT_COMPARED = 77  # exit code: something other than speed stood in the way
HERE = Path(__file__).resolve().parent


class CannotRun(Exception):
    """A tree cannot run a workload, and why."""


@dataclass
class Row:
    """A line of the table. base, head: medians of a call, or counts, in ``unit``; ratio head/base and its bounds."""

    name: str
    verdict: str  # "SLOWER", "MORE", "ok", "undecided", "new" (the base has nothing like it) or "accepted"
    note: str = ""
    unit: str = "ms"
    base: float = math.nan
    head: float = math.nan
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    turns: list[float] = field(default_factory=list, repr=False)  # seconds a call, this tree's

    @property
    def fails(self) -> bool:
        return self.verdict in FAIL


def environment(tree: Path) -> dict[str, str]:
    """Of a process with ``tree``'s package, on one thread unless it says otherwise."""
    return os.environ | {
        "PYTHONPATH": str(tree),
        "SGM_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        # glibc keeps what is freed: a fresh mapping a call would time the kernel's page faults, not ours
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    }


def command(module: str, *arguments: object) -> list[str]:
    """This tree's bench.``module`` as a program, whichever tree's package it finds: the same yardstick for both."""
    start = f"import sys, runpy; sys.path[0] = {str(HERE.parent)!r}; import bench; sys.path[0] = ''; "
    return [sys.executable, "-c", start + f"runpy.run_module('bench.{module}', run_name='__main__', alter_sys=True)",
            *map(str, arguments)]  # fmt: skip


class Tree:
    """A tree's live process: see bench.worker. ``whose`` names it in messages."""

    def __init__(self, root: Path, whose: str):
        self.root, self.whose = root, whose
        self.start()
        self.answer()

    def start(self) -> None:
        """Without waiting until it is ready, which is its first answer."""
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in ``close``
        self.process = subprocess.Popen(
            command("worker", self.root), env=environment(self.root), cwd=self.root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, start_new_session=True,
        )  # fmt: skip

    def say(self, line: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # ``answer`` says why
            print(line, file=self.process.stdin, flush=True)

    def answer(self) -> dict:
        """CannotRun if it cannot, or says nothing for STUCK seconds and is killed."""
        watch = threading.Timer(STUCK, self.kill)
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if not line:
            self._complaints.seek(0)
            why = (self._complaints.read().strip().splitlines() or ["without a word"])[-1]
            raise CannotRun(f"{self.whose}: its process ended ({self.process.wait()}): {why[-200:]}")
        said = json.loads(line)
        if "error" in said:
            raise CannotRun(f"{self.whose}: {said['error']}")
        return said

    def turn(self, calls: int) -> float:
        self.say(calls)
        return self.answer()["seconds"]

    def counts(self, name: str) -> dict[str, int]:
        """Of one of counts.COUNTS, in a fresh process."""
        self.say(name)
        return self.answer()["counts"]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with its child

    def close(self) -> None:
        self.process.stdin.close()  # which ends it, and the child that it may have
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._complaints):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


Round = tuple[float, list[float], list[float]]  # its ratio; seconds a call of base and of this tree


def renew(both: Sequence[Tree]) -> None:
    for tree in both:
        tree.close()
    for tree in both:
        tree.start()
    for tree in both:
        tree.answer()


def rounds(base: Tree, head: Tree, name: str) -> Iterator[Round]:
    """Rounds of a workload without end; a pair is one where each call starts a process anyway. CannotRun."""
    both, calls, alone = (base, head), 0, WORKLOADS[name].clock == "children"
    for number in itertools.count(1):
        began = time.monotonic()
        for tree in random.sample(both, 2):
            tree.say(name)
        first, refusals = [], []
        for tree in both:
            try:
                first.append((tree, tree.answer()["seconds"]))
            except CannotRun as why:
                refusals.append(why)
        try:
            if refusals:
                raise refusals[-1]  # this tree's, if both
            calls = calls or max(1, round(TURN / max(seconds for _, seconds in first)))
            pairs: list[tuple[float, float]] = []
            ready = time.monotonic()
            least = PAIRS[0] if calls > 1 else 3
            while len(pairs) < least or (len(pairs) < PAIRS[1] and time.monotonic() < 2 * ready - began):
                turns = {i: both[i].turn(calls) for i in random.sample((0, 1), 2)}
                pairs.append((turns[0], turns[1]))
                if alone:
                    yield turns[1] / turns[0], [turns[0]], [turns[1]]
        finally:
            for tree, _ in first:
                tree.say("")
        if not alone:
            yield statistics.median(b / a for a, b in pairs), *map(list, zip(*pairs, strict=True))
        if number % LIVES == 0:
            renew(both)


def decide(found: Iterator[Round], seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic) -> Row:
    """Takes rounds until the median ratio is known to lie above 1.015 or below 1.035, or the time is over."""
    ratios, base, head, end = [], [], [], clock() + seconds
    while True:
        ratio, before, after = next(found)
        ratios.append(ratio), base.extend(before), head.extend(after)
        low, high = bounds(ratios, ABOVE[1])[0], bounds(ratios, BELOW[1])[1]
        verdict = "SLOWER" if low > ABOVE[0] else "ok" if high < BELOW[0] else "undecided"
        if verdict != "undecided" or clock() > end:
            medians = (1e3 * statistics.median(times) for times in (base, head))
            return Row("", verdict, f"{len(ratios)} rounds", "ms", *medians, statistics.median(ratios), low, high, head)


def compare(base: Tree, head: Tree, name: str, seconds: float = SECONDS) -> Row:
    """The row of a workload; "new" if only the base cannot run it. CannotRun if this tree cannot."""
    found = rounds(base, head, name)
    try:
        row = decide(found, seconds)
    except CannotRun as why:
        if str(why).startswith(head.whose):
            raise
        return Row(name, "new", str(why))
    finally:
        found.close()
    row.name = name
    return row


def more(name: str, before: Mapping[str, int], after: Mapping[str, int], most: float) -> list[Row]:
    """A row for each number that both have; "MORE" where this tree's is over ``most`` times the base's."""
    rows = []
    for key in sorted(before.keys() & after.keys()):
        a, b = before[key], after[key]
        ratio = b / a if a else 1.0 if b == a else math.inf
        rows.append(Row(f"{name}: {key}", "MORE" if ratio > most else "ok", "", "", a, b, ratio, ratio, ratio))
    return rows or [Row(name, "new", "base: it counts nothing of this name")]


def counted(base: Tree, head: Tree, name: str) -> list[Row]:
    """The rows of one of counts.COUNTS: of memory the least of three processes."""
    count, found = COUNTS[name], []
    for tree in (head, base):
        try:
            tries = [tree.counts(name) for _ in range(3 if count.memory else 1)]
        except CannotRun as why:
            if tree is head:
                raise
            return [Row(name, "new", str(why))]
        found.append({key: min(each[key] for each in tries) for key in tries[0]})
    return more(name, found[1], found[0], count.most)
