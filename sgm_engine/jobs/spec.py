"""What a job is: all that decides a byte of its shards, and the hash of it. Where and by whom it runs is not here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sgm_engine
from sgm_engine.files.reading import parse_json
from sgm_engine.outputs.images import UNIT, Range, check_range
from sgm_engine.outputs.sample_ids import SampleIds
from sgm_engine.plans.plan import Plan

if TYPE_CHECKING:
    from sgm_engine.engine.engine import Engine

FORMAT, VERSION = "sgm-job", 1
FORMATS = ("png", "npz", "safetensors", "webdataset")  # of shards: formats.py
SHARD_SIZE = 256


class JobError(ValueError):
    """A folder that is not what it should be: another job's, no job's, damaged. One line, with the remedy."""


class ShardError(JobError):
    """What is wrong with a shard, or with ``count`` shards from that on. kind: "missing", "corrupt", "foreign" (it
    belongs to another job or place) or "outgrown" (the job got more ids)."""

    def __init__(self, shard: int, kind: str, why: str, count: int = 1):
        which = f"shard {shard} is" if count == 1 else f"shards {shard} to {shard + count - 1} are"
        super().__init__(f"{which} {kind}: {why}")
        self.shard, self.kind, self.why, self.count = shard, kind, why, count


@dataclass(frozen=True)
class Geometry:
    """How samples are computed, as far as their bits depend on it. Thread counts are not here: they change nothing."""

    precision: str
    executor: str
    batch: int
    device: str  # "cpu avx512_bf16", "cuda NVIDIA H100"
    torch: str

    @classmethod
    def of(cls, engine: Engine) -> Geometry:
        import torch

        if engine.device.type == "cuda":
            processor = torch.cuda.get_device_name(engine.device)
        else:
            from sgm_engine import _C

            processor = _C.isa()
        device = f"{engine.device.type} {processor}"
        return cls(engine.numerics, engine.executor, engine.batch, device, torch.__version__)


@dataclass(frozen=True)
class JobSpec:
    """weights: sha256 of the network's parameters. shape: (C, H, W). seed: uint64. ids: in the order of the shards.

    model: whatever else of the model decides its samples, by where it is found (settings.py).
    data_range: (low, high) of the samples, which their 8 bits are made of.
    shard_size: sample ids a shard, the last one may have fewer. Shard k holds ids[k·shard_size : (k+1)·shard_size].
    earlier: the ids of this job before it grew, as text; shards of then that are whole are still its own.
    """

    weights: str
    plan: Plan
    seed: int
    ids: SampleIds
    shape: tuple[int, int, int]
    format: str
    shard_size: int
    geometry: Geometry
    model: Mapping[str, str] = field(default_factory=dict)
    engine: str = sgm_engine.__version__
    data_range: Range = UNIT
    earlier: tuple[str, ...] = ()

    @property
    def shards(self) -> int:
        return -(-len(self.ids) // self.shard_size)

    def shard_ids(self, shard: int) -> SampleIds:
        return self.ids[shard * self.shard_size : (shard + 1) * self.shard_size]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What two runs must share for their shards to belong together, as JSON values, from the cause to the form."""
        return {
            "weights": self.weights,
            **({"model": dict(self.model)} if self.model else {}),
            "plan": self.plan.digest,
            "seed": str(self.seed),  # JSON readers keep 53 bits of a number
            "ids": str(self.ids),
            "shape": list(self.shape),
            **({} if self.data_range == UNIT else {"data_range": list(self.data_range)}),
            **vars(self.geometry),
            "engine": self.engine,
            "format": self.format,
            "shard_size": self.shard_size,
        }

    @cached_property
    def run(self) -> str:
        """The run hash: sha256 of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def runs(self) -> frozenset[str]:
        """The run hashes that a record of this job may have."""
        before = (replace(self, ids=SampleIds.parse(text), earlier=()).run for text in self.earlier)
        return frozenset({self.run, *before})

    def grown(self, now: JobSpec) -> JobSpec | None:
        """``now`` as this job with further ids behind its own; None if it is another."""
        if self.changes(now, ignore=("ids",)) or now.ids[: len(self.ids)] != self.ids:
            return None
        more = (str(self.ids),) if len(now.ids) > len(self.ids) else ()
        return replace(now, earlier=(*self.earlier, *more))

    def changes(self, now: JobSpec, ignore: tuple[str, ...] = ()) -> str:
        """What differs in ``now``, in words; empty if nothing does."""
        return changed(*({k: v for k, v in spec._flat.items() if k not in ignore} for spec in (self, now)))

    @property
    def _flat(self) -> dict[str, Any]:
        """The identity, each setting of the model by itself, whatever its name."""
        rest = {k: v for k, v in self.identity.items() if k not in ("weights", "model")}
        return {"weights": self.weights} | {f"the model's {name}": text for name, text in self.model.items()} | rest

    def to_json(self, notes: Mapping[str, Any]) -> str:
        """The text of run.json. notes: kept there, no part of the identity."""
        content = {"format": FORMAT, "version": VERSION, "run": self.run, "samples": len(self.ids)}
        content |= {"shards": self.shards, "job": self.identity, "notes": dict(notes)}
        content |= {"earlier": list(self.earlier)} if self.earlier else {}
        return json.dumps(content | {"plan": json.loads(self.plan.to_json())}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> tuple[JobSpec, dict[str, Any]]:
        """The spec and the notes of a run.json. ValueError: not one, or changed by hand."""
        try:
            content = parse_json(text)
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"it is {content['format']!r} version {content['version']!r}, not {FORMAT} {VERSION}")
            notes = _checked(content)
            job, plan = content["job"], Plan.from_json(json.dumps(content["plan"]))
            geometry = Geometry(**{name: job[name] for name in Geometry.__dataclass_fields__})
            own = {name: job[name] for name in ("weights", "format", "shard_size", "engine")}
            ids, shape = SampleIds.parse(job["ids"]), tuple(job["shape"])
            own["earlier"] = tuple(content.get("earlier", ()))
            own |= {"model": job.get("model", {}), "data_range": check_range(job.get("data_range", UNIT))}
            spec = cls(plan=plan, seed=int(job["seed"]), ids=ids, shape=shape, geometry=geometry, **own)
            whole = all(spec.ids[: len(ids)] == ids for ids in map(SampleIds.parse, spec.earlier))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a job's run.json: {type(error).__name__}: {error}") from None
        if spec.identity != job or spec.run != content.get("run") or not whole:
            raise ValueError("its run hash does not fit its content: it was changed or damaged")
        return spec, notes


def _checked(content: Mapping[str, Any]) -> dict[str, Any]:
    """The notes of a run.json; ValueError names what in it no job has."""
    job, notes = content["job"], content["notes"]
    for name in ("weights", "precision", "executor", "device", "torch", "engine", "format"):
        if not isinstance(job[name], str) or not job[name].strip() or not job[name].isprintable():
            raise ValueError(f"{name} must be a text, got {job[name]!r:.60}")
    if job["format"] not in FORMATS or job["device"].partition(" ")[0] not in ("cpu", "cuda"):
        raise ValueError(f"no job has format {job['format']!r:.60} and device {job['device']!r:.60}")
    shape = job["shape"] if isinstance(job["shape"], list) else []
    for name, value in (("batch", job["batch"]), ("shard_size", job["shard_size"]), *(("shape", n) for n in shape)):
        if type(value) is not int or not 1 <= value < 2**56:
            raise ValueError(f"{name} must be a positive integer, got {value!r:.60}")
    if len(shape) != 3:
        raise ValueError(f"shape must be [C, H, W], got {job['shape']!r:.60}")
    texts = {"ids": job["ids"], "seed": job["seed"]} | dict(job.get("model", {}))
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise ValueError(f"{wrong[0]} must be a text, got {texts[wrong[0]]!r:.60}")
    known = {"checkpoint": (str, type(None)), "config": (str, type(None)), "float8": str}
    if not isinstance(notes, dict) or any(not isinstance(notes[k], t) for k, t in known.items() if k in notes):
        raise ValueError("notes must be an object whose checkpoint, config and float8 are texts")
    return notes


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two dictionaries, in words."""
    names = [name for name in before | now if before.get(name) != now.get(name)]
    said = (f"{name} was {_short(before.get(name))} and is now {_short(now.get(name))}" for name in names)
    return ", ".join(said)


def _short(value: object) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:16]}…"
