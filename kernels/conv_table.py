"""Which convolutions of which shape the Triton kernel does, and in what tiles: a table that is tuned offline.

conv_table.json beside this: {device name: {shape: tile}}. A shape that is not there is cuDNN's, and nothing is ever
timed while a network runs. ``python -m bench.gpu --only convolutions`` writes it. It is empty: nothing has been tuned.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sgm_engine.kernels.triton_conv import ConvTile, as_dict

PATH = Path(__file__).parent / "conv_table.json"
Table = dict[str, dict[str, ConvTile]]


def read(path: Path = PATH) -> Table:
    """ValueError names the file and what is wrong with it."""
    try:
        found = json.loads(path.read_text())
        return {device: {key: ConvTile(**tile) for key, tile in shapes.items()} for device, shapes in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of convolutions ({error}): tune it again, or put {{}} there"
        ) from error


def write(table: Table, path: Path = PATH) -> None:
    """Sorted, so that two tunings can be compared line by line."""
    plain = {d: {shape: as_dict(tile) for shape, tile in sorted(shapes.items())} for d, shapes in sorted(table.items())}
    path.write_text(json.dumps(plain, indent=1) + "\n")


@cache
def table() -> Table:
    return read()


def shape_key(x: Tensor, weight: Tensor, dilation: int) -> str:
    """Of x [N, Cin, H, W] and weight [Cout, Cin, k, k]: "bfloat16 128×32×32 128→128 3×3 d1 at 64"."""
    dtype, (n, c_in, height, width), (c_out, _, k, _) = str(x.dtype).removeprefix("torch."), x.shape, weight.shape
    return f"{dtype} {c_in}×{height}×{width} {c_in}→{c_out} {k}×{k} d{dilation} at {n}"


def choose(x: Tensor, weight: Tensor, dilation: int) -> ConvTile | None:
    """The tile for this shape on x's device; None: cuDNN."""
    if not table() or not x.is_cuda:
        return None
    return table().get(torch.cuda.get_device_name(x.device), {}).get(shape_key(x, weight, dilation))
