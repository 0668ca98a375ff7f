"""A classification diffusion model beside a denoiser of the same network, on images that neither has seen.

    python -m sgm_engine.cdm.baseline --cdm cdm_mnist --ddm run/model.safetensors --data mnist/ --n 500

prints, for both, the share of the noise's variance that is missed at some levels; bits per dimension, by one forward
pass of the classifier and by the bound that chains of all levels give either (DDPM's, arXiv 2006.11239, eq. 5, in
continuous pixels); and the Fréchet distance of samples by each one's own plan, in the features of a digit classifier.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgm_engine.checkpoints.bundled import bundled_names, bundled_path, plan_for
from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.data.images import dequantise, load_images
from sgm_engine.data.sets import from_array, open_images
from sgm_engine.engine.engine import Engine
from sgm_engine.evaluation.evaluate import summarise
from sgm_engine.evaluation.features import open_extractor
from sgm_engine.evaluation.frechet import frechet
from sgm_engine.evaluation.likelihood import bits_per_dim, image_bits
from sgm_engine.keys import Key
from sgm_engine.models.cdm.model import CDM, DDM
from sgm_engine.outputs.images import to_uint8
from sgm_engine.programs.arguments import Program, at_least

SHOWN = (1.04, 0.59, 0.34, 0.19, 0.11, 0.06, 0.02)  # σ in units of u = 2·x − 1
BATCH = 50


@torch.no_grad()
def squared_errors(model, x: Tensor, seed: int = 0) -> Tensor:
    """‖ε̂ − ε‖² of each level and image, float64 [L, n], of images x [n, …] with noise ε; ε̂ = −σ·score."""
    key, found = Key(seed, torch.arange(len(x))), []
    for level, sigma in enumerate(model.sigmas.tolist()):
        noise = key.normal(x, level)
        answers = [
            model(part, torch.full((len(part),), level)) for part in (x + sigma * noise).to(x.dtype).split(BATCH)
        ]
        found.append((-sigma * torch.cat(answers) - noise).double().square().flatten(1).sum(1))
    return torch.stack(found)


def bound(model, x: Tensor, errors: Tensor, mean: float, std: float, last: float) -> Tensor:
    """−log p(x) in nats, float64 [n], at most, of ancestral chains over all levels; errors: squared_errors of x.

    mean, std: of a pixel of the data, whose chains start in N(mean, σ_1² + std²). last: variance of the Gaussian that
    the last level's denoised image is the mean of.
    """
    sigma2, d = model.sigmas.double() ** 2, x[0].numel()
    steps = 0.5 * (sigma2[:-1] / sigma2[1:] - 1) @ errors[:-1]
    ratio = sigma2[0] / (sigma2[0] + std**2)
    far = (x.double() - mean).square().flatten(1).sum(1) / (sigma2[0] + std**2)
    start = 0.5 * (d * (ratio - 1 - ratio.log()) + far)
    return start + steps + 0.5 * (d * math.log(2 * math.pi * last) + sigma2[-1] * errors[-1] / last)


def compare(models: dict[str, CDM | DDM], train: np.ndarray, test: np.ndarray) -> dict[str, dict[str, object]]:
    """For each model: "missed", by level [L]; "bound" and, where it has one, "one pass", bits per dimension [n]."""
    x, known = (_pixels(images, seed) for seed, images in ((0, test), (1, train)))
    mean, std, found = float(known.mean()), float(known.std()), {}
    for name, model in models.items():
        errors = squared_errors(model, x)
        few = model.at_sigmas(model.sigmas[-1:].tolist())
        last = float(few.sigmas[0] ** 2 * squared_errors(few, known, 1).mean() / x[0].numel())
        nats = bound(model, x, errors, mean, std, last)
        found[name] = {"missed": errors.mean(1) / x[0].numel(), "bound": bits_per_dim(-nats, x[0].numel())}
        if isinstance(model, CDM):
            found[name]["one pass"] = image_bits(model.log_prob, test)
    return found


def _pixels(images: np.ndarray, seed: int) -> Tensor:
    images = torch.from_numpy(np.array(images))
    return dequantise(images, Key(seed, torch.arange(len(images))).uniform(images.float(), 1 << 16))


def distance(model, reference, extractor, n: int) -> object:
    """Fréchet distance of n samples by the model's own plan, an Estimate."""
    samples = to_uint8(Engine(model).sample(n, plan=plan_for(model))).transpose(0, 3, 1, 2)
    drawn = summarise(from_array(samples).blocks(), extractor)
    return frechet(drawn.moments, reference.moments)


def main(argv: list[str] | None = None) -> None:
    parser = Program("sgm_engine.cdm.baseline", __doc__.splitlines()[0])
    parser.add_argument("--cdm", default="cdm_mnist", help="weights of the classifier: a file, or bundled ones by name")
    parser.add_argument("--ddm", required=True, help="weights of the denoiser, as sgm train --config ddm_mnist writes")
    parser.add_argument("--data", type=Path, required=True, help="MNIST's IDX files")
    parser.add_argument("--n", type=at_least(0), default=500, help="samples of each for the Fréchet distance; 0: none")
    parser.add_argument("--images", type=at_least(2), default=100, help="held-out images")
    args = parser.parse_args(argv)
    if args.n in (1, 2):
        parser.error(f"argument --n: a Fréchet distance's interval needs 3 samples, got {args.n}")
    with parser.reading():
        models = {name: _opened(getattr(args, name.lower())) for name in ("CDM", "DDM")}
        for (name, model), kind in zip(models.items(), (CDM, DDM), strict=True):
            if type(model) is not kind:
                raise ValueError(f"argument --{name.lower()}: holds a {type(model).__name__}, not a {name}")
        train, test = load_images(args.data)[: args.images], load_images(args.data, "test")[: args.images]
    found = compare(models, train, test)
    sigmas = 2 * models["CDM"].sigmas.double()
    print(f"share of the variance of ε that is missed, {len(test)} held-out images")
    print("  σ     " + "  ".join(f"{s:5.2f}" for s in SHOWN))
    for name, figures in found.items():
        levels = [int((sigmas.log() - math.log(s)).abs().argmin()) for s in SHOWN]
        print(f"  {name}   " + "  ".join(f"{float(figures['missed'][i]):.3f}" for i in levels))
    print("bits per dimension of dequantised images")
    for name, figures in found.items():
        for way in ("one pass", "bound"):
            if way in figures:
                bits = figures[way]
                print(f"  {name}, {way:8}  {bits.mean():.3f} ± {bits.std() / len(bits) ** 0.5:.3f}")
    if args.n:
        extractor = open_extractor("digits", None)
        reference = summarise(open_images(f"{args.data}:test").blocks(), extractor)
        print(f"Fréchet distance of {args.n} samples in a digit classifier's features, and without its bias")
        for name, model in models.items():
            e = distance(model, reference, extractor, args.n)
            print(f"  {name}  {e.value:.2f}   {e.corrected:.2f} ({e.low:.2f}–{e.high:.2f})", flush=True)


def _opened(name: str):
    return load_checkpoint(bundled_path(name) if name in bundled_names() else Path(name).expanduser())


if __name__ == "__main__":
    main()
