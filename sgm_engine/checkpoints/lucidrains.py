"""Checkpoints of denoising-diffusion-pytorch: all but the image's size is in their tensors.

``model-N.pt`` holds GaussianDiffusion: the network under ``model.``, its ᾱ, and the weight of its loss, which tells
noise, image and v apart: 1, SNR, or SNR/(SNR + 1), where the SNR is not clipped.
"""

from __future__ import annotations

import re

import torch

from sgm_engine.checkpoints.torch_file import CheckpointError
from sgm_engine.checkpoints.weights_file import State, read_tensor
from sgm_engine.models.preconditioning import ddpm_levels

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def describe(state: State, config: object, image_size: int | None) -> dict[str, object]:
    """Fields of FamilyConfig. config: a mapping with "objective", where the file does not tell it."""
    if image_size is None:
        raise CheckpointError(
            "does not say the size of its images: pass image_size= (on the command line --image-size)"
        )
    if state.beside is None or "alphas_cumprod" not in state.beside.shapes:
        raise CheckpointError(
            "is a Unet of denoising-diffusion-pytorch without its GaussianDiffusion: its noise levels and prediction "
            "are not there. Load the model-N.pt that its Trainer wrote"
        )
    alphas = read_tensor(state.beside, "alphas_cumprod").double()
    trained = ddpm_levels(alphas[alphas > 0].tolist())
    network = _network(state.shapes)
    return {
        "architecture": "Unet",
        "network": network | {"image_size": image_size},
        "channels": network["channels"],
        "image_size": image_size,
        "preconditioning": {
            "name": "ddpm",
            "alphas_cumprod": alphas[alphas > 0].tolist(),
            "prediction": _objective(state.beside, alphas, config),
        },
        "data_range": (-1.0, 1.0),
        "sigma_min": float(trained[0]),
        "sigma_max": float(trained[-1]),
        "plan": {"name": "sde_dpm_solver_2m", "nfe": 30},
        "family": "denoising-diffusion-pytorch",
    }


def _objective(beside: State, alphas: torch.Tensor, config: object) -> str:
    given = config.get("objective") if isinstance(config, dict) else None
    if given is not None and given not in OBJECTIVES:
        raise CheckpointError(f"objective must be one of {', '.join(OBJECTIVES)}, got {given!r}")
    if "loss_weight" in beside.shapes:
        weight = read_tensor(beside, "loss_weight").double()
        snr = alphas / (1 - alphas)
        plain = snr < 1  # below any clip
        expected = {"pred_noise": torch.ones_like(snr), "pred_x0": snr, "pred_v": snr / (snr + 1)}
        fits = [
            n for n, e in expected.items() if plain.any() and torch.allclose(weight[plain], e[plain], rtol=1e-3, atol=0)
        ]
        if len(fits) == 1:
            if given not in (None, fits[0]):
                raise CheckpointError(
                    f"was trained with objective {fits[0]!r} by its loss_weight, but {given!r} was given"
                )
            return OBJECTIVES[fits[0]]
    if given is None:
        raise CheckpointError(
            f"does not say what its network predicts: pass config={{'objective': one of {', '.join(OBJECTIVES)}}}"
        )
    return OBJECTIVES[given]


def _network(shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
    """Arguments of Unet, from shapes."""
    sizes = 1 + max((int(m[1]) for n in shapes if (m := re.match(r"downs\.(\d+)\.", n))), default=-1)
    try:
        first, last = shapes["init_conv.weight"], shapes["final_conv.weight"]
        dim = shapes["time_mlp.1.weight"][0] // 4
        widths = [shapes[f"downs.{i}.3.{'1.' if i < sizes - 1 else ''}weight"][0] for i in range(sizes)]
        memories = [shapes[f"downs.{i}.2.mem_kv"] for i in range(sizes)]
    except KeyError as error:
        raise CheckpointError(f"lacks {error}, which a Unet of this family has") from None
    full = [f"downs.{i}.2.to_out.weight" in shapes for i in range(sizes)]
    outputs, inputs = last[0], first[1]
    channels = next((c for c in (inputs, inputs // 2) if outputs in (c, 2 * c)), 0)
    if not channels or any(w % dim for w in widths):
        raise CheckpointError(
            f"takes {inputs} channels and gives {outputs}, widths {widths} of {dim}: not this family's"
        )
    learned = shapes.get("time_mlp.0.weights")
    return {
        "dim": dim,
        "dim_mults": [w // dim for w in widths],
        "channels": channels,
        "full_attn": full,
        "attn_heads": [m[1] for m in memories],
        "attn_dim_head": [m[3] if f else m[2] for m, f in zip(memories, full, strict=True)],
        "memories": [m[2] if f else m[3] for m, f in zip(memories, full, strict=True)],
        "init_dim": first[0],
        "learned_variance": outputs == 2 * channels,
        "self_condition": inputs == 2 * channels,
        "learned_sinusoidal_dim": 2 * learned[0] if learned else None,
    }
