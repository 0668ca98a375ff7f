"""Which reader a checkpoint of a diffusion family needs, and what it then describes: a FamilyConfig."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from sgm_engine.checkpoints import adm, diffusers_folder, lucidrains, network_pickle, score_sde
from sgm_engine.checkpoints.torch_file import CheckpointError, check_file
from sgm_engine.checkpoints.weights_file import State
from sgm_engine.files.storage import is_url
from sgm_engine.models.family import FamilyConfig


def local(path: str | os.PathLike) -> Path:
    """The file or folder on this machine; "hf:owner/name" is fetched, or found in huggingface_hub's cache."""
    if is_url(str(path)):
        raise CheckpointError("is on object storage, and weights are read from a disk: copy them to one")
    if not str(path).startswith("hf:"):
        return Path(path).expanduser()
    name = str(path).removeprefix("hf:")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError("needs huggingface_hub: pip install huggingface_hub") from None
    wanted = ["*.json", "*.safetensors", "*.bin", "*.pkl", "*.pt", "*.pth"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"cannot be fetched, nor found in the local cache: {str(error).splitlines()[0][:160]}"
        ) from None


def is_elsewhere(path: Path, sha256: str | None) -> bool:
    """Whether the weights are in no file of tensors: a folder, or a network's pickle. CheckpointError if unreadable."""
    if path.is_dir():
        if sha256 is not None:
            raise CheckpointError("is a folder: sha256 is of a file")
        return True
    check_file(path, sha256)
    return network_pickle.is_network_pickle(path)


def open_elsewhere(path: Path, ema: bool | None, opened: ExitStack, given: Mapping) -> tuple[State, FamilyConfig]:
    if path.is_dir():
        if given["image_size"] is not None:
            raise CheckpointError("is a diffusers folder, which says its image size: leave out image_size")
        state, fields = diffusers_folder.open_folder(path, ema, opened, given["config"])
        return state, _config(fields)
    if extra := [name for name in ("config", "image_size") if given[name] is not None]:
        raise CheckpointError(f"carries its own config: leave out {', '.join(extra)}")
    try:
        state, fields = network_pickle.open_network(path, ema)
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"does not describe a network: {' '.join(str(error).split())[:160]}") from None
    return state, _config(fields)


def describe(state: State, path: Path, config: object, image_size: int | None) -> FamilyConfig:
    """The record of the family that ``state`` was found to be of. CheckpointError names the argument that decides."""
    if isinstance(config, FamilyConfig):
        return config
    if isinstance(config, (str, os.PathLike)) and str(config).endswith(".json"):
        return _config(diffusers_folder.read_json(Path(config).expanduser()), FamilyConfig.from_dict)
    if state.family == "score_sde":
        return _config(score_sde.describe(state, config))
    if state.family == "ADM":
        return _config(adm.describe(state, config, path, image_size))
    if state.family == "lucidrains":
        return _config(lucidrains.describe(state, config, image_size))
    if state.family == "diffusers":
        raise CheckpointError(
            "holds a UNet2DModel's tensors without its config: load its folder with both config files, or pass "
            "config=, the FamilyConfig of such a model or the JSON of one"
        )
    raise CheckpointError(
        f"holds an {state.family} network's tensors alone, without its preconditioning and σ_data: load the "
        "network-snapshot .pkl, or pass config=, the FamilyConfig of such a model or the JSON of one"
    )


def _config(fields: Mapping, made: Callable[..., FamilyConfig] = lambda fields: FamilyConfig(**fields)) -> FamilyConfig:
    try:
        return made(fields)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"does not describe a network: {error}") from None
