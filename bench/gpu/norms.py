"""The norm, in each of the forms that a network has it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench.gpu import timing
from bench.gpu.apart import Case
from bench.gpu.stages import Row
from bench.gpu.timing import DEVICE

SHAPES = [(128, 32), (256, 16), (64, 28)]  # channels, side: the norms of NCSN on CIFAR-10 and MNIST
BATCHES = (1, 16, 64, 128, 256)
# What it is → (arguments, reads and writes of a tensor that cannot be avoided).
FORMS = {
    "norm + ELU": ({"activation": "elu"}, 2),
    "add + norm + ELU": ({"activation": "elu", "residual": True}, 4),
    "norm + 5×5 mean": ({"pool": True}, 2),
    "add + ELU → (norm + 5×5 mean, itself)": ({"residual": True, "before": "elu", "pool": True}, 4),
    "group norm + SiLU": ({"activation": "silu", "groups": 32}, 2),
}
VARIANTS = (("CUDA cluster", "cluster"), ("CUDA portable", "portable"), ("Triton", None))


def case(module, batch, channels, side, dtype, layout, what="norm + ELU", variant=None):
    """(a call of module.norm on buffers of its own, its check against float64 → an error message or None)."""
    from sgm_engine.kernels import reference
    from sgm_engine.kernels.arguments import Norm

    options = {"activation": "none", "residual": False, "before": "none", "pool": False, "groups": None}
    activation, residual, before, pool, groups = (options | FORMS[what][0]).values()
    shape = (batch, channels, side, side)
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
    other = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout) if residual else None
    out, total = torch.full_like(x, float("nan")), None
    if residual or before != "none":
        total = torch.full_like(x, float("nan"))
    gamma, alpha, beta = torch.randn(10, 3 * channels, device=DEVICE).split(channels, 1)
    alpha = None if groups else alpha
    level = torch.arange(batch, device=DEVICE) % 10
    workspace = torch.empty(module.norm_workspace_size(x), device=DEVICE)
    extra = {} if variant is None else {"variant": variant}

    def call() -> None:
        tensors = (x, gamma, alpha, beta, level, activation, other, 1e-5, out, total, workspace)
        module.norm(Norm(*tensors, groups, before, pool), **extra)

    def check() -> str | None:
        few = slice(0, 8)
        s = x[few] if total is None else total[few]
        if total is not None:
            exact = reference.ACTIVATIONS[before]((x[few] + other[few]).double())
            if not bool(((s.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()):
                return "the tensor beside it is wrong"
        rest = {"groups": groups, "pool": pool}
        f64 = [None if p is None else p.double() for p in (gamma, alpha, beta)]
        want = reference.noise_conditioned_norm(s.double(), *f64, level[few], activation, **rest)
        eager = reference.noise_conditioned_norm(s.float(), gamma, alpha, beta, level[few], activation, **rest)
        allowed = 2 * (eager - want).abs().max() + 0.505 * torch.finfo(dtype).eps * want.abs() + 1e-5
        error = (out[few].double() - want).abs()
        return None if bool((error <= allowed).all()) else f"wrong by {float(error.max()):.3g}"

    return call, check


def norms(report: Callable[..., Row], shapes: list | None = None, batches: tuple | None = None) -> Iterator[Case]:
    for channels, side in shapes or SHAPES:
        for what in FORMS:
            for batch in batches or BATCHES:
                for backend, variant in VARIANTS:
                    if variant != "cluster" or "pool" not in FORMS[what][0]:
                        name = f"{what} {channels}×{side}², bf16 NHWC"
                        row = partial(measure, report, name, what, batch, channels, side, backend)
                        yield f"{name} at {batch}, {backend}", row


def measure(report, name: str, what: str, batch: int, channels: int, side: int, backend: str) -> Iterator[Row]:
    from sgm_engine.kernels import cuda
    from sgm_engine.kernels.tables import backend as backend_table
    from sgm_engine.kernels.triton import norm as triton_norm

    variant = dict(VARIANTS)[backend]
    if variant == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        return
    options, tensors = FORMS[what]
    moved = tensors * 2 * batch * channels * side * side
    x = torch.empty(batch, channels, side, side, dtype=torch.bfloat16, device="meta")
    x = x.to(memory_format=torch.channels_last)
    given = {"residual": False, "groups": None, "before": "none", "pool": False} | options
    key = backend_table.norm_case(x, *(given[name] for name in ("residual", "groups", "before", "pool")))
    module = triton_norm if variant is None else cuda
    how = (batch, channels, side, torch.bfloat16, torch.channels_last, what, variant)
    sets = [case(module, *how) for _ in range(timing.copies(moved))]
    sets[0][0]()
    yield report(name, backend, batch, moved, [call for call, _ in sets], sets[0][1](), key)
