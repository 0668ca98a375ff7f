"""A folder held open: all in it is read and written relative to its descriptor, and no link in it is followed.

Whatever happens to the path meanwhile, what is written goes into the folder that was opened, or fails.
"""

from __future__ import annotations

import errno
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from sgm_engine.files.locks import LockFile
from sgm_engine.files.reading import read_bytes
from sgm_engine.files.writing import NEW, flush_folder

TOGETHER = 64  # files that are open at once
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL)


class HeldFolder:
    """``path`` may be a link itself, what is in it may not. Closed when nobody refers to it, or by ``close``."""

    def __init__(self, path: Path, parent: HeldFolder | None = None):
        self.path = path if parent is None else parent.path / path
        flags = FOLDER if parent is None else FOLDER | os.O_NOFOLLOW
        try:
            self.fd = os.open(path, flags, dir_fd=parent and parent.fd)
        except OSError as error:
            raise self._plainly(error, "") from None
        self.close = weakref.finalize(self, os.close, self.fd)

    def folder(self, name: str, create: bool = False) -> HeldFolder:
        """The folder ``name`` in this one; OSError if it is a link."""
        if create:
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.fd)
        return HeldFolder(Path(name), self)

    def names(self) -> list[str]:
        """What is in it. OSError names the folder and the remedy where it cannot be listed."""
        try:
            return os.listdir(self.fd)
        except OSError as error:
            why = f"{error.strerror}: this folder cannot be listed: allow it, or name another folder"
            raise OSError(error.errno, why, str(self.path)) from None

    def size(self, name: str) -> int:
        """Bytes of a file; 0 where there is none."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    def has(self, name: str) -> bool:
        """Whether there is something of that name, a broken link too."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A regular file; OSError if it is a link or not there, ValueError for anything else."""
        try:
            return read_bytes(name, limit, self.fd)
        except OSError as error:
            raise self._plainly(error, name) from None
        except ValueError as error:
            raise ValueError(f"{self.path / str(error)}") from None

    def write(self, files: Mapping[str, bytes]) -> None:
        """New files, all of them on the disk. FileExistsError if a name is taken, by a link too.

        Some are written, then flushed: a journal takes them together.
        """
        contents = iter(files.items())
        while some := dict(itertools.islice(contents, TOGETHER)):
            with ExitStack() as opened:
                written = {name: self._new(name, content, opened) for name, content in some.items()}
                for name, fd in written.items():
                    with self._plain_errors(name):
                        os.fsync(fd)

    def _new(self, name: str, content: bytes, opened: ExitStack) -> int:
        with self._plain_errors(name):
            fd = os.open(name, NEW, 0o666, dir_fd=self.fd)
            opened.callback(os.close, fd)
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            return fd

    @contextmanager
    def _plain_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._plainly(error, name) from None

    def move(self, name: str, to: HeldFolder, new: str) -> None:
        """``name`` becomes ``new`` in the folder ``to``, in place of what is there."""
        os.replace(name, new, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def link_new(self, name: str, to: HeldFolder, new: str, alone: Callable[[], AbstractContextManager]) -> bool:
        """``name`` appears as ``new`` in ``to``, unless that is there: False. alone: a lock that all take who ask; used
        where the file system has no hard links (FUSE, some NFS)."""
        try:
            os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=to.fd, follow_symlinks=False)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        with alone():
            if to.has(new):
                return False
            self.move(name, to, new)
            return True

    def remove(self, name: str) -> None:
        """Remove a file or a link; nothing if it is not there."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._plainly(error, name) from None

    def open_lock(self, name: str) -> LockFile:
        """The empty file ``name``, made if it is not there, to be locked and closed."""
        try:
            return LockFile(name, self.fd)
        except OSError as error:
            raise self._plainly(error, name) from None

    def flush(self) -> None:
        flush_folder(self.fd)

    def _plainly(self, error: OSError, name: str) -> OSError:
        """With the whole path, and links called by their name (ELOOP; ENOTDIR of a folder that is a link)."""
        path = self.path / name if name else self.path
        if error.errno in (errno.EACCES, errno.EPERM) and not name:
            why = f"{error.strerror}: this folder must be readable: allow it, or name another folder"
            return OSError(error.errno, why, str(path))
        if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and path.is_symlink()):
            return OSError(errno.ELOOP, "is a link, and links in a job are not followed: remove it", str(path))
        return OSError(error.errno, error.strerror, str(path))
