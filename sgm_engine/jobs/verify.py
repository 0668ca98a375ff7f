"""``sgm verify``: every shard of a job against its record."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from sgm_engine.errors import Divergence
from sgm_engine.jobs.bucket import open_folder
from sgm_engine.jobs.folder import MANIFEST, ShardError
from sgm_engine.jobs.spec import JobSpec


@dataclass
class Verification:
    """samples: in good shards. unexpected: names in the folder that are no part of the job."""

    spec: JobSpec
    good: int = 0  # shards
    samples: int = 0
    problems: list[ShardError] = field(default_factory=list)
    diverged: list[Divergence] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Every sample of the job is there as it was drawn, or recorded as diverged, and nothing else is there."""
        return not self.problems and not self.unexpected

    def __str__(self) -> str:
        kinds = ["missing", "corrupt", "foreign"] + ["outgrown"] * any(p.kind == "outgrown" for p in self.problems)
        counts = [f"{sum(p.count for p in self.problems if p.kind == kind)} {kind}" for kind in kinds]
        counts += [f"{len(self.unexpected)} unexpected", f"{len(self.diverged)} diverged"]
        return (
            f"{self.samples} of {len(self.spec.ids)} samples in {self.good} of {self.spec.shards} shards are good; "
            + ", ".join(counts)
        )


def verify(path: str | os.PathLike) -> Verification:
    """Reads the whole folder, one shard in memory at a time. JobError if it holds no job."""
    folder = open_folder(path)
    spec, _ = folder.load()
    found = Verification(spec)
    after = 0  # the shard behind the last one that has a record
    for shard in sorted(folder.recorded(spec)):
        found.problems += _without_record(after, shard)
        after = shard + 1
        try:
            record, _ = folder.read(spec, shard)
        except ShardError as error:
            found.problems.append(error)
            continue
        found.good += 1
        found.samples += len(record.ids)
        found.diverged += record.diverged
    found.problems += _without_record(after, spec.shards)
    found.unexpected = folder.unexpected(spec)
    return found


def _without_record(first: int, stop: int) -> list[ShardError]:
    """One problem for all shards in a row: a run.json may ask for more of them than there are bytes anywhere."""
    if first >= stop:
        return []
    names = f"{MANIFEST}/{first:06d}.json" + (f" to {stop - 1:06d}.json" if stop - first > 1 else "")
    there = "is not there" if stop - first == 1 else "are not there"
    return [ShardError(first, "missing", f"{names} {there}", stop - first)]
