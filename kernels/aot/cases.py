"""What compile.py compiles: every kernel at the shapes of the published and the bundled networks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgm_engine.kernels.arguments import Norm, NormBackward, Update
from sgm_engine.kernels.triton import conv as triton_conv
from sgm_engine.kernels.triton import float8 as triton_float8
from sgm_engine.kernels.triton import noise as triton_noise
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton import norm_backward as triton_norm_backward
from sgm_engine.kernels.triton import update as triton_update
from sgm_engine.kernels.triton.launch import Launch

BATCH, FLOAT8 = 8, torch.float8_e4m3fn
HAVE_E4M3 = ("sm_90", "sm_100", "sm_120")  # sm_89 too, which nothing here is compiled for; gfx942's is another e4m3


@dataclass(frozen=True)
class Case:
    """A launch, and what its compiled form must show."""

    launch: Launch
    loads: int = 0  # bytes a program has to read with accesses of 16 bytes or more
    stores: int = 0  # likewise written
    shared: int = 16384  # bytes of shared memory at most: a tile that goes through it needs more
    exact: bool = False  # products and sums rounded separately, subnormals kept
    targets: tuple[str, ...] = ()  # of aot.TARGETS; empty: all
    noises: int = 1  # how often four normals are made, if they are


@functools.cache
def cases() -> dict[str, Case]:
    """Every kernel, at the shapes of the published and the bundled networks, over dtypes, layouts and options."""
    return dict([*_noise_cases(), *_update_cases(), *_norm_cases(), *_conv_cases(), *_float8_cases()])


def _tensor(*shape: int, dtype: torch.dtype = torch.float32, nhwc: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if nhwc else x


def _slots() -> Tensor:
    return _tensor(BATCH, dtype=torch.int64)


def _noise_cases() -> Iterator[tuple[str, Case]]:
    quad_bytes = 16 * triton_noise.CONFIG.quads
    for kind, shape, nhwc in (
        ("normal", (3, 32, 32), False),
        ("normal", (3, 32, 32), True),
        ("normal", (1, 28, 28), False),
        ("uniform", (3, 32, 32), False),
        ("normal", (3, 5, 7), False),
    ):
        launch = triton_noise.describe(_tensor(BATCH, *shape, nhwc=nhwc), _slots(), _slots(), 3, 0, kind)
        wide = not nhwc and shape[1] % 2 == 0
        yield f"noise {kind} {_words(shape, nhwc)}", Case(launch, stores=quad_bytes if wide else 0, exact=True)


def _update_cases() -> Iterator[tuple[str, Case]]:
    for shape, dtype, x_nhwc, score_nhwc, previous, captured, *extra in (
        ((3, 32, 32), torch.bfloat16, False, True, False, True),
        ((3, 32, 32), torch.bfloat16, False, False, False, True),
        ((3, 32, 32), torch.float32, False, False, True, True),
        ((3, 32, 32), torch.float16, False, True, True, True),
        ((3, 32, 32), torch.float32, True, True, True, True),
        ((3, 32, 32), torch.float32, False, False, False, False),
        ((1, 28, 28), torch.float32, False, False, False, True),
        ((1, 28, 28), torch.bfloat16, False, False, False, True),
        ((3, 256, 256), torch.bfloat16, False, True, False, True),
        ((3, 5, 7), torch.float32, False, True, True, True),
        ((3, 32, 32), torch.float32, False, False, True, True, "kept, gain"),
        ((3, 32, 32), torch.bfloat16, False, True, True, True, "kept, gain"),
        ((3, 32, 32), torch.bfloat16, False, True, False, True, "known"),
        ((3, 32, 32), torch.float32, False, False, True, True, "kept, gain", "known"),
        ((3, 32, 32), torch.bfloat16, True, True, True, True, "kept, gain", "known"),
        ((1, 28, 28), torch.float32, False, False, False, True, "known"),
        ((3, 5, 7), torch.float32, False, True, False, True, "known"),
    ):
        keep, known = "kept, gain" in extra, "known" in extra
        x = _tensor(BATCH, *shape, nhwc=x_nhwc)
        arguments = Update(
            x,
            _tensor(BATCH, *shape, dtype=dtype, nhwc=score_nhwc),
            _tensor(9, 4),
            _tensor(9, dtype=torch.int32),
            _slots(),
            _slots() if captured else None,
            _slots(),
            _slots(),
            _slots() if captured else None,
            _tensor(BATCH, *shape) if previous else None,
            x if captured else torch.empty_like(x),
            captured,
            _tensor(9, 2) if keep else None,
            _tensor(BATCH) if keep else None,
            torch.empty_like(x) if known else None,
            _tensor(9) if known else None,
            _tensor(9, dtype=torch.int32) if known else None,
        )
        launch = triton_update.describe(arguments)
        quad_bytes = 16 * launch.constants["QUADS"]
        wide = not x_nhwc and shape[1] % 2 == 0  # the state; a bfloat16 quad is 8 bytes
        score_wide = wide and dtype == torch.float32 and not score_nhwc
        yield (
            f"update {_words(shape, x_nhwc)} score {_words(dtype, score_nhwc)}"
            f"{' previous' if previous else ''}{''.join(f' {e}' for e in extra)}{'' if captured else ' pure'}",
            Case(
                launch,
                loads=quad_bytes * (wide + score_wide + (wide and previous) + (wide and known)),
                stores=quad_bytes * wide * (1 + keep),
                exact=True,
                noises=1 + known,
            ),
        )


def _norm_cases() -> Iterator[tuple[str, Case]]:
    networks = [(128, 32, 32), (256, 16, 16), (64, 28, 28), (128, 14, 14), (32, 28, 28), (64, 14, 14)]
    variants = [(shape, torch.bfloat16, True, "elu", residual) for shape in networks for residual in (False, True)]
    variants += [(shape, torch.float32, nhwc, "elu", False) for shape in networks[::2] for nhwc in (True, False)]
    variants += [((128, 32, 32), torch.bfloat16, True, activation, False) for activation in ("none", "relu", "silu")]
    variants += [
        ((128, 32, 32), torch.bfloat16, False, "elu", True),
        ((128, 32, 32), torch.float16, True, "elu", True),
        ((128, 256, 256), torch.bfloat16, True, "elu", False),  # several tiles a slab
        ((1024, 8, 8), torch.bfloat16, True, "none", False),
        ((5, 7, 3), torch.float32, False, "none", True),  # nothing is aligned
        ((5, 7, 3), torch.bfloat16, True, "silu", False),
    ]
    for shape, dtype, nhwc, activation, residual in variants:
        x, other = (_tensor(BATCH, *shape, dtype=dtype, nhwc=nhwc) for _ in range(2))
        gamma, alpha, beta = _tensor(10, 3 * shape[0]).chunk(3, 1)
        level = _slots()
        if activation == "none":  # without a level and across-channel term, as in InstanceNorm
            gamma, alpha, beta, level = gamma[0], None, beta[0], None
        workspace = _tensor(triton_norm.norm_workspace_size(x))
        sum_out = torch.empty_like(x) if residual else None
        tensors = (gamma, alpha, beta, level, activation, other if residual else None, 1e-5, x, sum_out, workspace)
        bias = _tensor(shape[0]) if shape == (256, 16, 16) else None
        stats, apply = triton_norm.describe(Norm(x, *tensors, bias=bias))
        # 16 bytes a thread need an aligned row: all channels of a pixel, or all pixels of a channel.
        aligned = (shape[0] if nhwc else shape[1] * shape[2]) * dtype.itemsize % 16 == 0
        first, tile = (_tile(launch) * dtype.itemsize * aligned for launch in (stats, apply))
        words = f"{_words(shape, nhwc)} {_words(dtype)}"
        if activation in ("elu", "none"):
            added = f"{' residual' if residual else ''}{' bias' if residual and bias is not None else ''}"
            name = f"norm stats {words}{added}{'' if level is not None else ' plain'}"
            yield name, Case(stats, loads=first * (1 + residual), stores=first * residual)
        if not residual or shape not in networks:
            added = "" if bias is None else " bias"
            yield f"norm apply {words} {activation}{added}", Case(apply, loads=tile, stores=tile)
    for shape, nhwc in (((128, 32, 32), True), ((1024, 8, 8), False)):  # GroupNorm
        x, parameter = _tensor(BATCH, *shape, dtype=torch.bfloat16, nhwc=nhwc), _tensor(shape[0])
        workspace = _tensor(triton_norm.norm_workspace_size(x))
        _, group, apply = triton_norm.describe(
            Norm(x, parameter, None, parameter, None, "silu", None, 1e-5, x, None, workspace, groups=32, bias=parameter)
        )
        tile = 2 * _tile(apply)
        yield f"norm group {_words(shape, nhwc)}", Case(group)
        yield f"norm apply {_words(shape, nhwc)} groups", Case(apply, loads=tile, stores=tile)
    for dtype in (torch.float32, torch.bfloat16):
        x, parameter, part = _tensor(BATCH, 128, 32, 32, dtype=dtype), _tensor(128), _tensor(BATCH, 128)
        arguments = NormBackward(x, x, parameter, parameter, "silu", 1e-5, 32, x, part, part)
        (backward,) = triton_norm_backward.describe(arguments)
        yield f"norm backward 128·32·32 {_words(dtype)} groups", Case(backward)
    for shape in ((128, 32, 32), (256, 16, 16)):  # chained pooling
        x, other = (_tensor(BATCH, *shape, dtype=torch.bfloat16, nhwc=True) for _ in range(2))
        gamma, alpha, beta = _tensor(10, 3 * shape[0]).chunk(3, 1)
        workspace = _tensor(triton_norm.norm_workspace_size(x))
        arguments = (x, gamma, alpha, beta, _slots(), "none", other, 1e-5, torch.empty_like(x), torch.empty_like(x))
        biases = {"bias": _tensor(shape[0]), "residual_bias": _tensor(shape[0])}
        stats, pool = triton_norm.describe(Norm(*arguments, workspace, before="elu", pool=True, **biases))
        first, tile = (2 * _tile(launch) for launch in (stats, pool))
        if shape == (128, 32, 32):
            yield (
                f"norm stats {_words(shape, True)} residual, biases, elu before",
                Case(stats, loads=2 * first, stores=first),
            )
        yield f"norm pool {_words(shape, True)}", Case(pool, loads=tile, stores=tile)


def _conv_cases() -> Iterator[tuple[str, Case]]:
    """Every tile that is tuned over, with all that can follow. Its loads go past the registers, to shared memory."""
    shapes = ((128, 32, 1), (256, 16, 1), (256, 16, 4), (256, 16, 1), (256, 16, 2), (128, 32, 1), (256, 16, 4))
    for (channels, side, dilation), tile in zip(shapes, triton_conv.TILES + triton_conv.LARGE_TILES, strict=True):
        shape = (channels, side, side)
        x, residual = (_tensor(BATCH, channels, side, side, dtype=torch.bfloat16, nhwc=True) for _ in range(2))
        weight = _tensor(channels, channels, 3, 3, dtype=torch.bfloat16, nhwc=True)
        partial = _tensor(BATCH, side * side // tile.pixels, 2, channels)
        bias = _tensor(channels, dtype=torch.bfloat16)
        launch = triton_conv.describe(x, weight, bias, residual, dilation, torch.empty_like(x), partial, tile)
        written = 2 * tile.pixels * tile.channels
        large = {"shared": 3 * 2**16 + 64, "targets": ("sm_90", "sm_100")}
        where = large if tile in triton_conv.LARGE_TILES else {"shared": 3 * 2**15 + 64}
        name = f"conv {_words(shape)} 3×3 d{dilation} {_tile_name(tile)}"
        yield name, Case(launch, loads=written, stores=written, **where)
        parameter = _tensor(10, channels)
        arguments = (x, *[parameter] * 3, _slots(), "elu", None, 1e-5, x, None, partial)
        (apply,) = triton_norm.describe(Norm(*arguments, slab=tile.pixels))
        written = 2 * _tile(apply)
        if tile in triton_conv.TILES:
            yield f"norm apply after conv {_words(shape)} by {tile.pixels}", Case(apply, loads=written, stores=written)


def _float8_cases() -> Iterator[tuple[str, Case]]:
    """Every tile that is tuned over and that is taken untuned, and what makes its input."""
    tiles = [*triton_conv.FLOAT8_TILES, *(triton_conv.float8_tile(c, c) for c in (32, 64))]
    for channels, side, tile in zip((128, 128, 256, 128, 32, 64), (32, 32, 16, 32, 28, 28), tiles, strict=True):
        x, weight = _tensor(BATCH, channels, side, side, nhwc=True), _tensor(channels, channels, 3, 3, nhwc=True)
        x, weight = x.to(FLOAT8), weight.to(FLOAT8)
        out, scale = _tensor(BATCH, channels, side, side, dtype=torch.bfloat16, nhwc=True), _tensor(channels)
        partial = _tensor(BATCH, side * side // tile.pixels, 2, channels) if tile in triton_conv.FLOAT8_TILES else None
        launch = triton_conv.describe(x, weight, scale, torch.empty_like(out), 1, out, partial, tile, scale)
        written = 2 * tile.pixels * tile.channels
        name = f"conv float8 {_words((channels, side, side))} {_tile_name(tile)}"
        yield name, Case(launch, loads=written, stores=written, shared=3 * 2**15 + 64, targets=HAVE_E4M3)
    for channels, side, activation in ((128, 32, "elu"), (64, 28, "silu")):
        x, parameter = _tensor(BATCH, channels, side, side, dtype=torch.bfloat16, nhwc=True), _tensor(10, channels)
        workspace = _tensor(triton_norm.norm_workspace_size(x))
        arguments = (x, *[parameter] * 3, _slots(), activation, None, 1e-5, x.to(FLOAT8), None, workspace)
        _, apply = triton_norm.describe(Norm(*arguments, inverse=0.5))
        tile, name = _tile(apply), f"norm apply float8 {channels}·{side}² {activation}"
        yield name, Case(apply, loads=2 * tile, stores=tile, targets=HAVE_E4M3)
    for dtype in (torch.bfloat16, torch.float32):
        x = _tensor(BATCH, 128, 32, 32, dtype=dtype, nhwc=True)
        launch = triton_float8.describe(x, 0.5, x.to(FLOAT8))
        read, written = (launch.constants["ELEMENTS"] * size for size in (dtype.itemsize, 1))
        yield f"quantise {_words(dtype)}", Case(launch, loads=read, stores=written, targets=HAVE_E4M3)


def _tile(launch: Launch) -> int:
    """Elements of the tile that a program of the norm works on at once."""
    return launch.constants["CHANNELS"] * min(launch.constants["PIXELS"], launch.constants["SLAB"])


def _tile_name(tile: triton_conv.ConvTile) -> str:
    return f"{tile.pixels}×{tile.channels}×{tile.depth}{' TMA' if tile.tma else ''}"


def _words(what: tuple[int, ...] | torch.dtype, nhwc: bool | None = None) -> str:
    text = "·".join(map(str, what)) if isinstance(what, tuple) else str(what).removeprefix("torch.")
    return text if nhwc is None else f"{text} {'NHWC' if nhwc else 'NCHW'}"
