"""Convolutions: cuDNN against the Triton kernel, in bfloat16 and float8, shape by shape. Writes the table of tiles."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from bench.gpu import timing
from bench.gpu.stages import Row
from bench.gpu.timing import DEVICE

# (channels in, channels out, side, dilation): every 3×3 of NCSN on CIFAR-10 but the first and the last.
SHAPES = [
    (128, 128, 32, 1),
    (128, 256, 16, 1),
    (256, 256, 16, 1),
    (256, 256, 16, 2),
    (256, 256, 16, 4),
    (256, 128, 16, 1),
]
BATCHES = (1, 16, 128)
MARGIN = 1.02  # the kernel has to be this much faster than cuDNN to be put into the table


def convolutions() -> list[Row]:
    """Time, floor (operations over the matrix peak) and share of both, and which of them the table names."""
    from sgm_engine.kernels import conv_table, triton_conv

    peak, rows = timing.peak_flops(), []
    device = torch.cuda.get_device_name()
    tuned = dict(conv_table.read(conv_table.PATH))
    tuned[device] = {}
    rows.append({"case": "matrix product", "TFLOP/s": peak / 1e12})
    for c_in, c_out, side, dilation in SHAPES:
        for batch in BATCHES:
            x, weight, bias, want = _problem(c_in, c_out, side, dilation, batch)
            key = conv_table.shape_key(x, weight, dilation)
            floor = 2 * 9 * c_in * c_out * side * side * batch / peak * 1e6
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                cudnn = timing.microseconds([lambda: F.conv2d(x, weight, bias, 1, dilation, dilation)])  # noqa: B023
            rows.append({"case": key, "backend": "cuDNN", "µs": cudnn, "floor µs": floor, "share": floor / cudnn})
            if torch.cuda.get_device_capability() >= (8, 9):
                rows += _float8(x, weight, bias, dilation, cudnn, tuned[device])
            best = cudnn / MARGIN
            for tile in triton_conv.TILES:
                row: Row = {"case": key, "backend": f"Triton {tile.pixels}×{tile.channels}×{tile.depth}"}
                out = torch.full_like(want, float("nan"))
                call = lambda: triton_conv.convolution(x, weight, bias, None, dilation, out, None, tile)  # noqa: B023, E731
                try:
                    if why := triton_conv.refusal(x, weight, tile):
                        raise ValueError(why)
                    call()
                    row["error"] = error = float((out.float() - want.float()).norm() / want.float().norm())
                    if not error < 1e-2:
                        raise ValueError(f"wrong by {error:.3g}")
                    row |= {"µs": (time_us := timing.microseconds([call])), "floor µs": floor, "share": floor / time_us}
                    if time_us < best:
                        best, tuned[device][key] = time_us, tile
                except Exception as failure:
                    row["failed"] = f"{type(failure).__name__}: {str(failure)[:200]}"
                rows.append(row)
    conv_table.write(tuned, conv_table.PATH)
    rows.append({"case": f"{len(tuned[device])} shapes written to {conv_table.PATH.name}"})
    return rows


def _float8(x, weight, bias, dilation: int, cudnn: float, tuned: dict) -> list[Row]:
    """Rows of a layer in float8, with and without what makes its input; its fastest tile goes into ``tuned``."""
    from sgm_engine.float8_conv import FLOAT8, Float8Conv
    from sgm_engine.kernels import conv_table, reference, triton_conv, triton_float8

    inverse = 448 / (2 * float(x.abs().max()))
    layer = Float8Conv(_layer(weight, bias, dilation), inverse, emulate=False)
    layer.load(_layer(weight, bias, dilation))
    x8 = torch.empty_like(x, dtype=FLOAT8)
    quantise = lambda: triton_float8.quantise(x, inverse, x8)  # noqa: E731
    quantise()
    want = reference.float8_convolution(x8, layer.weight, layer.scale, inverse, layer.bias, None, dilation)
    key = conv_table.shape_key(x8, layer.weight, dilation)
    rows: list[Row] = [{"case": key, "backend": "quantise", "µs": (before := timing.microseconds([quantise]))}]
    best = float("inf")
    for tile in triton_conv.FLOAT8_TILES:
        row: Row = {"case": key, "backend": f"Triton {tile.pixels}×{tile.channels}×{tile.depth}"}
        out = torch.full(want.shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)
        out = out.contiguous(memory_format=torch.channels_last)
        arguments = (x8, layer.weight, layer.bias, None, dilation, out, None, tile, layer.scale)
        call = partial(triton_conv.convolution, *arguments)
        try:
            call()
            row["error"] = error = float((out.float() - want).norm() / want.norm())
            if not error < 1e-2:
                raise ValueError(f"wrong by {error:.3g}")
            row |= {"µs": (time_us := timing.microseconds([call])), "cuDNN bfloat16 / it": cudnn / time_us}
            row["cuDNN bfloat16 / it and quantise"] = cudnn / (time_us + before)
            if time_us < best:
                best, tuned[key] = time_us, tile
        except Exception as failure:
            row["failed"] = f"{type(failure).__name__}: {str(failure)[:200]}"
        rows.append(row)
    return rows


def _layer(weight: torch.Tensor, bias: torch.Tensor, dilation: int) -> torch.nn.Conv2d:
    c_out, c_in, *_ = weight.shape
    layer = torch.nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation, device=DEVICE)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _problem(c_in: int, c_out: int, side: int, dilation: int, batch: int) -> tuple[torch.Tensor, ...]:
    draw = lambda *shape: torch.randn(shape, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, weight = draw(batch, c_in, side, side), draw(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5
    bias = torch.randn(c_out, device=DEVICE).bfloat16()
    want = F.conv2d(x.float(), weight.float(), bias.float(), 1, dilation, dilation).bfloat16()
    return x, weight, bias, want.contiguous(memory_format=torch.channels_last)
