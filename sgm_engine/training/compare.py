"""Does it help to train on several noisy copies? One experiment on a 2-D mixture with a known score.

    python -m sgm_engine.training.compare --out multi-sample
    python -m sgm_engine.training.compare --data mnist/           how noisy the targets are, on images: no training

writes table.md and plot.png there. Every network has the same hidden layers and sees as many evaluations; noise levels
are matched by what an observation tells, σ/√M. docs/training.md says what came out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.checks import check_int
from sgm_engine.data.images import dequantise, load_images
from sgm_engine.files.writing import staged, write_file
from sgm_engine.keys import Key
from sgm_engine.plans.schedule import geometric
from sgm_engine.programs.arguments import Program, at_least
from sgm_engine.training import multisample, objectives
from sgm_engine.training.toy import TRIPLE, ScoreMLP, gap

LEVELS = geometric(2, 0.1, 8)
STEPS, BATCH, REFERENCE, SEEDS = 1500, 256, 64, 3


class MultiSampleMLP(nn.Module):
    """M copies as channels [N, M·D], level → x̂ [N, D], with sigmas·√M: at each level the information of ``sigmas``."""

    def __init__(self, sigmas, copies: int, seed: int = 0):
        super().__init__()
        self.inner, self.copies = ScoreMLP(sigmas, seed=seed), copies
        first = self.inner.layers[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner.layers[0] = nn.Linear(2 * copies + 1, first.out_features)
        self.register_buffer("sigmas", self.inner.sigmas * copies**0.5)

    def forward(self, ys: Tensor, level: Tensor) -> Tensor:
        mean = ys.unflatten(1, (self.copies, -1)).mean(1)
        sigma = self.inner.sigmas[level][:, None]  # of the mean
        total = (sigma**2 + self.inner.sigma_data**2).sqrt()
        # scaled like one copy's input at the mean's noise: all M copies go in, as the objective has it
        hidden = self.inner.layers(torch.cat([ys / (total * self.copies**0.5), sigma.log() / 4], 1))
        return mean + sigma**2 * (self.inner.sigma_data / (sigma * total) * hidden - mean / total**2)


class AsScore(nn.Module):
    """The score of a MultiSampleMLP at x with noise ``sigmas``: fed M copies whose mean is x."""

    def __init__(self, model: MultiSampleMLP):
        super().__init__()
        self.model, self.sigmas = model, model.inner.sigmas

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        sigma = self.model.sigmas[level][:, None]
        ys = multisample.copies_of(x, sigma, self.model.copies, Key(77, torch.arange(len(x))))
        return multisample.score(self.model(ys, level), x, sigma, self.model.copies)


def train(objective, model: nn.Module, seed: int, steps: int = STEPS, batch: int = BATCH) -> nn.Module:
    """``steps`` of Adam, the learning rate falling to 0: steps·batch network evaluations."""
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 1 - t / steps)
    for t in range(steps):
        key = Key(seed, torch.arange(t * batch, (t + 1) * batch))
        levels = (key.uniform(torch.empty(batch, 1), 2)[:, 0] * len(model.sigmas)).long()
        loss = objective(model, TRIPLE.sample(key).float(), levels, key.after(3))
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return model


def stable(model: nn.Module, x: Tensor, levels: Tensor, key: Key) -> Tensor:
    """The stable target field over the batch and REFERENCE more points."""
    ids = key.sample_id[:1] + (1 << 40) + torch.arange(REFERENCE)
    reference = TRIPLE.sample(Key(key.seed, ids)).float()
    return objectives.stable_target(model, x, levels, key, reference=reference)


def methods(steps: int = STEPS, batch: int = BATCH) -> dict[str, object]:
    """What is compared: name → function of a seed that returns a trained score model at LEVELS."""
    many = {
        f"{m} copies, stacked": lambda seed, m=m: AsScore(
            train(partial(objectives.multi_sample, copies=m), MultiSampleMLP(LEVELS, m, seed), seed, steps, batch)
        )
        for m in (2, 4, 16)
    }
    one = lambda objective: lambda seed: train(objective, ScoreMLP(LEVELS, seed=seed), seed, steps, batch)  # noqa: E731
    return {"1 copy (denoising)": one(objectives.denoising), **many, "stable target field": one(stable)}


def facts(n: int = 200_000) -> list[str]:
    """The exact numbers of the mixture at σ = 0.8, by Monte Carlo over ``n`` points: lines of a Markdown table."""
    key, sigma = Key(0, torch.arange(n)), 0.8
    x = TRIPLE.sample(key)
    lines = [
        "| M | MSE of E[x given M copies], a dimension | (x̂ − ȳ)/σ² as the score at σ: relative error |",
        "|---|---|---|",
    ]
    for m in (1, 2, 4, 16):
        ys = torch.stack([x + sigma * key.normal(x, 2 + i) for i in range(m)])
        mean, s = multisample.tweedie(ys, sigma)
        mse = (TRIPLE.denoised(mean, s) - x).square().mean().item()
        y, exact = ys[0], TRIPLE.score(ys[0], sigma)
        published = (TRIPLE.denoised(y, s) - y) / sigma**2
        wrong = ((published - exact).square().mean() / exact.square().mean()).sqrt().item()
        lines.append(f"| {m} | {mse:.4f} | {wrong:.2f} |")
    lines += ["", "| reference batch n | MSE of the stable target about the true one, a dimension |", "|---|---|"]
    for size in (1, 4, 16, 64):
        lines.append(f"| {size} | {target_error(size, sigma):.4f} |")
    return lines


def target_error(size: int, sigma: float, n: int = 40_000) -> float:
    """MSE a dimension of Σ_j softmax_j·x_j over the true x and size − 1 other points, about E[x | y]."""
    check_int("size", size, 1)
    key = Key(1, torch.arange(n))
    x = TRIPLE.sample(key)
    y = x + sigma * key.normal(x, 2)
    others = TRIPLE.sample(Key(2, torch.arange(n * (size - 1)))).view(n, size - 1, 2)
    candidates = torch.cat([x[:, None], others], 1)
    weight = (-(y[:, None] - candidates).square().sum(2) / (2 * sigma**2)).softmax(1)
    target = (weight[:, :, None] * candidates).sum(1)
    return (target - TRIPLE.denoised(y, sigma)).square().mean().item()


def image_targets(images: np.ndarray, sigmas: Sequence[float], n: int = 256, sizes=(64, 320, 1088)) -> list[str]:
    """How far the targets for ``n`` of the images lie from the exact one, E[x | y] over all of them, uint8 [N, …].

    Mean square a dimension in units of σ²: of x itself, the target of denoising and, at the same noise of the mean, of
    any number of copies; and of the stable target over the image and ``size`` − 1 others. Lines of a Markdown table.
    """
    key = Key(0, torch.arange(len(images)))
    x = torch.from_numpy(np.array(images)).flatten(1)
    x = dequantise(x, key.uniform(x.float()))
    own = Key(0, torch.arange(n))
    lines = [
        "| σ | x itself |" + "".join(f" stable target of {size} |" for size in sizes),
        "|---" * (2 + len(sizes)) + "|",
    ]
    for i, sigma in enumerate(sigmas):
        y, column = x[:n] + sigma * own.normal(x[:n], 1 + i), torch.full((n, 1), float(sigma))
        exact = objectives.posterior_mean(y, x, column)
        targets = [x[:n]]
        for size in sizes:  # every image with its own others, drawn from the rest
            others = (own.uniform(torch.empty(n, size - 1), 100 + i) * (len(x) - n)).long() + n
            one = [torch.cat([x[j : j + 1], x[others[j]]]) for j in range(n)]
            found = (objectives.posterior_mean(y[j : j + 1], one[j], column[:1]) for j in range(n))
            targets.append(torch.cat(list(found)))
        errors = [(target - exact).square().mean().item() / sigma**2 for target in targets]
        lines.append(f"| {sigma:.3g} |" + "".join(f" {e:.2e} |" for e in errors))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Program("sgm_engine.training.compare", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("multi-sample"), help="folder of table.md and plot.png")
    parser.add_argument("--steps", type=at_least(1), default=STEPS, help="of each network")
    parser.add_argument("--data", type=Path, help="images: print how noisy their targets are, and train nothing")
    args = parser.parse_args(argv)
    if args.data is not None:
        with parser.reading():
            images = load_images(args.data)[:10_000]
        print("\n".join(image_targets(images, geometric(5, 0.01, 10))))
        return
    with parser.reading():
        import matplotlib  # noqa: F401 - of the picture: missed now rather than at the end

        args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are too small to share out
    key, gaps = Key(99, torch.arange(40_000)), {}
    for name, make in methods(args.steps).items():
        start = time.process_time()
        gaps[name] = [gap(make(seed), TRIPLE, key) for seed in range(SEEDS)]
        print(f"{name:24} {_range(gaps[name])}  ({time.process_time() - start:.0f} s)", flush=True)
    evaluations = f"{args.steps * BATCH:,} network evaluations, {SEEDS} seeds"
    table = [f"Relative gap to the true score after {evaluations}: mean (least–most)", "", "| trained on | gap |"]
    table += ["|---|---|", *(f"| {name} | {_range(g)} |" for name, g in gaps.items())]
    text = "\n".join([*facts(), "", *table]) + "\n"
    write_file(args.out / "table.md", text)
    _plot(gaps, evaluations, args.out / "plot.png")
    print(text)


def _range(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def _plot(gaps: dict[str, list[float]], evaluations: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((7, 3), layout="constrained")
    axes = figure.subplots()
    for row, values in enumerate(gaps.values()):
        axes.plot([min(values), max(values)], [row, row], color="0.7", linewidth=4, solid_capstyle="butt")
        axes.plot(values, [row] * len(values), "o", color="C0")
        axes.annotate(f"{sum(values) / len(values):.3f}", (max(values), row), (8, -3), textcoords="offset points")
    axes.set(yticks=range(len(gaps)), yticklabels=list(gaps), xlim=(0, 1.15 * max(map(max, gaps.values()))))
    axes.set(xlabel="relative gap to the true score (0 is perfect)", title=evaluations)
    axes.invert_yaxis()
    with staged(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main()
