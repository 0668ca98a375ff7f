"""What precision="float8" does to scores and samples, emulated on a CPU: ``python -m bench.float8 [--out DIR]``.

Prints the relative error (L2) of one evaluation of the bundled network in each precision, level by level, then draws
--n samples in each, of the same noise, for ``sgm eval`` to compare, and a picture of the first (docs/float8.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sgm_engine import Engine, accelerate, at_sigmas, calibrate_float8, load_bundled, plan_of_nfe
from sgm_engine.checkpoints.bundled import plan_for
from sgm_engine.outputs import images
from sgm_engine.outputs.output import Output
from sgm_engine.programs.arguments import Program, at_least, positive

NFE, CALIBRATING_SEED = 10, 1000
PRECISIONS = ("float32", "bfloat16", "float8")


def engines(model: nn.Module, batch: int, margin: float) -> dict[str, Engine]:
    float8 = calibrate_float8(model, seed=CALIBRATING_SEED, margin=margin, emulate=True)
    print(f"scales: {float8.source}")
    options = {"float8": {"float8": float8}}
    return {p: Engine(model, batch, precision=p, executor="eager", **options.get(p, {})) for p in PRECISIONS}


@torch.no_grad()
def errors(margin: float) -> None:
    model, _ = load_bundled()
    level = torch.arange(len(model.sigmas))
    noise = torch.Generator().manual_seed(0)
    clean = load_images(len(level))
    x = clean + model.sigmas[:, None, None, None] * torch.randn(clean.shape, generator=noise)
    scores = {}
    for precision, engine in engines(model, len(level), margin).items():
        engine._network.sync()
        scores[precision] = engine._network(x, level).float()
    exact = scores["float32"].flatten(1)
    for precision in PRECISIONS[1:]:
        error = (scores[precision].flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)
        print(f"{precision}, level 0 to {level[-1]}: " + " ".join(f"{e:.2%}" for e in error))


def load_images(n: int) -> torch.Tensor:
    """Samples of the bundled weights: what the network is trained to see under noise."""
    model, _ = load_bundled()
    return Engine(model, n).sample(n, CALIBRATING_SEED + 1, plan_for(model, "annealed_langevin"))


def draw(n: int, seed: int, margin: float, out: Path) -> None:
    """float32, bfloat16 and float8.safetensors in ``out``, of an SDE-DPM-Solver++(2M) of ten evaluations."""
    model, _ = load_bundled()
    plan = plan_of_nfe("sde_dpm_solver_2m", NFE, float(model.sigmas[0]), float(model.sigmas[-1]))
    model, plan = accelerate(at_sigmas(model, plan.sigmas)), plan.on_levels(plan.sigmas)
    out.mkdir(parents=True, exist_ok=True)
    samples = {}
    for precision, engine in engines(model, 16, margin).items():
        samples[precision] = x = engine.sample(n, seed, plan)
        Output.parse(f"{out}/{precision}.safetensors").write(x, range(n))
        print(f"{out}/{precision}.safetensors: {engine.describe()}", flush=True)
        apart = (x - samples["float32"]).square().mean((1, 2, 3)).sqrt()
        print(f"  from float32 by {apart.median():.2g} (median), {apart.max():.2g} (most)")
    shown = torch.cat([x[:16] for x in samples.values()])
    images.save_png(out / "rows.png", images.grid(images.to_uint8(shown), columns=16))


def main() -> None:
    parser = Program("bench.float8", __doc__.splitlines()[0])
    parser.add_argument("--n", type=at_least(1), default=1000, metavar="N", help="samples")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of their noise")
    parser.add_argument("--margin", type=positive, default=2.0, metavar="X", help="of the scales")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where they go; without it only the errors are shown")
    args = parser.parse_args()
    errors(args.margin)
    if args.out:
        draw(args.n, args.seed, args.margin, args.out)


if __name__ == "__main__":
    main()
