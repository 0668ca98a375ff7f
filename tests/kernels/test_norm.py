"""noise_conditioned_norm on the CPU against float64: its error may be twice that of the PyTorch formula, plus 2 ulp."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgm_engine import _C
from sgm_engine.kernels import ops, reference
from tests.kernels.norms import check, embedding, images, launch, worst

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


LAYOUTS = (torch.contiguous_format, torch.channels_last)


ACTIVATIONS = tuple(reference.ACTIVATIONS)


@st.composite
def cases(draw):
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    tables = draw(st.booleans())
    level = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=shape[0], max_size=shape[0])), dtype=torch.int64)
    rows = embedding(5, shape[1], draw(st.integers(0, 2**31)))
    wanted = [draw(st.booleans()), draw(st.booleans()) and shape[1] > 1, draw(st.booleans())]
    parameters = [(p if tables else p[2]) if want else None for p, want in zip(rows, wanted, strict=True)]
    make = {"shape": shape, "dtype": draw(st.sampled_from(DTYPES)), "layout": draw(st.sampled_from(LAYOUTS))}
    x = images(**make, seed=draw(st.integers(0, 2**31)), mean=draw(st.sampled_from((0.0, 1.0, 30.0))))
    residual = images(**make, seed=draw(st.integers(0, 2**31))) if draw(st.booleans()) else None
    level = level if tables and any(wanted) else None
    return x, parameters, level, draw(st.sampled_from(ACTIVATIONS)), residual, draw(st.sampled_from(_C.isas()))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_any_case(case):
    x, parameters, level, activation, residual, isa = case
    _C.set_isa(isa)
    y, total = launch(x, *parameters, level, activation, residual)
    if residual is not None:
        assert torch.equal(total, x + residual)
    check(y, x, *parameters, level, activation, residual=residual)


@pytest.mark.parametrize("isa", _C.isas())
def test_every_variant(isa):
    _C.set_isa(isa)
    level = torch.tensor([3, 0])
    for dtype, layout, activation, added in itertools.product(DTYPES, LAYOUTS, ACTIVATIONS, (False, True)):
        x = images((2, 35, 9, 11), dtype, layout)
        residual = images(x.shape, dtype, layout, seed=5) if added else None
        y, total = launch(x, *embedding(4, 35), level, activation, residual)
        assert total is None or torch.equal(total, x + residual)
        check(y, x, *embedding(4, 35), level, activation, residual=residual)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("groups", [1, 2, 9, 36])
def test_every_variant_with_groups(groups, isa):
    """Groups of 36, 18, 4 channels and 1, which no vector of channels and no thread's share ends with."""
    _C.set_isa(isa)
    gamma, _, beta = embedding(4, 36)
    level = torch.tensor([3, 0, 1])
    for dtype, layout, activation, added in itertools.product(DTYPES, LAYOUTS, ACTIVATIONS, (False, True)):
        x = images((3, 36, 9, 11), dtype, layout, mean=1.0)
        residual = images(x.shape, dtype, layout, seed=5) if added else None
        y, total = launch(x, gamma, None, beta, level, activation, residual, groups=groups)
        assert total is None or torch.equal(total, x + residual)
        check(y, x, gamma, None, beta, level, activation, residual=residual, groups=groups)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape, groups", [((2, 1, 1, 1), 1), ((1, 5, 1, 1), 5), ((1, 10, 1, 1), 2), ((2, 51, 7, 3), 17)]
)
def test_odd_groups(shape, groups, layout, isa):
    _C.set_isa(isa)
    x = images(shape, layout=layout, mean=30.0)
    check(launch(x, groups=groups)[0], x, groups=groups)
    check(launch(x, activation="silu", eps=1e-2, groups=groups)[0], x, activation="silu", eps=1e-2, groups=groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_with_means_far_above_std(layout):
    """All channels of a group near 1000: the spread between them and within them are both 0.1."""
    x = 1000 + images((2, 24, 16, 16), layout=layout, mean=0.1, std=0.1)
    y, _ = launch(x, groups=6)
    assert worst(y, reference.noise_conditioned_norm(x.double(), groups=6)) < 3e-6
    check(y, x, groups=6)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 20, 32, 32), (1, 17, 7, 9)])
