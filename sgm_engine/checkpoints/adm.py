"""Checkpoints of improved-diffusion and ADM: the network from its tensors' shapes, and from flags what they do not say.

Heads, the order of q, k and v, the image size and the noise schedule are in no file. They are those of a published
file, known by its name, or are given as the flags that its training had: "--image_size 64 --num_head_channels 64 …".
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sgm_engine.checkpoints.torch_file import CheckpointError, check_file
from sgm_engine.checkpoints.weights_file import State
from sgm_engine.files.reading import parse_json, read_text, short
from sgm_engine.models.preconditioning import ddpm_levels

_GUIDED = {"num_head_channels": 64, "noise_schedule": "linear", "attention_resolutions": "32,16,8"}
_IMPROVED = {"num_heads": 4, "noise_schedule": "cosine", "attention_resolutions": "16,8", "diffusion_steps": 4000,
             "rescale_timesteps": True}  # fmt: skip
PUBLISHED = {
    "64x64_diffusion": _GUIDED | {"image_size": 64, "noise_schedule": "cosine", "use_new_attention_order": True},
    "128x128_diffusion": {
        "image_size": 128,
        "num_heads": 4,
        "noise_schedule": "linear",
        "attention_resolutions": "32,16,8",
    },
    "256x256_diffusion": _GUIDED | {"image_size": 256},
    "256x256_diffusion_uncond": _GUIDED | {"image_size": 256},
    "512x512_diffusion": _GUIDED | {"image_size": 512},
    "lsun_bedroom": _GUIDED | {"image_size": 256},
    "lsun_cat": _GUIDED | {"image_size": 256},
    "lsun_horse": _GUIDED | {"image_size": 256},
    "lsun_horse_nodropout": _GUIDED | {"image_size": 256},
    "imagenet64_uncond_100M_1500K": _IMPROVED | {"image_size": 64},
    "imagenet64_uncond_vlb_100M_1500K": _IMPROVED | {"image_size": 64},
    "cifar10_uncond_50M_500K": _IMPROVED | {"image_size": 32},
    "cifar10_uncond_vlb_50M_500K": _IMPROVED | {"image_size": 32},
    "imagenet64_cond_270M_250K": _IMPROVED | {"image_size": 64, "rescale_timesteps": False},
    "lsun_uncond_100M_1200K_bs128": {
        "image_size": 256,
        "num_heads": 1,
        "noise_schedule": "linear",
        "attention_resolutions": "16",
    },
    "lsun_uncond_100M_2400K_bs64": {
        "image_size": 256,
        "num_heads": 1,
        "noise_schedule": "linear",
        "attention_resolutions": "16",
    },
}
# Flags that decide something which no tensor's shape does, and those that shapes must agree with.
DECIDING = ("image_size", "noise_schedule", "num_heads", "num_head_channels", "num_heads_upsample", "diffusion_steps",
            "use_new_attention_order", "rescale_timesteps", "predict_xstart")  # fmt: skip
SHAPED = ("num_channels", "num_res_blocks", "channel_mult", "learn_sigma", "class_cond", "use_scale_shift_norm",
          "resblock_updown", "attention_resolutions")  # fmt: skip
IGNORED = re.compile(r"use_fp16|use_checkpoint|dropout|use_kl|rescale_learned_sigmas|sigma_small|timestep_respacing|"
                     r"batch_size|num_samples|model_path|lr|microbatch|data_dir|clip_denoised|use_ddim|ema_rate|"
                     r"log_interval|save_interval|schedule_sampler|classifier_\w+")  # fmt: skip


def describe(state: State, config: object, path: Path, image_size: int | None) -> dict[str, object]:
    """Fields of FamilyConfig. config: flags as one text, a mapping, or a file of either; None: by the file's name."""
    flags = _flags(config)
    if flags is None:
        flags = PUBLISHED.get(path.name.split(".")[0])
    if flags is None:
        raise CheckpointError(
            "is an improved-diffusion or ADM checkpoint, whose tensors do not say its heads, size and noise schedule: "
            'pass the flags of its training, config="--image_size 64 --num_heads 4 --noise_schedule linear …" (on the '
            "command line --config)"
        )
    if image_size is not None:
        flags = flags | {"image_size": image_size}
    network = _shaped(state, flags)
    _agree(network, flags)
    alphas = _alphas(_flag(flags, "noise_schedule", str, "linear"), _flag(flags, "diffusion_steps", int, 1000))
    if len(alphas) != 1000 and "rescale_timesteps" not in flags:
        raise CheckpointError(
            f"has {len(alphas)} diffusion_steps, and whether the network is told them or a thousand is not known: add "
            "--rescale_timesteps True (improved-diffusion's default) or False (ADM's) to the flags"
        )
    scheme = {"name": "ddpm", "alphas_cumprod": alphas}
    if _flag(flags, "predict_xstart", bool, False):
        scheme["prediction"] = "sample"
    if _flag(flags, "rescale_timesteps", bool, False) and len(alphas) != 1000:
        scheme["scale"] = 1000 / len(alphas)
    trained = ddpm_levels(alphas)
    return {
        "architecture": "ADMUNet",
        "network": network,
        "channels": network["channels"],
        "image_size": network["image_size"],
        "preconditioning": scheme,
        "data_range": (-1.0, 1.0),
        "sigma_min": float(trained[0]),
        "sigma_max": float(trained[-1]),
        "plan": {"name": "sde_dpm_solver_2m", "nfe": 30},
        "family": "ADM / improved-diffusion" + (", classes" if network["num_classes"] else ""),
    }


