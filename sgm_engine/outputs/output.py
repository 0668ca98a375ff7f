"""Samples in one file. It appears under its final name complete, or not at all.

A file is written beside its target, flushed to the disk and renamed over it. What the name ends in decides the form
(bytes are of the data range of the samples, [0, 1] unless it is given; a .safetensors file of another names it):

    x.png           one grid
    x.npz           `arr_0` uint8 [N, H, W, C], what FID tools read, and `sample_id` int64 [N]
    x.safetensors   `samples` float32 [N, C, H, W], neither clamped nor rounded, and `sample_id` int64 [N]
    x/              a folder of shards: jobs/

A Stream has the content of one of the first three on standard output.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgm_engine.files.storage import is_url
from sgm_engine.files.writing import check_writable, write_file
from sgm_engine.outputs import images

_FORMS = {".png": "grid", ".npz": "npz", ".safetensors": "safetensors"}


def is_folder(text: str) -> bool:
    """A trailing slash or an existing folder means a folder whatever its name, and so does a name without a suffix."""
    path = Path(text).expanduser()
    return text.endswith(("/", os.sep)) or path.is_dir() or not path.suffix


@dataclass(frozen=True)
class Output:
    """A file that samples will be written to, and the form they take there."""

    path: Path
    form: str

    @classmethod
    def parse(cls, text: str) -> Output:
        path = Path(text).expanduser()
        if is_url(text):
            raise ValueError(f"cannot write {text}: object storage takes a folder of shards, and what sgm merge writes")
        if is_folder(text) or path.suffix.lower() not in _FORMS:
            raise ValueError(
                f"cannot tell what to write from {text!r}: use .png (one grid), .npz (uint8), .safetensors (float) "
                "or a folder name ending in / (shards)"
            )
        return cls(path, _FORMS[path.suffix.lower()])

    def __str__(self) -> str:
        return str(self.path)

    def check(self) -> None:
        """OSError if this cannot be written: found out before the sampling rather than after it."""
        check_writable(self.path)

    def write(
        self,
        samples: np.ndarray,
        sample_ids: Iterable[int],
        about: Mapping[str, str] | None = None,
        data_range: images.Range = images.UNIT,
    ) -> None:
        """samples [N, C, H, W] float, in the order of sample_ids [N]. about: notes kept inside a .safetensors file."""
        ids = np.fromiter(sample_ids, np.int64)
        if len(ids) != len(samples):
            raise ValueError(f"write: {len(samples)} samples came with {len(ids)} sample ids")
        self._put(_CONTENT[self.form](samples, ids, about or {}, data_range))

    def _put(self, content: bytes) -> None:
        write_file(self.path, content)


class Stream(Output):
    """Standard output, for another program to read."""

    @classmethod
    def of(cls, format: str) -> Stream:
        """format: what the name of such a file ends in."""
        if f".{format}" not in _FORMS:
            raise ValueError(f"argument --format: {format} is for a folder; --out - takes png, npz or safetensors")
        return cls(Path("-"), _FORMS[f".{format}"])

    def __str__(self) -> str:
        return "standard output"

    def check(self) -> None:
        if sys.stdout.isatty():
            raise ValueError("argument --out: - is standard output, and that is a terminal: add > FILE or | PROGRAM")

    def _put(self, content: bytes) -> None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


def npz_bytes(samples, ids: np.ndarray, data_range: images.Range = images.UNIT) -> bytes:
    """samples [N, C, H, W] of data_range, ids int64 [N] → an .npz file: arr_0 uint8 [N, H, W, C] and sample_id."""
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images.to_uint8(samples, data_range), sample_id=ids)
    return buffer.getvalue()


def safetensors_bytes(
    samples, ids: np.ndarray, about: Mapping[str, str] | None = None, data_range: images.Range = images.UNIT
) -> bytes:
    """samples [N, C, H, W], ids int64 [N] → a .safetensors file: samples float32 and sample_id, with notes."""
    from safetensors.numpy import save

    tensors = {"samples": np.ascontiguousarray(samples, np.float32), "sample_id": ids}
    notes = dict(about or {}) | range_note(data_range)
    return sorted_header(save(tensors, metadata=notes or None))


def range_note(data_range: images.Range) -> dict[str, str]:
    """What the metadata of a .safetensors file says of a data range: nothing of [0, 1]."""
    return {} if data_range == images.UNIT else {"data_range": json.dumps(data_range)}


def sorted_header(content: bytes) -> bytes:
    """A .safetensors file with its header in order: safetensors itself writes metadata in another one each time."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _grid(samples, ids: np.ndarray, about: Mapping[str, str], data_range: images.Range) -> bytes:
    return images.png_bytes(images.grid(images.to_uint8(samples, data_range)))


def _npz(samples, ids: np.ndarray, about: Mapping[str, str], data_range: images.Range) -> bytes:
    return npz_bytes(samples, ids, data_range)


_CONTENT = {"grid": _grid, "npz": _npz, "safetensors": safetensors_bytes}
