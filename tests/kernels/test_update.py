"""The Langevin update on the CPU: bit for bit what the definition says, on every instruction set, layout and dtype."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgm_engine.kernels import noise, ops, reference

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [
    (2, 3, 32, 32),
    (3, 3, 5, 7),
    (2, 64, 8, 8),
    (1, 17, 3, 4),
    (1, 1, 1, 1),
    (2, 1, 28, 28),
    (0, 3, 4, 4),
    (2, 20, 17, 17),
]
#                 a      b     c     d: with and without noise and previous, and a row that changes nothing
COEF = torch.tensor([[1, 0.1, 0.5, 0], [0.9, -0.3, 0, 0.7], [1.1, 0.2, 0.3, -0.4], [1, 0.02, 0, 0], [1, 0, 0, 0]])
DRAW = torch.tensor([1, 2, -1, 4, 5], dtype=torch.int32)  # −1 is draw 2^32 − 1
KEEP = torch.tensor([[1, 0.3], [0, 1], [0, 0], [1, 0], [-0.7, 2]])  # e, f


class Case:
    """Slots with rows, seeds and ids of their own, and what the definition makes of them in NumPy."""

    def __init__(self, shape, score_dtype=torch.float32, seed=0, rows=5):
        g = torch.Generator().manual_seed(seed)
        batch = shape[0]
        self.x, self.previous = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        self.score = torch.randn(shape, generator=g).to(score_dtype)
        self.row = torch.randint(rows, (batch,), generator=g)
        self.stop = torch.full((batch,), len(COEF))
        self.seed = torch.randint(-(2**62), 2**62, (batch,), generator=g)
        self.sample_id = torch.randint(2**56, (batch,), generator=g)
        self.bad_row = torch.full((batch,), ops.NO_BAD_ROW)

    def z(self) -> np.ndarray:
        draws = DRAW[self.row].numpy().view(np.uint32)
        z = [noise.fill((1, *self.x.shape[1:]), self.seed[i : i + 1].numpy(), self.sample_id[i : i + 1].numpy(), int(d))
             for i, d in enumerate(draws)]  # fmt: skip
        return np.concatenate(z) if z else np.zeros(self.x.shape, np.float32)

    def expected(self) -> np.ndarray:
        x, s, p = self.x.numpy(), self.score.float().numpy(), self.previous.numpy()
        a, b, c, d = COEF[self.row].numpy().T[..., None, None, None]
        t = a * x + b * s
        t = np.where(c != 0, t + c * self.z(), t)
        return np.where(d != 0, t + d * p, t)

    def run_in_place(self, formats=(LAYOUTS[0],) * 3) -> torch.Tensor:
        x, score, previous = (
            t.clone(memory_format=f) for t, f in zip((self.x, self.score, self.previous), formats, strict=True)
        )
        ops.langevin_update_(
            x, score, COEF, DRAW, self.row, self.stop, self.seed, self.sample_id, self.bad_row, previous
        )
        return x


def kept(case, gain=None) -> tuple[np.ndarray, np.ndarray]:
    """x and previous after the row, by the definition."""
    x, s, p = case.x.numpy(), case.score.float().numpy(), case.previous.numpy()
    a, b, c, d = COEF[case.row].numpy().T[..., None, None, None]
    e, f = KEEP[case.row].numpy().T[..., None, None, None]
    if gain is not None:
        g = gain.numpy()[:, None, None, None]
        b, c = (b * g) * g, c * g
    t = a * x + b * s
    t = np.where(c != 0, t + c * case.z(), t)
    return np.where(d != 0, t + d * p, t), np.where((e != 0) | (f != 0), e * x + f * s, p)


def same_bits(a, b) -> bool:
    return np.array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_in_every_layout(shape, dtype, isa):
    case = Case(shape, dtype)
    row, expected = case.row.clone(), case.expected()
    for formats in itertools.product(LAYOUTS, repeat=3):
        x, score, previous = (
            t.clone(memory_format=f) for t, f in zip((case.x, case.score, case.previous), formats, strict=True)
        )
        out = ops.langevin_update(x, score, COEF, DRAW, row, case.seed, case.sample_id, previous)
        assert same_bits(out, expected), formats
        assert out.stride() == x.stride() and same_bits(x, case.x)
        case.row = row.clone()
        assert same_bits(case.run_in_place(formats), expected), formats
        assert torch.equal(case.row, row + 1) and torch.equal(case.bad_row, torch.full_like(row, ops.NO_BAD_ROW))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("measured", [False, True], ids=["", "gain"])
def test_history_in_every_layout(shape, dtype, measured, isa):
    """previous is read first and then written, from the x and score of before; a gain scales b twice and c once."""
    case = Case(shape, dtype, seed=1)
    case.row = torch.arange(shape[0]) * 2 % 5 if shape[0] < 3 else torch.tensor([4, 1, 2])
    gain = torch.rand(shape[0]) * 3 if measured else None
    row, (x_after, previous_after) = case.row.clone(), kept(case, gain)
    for formats in itertools.product(LAYOUTS, repeat=3):
        x, score, previous = (
            t.clone(memory_format=f) for t, f in zip((case.x, case.score, case.previous), formats, strict=True)
        )
        slots = (row.clone(), case.stop, case.seed, case.sample_id, case.bad_row)
        ops.langevin_update_(x, score, COEF, DRAW, *slots, previous, KEEP, gain)
        assert same_bits(x, x_after) and same_bits(previous, previous_after), formats


def test_history_of_idle_slots_is_left_alone():
    case = Case((3, 3, 8, 8))
    case.row, case.stop = torch.tensor([0, 1, 3]), torch.tensor([0, 5, 3])
    previous = case.previous.clone()
    slots = (case.row, case.stop, case.seed, case.sample_id, case.bad_row)
    ops.langevin_update_(case.x.clone(), case.score, COEF, DRAW, *slots, previous, KEEP)
    assert same_bits(previous[[0, 2]], case.previous[[0, 2]]) and same_bits(previous[1], case.score[1])


def test_the_reference_remembers_the_same():
    case, gain = Case((4, 3, 5, 5)), torch.tensor([0.5, 1, 2, 4])
    x, previous = kept(case, gain)
    z = torch.from_numpy(case.z())
    found = reference.langevin_update(case.x, case.score, COEF, case.row, z, case.previous, gain)
    np.testing.assert_allclose(found, x, rtol=1e-6, atol=1e-6)
    found = reference.remember(case.x, case.score, KEEP, case.row, case.previous)
    np.testing.assert_allclose(found, previous, rtol=1e-6, atol=1e-6)


def test_every_float16(isa):
    """Infinities, NaN and subnormals of the score are converted exactly."""
    score = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(1, 1, 256, 256)
    for s in (score, score.reshape(1, 16, 64, 64), score.reshape(1, 16, 64, 64).contiguous(memory_format=LAYOUTS[1])):
        coef, zero = torch.tensor([[0.0, 1, 0, 0]]), torch.zeros(1, dtype=torch.int64)
        out = ops.langevin_update(torch.zeros(s.shape), s, coef, DRAW[:1], zero, zero, zero)
        assert torch.equal(torch.nan_to_num(out, nan=7), torch.nan_to_num(s.float(), nan=7))


def test_what_is_left_out_and_what_never_is(isa):
    """By a row of zeros: noise and previous, which may be anything, and neither x nor score, whose NaN stays one."""
    shape, zero, none = (4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4)
    x, score, previous = torch.zeros(3, *shape)
    x[1], score[2], previous[3] = math.nan, math.nan, math.nan
    found = ops.langevin_update(x, score, none, DRAW[:1], zero, zero, zero, previous)
    same = reference.langevin_update(x, score, none, zero, torch.full(shape, math.nan), previous)
    for each in (found, same):
        assert each[1:3].isnan().all() and not each[[0, 3]].any()


def test_idle_slots_are_left_alone():
    case = Case((4, 3, 8, 8))
    case.row, case.stop = torch.tensor([0, 2, 3, 9]), torch.tensor([1, 2, 5, 4])
    case.x[1], case.score[3] = math.nan, math.inf
    x = case.run_in_place()
    assert same_bits(x[1], case.x[1]) and same_bits(x[3], case.x[3])
    assert not same_bits(x[0], case.x[0]) and not same_bits(x[2], case.x[2])
    assert case.row.tolist() == [1, 2, 4, 9] and case.bad_row.tolist() == [ops.NO_BAD_ROW] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 16, 16), (3, 32, 8, 8), (3, 5, 3, 3)], ids=str)
def test_first_bad_row_is_recorded(bad, format, shape):
    for position in (0, -1, 13):
        case = Case(shape)
        case.row = torch.tensor([2, 1, 3])
        case.bad_row[2] = 1  # an earlier row stays
        case.score[1:].flatten(1)[:, position] = bad
        case.run_in_place((format,) * 3)
        assert case.bad_row.tolist() == [ops.NO_BAD_ROW, 1, 1]
        case.run_in_place((format,) * 3)
        assert case.bad_row.tolist() == [ops.NO_BAD_ROW, 1, 1] and case.row.tolist() == [4, 3, 5]


def test_threads_and_repeats_give_the_same_bits(threads):
    results = set()
    for n in (1, 2, 3, 2):
        threads(n)
        for format in LAYOUTS:
            case = Case((9, 24, 20, 20))
            results.add(case.run_in_place((format,) * 3).contiguous().numpy().tobytes())
    assert len(results) == 1


def test_a_sample_does_not_depend_on_its_neighbours():
    case = Case((5, 3, 9, 9))
    whole, order = case.expected(), torch.tensor([3, 0, 4])
    pick = (
        [t[order] for t in (case.x, case.score)],
        [t[order] for t in (case.row, case.seed, case.sample_id, case.previous)],
    )
    assert same_bits(ops.langevin_update(*pick[0], COEF, DRAW, *pick[1]), whole[order])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    formats=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    steps=st.integers(1, 4),
)
def test_trace_against_float64(shape, dtype, formats, steps):
    """Several steps on the same noise: the error against float64 is at most twice that of the float32 formula."""
    case = Case(shape, dtype, rows=2)
    exact, plain = case.x.double(), case.x.clone()
    for _ in range(steps):
        z = torch.from_numpy(case.z())
        exact = reference.langevin_update(
            exact, case.score, COEF.double(), case.row, z.double(), case.previous.double()
        )
        plain = reference.langevin_update(plain, case.score.float(), COEF, case.row, z, case.previous)
        case.x = case.run_in_place(formats)
        ulp = 2.0**-23 * exact.abs().max().item() if exact.numel() else 0
        error = [(t.double() - exact).abs().max().item() if exact.numel() else 0 for t in (case.x, plain)]
        assert error[0] <= 2 * error[1] + ulp
