"""A step of NCSN CIFAR-10 and whole chains: the engine against every peer, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch

from bench.gpu import timing
from bench.gpu.apart import Case, apart, short
from bench.gpu.stages import Row
from bench.gpu.timing import DEVICE
from bench.peers import plain as without_kernels

BATCHES = (1, 16, 128)
CHAINS = ((1, 100), (16, 100), (128, 20))  # batch, steps a level: 1,001 evaluations, or a part of them
NGF, SIDE = 128, 32
# Of an image and evaluation, by bench.gpu.counts: operations of convolutions; bytes read and written by them and by
# norms of one pass, in bf16. And the bytes of bf16 weights, read once a step.
FLOPS, BYTES, WEIGHTS = 19.40e9, 59.2e6, 59.8e6
NFE = 1001  # of an image
STEPS = 10  # a level, of the requests that are timed
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
PEERS = ("eager", "eager + manual graph", "compile", "compile + manual graph", "compile reduce-overhead")
PEERS += ("compile max-autotune",)
# Who is compared first, each with cuDNN's timing and without.
CORE_BATCHES = (128, 1)
CORE_ENGINES = ("graph bfloat16, cuDNN timed", "graph bfloat16")
CORE_PEERS = ("eager", "compile + manual graph")


@cache
def network():
    from sgm_engine.models.ncsn import NCSN

    torch.manual_seed(0)
    sigmas = torch.logspace(0, -2, 10)
    model = NCSN(sigmas, channels=3, ngf=NGF, image_size=SIDE).eval().to(DEVICE, memory_format=torch.channels_last)
    return model.requires_grad_(False), sigmas


def peers(model: torch.nn.Module, batch: int) -> dict[str, Callable]:
    """PEERS → maker of (score function, whether the whole step goes into a manual CUDA graph)."""
    return {
        "eager": lambda: (plain(model), False),
        "eager + manual graph": lambda: (plain(model), True),
        "compile": lambda: (compiled(model, batch), False),
        "compile + manual graph": lambda: (compiled(model, batch), True),
        "compile reduce-overhead": lambda: (compiled(model, batch, mode="reduce-overhead"), False),
        "compile max-autotune": lambda: (compiled(model, batch, mode="max-autotune"), False),
    }


def plain(model: torch.nn.Module) -> Callable:
    network = without_kernels(model).to(torch.bfloat16)
    return lambda x, level: network(x.bfloat16(), level)


@cache
def compiled(model: torch.nn.Module, batch: int, **options: str) -> Callable:
    """For this batch alone. It compiles for a minute, so what two rows need is compiled once."""
    torch._dynamo.reset()
    return torch.compile(plain(model), dynamic=False, **options)


def checked(score: torch.Tensor, want: torch.Tensor, most: float = 0.1) -> float:
    """The relative error of a score; RuntimeError if it is more than 16 bits explain, or ``most``."""
    error = float((score.float() - want).norm() / want.norm())
    if not error < most:
        raise RuntimeError(f"score differs from float32 by {error:.3g}")
    return error


@cache
def accelerated():
    from sgm_engine.rewriting.acceleration import accelerate

    return accelerate(network()[0])


def engine_of(batch: int, options: dict):
    from sgm_engine.engine.engine import Engine
    from sgm_engine.executors.graphs import GraphConfig
    from sgm_engine.tuning.float8_calibration import calibrate_float8

    options, fast = dict(options), accelerated()
    if options["precision"] == "float8":
        options["float8"] = calibrate_float8(fast, device=DEVICE)
    if "graph" in options:
        options["graph"] = GraphConfig(**options["graph"])
    return Engine(fast, batch=batch, device=DEVICE, **options)


class Problem(NamedTuple):
    model: torch.nn.Module
    sigmas: torch.Tensor
    x: torch.Tensor
    level: torch.Tensor
    want: torch.Tensor  # the score that every other is checked against


@cache
def problem(batch: int) -> Problem:
    model, sigmas = network()
    x = torch.rand(batch, 3, SIDE, SIDE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    level = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    return Problem(model, sigmas, x, level, model(x, level))


def engine_row(name: str, batch: int) -> Iterator[Row]:
    """A way to run the engine: time, launches, gaps between them, and the share of what the device could do."""
    from sgm_engine.plans.plan import annealed_langevin

    options = ENGINES[name]
    if options["precision"] == "float8" and torch.cuda.get_device_capability() < (8, 9):
        return
    _, sigmas, x, level, want = problem(batch)
    plan = annealed_langevin(sigmas, steps_per_level=STEPS)
    floor_ms = 1e3 * max(FLOPS * batch / timing.peak_flops(), (BYTES * batch + WEIGHTS) / timing.copy_bandwidth())
    timed = options.get("graph", {}).get("benchmark", False)
    row: Row = {"case": f"engine {name}", "batch": batch, "cuDNN timed": timed}
    try:
        engine = engine_of(batch, options)
        engine.sample(batch, plan=plan)
        before, began = engine.stats.steps, time.perf_counter()
        engine.sample(batch, plan=plan)
        torch.cuda.synchronize()
        steps = engine.stats.steps - before
        row["ms a step"] = ms = (time.perf_counter() - began) * 1e3 / steps
        most = 0.3 if options["precision"] == "float8" else 0.1  # of weights that are random
        with torch.no_grad():
            row["score error"] = checked(engine._network(x, level), want, most)
        row |= {"images/s": batch * 1e3 / (ms * NFE), "share of roofline": floor_ms / ms}
        row |= busy(lambda: engine._executor.run(1), ms)  # slots are idle: no update
    except Exception as error:
        row["failed"] = short(error)
    yield row


def busy(step: Callable[[], None], ms: float) -> Row:
    """What ran of a step of so many milliseconds, and how long, in all and by its name."""
    seen = timing.kernels_of(step)
    launches, busy_ms = sum(count for count, _ in seen.values()), sum(spent for _, spent in seen.values())
    by_name = [{"kernel": name, "launches": n, "ms": spent, "share": spent / ms} for name, (n, spent) in seen.items()]
    by_name.sort(key=lambda kernel: -kernel["ms"])
    return {"kernels a step": launches, "gaps": max(0.0, 1 - busy_ms / ms), "by kernel name": by_name}


def step_times(cases: Callable[[], Iterator[Case]] | None = None) -> Iterator[Row]:
    """One step of NCSN CIFAR-10 (channels-last; x float32) by the engine and by each peer, in one run.

    Like is compared with like: an engine and peers for which cuDNN timed its algorithms, or none of which it did for.
    """
    fastest: dict[object, float] = {}
    for row in apart(cases or steps, seconds=240):
        like = row.get("batch"), row.get("cuDNN timed")
        if (ms := row.get("ms a step")) and str(row["case"]).startswith("engine"):
            fastest.setdefault(like, ms)
        elif ms and like in fastest:
            row["engine is faster by"] = ms / fastest[like]
        yield row


def core() -> Iterator[Case]:
    """The comparison that a first run is for: what needs no compiler first."""
    for batch in CORE_BATCHES:
        for name in CORE_ENGINES:
            yield f"{name} at {batch}", partial(engine_row, name, batch)
    for name in CORE_PEERS:
        for batch in CORE_BATCHES:
            for timed in (True, False):
                yield f"{name} at {batch}, cuDNN {'' if timed else 'not '}timed", partial(peer_row, name, batch, timed)


def steps() -> Iterator[Case]:
    """What is compared first, what takes longest to compile last, so that it is what is missing if the time is over."""
    first, second, *others = ENGINES
    for name in (first, second, *PEERS[:2], *others):
        for batch in BATCHES:
            yield f"{name} at {batch}", partial(engine_row if name in ENGINES else peer_row, name, batch)
    for names in (PEERS[2:4], PEERS[4:5], PEERS[5:]):
        for batch in reversed(BATCHES):
            for name in names:
                yield f"{name} at {batch}", partial(peer_row, name, batch)


def peer_row(name: str, batch: int, timed: bool = True) -> Iterator[Row]:
    """timed: whether cuDNN times its algorithms."""
    model, _, x, level, want = problem(batch)
    row: Row = {"case": name, "batch": batch, "cuDNN timed": timed}
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=timed):
            score, manual = peers(model, batch)[name]()
            row["score error"] = checked(score(x, level), want)
            state = x.clone()
            step = lambda: timing.peer_step(score, state, level)  # noqa: E731
            step = timing.graphed(step) if manual else step
            row["ms a step"] = ms = timing.milliseconds(step)
            row |= {"images/s": batch * 1e3 / (ms * NFE), **busy(step, ms)}
    except Exception as error:
        row["failed"] = short(error)
    yield row


def end_to_end() -> Iterator[Case]:
    """Images a second of the engine's chains: 1,001 evaluations each (NCSN CIFAR-10), or a stated part of them."""
    for batch, steps_per_level in CHAINS:
        yield f"chains at {batch}", partial(chain, batch, steps_per_level)


def chain(batch: int, steps_per_level: int) -> Iterator[Row]:
    from sgm_engine.plans.plan import annealed_langevin

    _, sigmas = network()
    plan = annealed_langevin(sigmas, steps_per_level=steps_per_level)
    name, options = next(iter(ENGINES.items()))
    engine = engine_of(batch, options)
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
