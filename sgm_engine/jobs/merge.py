"""``sgm merge``: the shards of complete jobs as one file, one shard in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from sgm_engine.files.storage import is_url, staged_object
from sgm_engine.files.writing import check_writable, new_zip, staged
from sgm_engine.jobs.bucket import open_folder
from sgm_engine.jobs.folder import Folder, ShardError
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.spec import JobError, JobSpec
from sgm_engine.outputs.images import Range, to_uint8
from sgm_engine.outputs.output import range_note
from sgm_engine.outputs.sample_ids import SampleIds

Part = tuple[Folder, JobSpec]


def merge(folders: Sequence[str | os.PathLike], out: str | os.PathLike) -> int:
    """Write the samples of ``folders`` into ``out``, in their order; returns how many there are.

    folders: complete jobs that differ in nothing but their ids (and how many make a shard). out: .npz (arr_0 uint8
    [N, H, W, C] and sample_id) or .safetensors (samples float32 [N, C, H, W] and sample_id), complete or not at all.
    JobError: incomplete, damaged, of different jobs, or without the floats that a .safetensors holds.
    """
    suffix, far = Path(out).suffix, is_url(out)
    if suffix not in _WRITERS:
        raise ValueError(f"out must end in .npz or .safetensors, got {out}")
    if not far:
        out = Path(out).expanduser()
        check_writable(out)
    parts = [(folder, folder.load()[0]) for folder in map(open_folder, folders)]
    _check_together(parts)
    spec = parts[0][1]
    if suffix == ".safetensors" and not FORMATS[spec.format].lossless:
        raise JobError(f"{parts[0][0].path} holds 8 bits a value ({spec.format}), no floats: merge it into an .npz")
    ids = np.fromiter(chain.from_iterable(_ids(*part) for part in parts), np.int64)
    with staged_object(out) if far else staged(out) as file:
        _WRITERS[suffix](file, ids, spec.shape, _samples(parts), spec.data_range)
    return len(ids)


def _check_together(parts: list[Part]) -> None:
    (first, spec), *others = parts
    for folder, other in others:
        if changes := spec.changes(other, ignore=("ids", "shard_size")):
            raise JobError(f"{first.path} and {folder.path} hold samples of different jobs: {changes}")
    try:
        SampleIds(chain.from_iterable(spec.ids.ranges for _, spec in parts))
    except ValueError as error:
        raise JobError(f"the folders overlap: {error}") from None


def _ids(folder: Folder, spec: JobSpec) -> Iterator[int]:
    """The ids that are there according to the records."""
    for shard in range(spec.shards):
        try:
            yield from folder.record(spec, shard).ids
        except ShardError as error:
            raise _unusable(folder, error) from None


def _samples(parts: list[Part]) -> Iterator[np.ndarray]:
    for folder, spec in parts:
        for shard in range(spec.shards):
            try:
                yield folder.read(spec, shard)[1]
            except ShardError as error:
                raise _unusable(folder, error) from None


def _unusable(folder: Folder, error: ShardError) -> JobError:
    return JobError(f"{folder.path}: {error}. Run its `sgm sample` again, then merge")


def _write_npz(
    file: IO[bytes], ids: np.ndarray, shape: Sequence[int], samples: Iterator[np.ndarray], data_range: Range
) -> None:
    """As np.savez writes it, to the byte."""
    c, h, w = shape
    with new_zip(file) as archive:
        with _entry(archive, "arr_0") as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(ids), h, w, c)}
            np.lib.format.write_array_header_1_0(entry, header)
            for part in samples:
                entry.write((part if part.dtype == np.uint8 else to_uint8(part, data_range)).tobytes())
        with _entry(archive, "sample_id") as entry:
            np.lib.format.write_array(entry, ids)


def _entry(archive, name: str) -> IO[bytes]:
    return archive.open(f"{name}.npy", "w", force_zip64=True)


def _write_safetensors(
    file: IO[bytes], ids: np.ndarray, shape: Sequence[int], samples: Iterator[np.ndarray], data_range: Range
) -> None:
    """As safetensors writes it, to the byte: https://huggingface.co/docs/safetensors (Format)."""
    ends = 8 * len(ids), 8 * len(ids) + 4 * len(ids) * int(np.prod(shape))
    note = range_note(data_range)
    header = ({"__metadata__": note} if note else {}) | {
        "sample_id": {"dtype": "I64", "shape": [len(ids)], "data_offsets": [0, ends[0]]},
        "samples": {"dtype": "F32", "shape": [len(ids), *shape], "data_offsets": list(ends)},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text + ids.astype("<i8").tobytes())
    for part in samples:
        file.write(part.astype("<f4", copy=False).tobytes())


_WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors}
