"""The kernels by themselves: time, floor and share of it, on buffers that overflow the cache, by replay of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.gpu import norms, timing
from bench.gpu.apart import Case, apart
from bench.gpu.stages import Row
from bench.gpu.timing import DEVICE

TARGET_SHARE = 0.85  # of the copy bandwidth, at batches of 128 and more
BATCHES = (1, 16, 128, 1024)
MARGIN = 1.02  # CUDA C++ has to be this much faster than Triton to take its place


def report(
    case: str, backend: str, batch: int, moved: int, calls: list[Callable[[], None]], failed: str | None, key: str = ""
) -> Row:
    """The row of a case, which is timed only if its result was right.

    moved: bytes that must be read and written; over the copy's bandwidth they are the floor. key: of the case in the
    table of backends.
    """
    row: Row = {"case": case, "backend": backend, "batch": batch, "failed": failed, "key": key}
    if failed is None:
        time_us, floor_us = timing.microseconds(calls), moved / timing.copy_bandwidth() * 1e6
        row |= {"µs": time_us, "floor µs": floor_us, "share": floor_us / time_us}
        row["goal"] = ("met" if floor_us / time_us >= TARGET_SHARE else "missed") if batch >= 128 else "none"
    return row


def kernels(shapes: list | None = None, batches: tuple | None = None) -> Iterator[Case]:
    """The update, the generator and the norms of both GPU backends. shapes: of norms, (channels, side)."""
    yield "copy", copy
    for batch in batches or BATCHES:
        yield f"update and normals at {batch}", partial(updates, batch)
    yield from norms.norms(report, shapes, batches)


def copy() -> list[Row]:
    from sgm_engine.kernels.tables import backend as backend_table

    device = backend_table.capability(torch.device("cuda"))
    return [{"case": "copy", "backend": "torch", "GB/s": timing.copy_bandwidth() / 1e9, "device": device}]


def backends(shapes: list | None = None, batches: tuple | None = None) -> Iterator[Row]:
    """The same, and the table of the backend that is fastest where it was right: what the ops go by from then on."""
    from sgm_engine.kernels.tables import backend as backend_table

    rows: list[Row] = []
    try:
        for row in apart(partial(kernels, shapes, batches)):
            rows.append(row)
            yield row
    finally:  # also of what was measured before the time was over
        found, here = fastest(rows), next((row["device"] for row in rows if "device" in row), None)
        if found:
            backend_table.write(backend_table.read(backend_table.PATH) | {here: found}, backend_table.PATH)
    faster = sum(backend != backend_table.TRITON for backend in found.values())
    yield {"case": f"{len(found)} cases to {backend_table.PATH.name}, CUDA C++ in {faster} of them"}


def fastest(rows: list[Row]) -> dict[str, str]:
    """Case → Triton, or the CUDA C++ kernel that takes less than its time by MARGIN; of those that were right.

    A case in which Triton was not measured is left out.
    """
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("key") and "µs" in row:
            times.setdefault(row["key"], {})[row["backend"]] = row["µs"] * (MARGIN if row["backend"] != "Triton" else 1)
    return {key: min(found, key=found.get) for key, found in times.items() if "Triton" in found}


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
    from sgm_engine.kernels.arguments import Update

    names = ("coef", "draw", "row", "stop", "seed", "sample_id", "bad_row")
    function(Update(x, score, *(state[k] for k in names), None, x, True))


def updates(batch: int) -> Iterator[Row]:
    from sgm_engine.kernels import cuda
    from sgm_engine.kernels.tables import backend as backend_table
    from sgm_engine.kernels.triton import noise as triton_noise
    from sgm_engine.kernels.triton import update as triton_update

    x = torch.randn(batch, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)  # as an engine's
    moved = 2 * x.nbytes + x.nbytes // 2  # x read and written, a bf16 score read
    score = lambda x: x.bfloat16().contiguous(memory_format=torch.channels_last)  # noqa: E731
    sets = [(x.clone(), score(x)) for _ in range(timing.copies(moved))]
    results = []
    for backend, function in (("CUDA", cuda.langevin_update), ("Triton", triton_update.langevin_update)):
        state, probe = slots(batch, 1), x.clone()
        update(function, probe, sets[0][1], state)
        results.append(probe)
        failed = None if torch.equal(results[0], probe) else "its bits differ from CUDA's"
        state["row"].zero_()
        calls = [lambda f=function, s=state, b=b: timed_update(f, *b, s) for b in sets]
        key = backend_table.update_case(*sets[0])
        yield report("update 3×32² NHWC, bf16 score", backend, batch, moved, calls, failed, key)
    fills = [torch.empty_like(x) for _ in range(timing.copies(x.nbytes))]
    for backend, module in (("CUDA", cuda), ("Triton", triton_noise)):
        state = slots(batch, 1)
        calls = [
            lambda m=module, o=o, s=state: m.noise_fill(o, s["seed"], s["sample_id"], 1, 0, "normal") for o in fills
        ]
        yield report("normals 3×32²", backend, batch, x.nbytes, calls, None, backend_table.noise_case(x, "normal"))


def timed_update(
    function: Callable[..., None], x: torch.Tensor, score: torch.Tensor, state: dict[str, torch.Tensor]
) -> None:
    """The update without its advance, so that any number of replays reads the one row of the table."""
    from sgm_engine.kernels.arguments import Update

    names = ("coef", "draw", "row", "stop", "seed", "sample_id", "bad_row")
    function(Update(x, score, *(state[k] for k in names), None, x, False))
