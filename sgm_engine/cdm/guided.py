"""How well samples of a classification diffusion model follow their labels, by the weight of guidance.

    python -m sgm_engine.cdm.guided --checkpoint model.safetensors --data mnist/ --out guided.png

draws as many of each digit with every weight, from the same noise, and prints the share that the evaluation's digit
classifier takes for the label, and the Fréchet distance of all to the test digits in that classifier's features. The
picture has a row of every digit for each weight. Weight 0 leaves the label out, 1 is the law of the label.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sgm_engine.checkpoints.bundled import plan_for
from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.data.sets import from_array, open_images
from sgm_engine.engine.engine import Engine
from sgm_engine.evaluation.evaluate import summarise
from sgm_engine.evaluation.features import Extractor, open_extractor
from sgm_engine.evaluation.frechet import frechet
from sgm_engine.files.writing import check_writable
from sgm_engine.outputs.images import grid, save_png, to_uint8
from sgm_engine.programs.arguments import Program, at_least, number


def drawn(model, n: int, guidance: float, plan=None) -> np.ndarray:
    """n samples of each label by ``plan``, or the model's: uint8 [labels, n, H, W, C]. Those of label k are k·n, …."""
    found = []
    for label in range(model.labels):
        told = model.with_class(label, guidance)
        x = Engine(told).sample(n, plan=plan or plan_for(told), first_id=label * n)
        found.append(to_uint8(x))
    return np.stack(found)


def followed(images: np.ndarray, extractor: Extractor) -> np.ndarray:
    """Of images uint8 [labels, n, H, W, C], whether the most probable class is the label: bool [labels, n]."""
    labels, n = images.shape[:2]
    pixels = torch.from_numpy(images.reshape(labels * n, *images.shape[2:])).permute(0, 3, 1, 2)
    return extractor(pixels).logits.argmax(1).reshape(labels, n) == np.arange(labels)[:, None]


def weights(text: str) -> list[float]:
    return [number(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    parser = Program("sgm_engine.cdm.guided", __doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of a network with labels")
    parser.add_argument("--data", type=Path, required=True, help="MNIST's IDX files")
    parser.add_argument("--n", type=at_least(2), default=50, help="samples of each label")
    parser.add_argument("--guidance", type=weights, default="0,1,2", metavar="W,…", help="weights")
    parser.add_argument("--out", type=Path, help="a picture of the first sample of each label")
    args = parser.parse_args(argv)
    with parser.reading():
        if args.out is not None:
            check_writable(args.out)
        model = load_checkpoint(args.checkpoint)
        if not getattr(model, "labels", 0):
            raise ValueError(f"argument --checkpoint: {args.checkpoint} knows no labels")
        digits = open_images(f"{args.data}:test")
    extractor = open_extractor("digits", None)
    reference, rows = summarise(digits.blocks(), extractor), []
    print(f"{args.n} samples of each of {model.labels} labels: share that follows, Fréchet distance without its bias")
    for guidance in args.guidance:
        images = drawn(model, args.n, guidance)
        right = followed(images, extractor)
        flat = images.reshape(-1, *images.shape[2:])
        e = frechet(summarise(from_array(flat.transpose(0, 3, 1, 2)).blocks(), extractor).moments, reference.moments)
        print(f"  guidance {guidance:g}  {right.mean():.3f}  {e.corrected:.2f} ({e.low:.2f}–{e.high:.2f})", flush=True)
        rows.append(images[:, 0])
    if args.out is not None:
        save_png(args.out, grid(np.concatenate(rows), columns=model.labels))


if __name__ == "__main__":
    main()
