"""A job on object storage, in the layout of folder.py; .sgm/ holds one empty object, which tried conditional puts.

There are no locks: equal jobs put equal bytes.

run.json is created only if it is absent, so the first of two jobs has the prefix. A shard is created only if it is
absent too; what is there instead is replaced only while run.json is this job's. So a writer that was stopped while its
prefix was emptied and taken by another job cannot spoil a shard of that one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from sgm_engine.errors import Divergence
from sgm_engine.files.reading import parse_json
from sgm_engine.files.storage import Prefix, is_url
from sgm_engine.jobs.folder import CARD, MANIFEST, RUN, WORK, Folder
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.record import record_name, record_text
from sgm_engine.jobs.spec import JobError, JobSpec
from sgm_engine.jobs.worker import Worker


class Bucket(Folder):
    def __init__(self, url: str):
        self._prefix = Prefix(url)
        self.path = self._prefix.path

    def begun(self) -> bool:
        return self._prefix.has(RUN)

    def check(self, spec: JobSpec) -> JobSpec:
        """As of a folder. JobError for more ids, too: nothing replaces a run.json that others read."""
        if not self.begun():
            self._check_new(self._prefix.names())
            return spec
        grown = self._grown(spec)
        if len(grown.earlier) > len(self.load()[0].earlier):
            raise JobError(
                f"{self.path} holds the first ids of this job, and a job on object storage gets no more: draw the "
                "others with --ids under another name, and merge both"
            )
        return grown

    @contextmanager
    def writing(self, spec: JobSpec, worker: Worker, notes: Mapping[str, Any], card: str) -> Iterator[None]:
        """The job's own files are there inside; nobody is kept out."""
        if not self.begun():
            self._prefix.folder(WORK).check_conditional("conditional")
            self._prefix.create(RUN, spec.to_json(notes).encode())
        self.check(spec)  # another job may have been first
        if not self._prefix.has(CARD):
            self._prefix.create(CARD, card.encode())
        yield

    def publish(self, spec: JobSpec, shard: int, files: Mapping[str, bytes], diverged: Iterable[Divergence]) -> None:
        record = record_text(spec, shard, files, diverged)
        self._check_own(spec)
        self._put(spec, self._prefix, files)
        self._put(spec, self._manifest(), {record_name(shard): record})

    def read_only(self) -> bool:
        """Nothing is written anyway where all is there."""
        return False

    def _put(self, spec: JobSpec, prefix: Prefix, files: Mapping[str, bytes]) -> None:
        for name in prefix.create_all(files):
            if prefix.size(name) != len(files[name]) or prefix.read(name) != files[name]:
                self._check_own(spec)
                prefix.write(name, files[name])

    def _check_own(self, spec: JobSpec) -> None:
        try:
            own = parse_json(self._prefix.read(RUN))["run"] == spec.run
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            own = False
        if not own:
            raise JobError(f"{self.path} was emptied or replaced while this job wrote there: nothing more is written")

    def _top(self) -> Prefix:
        return self._prefix

    def _manifest(self) -> Prefix:
        return self._prefix.folder(MANIFEST)

    def _finder(self) -> Callable[[str], bool]:
        return set(self._prefix.names()).__contains__


class ShardWriter:
    """Encodes and publishes shards where they are drawn, in another process."""

    def __init__(self, url: str, spec: JobSpec):
        self.url, self.spec = url, spec

    def __call__(
        self, shard: int, ids: np.ndarray, samples: np.ndarray, diverged: list[Divergence]
    ) -> tuple[np.ndarray, None, list[Divergence]]:
        files = FORMATS[self.spec.format].encode(shard, ids, samples, self.spec.data_range)
        Bucket(self.url).publish(self.spec, shard, files, diverged)
        return ids, None, diverged


def open_folder(path: str | os.PathLike) -> Folder:
    """The folder of a job: on a disk, or under s3://, gs:// or az://."""
    return Bucket(path) if is_url(path) else Folder(path)