def _flags(config: object) -> dict[str, object] | None:
    if config is None or isinstance(config, Mapping):
        return None if config is None else {str(k): v for k, v in config.items()}
    text = str(config)
    if not text.lstrip().startswith("--"):
        file = Path(text)
        try:
            check_file(file)
            text = read_text(file)
            if text.lstrip().startswith("{"):
                return dict(parse_json(text))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"config {file}: {short(error)}") from None
    words = shlex.split(text.replace("=", " "))
    if len(words) % 2 or any(not w.startswith("--") for w in words[::2]):
        raise CheckpointError(f"has flags that are not --name value pairs: {text[:80]!r}")
    flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    if unknown := [f for f in flags if f not in DECIDING + SHAPED and not IGNORED.fullmatch(f)]:
        raise CheckpointError(f"has unknown flags: {', '.join(unknown)}; known are {', '.join(DECIDING + SHAPED)}")
    return flags


def _flag(flags: Mapping, name: str, kind: type, default):
    value = flags.get(name, default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        return kind(value)
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"has the flag {name} {value!r}, where {kind.__name__} belongs") from None


def _shaped(state: State, flags: Mapping) -> dict[str, object]:
    """Arguments of ADMUNet, from shapes, and from flags what those do not say."""
    shapes = state.shapes
    size = _flag(flags, "image_size", int, 0)
    if size < 1:
        raise CheckpointError("has no image size in its flags: add --image_size")
    width = shapes["time_embed.0.weight"][1]
    inputs = len({n.split(".")[1] for n in shapes if n.startswith("input_blocks.")})
    # The decoder's blocks that lead up have one module more, the first at the end of the smallest size.
    ups = [n.split(".") for n in shapes if re.match(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.weight", n)]
    per_size = min((int(n[1]) + 1 for n in ups), default=inputs)
    if per_size < 2 or not inputs or inputs % per_size:
        raise CheckpointError(f"has {inputs} input blocks for sizes of {per_size}: not this family's layout")
    mults, attended = [], []
    for i in range(inputs // per_size):
        first = 1 + i * per_size
        out = shapes.get(f"input_blocks.{first}.0.out_layers.3.weight")
        if out is None:
            raise CheckpointError(f"lacks input_blocks.{first}.0.out_layers.3.weight")
        mults.append(out[0] / width)
        if f"input_blocks.{first}.1.qkv.weight" in shapes:
            attended.append(size >> i)
    out, first = shapes.get("out.2.weight", (0,)), shapes.get("input_blocks.0.0.weight", (0, 0))
    heads, per_head = _flag(flags, "num_heads", int, 0), _flag(flags, "num_head_channels", int, -1)
    if attended and not heads and per_head < 1:
        raise CheckpointError("has attention, and its flags say neither --num_heads nor --num_head_channels")
    label = shapes.get("label_emb.weight")
    emb = shapes.get("input_blocks.1.0.emb_layers.1.weight", (0,))[0]
    return {
        "image_size": size,
        "num_channels": width,
        "num_res_blocks": per_size - 1,
        "channel_mult": [int(m) if m == int(m) else m for m in mults],
        "attention_resolutions": attended,
        "channels": first[1],
        "num_classes": label[0] if label else None,
        "num_heads": heads or 4,
        "num_head_channels": per_head,
        "num_heads_upsample": _flag(flags, "num_heads_upsample", int, -1),
        "use_scale_shift_norm": emb == 2 * shapes.get("input_blocks.1.0.out_layers.3.weight", (0,))[0],
        "resblock_updown": any(n[3] == "in_layers" for n in ups),
        "use_new_attention_order": _flag(flags, "use_new_attention_order", bool, False),
        "learn_sigma": out[0] == 2 * first[1],
    }


def _agree(network: Mapping, flags: Mapping) -> None:
    """CheckpointError where a flag says something else than the tensors."""
    found = dict(network) | {"class_cond": network["num_classes"] is not None}
    for name in set(SHAPED) & set(flags):
        value, kind = found[name], type(found[name])
        if isinstance(value, list):
            if flags[name] in ("", None):
                continue
            given = [float(v) for v in str(flags[name]).split(",")]
            same = (
                sorted(given) == sorted(float(v) for v in value)
                if name == "channel_mult"
                else set(map(float, value)) <= set(given)
            )
        else:
            same = _flag(flags, name, kind, value) == value
        if not same:
            raise CheckpointError(f"has {name} {value} by its tensors, but its flags say {flags[name]!r}")


def _alphas(schedule: str, count: int) -> list[float]:
    """ᾱ of improved-diffusion's schedules "linear" and "cosine" (arXiv 2102.09672, eq. 17)."""
    if not 1 < count <= 100_000:
        raise CheckpointError(f"has diffusion_steps {count} in its flags, where 2 to 100000 belong")
    if schedule == "linear":
        beta = np.linspace(0.1 / count, 20 / count, count)
    elif schedule == "cosine":
        bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise CheckpointError(f"has noise_schedule {schedule!r} in its flags; linear and cosine are known")
    return np.cumprod(1 - beta).tolist()
