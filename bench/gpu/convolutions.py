"""Convolutions: cuDNN against the Triton kernel, shape by shape. Writes the table that accelerate chooses by."""

from __future__ import annotations

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


def _problem(c_in: int, c_out: int, side: int, dilation: int, batch: int) -> tuple[torch.Tensor, ...]:
    draw = lambda *shape: torch.randn(shape, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, weight = draw(batch, c_in, side, side), draw(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5
    bias = torch.randn(c_out, device=DEVICE).bfloat16()
    want = F.conv2d(x.float(), weight.float(), bias.float(), 1, dilation, dilation).bfloat16()
    return x, weight, bias, want.contiguous(memory_format=torch.channels_last)
