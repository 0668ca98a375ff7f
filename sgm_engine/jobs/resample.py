"""``sgm resample``: one sample of a job again, by itself, with the same bytes."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
from torch import nn

import sgm_engine
from sgm_engine.engine.engine import Engine
from sgm_engine.jobs.bucket import open_folder
from sgm_engine.jobs.folder import ShardError
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.identity import ModelIdentity, identity_of, weights_digest
from sgm_engine.jobs.spec import Geometry, JobError, JobSpec
from sgm_engine.models.conditioning import at_sigmas
from sgm_engine.outputs.images import to_uint8


def resample(
    engine: Engine, path: str | os.PathLike, sample_id: int, weights: str | None = None
) -> tuple[np.ndarray, bool]:
    """(float32 [C, H, W], whether it was compared with the job's own): sample ``sample_id`` of the job in ``path``.

    engine: with the job's weights, precision, executor and batch, on its kind of device; weights: as given to the job.
    JobError: the engine is another one, the id is not the job's, or the bytes are not those in its shard. Raises
    SampleDiverged for a sample that the job has quarantined.
    """
    folder = open_folder(path)
    spec, _ = folder.load()
    if changes := _changes(spec, engine, identity_of(engine.model, weights)):
        raise JobError(f"this would not draw the samples of {folder.path}: {changes}")
    if sample_id not in spec.ids:
        raise JobError(f"sample id {sample_id} is not among the ids of {folder.path}: {spec.ids}")
    x = engine.sample(1, spec.seed, spec.plan, first_id=sample_id)[0].cpu().numpy()
    try:
        record, stored = folder.read(spec, spec.ids.index(sample_id) // spec.shard_size)
    except ShardError:
        return x, False
    mine = x if FORMATS[spec.format].lossless else to_uint8(x[None], spec.data_range)[0]
    if mine.tobytes() != stored[record.ids.index(sample_id)].tobytes():
        raise JobError(f"sample {sample_id} is not what {folder.path} holds: was the model's code changed since?")
    return x, True


def model_of(spec: JobSpec, model: nn.Module) -> nn.Module:
    """``model``, or as it is between its levels, at the plan's own sigmas: whichever the job was drawn from."""
    if weights_digest(model) == spec.weights:
        return model
    try:
        other = at_sigmas(model, spec.plan.sigmas)
    except ValueError:  # not between these levels
        return model
    return other if weights_digest(other) == spec.weights else model


def _changes(spec: JobSpec, engine: Engine, model: ModelIdentity) -> str:
    now = {"weights": model.weights, "model": model.settings, "engine": sgm_engine.__version__}
    now |= {"geometry": Geometry.of(engine), "data_range": engine.data_range}
    return spec.changes(replace(spec, **now))
