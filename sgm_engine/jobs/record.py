"""The record of a shard: which job it is of, its ids, the sha256 of its files, the samples that diverged. JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sgm_engine.errors import Divergence
from sgm_engine.files.reading import parse_json
from sgm_engine.jobs.spec import JobSpec, ShardError


class Record(NamedTuple):
    """ids: the good ones. files: (size in bytes, sha256) by name."""

    ids: list[int]
    diverged: list[Divergence]
    files: dict[str, tuple[int, str]]


def record_name(shard: int) -> str:
    return f"{shard:06d}.json"


def record_text(spec: JobSpec, shard: int, files: Mapping[str, bytes], diverged: Iterable[Divergence]) -> bytes:
    digests = {name: {"bytes": len(content), "sha256": sha256(content)} for name, content in files.items()}
    record = {"run": spec.run, "shard": shard, "ids": str(spec.shard_ids(shard)), "files": digests}
    return json.dumps(record | {"diverged": [d._asdict() for d in diverged]}, indent=1).encode()


def parse_record(spec: JobSpec, shard: int, name: str, text: bytes) -> tuple[list[Divergence], dict]:
    """(diverged, files) of the record ``name``; ShardError if it is none of this shard of this job."""
    ids = str(spec.shard_ids(shard))
    try:
        content = parse_json(text)
        belongs = content["run"] in spec.runs and content["shard"] == shard
        outgrown = belongs and content["ids"] != ids and content["run"] != spec.run
        belongs = belongs and content["ids"] == ids
        diverged = [_divergence(d) for d in content["diverged"]]
        files = {file: _digest(**digest) for file, digest in content["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ShardError(shard, "corrupt", f"{name} is no record") from None
    if outgrown:
        raise ShardError(shard, "outgrown", f"{name} is of the job before it got more ids")
    if not belongs:
        raise ShardError(shard, "foreign", f"{name} is of another job or another shard")
    return diverged, files


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _divergence(fields: dict[str, Any]) -> Divergence:
    d = Divergence(**fields)
    if any(type(v) is not int for v in d[:3]) or type(d.sigma) not in (int, float):
        raise ValueError("a divergence is three integers and a number")
    return d


def _digest(bytes: int, sha256: str) -> tuple[int, str]:
    if type(bytes) is not int or not isinstance(sha256, str):
        raise ValueError("a digest is a number of bytes and a sha256")
    return bytes, sha256
