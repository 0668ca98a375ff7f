"""How far bfloat16 takes a chain away from float32: ``python -m bench.drift [--n 16] [--seed 0] [--precision float8]``.

The same samples of the bundled weights, the same noise, drawn in both precisions (float8: emulated). Printed at the end
of each level: the root mean square difference of the states over all pixels, in units of x and of that level's sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_engine import Engine, calibrate_float8, load_bundled
from sgm_engine.checkpoints.bundled import plan_for
from sgm_engine.programs.arguments import Program, at_least


def states(precision: str, n: int, seed: int) -> tuple[list[Tensor], object]:
    """The states after each row, float32 [rows][n, C, H, W], and the plan."""
    model, _ = load_bundled()
    plan = plan_for(model, "annealed_langevin")
    kept: list[Tensor] = []
    options = {}
    if precision == "float8":
        options = {"float8": calibrate_float8(model, seed=seed + 1, emulate=True), "executor": "eager"}
    engine = Engine(model, batch=n, precision=precision, **options)
    engine.sample(n, seed=seed, plan=plan, callback=lambda info: kept.append(info.x.clone()))
    return kept, plan


def main() -> None:
    parser = Program("bench.drift", __doc__.splitlines()[0])
    parser.add_argument("--n", type=at_least(2), default=16, metavar="N", help="samples")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of their noise")
    parser.add_argument("--precision", choices=("bfloat16", "float8"), default="bfloat16", help="beside float32")
    args = parser.parse_args()
    (exact, plan), (rounded, _) = (states(precision, args.n, args.seed) for precision in ("float32", args.precision))
    print("   row      sigma   rms difference    of sigma")
    for row in range(plan.nfe):
        if row + 1 == plan.nfe or plan.sigma[row + 1] != plan.sigma[row]:
            rms = (exact[row] - rounded[row]).square().mean().sqrt().item()
            print(f"{row:6d} {plan.sigma[row]:10.4g} {rms:16.3g} {rms / plan.sigma[row]:11.3g}")
    far = (exact[-1] - rounded[-1]).square().mean((1, 2, 3)).sqrt()
    spread = torch.cdist(exact[-1].flatten(1), exact[-1].flatten(1))
    typical = spread[spread > 0].median().item() / exact[-1][0].numel() ** 0.5
    print(f"a sample differs by {far.median():.3g} (median), {far.max():.3g} (most); two samples by {typical:.3g}")


if __name__ == "__main__":
    main()
