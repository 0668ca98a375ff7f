"""What a classification diffusion model of digits makes of images that it has not seen, and of what are no digits.

    python -m sgm_engine.cdm.report --checkpoint model.safetensors --data mnist/ --cifar cifar/ --n 2000

prints bits per dimension of held-out images, one forward pass each, beside those of a Gaussian for each pixel and, with
--flow, of the probability flow; and the AUROC of held-out images above what are none, beside that of the Gaussian with
the data's own covariance (of the model's base, where it has one).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from sgm_engine.cdm.likelihood import auroc, pixel_gaussian_bits
from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.data.images import load_images
from sgm_engine.evaluation.likelihood import image_bits, log_likelihood
from sgm_engine.keys import Key
from sgm_engine.models.cdm.gaussian import GaussianBase
from sgm_engine.models.cdm.model import CDM
from sgm_engine.programs.arguments import Program, at_least
from sgm_engine.training.cdm_fits import fit_base


def others(images: np.ndarray, cifar: np.ndarray | None) -> dict[str, np.ndarray]:
    """What is to be ranked below ``images`` uint8 [N, 1, H, W]: name → uint8 [N, 1, H, W]."""
    n, _, height, width = images.shape
    key = Key(1, torch.arange(n))
    noise = (key.uniform(torch.empty(images.shape)) * 256).to(torch.uint8).numpy()
    order = key.uniform(torch.empty(n, height * width), 2)[0].argsort().numpy()
    found = {
        "uniform noise": noise,
        "inverted": 255 - images,
        "pixels shuffled": images.reshape(n, -1)[:, order].reshape(images.shape),
        "upside down": images[:, :, ::-1].copy(),
        "halves of two": np.concatenate([images[:, :, : height // 2], np.roll(images, 1, 0)[:, :, height // 2 :]], 2),
    }
    if cifar is not None:
        grey = cifar[np.arange(n) % len(cifar)].mean(1, keepdims=True).round().astype(np.uint8)
        u = key.uniform(torch.empty(n, 2), 1).numpy()
        top, left = ((u[:, i] * (size + 1)).astype(int) for i, size in ((0, 32 - height), (1, 32 - width)))
        crops = [g[:, t : t + height, s : s + width] for g, t, s in zip(grey, top, left, strict=True)]
        found["CIFAR-10 crops"] = np.stack(crops)
    return found


def base_of(model: CDM, train: np.ndarray) -> CDM:
    """The Gaussian with mean and covariance of uint8 images, as a CDM of the same classes."""
    base = CDM(GaussianBase(train[0].size, model.classes), model.classes, model.shape, model.scale, model.shift)
    fit_base(base, train)
    return base


def main(argv: list[str] | None = None) -> None:
    parser = Program("sgm_engine.cdm.report", __doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights that sgm train wrote")
    parser.add_argument("--data", type=Path, required=True, help="MNIST's IDX files")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10's .bin files, for its crops")
    parser.add_argument("--n", type=at_least(2), default=2000, help="held-out images, and as many of each other kind")
    parser.add_argument("--flow", type=at_least(0), default=0, help="held-out images for the probability flow (slow)")
    args = parser.parse_args(argv)
    with parser.reading():
        model = load_checkpoint(args.checkpoint)
        if not isinstance(model, CDM):
            raise ValueError(f"argument --checkpoint: {args.checkpoint} holds no classification diffusion model")
        train, test = load_images(args.data), load_images(args.data, "test")[: args.n]
        crops = None if args.cifar is None else load_images(args.cifar, "test")
    bits, middle = image_bits(model.log_prob, test), image_bits(model.log_prob, test, dequantised=False)
    gaussian, floor = pixel_gaussian_bits(train, test)
    error = bits.std() / len(bits) ** 0.5
    print(f"held-out images: {len(test)}, bits per dimension, one forward pass each")
    print(f"  dequantised                    {bits.mean():.3f} ± {error:.3f}")
    print(f"  at the middle of the interval  {middle.mean():.3f}")
    print(f"  training images, dequantised   {image_bits(model.log_prob, train[: args.n]).mean():.3f}")
    print(f"  a Gaussian for each pixel      {gaussian:.3f} (variances at least {floor:.1e}, the best choice here)")
    if args.flow:
        few, flow = test[: args.flow], partial(log_likelihood, model, prior_mean=0.5)
        flows = image_bits(flow, few, batch=32)
        one = image_bits(lambda x: model.log_q(x, torch.full((len(x),), len(model.sigmas) - 1)), few)
        error = flows.std() / len(few) ** 0.5
        print(f"  by the probability flow        {flows.mean():.3f} ± {error:.3f} (the first {len(few)}, at the least")
        print(f"                                 noise; in one pass there {one.mean():.3f})")
    base = base_of(model, train)
    own = image_bits(base.log_prob, test)
    print(f"  the Gaussian base alone        {own.mean():.3f}")
    print("AUROC of held-out images above                           the Gaussian base's own")
    for name, images in others(test, crops).items():
        other, of_base = image_bits(model.log_prob, images), image_bits(base.log_prob, images)
        score = f"{auroc(-bits, -other):.4f}   ({other.mean():.2f} bits per dimension)"
        print(f"  {name:29}  {score}   {auroc(-own, -of_base):.4f}")


if __name__ == "__main__":
    main()
