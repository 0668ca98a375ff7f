"""One writer for each share of the shards. The kernel drops a lock with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgm_engine.errors import JobBusy
from sgm_engine.jobs.worker import Worker

TAKEN = (errno.EAGAIN, errno.EACCES)


@contextmanager
def locked(folder: Path, worker: Worker) -> Iterator[None]:
    """Hold the share of ``worker``; JobBusy if somebody else does, or shares the shards out among another count.

    folder: holds one file a share. Workers of one count have disjoint shares; those of two counts overlap. Each takes
    its own lock before it looks for others, so of two that overlap at least one notices.
    """
    job, own = folder.parent.parent, _open(folder / str(worker))
    try:
        if not _take(own, fcntl.LOCK_EX):
            raise JobBusy(f"another process writes the shards of worker {worker} in {job}: let it finish")
        for path in folder.iterdir():
            if not path.name.endswith(f"-of-{worker.count}") and _held(path):
                raise JobBusy(
                    f"worker {path.name} is writing in {job}, which overlaps with {worker}: "
                    "let it finish, or start as many workers as there were"
                )
        yield
    finally:
        os.close(own)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _take(fd: int, mode: int) -> bool:
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        why = f"this file system cannot lock files ({error.strerror}): use another folder"
        raise OSError(error.errno, why) from None
    return True


def _held(path: Path) -> bool:
    fd = _open(path)
    try:
        return not _take(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)
