"""Every reader of files, a small file for each, and what an accepted file must give.

READERS: name → Reader. ``truth(path, value)`` raises AssertionError where the value is not what the file says, by an
independent library; files that only the reader under test understands have none.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sgm_engine.checkpoints.checkpoint import load_checkpoint, read_config, save_checkpoint
from sgm_engine.data.images import load_images, read_idx
from sgm_engine.data.sets import open_images
from sgm_engine.evaluation.classifier import Classifier, load_classifier, save_classifier
from sgm_engine.files.reading import read_text
from sgm_engine.jobs.folder import Folder
from sgm_engine.jobs.verify import verify
from sgm_engine.models import NCSNv2
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.plans.plan import Plan, annealed_langevin
from sgm_engine.rewriting.float8.config import Float8Config
from sgm_engine.training.config import TrainConfig
from tests.faults import toy_job
from tests.fuzz.families import family_files
from tests.fuzz.mutate import damaged

PIXELS = np.random.default_rng(7).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@dataclass
class Reader:
    """name: of the file that is damaged, in ``folder``, whose files lie beside it. read(path of that file)."""

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], object]
    truth: Callable[[Path, object], None] | None = None
    mutate: Callable[[bytes, np.random.Generator], bytes] = damaged
    after: Callable[[Path], None] | None = None

    def lay(self, folder: Path, rng: np.random.Generator) -> Path:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.mutate(content, rng) if name == self.name else content)
        if self.after:
            self.after(folder / self.name)
        return folder / self.name


def _network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSNv2([1.0, 0.5, 0.25], channels=1, ngf=2, image_size=8)


def _pth(**options) -> bytes:
    file = io.BytesIO()
    torch.save({f"module.{k}": v for k, v in _network().state_dict().items()}, file, **options)
    return file.getvalue()


def _saved(save: Callable[[Path], object], folder: Path, name: str) -> bytes:
    save(folder / name)
    return (folder / name).read_bytes()


def _same_state(theirs: dict, model: torch.nn.Module) -> None:
    theirs = {name.removeprefix("module."): tensor for name, tensor in theirs.items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name].float(), rtol=0, atol=0)


def _pth_says(path: Path, model) -> None:
    try:
        theirs = torch.load(path, weights_only=True)
    except (RuntimeError, ValueError):  # a disk number or .storage_alignment, which only torch minds: no verdict
        return
    _same_state(theirs, model)


def _safetensors_say(path: Path, model) -> None:
    from safetensors.torch import load_file

    _same_state(load_file(path), model[0] if isinstance(model, tuple) else model)


def _plan_says(path: Path, plan: Plan) -> None:
    content = json.loads(path.read_text())
    for name in ("level", "sigma", "a", "b", "c"):  # as float64, which a number of 23 digits is not
        assert getattr(plan, name).tolist() == [*map(float, content[name])], name


def _array_says(path: Path, images) -> None:
    found = np.load(path)
    x = found["arr_0"] if path.suffix == ".npz" else found
    x = x[..., None] if x.ndim == 3 else x
    _same_pixels(x if path.suffix == ".npz" or x.shape[3] in (1, 3) else x.transpose(0, 2, 3, 1), images)


def _same_pixels(x: np.ndarray, images: torch.Tensor) -> None:
    x = x if x.dtype == np.uint8 else np.floor(np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(x, images.numpy().transpose(0, 2, 3, 1))


def _picture_says(path: Path, images) -> None:
    with Image.open(path) as picture:
        if picture.mode in ("L", "RGB") and not picture.getexif():
            np.testing.assert_array_equal(np.atleast_3d(np.asarray(picture)), images[0].numpy().transpose(1, 2, 0))


def _idx_says(path: Path, x: np.ndarray) -> None:
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    assert raw[4 + 4 * raw[3] :] == x.tobytes()


def _all(path: Path) -> torch.Tensor:
    return open_images(path).all()


def _of_folder(path: Path) -> torch.Tensor:
    images = open_images(path.parent).all()
    load_images(path.parent, size=8)
    return images


def _job(path: Path) -> object:
    folder = path.parent if path.parent.name != "manifest" else path.parent.parent
    found = verify(folder)
    assert found.samples <= len(found.spec.ids)
    return found


def _refresh(path: Path) -> None:
    """The record of shard 0 vouches for the damaged file."""
    record = path.parent / "manifest/000000.json"
    content, data = json.loads(record.read_text()), path.read_bytes()
    content["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    record.write_text(json.dumps(content))


def make(folder: Path) -> dict[str, Reader]:
    """The table; its small files are made in ``folder``."""
    found: dict[str, Reader] = {}

    def add(name: str, file: str, content: bytes, read, truth=None, **beside: bytes) -> None:
        found[name] = Reader(file, {file: content} | beside, read, truth)

    image = {"image_size": 8}
    ours = _saved(lambda p: save_checkpoint(_network(), p), folder, "m.safetensors")
    add("ours", "m.safetensors", ours, load_checkpoint, _safetensors_say)
    add("pth", "m.pth", _pth(), lambda p: load_checkpoint(p, **image), _pth_says)
    old = _pth(_use_new_zipfile_serialization=False)
    add("old pth", "m.pth", old, lambda p: load_checkpoint(p, **image), _pth_says)
    cdm = CDMConfig(1, 8, 4, [1], 1, "ddpm", 4).build()
    add("cdm", "c.safetensors", _saved(lambda p: save_checkpoint(cdm, p), folder, "c.safetensors"), load_checkpoint,
        _safetensors_say)  # fmt: skip
    classifier = _saved(lambda p: save_classifier(Classifier((1, 8, 8), 3), p, {"accuracy": 0.5}), folder, "k.st")
    add("classifier", "k.safetensors", classifier, load_classifier, _safetensors_say)
    config = b"data: {channels: 1, image_size: 8}\nmodel: {ngf: 2, sigma_begin: 1, sigma_end: 0.01, num_classes: 3}\n"
    add("config.yml", "config.yml", config + b"sampling: {step_lr: 2e-5, n_steps_each: 5}\n", read_config)
    train = b"architecture: NCSNv2\nngf: 8\nlevels: 10\nsigma_begin: 1.0\nplan: {name: annealed_langevin}\nlr: 1e-4\n"
    add("train.yaml", "train.yaml", train, TrainConfig.read)
    cdm_yaml = b"architecture: CDM\nngf: 4\nlevels: 4\nobjective: cdm\n"
    add(
        "cdm.yaml", "cdm.yaml", cdm_yaml + b"network: {multipliers: [1], blocks: 1, schedule: ddpm}\n", TrainConfig.read
    )
    plan = annealed_langevin([1.0, 0.5], 2, 1e-5).to_json().encode()
    add("plan", "plan.json", plan, lambda p: Plan.from_json(read_text(p)), _plan_says)
    scales = Float8Config({"begin_conv": 3.0}, 2.0, 16, emulate=True, source="x").to_json().encode()
    add("float8", "f.json", scales, lambda p: Float8Config.from_json(read_text(p)))

    for form, suffix in (("npz", "npz"), ("safetensors", "safetensors"), ("png", "png"), ("webdataset", "tar")):
        out = folder / f"job-{form}"
        toy_job(out, 2, 1, format=form).run()
        files = {
            str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file() and ".sgm" not in f.parts
        }
        shard = next(name for name in sorted(files) if name.endswith(f".{suffix}"))
        found[f"shard {form}"] = Reader(shard, files, _job, after=_refresh)
    for name in ("run.json", "manifest/000000.json"):
        found[name] = Reader(name, files, _job)
    assert Folder(out).load()[0].shards == 2

    for name, save in (("npy", np.save), ("npz", np.savez), ("npz deflated", np.savez_compressed)):
        file = io.BytesIO()
        save(file, PIXELS)
        add(name, f"x.{name[:3]}", file.getvalue(), _all, _array_says)
    file = io.BytesIO()
    np.save(file, (PIXELS / 255).astype(np.float32))
    add("npy of floats", "x.npy", file.getvalue(), _all, _array_says)
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (3, 8, 8)) + PIXELS[..., 0].tobytes()
    for name, content in (("train-images-idx3-ubyte", idx), ("train-images-idx3-ubyte.gz", gzip.compress(idx))):
        add(name, name, content, read_idx, _idx_says)
    add("mnist", "train-images-idx3-ubyte", idx, lambda p: open_images(p.parent).all())
    add("cifar", "data_batch_1.bin.gz", gzip.compress(bytes(2 * 3073)), lambda p: open_images(p.parent).all())
    for form, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("BMP", "bmp")):
        for mode in ("RGB", "L", "P", "RGBA"):
            if (form, mode) in (("JPEG", "P"), ("JPEG", "RGBA"), ("WEBP", "P")):
                continue
            file = io.BytesIO()
            Image.fromarray(PIXELS[0]).convert(mode).save(file, form)
            add(f"{form} {mode}", f"a.{suffix}", file.getvalue(), _of_folder, _picture_says)
    (folder / "families").mkdir()
    for name, file, files, read in family_files(folder / "families"):
        found[name] = Reader(file, files, read)
    return found


def cases(folder: Path):
    """One case: a reader, a damaged file, and what came of it: None, or what is wrong with it."""
    folder.mkdir()
    readers = make(folder)
    names = sorted(readers)

    def case(number: int, rng: np.random.Generator, place: Path) -> str | None:
        name = names[number % len(names)]
        reader = readers[name]
        path = reader.lay(place, rng)
        try:
            value = reader.read(path)
        except (ValueError, OSError) as error:
            return unfit(f"{name}: ", str(error))
        try:
            if reader.truth:
                reader.truth(path, value)
        except Exception as error:
            return f"{name}: accepted, but {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None

    return case


def unfit(prefix: str, text: str) -> str | None:
    """What is wrong with an error as a line for a user."""
    if "\n" in text or not text or len(text) > 1000:
        return f"{prefix}no line for a user: {text[:200]!r}"
    return None
