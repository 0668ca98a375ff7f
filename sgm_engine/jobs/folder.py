"""The folder of a job. What has a final name is complete, checked against its digest, and on the disk.

run.json             what the job is (spec.py)
README.md            a model card to fill in
shard-000000.npz …   the samples (formats.py)
manifest/000000.json the record of shard 0, written after its files: run hash, ids, digests, diverged samples
.sgm/                locks, and files that are being written
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sgm_engine.errors import Divergence
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.lock import locked
from sgm_engine.jobs.spec import JobError, JobSpec
from sgm_engine.jobs.worker import Worker
from sgm_engine.outputs.output import flush

RUN, CARD, MANIFEST, WORK = "run.json", "README.md", "manifest", ".sgm"


class ShardError(JobError):
    """What is wrong with a shard. kind: "missing", "corrupt" or "foreign" (it belongs to another job or place)."""

    def __init__(self, shard: int, kind: str, why: str):
        super().__init__(f"shard {shard} is {kind}: {why}")
        self.shard, self.kind, self.why = shard, kind, why


class Record(NamedTuple):
    """ids: the good ones. files: (size in bytes, sha256) by name."""

    ids: list[int]
    diverged: list[Divergence]
    files: dict[str, tuple[int, str]]


class Folder:
    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser()
        self.manifest = self.path / MANIFEST
        self._tmp, self._locks = self.path / WORK / "tmp", self.path / WORK / "locks"
        self._prefix, self._numbers = "", count()

    def load(self) -> tuple[JobSpec, dict[str, Any]]:
        """The job that lies here and the notes of its run.json. JobError: none, or a damaged one."""
        try:
            return JobSpec.from_json((self.path / RUN).read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise JobError(f"{self.path} holds no job: there is no {RUN}") from None
        except ValueError as error:
            raise JobError(f"{self.path / RUN}: {error}") from None

    def check(self, spec: JobSpec) -> None:
        """JobError unless this is a place for ``spec``: no folder yet, an empty one, or one with this very job."""
        if (self.path / RUN).exists():
            then, _ = self.load()
            if changes := then.changes(spec):
                raise JobError(f"{self.path} holds another job: {changes}. Ask for the same, or name another folder")
        elif self.path.exists():
            if not self.path.is_dir():
                raise JobError(f"{self.path} is a file: name a folder")
            others = {entry.name for entry in self.path.iterdir()} - {WORK}
            if others and RUN not in others:  # it may have appeared just now
                raise JobError(f"output folder {self.path} is not empty and holds no job: name a new one")
        elif not self.path.parent.is_dir():
            raise JobError(f"cannot write {self.path}: there is no folder {self.path.parent}")

    @contextmanager
    def writing(self, spec: JobSpec, worker: Worker, notes: Mapping[str, Any], card: str) -> Iterator[None]:
        """Hold the share of ``worker``: JobBusy if somebody else does. The job's own files are there inside."""
        self.check(spec)
        for folder in (self.path, self._tmp, self._locks):
            folder.mkdir(parents=folder is not self.path, exist_ok=True)
        with locked(self._locks, worker):
            self._prefix = f"{worker}."
            for leftover in self._tmp.iterdir():  # of a process that was killed: nobody else has this share now
                owner = leftover.name.split(".")[0]
                if owner == str(worker) or not owner.endswith(f"-of-{worker.count}"):
                    leftover.unlink(missing_ok=True)
            self._create(RUN, spec.to_json(notes).encode())  # before all else: it makes this folder a job's
            self.check(spec)  # another worker may have been first, with another job
            self._create(CARD, card.encode())
            self.manifest.mkdir(exist_ok=True)
            flush(self.path)
            flush(self.path.parent)
            yield

    def publish(self, spec: JobSpec, shard: int, files: Mapping[str, bytes], diverged: Iterable[Divergence]) -> None:
        """Files first, then the record that vouches for them: a kill in between costs a shard, never a lie."""
        digests = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
        record = {"run": spec.run, "shard": shard, "ids": str(spec.shard_ids(shard)), "files": digests}
        record["diverged"] = [d._asdict() for d in diverged]
        self._write(self.path, files)
        self._write(self.manifest, {self._record(shard).name: json.dumps(record, indent=1).encode()})

    def recorded(self, spec: JobSpec) -> set[int]:
        """The shards that have a record, good or bad: a listing, nothing is read."""
        names = [entry.name for entry in self.manifest.iterdir()] if self.manifest.is_dir() else []
        found = {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()}
        return {shard for shard in found if shard < spec.shards}

    def record(self, spec: JobSpec, shard: int) -> Record:
        """What was written of a shard; ShardError if there is no record, or none of this shard of this job."""
        path, name = self._record(shard), f"{MANIFEST}/{self._record(shard).name}"
        try:
            content, all_ids = json.loads(path.read_bytes()), spec.shard_ids(shard)
            belongs = (content["run"], content["shard"], content["ids"]) == (spec.run, shard, str(all_ids))
            diverged = [Divergence(**d) for d in content["diverged"]]
            files = {file: (digest["bytes"], digest["sha256"]) for file, digest in content["files"].items()}
        except FileNotFoundError:
            raise ShardError(shard, "missing", f"{name} is not there") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ShardError(shard, "corrupt", f"{name} is no record") from None
        if not belongs:
            raise ShardError(shard, "foreign", f"{name} is of another job or another shard")
        bad = {d.sample_id for d in diverged}
        ids = [i for i in all_ids if i not in bad]
        if list(files) != FORMATS[spec.format].names(shard, ids):
            raise ShardError(shard, "corrupt", f"{name} names other files than its ids have")
        return Record(ids, diverged, files)

    def read(self, spec: JobSpec, shard: int) -> tuple[Record, np.ndarray]:
        """A shard's record and samples. ShardError unless the files are, byte for byte, those that were written."""
        record = self.record(spec, shard)
        contents = {name: self._read_file(shard, name, *digest) for name, digest in record.files.items()}
        try:
            ids, samples = FORMATS[spec.format].decode(contents)
        except Exception as error:  # every library has its own; the digests were right, so somebody made them so
            raise ShardError(shard, "foreign", f"its files are no {spec.format}: {error}") from None
        if ids.tolist() != record.ids:
            raise ShardError(shard, "foreign", f"it holds other samples than {spec.shard_ids(shard)}")
        return record, samples

    def _read_file(self, shard: int, name: str, size: int, digest: str) -> bytes:
        try:
            content = (self.path / name).read_bytes()
        except FileNotFoundError:
            raise ShardError(shard, "missing", f"{name} is not there") from None
        if len(content) != size:
            raise ShardError(shard, "corrupt", f"{name} has {len(content)} bytes, its record says {size}")
        if _sha256(content) != digest:
            raise ShardError(shard, "corrupt", f"the sha256 of {name} is not that of its record")
        return content

    def unexpected(self, spec: JobSpec) -> list[str]:
        """Names in the folder that are no part of the job. Files of a shard that was cut off are part of it."""
        form, known = FORMATS[spec.format], {RUN, CARD, MANIFEST, WORK}
        records = {f"{shard:06d}.json" for shard in range(spec.shards)}
        strangers = [f"{MANIFEST}/{e.name}" for e in self.manifest.iterdir() if e.name not in records]
        names = (entry.name for entry in self.path.iterdir() if entry.name not in known)
        return sorted(strangers + [name for name in names if not form.owns(name, spec.shards, spec.ids)])

    def _record(self, shard: int) -> Path:
        return self.manifest / f"{shard:06d}.json"

    def _create(self, name: str, content: bytes) -> None:
        """Write a file that is not there yet, whoever else tries the same."""
        target = self.path / name
        if target.exists():
            return
        with self._staged({name: content}) as (tmp,), suppress(FileExistsError):
            os.link(tmp, target)
            flush(self.path)

    def _write(self, folder: Path, files: Mapping[str, bytes]) -> None:
        with self._staged(files) as staged:
            for tmp, name in zip(staged, files, strict=True):
                os.replace(tmp, folder / name)
            flush(folder)

    @contextmanager
    def _staged(self, files: Mapping[str, bytes]) -> Iterator[list[Path]]:
        """The contents in temporary files, on the disk; what is not renamed inside is removed at the end."""
        staged = []
        try:
            for content in files.values():
                staged.append(self._tmp / f"{self._prefix}{os.getpid()}.{next(self._numbers)}")
                staged[-1].write_bytes(content)
            for tmp in staged:
                flush(tmp)
            yield staged
        finally:
            for tmp in staged:
                tmp.unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
