"""A step of NCSN CIFAR-10 and whole chains: the engine against every peer, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from bench.gpu import timing
from bench.gpu.stages import Row
from bench.gpu.timing import DEVICE
from bench.peers import plain as without_kernels

BATCHES = (1, 16, 128)
CHAINS = ((1, 100), (16, 100), (128, 20))  # batch, steps a level: 1,001 evaluations, or a part of them
NGF, SIDE = 128, 32
FLOPS, BYTES = (
    19.79e9,
    58e6,
)  # of an image and evaluation: convolutions; reads and writes of activations, fused, in bf16
WEIGHTS = 60e6  # bytes of bf16 weights, read once a step
NFE = 1001  # of an image
# name → what an Engine is made with; the first is what the peers are measured against.
ENGINES: dict[str, dict] = {
    "graph bfloat16": {"precision": "bfloat16", "executor": "graph"},
    "graph bfloat16, cuDNN timed": {"precision": "bfloat16", "executor": "graph", "graph": {"benchmark": True}},
    "graph bfloat16, 8 steps a graph": {"precision": "bfloat16", "executor": "graph", "graph": {"unroll": 8}},
    "graph float8": {"precision": "float8", "executor": "graph"},
    "graph float16": {"precision": "float16", "executor": "graph"},
    "graph tf32": {"precision": "tf32", "executor": "graph"},
    "graph float32": {"precision": "float32", "executor": "graph"},
    "eager bfloat16": {"precision": "bfloat16", "executor": "eager"},
}


def network():
    from sgm_engine.models.ncsn import NCSN

    torch.manual_seed(0)
    sigmas = torch.logspace(0, -2, 10)
    model = NCSN(sigmas, channels=3, ngf=NGF, image_size=SIDE).eval().to(DEVICE, memory_format=torch.channels_last)
    return model.requires_grad_(False), sigmas


def peers(model: torch.nn.Module, batch: int) -> dict[str, Callable]:
    """Name → maker of (score function, whether the whole step goes into a manual CUDA graph)."""
    network = without_kernels(model).to(torch.bfloat16)

    def plain(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return network(x.bfloat16(), level)

    def compiled(**options: str) -> Callable:
        torch._dynamo.reset()
        return torch.compile(plain, **options)

    makers = {
        "eager": lambda: (plain, False),
        "eager + manual graph": lambda: (plain, True),
        "compile": lambda: (compiled(), False),
        "compile reduce-overhead": lambda: (compiled(mode="reduce-overhead"), False),
        "compile + manual graph": lambda: (compiled(), True),
    }
    if batch == 128:  # its tuning takes minutes
        makers["compile max-autotune"] = lambda: (compiled(mode="max-autotune"), False)
    return makers


def checked(score: torch.Tensor, want: torch.Tensor, most: float = 0.1) -> float:
    """The relative error of a score; RuntimeError if it is more than 16 bits explain, or ``most``."""
    error = float((score.float() - want).norm() / want.norm())
    if not error < most:
        raise RuntimeError(f"score differs from float32 by {error:.3g}")
    return error


def engine_of(model: torch.nn.Module, batch: int, options: dict):
    from sgm_engine.acceleration import accelerate
    from sgm_engine.calibration import calibrate_float8
    from sgm_engine.engine import Engine
    from sgm_engine.graphs import GraphConfig

    options, fast = dict(options), accelerate(model)
    if options["precision"] == "float8":
        options["float8"] = calibrate_float8(fast, device=DEVICE)
    if "graph" in options:
        options["graph"] = GraphConfig(**options["graph"])
    return Engine(fast, batch=batch, device=DEVICE, **options)


def engine_rows(model, sigmas, x, level, want) -> Iterator[Row]:
    """Of each way to run the engine: time, launches, gaps between them, and the share of what the device could do."""
    from sgm_engine.plan import annealed_langevin

    batch, plan = len(x), annealed_langevin(sigmas, steps_per_level=10)
    floor_ms = 1e3 * max(FLOPS * batch / timing.peak_flops(), (BYTES * batch + WEIGHTS) / timing.copy_bandwidth())
    for name, options in ENGINES.items():
        row: Row = {"case": f"engine {name}", "batch": batch}
        if options["precision"] == "float8" and torch.cuda.get_device_capability() < (8, 9):
            continue
        try:
            engine = engine_of(model, batch, options)
            engine.sample(batch, plan=plan)
            before, began = engine.stats.steps, time.perf_counter()
            engine.sample(batch, plan=plan)
            torch.cuda.synchronize()
            steps = engine.stats.steps - before
            row["ms a step"] = ms = (time.perf_counter() - began) * 1e3 / steps
            most = 0.3 if options["precision"] == "float8" else 0.1  # of weights that are random
            with torch.no_grad():
                row["score error"] = checked(engine._network(x, level), want, most)
            launches, busy_ms = timing.kernels_of(lambda e=engine: e._executor.run(1))  # slots are idle: no update
            row |= {"kernels a step": launches, "gaps": max(0.0, 1 - busy_ms / ms), "share of roofline": floor_ms / ms}
            row["images/s"] = batch * 1e3 / (ms * NFE)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        yield row


def step_times() -> Iterator[Row]:
    """One step of NCSN CIFAR-10 (channels-last; x float32) by the engine and by each peer, in one run.

    What takes longest to compile comes last, so that it is what is missing if the time is over.
    """
    from sgm_engine.acceleration import accelerate

    model, sigmas = network()
    fast = accelerate(model)
    problems, fastest = {}, {}
    for batch in BATCHES:
        x = torch.rand(batch, 3, SIDE, SIDE, device=DEVICE).contiguous(memory_format=torch.channels_last)
        level = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        problems[batch] = x, level, model(x, level)  # what every score at x is checked against
        for row in engine_rows(fast, sigmas, *problems[batch]):
            fastest.setdefault(batch, row.get("ms a step"))
            yield row
    makers = {batch: peers(model, batch) for batch in BATCHES}
    for name in dict.fromkeys(name for found in makers.values() for name in found):
        for batch, found in makers.items():
            if name in found:
                with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                    row = peer_row(name, found[name], *problems[batch], fastest[batch])
                yield row


def peer_row(name: str, make: Callable, x, level, want, engine_ms: float | None) -> Row:
    row: Row = {"case": name, "batch": len(x)}
    try:
        with torch.no_grad():
            score, manual = make()
            row["score error"] = checked(score(x, level), want)
            state = x.clone()
            step = lambda: timing.peer_step(score, state, level)  # noqa: E731
            row["ms a step"] = ms = timing.milliseconds(timing.graphed(step) if manual else step)
            row["images/s"] = len(x) * 1e3 / (ms * NFE)
            row["engine is faster by"] = ms / engine_ms if engine_ms else None
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    return row


def end_to_end() -> Iterator[Row]:
    """Images a second of the engine's chains: 1,001 evaluations each (NCSN CIFAR-10), or a stated part of them."""
    from sgm_engine.plan import annealed_langevin

    model, sigmas = network()
    for batch, steps_per_level in CHAINS:
        plan = annealed_langevin(sigmas, steps_per_level=steps_per_level)
        name, options = next(iter(ENGINES.items()))
        engine = engine_of(model, batch, options)
        engine.sample(batch, plan=annealed_langevin(sigmas, steps_per_level=1))
        torch.cuda.synchronize()
        began = time.perf_counter()
        samples = engine.sample(batch, plan=plan)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        again = engine.sample(batch, plan=plan)
        row: Row = {"case": f"engine {name}", "batch": batch, "NFE an image": plan.nfe, "s": seconds}
        row |= {"NFE/s": batch * plan.nfe / seconds, "images/s of 1,001 NFE": batch * plan.nfe / seconds / NFE}
        row["failed"] = None if torch.equal(samples, again) else "the same seed gave other bytes"
        yield row
