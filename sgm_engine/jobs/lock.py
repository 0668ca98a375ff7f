"""One writer for each share of the shards. The kernel drops a lock with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sgm_engine.errors import JobBusy
from sgm_engine.files.held import HeldFolder
from sgm_engine.files.locks import LockFile
from sgm_engine.jobs.worker import Worker

TAKEN = (errno.EAGAIN, errno.EACCES)


class Held(NamedTuple):
    """What a writer holds open: the folders, and the lock of its share."""

    top: HeldFolder
    work: HeldFolder
    tmp: HeldFolder
    worker: Worker
    lock: LockFile
    manifest: HeldFolder | None = None  # made once the folder is this job's


@contextmanager
def locked(job: Path, folder: HeldFolder, worker: Worker) -> Iterator[LockFile]:
    """Hold the share of ``worker`` of the job at ``job``; yields its lock. JobBusy if somebody else
    holds it, or shares the shards out among another count.

    folder: holds one file a share. Workers of one count have disjoint shares; those of two counts overlap. Each takes
    its own lock before it looks for others, so of two that overlap at least one notices.
    """
    with folder.open_lock(str(worker)) as own:
        if not _take(own, fcntl.LOCK_EX, job):
            raise JobBusy(f"another process writes the shards of worker {worker} in {job}: let it finish")
        for name in folder.names():
            if not name.endswith(f"-of-{worker.count}") and _held(folder, name, job):
                raise JobBusy(
                    f"worker {name} is writing in {job}, which overlaps with {worker}: "
                    "let it finish, or start as many workers as there were"
                )
        yield own


@contextmanager
def alone(folder: HeldFolder, name: str) -> Iterator[None]:
    """One process at a time, waited for: that which holds the file ``name``."""
    with folder.open_lock(name) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _take(lock: LockFile, mode: int, job: Path) -> bool:
    try:
        fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        why = f"this file system cannot lock files ({error.strerror}): use another folder"
        raise OSError(error.errno, why, str(job)) from None
    return True


def _held(folder: HeldFolder, name: str, job: Path) -> bool:
    with folder.open_lock(name) as lock:
        return not _take(lock, fcntl.LOCK_SH, job)
