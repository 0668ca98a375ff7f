"""Files to be locked. A lock belongs to the process that took it: its forks get no part in it.

The kernel keeps a ``flock`` for as long as any process has the descriptor that took it, and a fork has all of them.
"""

from __future__ import annotations

import os
import weakref

LOCK = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class LockFile:
    """The empty file ``path``, made if it is not there; a link is refused. To be locked by its ``fileno``."""

    def __init__(self, path: str | os.PathLike, folder: int | None = None):
        """folder: the descriptor that a relative ``path`` starts from."""
        self._fd: int | None = None
        self._fd = os.open(path, LOCK, 0o666, dir_fd=folder)
        _OPEN.add(self)

    def fileno(self) -> int:
        if self._fd is None:
            raise ValueError("this lock is closed, by its owner or because this process was forked from the owner")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd is None

    def close(self) -> None:
        """Give the lock up; nothing if it is closed."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> LockFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


_OPEN: weakref.WeakSet[LockFile] = weakref.WeakSet()  # of this process, as its descriptors are


def _close_copies() -> None:
    for lock in list(_OPEN):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)
