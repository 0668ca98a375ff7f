"""Cases in a process of their own: one that hangs, dies or leaves the device unusable costs itself, not what follows.

An illegal access stays with the process: every later call of CUDA fails in it. And a kernel that hangs cannot be
interrupted, only its process be killed.
"""

from __future__ import annotations

import gc
import multiprocessing
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection

import torch

from bench.gpu.stages import Row

MOST_LOST = 8  # processes of a stage: it has its reason then
LEAVING_S = 15  # that a process is waited for: the driver may hold on to one whose kernel hangs
Case = tuple[str, Callable[[], Iterable[Row]]]  # its name, and what measures it


def apart(cases: Callable[[], Iterable[Case]], seconds: float = 60) -> Iterator[Row]:
    """The rows of all cases, in order, as they come. One that gives no row in ``seconds`` is stopped.

    By fork, so that PyTorch is not imported again: the caller must not have used CUDA, and the cases are told by their
    number, so there must be the same ones each time.
    """
    first: int | None = 0
    for _ in range(MOST_LOST):
        first = yield from _until_one_fails(cases, first, seconds)
        if first is None:
            return
    yield {"case": "all that would follow", "failed": f"not run: {MOST_LOST} processes were lost"}


def _until_one_fails(cases: Callable, first: int, seconds: float) -> Generator[Row, None, int | None]:
    """Rows of the cases from number ``first`` on, by one process. Returns the number to go on with, None after all."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_run, args=(cases, first, theirs))
    process.start()
    theirs.close()
    number, name = first, "start"
    try:
        while ours.poll(seconds):
            try:
                kind, *what = ours.recv()
            except EOFError:
                process.join(LEAVING_S)
                yield {"case": name, "failed": f"its process died: exit status {process.exitcode}"}
                return number + 1
            if kind == "case":
                number, name = what
            elif kind == "row":
                yield what[0]
            elif kind == "spoilt":
                yield {"case": name, "failed": f"left the device unusable to its process: {what[0]}"}
                return number + 1
            else:
                return None
        yield {"case": name, "failed": f"stopped: nothing came from it in {seconds:.0f} s"}
        return number + 1
    finally:
        process.kill()
        process.join(LEAVING_S)


def _run(cases: Callable[[], Iterable[Case]], first: int, out: Connection) -> None:
    gc.freeze()  # what is here now is not looked through again after every case
    for number, (name, measure) in enumerate(cases()):
        if number < first:
            continue
        out.send(("case", number, name))
        try:
            for row in measure():
                out.send(("row", row))
        except Exception as error:
            traceback.print_exc()
            out.send(("row", {"case": name, "failed": short(error)}))
        gc.collect()  # now, and not within the capture of a graph: a graph that goes then spoils it
        if reason := unusable():
            out.send(("spoilt", reason))
            return
    out.send(("over",))


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def unusable() -> str | None:
    """What the device answers if it does nothing more for this process. After a capture that failed it may not draw."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.rand(1, device="cuda")
        except Exception as error:
            return short(error)
    return None
