"""Which convolutions of which shape the Triton kernel does, and in what tiles: a table that is tuned offline.

conv.json beside this: {device name: {shape: tile}}. A shape that is not there is cuDNN's, or in float8 done in
tiles that nothing was measured for; nothing is ever timed while a network runs. A shape "then norm" or "then sum and
norm" is a convolution that leaves the norm's partials, with that norm, and was faster than the two by themselves.
``python -m bench.gpu --only convolutions`` writes it. It is empty: nothing has been tuned.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sgm_engine.kernels.tables import measured
from sgm_engine.kernels.triton.conv import ConvTile

PATH = Path(__file__).parent / "conv.json"
Table = measured.Table[ConvTile]


def read(path: Path = PATH) -> Table:
    return measured.read(path, "convolutions", lambda tile: ConvTile(**tile))


def write(table: Table, path: Path = PATH) -> None:
    measured.write(table, path, asdict)


@cache
def table() -> Table:
    return read()


def shape_key(x: Tensor, weight: Tensor, dilation: int, then: str = "") -> str:
    """Of x [N, Cin, H, W] and weight [Cout, Cin, k, k]: "bfloat16 128×32×32 128→128 3×3 d1 at 64, then norm"."""
    dtype, (n, c_in, height, width), (c_out, _, k, _) = str(weight.dtype).removeprefix("torch."), x.shape, weight.shape
    key = f"{dtype} {c_in}×{height}×{width} {c_in}→{c_out} {k}×{k} d{dilation} at {n}"
    return f"{key}, then {then}" if then else key


def choose(x: Tensor, weight: Tensor, dilation: int, then: str = "") -> ConvTile | None:
    """The tile for this shape on x's device; None: nothing was measured. then: "", "norm" or "sum and norm"."""
    if not table() or not x.is_cuda:
        return None
    return table().get(torch.cuda.get_device_name(x.device), {}).get(shape_key(x, weight, dilation, then))
