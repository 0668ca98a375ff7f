"""What the tests of norm share."""

import pytest
import torch

from sgm_engine import _C
from sgm_engine.kernels import cpu, reference
from sgm_engine.kernels.arguments import Norm

GUARD = 33  # elements before and after an output: odd, so that nothing is aligned


@pytest.fixture(autouse=True)
def machine():
    isa, threads = _C.isa(), _C.num_threads()
    yield
    _C.set_isa(isa)
    _C.set_num_threads(threads)


def images(shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0, mean=0.0, std=1.0):
    """[N, C, H, W], each channel with a mean of its own, of the size of ``mean``."""
    g = torch.Generator().manual_seed(seed)
    x = std * torch.randn(shape, generator=g) + mean * torch.randn(1, shape[1], 1, 1, generator=g)
    return x.to(dtype).contiguous(memory_format=layout)


def embedding(levels, channels, seed=1):
    """γ, α, β: [levels, channels] views of one table, row stride 3·channels."""
    table = torch.randn(levels, 3 * channels, generator=torch.Generator().manual_seed(seed))
    return table.split(channels, dim=1)


def poisoned(x):
    """NaN in the shape and strides of x, and the buffer round it, to see what was written where."""
    buffer = torch.full((x.numel() + 2 * GUARD,), float("nan"), dtype=x.dtype)
    return buffer.as_strided(x.shape, x.stride(), GUARD), buffer


def launch(x, gamma=None, alpha=None, beta=None, level=None, activation="none", residual=None, eps=1e-5, groups=None):
    """The launcher on poisoned memory; (y, sum or None)."""
    (y, y_buffer), (total, total_buffer) = poisoned(x), poisoned(x)
    workspace = torch.full((_C.norm_workspace_size(*x.shape[:2]) + GUARD,), float("nan"))
    sum_out = None if residual is None else total
    cpu.norm(Norm(x, gamma, alpha, beta, level, activation, residual, eps, y, sum_out, workspace, groups))
    for buffer in (y_buffer, total_buffer, workspace):
        assert buffer[-GUARD:].isnan().all(), "written past the end"
    assert y_buffer[:GUARD].isnan().all() and total_buffer[:GUARD].isnan().all(), "written before the beginning"
    return y, total if residual is not None else None


def worst(y, exact):
    return (y.double() - exact).abs().max().item() if y.numel() else 0.0


def check(y, x, *args, residual=None, **kwargs):
    """y against float64 on the same input; the formula in float32, rounded to x's dtype, sets the measure."""
    x = x if residual is None else x + residual
    double = (None if p is None or p.dtype == torch.int64 else p.double() for p in args[:3])
    exact = reference.noise_conditioned_norm(x.double(), *double, *args[3:], **kwargs)
    formula = reference.noise_conditioned_norm(x.float(), *args, **kwargs).to(x.dtype)
    ulp = torch.finfo(torch.float32).eps * (exact.abs().max().item() if exact.numel() else 0)
    error, limit = worst(y, exact), 2 * worst(formula, exact) + 2 * ulp
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"
