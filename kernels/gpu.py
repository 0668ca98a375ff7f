"""The launchers of a GPU: each call goes to Triton, or to the CUDA C++ library where it was measured to be faster.

Noise and update are the same bits from either; norms agree to rounding.
"""

from __future__ import annotations

from torch import Tensor

from sgm_engine.kernels import cuda
from sgm_engine.kernels.arguments import Norm, Update
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


def langevin_update(u: Update) -> None:
    measured = backend_table.of_device(u.x.device)
    backend = measured.get(backend_table.update_case(u.x, u.score), TRITON) if measured else TRITON
    if backend == TRITON:
        refuse_fusion(u.x.device)
    module = triton_update if backend == TRITON else cuda
    module.langevin_update(u)


def norm(n: Norm) -> None:
    tritons = n.inverse is not None or n.slab is not None
    measured = {} if tritons else backend_table.of_device(n.x.device)
    case = backend_table.norm_case(n.x, n.residual is not None, n.groups, n.before, n.pool) if measured else ""
    backend = measured.get(case, TRITON)
    if backend == TRITON:
        triton_norm.norm(n)
    else:
        cuda.norm(n, backend.removeprefix("CUDA").strip() or "auto")


def norm_workspace_size(x: Tensor) -> int:
    """Elements of the float32 workspace that norm() of x needs, whichever backend it goes to."""
    size = triton_norm.norm_workspace_size(x)
    return max(size, cuda.norm_workspace_size(x)) if backend_table.of_device(x.device) else size
