"""Convolutions: cuDNN against the Triton kernel, in bfloat16 and float8, shape by shape. Writes the table of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

from bench.gpu import timing
from bench.gpu.apart import Case, apart, short
from bench.gpu.stages import Row
from bench.gpu.timing import DEVICE

if TYPE_CHECKING:
    from sgm_engine.kernels.triton.conv import ConvTile

# (channels in, channels out, side, dilation): every 3×3 of stride 1 of an accelerated NCSN on CIFAR-10 but the first
# and the last, by their share of the operations: bench.gpu.counts has it.
SHAPES = [
    (256, 256, 16, 1),
    (128, 128, 32, 1),
    (256, 256, 16, 2),
    (256, 256, 16, 4),
    (128, 128, 16, 1),
    (256, 128, 16, 1),
]
BATCHES = (128, 16, 1)
MARGIN = 1.02  # the kernel has to be this much faster than what it replaces to be put into the table
ERROR = 1e-2  # relative, of a result in bfloat16
Table = dict[str, object]  # what is found for this device: shape → tile
Launch = Callable[..., tuple[Tensor, "Tensor | None"]]  # (tile, residual=None, partials=False) → (result, partials)


class Work(NamedTuple):
    """What is timed: shapes, batches, tiles of bfloat16 (None: all that there are), and whether float8 is too."""

    shapes: list[tuple[int, int, int, int]]
    batches: tuple[int, ...]
    tiles: tuple[ConvTile, ...] | None = None
    float8: bool = True


def convolutions(work: Work | None = None) -> Iterator[Row]:
    """Time, floor (operations over the matrix peak) and share of both, and what of it goes into the table."""
    from sgm_engine.kernels.tables import conv as conv_table

    found: Table = {}
    device = None
    for row in apart(partial(cases, work or Work(SHAPES, BATCHES)), seconds=150):
        device, best = row.pop("device", device), row.pop("table", None)
        if best is not None:  # after every case, so that nothing is lost
            found |= best
            conv_table.write(dict(conv_table.read(conv_table.PATH)) | {device: found}, conv_table.PATH)
        if row:
            yield row
    yield {"case": f"{len(found)} shapes written to {conv_table.PATH.name}"}


def cases(work: Work) -> Iterator[Case]:
    yield "matrix product", _ceiling
    for shape in work.shapes:
        for batch in work.batches:
            yield f"{shape} at {batch}", partial(_measure, *shape, batch, work)


def _ceiling() -> list[Row]:
    return [{"case": "matrix product", "TFLOP/s": timing.peak_flops() / 1e12, "device": torch.cuda.get_device_name()}]


def _measure(c_in: int, c_out: int, side: int, dilation: int, batch: int, work: Work) -> list[Row]:
    """Rows, and at their end what is to be put into the table."""
    x, layer = _problem(c_in, c_out, side, dilation, batch)
    floor = 2 * 9 * c_in * c_out * side * side * batch / timing.peak_flops() * 1e6
    found: Table = {}
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        rows = _bfloat16(x, layer, floor, found, work.tiles)
        if work.float8 and torch.cuda.get_device_capability() >= (8, 9):
            rows += _float8(x, layer, floor, rows[0]["µs"], found)
    return [*rows, {"table": found}]


def _bfloat16(x: Tensor, layer: nn.Conv2d, floor: float, found: Table, tiles: tuple | None) -> list[Row]:
    from sgm_engine.kernels.tables import conv as conv_table
    from sgm_engine.kernels.triton import conv as triton_conv
    from sgm_engine.rewriting.float8.conv import launch

    weight, bias, dilation = layer.weight, layer.bias, layer.dilation[0]
    want = F.conv2d(x.float(), weight.float(), bias.float(), 1, dilation, dilation)
    cudnn = lambda: F.conv2d(x, weight, bias, 1, dilation, dilation)  # noqa: E731
    ours = lambda tile, *rest: launch(x, weight, bias, dilation, tile, x.dtype, None, *rest)  # noqa: E731
    key, time_us = conv_table.shape_key(x, weight, dilation), timing.microseconds([cudnn])
    rows: list[Row] = [{"case": key, "backend": "cuDNN", "µs": time_us, "floor µs": floor, "share": floor / time_us}]
    timed = _tiles(
        key, _possible(tiles or triton_conv.TILES + triton_conv.LARGE_TILES, x, weight), ours, want, floor, rows
    )
    best = min(timed, key=timed.get, default=None)
    if best is not None and timed[best] < time_us / MARGIN:
        found[key] = best
    plain = (lambda: ours(best)[0]) if key in found else cudnn
    return rows if best is None else rows + _with_norm(key, best, ours, plain, want, found)


def _float8(x: Tensor, layer: nn.Conv2d, floor: float, cudnn: float, found: Table) -> list[Row]:
    """Against cuDNN in bfloat16, with and without what makes its input. There is no other kernel: a tile is taken."""
    from sgm_engine.kernels import reference
    from sgm_engine.kernels.tables import conv as conv_table
    from sgm_engine.kernels.triton import conv as triton_conv
    from sgm_engine.kernels.triton import float8 as triton_float8
    from sgm_engine.rewriting.float8.conv import FLOAT8, Float8Conv, launch

    inverse = 448 / (2 * float(x.abs().max()))
    float8 = Float8Conv(layer, inverse, emulate=False)
    float8.load(layer)
    x8 = torch.empty_like(x, dtype=FLOAT8)
    quantise = lambda: triton_float8.quantise(x, inverse, x8)  # noqa: E731
    quantise()
    weight, bias, scale, dilation = float8.weight, float8.bias, float8.scale, float8.dilation
    want = reference.float8_convolution(x8, weight, scale, inverse, bias, None, dilation)
    ours = lambda tile, *rest: launch(x8, weight, bias, dilation, tile, torch.bfloat16, scale, *rest)  # noqa: E731
    key = conv_table.shape_key(x8, weight, dilation)
    rows: list[Row] = [{"case": key, "backend": "quantise", "µs": (before := timing.microseconds([quantise]))}]
    timed = _tiles(key, _possible(triton_conv.FLOAT8_TILES, x8, weight), ours, want, floor, rows)
    for row in rows[1:]:
        if "µs" in row:
            row["cuDNN bfloat16 / it"] = cudnn / row["µs"]
            row["cuDNN bfloat16 / it and quantise"] = cudnn / (row["µs"] + before)
    if not timed:
        return rows
    found[key] = tile = min(timed, key=timed.get)
    return rows + _with_norm(key, tile, ours, lambda: ours(tile)[0], want, found)


def _possible(tiles: Sequence, x: Tensor, weight: Tensor) -> list:
    from sgm_engine.kernels.triton import conv as triton_conv

    tma = torch.cuda.get_device_capability() >= (9, 0)
    return [t for t in tiles if (tma or not t.tma) and not triton_conv.refusal(x, weight, t)]


def _tiles(key: str, tiles: Sequence, ours: Launch, want: Tensor, floor: float, rows: list[Row]) -> dict:
    """tile → µs of those that are right; a row for each."""
    timed = {}
    for tile in tiles:
        row: Row = {"case": key, "backend": _name(tile)}
        rows.append(row)
        try:
            row["error"] = _checked(ours(tile)[0], want)
            row["µs"] = timed[tile] = timing.microseconds([lambda: ours(tile)])  # noqa: B023
            row |= {"floor µs": floor, "share": floor / timed[tile]}
        except OutOfResources as error:
            row["not run"] = str(error)
        except Exception as failure:
            row["failed"] = short(failure)
    return timed


def _with_norm(key: str, tile, ours: Launch, plain: Callable[[], Tensor], want: Tensor, found: Table) -> list[Row]:
    """The convolution that leaves the norm's partials, and that norm, against the faster of both and the norm."""
    from sgm_engine.kernels import ops

    n, channels, *_ = want.shape
    parameters = torch.randn(10, 3 * channels, device=DEVICE).split(channels, 1)
    norm = (*parameters, torch.arange(n, device=DEVICE) % 10, "elu")
    residual = torch.randn_like(want).bfloat16().contiguous(memory_format=torch.channels_last)
    rows: list[Row] = []
    for then, other in (("norm", None), ("sum and norm", residual)):
        row: Row = {"case": f"{key}, then {then}", "backend": _name(tile)}
        rows.append(row)

        def apart() -> Tensor:
            y = ops.noise_conditioned_norm(plain(), *norm, other)  # noqa: B023
            return y if other is None else y[0]  # noqa: B023

        def joined() -> Tensor:
            total, partials = ours(tile, other, True)  # noqa: B023
            return ops.inference_norm(total, *norm, partials=partials)

        try:
            row["error"] = _checked(joined(), apart().float())
            separately, together = timing.microseconds([apart]), timing.microseconds([joined])
            row |= {"µs": together, "the two apart µs": separately, "apart / it": separately / together}
            if together < separately / MARGIN:
                found[row["case"]] = tile
        except Exception as failure:
            row["failed"] = short(failure)
    return rows


def _name(tile) -> str:
    return f"Triton {tile.pixels}×{tile.channels}×{tile.depth}{' TMA' if tile.tma else ''}"


def _checked(y: Tensor, want: Tensor) -> float:
    error = float((y.float() - want).norm() / want.norm())
    if not error < ERROR:
        raise ValueError(f"wrong by {error:.3g}")
    return error


def _problem(c_in: int, c_out: int, side: int, dilation: int, batch: int) -> tuple[Tensor, nn.Conv2d]:
    layer = nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation, device=DEVICE, dtype=torch.bfloat16)
    layer = layer.to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(batch, c_in, side, side, device=DEVICE).bfloat16()
    layer.weight.copy_(torch.randn(layer.weight.shape, device=DEVICE) / (9 * c_in) ** 0.5)
    layer.bias.copy_(torch.randn(c_out, device=DEVICE))
    return x.contiguous(memory_format=torch.channels_last), layer
