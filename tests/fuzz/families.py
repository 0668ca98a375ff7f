"""Small checkpoints of the diffusion families, whose readers take files as their authors write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.models.edm_unet import SongUNet
from tests.family_files import diffusers_folder, edm_pickle, lucidrains_file

EDM = {
    "img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 4, "channel_mult": [1],
    "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip


def family_files(folder: Path) -> Iterator[tuple[str, str, dict[str, bytes], Callable[[Path], object]]]:
    """(name, the file that is damaged, it and those beside it, how it is read)."""
    torch.manual_seed(0)
    edm_pickle(folder / "edm.pkl", SongUNet(**EDM).eval(), EDM)
    yield "EDM", "edm.pkl", {"edm.pkl": (folder / "edm.pkl").read_bytes()}, load_checkpoint
    lucidrains_file(folder / "model-9.pt")
    content = {"model-9.pt": (folder / "model-9.pt").read_bytes()}
    yield "lucidrains", "model-9.pt", content, lambda path: load_checkpoint(path, image_size=16)
    diffusers_folder(folder / "pipe")
    files = {str(f.relative_to(folder)): f.read_bytes() for f in (folder / "pipe").rglob("*") if f.is_file()}
    for name in files:
        yield f"diffusers {Path(name).name}", name, files, lambda path: load_checkpoint(_pipe(path))


def _pipe(path: Path) -> Path:
    return next(p for p in path.parents if p.name == "pipe")
