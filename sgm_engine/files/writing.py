"""How files are written: under a new random name, exclusively, flushed, then renamed. Complete or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

from sgm_engine.pace import paced

MIB = 2**20  # bytes
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW  # never a file that is there, never a link
CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EBADF)


def check_writable(path: Path, folder: bool = False) -> None:
    """OSError if a file, or folder, cannot be created or replaced. Tries it: permission bits tell root nothing."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() and not folder:
        raise IsADirectoryError(f"cannot write {path}: it is a folder, name a file")
    probe = path.parent / temporary_name(path.name)
    try:
        os.close(os.open(probe, NEW))
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write in {path.parent}: {error.strerror}") from error


@contextmanager
def staged(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a new binary file beside ``path``; flushed and renamed to ``path`` at the end, else removed.

    A link at ``path`` is replaced, not followed. The folder is held open, so it is one and the same throughout.
    """
    path = Path(path)
    folder = _open_folder(path.parent)
    tmp = temporary_name(path.name)
    try:
        with os.fdopen(os.open(tmp, NEW, 0o666, dir_fd=folder), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        flush_folder(folder)
    except BaseException as error:  # Ctrl-C too: half a result is not left behind
        if isinstance(error, OSError) and error.filename in (None, tmp):  # a full disk does not say which
            error.filename = str(path)
        with suppress(FileNotFoundError):
            os.unlink(tmp, dir_fd=folder)
        raise
    finally:
        os.close(folder)


def write_file(path: str | os.PathLike, content: bytes | str) -> None:
    """``content`` (a str as UTF-8) under ``path``, in place of what is there, complete or not at all."""
    content = memoryview(content.encode() if isinstance(content, str) else content)
    starts = range(0, len(content), MIB)
    with staged(path) as file:
        for start in paced(starts, len(starts), f"writing {Path(path).name}", "MiB"):
            file.write(content[start : start + MIB])


def append_line(path: str | os.PathLike, line: str) -> None:
    """A line at the end of a log; a link is refused."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8") as file:
        file.write(line + "\n")


def remove(path: str | os.PathLike) -> None:
    """Remove a file or a link; nothing if it is not there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def new_zip(file: BinaryIO) -> ZipFile:
    """An empty archive to write into."""
    return ZipFile(file, "w")


def _open_folder(path: Path) -> int:
    """A descriptor to create files by; one that may be written but not listed serves too."""
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDONLY | flags)
    except PermissionError:
        return os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | flags)


def flush_folder(fd: int) -> None:
    """Wait until the names in the folder are on the disk; where its file system has no such call, go on."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def temporary_name(name: str) -> str:
    """Hidden, and another one each time, whoever asks: containers all have the same process id."""
    return f".{name[:200]}.{secrets.token_hex(8)}.tmp"
