"""Annealed Langevin dynamics three more times, none of them the engine's way: what the tests hold the engine to.

``float64`` is the authors' loop in float64, ``eager`` the same loop in float32 PyTorch; both are fed the noise of
kernels/noise.py. ``update`` is the fused op in NumPy, with defects that can be switched on.
"""

import numpy as np
import torch

from sgm_engine.kernels import noise


def float64(score, sigmas, steps_per_level, step_lr, shape, sample_ids, seed):
    """score(x, level: int) in float64 → the samples, float64 [B, C, H, W], last iterate denoised."""
    return _chain(score, sigmas, steps_per_level, step_lr, shape, sample_ids, seed, torch.float64).numpy()


def eager(score, sigmas, steps_per_level, step_lr, shape, sample_ids, seed):
    """The same in float32."""
    return _chain(score, sigmas, steps_per_level, step_lr, shape, sample_ids, seed, torch.float32).numpy()


def _chain(score, sigmas, steps_per_level, step_lr, shape, sample_ids, seed, dtype):
    def fill(draw, kind):
        seeds = np.full(len(sample_ids), seed, np.uint64).view(np.int64)
        z = noise.fill((len(sample_ids), *shape), seeds, np.array(sample_ids), draw, noise.STREAM["sample"], kind)
        return torch.from_numpy(z).to(dtype)

    x, draw = fill(0, "uniform"), 0
    for level, sigma in enumerate(sigmas):
        step_size = step_lr * (sigma / sigmas[-1]) ** 2
        for _ in range(steps_per_level):
            draw += 1
            x = x + step_size * score(x, level) + fill(draw, "normal") * np.sqrt(step_size * 2)
    return x + sigmas[-1] ** 2 * score(x, len(sigmas) - 1)


DEFECTS = (
    "score with the wrong sign",
    "every step draws the same noise",
    "the first step draws the noise of the start",
    "seed ignored",
    "sample id ignored",
    "high half of the sample id ignored",
    "noise follows the slot",
    "row not advanced",
    "every channel gets the same noise",
    "uniform noise",
    "noise scaled by the variance",
    "state kept in bfloat16",
    "noise added before the drift is rounded away",
)


def update(defect=None):
    """``langevin_update_`` in NumPy; ``defect`` one of DEFECTS, or None for the correct one."""
    assert defect is None or defect in DEFECTS

    def draw_noise(draw, seed, sample_id, shape):
        kind = "uniform" if defect == "uniform noise" else "normal"
        if defect == "every channel gets the same noise":
            one = noise.fill((1, 1, *shape[1:]), seed, sample_id, draw, 0, kind)[0]
            return np.broadcast_to(one, shape)
        return noise.fill((1, *shape), seed, sample_id, draw, 0, kind)[0]

    def langevin_update_(
        x, score, coef, draw, row, stop, seed, sample_id, bad_row, previous=None, keep=None, gain=None
    ):
        for i in range(len(x)):
            r = int(row[i])
            if r >= int(stop[i]):
                continue
            a, b, c, _ = coef[r].numpy()
            s, k, the_seed, the_id = score[i].float().numpy(), int(draw[r]), int(seed[i]), int(sample_id[i])
            if defect == "score with the wrong sign":
                s = -s
            elif defect == "every step draws the same noise":
                k = 1
            elif defect == "the first step draws the noise of the start":
                k -= 1
            elif defect == "seed ignored":
                the_seed = 0
            elif defect == "sample id ignored":
                the_id = 0
            elif defect == "high half of the sample id ignored":
                the_id &= 0xFFFFFFFF
            elif defect == "noise follows the slot":
                the_id = i
            elif defect == "noise scaled by the variance":
                c = c * c
            t = a * x[i].numpy() + b * s
            if c != 0:
                z = c * draw_noise(k, np.array([the_seed]), np.array([the_id]), x.shape[1:])
                t = t + (z.astype(np.float16) if defect == "noise added before the drift is rounded away" else z)
            t = torch.from_numpy(t.astype(np.float32))
            x[i] = t.bfloat16().float() if defect == "state kept in bfloat16" else t
            if not t.isfinite().all():
                bad_row[i] = min(int(bad_row[i]), r)
            if defect != "row not advanced":
                row[i] += 1

    return langevin_update_
