"""The launchers of a GPU: each call goes to Triton, or to the CUDA C++ library where it was measured to be faster.

They take what those of triton/noise.py, update.py and norm.py take. Noise and update are the same bits
from either; norms agree to rounding.
"""

from __future__ import annotations

from torch import Tensor

from sgm_engine.kernels import cuda
from sgm_engine.kernels.rounding import refuse_fusion
from sgm_engine.kernels.tables import backend as backend_table
from sgm_engine.kernels.tables.backend import TRITON
from sgm_engine.kernels.triton import noise as triton_noise
from sgm_engine.kernels.triton import norm as triton_norm
from sgm_engine.kernels.triton import update as triton_update


def noise_fill(out: Tensor, seed: Tensor, sample_id: Tensor, draw: int, stream: int, kind: str) -> None:
    measured = backend_table.of_device(out.device)
    backend = measured.get(backend_table.noise_case(out, kind), TRITON) if measured else TRITON
    if backend == TRITON:
        refuse_fusion(out.device)
    module = triton_noise if backend == TRITON else cuda
    module.noise_fill(out, seed, sample_id, draw, stream, kind)


def langevin_update(x: Tensor, score: Tensor, *rest: object, **options: object) -> None:
    measured = backend_table.of_device(x.device)
    backend = measured.get(backend_table.update_case(x, score), TRITON) if measured else TRITON
    if backend == TRITON:
        refuse_fusion(x.device)
    module = triton_update if backend == TRITON else cuda
    module.langevin_update(x, score, *rest, **options)


def norm(
    x: Tensor,
    gamma: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    level: Tensor | None,
    activation: str,
    residual: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
    workspace: Tensor,
    groups: int | None = None,
    before: str = "none",
    pool: bool = False,
    **triton_only: object,
) -> None:
    """triton_only: inverse, slab."""
    measured = {} if triton_only else backend_table.of_device(x.device)
    case = backend_table.norm_case(x, residual is not None, groups, before, pool) if measured else ""
    backend = measured.get(case, TRITON)
    tensors = (x, gamma, alpha, beta, level, activation, residual, eps, out, sum_out, workspace, groups, before, pool)
    if backend == TRITON:
        triton_norm.norm(*tensors, **triton_only)
    else:
        cuda.norm(*tensors, backend.removeprefix("CUDA").strip() or "auto")


def norm_workspace_size(x: Tensor) -> int:
    """Elements of the float32 workspace that norm() of x needs, whichever backend it goes to."""
    size = triton_norm.norm_workspace_size(x)
    return max(size, cuda.norm_workspace_size(x)) if backend_table.of_device(x.device) else size
