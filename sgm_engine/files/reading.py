"""How files are read: regular files only, by descriptor, bounded. Every error is one line that names the file.

OSError where the disk refuses, ValueError where the content is wrong. Nothing in a file is ever executed.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO
from zipfile import ZipFile

import numpy as np

from sgm_engine.files.limits import Refused, check_need, most_bytes, most_text, remedy, size

MAX_YAML = 1 << 16  # bytes; parsing takes a second for 100 KB
MAX_DIMS = 8
# What zipfile, zlib and NumPy raise on damaged input. OSError: a seek to before the beginning.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError,
          IndexError, KeyError, TypeError, ValueError, OverflowError, MemoryError, SyntaxError, TokenError,
          OSError)  # fmt: skip


def open_file(path: str | os.PathLike, folder: int | None = None) -> BinaryIO:
    """A regular file, open for reading in binary. folder: a descriptor that path, one name, is relative to: no links.

    A FIFO, a device or a socket is refused at once, not waited for.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if folder is None else os.O_NOFOLLOW)
    opener = lambda name, _: os.open(name, flags, dir_fd=folder)  # noqa: E731
    file = open(path, "rb", opener=opener)  # noqa: SIM115 - the descriptor's only owner, so that it is closed once
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Refused(f"{os.fspath(path)}: is not a regular file")
    return file


def read_bytes(path: str | os.PathLike, limit: int | None = None, folder: int | None = None) -> bytes:
    """A whole file; ValueError if it has more than ``limit`` bytes."""
    with open_file(path, folder) as file:
        held = os.fstat(file.fileno()).st_size
        content = b"" if limit is not None and held > limit else file.read(-1 if limit is None else limit + 1)
    if limit is not None and max(held, len(content)) > limit:
        raise Refused(f"{os.fspath(path)}: {size(held)} are too many, at most {size(limit)} are read")
    return content


def read_text(path: str | os.PathLike, limit: int | None = None, folder: int | None = None) -> str:
    """A whole file of UTF-8; limit: bytes, ``limits.most_text()`` unless given."""
    try:
        return read_bytes(path, most_text() if limit is None else limit, folder).decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(f"{os.fspath(path)}: is no UTF-8 text") from None


def parse_json(text: str | bytes) -> object:
    """The value of a JSON text; ValueError for anything else, for NaN and Infinity, and for nesting without end."""

    def no_constant(name: str):
        raise Refused(f"{name} is not a number")

    try:
        return json.loads(text, parse_constant=no_constant)
    except RecursionError:
        raise Refused("it nests too deep") from None


def parse_yaml(text: str, tags: Iterable[str] = ()) -> object:
    """The value of a YAML text: plain data, no aliases, which can nest. tags: those to be read as a mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise Refused("it uses YAML aliases, which a configuration does not need")
            return super().compose_node(parent, index)

    for tag in tags:
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    if len(text) > MAX_YAML:
        raise Refused(f"it is too long for a configuration: {len(text)} characters, at most {MAX_YAML}")
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise Refused("it nests too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise Refused(f"it is not YAML{line}: {short(getattr(error, 'problem', None) or error)}") from None
    except (TypeError, AttributeError, OverflowError, KeyError, IndexError) as error:  # a list as a key, a bad date, …
        raise Refused(f"it is not YAML: {short(error)}") from None


def read_gzipped(path: str | os.PathLike) -> bytes:
    """A whole file, unpacked if its name ends in .gz, to no more than ``limits.most_bytes``."""
    content = read_bytes(path)
    if Path(path).suffix != ".gz":
        return content
    most, parts, total = most_bytes(len(content)), [], 0
    with damage(path, "gzip file"), gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        while part := file.read(1 << 20):
            total += len(part)
            if total > most:
                raise Refused(f"it unpacks to more than {size(most)} from {size(len(content))}: {remedy(2 * most)}")
            parts.append(part)
    return b"".join(parts)


@contextmanager
def open_zip(file: BinaryIO, name: object) -> Iterator[ZipFile]:
    """A zip archive to read from, one entry a name, that unpacks to no more than ``limits.most_bytes``."""
    with damage(name, "zip archive"):
        held = file.seek(0, io.SEEK_END)
        with ZipFile(file) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) != len(entries):
                raise Refused("it has two entries of one name")
            check_need(sum(entry.file_size for entry in entries), held, "its content")
            yield archive


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, column-major?, dtype) of the .npy that ``file`` begins with; ValueError."""
    with damage("", ".npy file"):
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if reader is None:
            raise Refused(f".npy format {version} is not supported")
        shape, fortran, dtype = reader(file)
        if dtype.hasobject or dtype.itemsize == 0:
            raise Refused(f"it holds {'Python objects' if dtype.hasobject else dtype}, no numbers")
        if len(shape) > MAX_DIMS or any(n < 0 for n in shape):
            raise Refused(f"its shape is {short(shape)}")
    return shape, fortran, dtype


def map_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of a .npy file, read-only, left on the disk."""
    with open_file(path) as file, damage(path, ".npy file"):
        shape, fortran, dtype = npy_header(file)
        start, held = file.tell(), os.fstat(file.fileno()).st_size
        needed = dtype.itemsize * int(np.prod(shape, dtype=object))
        if needed > held - start:
            raise Refused(f"its shape {list(shape)} takes {needed} bytes, and {held - start} are there")
        if needed == 0:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")


def parse_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz in memory, by name; ValueError."""
    arrays = {}
    with open_zip(io.BytesIO(content), "") as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                shape, fortran, dtype = npy_header(file)
                check_need(dtype.itemsize * int(np.prod(shape, dtype=object)), len(content), entry.filename)
                flat = np.frombuffer(file.read(), dtype)
            arrays[entry.filename.removesuffix(".npy")] = flat.reshape(shape, order="F" if fortran else "C")
    return arrays


def parse_tar(content: bytes) -> dict[str, bytes]:
    """The files of an uncompressed tar in memory, by name. Links, devices and sparse files are refused."""
    with damage("", "tar archive"), tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        files = {}
        for member in tar:
            if not member.isreg() or member.issparse() or member.size > len(content):
                raise Refused(f"{member.name!r} is no plain file")
            files[member.name] = tar.extractfile(member).read()
        return files


@contextmanager
def open_safetensors(path: str | os.PathLike, framework: str) -> Iterator:
    """``safetensors.safe_open`` of a regular file whose header is no longer than a text may be."""
    from safetensors import SafetensorError, safe_open

    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        held = os.fstat(file.fileno()).st_size
    if length > held - 8 or length > most_text():
        raise Refused(f"{os.fspath(path)} is damaged or no .safetensors file: its header has {length} bytes")
    try:
        with safe_open(path, framework) as opened:
            yield opened
    except SafetensorError as error:
        raise Refused(f"{os.fspath(path)} is damaged or no .safetensors file: {short(error)}") from None


@contextmanager
def damage(name: object, kind: str) -> Iterator[None]:
    """What libraries raise on damaged input, as a ValueError that names the file (where ``name`` is not empty)."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.filename is not None:  # the disk's answer, not the content's
            raise
        text, name = str(error), os.fspath(name) if isinstance(name, os.PathLike) else str(name)
        if isinstance(error, Refused):
            raise Refused(text if not name or text.startswith(name) else f"{name}: {text}") from None
        raise Refused(f"{name} is damaged or no {kind}: {short(error)}".lstrip()) from None


def short(error: object) -> str:
    """An error in one short line."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 160 else f"{text[:157]}…") or type(error).__name__
