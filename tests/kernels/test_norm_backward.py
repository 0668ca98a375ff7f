"""GroupNorm's gradient in one kernel: C++ on every instruction set; Triton in test_triton_norm_backward.py."""

import itertools

import pytest
import torch

from sgm_engine import _C
from sgm_engine.kernels import cpu, norm_op, ops, reference
from sgm_engine.kernels.arguments import NormBackward

ACTIVATIONS = tuple(reference.ACTIVATIONS)
GUARD = 32


@pytest.fixture(autouse=True)
def restore_isa():
    before = _C.isa()
    yield
    _C.set_isa(before)


def tensors(shape, dtype, seed=0, mean=0.5):
    g = torch.Generator().manual_seed(seed)
    x, dy = ((torch.randn(shape, generator=g) + m).to(dtype) for m in (mean, 0.0))
    return x, dy, 1 + 0.3 * torch.randn(shape[1], generator=g), 0.3 * torch.randn(shape[1], generator=g)


def formula(x, dy, gamma, beta, activation, groups, dtype):
    """Autograd of the reference in ``dtype``: dx, dγ, dβ."""
    x = x.to(dtype).requires_grad_()
    parameters = [None if p is None else p.to(dtype).requires_grad_() for p in (gamma, beta)]
    y = reference.noise_conditioned_norm(x, parameters[0], None, parameters[1], None, activation, None, 1e-5, groups)
    wanted = [t for t in (x, *parameters) if t is not None]
    return torch.autograd.grad(y, wanted, dy.to(dtype))


def launch(x, dy, gamma, beta, activation, groups, launcher=cpu.norm_backward):
    dx, parts = torch.full_like(x, torch.nan), torch.full((2, x.shape[0] * x.shape[1] + GUARD), torch.nan)
    parts = parts.to(x.device)
    dgamma, dbeta = (p[: x.shape[0] * x.shape[1]].view(x.shape[:2]) for p in parts)
    launcher(NormBackward(dy, x, gamma, beta, activation, 1e-5, groups, dx, dgamma, dbeta))
    assert parts[:, x.shape[0] * x.shape[1] :].isnan().all(), "written past the end"
    return dx, dgamma.sum(0), dbeta.sum(0)


def check(found, x, dy, gamma, beta, activation, groups):
    """At most twice the error of the float32 formula, rounded as x is."""
    found = [found[0], *(f for f, p in zip(found[1:], (gamma, beta), strict=True) if p is not None)]
    exact = formula(x, dy, gamma, beta, activation, groups, torch.float64)
    plain = formula(x, dy, gamma, beta, activation, groups, torch.float32)
    for f, e, p in zip(found, exact, (plain[0].to(x.dtype), *plain[1:]), strict=True):
        error, scale = (f.double() - e).abs().max().item(), e.abs().max().item()
        limit = 2 * (p.double() - e).abs().max().item() + 4 * torch.finfo(torch.float32).eps * scale
        assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize("isa", _C.isas())
def test_every_variant(isa):
    _C.set_isa(isa)
    shapes = [((2, 12, 9, 11), 3), ((1, 6, 1, 1), 2), ((3, 4, 16, 16), 4), ((2, 10, 7, 5), 1), ((1, 1, 3, 3), 1)]
    shapes.insert(0, ((2, 3, 1, 1), 3))  # one element a group: its gradient is exactly 0
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for (shape, groups), dtype, activation in itertools.product(shapes, dtypes, ACTIVATIONS):
        x, dy, gamma, beta = tensors(shape, dtype)
        check(launch(x, dy, gamma, beta, activation, groups), x, dy, gamma, beta, activation, groups)
    for pair in ((None, beta), (gamma, None), (None, None)):
        check(launch(x, dy, *pair, "silu", groups), x, dy, *pair, "silu", groups)


def check_nan(launcher=cpu.norm_backward, device="cpu"):
    """What relu and elu make of NaN lets the gradient through, as in PyTorch: never a finite gradient of 0."""
    x, dy, gamma, _ = (t.to(device) for t in tensors((2, 8, 6, 7), torch.float32))
    beta = torch.full_like(gamma, torch.nan)
    want, *_ = launch(x, dy, gamma, None, "none", 4, launcher)
    for activation in ("relu", "elu"):
        torch.testing.assert_close(launch(x, dy, gamma, beta, activation, 4, launcher)[0], want)
    exact, *_ = formula(x, dy, gamma, beta, "relu", 4, torch.float64)
    torch.testing.assert_close(want, exact.float(), rtol=1e-5, atol=1e-5)
    assert launch(x, dy, gamma, beta, "silu", 4, launcher)[0].isnan().all()
    off = torch.full_like(gamma, -99)  # relu is 0 everywhere, so that nothing of dy comes through
    assert not launch(x, dy * torch.inf, gamma, off, "relu", 4, launcher)[0].any()


@pytest.mark.parametrize("isa", _C.isas())
def test_nan_is_not_hidden(isa):
    _C.set_isa(isa)
    check_nan()


def test_a_large_mean_costs_no_digits():
    x, dy, gamma, beta = tensors((2, 8, 12, 12), torch.float32, mean=1000.0)
    check(launch(x, dy, gamma, beta, "silu", 4), x, dy, gamma, beta, "silu", 4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (False, False)])
def test_the_op_takes_it_and_says_the_same_as_before(layout, wanted, monkeypatch):
    """Through autograd, only what is asked for; under create_graph by recomputation, and twice differentiable."""
    x, dy, gamma, beta = tensors((2, 8, 6, 6), torch.float32)
    x = x.to(memory_format=layout).requires_grad_()
    gamma, beta = gamma.requires_grad_(wanted[0]), beta.requires_grad_(wanted[1])
    calls = []
    fused = ops.launchers("cpu")
    counted = fused._replace(norm_backward=lambda *a: (calls.append(1), fused.norm_backward(*a)))
    monkeypatch.setattr(norm_op, "launchers", lambda device: counted)
    y = ops.noise_conditioned_norm(x, gamma, beta=beta, activation="silu", groups=4)
    leaves = [x, *(p for p, need in zip((gamma, beta), wanted, strict=True) if need)]
    once = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert len(calls) == 1
    again = torch.autograd.grad(y, leaves, dy, create_graph=True)
    assert len(calls) == 1
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(again[0].square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("extra", ["pool", "residual", "before"])
def test_what_the_kernel_does_not_know_is_recomputed(extra):
    """The gradient through a GroupNorm with anything round it, against the reference's in float64."""
    x, dy, gamma, beta = tensors((2, 8, 6, 6), torch.float32)
    other = tensors((2, 8, 6, 6), torch.float32, seed=1)[0]
    options = {"pool": {"pool": True}, "residual": {"residual": other}, "before": {"before": "elu"}}[extra]
    found = []
    for function, dtype in (
        (ops.noise_conditioned_norm, torch.float32),
        (reference.noise_conditioned_norm, torch.float64),
    ):
        inputs = [t.to(dtype).requires_grad_() for t in (x, gamma, beta)]
        more = {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
        y = function(inputs[0], inputs[1], beta=inputs[2], groups=4, **more)
        y = y[0] if isinstance(y, tuple) else y
        found.append(torch.autograd.grad(y, inputs, dy.to(dtype)))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


def test_the_op_passes_pytorch_s_own_checks():
    x, dy, gamma, beta = tensors((2, 8, 5, 5), torch.float32)
    for arguments in ((dy, x, gamma, beta, "silu", 1e-5, 4), (dy, x, None, None, "none", 1e-5, 2)):
        torch.library.opcheck(torch.ops.sgm_engine.norm_backward.default, arguments)
