"""Objects under a URL, by fsspec (the extra [storage]): each is put whole or not at all, in place of what was there.

s3:// is s3fs, gs:// gcsfs, az:// adlfs, with the credentials that each finds by itself: the environment, files, the
machine's role.
"""

from __future__ import annotations

import errno
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # which know conditional puts
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries, at most; those of the packages come on top
# What another try would not mend; NotImplementedError: a conditional put where the package has none.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, ValueError, TypeError)
TOGETHER = 8  # puts of one shard at a time


def is_url(path: object) -> bool:
    return isinstance(path, str) and "://" in path


def refuse_url(path: object, what: str) -> None:
    """ValueError: of object storage only runs, jobs and searches are read."""
    if is_url(str(path)):
        raise ValueError(f"{path} is on object storage, and {what} are read from a disk: copy them to one")


class Prefix:
    """The objects whose names begin with ``url/``; reads as HeldFolder does."""

    def __init__(self, url: str):
        """ValueError names the URL, or the package that it needs."""
        self.path = url.rstrip("/")
        scheme, _, rest = self.path.partition("://")
        if scheme not in PACKAGES or not rest.strip("/"):
            known = ", ".join(f"{name}://BUCKET/NAME" for name in PACKAGES)
            raise ValueError(f"object storage is one of {known}, got {url!r}")
        try:
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(self.path)
        except ImportError as error:
            what = f"pip install 'sgm-engine[storage]' {PACKAGES[scheme]}"
            raise ValueError(f"{scheme}:// needs {PACKAGES[scheme]} ({error}): {what}") from None

    def folder(self, name: str) -> Prefix:
        return Prefix(f"{self.path}/{name}")

    def names(self) -> list[str]:
        """What is under it, to the next slash; none where there is nothing."""
        try:
            found = self._ask(lambda path: self._fs.ls(path, detail=False), "")
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found if path.rstrip("/") != self._root]

    def tree(self) -> list[str]:
        """The names of all objects under it, slashes included."""
        return [path[len(self._root) + 1 :] for path in self._ask(self._fs.find, "")]

    def size(self, name: str) -> int:
        """Bytes of an object; 0 where there is none."""
        return self._info(name).get("size") or 0

    def has(self, name: str) -> bool:
        return self._info(name).get("type") == "file"

    def read(self, name: str, limit: int | None = None) -> bytes:
        """OSError if it is not there, ValueError if it is longer than ``limit`` bytes."""
        if limit is not None and (size := self.size(name)) > limit:
            raise ValueError(f"{self.path}/{name} has {size} bytes, at most {limit} are read")
        return self._ask(self._fs.cat_file, name)

    def write(self, name: str, content: bytes) -> None:
        self._ask(lambda path: self._fs.pipe_file(path, content), name)

    def create(self, name: str, content: bytes) -> bool:
        """A conditional put: False if there is such an object."""
        try:
            self._ask(lambda path: self._fs.pipe_file(path, content, mode="create"), name)
        except FileExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        try:
            self._ask(self._fs.rm_file, name)
        except FileNotFoundError:
            return  # another process was as quick

    def create_all(self, files: Mapping[str, bytes]) -> list[str]:
        """The names of those that were there."""
        if len(files) == 1:
            return [name for name, content in files.items() if not self.create(name, content)]
        with ThreadPoolExecutor(TOGETHER) as pool:
            made = list(pool.map(self.create, files, files.values()))
        return [name for name, made in zip(files, made, strict=True) if not made]

    def check_conditional(self, name: str) -> None:
        """ValueError unless a second ``create`` of one object is refused."""
        if self.create(name, b"") and self.create(name, b""):
            raise ValueError(
                f"{self.path} takes no conditional puts (If-None-Match), so two jobs could not be kept apart there: "
                "name another storage, or a folder"
            )

    def _info(self, name: str) -> dict[str, Any]:
        try:
            return self._ask(self._fs.info, name)
        except FileNotFoundError:
            return {}

    def _ask(self, ask: Callable[[str], T], name: str) -> T:
        """``ask`` of the object, again after WAITS if the storage is busy or gone for a while."""
        path, url = (f"{self._root}/{name}", f"{self.path}/{name}") if name else (self._root, self.path)
        for wait in (*WAITS, None):
            self._fs.invalidate_cache()  # of listings, which others change
            try:
                return ask(path)
            except FINAL as error:
                if isinstance(error, OSError):
                    raise type(error)(error.errno or errno.EIO, f"object storage: {_short(error)}", url) from None
                raise
            except Exception as error:  # each package has its own
                if wait is None:
                    number = getattr(error, "errno", None) or errno.EIO
                    raise OSError(number, f"object storage: {_short(error)}", url) from error
                warnings.warn(f"{url}: {_short(error)}; tried again", stacklevel=3)
                time.sleep(wait * random.uniform(0.5, 1.0))
        raise AssertionError


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a folder of this machine, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="sgm-") as where:
        yield Path(where)


@contextmanager
def staged_folder(url: str) -> Iterator[Path]:
    """Yields a temporary folder of this machine, whose files are put under ``url`` unless something is raised."""
    prefix = Prefix(url)
    with scratch_folder() as where:
        yield where
        for path in sorted(where.iterdir()):
            prefix._ask(partial(prefix._fs.put_file, str(path)), path.name)


@contextmanager
def staged_object(url: str) -> Iterator[BinaryIO]:
    """The same for one file, which is open."""
    folder, _, name = url.rpartition("/")
    with staged_folder(folder) as where, open(where / name, "w+b") as file:
        yield file


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
