"""What is timed of two revisions: each line names a workload and how to set it up.

``make`` runs in a process of its own with that revision's package and returns a call without arguments. Set-up is not
timed. Public names are used where there are any, so that it runs on an older revision too; what that lacks is said.
Calls take 1 to 200 ms: shorter ones are repeated, longer ones leave too few pairs for the minute that each has.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from bench.small import SIGMAS, cdm, ddpmpp, layers, mlp, ncsn, unet2d

Call = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """make: sets up and returns the call. clock: "process" (CPU time of all its threads), "children" (CPU time of
    processes that it starts) or "wall". quick: one of those that CI compares."""

    make: Callable[[], Call]
    clock: str = "process"
    threads: int = 1
    quick: bool = False


def randn(*shape: int, dtype: str = "float32", nhwc: bool = False):
    import torch

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    return x.to(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def update(shape: tuple[int, ...], dtype: str, nhwc: bool) -> Call:
    import torch

    from sgm_engine.kernels import ops

    x, score, batch = randn(*shape, nhwc=nhwc), randn(*shape, dtype=dtype, nhwc=nhwc), shape[0]
    row, stop, seed = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), 2**62), torch.full((batch,), 7)
    sample_id, bad_row = torch.arange(batch), torch.full((batch,), 2**63 - 1)
    coef, draw = torch.tensor([[1.0, 1e-3, 1e-2, 0.0]]), torch.ones(1, dtype=torch.int32)

    def call() -> None:
        row.zero_()
        ops.langevin_update_(x, score, coef, draw, row, stop, seed, sample_id, bad_row)

    return call


def norm(shape: tuple[int, ...], dtype: str, nhwc: bool, residual: bool = False) -> Call:
    import torch

    from sgm_engine.kernels import ops

    x = randn(*shape, dtype=dtype, nhwc=nhwc)
    gamma, alpha, beta = randn(10, 3 * shape[1]).split(shape[1], dim=1)
    level, added = torch.arange(shape[0]) % 10, x.clone() if residual else None
    return lambda: ops.noise_conditioned_norm(x, gamma, alpha, beta, level, "elu", added)


def noise(shape: tuple[int, ...]) -> Call:
    import torch

    from sgm_engine.kernels import ops

    out, seed, sample_id = torch.empty(shape), torch.full((shape[0],), 7), torch.arange(shape[0])
    return lambda: ops.noise_fill_(out, seed, sample_id, 0, 0, "normal")


def engine(make: Callable[[], object], batch: int, **options):
    import torch

    from sgm_engine import Engine

    torch.manual_seed(0)
    return Engine(make().eval(), batch=batch, **options)


def plan_of(model, rows: int):
    """Steps so short that random weights lead nowhere."""
    from sgm_engine import annealed_langevin

    sigmas = [float(s) for s in model.sigmas]
    plan = annealed_langevin(sigmas[-rows:], 1, step_lr=1e-9, denoise=False)
    return plan.on_levels(sigmas) if rows < len(sigmas) else plan


def sample(make: Callable[[], object], batch: int, rows: int = 2, **options) -> Call:
    """A request of ``batch`` samples, one chunk of ``rows`` evaluations."""
    e = engine(make, batch, **options)
    plan = plan_of(e.model, rows)
    return lambda: e.sample(batch, seed=0, plan=plan)


def few_evaluations(batch: int) -> Call:
    from sgm_engine import plan_of_nfe

    e = engine(ncsn, batch)
    plan = plan_of_nfe("heun", 9, 1.0, 0.01).on_levels(e.model.sigmas)
    return lambda: e.sample(batch, seed=0, plan=plan)


def inpaint(batch: int) -> Call:
    e = engine(ncsn, batch)
    known, mask, plan = randn(batch, 1, 28, 28), randn(28, 28) > 0, plan_of(e.model, 2)
    return lambda: e.inpaint(known, mask, plan=plan)


def request_of_the_service() -> Call:
    from sgm_engine import SamplerService

    e = engine(lambda: ncsn(8, 8), 4)
    service, plan = SamplerService(e), plan_of(e.model, 7)
    return lambda: [f.result() for f in [service.submit(3, seed=s, plan=plan) for s in range(4)]]


def first_sample() -> Call:
    from sgm_engine import Engine, load_bundled

    def call() -> None:
        model, _ = load_bundled()
        Engine(model, batch=1).sample(1, plan=plan_of(model, 1))

    return call


def trace(make: Callable[[], object]) -> Call:
    return lambda: engine(make, 1)


def native(make: Callable[[], object]):
    import torch

    from sgm_engine.executors.native.executor import NativeNetwork

    torch.manual_seed(0)
    model = make().eval()
    return NativeNetwork(model, 1, *model.shape[1:])


def evaluate(make: Callable[[], object]) -> Call:
    """One evaluation of one image, nothing around it."""
    import torch

    network = native(make)
    x, level = randn(1, *network.shape), torch.zeros(1, dtype=torch.int64)
    return lambda: network(x, level)


def pack(make: Callable[[], object]) -> Call:
    network = native(make)
    return lambda: network.sync(force=True)


def pictures(count: int = 1000) -> Call:
    from sgm_engine.images import save_png, to_uint8

    images, out = to_uint8(randn(count, 1, 28, 28).sigmoid()), tempfile.mkdtemp()
    return lambda: [save_png(f"{out}/{i:06d}.png", image) for i, image in enumerate(images)]


def job(what: str, n: int = 256) -> Call:
    """A job of n samples: written anew ("write"), all there ("resume"), or read and compared ("verify")."""
    from sgm_engine import generate

    e, places = engine(mlp, 64), itertools.count()
    plan, out = plan_of(e.model, 1), tempfile.mkdtemp()
    run = lambda to: generate(e, to, n, plan=plan, format="npz", shard_size=32)  # noqa: E731
    run(f"{out}/there")
    if what == "verify":
        from sgm_engine.jobs.verify import verify

        return lambda: verify(f"{out}/there")
    return lambda: run(f"{out}/there" if what == "resume" else f"{out}/{next(places)}")


def training_step(batch: int) -> Call:
    import torch

    from sgm_engine.keys import Key
    from sgm_engine.training.objectives import denoising

    torch.manual_seed(0)
    model, x, levels = ncsn(8), randn(batch, 1, 28, 28), torch.arange(batch) % len(SIGMAS)
    adam = torch.optim.Adam(model.parameters(), 1e-6)

    def call() -> None:
        adam.zero_grad()
        denoising(model, x, levels, Key(0, torch.arange(batch))).backward()
        adam.step()

    return call


def program(*arguments: str) -> Call:
    return lambda: subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)


WORKLOADS: dict[str, Workload] = {
    "update f32 nchw 32x3x32x32": Workload(lambda: update((32, 3, 32, 32), "float32", False)),
    "update bf16 nhwc 32x3x32x32": Workload(lambda: update((32, 3, 32, 32), "bfloat16", True)),
    "norm f32 nhwc 1x128x32x32": Workload(lambda: norm((1, 128, 32, 32), "float32", True)),
    "norm f32 nchw 1x128x32x32": Workload(lambda: norm((1, 128, 32, 32), "float32", False)),
    "norm bf16 nhwc 1x256x16x16": Workload(lambda: norm((1, 256, 16, 16), "bfloat16", True)),
    "norm f32 nhwc residual 8x64x28x28": Workload(lambda: norm((8, 64, 28, 28), "float32", True, residual=True)),
    "noise 32x3x32x32": Workload(lambda: noise((32, 3, 32, 32))),
    "convolutions 3x3 B=1": Workload(lambda: evaluate(layers), quick=True),
    "NCSN B=1": Workload(lambda: sample(ncsn, 1, 4), quick=True),
    "NCSN B=8": Workload(lambda: sample(ncsn, 8), quick=True),
    "NCSN B=8 two threads": Workload(lambda: sample(ncsn, 8), "wall", threads=2),
    "NCSN bfloat16 B=1": Workload(lambda: sample(lambda: ncsn(64), 1, precision="bfloat16")),
    "NCSNv2 B=1": Workload(lambda: sample(lambda: ncsn(version=2), 1, 4)),
    "NCSNv2 B=8": Workload(lambda: sample(lambda: ncsn(version=2), 8)),
    "UNet2DModel B=1": Workload(lambda: sample(unet2d, 1, 4)),
    "UNet2DModel B=8": Workload(lambda: sample(unet2d, 8), quick=True),
    "DDPM++ B=1": Workload(lambda: sample(ddpmpp, 1, 4)),
    "DDPM++ B=8": Workload(lambda: sample(ddpmpp, 8)),
    "CDM B=1": Workload(lambda: sample(cdm, 1, 4)),
    "CDM B=8": Workload(lambda: sample(cdm, 8)),
    "MLP B=1": Workload(lambda: sample(mlp, 1, 4)),
    "MLP B=8": Workload(lambda: sample(mlp, 8, 4)),
    "eager NCSN B=1": Workload(lambda: sample(ncsn, 1, executor="eager")),
    "nine evaluations NCSN B=4": Workload(lambda: few_evaluations(4)),
    "annealed plan NCSN 8x8 B=1": Workload(lambda: sample(lambda: ncsn(8, 8), 1, 7)),
    "inpainting NCSN B=4": Workload(lambda: inpaint(4)),
    "Python's side of a request": Workload(lambda: sample(lambda: ncsn(4, 8), 1, 1), quick=True),
    "requests of the service": Workload(request_of_the_service),
    "first sample: load, pack": Workload(first_sample),
    "trace DDPM++": Workload(lambda: trace(ddpmpp)),
    "pack NCSN ngf 64": Workload(lambda: pack(lambda: ncsn(64))),
    "pack convolutions 3x3": Workload(lambda: pack(layers)),
    "1,000 PNGs": Workload(pictures),
    "job: write 256 samples": Workload(lambda: job("write")),
    "job: resume": Workload(lambda: job("resume")),
    "job: verify": Workload(lambda: job("verify")),
    "training step NCSN ngf 8 B=8": Workload(lambda: training_step(8)),
    "import sgm_engine": Workload(lambda: program("-c", "import sgm_engine"), "children"),
    "sgm --help": Workload(lambda: program("-m", "sgm_engine", "--help"), "children"),
}
