"""The folder of a job. What has a final name is complete, checked against its digest, and on the disk.

run.json             what the job is (spec.py)
README.md            a model card to fill in
shard-000000.npz …   the samples (formats.py)
manifest/000000.json the record of shard 0, written after its files: run hash, ids, digests, diverged samples
.sgm/                locks, and files that are being written
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sgm_engine.errors import Divergence
from sgm_engine.files.held import HeldFolder
from sgm_engine.files.limits import most_text
from sgm_engine.files.reading import short
from sgm_engine.jobs.card import model_card
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.lock import Held, alone, locked
from sgm_engine.jobs.record import Record, parse_record, record_name, record_text, sha256
from sgm_engine.jobs.spec import JobError, JobSpec, ShardError
from sgm_engine.jobs.worker import Worker

RUN, CARD, MANIFEST, WORK = "run.json", "README.md", "manifest", ".sgm"
MANY = 1 << 20  # ids of one shard that are compared with its files' sizes before they are listed


class Folder:
    """All that is in it is reached by descriptors, and links in it are refused: JobError."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser()
        self._held: Held | None = None

    def load(self) -> tuple[JobSpec, dict[str, Any]]:
        """The job that lies here and the notes of its run.json. JobError: none, or a damaged one."""
        try:
            return JobSpec.from_json(self._top().read(RUN, most_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise JobError(f"{self.path} holds no job: there is no {RUN}") from None
        except ValueError as error:
            raise JobError(f"{self.path}/{RUN}: {error}") from None
        except OSError as error:
            raise _no_link(error) from None

    def begun(self) -> bool:
        """Whether there is a run.json, good or bad."""
        return (self.path / RUN).is_file()

    def check(self, spec: JobSpec) -> JobSpec:
        """The job to run: ``spec``, which knows what it has grown from. JobError unless this is a place for it: no
        folder yet, an empty one, or one with this very job or the first ids of it."""
        if self.path.exists():
            if not self.path.is_dir():
                raise JobError(f"{self.path} is a file: name a folder")
            top = self._top()
            if top.has(RUN):
                grown = self._grown(spec)
                self.recorded(spec)  # a folder that cannot be listed is named before anything is drawn
                return grown
            self._check_new(top.names())
        elif not self.path.parent.is_dir():
            raise JobError(f"cannot write {self.path}: there is no folder {self.path.parent}")
        return spec

    def _grown(self, spec: JobSpec) -> JobSpec:
        """``spec`` as the job that lies here, with further ids or without; JobError if it is another."""
        then, _ = self.load()
        if (grown := then.grown(spec)) is None:
            what = f"{self.path} holds another job: {then.changes(spec)}"
            raise JobError(f"{what}. Ask for the same, or name another folder")
        return grown

    def _check_new(self, names: Iterable[str]) -> None:
        others = set(names) - {WORK}
        if others and RUN not in others:  # it may have appeared just now
            raise JobError(f"output folder {self.path} is not empty and holds no job: name a new one")

    @contextmanager
    def writing(self, spec: JobSpec, worker: Worker, notes: Mapping[str, Any], card: str) -> Iterator[None]:
        """Hold the share of ``worker``: JobBusy if somebody else does. The job's own files are there inside."""
        self.check(spec)
        self.path.mkdir(exist_ok=True)
        try:
            top = self._top()
            work = top.folder(WORK, create=True)
            tmp, locks = work.folder("tmp", create=True), work.folder("locks", create=True)
            with locked(self.path, locks, worker) as lock:
                for name in tmp.names():  # of a process that was killed: nobody else has this share now
                    owner = name.split(".")[0]
                    if owner == str(worker) or not owner.endswith(f"-of-{worker.count}"):
                        tmp.remove(name)
                self._held = Held(top, work, tmp, worker, lock)
                self._create(RUN, spec.to_json(notes).encode())  # before all else: it makes this folder a job's
                self._grow(spec, notes)  # another worker may have been first, with another job
                self._create(CARD, card.encode())
                self._held = self._held._replace(manifest=top.folder(MANIFEST, create=True))
                top.flush()
                _flush(self.path.parent)
                yield
        except OSError as error:
            raise _no_link(error) from None
        finally:
            self._held = None

    def _grow(self, spec: JobSpec, notes: Mapping[str, Any]) -> None:
        """run.json of ``spec`` in the place of one with fewer ids. A card that nobody has filled in is written anew."""
        with alone(self._held.work, "create"):
            then, before = self.load()
            if then == self.check(spec):
                return
            top, card = self._held.top, model_card(then, before).encode()
            same = top.has(CARD) and top.read(CARD, most_text()) == card
            files = {RUN: spec.to_json(notes).encode()} | ({CARD: model_card(spec, notes).encode()} if same else {})
            self._write(top, files)

    def publish(self, spec: JobSpec, shard: int, files: Mapping[str, bytes], diverged: Iterable[Divergence]) -> None:
        """Files first, then the record that vouches for them: a kill in between costs a shard, never a lie."""
        record = record_text(spec, shard, files, diverged)
        self._write(self._held.top, files)
        self._write(self._held.manifest, {record_name(shard): record})

    def recorded(self, spec: JobSpec) -> set[int]:
        """The shards that have a record, good or bad: a listing, nothing is read."""
        found = {int(name[:-5]) for name in self._records() if name.endswith(".json") and name[:-5].isdecimal()}
        return {shard for shard in found if shard < spec.shards}

    def lost(self, spec: JobSpec, shards: Iterable[int]) -> list[int]:
        """Those of ``shards`` without a record or one of its files: only names are looked at."""
        recorded, has, form = self.recorded(spec), self._finder(), FORMATS[spec.format]

        def whole(shard: int) -> bool:
            if all(map(has, form.names(shard, spec.shard_ids(shard)))):
                return True
            try:
                return all(map(has, self.record(spec, shard).files))  # samples that diverged have no file
            except ShardError:
                return False

        return [shard for shard in shards if shard not in recorded or not whole(shard)]

    def read_only(self) -> bool:
        """Whether it is there, and nothing can be written in it."""
        return self.path.is_dir() and not os.access(self.path, os.W_OK)

    def record(self, spec: JobSpec, shard: int) -> Record:
        """What was written of a shard; ShardError if there is no record, or none of this shard of this job."""
        name, all_ids = f"{MANIFEST}/{record_name(shard)}", spec.shard_ids(shard)
        try:
            text = self._manifest().read(record_name(shard), most_text())
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(shard, "missing", f"{name} is not there") from None
        except OSError as error:
            raise _of_shard(error, shard, name) from None
        except ValueError:  # a FIFO, a device, or longer than any text
            raise ShardError(shard, "corrupt", f"{name} is no record") from None
        diverged, files = parse_record(spec, shard, name, text)
        if len(all_ids) > MANY and len(all_ids) - len(diverged) > sum(map(self._top().size, files)):
            raise ShardError(shard, "corrupt", f"its files have fewer bytes than {name} has ids")
        bad = {d.sample_id for d in diverged}
        ids = [i for i in all_ids if i not in bad]
        if list(files) != FORMATS[spec.format].names(shard, ids):
            raise ShardError(shard, "corrupt", f"{name} names other files than its ids have")
        return Record(ids, diverged, files)

    def read(self, spec: JobSpec, shard: int) -> tuple[Record, np.ndarray]:
        """A shard's record and samples. ShardError unless the files are, byte for byte, those that were written."""
        record = self.record(spec, shard)
        c, h, w = spec.shape
        most = (1 << 20) + len(record.ids) * (8 * c * h * w + 4096)  # whatever the format
        contents = {name: self._read_file(shard, name, most, *digest) for name, digest in record.files.items()}
        try:
            ids, samples = FORMATS[spec.format].decode(contents)
        except Exception as error:  # every library has its own; the digests were right, so somebody made them so
            raise ShardError(shard, "foreign", f"its files are no {spec.format}: {short(error)}") from None
        shape, dtype = ((c, h, w), np.float32) if FORMATS[spec.format].lossless else ((h, w, c), np.uint8)
        if ids.tolist() != record.ids or (record.ids and (samples.shape, samples.dtype) != ((len(ids), *shape), dtype)):
            raise ShardError(shard, "foreign", f"it holds other samples than {spec.shard_ids(shard)}")
        return record, samples

    def _read_file(self, shard: int, name: str, most: int, size: int, digest: str) -> bytes:
        try:
            content = self._top().read(name, most)
        except FileNotFoundError:
            raise ShardError(shard, "missing", f"{name} is not there") from None
        except OSError as error:
            raise _of_shard(error, shard, name) from None
        except ValueError as error:  # a FIFO, a device, or longer than its samples can be
            raise ShardError(shard, "foreign", str(error)) from None
        if len(content) != size:
            raise ShardError(shard, "corrupt", f"{name} has {len(content)} bytes, its record says {size}")
        if sha256(content) != digest:
            raise ShardError(shard, "corrupt", f"the sha256 of {name} is not that of its record")
        return content

    def unexpected(self, spec: JobSpec) -> list[str]:
        """Names in the folder that are no part of the job. Files of a shard that was cut off are part of it."""
        form, known = FORMATS[spec.format], {RUN, CARD, MANIFEST, WORK}
        known_records = {record_name(shard) for shard in self.recorded(spec)}
        strangers = [f"{MANIFEST}/{name}" for name in self._records() if name not in known_records]
        names = (name for name in self._top().names() if name not in known)
        return sorted(strangers + [name for name in names if not form.owns(name, spec.shards, spec.ids)])

    def _top(self) -> HeldFolder:
        return self._held.top if self._held else HeldFolder(self.path)

    def _finder(self) -> Callable[[str], bool]:
        """What says whether a file is there, asked many times."""
        return self._top().has

    def _manifest(self) -> HeldFolder:
        return self._top().folder(MANIFEST)

    def _records(self) -> list[str]:
        """The names in the manifest; none where there is no manifest."""
        try:
            return self._manifest().names()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _no_link(error) from None

    def _create(self, name: str, content: bytes) -> None:
        """Write a file that is not there yet, whoever else tries the same."""
        top, work, tmp = self._held[:3]
        if not top.has(name):
            with self._staged({name: content}) as (new,):
                tmp.link_new(new, top, name, lambda: alone(work, "create"))
                top.flush()

    def _write(self, folder: HeldFolder, files: Mapping[str, bytes]) -> None:
        with self._staged(files) as staged:
            for tmp, name in zip(staged, files, strict=True):
                self._held.tmp.move(tmp, folder, name)
            folder.flush()

    @contextmanager
    def _staged(self, files: Mapping[str, bytes]) -> Iterator[list[str]]:
        """The contents in temporary files, on the disk; what is not renamed inside is removed at the end."""
        held = self._held
        staged = [f"{held.worker}.{secrets.token_hex(8)}" for _ in files]
        try:
            self._check_held()
            held.tmp.write(dict(zip(staged, files.values(), strict=True)))
            self._check_held()  # this process may have been stopped meanwhile
            yield staged
        finally:
            for tmp in staged:
                held.tmp.remove(tmp)

    def _check_held(self) -> None:
        """JobError unless the lock at the job's path is still the one that this process holds."""
        if self._held.lock.closed:
            raise JobError(f"this process was forked from the one that writes in {self.path}: write there, not here")
        try:
            there = os.stat(self.path / WORK / "locks" / str(self._held.worker), follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self._held.lock.fileno())):
            raise JobError(f"{self.path} was removed or replaced while this job wrote in it: nothing more is written")


def _no_link(error: OSError) -> Exception:
    """A JobError where a link is in the way; the error itself otherwise."""
    return JobError(f"{error.filename} {error.strerror}") if error.errno == errno.ELOOP else error


def _of_shard(error: OSError, shard: int, name: str) -> Exception:
    return ShardError(shard, "foreign", f"{name} {error.strerror}") if error.errno == errno.ELOOP else error


def _flush(folder: Path) -> None:
    HeldFolder(folder).flush()
