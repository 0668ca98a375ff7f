"""Triton's kernels of what follows, compiled side by side into Triton's cache, so that no stage waits for one.

No process here uses the GPU: Triton is told for which one it compiles. A kernel that is missing from the list costs a
stage the seconds of its compilation, nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.gpu import counts, norms
from bench.gpu.apart import short
from bench.gpu.stages import Row
from sgm_engine.kernels.arguments import Norm, Update
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton import noise as triton_noise
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton import update as triton_update
from sgm_engine.kernels.triton.launch import Launch

LEVELS = 10
_launches: list[tuple[str, Launch]] = []  # what the workers, forked from here, find by its number


class Compiler:
    """As much of Triton's driver as a launch asks before it compiles."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiling(capability: int, launches: Callable[[], Iterator[tuple[str, Launch]]]) -> Iterator[Row]:
    """A row that counts, and one for each kernel that does not compile.

    capability: 90 for sm_90. launches: (name, launch) of meta tensors; those that are one kernel are compiled once.
    """
    unique = {_key(launch): (name, launch) for name, launch in launches()}
    _launches[:] = unique.values()
    workers = min(len(_launches), len(os.sched_getaffinity(0)))
    began = time.perf_counter()
    row: Row = {"case": "kernels", "compiled": 0, "of": len(_launches), "workers": workers}
    row |= {"s": 0.0, "s of a core": 0.0}
    yield row  # which goes on counting
    with multiprocessing.get_context("fork").Pool(workers, _prepare, (capability,)) as pool:
        for name, spent, failed in pool.imap_unordered(_compile, range(len(_launches))):
            row["compiled"] += failed is None
            row |= {"s": time.perf_counter() - began, "s of a core": row["s of a core"] + spent}
            if failed:
                yield {"case": name, "failed": failed}


def _prepare(capability: int) -> None:
    torch.set_num_threads(1)
    driver.set_active(Compiler(capability))


def _compile(number: int) -> tuple[str, float, str | None]:
    name, launch = _launches[number]
    began, failed = time.perf_counter(), None
    try:
        arguments = launch.arguments | launch.constants | launch.settings
        launch.kernel.run(grid=(launch.programs,), warmup=True, **arguments)
    except Exception as error:
        failed = short(error)
    return name, time.perf_counter() - began, failed


def _key(launch: Launch) -> str:
    def of(value: object) -> object:
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        return (value == 1, value % 16 == 0) if type(value) is int else str(value)

    given = sorted((name, of(value)) for name, value in launch.arguments.items())
    return str((launch.kernel.__name__, given, sorted(launch.constants.items()), sorted(launch.settings.items())))


# What is launched --------------------------------------------------------------------------------------------------


def of_step(ngf: int = counts.NGF, side: int = counts.SIDE, batches: tuple[int, ...] = (1, 128)) -> Iterator:
    """By a step of NCSN with empty tables, in bfloat16, as an engine makes it."""
    # Counted in a process of its own: where PyTorch has computed with several threads, those forked later hang.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        ops = pool.apply(_counted, (ngf, side))
    for op in ops:
        if op.kind == "norm":
            names = ("residual", "before", "pool", "activation", "bias", "residual_bias")
            options = dict(zip(names, op.form, strict=True))
            for i, launch in enumerate(of_norm(op.shape, options)):
                yield f"norm {op.shape} {options}, kernel {i}", launch
    for batch in batches:
        x = torch.empty(batch, 3, side, side, device="meta").to(memory_format=torch.channels_last)
        coef, draw = torch.empty(9, 4, device="meta"), torch.empty(9, dtype=torch.int32, device="meta")
        row, stop, seed, sample_id, bad_row = torch.empty(5, batch, dtype=torch.int64, device="meta").unbind(0)
        update = Update(x, x.bfloat16(), coef, draw, row, stop, seed, sample_id, bad_row, None, x, True)
        yield f"update at {batch}", triton_update.describe(update)
        yield f"noise at {batch}", triton_noise.describe(x, seed, sample_id, 0, 0, "normal")


def _counted(ngf: int, side: int) -> tuple[counts.Op, ...]:
    return counts.step(ngf, side)


def of_norm(
    shape: tuple[int, ...], options: dict, groups: int | None = None, slab: int | None = None
) -> tuple[Launch, ...]:
    x = torch.empty(8, *shape, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    residual = torch.empty_like(x) if options.get("residual") else None
    before = options.get("before", "none")
    total = None if residual is None and before == "none" else torch.empty_like(x)
    gamma, alpha, beta = torch.empty(LEVELS, 3 * shape[0], device="meta").split(shape[0], 1)
    level = torch.empty(8, dtype=torch.int64, device="meta")
    workspace = torch.empty(triton_norm.norm_workspace_size(x), device="meta")
    given = (x, gamma, None if groups else alpha, beta, level, options.get("activation", "none"), residual, 1e-5)
    out = torch.empty_like(x)
    biases = {name: gamma.new_empty(shape[0]) for name in ("bias", "residual_bias") if options.get(name)}
    how = biases | {"groups": groups, "before": before, "pool": options.get("pool", False), "slab": slab}
    return triton_norm.describe(Norm(*given, out, total, workspace, **how))


def of_backends(shapes: list[tuple[int, int]]) -> Iterator[tuple[str, Launch]]:
    """By the norms that are timed. shapes: (channels, side)."""
    for channels, side in shapes:
        for what, (options, _) in norms.FORMS.items():
            for i, launch in enumerate(of_norm((channels, side, side), options, options.get("groups"))):
                yield f"{what} {channels}×{side}², kernel {i}", launch


def of_convolutions(shapes: list[tuple[int, int, int, int]], tiles: tuple) -> Iterator[tuple[str, Launch]]:
    """By the convolutions that are timed, alone and with what follows them. shapes: as bench.gpu.convolutions has."""
    for c_in, c_out, side, dilation in shapes:
        x, y = (_image(c, side) for c in (c_in, c_out))
        weight = torch.empty(c_out, c_in, 3, 3, dtype=torch.bfloat16, device="meta")
        weight, bias = weight.to(memory_format=torch.channels_last), weight.new_empty(c_out)
        for tile in tiles:
            if triton_conv.refusal(x, weight, tile):
                continue
            slabs = torch.empty(len(x), side * side // tile.pixels, 2, c_out, device="meta")
            for then, rest in (("", (None, None)), (", norm", (None, slabs)), (", sum and norm", (y, slabs))):
                residual, partial = rest
                name = f"{c_in}→{c_out} at {side}² d{dilation} {tile}{then}"
                yield name, triton_conv.describe(x, weight, bias, residual, dilation, y, partial, tile)
            (apply,) = of_norm(tuple(y.shape[1:]), {"activation": "elu"}, slab=tile.pixels)
            yield f"norm after {c_out} at {side}² by {tile.pixels}", apply


def _image(channels: int, side: int) -> Tensor:
    x = torch.empty(8, channels, side, side, dtype=torch.bfloat16, device="meta")
    return x.to(memory_format=torch.channels_last)
