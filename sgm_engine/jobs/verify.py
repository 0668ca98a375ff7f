"""``sgm verify``: every shard of a job against its record."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from sgm_engine.errors import Divergence
from sgm_engine.jobs.folder import Folder, ShardError
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
        kinds = [problem.kind for problem in self.problems]
        counts = [f"{kinds.count(kind)} {kind}" for kind in ("missing", "corrupt", "foreign")]
        counts += [f"{len(self.unexpected)} unexpected", f"{len(self.diverged)} diverged"]
        return (
            f"{self.samples} of {len(self.spec.ids)} samples in {self.good} of {self.spec.shards} shards are good; "
            + ", ".join(counts)
        )


def verify(path: str | os.PathLike) -> Verification:
    """Reads the whole folder, one shard in memory at a time. JobError if it holds no job."""
    folder = Folder(path)
    spec, _ = folder.load()
    found = Verification(spec)
    for shard in range(spec.shards):
        try:
            record, _ = folder.read(spec, shard)
        except ShardError as error:
            found.problems.append(error)
            continue
        found.good += 1
        found.samples += len(record.ids)
        found.diverged += record.diverged
    found.unexpected = folder.unexpected(spec)
    return found
