"""Several noisy copies, stable targets and plain denoising on digits, at equal cost and with paired seeds.

    python -m sgm_engine.training.compare_images --data mnist/ --out digits

trains each as `sgm train --config mnist_multi_sample` does, draws from each with the same noise, and writes table.md
and digits.png. Killed, the same command goes on where it was. Run k of every method meets the same images, levels and
noise, and the same first weights where shapes agree: functions of (k, sample).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.checkpoints.bundled import plan_for
from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.data.images import dequantise, load_images
from sgm_engine.data.sets import from_array, open_images
from sgm_engine.engine.engine import Engine
from sgm_engine.evaluation.draw import drawn
from sgm_engine.evaluation.evaluate import Summary, summarise
from sgm_engine.evaluation.features import Extractor, open_extractor
from sgm_engine.evaluation.frechet import frechet, frechet_difference
from sgm_engine.files.writing import write_file
from sgm_engine.keys import Key
from sgm_engine.outputs.images import grid, save_png
from sgm_engine.programs.arguments import Program, at_least
from sgm_engine.training.compare import image_targets
from sgm_engine.training.config import TrainConfig
from sgm_engine.training.run import log, prepare

CONFIG, SIZE = "mnist_multi_sample", 14  # the digits at half their resolution
METHODS = {
    "denoising": {"objective": "denoising", "copies": 1},
    "stable_target": {"objective": "stable_target", "copies": 1, "reference_batch": 1024},
    "multi_sample-2": {"copies": 2},
    "multi_sample-4": {"copies": 4},
}
N, HELD_OUT, SHOWN = 2000, 256, 16


def trained(method: str, seed: int, data: Path, out: Path, changes: dict[str, object]) -> nn.Module:
    """The score model at the end of run out/method.seed, which is begun or resumed if it is not whole."""
    folder = out / f"{method}.{seed}"
    config = TrainConfig.read(CONFIG, METHODS[method] | {"image_size": SIZE, "seed": seed} | changes)
    prepare(config, data, folder).fit("cpu")
    return load_checkpoint(folder / "model.safetensors")


def held_out_losses(model: nn.Module, images: np.ndarray) -> Tensor:
    """½‖σ·s(x + σ·z) + z‖² of uint8 images [N, …] at each of the model's levels: float64 [N, L], the same z for all."""
    key = Key(0, torch.arange(len(images)))
    x = torch.from_numpy(np.array(images))
    x = dequantise(x, key.uniform(x.float()))
    found = []
    for level, sigma in enumerate(model.sigmas.tolist()):
        z = key.normal(x, 1 + level)
        with torch.no_grad():
            score = model(x + sigma * z, torch.full((len(x),), level))
        found.append(0.5 * (sigma * score + z).double().square().flatten(1).sum(1))
    return torch.stack(found, 1)


def samples(model: nn.Module, extractor: Extractor, n: int) -> tuple[Summary, Tensor]:
    """n samples of the model's own plan, seed 0, in features; and the first SHOWN pictures, uint8 [SHOWN, C, H, W]."""
    engine, first = Engine(model, batch=64, executor="eager"), []

    def blocks():
        for block in drawn(engine, plan_for(model), range(n), 0, lost):
            first.append(block[:SHOWN])
            yield block

    lost: list = []
    summary = summarise(blocks(), extractor, total=n)
    if lost:
        raise ValueError(f"{len(lost)} samples diverged, such as {lost[0]}")
    return summary, first[0]


def compare(models: dict[tuple[str, int], nn.Module], extractor: Extractor, test: np.ndarray, n: int):
    """Lines of a Markdown table, and the first pictures of each model [models·SHOWN, C, H, W].

    models: by (method, seed). Differences are to "denoising" of the same seed, with 95% intervals.
    """
    reference = summarise(from_array(test).blocks(), extractor)
    found, pictures = {}, []
    lines = [
        "| method | seed | Fréchet distance (95%) | minus denoising's (95%) | held-out loss | minus denoising's |",
        "|---|---|---|---|---|---|",
    ]
    for (method, seed), model in models.items():
        summary, first = samples(model, extractor, n)
        loss = held_out_losses(model, test[:HELD_OUT]).mean(1)
        found[method, seed] = (summary, loss)
        pictures.append(first)
        distance = frechet(summary.moments, reference.moments)
        cells = [f"{distance.value:.2f} ({distance.low:.2f} … {distance.high:.2f})", "", f"{loss.mean():.2f}", ""]
        if method != "denoising" and ("denoising", seed) in found:
            base, base_loss = found["denoising", seed]
            d = frechet_difference(summary.moments, base.moments, reference.moments)
            gap = loss - base_loss
            half = 1.96 * gap.std() / len(gap) ** 0.5
            cells[1] = f"{d.value:+.2f} ({d.low:+.2f} … {d.high:+.2f})"
            cells[3] = f"{gap.mean():+.2f} ({gap.mean() - half:+.2f} … {gap.mean() + half:+.2f})"
        lines.append(f"| {method} | {seed} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines, torch.cat(pictures)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Program("sgm_engine.training.compare_images", __doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder of runs, table.md and digits.png")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="runs of each method")
    parser.add_argument("--steps", type=at_least(1), help="of each run (default: the config's)")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="A,B", help="of these")
    parser.add_argument("--n", type=at_least(2), default=N, help="samples of each")
    args = parser.parse_args(argv)
    named = args.methods.split(",")
    if unknown := [m for m in named if m not in METHODS]:
        parser.error(f"argument --methods: must be of {', '.join(METHODS)}, got {unknown[0]!r}")
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    changes = {} if args.steps is None else {"steps": args.steps}
    runs = [(method, seed) for seed in range(args.seeds) for method in METHODS if method in named]
    with parser.reading():
        train, test = (load_images(args.data, split, size=SIZE) for split in ("train", "test"))
        labelled = from_array(train, "the training digits", open_images(f"{args.data}:train").labels)
        args.out.mkdir(parents=True, exist_ok=True)
    extractor = open_extractor(f"classifier:{args.out / 'classifier.safetensors'}", labelled, log.info)
    models = {run: trained(*run, args.data, args.out, changes) for run in runs}
    few = train[:10_000]
    targets = image_targets(few, next(iter(models.values())).sigmas.tolist(), min(64, len(few) // 4))
    lines, pictures = compare(models, extractor, test, args.n)
    text = "\n".join([f"{args.n} samples each; features: {extractor.name}", "", *lines, "", *targets]) + "\n"
    write_file(args.out / "table.md", text)
    rows = torch.cat([torch.from_numpy(test[:SHOWN]), pictures])
    save_png(args.out / "digits.png", grid(rows.permute(0, 2, 3, 1).numpy(), columns=SHOWN))
    print(text)


if __name__ == "__main__":
    main()
