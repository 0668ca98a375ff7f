"""What the gate times: each workload is a function that sets up and returns a call without arguments.

Set-up is not timed. A workload uses public names only, so that it runs on an older revision too; one that this revision
cannot build raises, and the comparison says so.
"""

from __future__ import annotations

from collections.abc import Callable

Call = Callable[[], object]


def _update(shape: tuple[int, ...], score_dtype: str, channels_last: bool) -> Call:
    import torch

    from sgm_engine.kernels import ops

    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, generator=generator).to(memory_format=layout)
    score = torch.randn(shape, generator=generator).to(getattr(torch, score_dtype)).to(memory_format=layout)
    batch = shape[0]
    row, stop, seed = torch.zeros(batch, dtype=torch.int64), torch.full((batch,), 2**62), torch.full((batch,), 7)
    sample_id, bad_row = torch.arange(batch), torch.full((batch,), 2**63 - 1)
    coef, draw = torch.tensor([[1.0, 1e-3, 1e-2, 0.0]]), torch.ones(1, dtype=torch.int32)

    def call() -> None:
        row.zero_()
        ops.langevin_update_(x, score, coef, draw, row, stop, seed, sample_id, bad_row)

    return call


def _norm(shape: tuple[int, ...], dtype: str, channels_last: bool, residual: bool = False) -> Call:
    import torch

    from sgm_engine.kernels import ops

    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, generator=generator).to(getattr(torch, dtype)).to(memory_format=layout)
    added = x.clone() if residual else None
    gamma, alpha, beta = torch.randn(10, 3 * shape[1], generator=generator).split(shape[1], dim=1)
    level = torch.arange(shape[0]) % 10
    return lambda: ops.noise_conditioned_norm(x, gamma, alpha, beta, level, "elu", added)


def _noise(shape: tuple[int, ...]) -> Call:
    import torch

    from sgm_engine.kernels import ops

    out, seed, sample_id = torch.empty(shape), torch.full((shape[0],), 7), torch.arange(shape[0])
    return lambda: ops.noise_fill_(out, seed, sample_id, 0, 0, "normal")


def _chain(batch: int, levels: int, executor: str) -> Call:
    import torch

    from sgm_engine import Engine, annealed_langevin
    from sgm_engine.models import NCSN

    torch.manual_seed(0)
    model = NCSN(torch.logspace(0, -2, levels), channels=1, ngf=32).eval()
    engine = Engine(model, shape=(1, 28, 28), batch=batch, executor=executor)
    plan = annealed_langevin(model.sigmas, steps_per_level=1)
    return lambda: engine.sample(batch, seed=0, plan=plan)


WORKLOADS: dict[str, Callable[[], Call]] = {
    "update f32 nchw 32x3x32x32": lambda: _update((32, 3, 32, 32), "float32", False),
    "update bf16 nhwc 32x3x32x32": lambda: _update((32, 3, 32, 32), "bfloat16", True),
    "norm f32 nhwc 8x128x32x32": lambda: _norm((8, 128, 32, 32), "float32", True),
    "norm f32 nchw 8x128x32x32": lambda: _norm((8, 128, 32, 32), "float32", False),
    "norm bf16 nhwc 8x256x16x16": lambda: _norm((8, 256, 16, 16), "bfloat16", True),
    "norm f32 nhwc residual 8x64x28x28": lambda: _norm((8, 64, 28, 28), "float32", True, residual=True),
    "noise 32x3x32x32": lambda: _noise((32, 3, 32, 32)),
    "chain ngf32 28x28 B=4": lambda: _chain(4, 3, "auto"),
}
