"""A step of NCSN CIFAR-10 and whole chains: the engine against every peer, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from bench.gpu.stages import Row
from bench.peers import plain as without_kernels

DEVICE = "cuda"


def network():
    from sgm_engine.models.ncsn import NCSN

    torch.manual_seed(0)
    sigmas = torch.logspace(0, -2, 10)
    model = NCSN(sigmas, channels=3, ngf=128, image_size=32).eval().to(DEVICE, memory_format=torch.channels_last)
    return model.requires_grad_(False), sigmas


def peer_step(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, level: torch.Tensor
) -> None:
    """A plain PyTorch Langevin step, in place, in float32 round a bf16 network; nothing goes to the host."""
    x.add_(score(x, level).float(), alpha=1e-5).add_(torch.randn_like(x), alpha=1e-3)


def graphed(step: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step: Callable[[], None], budget_s: float = 2.0) -> float:
    """Median wall time of a step, blocks of steps with one synchronisation each: launch gaps count."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    block = max(1, min(100, int(budget_s / 5 / max(time.perf_counter() - began, 1e-5))))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(block):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3 / block)
    return statistics.median(times)


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


def step_times() -> list[Row]:
    """One step of NCSN CIFAR-10 (bf16, channels-last; x float32) by the engine and by each peer, in one run."""
    from sgm_engine.engine import Engine
    from sgm_engine.plan import annealed_langevin

    torch.backends.cudnn.benchmark = True
    model, sigmas = network()
    rows: list[Row] = []
    for batch in (1, 16, 128):
        x = torch.rand(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
        level = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        want = model(x, level)  # float32: what every bf16 score is checked against
        scale = want.norm()
        engines = {}
        for executor in ("eager", "graph"):
            engine = Engine(model, batch=batch, device=DEVICE, precision="bfloat16", executor=executor)
            plan = annealed_langevin(sigmas, steps_per_level=10)
            engine.sample(batch, plan=plan)
            before, began = engine.stats.steps, time.perf_counter()
            engine.sample(batch, plan=plan)
            torch.cuda.synchronize()
            engines[executor] = (time.perf_counter() - began) * 1e3 / (engine.stats.steps - before)
            rows.append({"case": f"engine {executor}", "batch": batch, "ms a step": engines[executor]})
        for name, make in peers(model, batch).items():
            row: Row = {"case": name, "batch": batch}
            try:
                with torch.no_grad():
                    score, manual = make()
                    row["score error"] = error = float((score(x, level).float() - want).norm() / scale)
                    if not error < 0.1:
                        raise RuntimeError(f"score differs from float32 by {error:.3g}")
                    state = x.clone()
                    step = lambda s=score, x=state, level=level: peer_step(s, x, level)  # noqa: E731
                    row["ms a step"] = time_ms = milliseconds(graphed(step) if manual else step)
                    row["engine graph is faster by"] = time_ms / engines["graph"]
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(row)
    return rows


def end_to_end() -> list[Row]:
    """Images a second of the engine's chains: 1,001 evaluations each (NCSN CIFAR-10), or a stated part of them."""
    from sgm_engine.engine import Engine
    from sgm_engine.plan import annealed_langevin

    model, sigmas = network()
    rows: list[Row] = []
    for batch, steps_per_level in ((1, 100), (16, 100), (128, 20)):
        plan = annealed_langevin(sigmas, steps_per_level=steps_per_level)
        engine = Engine(model, batch=batch, device=DEVICE, precision="bfloat16", executor="graph")
        engine.sample(batch, plan=annealed_langevin(sigmas, steps_per_level=1))
        torch.cuda.synchronize()
        began = time.perf_counter()
        samples = engine.sample(batch, plan=plan)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        again = engine.sample(batch, plan=plan)
        row: Row = {"case": "engine graph bf16", "batch": batch, "NFE an image": plan.nfe, "s": seconds}
        row |= {"NFE/s": batch * plan.nfe / seconds, "images/s of 1,001 NFE": batch * plan.nfe / seconds / 1001}
        row["failed"] = None if torch.equal(samples, again) else "the same seed gave other bytes"
        rows.append(row)
    return rows
