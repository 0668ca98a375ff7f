"""What the two terms of the loss are good for: cross entropy alone, squared error alone, both. Points in the plane.

    python -m sgm_engine.cdm.ablation --out ablation

writes table.md there. The exact classifier of the mixture is known, so every column has a truth to be compared with.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from sgm_engine.files.writing import write_file
from sgm_engine.keys import Key
from sgm_engine.models.cdm.classes import NoiseClasses, ddpm
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.networks import MLP
from sgm_engine.programs.arguments import Program, at_least
from sgm_engine.training.cdm_objective import cdm
from sgm_engine.training.toy import TRIPLE

CLASSES = ddpm(50, 0.002, 0.4)
STEPS, BATCH, SEEDS = 2500, 256, 3
LOSSES = {"CE": (1.0, 0.0), "MSE": (0.0, 1.0), "0.001·CE + MSE": (0.001, 1.0), "CE + MSE": (1.0, 1.0)}
COLUMNS = ("CE − Bayes' error", "MSE of ε̂ − the least possible", "NLL of data − their entropy")


def train(
    network: MLP,
    classes: NoiseClasses,
    steps: int = STEPS,
    batch: int = BATCH,
    weights: tuple[float, float] = (1.0, 1.0),
    lr: float = 5e-3,
    seed: int = 0,
) -> CDM:
    """``network`` trained on the mixture by ``weights`` of cross entropy and squared error, lr falling to 0."""
    model, count = CDM(network, classes), classes.levels + 2
    adam = torch.optim.Adam(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: 1 - k / steps)
    for k in range(steps):
        key = Key(seed, torch.arange(k * batch, (k + 1) * batch))
        t = (key.uniform(torch.empty(batch, 1), 2)[:, 0] * count).long()
        loss = cdm(model, TRIPLE.sample(key).float(), t, key.after(3), ce_weight=weights[0], mse_weight=weights[1])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    return model.eval()


class Exact(torch.nn.Module):
    """The perfect classifier of the mixture: its log densities with each class's noise, [N, T + 2] float64."""

    def __init__(self, classes: NoiseClasses):
        super().__init__()
        self.signal, self.noise = (torch.tensor(v) for v in (classes.signal, classes.noise))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        away = u.flatten(1).double()[:, None, None] - self.signal[:, None, None] * TRIPLE.means  # [N, T + 2, K, D]
        variance = self.signal[:, None] ** 2 * TRIPLE.stds**2 + self.noise[:, None] ** 2
        exponent = -away.square().sum(3) / (2 * variance) - TRIPLE.dim / 2 * torch.log(2 * torch.pi * variance)
        return (TRIPLE.weights.log() + exponent).logsumexp(2)


def measures(model: CDM, n: int = 20_000, part: int = 2000) -> list[float]:
    """[CE, MSE, NLL of data], means over n fresh points; classes in turn."""
    total = torch.zeros(3, dtype=torch.float64)
    for first in range(0, n, part):
        key = Key(77, torch.arange(first, first + part))
        x, t = TRIPLE.sample(key).float(), torch.arange(part) % model.training_levels
        for i, weights in enumerate(((1.0, 0.0), (0.0, 1.0))):
            loss = cdm(model, x, t, key.after(2), ce_weight=weights[0], mse_weight=weights[1])
            total[i] += loss.detach() * part / n
        with torch.no_grad():
            total[2] -= model.log_prob(x).mean() * part / n
    return total.tolist()


def main(argv: list[str] | None = None) -> None:
    parser = Program("sgm_engine.cdm.ablation", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="folder of table.md")
    parser.add_argument("--steps", type=at_least(1), default=STEPS, help="of each network")
    parser.add_argument("--seeds", type=at_least(1), default=SEEDS, help="networks of each loss")
    args = parser.parse_args(argv)
    with parser.reading():
        args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are too small to share out
    truth = measures(CDM(Exact(CLASSES), CLASSES))
    points = f"{args.steps * BATCH:,} points, {args.seeds} seeds: mean (least–most)"
    lines = [f"Exact: CE {truth[0]:.4f}, MSE {truth[1]:.4f}, NLL {truth[2]:.4f} nats. After {points}", ""]
    lines += [f"| trained on | {' | '.join(COLUMNS)} |", "|---|---|---|---|"]
    for name, weights in LOSSES.items():
        start = time.process_time()
        runs = [train(MLP(2, CLASSES, seed=s), CLASSES, args.steps, weights=weights, seed=s) for s in range(args.seeds)]
        gaps = torch.tensor([measures(model) for model in runs]) - torch.tensor(truth)
        lines.append(f"| {name} | " + " | ".join(map(_range, gaps.unbind(1))) + " |")
        print(f"{lines[-1]}  ({time.process_time() - start:.0f} s)", flush=True)
    write_file(args.out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def _range(v: torch.Tensor) -> str:
    return f"{v.mean():.4f} ({v.min():.4f}–{v.max():.4f})"


if __name__ == "__main__":
    main()
