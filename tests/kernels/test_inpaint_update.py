"""What the update leaves of known pixels, on the CPU: bit for bit what two ops more left of them, in every layout."""

import itertools
import math

import pytest
import torch

from sgm_engine.kernels import noise, ops, reference
from tests.kernels.test_update import COEF, DRAW, KEEP, LAYOUTS, Case, same_bits

KNOWN_SIGMA = torch.tensor([0.7, 0.2, 3.0, 0, 1e-3])  # 0: after a plan's last row
KNOWN_DRAW = torch.tensor([2, -1, 0, 4, 1], dtype=torch.int32)
SHAPES = [(5, 3, 32, 32), (5, 1, 28, 28), (5, 3, 5, 7), (5, 20, 9, 4), (5, 1, 1, 1)]
INPAINT = {"known_sigma": KNOWN_SIGMA, "known_draw": KNOWN_DRAW}


def some_known(shape) -> torch.Tensor:
    """Known pixels here and there, the first half, all, none, and here and there again; NaN elsewhere."""
    g = torch.Generator().manual_seed(7)
    known, where = torch.randn(shape, generator=g), torch.rand(shape, generator=g) > 0.5
    where[1].view(-1)[:] = torch.arange(where[1].numel()) < where[1].numel() / 2
    where[2], where[3] = True, False
    known[1] = -0.0  # where known pixels have no noise, at row 3, not even a sign changes
    return known.where(where, math.nan)


def imposed(x, known, row, seed, sample_id) -> torch.Tensor:
    """x after the row, with known pixels as they were imposed before that was part of the update: by two ops more."""
    noisy, z = known.contiguous(), torch.empty_like(known, memory_format=torch.contiguous_format)
    for b, r in enumerate(row.tolist()):
        one = slice(b, b + 1)
        draw = int(KNOWN_DRAW[r]) % 2**32
        ops.noise_fill_(z[one], seed[one], sample_id[one], draw, noise.STREAM["inpaint"], "normal")
    sigma = KNOWN_SIGMA[row][:, None, None, None]
    noisy = torch.where(sigma == 0, noisy, noisy + sigma * z)
    return torch.where(known.isnan(), x, noisy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("history", [False, True], ids=["", "history, gain"])
def test_the_fused_update_is_the_update_and_then_the_known_pixels(shape, dtype, history, isa):
    """Every row of the table, an idle slot, and all layouts: x, previous, row and bad_row."""
    case, known = Case(shape, dtype, seed=2), some_known(shape)
    case.row, case.stop = torch.tensor([0, 3, 2, 1, 4]), torch.tensor([1, 5, 3, 5, 4])  # the last is idle
    extra = (KEEP, torch.tensor([0.5, 1, 2, 3, 4])) if history else (None, None)
    for formats in itertools.product(LAYOUTS, repeat=4 if shape[1] > 1 else 1):
        x_format, score_format, previous_format, known_format = formats if len(formats) == 4 else formats * 4
        score = case.score.clone(memory_format=score_format)
        found = {}
        for inpaint in ({}, {"known": known.clone(memory_format=known_format), **INPAINT}):
            x, previous = case.x.clone(memory_format=x_format), case.previous.clone(memory_format=previous_format)
            row, bad_row = case.row.clone(), case.bad_row.clone()
            slots = (row, case.stop, case.seed, case.sample_id, bad_row)
            ops.langevin_update_(x, score, COEF, DRAW, *slots, previous, *extra, **inpaint)
            found[len(inpaint)] = x, previous, row, bad_row
        (x, *after), (fused, *fused_after) = found.values()
        x[:4] = imposed(x[:4], known[:4], case.row[:4], case.seed[:4], case.sample_id[:4])
        assert same_bits(fused, x), formats
        assert all(torch.equal(a, b) for a, b in zip(after, fused_after, strict=True)), formats
        assert fused_after[1].tolist() == [1, 4, 3, 2, 4]


def test_a_chain_against_float64(isa):
    """Five rows: the error against float64 is at most twice that of the float32 formula."""
    case, known = Case((5, 3, 8, 8)), some_known((5, 3, 8, 8))
    case.row = torch.zeros(5, dtype=torch.int64)
    exact, plain = case.x.double(), case.x.clone()
    for r in range(5):
        z, row = torch.from_numpy(case.z()), case.row.clone()
        draws = int(KNOWN_DRAW[r]) % 2**32, noise.STREAM["inpaint"]
        known_z = reference.noise(known.shape, case.seed, case.sample_id, *draws)
        for name in ("exact", "plain"):
            x, to = (exact, torch.float64) if name == "exact" else (plain, torch.float32)
            t = reference.langevin_update(x, case.score, COEF.to(to), row, z.to(to), case.previous.to(to))
            t = reference.impose(t, known, KNOWN_SIGMA, row, known_z.to(to))
            exact, plain = (t, plain) if name == "exact" else (exact, t)
        slots = (case.row, case.stop, case.seed, case.sample_id, case.bad_row)
        ops.langevin_update_(case.x, case.score, COEF, DRAW, *slots, case.previous, known=known, **INPAINT)
        error, allowed = ((t.double() - exact).abs().max().item() for t in (case.x, plain))
        assert error <= 2 * allowed + 2.0**-23 * exact.abs().max().item()


@pytest.mark.parametrize("format", LAYOUTS, ids=str)
def test_only_what_is_written_can_be_bad(format):
    """A known pixel's own update is thrown away, so it cannot spoil the sample; a known value that overflows can."""
    for where, bad in ((0, ops.NO_BAD_ROW), (100, 0)):  # known, not known
        case, known = Case((1, 3, 8, 8), rows=1), torch.full((1, 3, 8, 8), math.nan)
        known.view(-1)[:50] = 1.0
        score = case.score.clone()
        score.view(-1)[where] = math.nan
        score = score.contiguous(memory_format=format)
        slots = (case.row, case.stop, case.seed, case.sample_id, case.bad_row)
        ops.langevin_update_(case.x, score, COEF, DRAW, *slots, known=known, **INPAINT)
        assert case.bad_row.tolist() == [bad]
    case = Case((1, 3, 8, 8), rows=1)
    slots = (case.row, case.stop, case.seed, case.sample_id, case.bad_row)
    ops.langevin_update_(case.x, case.score, COEF, DRAW, *slots, known=torch.full_like(case.x, math.inf), **INPAINT)
    assert case.bad_row.tolist() == [0]
