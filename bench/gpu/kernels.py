"""The kernels by themselves: time, floor and share of it, on buffers that overflow the cache, by replay of a graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from bench.gpu.stages import Row

DEVICE = "cuda"
TARGET_SHARE = 0.85  # of the copy bandwidth, at batches of 128 and more
NORM_SHAPES = [(128, 32), (256, 16), (64, 28)]  # channels, side: the norms of NCSN on CIFAR-10 and MNIST


def microseconds(calls: list[Callable[[], None]], repeats: int = 20) -> float:
    """Median time of one call, from replays of a graph that makes all of ``calls`` (on different buffers) in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(bytes_a_call: int) -> int:
    """Sets of buffers that together overflow the L2 cache several times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, 4 * cache // max(bytes_a_call, 1) + 1))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    a = torch.randn(2**28, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / (microseconds([lambda: b.copy_(a)]) * 1e-6)


def slots(batch: int, rows: int) -> dict[str, torch.Tensor]:
    count = torch.arange(batch, device=DEVICE)
    return {
        "coef": torch.tensor([[1, 1e-3, 1e-2, 0.0]] * rows, device=DEVICE),
        "draw": torch.arange(1, rows + 1, dtype=torch.int32, device=DEVICE),
        "row": torch.zeros_like(count),
        "stop": torch.full_like(count, rows),
        "seed": count + 7,
        "sample_id": count,
        "bad_row": torch.full_like(count, 2**63 - 1),
    }


def update(function: Callable[..., None], x: torch.Tensor, score: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    function(
        x, score, *(state[k] for k in ("coef", "draw", "row", "stop", "seed", "sample_id", "bad_row")), None, x, True
    )


def norm_case(module, batch, channels, side, dtype, layout, residual=False, variant=None):
    """(a call of module.norm on buffers of its own, its check against float64 → an error message or None)."""
    from sgm_engine.kernels import reference

    shape = (batch, channels, side, side)
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
    other = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout) if residual else None
    out, total = torch.full_like(x, float("nan")), torch.full_like(x, float("nan")) if residual else None
    parameters = torch.randn(10, 3 * channels, device=DEVICE).split(channels, 1)
    level = torch.arange(batch, device=DEVICE) % 10
    workspace = torch.empty(module.norm_workspace_size(x), device=DEVICE)
    extra = {} if variant is None else {"variant": variant}

    def call() -> None:
        module.norm(x, *parameters, level, "elu", other, 1e-5, out, total, workspace, **extra)

    def check() -> str | None:
        few = slice(0, 8)
        summed = x[few] + other[few] if residual else x[few]
        want = reference.noise_conditioned_norm(summed.double(), *(p.double() for p in parameters), level[few], "elu")
        eager = reference.noise_conditioned_norm(summed.float(), *parameters, level[few], "elu")
        allowed = 2 * (eager - want).abs().max() + 0.505 * torch.finfo(dtype).eps * want.abs() + 1e-5
        error = (out[few].double() - want).abs()
        return None if bool((error <= allowed).all()) else f"wrong by {float(error.max()):.3g}"

    return call, check


def kernels() -> list[Row]:
    """Time, floor (bytes that must move over the copy's bandwidth) and their ratio, for both GPU backends."""
    from sgm_engine.kernels import cuda, triton_noise, triton_norm, triton_update

    bandwidth = copy_bandwidth()
    rows: list[Row] = [{"case": "copy", "backend": "torch", "GB/s": bandwidth / 1e9}]

    def report(
        case: str, backend: str, batch: int, moved: int, calls: list[Callable[[], None]], failed: str | None
    ) -> None:
        row: Row = {"case": case, "backend": backend, "batch": batch, "failed": failed}
        if failed is None:
            time_us, floor_us = microseconds(calls), moved / bandwidth * 1e6
            row |= {"µs": time_us, "floor µs": floor_us, "share": floor_us / time_us}
            row["goal"] = ("met" if floor_us / time_us >= TARGET_SHARE else "missed") if batch >= 128 else "none"
        rows.append(row)

    for batch in (1, 16, 128, 1024):
        x = torch.randn(batch, 3, 32, 32, device=DEVICE)
        moved = 2 * x.nbytes + x.nbytes // 2  # x read and written, a bf16 score read
        sets = [(x.clone(), x.bfloat16().contiguous(memory_format=torch.channels_last)) for _ in range(copies(moved))]
        results = []
        for backend, function in (("CUDA", cuda.langevin_update), ("Triton", triton_update.langevin_update)):
            state, probe = slots(batch, 1), x.clone()
            update(function, probe, sets[0][1], state)
            results.append(probe)
            failed = None if torch.equal(results[0], probe) else "its bits differ from CUDA's"
            state["row"].zero_()
            calls = [lambda f=function, s=state, b=b: timed_update(f, *b, s) for b in sets]
            report("update 3×32², bf16 NHWC score", backend, batch, moved, calls, failed)
        fills = [torch.empty_like(x) for _ in range(copies(x.nbytes))]
        for backend, module in (("CUDA", cuda), ("Triton", triton_noise)):
            state = slots(batch, 1)
            calls = [
                lambda m=module, o=o, s=state: m.noise_fill(o, s["seed"], s["sample_id"], 1, 0, "normal") for o in fills
            ]
            report("normals 3×32²", backend, batch, x.nbytes, calls, None)

    nhwc = torch.channels_last
    for channels, side in NORM_SHAPES:
        for batch in (1, 64, 128, 256):
            for residual in (False, True):
                moved = (4 if residual else 2) * 2 * batch * channels * side * side
                variants = [
                    ("CUDA cluster", cuda, "cluster"),
                    ("CUDA portable", cuda, "portable"),
                    ("Triton", triton_norm, None),
                ]
                for backend, module, variant in variants:
                    if variant == "cluster" and torch.cuda.get_device_capability()[0] < 9:
                        continue
                    sets = [
                        norm_case(module, batch, channels, side, torch.bfloat16, nhwc, residual, variant)
                        for _ in range(copies(moved))
                    ]
                    sets[0][0]()
                    name = f"{'add + ' if residual else ''}norm + ELU {channels}×{side}², bf16 NHWC"
                    report(name, backend, batch, moved, [call for call, _ in sets], sets[0][1]())
                    del sets
    return rows


def timed_update(
    function: Callable[..., None], x: torch.Tensor, score: torch.Tensor, state: dict[str, torch.Tensor]
) -> None:
    """The update without its advance, so that any number of replays reads the one row of the table."""
    names = ("coef", "draw", "row", "stop", "seed", "sample_id", "bad_row")
    function(x, score, *(state[k] for k in names), None, x, False)


def exercise() -> None:
    """Every CUDA kernel once or twice, small: what the sanitizer watches."""
    from sgm_engine.kernels import cuda

    for shape in ((2, 3, 16, 16), (2, 5, 3, 3)):
        state = slots(shape[0], 3)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape, device=DEVICE, memory_format=layout)
            cuda.noise_fill(x, state["seed"], state["sample_id"], 0, 0, "normal")
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                update(cuda.langevin_update, x, x.to(dtype), state)
    for channels, side in ((32, 16), (6, 5)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in (torch.contiguous_format, torch.channels_last):
                for variant in ("auto", "portable"):
                    norm_case(cuda, 2, channels, side, dtype, layout, residual=True, variant=variant)[0]()
    torch.cuda.synchronize()
