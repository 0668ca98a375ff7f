"""Linear operators A of inverse problems y = A·x + noise: masks, blurs, means over blocks, and any other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


class LinearOperator:
    """A on batches: forward(x [B, C, H, W]) → [B, …], linear; adjoint(forward's output) → [B, C, H, W].

    shape: (C, H, W) of x. adjoint None: the transpose is taken by autograd. ValueError unless ⟨Ax, y⟩ = ⟨x, Aᵀy⟩.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        shape: tuple[int, int, int],
        adjoint: Callable[[Tensor], Tensor] | None = None,
    ):
        self.forward, self.shape = forward, tuple(shape)
        self.adjoint = self._transpose if adjoint is None else adjoint
        self._check()

    def _transpose(self, y: Tensor) -> Tensor:
        zero = torch.zeros(len(y), *self.shape, device=y.device, dtype=y.dtype)
        return torch.func.vjp(self.forward, zero)[1](y)[0]

    def _check(self) -> None:
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.randn(1, *self.shape, generator=generator) for _ in range(2))
        au, av = self.forward(u), self.forward(v)
        mixed, size = self.forward(2 * u - 3 * v), au.norm() + av.norm()
        if (mixed - (2 * au - 3 * av)).norm() > 1e-4 * size or self.forward(0 * u).norm() > 1e-6:
            raise ValueError("forward is not linear: A(2u − 3v) differs from 2A(u) − 3A(v)")
        y = torch.randn(au.shape, generator=generator)
        left, right = (au * y).sum(), (u * self.adjoint(y)).sum()
        if abs(left - right) > 1e-4 * (au.norm() * y.norm() + 1e-30):
            raise ValueError(f"adjoint is not forward's: ⟨Ax, y⟩ = {left:.6g}, ⟨x, Aᵀy⟩ = {right:.6g}")

    @cached_property
    def norm(self) -> float:
        """The largest singular value of A, from below, by 50 power iterations."""
        x = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(0))
        largest = 0.0
        for _ in range(50):
            x = x / x.norm().clamp_min(1e-30)
            x = self.adjoint(self.forward(x))
            largest = x.norm().sqrt().item()
        return largest


def mask(known: Tensor, shape: tuple[int, int, int]) -> LinearOperator:
    """x where ``known`` (bool, broadcast to shape) is True, else 0."""
    known = torch.as_tensor(known)
    if known.dtype != torch.bool:
        raise ValueError(f"known must be bool, True where a pixel is measured, got {known.dtype}")
    weight = known.expand(shape).float()

    def keep(x: Tensor) -> Tensor:
        return x * weight.to(x.device)

    return LinearOperator(keep, shape, keep)


def blur(kernel: Tensor, shape: tuple[int, int, int]) -> LinearOperator:
    """Correlation of every channel with ``kernel`` [k, k], k odd; pixels outside the image count as 0."""
    kernel = torch.as_tensor(kernel, dtype=torch.float32)
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
        raise ValueError(f"kernel must be [k, k] with an odd k, got {list(kernel.shape)}")
    weight, half = kernel.expand(shape[0], 1, *kernel.shape), kernel.shape[0] // 2

    def forward(x: Tensor) -> Tensor:
        return F.conv2d(x, weight.to(x.device), padding=half, groups=shape[0])

    def adjoint(y: Tensor) -> Tensor:
        return F.conv_transpose2d(y, weight.to(y.device), padding=half, groups=shape[0])

    return LinearOperator(forward, shape, adjoint)


def downsample(factor: int, shape: tuple[int, int, int]) -> LinearOperator:
    """The mean over blocks of factor × factor pixels: super-resolution asks for x given these."""
    if factor < 1 or shape[1] % factor or shape[2] % factor:
        raise ValueError(f"factor must divide the image of {shape[1]}×{shape[2]} pixels, got {factor}")

    def adjoint(y: Tensor) -> Tensor:
        return y.repeat_interleave(factor, -1).repeat_interleave(factor, -2) / factor**2

    return LinearOperator(lambda x: F.avg_pool2d(x, factor), shape, adjoint)
