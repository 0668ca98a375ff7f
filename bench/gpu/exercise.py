"""Every kernel once or twice, small: what a sanitizer or a profiler watches. ``cuda()``, ``triton()``."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from bench.gpu import norms
from bench.gpu.kernels import slots, update
from bench.gpu.timing import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((32, 16), (6, 5))  # channels, side
# batch, side, kernel, dilation, whether by TMA
CONVOLUTIONS = ((2, 8, 3, 1, False), (3, 5, 3, 2, False), (2, 8, 1, 1, False), (3, 8, 3, 2, True), (2, 8, 1, 1, True))


def cuda() -> None:
    from sgm_engine.kernels import cuda

    _updates(cuda.noise_fill, cuda.langevin_update, DTYPES)
    _norms(cuda, DTYPES, ("auto", "portable"))
    torch.cuda.synchronize()


def triton() -> None:
    from sgm_engine.kernels.triton import noise as triton_noise
    from sgm_engine.kernels.triton import norm as triton_norm
    from sgm_engine.kernels.triton import update as triton_update

    _updates(triton_noise.noise_fill, triton_update.langevin_update, DTYPES[:2])
    _norms(triton_norm, DTYPES[:2], (None,))
    _backward()
    _convolutions()
    torch.cuda.synchronize()


def _updates(noise_fill, langevin_update, dtypes) -> None:
    for shape in ((2, 3, 16, 16), (2, 5, 3, 3)):
        state = slots(shape[0], 3)
        for layout in LAYOUTS:
            x = torch.empty(shape, device=DEVICE, memory_format=layout)
            noise_fill(x, state["seed"], state["sample_id"], 0, 0, "normal")
            for dtype in dtypes:
                update(langevin_update, x, x.to(dtype), state)


def _norms(module: ModuleType, dtypes, variants) -> None:
    for what, (options, _) in norms.FORMS.items():
        for channels, side in SHAPES:
            if channels % (options.get("groups") or 1) == 0:
                for dtype in dtypes:
                    for layout in LAYOUTS:
                        for variant in variants:
                            norms.case(module, 2, channels, side, dtype, layout, what, variant)[0]()


def _backward() -> None:
    from sgm_engine.kernels.arguments import NormBackward
    from sgm_engine.kernels.triton import norm_backward as triton_norm_backward

    for channels, side in SHAPES:
        x, grad = torch.randn(2, 2, channels, side, side, device=DEVICE)
        gamma, dx, parts = torch.ones(channels, device=DEVICE), torch.empty_like(x), x.new_empty(2, 2, channels)
        triton_norm_backward.norm_backward(NormBackward(grad, x, gamma, None, "silu", 1e-5, 2, dx, *parts))


def _convolutions() -> None:
    """3×3 and 1×1, with what may follow: whole tiles and a last one that is not; and by TMA."""
    from sgm_engine.kernels.triton import conv as triton_conv
    from sgm_engine.kernels.triton import float8 as triton_float8

    capability = torch.cuda.get_device_capability()
    for batch, side, kernel, dilation, tma in CONVOLUTIONS:
        if tma and capability < (9, 0):
            continue
        tile = triton_conv.ConvTile(pixels=64, channels=32, depth=32, warps=4, tma=tma)
        x, residual = (_image(torch.randn(batch, 32, side, side, device=DEVICE)) for _ in range(2))
        weight = _image(torch.randn(64, 32, kernel, kernel, device=DEVICE))
        residual = residual.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(residual)
        bias = torch.randn(64, device=DEVICE)
        partial = torch.empty(batch, side * side // 64, 2, 64, device=DEVICE) if side == 8 else None
        triton_conv.convolution(x, weight, bias, residual, dilation, out, partial, tile)
        if capability >= (8, 9):
            x8 = torch.empty_like(x, dtype=torch.float8_e4m3fn)
            triton_float8.quantise(x, 40.0, x8)
            weight8 = weight.to(torch.float8_e4m3fn)
            triton_conv.convolution(x8, weight8, bias, None, dilation, out, partial, tile, torch.ones_like(bias))


def _image(x: Tensor) -> Tensor:
    return x.bfloat16().contiguous(memory_format=torch.channels_last)
