"""What travels with weights in the metadata of our .safetensors: the data's law and the front of plans."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from sgm_engine.checkpoints.good_plan import start_at
from sgm_engine.checkpoints.torch_file import CheckpointError
from sgm_engine.checkpoints.weights_file import FORMAT
from sgm_engine.files.reading import open_safetensors, parse_json, read_bytes, short
from sgm_engine.files.writing import write_file
from sgm_engine.outputs.output import sorted_header
from sgm_engine.plans.front import Front
from sgm_engine.plans.law import DataLaw
from sgm_engine.plans.steps import check_plans

LAW, FRONT = "data", "front"


def notes_of(model: nn.Module) -> dict[str, str]:
    """The metadata that hold a model's law and front."""
    law, front = getattr(model, "law", None), getattr(model, "front", None)
    found = {LAW: json.dumps(law.to_dict(), separators=(",", ":"))} if law is not None else {}
    return found | ({FRONT: front.to_json()} if front is not None else {})


def take_notes(model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Give ``model`` the law and the front of a file's metadata; CheckpointError where they are not of such a model."""
    what = "law of the data"
    try:
        if LAW in metadata:
            law = DataLaw.from_dict(parse_json(metadata[LAW]))
            law.check_shape(model.shape)
            model.law = law
        what = "front of plans"
        if FRONT in metadata:
            front = Front.from_json(metadata[FRONT])
            for point in front.points:
                point.plan(partial(start_at, model))
            check_plans(front.steps, float(model.sigmas[0]))
            model.front = front
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f"has a bad {what} in its metadata: {short(error)}") from None


def is_ours(path: str | os.PathLike) -> bool:
    """Whether it is a .safetensors that ``save_checkpoint`` wrote."""
    if not Path(path).is_file():
        return False
    try:
        with open_safetensors(Path(path), "np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError):
        return False


def write_notes(source: str | os.PathLike, target: str | os.PathLike, model: nn.Module) -> None:
    """``source``, one of our .safetensors, with the law and front of ``model`` under ``target``, which may be source.
    Its tensors stay as they are, byte for byte."""
    content = read_bytes(Path(source))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= notes_of(model)
    text = json.dumps(header, ensure_ascii=False).encode()
    write_file(Path(target), sorted_header(len(text).to_bytes(8, "little") + text + content[8 + length :]))
