"""Damage: bytes of any file, and what lies inside the layers (zip, gzip, JSON headers, PNG chunks) that hide it."""

from __future__ import annotations

import gzip
import io
import re
import struct
import zipfile
import zlib

import numpy as np

INTEGERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**48,
    2**63 - 1,
    2**64 - 1,
)
WORDS = (
    *(b"-1", b"0", b"1e200", b"1e-400", b"99999999999999999999999", b"NaN", b"true", b"null", b"[]", b"{}", b'""'),
    *(b'"\\u001b[2J"', b"[[[[[[[[[[", b"&a *a", b"2147483648", b"600000000", b"1.5", b"'x'", b"-9223372036854775808"),
)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A few mutations of a file: of its bytes, or of what a layer of it holds."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        inside = _LAYERS[int(rng.integers(len(_LAYERS)))] if rng.random() < 0.5 else None
        try:
            content = inside(content, rng) if inside else _bytes(content, rng)
        except (ValueError, KeyError, IndexError, OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error,
                NotImplementedError, RuntimeError):  # fmt: skip
            content = _bytes(content, rng)  # not of that kind, or no more
    return content


def _bytes(content: bytes, rng: np.random.Generator) -> bytes:
    data, n = bytearray(content), len(content)
    if n == 0:
        return bytes(rng.integers(0, 256, 8, dtype=np.uint8))
    start = int(rng.integers(n))
    stop = min(n, start + int(rng.integers(1, max(2, min(n, 64)))))
    kind = int(rng.integers(9))
    if kind == 0:
        data[start] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[start:stop] = rng.integers(0, 256, stop - start, dtype=np.uint8).tobytes()
    elif kind == 2:
        width, order = int(rng.choice([1, 2, 4, 8])), str(rng.choice(["little", "big"]))
        value = INTEGERS[int(rng.integers(len(INTEGERS)))] % 2 ** (8 * width)
        data[start : start + width] = value.to_bytes(width, order)
    elif kind == 3:
        del data[start:]
    elif kind == 4:
        del data[start:stop]
    elif kind == 5:
        data[start:start] = data[start:stop] * int(rng.choice([1, 2, 50]))
    elif kind == 6:
        other = int(rng.integers(n))
        data[start:stop] = data[other : other + stop - start]
    else:
        return _text(content, rng)
    return bytes(data)


def _text(content: bytes, rng: np.random.Generator) -> bytes:
    """A number or a word of a text replaced."""
    tokens = [*re.finditer(rb"-?\d+\.?\d*(e-?\d+)?|\"[^\"]{0,40}\"|\w+", content[: 1 << 16])]
    if not tokens:
        return content[:-1]
    token = tokens[int(rng.integers(len(tokens)))]
    return content[: token.start()] + WORDS[int(rng.integers(len(WORDS)))] + content[token.end() :]


def _in_zip(content: bytes, rng: np.random.Generator) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {e.filename: (archive.read(e), e.compress_type) for e in archive.infolist()}
    name = sorted(entries)[int(rng.integers(len(entries)))]
    programs = [n for n in entries if n.endswith(".pkl")]
    name = programs[0] if programs and rng.random() < 0.7 else name
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for other, (inner, kind) in entries.items():
            archive.writestr(other, _bytes(inner, rng) if other == name else inner, kind)
    return file.getvalue()


def _in_gzip(content: bytes, rng: np.random.Generator) -> bytes:
    return gzip.compress(_bytes(gzip.decompress(content), rng), 1)


def _in_header(content: bytes, rng: np.random.Generator) -> bytes:
    """The JSON of a .safetensors."""
    length = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{" or length > len(content) - 8:
        raise ValueError("no header")
    header = _text(content[8 : 8 + length], rng) if rng.random() < 0.7 else _bytes(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _in_chunk(content: bytes, rng: np.random.Generator) -> bytes:
    """A chunk of a PNG, with its checksum put right."""
    if content[:4] != b"\x89PNG":
        raise ValueError("no PNG")
    parts, position = [], 8
    while position < len(content):
        (length,) = struct.unpack_from(">I", content, position)
        parts.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + length]))
        position += 12 + length
    i = int(rng.integers(len(parts)))
    parts[i] = parts[i][0], _bytes(parts[i][1], rng)
    packed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts)
    return content[:8] + b"".join(packed)


_LAYERS = (_in_zip, _in_gzip, _in_header, _in_chunk, _text)
