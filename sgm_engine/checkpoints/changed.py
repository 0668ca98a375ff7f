"""What a caller may say of a checkpoint's configuration: the class of the samples, the range of the data."""

from __future__ import annotations

import dataclasses

from sgm_engine.checkpoints.torch_file import CheckpointError
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.models.family import FamilyConfig
from sgm_engine.models.multi_sample import MultiSampleConfig


def with_class(config, class_labels: int | None, guidance: float | None):
    if not isinstance(config, (FamilyConfig, CDMConfig)):
        given = f"guidance {guidance}" if class_labels is None else f"class_labels {class_labels}"
        raise CheckpointError(f"has no classes, so {given} means nothing")
    if guidance is not None and not isinstance(config, CDMConfig):
        raise CheckpointError(f"is guided from Python, by sgm_engine.classifier_free: leave out guidance {guidance:g}")
    changes = {"class_label": class_labels, "guidance": guidance}
    try:
        return dataclasses.replace(config, **{name: v for name, v in changes.items() if v is not None})
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def with_range(config, data_range: tuple[float, float]):
    if isinstance(config, (CDMConfig, MultiSampleConfig)):
        raise CheckpointError(
            f"is a {config.architecture} of data in [0, 1], so data_range {tuple(data_range)} means nothing"
        )
    try:
        return dataclasses.replace(config, data_range=data_range)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
