"""A network of a diffusion family to train: its record, and the noise levels of its training. config: a TrainConfig."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from sgm_engine.checkpoints.diffusers_folder import ddpm_scheme
from sgm_engine.models.family import NETWORKS, FamilyConfig
from sgm_engine.models.family import levels as levels_of
from sgm_engine.models.preconditioning import SCHEMES
from sgm_engine.plans.schedule import geometric


class Names(NamedTuple):
    """What a network calls its width (None: it has several), its image's size, its channels, its classes."""

    width: str | None
    size: str
    channels: tuple[str, ...]
    classes: str | None


EDM = Names("model_channels", "img_resolution", ("in_channels", "out_channels"), "label_dim")
NAMES = {
    "NCSNpp": Names("nf", "image_size", ("num_channels",), None),
    "SongUNet": EDM,
    "DhariwalUNet": EDM,
    "EDM2UNet": EDM._replace(channels=("img_channels",)),
    "ADMUNet": Names("num_channels", "image_size", ("channels",), "num_classes"),
    "UNet2D": Names(None, "sample_size", ("in_channels", "out_channels"), "num_class_embeds"),
    "Unet": Names("dim", "image_size", ("channels",), None),
}


def record(config, channels: int, image_size: int) -> FamilyConfig:
    """The network for images [channels, image_size, image_size], and how it is told the noise."""
    kind = config.architecture
    network = _arguments(config, channels, image_size)
    scheme = dict(config.preconditioning) or _usual(kind, network)
    if kind == "NCSNpp":
        network.setdefault("centered", scheme.get("name") != "score")
    low = -1.0 if network.get("centered", True) else 0.0
    if scheme.get("name") == "ddpm":
        if config.sigma_begin is not None:
            raise ValueError("sigma_begin must be left out: a ddpm's levels are those of its timesteps")
        scheme, first, last = ddpm_scheme({"clip_sample": False, **scheme, "_class_name": "DDPMScheduler"})
    elif config.sigma_begin is None:
        raise ValueError(f"sigma_begin is missing: the first noise level of {kind}")
    else:
        first, last = config.sigma_end * (1 - low), config.sigma_begin * (1 - low)
    few = {"name": "heun", "nfe": 35} if NAMES[kind].size == EDM.size else {"name": "sde_dpm_solver_2m", "nfe": 30}
    return FamilyConfig(
        architecture=kind,
        network=network,
        channels=channels,
        image_size=image_size,
        preconditioning=scheme,
        data_range=(low, 1.0),
        sigma_min=first,
        sigma_max=last,
        plan=config.plan or few,
        family=f"{kind} of sgm train",
    )


def training_levels(config, found: FamilyConfig) -> np.ndarray:
    """In units of pixels in [0, 1], descending: timesteps of a DDPM, else geometric."""
    if found.preconditioning["name"] == "ddpm":
        return levels_of(found, config.levels, own=True)
    return geometric(config.sigma_begin, config.sigma_end, config.levels)


def _arguments(config, channels: int, image_size: int) -> dict[str, object]:
    kind, names, network = config.architecture, NAMES[config.architecture], dict(config.network)
    if network.get(names.classes):
        raise ValueError(f"network.{names.classes} must be left out: images of `sgm train` have no classes")
    if not config.divide_by_sigma:
        raise ValueError(f"divide_by_sigma must be true for {kind}: its preconditioning scales the output")
    if config.ngf is not None and names.width is None:
        raise ValueError(f"ngf must be left out for {kind}: network.block_out_channels are its widths")
    known = {names.size: image_size} | dict.fromkeys(names.channels, channels)
    known |= {} if config.ngf is None else {names.width: config.ngf}
    if twice := sorted(known.keys() & network):
        raise ValueError(f"network.{twice[0]} must be left out: ngf and the data say {known[twice[0]]}")
    network |= known
    needed = [p.name for p in inspect.signature(NETWORKS[kind]).parameters.values() if p.default is p.empty]
    if missing := ["ngf" if n == names.width else f"network.{n}" for n in needed if n not in network]:
        raise ValueError(f"{', '.join(missing)} must be given for {kind}")
    return network


def _usual(kind: str, network: dict[str, object]) -> dict[str, object]:
    """The preconditioning that a family is published with."""
    if kind == "NCSNpp":
        return {"name": "score" if network.get("embedding_type") == "fourier" else "vp"}
    return {"name": "edm" if NAMES[kind].size == EDM.size else "ddpm"}


def differences(theirs: FamilyConfig, ours: FamilyConfig) -> list[str]:
    """In which fields that decide what a network computes two records differ, with both values; the plan may."""
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in ("architecture", "data_range", "clip")]
    if theirs.architecture == ours.architecture:
        one, two = (_filled(NETWORKS[ours.architecture], found.network) for found in (theirs, ours))
        pairs += [(f"network.{n}", one[n], two[n]) for n in one if n not in ("dropout", "label_dropout")]
    schemes = (dict(found.preconditioning) for found in (theirs, ours))
    named = [{"name": s["name"]} | _filled(SCHEMES[s.pop("name")], s | {"steps": None}) for s in schemes]
    pairs.append(("preconditioning", *named))
    return [f"{name} {a!r:.40}, not {b!r:.40}" for name, a, b in pairs if _plain(a) != _plain(b)]


def _filled(made: Callable, given: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a call, its defaults among them."""
    return {name: given.get(name, p.default) for name, p in inspect.signature(made).parameters.items()}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
