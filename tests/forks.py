"""A fork of the process that runs the tests."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[None]:
    """The fork has done ``work()`` when the block begins, and lives until it ends. AssertionError: failed, or hung."""
    (told, tell), (going, go) = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            os.close(told)
            os.close(go)
            work()
            os.write(tell, b"x")
            os.read(going, 1)  # until the parent closes its end
        finally:
            os._exit(0)
    os.close(tell)
    os.close(going)
    try:
        assert os.read(told, 1) == b"x", "the fork failed, or hung for 30 s"
        yield
    finally:
        os.close(go)
        os.waitpid(child, 0)
        os.close(told)
