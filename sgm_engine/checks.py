"""Arguments of the engine, checked: every error names the argument, the value and the remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from sgm_engine.plans.report import refuse_divergence
from sgm_engine.plans.schedule import check_sigmas

MAX_ID, MAX_SEED = 2**56, 2**64
SAME_SIGMA = 5e-3  # relative: sigmas rounded for print or to bfloat16 are the same, another model's are not


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {reprlib.repr(value)}")
    if value < low or (high is not None and value >= high):
        raise ValueError(
            f"{name} must be at least {low}{f' and below 2**{high.bit_length() - 1}' if high else ''}, got {value}"
        )
    return int(value)


def check_shape(shape: object) -> tuple[int, int, int]:
    if shape is None:
        raise ValueError("shape: the model has no .shape, so pass shape=(C, H, W), that of one sample")
    try:
        shape = tuple(shape)
    except TypeError:
        raise TypeError(f"shape must be (C, H, W), got {shape!r}") from None
    if len(shape) != 3:
        raise ValueError(f"shape must be (C, H, W), got {shape}")
    return tuple(check_int("shape", s, 1) for s in shape)


def check_chains(
    n: int,
    seed: int | Sequence[int] | np.ndarray,
    first_id: int,
    init: Tensor | None,
    shape: tuple[int, int, int],
    device: torch.device,
) -> list[tuple[int, int, Tensor | None]]:
    """(sample id, seed, init [C, H, W] float32 on the device) of each of n samples. One seed: their ids count up from
    first_id; n seeds: each sample has id first_id."""
    n, first_id = check_int("n", n, 0), check_int("first_id", first_id, 0, MAX_ID)
    if isinstance(seed, (np.ndarray, Tensor)) and seed.ndim == 1:
        seed = seed.tolist()
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != n:
            raise ValueError(f"seed must be one integer or n = {n} of them, got {len(seed)}")
        ids, seeds = [first_id] * n, [check_int("seed", s, 0, MAX_SEED) for s in seed]
    else:
        check_int("first_id + n", first_id + n, 0, MAX_ID + 1)
        ids, seeds = range(first_id, first_id + n), [check_int("seed", seed, 0, MAX_SEED)] * n
    if init is None:
        return list(zip(ids, seeds, [None] * n, strict=True))
    if not isinstance(init, Tensor) or not init.is_floating_point() or init.shape != (n, *shape):
        got = f"{init.dtype} {list(init.shape)}" if isinstance(init, Tensor) else type(init).__name__
        raise ValueError(f"init must be a floating point tensor {[n, *shape]}, got {got}")
    return list(zip(ids, seeds, init.detach().to(device, torch.float32), strict=True))


def own_sigmas(model: object, sigmas) -> np.ndarray:
    """The levels of a model [L], descending: ``sigmas`` where it has none itself, which it is not asked at others."""
    own = getattr(model, "sigmas", None)
    if any(t.is_meta for t in _tensors(model)):
        raise ValueError("model has parameters or buffers on the meta device, without values: load its weights first")
    if any(t.is_inference() for t in _tensors(model)):
        raise ValueError(
            "model was made in torch.inference_mode(), where changes of weights cannot be seen: make it outside"
        )
    if own is None and sigmas is None:
        raise ValueError("sigmas: the model has no .sigmas, so pass sigmas=[…], its noise levels in descending order")
    given = None if sigmas is None else check_sigmas(sigmas)
    if own is None:
        return given
    own = check_sigmas(own)
    if given is not None and (given.shape != own.shape or np.abs(given / own - 1).max() > SAME_SIGMA):
        raise ValueError(
            f"sigmas: the model has {len(own)} of its own, {own[0]:g} to {own[-1]:g}, and these differ: leave sigmas "
            "out, or take an Engine of at_sigmas(model, sigmas)"
        )
    return own


def place(model: object, device: torch.device | str | None) -> torch.device:
    """The device of the model, which is moved there if another one was asked for."""
    homes = list(dict.fromkeys(t.device for t in _tensors(model)))
    if device is None:
        device = homes[0] if homes else torch.device("cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be 'cpu', 'cuda' or one such as 'cuda:1', got {device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got '{device}': there are no kernels for it")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device='{device}' needs a CUDA build of PyTorch and a GPU; there is none: use device='cpu'"
            )
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if any(home != device for home in homes):
        model.to(device)
    return device


def _tensors(model: object) -> Iterable[Tensor]:
    return chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()


def check_plan(plan: object, sigmas: np.ndarray, model: object, shape: tuple[int, int, int]) -> None:
    """A Plan of samples ``shape`` whose rows are levels of ``sigmas`` [L], and which does not have to diverge."""
    from sgm_engine.plans.plan import Plan

    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan such as annealed_langevin(model.sigmas), got {type(plan).__name__}")
    if np.ndim(plan.start_shift) and plan.start_shift.shape != shape:
        raise ValueError(f"plan has a start_shift {list(plan.start_shift.shape)}, where samples are {list(shape)}")
    levels = len(sigmas)
    if plan.level.max() >= levels:
        raise ValueError(
            f"plan uses level {plan.level.max()}, but the model has {levels} sigmas (levels 0–{levels - 1}): take "
            "plan.on_levels(model.sigmas), or an Engine of at_sigmas(model, plan.sigmas)"
        )
    foreign = np.flatnonzero(np.abs(plan.sigma / sigmas[plan.level] - 1) > SAME_SIGMA)
    if len(foreign):
        i = foreign[0]
        raise ValueError(
            f"plan row {i} has sigma {plan.sigma[i]:g} at level {plan.level[i]}, where the model has "
            f"{sigmas[plan.level[i]]:g}: make the plan from this model's sigmas, take "
            "plan.on_levels(model.sigmas), or an Engine of at_sigmas(model, plan.sigmas)"
        )
    curvature = getattr(model, "curvature", None)
    if curvature is not None:
        refuse_divergence(plan, curvature(plan.sigma))
