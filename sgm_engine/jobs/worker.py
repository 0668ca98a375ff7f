"""Which share of the shards is this process's. No worker talks to another: shares are fixed by numbers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

KUBERNETES, COMPLETIONS = "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"  # the second is set by examples/kubernetes.yaml


@dataclass(frozen=True)
class Worker:
    """Worker ``index`` of ``count``: shards index, index + count, index + 2·count, …"""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"worker {self.index} of {self.count}: the index counts from 0 and stays below the count")

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"

    def share(self, shards: int) -> range:
        return range(self.index, shards, self.count)

    @classmethod
    def parse(cls, text: str) -> Worker:
        """ "1/4" is the second of four."""
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal():
            raise ValueError(f"worker must be INDEX/COUNT, such as 0/4, got {text!r}")
        return cls(int(index), int(count))

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Worker:
        """From torchrun's RANK and WORLD_SIZE, the task of a Slurm array or Kubernetes Job, or both: an array of
        torchruns. Else 0 of 1."""
        whole = cls()
        task = _slurm(env) if "SLURM_ARRAY_TASK_ID" in env else _kubernetes(env) if KUBERNETES in env else whole
        rank = cls(_int(env, "RANK"), _int(env, "WORLD_SIZE")) if "RANK" in env and "WORLD_SIZE" in env else whole
        return cls(task.index * rank.count + rank.index, task.count * rank.count)


def _kubernetes(env: Mapping[str, str]) -> Worker:
    """Kubernetes tells a pod its index alone: how many there are is for the Job's manifest to say."""
    return Worker(_int(env, KUBERNETES), _int(env, COMPLETIONS))


def _slurm(env: Mapping[str, str]) -> Worker:
    """--array=MIN-MAX or MIN-MAX:STEP; a list with gaps does not say which place a task has in it."""
    task, count = _int(env, "SLURM_ARRAY_TASK_ID"), _int(env, "SLURM_ARRAY_TASK_COUNT")
    first = _int(env, "SLURM_ARRAY_TASK_MIN")
    last = _int(env, "SLURM_ARRAY_TASK_MAX") if "SLURM_ARRAY_TASK_MAX" in env else first + count - 1
    step = (last - first) // (count - 1) if count > 1 else 1
    index = (task - first) // step if step else -1
    if step < 1 or first + step * (count - 1) != last or first + step * index != task:
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID={task} of {count} tasks from {first} to {last}: tasks must be evenly spaced, as in "
            "--array=0-7; or pass --worker INDEX/COUNT"
        )
    return Worker(index, count)


def _int(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be an integer, got {env.get(name)!r}; or pass --worker INDEX/COUNT") from None
