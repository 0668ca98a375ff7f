"""The config.yml of an original NCSN or NCSNv2, read without trusting it."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np

from sgm_engine.checkpoints.torch_file import CheckpointError, check_file
from sgm_engine.files.reading import MAX_YAML, parse_yaml, read_text, short


def levels_between(begin: float, end: float, levels: int, distribution: str = "geometric") -> tuple[float, ...]:
    """The originals' own sigmas, rounded to float32 as they are in their checkpoints."""
    if distribution == "geometric":
        values = np.exp(np.linspace(np.log(begin), np.log(end), levels))
    else:
        values = np.linspace(begin, end, levels)
    return tuple(values.astype(np.float32).tolist())


NAMESPACE = "tag:yaml.org,2002:python/object:argparse.Namespace"  # what the originals dump: read as a mapping


def read_config(path: str | os.PathLike) -> dict[str, object]:
    """What the config.yml of an original says, as fields of ModelConfig: channels, image_size, ngf, sigmas, plan.

    Numbers may be strings, as YAML reads 2e-5. CheckpointError where a value is missing, wrong, or asks for a variant
    of the networks that is not built (logit_transform, rescaled, another normalization or nonlinearity).
    """
    path = Path(path)
    try:
        check_file(path)
        return _config_fields(parse_yaml(read_text(path, MAX_YAML), [NAMESPACE]))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, TypeError, OverflowError) as error:
        text = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: is not a configuration: {short(text)}") from None


UNSUPPORTED = {
    ("data", "logit_transform"): (False,),
    ("data", "rescaled"): (False,),
    ("model", "spec_norm"): (False,),
    ("model", "batch_norm"): (False,),
    ("model", "normalization"): ("InstanceNorm++",),
    ("model", "nonlinearity"): ("elu",),
}


def _config_fields(tree: object) -> dict[str, object]:
    data, model = _section(tree, "data"), _section(tree, "model")
    sampling = _section(tree, "sampling") if "sampling" in tree else {}
    for (section, name), accepted in UNSUPPORTED.items():
        value = {"data": data, "model": model}[section].get(name, accepted[0])
        if value not in accepted:
            raise CheckpointError(f"{section}.{name} is {value!r}; only {accepted[0]!r} is supported")
    begin = _number(model, "model.sigma_begin", 0, 1e6)
    end = _number(model, "model.sigma_end", 0, begin)
    levels = _number(model, "model.num_classes", 1, 100_000, integer=True)
    distribution = model.get("sigma_dist", "geometric")
    if distribution not in ("geometric", "uniform"):
        raise CheckpointError(f"model.sigma_dist is {distribution!r}; geometric and uniform are supported")
    fields = {
        "channels": _number(data, "data.channels", 1, 1024, integer=True),
        "image_size": _number(data, "data.image_size", 1, 8192, integer=True),
        "ngf": _number(model, "model.ngf", 1, 8192, integer=True),
        "sigmas": levels_between(begin, end, levels, distribution),
    }
    if "step_lr" in sampling:
        fields["plan"] = {
            "steps_per_level": _number(sampling, "sampling.n_steps_each", 1, 1_000_000, integer=True),
            "step_lr": _number(sampling, "sampling.step_lr", 0, 1e3),
            "denoise": sampling.get("denoise", True) is True,
        }
    return fields


def _section(tree: object, name: str) -> dict:
    section = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise CheckpointError(f"has no section {name!r}: is it the config.yml of an NCSN or NCSNv2?")
    return section


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _number(section: dict, name: str, low: float, high: float, integer: bool = False) -> float | int:
    """section's value as a number in (low, high], or [low, high] for integers; strings such as 2e-5 count."""
    value = section.get(name.split(".")[1])
    if value is None:
        raise CheckpointError(f"lacks {name}")
    number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise CheckpointError(f"{name} must be a number, got {value!r:.60}")
    if not (low <= number <= high) or (number == low and not integer) or (integer and number != int(number)):
        span = f"an integer from {low} to {high}" if integer else f"a number above {low}, at most {high}"
        raise CheckpointError(f"{name} must be {span}, got {value!r:.60}")
    return int(number) if integer else float(number)
