"""Checkpoints of the program that "Classification Diffusion Models" (arXiv 2402.10095) was published with.

``torch.save`` of {"model_state_dict", "ema_model_state_dict", …}: a U-Net with DDPM's names, whose linear_layer gives
the steps between T + 2 classes. Its tensors tell widths, blocks, labels and T; that β goes from 1e-4 to 0.02, and
attention to 16 pixels a side, is as published.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from sgm_engine.checkpoints.torch_file import CheckpointError
from sgm_engine.checkpoints.weights_file import State
from sgm_engine.models.cdm.config import CDMConfig

ATTENDED = 16  # pixels a side
FLOW = 1000  # rows of linear_layer where the classes are those of flow matching, which is another order of them
PARTS = {"norm1": "norm1", "conv1": "conv1", "told": "temb_proj", "norm2": "norm2", "conv2": "conv2",
         "skip": "nin_shortcut"}  # fmt: skip
ENDS = {"begin": "conv_in", "norm": "norm_out", "end": "conv_out", "head": "linear_layer"}
TOLD = {"told.label": "label_emb", "told.dense1": "temb.dense.0", "told.dense2": "temb.dense.1"}


def opened(state: State, image_size: int | None) -> tuple[State, CDMConfig]:
    """The tensors under the names of models.cdm.UNet, and what they describe. CheckpointError says what is not so."""
    try:
        config = CDMConfig(**_fields(state.shapes, image_size))
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(f"is no published CDM: {what}") from None
    names = _names(config, state.shapes)
    shapes = {ours: _shape(state, theirs) for ours, theirs in names.items()}
    shapes |= {name: shape for name, shape in state.shapes.items() if not any(name in t for t in names.values())}

    def read(name: str) -> Tensor:
        parts = [state.read(theirs) for theirs in names[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    sizes = {ours: sum(state.sizes.get(n, 0) for n in theirs) for ours, theirs in names.items()} if state.sizes else {}
    return state._replace(shapes=shapes, read=read, sizes=sizes), config


def _fields(shapes: dict[str, tuple[int, ...]], image_size: int | None) -> dict[str, object]:
    width, channels = shapes["conv_in.weight"][:2]
    rows = shapes["linear_layer.weight"][0]
    if rows == FLOW:
        raise CheckpointError(f"has {rows} classes, as its flow matching has: only the {FLOW + 2} of DDPM are read")
    resolutions = 1 + max(int(m[1]) for n in shapes if (m := re.match(r"down\.(\d+)\.", n)))
    if resolutions > len(shapes) or width % 32:
        raise CheckpointError(f"is no published CDM: {resolutions} resolutions of multiples of {width} channels")
    widths = [shapes[f"down.{i}.block.0.conv1.weight"][0] for i in range(resolutions)]
    if any(w % width for w in widths):
        raise CheckpointError(f"is no published CDM: widths {widths} are no multiples of {width}")
    blocks = len({m[1] for n in shapes if (m := re.match(r"down\.0\.block\.(\d+)\.", n))})
    attended = [i for i in range(resolutions) if f"down.{i}.attn.0.q.weight" in shapes]
    if image_size is None and len(attended) != 1:
        raise CheckpointError("does not say the size of its images: pass image_size=")
    size = ATTENDED << attended[0] if image_size is None else image_size
    return {
        "channels": channels,
        "image_size": size,
        "width": width,
        "multipliers": [w // width for w in widths],
        "blocks": blocks,
        "schedule": "ddpm",
        "levels": rows - 2,
        "attention": [size >> i for i in attended],
        "features": shapes["conv_out.weight"][0],
        "labels": shapes["label_emb.weight"][0] - 1 if "label_emb.weight" in shapes else 0,
        "published": True,
        "plan": {"name": "ancestral", "start_shift": 0.5},
    }


def _names(config: CDMConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Our name → theirs, those that are put one behind another."""
    pairs = {**ENDS, **(TOLD if config.labels else {})}
    stages = [("middle.0", "mid.block_1"), ("middle.2", "mid.block_2")]
    joined = _attention("middle.1", "mid.attn_1")
    for side, blocks, order in (("down", config.blocks, 1), ("up", config.blocks + 1, -1)):
        place = 0
        for i in range(len(config.multipliers))[::order]:
            attended = config.image_size >> i in config.attention
            for j in range(blocks):
                stages.append((f"{side}.{place}{'.0' if attended else ''}", f"{side}.{i}.block.{j}"))
                joined |= _attention(f"{side}.{place}.1", f"{side}.{i}.attn.{j}") if attended else {}
                place += 1
            if i != (len(config.multipliers) - 1 if side == "down" else 0):
                ours, theirs = ("", "downsample.conv") if side == "down" else (".conv", "upsample.conv")
                pairs[f"{side}.{place}{ours}"] = f"{side}.{i}.{theirs}"
                place += 1
    for ours, theirs in stages:
        found = {part: name for part, name in PARTS.items() if f"{theirs}.{name}.weight" in shapes}
        pairs |= {f"{ours}.{part}": f"{theirs}.{name}" for part, name in found.items()}
    joined |= {ours: (theirs,) for ours, theirs in pairs.items()}
    full = {f"{ours}.{end}": tuple(f"{t}.{end}" for t in theirs) for ours, theirs in joined.items()
            for end in ("weight", "bias")}  # fmt: skip
    return {f"classifier.{ours}": theirs for ours, theirs in full.items() if all(t in shapes for t in theirs)}


def _attention(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{ours}.norm": (f"{theirs}.norm",),
        f"{ours}.qkv": tuple(f"{theirs}.{part}" for part in "qkv"),
        f"{ours}.out": (f"{theirs}.proj_out",),
    }


def _shape(state: State, names: tuple[str, ...]) -> tuple[int, ...]:
    shapes = [state.shapes[name] for name in names]
    if len({s[1:] for s in shapes}) > 1:
        raise CheckpointError(f"has {', '.join(names)} of shapes {', '.join(map(str, shapes))}, which belong together")
    return (sum(s[0] for s in shapes), *shapes[0][1:])
