"""noise_conditioned_norm + ELU on the CPU against PyTorch: ``pytest bench/test_norm.py``.

Each case checks the result first, then reports three ratios, all above 1 where the kernel is faster or better: eager
(the formula op by op), compiled (torch.compile of the same formula with var_mean), and share (a copy of as many
bytes as the norm must read and write, from buffers that no cache holds, over the launcher's time; x is called again and
again, so what fits a cache is in it, as it is inside a network).
"""

import time

import pytest
import torch
from torch.nn import functional as F

from bench.common import about, copier, paired_ratio
from sgm_engine.kernels import cpu, ops
from sgm_engine.kernels.arguments import Norm

SHAPES = ((32, 128, 32, 32), (32, 256, 16, 16), pytest.param((32, 64, 28, 28), marks=pytest.mark.quick))
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
LEVELS = 10


def sequence(x, table, level):
    """The formula op by op, as a user writes it on F.instance_norm, then ELU."""
    gamma, alpha, beta = (p[:, :, None, None] for p in table.to(x.dtype)[level].chunk(3, dim=1))
    mean = x.mean((2, 3), keepdim=True)
    across, over = mean.mean(1, keepdim=True), mean.var(1, keepdim=True)
    y = F.instance_norm(x, eps=1e-5) + alpha * ((mean - across) / torch.sqrt(over + 1e-5))
    return F.elu(gamma * y + beta)


def formula(x, table, level):
    """The same with var_mean in float32, which torch.compile fuses best (instance_norm would copy NHWC to NCHW)."""
    gamma, alpha, beta = (p[:, :, None, None] for p in table[level].chunk(3, dim=1))
    v = x.float()
    variance, mean = torch.var_mean(v, (2, 3), correction=0, keepdim=True)
    v2, m2 = torch.var_mean(mean, 1, keepdim=True)
    ms = (mean - m2) * torch.rsqrt(v2 + 1e-5)
    return F.elu(gamma * ((v - mean) * torch.rsqrt(variance + 1e-5) + alpha * ms) + beta).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_elu(benchmark, shape, layout, dtype, threads):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    table = torch.randn(LEVELS, 3 * shape[1], generator=g)
    level = torch.randint(0, LEVELS, (shape[0],), generator=g)
    gamma, alpha, beta = table.split(shape[1], dim=1)

    def ours():
        return ops.noise_conditioned_norm(x, gamma, alpha, beta, level, "elu")

    y = torch.empty_like(x)
    workspace = torch.empty(cpu.norm_workspace_size(x))

    def launched():  # what a loop calls: nothing checked or allocated
        cpu.norm(Norm(x, gamma, alpha, beta, level, "elu", None, 1e-5, y, None, workspace))

    torch._dynamo.reset()
    fused = torch.compile(formula, dynamic=False)

    exact = formula(x.double(), table.double(), level)  # v.float() inside: near enough to catch a wrong kernel
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours().double(), exact.double(), rtol=2 * unit, atol=1e-4)

    clock = time.thread_time if threads == 1 else time.perf_counter
    with torch.no_grad():
        eager = paired_ratio(lambda: sequence(x, table, level), ours, clock=clock)
        compiled = paired_ratio(lambda: fused(x, table, level), ours, clock=clock)
        copy, copied = copier()
        copy()
        moved = 2 * x.nbytes
        share = paired_ratio(copy, launched, clock=clock)
        benchmark.pedantic(ours, rounds=20, warmup_rounds=2)
    benchmark.extra_info |= about(dtype=dtype) | {
        "threads": threads,
        "eager": str(eager),
        "compiled": str(compiled),
        "GB/s": round(moved / share.g_seconds / 1e9, 1),
        "copy GB/s": round(copied / share.f_seconds / 1e9, 1),
        "share of copy": round(share.median * moved / copied, 2),
    }
    print(f"\n{shape} {layout} {dtype} {threads}t: eager {eager}, compiled {compiled}, "
          f"share of copy {share.median * moved / copied:.2f} ({moved / share.g_seconds / 1e9:.1f} GB/s)")  # fmt: skip
    assert eager.high >= 3, f"only {eager} times as fast as eager PyTorch"
    assert compiled.high > 1, f"only {compiled} times as fast as torch.compile"