def test_mean_far_above_std(shape, layout, isa):
    """Σx² − (Σx)²/n would have no digit left at |mean| = 10⁴·std; here the mean's own rounding does not show either."""
    _C.set_isa(isa)
    x = images(shape, layout=layout, mean=1e3, std=0.1)
    gamma, _, beta = (p[0] for p in embedding(1, shape[1]))
    y, _ = launch(x, gamma, None, beta)
    exact = reference.noise_conditioned_norm(x.double(), gamma.double(), None, beta.double())
    assert worst(y, exact) < 3e-6
    check(y, x, gamma, None, beta)
    y, _ = launch(x, *(p[0] for p in embedding(1, shape[1])), None, "elu")
    check(y, x, *(p[0] for p in embedding(1, shape[1])), None, "elu")


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("activation", ["elu", "silu", "relu"])
def test_activation_alone(activation, isa):
    """γ = 0 makes the argument β, exactly: relative accuracy from 10⁻³⁰ to 10³⁰, and arguments that e^x cannot hold."""
    _C.set_isa(isa)
    grid = torch.logspace(-30, 30, 3001, dtype=torch.float64).float()
    near = torch.linspace(-100, 100, 5001)
    beta = torch.cat([-grid, grid, near, torch.tensor([0.0, -86.9, -87.1, -88.3, -88.8, 88.8])])
    y, _ = launch(torch.zeros(1, len(beta), 1, 1), torch.zeros_like(beta), None, beta, None, activation)
    exact = reference.ACTIVATIONS[activation](beta.double())
    formula = reference.ACTIVATIONS[activation](beta).double()
    normal = exact.abs() > 1e-36  # below, float32 is denormal and ours is 0 or there about
    relative = lambda v: ((v - exact).abs() / exact.abs())[normal].max().item()  # noqa: E731
    assert relative(y.flatten().double()) <= 2 * relative(formula) + 1e-7
    assert (y.flatten().double() - exact)[~normal].abs().max() <= 1e-36


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sum_is_rounded_like_torch(dtype, isa):
    """Every bit pattern, denormals, infinities and NaNs too, through the conversions both ways."""
    _C.set_isa(isa)
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 16, 64, 64)
    for residual in (torch.zeros_like(x), x[:, torch.arange(15, -1, -1)].contiguous(), torch.full_like(x, 0.3)):
        _, total = launch(x, residual=residual)
        expected = (x + residual).nan_to_num(7, 8, 9)
        if isa == "avx512_bf16" and dtype == torch.bfloat16:  # its instruction has no denormals
            expected[expected.abs() < torch.finfo(dtype).tiny] = 0
        assert torch.equal(total.nan_to_num(7, 8, 9), expected)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 128, 8, 8), (3, 70, 5, 7), (5, 16, 4, 4), (2, 3, 1, 1)])
def test_threads_change_no_bit(shape, layout, grouped):
    x, residual, level = images(shape, layout=layout), images(shape, layout=layout, seed=3), torch.arange(shape[0])
    gamma, alpha, beta = embedding(5, shape[1])
    alpha, groups = (None, shape[1] // (2 if shape[1] % 2 == 0 else 3)) if grouped else (alpha, None)
    results = []
    for threads in (1, 2, 3, 7):
        _C.set_num_threads(threads)
        results += [launch(x, gamma, alpha, beta, level, "elu", residual, groups=groups) for _ in range(5)]
    for y, total in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(total, results[0][1])


def test_sample_does_not_see_its_neighbours():
    x, level = images((4, 40, 6, 6)), torch.tensor([2, 0, 1, 2])
    y, _ = launch(x, *embedding(3, 40), level, "silu")
    for i in range(4):
        alone, _ = launch(x[i : i + 1], *embedding(3, 40), level[i : i + 1], "silu")
        assert torch.equal(alone[0], y[i])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_where_it_is(layout, activation):
    x = images((2, 20, 5, 5), layout=layout)
    x[1, 7, 2, 2] = float("nan")
    bad = launch(x, activation=activation)[0].isnan()
    assert bad[1, 7].all() and bad.sum() == 25


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_op_keeps_dtype_and_layout(layout, dtype):
    x = images((2, 6, 4, 5), dtype, layout)
    y, total = ops.noise_conditioned_norm(x, residual=x)
    assert y.dtype == total.dtype == dtype and y.stride() == total.stride() == x.stride()
    assert ops.noise_conditioned_norm(x[:0]).shape == (0, 6, 4, 5)


def test_op_takes_any_view():
    x = images((2, 12, 8, 8))
    views = (x[:, ::2], x.transpose(2, 3), x[:, :, 1:, ::3], x[:1].expand(3, -1, -1, -1))
    for view in views:
        assert torch.equal(ops.noise_conditioned_norm(view), ops.noise_conditioned_norm(view.contiguous()))
    mixed = ops.noise_conditioned_norm(x, residual=x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(mixed[1], x + x)


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_level_out_of_range(bad):
    with pytest.raises(ValueError, match=r"level must be in \[0, 4\)"):
        ops.noise_conditioned_norm(images((2, 6, 3, 3)), *embedding(4, 6), torch.tensor([0, bad]))
