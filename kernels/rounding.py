"""Whether this machine's compiler keeps to the definition of the noise: every product and sum rounded by itself."""

from __future__ import annotations

from functools import cache

import torch
from triton import knobs

BLACKWELL = (10, 0)
FIRST_RIGHT = (13, 1)  # ptxas


def fuses(capability: tuple[int, int]) -> bool:
    """ptxas 12.9 and 13.0 make one fused operation of mul.rn.f32x2 and add.rn.f32x2 on sm_100 and sm_120; not 13.1."""
    return capability >= BLACKWELL and _version() < FIRST_RIGHT


@cache
def refuse_fusion(device: torch.device) -> None:
    """RuntimeError if Triton would make other noise on this GPU than the definition: it is asked for the same bits."""
    if device.type == "cuda" and not torch.version.hip and fuses(torch.cuda.get_device_capability(device)):
        tool = knobs.nvidia.ptxas_blackwell
        raise RuntimeError(
            f"ptxas {tool.version} ({tool.path}) fuses products and sums that the noise rounds one by one on "
            f"{torch.cuda.get_device_name(device)}: pip install 'triton>=3.7', or set TRITON_PTXAS_BLACKWELL_PATH to "
            f"a ptxas of CUDA {'.'.join(map(str, FIRST_RIGHT))} or later"
        )


def _version() -> tuple[int, ...]:
    return tuple(map(int, knobs.nvidia.ptxas_blackwell.version.split(".")))
