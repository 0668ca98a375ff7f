"""The ops as torch.library sees them: opcheck, gradients, and for a bad call a typed error that names the argument."""

import pytest
import torch

from sgm_engine.kernels import ops, reference
from sgm_engine.kernels.noise import STREAM

I64 = torch.int64


def slots(batch, **overrides):
    row = dict(row=torch.zeros(batch, dtype=I64), stop=torch.full((batch,), 2), seed=torch.arange(batch))
    row |= dict(sample_id=torch.arange(batch), bad_row=torch.full((batch,), ops.NO_BAD_ROW))
    return row | overrides


def update_arguments(shape=(2, 3, 4, 5), **overrides):
    coef, draw = torch.tensor([[1, 0.1, 0.2, 0.3], [1, 0.1, 0, 0]]), torch.tensor([1, 2], dtype=torch.int32)
    images = dict(x=torch.randn(shape), score=torch.randn(shape), previous=torch.randn(shape))
    return images | dict(coef=coef, draw=draw) | slots(shape[0]) | overrides


KNOWN = dict(known=torch.randn(2, 3, 4, 5), known_sigma=torch.tensor([0.5, 0]))
KNOWN["known_draw"] = torch.tensor([2, 0], dtype=torch.int32)


def pure_arguments(**overrides):
    return {k: v for k, v in update_arguments(**overrides).items() if k not in ("stop", "bad_row")}


def norm_arguments(shape=(2, 3, 4, 5), dtype=torch.float32, **overrides):
    gamma, alpha, beta = torch.randn(7, 3 * shape[1]).split(shape[1], 1)
    level = torch.arange(shape[0]) % 7
    return dict(x=torch.randn(shape).to(dtype), gamma=gamma, alpha=alpha, beta=beta, level=level) | overrides


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_opcheck_noise(kind):
    seed = torch.arange(2)
    torch.library.opcheck(
        torch.ops.sgm_engine.noise_fill_, (torch.empty(2, 3, 4, 5), seed, seed, 3, STREAM["user"], kind)
    )


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16])
def test_opcheck_update(score_dtype):
    arguments = update_arguments()
    arguments["score"] = arguments["score"].to(score_dtype)
    torch.library.opcheck(torch.ops.sgm_engine.langevin_update_, (), arguments)
    arguments |= dict(keep=torch.tensor([[1.0, 0.3], [0, 0]]), gain=torch.tensor([0.5, 2]))
    torch.library.opcheck(torch.ops.sgm_engine.langevin_update_, (), arguments)
    torch.library.opcheck(torch.ops.sgm_engine.langevin_update_, (), arguments | KNOWN)
    arguments = pure_arguments(x=torch.randn(2, 3, 4, 5, requires_grad=True), score=arguments["score"].requires_grad_())
    torch.library.opcheck(torch.ops.sgm_engine.langevin_update, (), arguments)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_norm(format, dtype):
    arguments = norm_arguments(dtype=dtype) | dict(activation="elu", eps=1e-5)
    arguments["x"] = arguments["x"].contiguous(memory_format=format).requires_grad_()
    for name in ("gamma", "alpha", "beta"):
        arguments[name] = arguments[name].clone().requires_grad_()
    torch.library.opcheck(torch.ops.sgm_engine.noise_conditioned_norm, (), arguments)
    arguments["residual"] = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.sgm_engine.noise_conditioned_norm_both, (), arguments)
    arguments |= dict(alpha=None, groups=3, activation="none", before="silu", pool=True)
    torch.library.opcheck(torch.ops.sgm_engine.noise_conditioned_norm_both, (), arguments)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_gradients_are_the_references(activation, with_residual, groups):
    """First and second derivatives."""

    def derivatives(op, dtype):
        torch.manual_seed(0)
        arguments = norm_arguments() if groups is None else norm_arguments((2, 6, 4, 5))
        if groups is not None:
            del arguments["alpha"]
        if with_residual:
            arguments["residual"] = torch.randn_like(arguments["x"])
        arguments = {k: v.to(dtype).requires_grad_() if v.is_floating_point() else v for k, v in arguments.items()}
        leaves = [v for v in arguments.values() if v.requires_grad]
        out = op(**arguments, activation=activation, groups=groups)
        out = out if with_residual else (out,)
        first = torch.autograd.grad(sum(o.pow(3).sum() for o in out), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    exact = derivatives(reference.noise_conditioned_norm, torch.float64)
    ours, plain = (
        derivatives(op, torch.float32) for op in (ops.noise_conditioned_norm, reference.noise_conditioned_norm)
    )
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        error, allowed = ((t - truth).abs().max().item() for t in (mine, theirs))
        assert error <= 2 * allowed + 1e-5 * truth.abs().max().item()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("before", ["none", "elu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_what_stands_round_a_norm(with_residual, before, format):
    """before(x + residual) → (5×5 mean of its norm, itself), and the gradients of that."""

    def run(op, cast):
        torch.manual_seed(0)
        arguments = norm_arguments((2, 6, 4, 5)) | {"before": before, "pool": True}
        if with_residual:
            arguments["residual"] = arguments["x"].flip(0).clone()
        arguments = {k: cast(v) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}
        for k in ("x", "residual"):
            if k in arguments:
                arguments[k] = arguments[k].contiguous(memory_format=format)
        leaves = [v.requires_grad_() for v in arguments.values() if torch.is_tensor(v) and v.is_floating_point()]
        out = op(**arguments)
        out = out if isinstance(out, tuple) else (out,)
        return [*out, *torch.autograd.grad(sum(o.float().pow(2).sum() for o in out), leaves)]

    exact = run(reference.noise_conditioned_norm, torch.Tensor.double)
    plain = run(reference.noise_conditioned_norm, lambda t: t.clone())
    ours = run(ops.noise_conditioned_norm, lambda t: t.clone())
    assert len(ours) == (2 if with_residual or before != "none" else 1) + 4 + with_residual
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        error, allowed = ((t - truth).abs().max().item() for t in (mine, theirs))
        assert error <= 2 * allowed + 1e-5 * truth.abs().max().item()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"before": "tanh"}, "before must be one of .* got 'tanh'"),
        ({"pool": True, "activation": "elu"}, "activation must be 'none' with pool, got 'elu'"),
    ],
)
def test_bad_things_round_a_norm(wrong, message):
    with pytest.raises(ValueError, match=message):
        ops.noise_conditioned_norm(**(norm_arguments() | wrong))


def test_update_gradients():
    arguments = pure_arguments()
    for name in ("x", "score", "previous"):
        arguments[name] = arguments[name].double().float().requires_grad_()
    g = torch.randn(2, 3, 4, 5)
    found = torch.autograd.grad(ops.langevin_update(**arguments), [arguments[k] for k in ("x", "score", "previous")], g)
    for gradient, k in zip(found, (1, 0.1, 0.3), strict=True):
        assert torch.equal(gradient, torch.tensor(k) * g)


def test_update_reads_any_view():
    wide = torch.randn(2, 6, 4, 10)
    arguments = pure_arguments(score=wide[:, :3, :, ::2], x=wide[:, 3:, :, 1::2])
    dense = arguments | dict(score=arguments["score"].contiguous(), x=arguments["x"].contiguous())
    assert torch.equal(ops.langevin_update(**arguments), ops.langevin_update(**dense))


def test_compiled_code_calls_the_ops():
    arguments = norm_arguments()
    step = lambda x: ops.noise_conditioned_norm(**(arguments | dict(x=x)), activation="relu") * 2  # noqa: E731
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(arguments["x"]), step(arguments["x"]))


X = torch.zeros(2, 3, 4, 5)
BAD_UPDATES = [
    ("x", dict(x=X.double()), TypeError),
    ("x", dict(x=X[0]), ValueError),
    ("x", dict(x=torch.zeros(2, 3, 4, 10)[..., ::2]), ValueError),
    ("x", dict(x=X[:1].expand(2, 3, 4, 5)), ValueError),
    ("score", dict(score=X.double()), TypeError),
    ("score", dict(score=X[:1]), ValueError),
    ("score", dict(score=X.to("meta")), ValueError),
    ("previous", dict(previous=X.half()), TypeError),
    ("previous", dict(previous=X[..., :4]), ValueError),
    ("previous", dict(previous=None), ValueError),  # but d is not 0
    ("coef", dict(coef=torch.zeros(2, 3)), ValueError),
    ("coef", dict(coef=torch.zeros(2, 4, dtype=torch.float64)), TypeError),
    ("coef", dict(coef=torch.zeros(4, 2).T), ValueError),
    ("draw", dict(draw=torch.zeros(2, dtype=I64)), TypeError),
    ("draw", dict(draw=torch.zeros(1, 2, dtype=torch.int32)), ValueError),
    ("row", dict(row=torch.zeros(2, dtype=torch.int32)), TypeError),
    ("row", dict(row=torch.zeros(3, dtype=I64)), ValueError),
    ("row", dict(row=torch.tensor([0, -1])), IndexError),
    ("row", dict(row=torch.tensor([0, 2]), stop=torch.tensor([9, 9])), IndexError),
    ("stop", dict(stop=torch.zeros(2)), TypeError),
    ("seed", dict(seed=torch.zeros(4, dtype=I64)[::2]), ValueError),
    ("sample_id", dict(sample_id=torch.zeros(1, dtype=I64)), ValueError),
    ("bad_row", dict(bad_row=torch.zeros(2, dtype=torch.int32)), TypeError),
    ("known", KNOWN | dict(known=X.double()), TypeError),
    ("known", KNOWN | dict(known=X[:, :1]), ValueError),
    ("known_sigma", KNOWN | dict(known_sigma=torch.zeros(3)), ValueError),
    ("known_sigma", KNOWN | dict(known_sigma=torch.zeros(2, dtype=torch.float64)), TypeError),
    ("known_draw", KNOWN | dict(known_draw=torch.zeros(2, dtype=I64)), TypeError),
    ("known_draw", KNOWN | dict(known_draw=torch.zeros(4, dtype=torch.int32)[::2]), ValueError),
    ("known is None, but known_sigma", KNOWN | dict(known=None), ValueError),
    ("known_draw is None, but known", KNOWN | dict(known_draw=None), ValueError),
]  # fmt: skip


@pytest.mark.parametrize("name, overrides, error", BAD_UPDATES)
def test_bad_updates(name, overrides, error):
    arguments = update_arguments(**overrides)
    before = arguments["row"].clone()
    with pytest.raises(error, match=name):
        ops.langevin_update_(**arguments)
    assert torch.equal(arguments["row"], before)


def test_update_in_place_has_no_gradient():
    with pytest.raises(RuntimeError, match="no_grad"):
        ops.langevin_update_(**update_arguments(score=torch.zeros(2, 3, 4, 5, requires_grad=True)))


BAD_NORMS = [
    ("x", dict(x=X.double()), TypeError),
    ("x", dict(x=X[..., :0]), ValueError),
    ("gamma", dict(gamma=torch.zeros(7, 4)), ValueError),
    ("gamma", dict(gamma=torch.zeros(3, 7).T), ValueError),
    ("alpha", dict(alpha=torch.zeros(7, 3).half()), TypeError),
    ("alpha", dict(x=X[:, :1], gamma=None, beta=None, alpha=torch.zeros(1), level=None), ValueError),
    ("beta", dict(beta=torch.zeros(8, 3)), ValueError),
    ("level", dict(level=None), ValueError),
    ("level", dict(level=torch.tensor([0, 7])), ValueError),
    ("level", dict(level=torch.tensor([-1, 0])), ValueError),
    ("level", dict(level=torch.zeros(2, dtype=torch.int32)), TypeError),
    ("level", dict(gamma=None, alpha=None, beta=None), ValueError),
    ("groups", dict(alpha=None, groups=2), ValueError),
    ("groups", dict(alpha=None, groups=0), ValueError),
    ("alpha must be None with groups", dict(groups=3), ValueError),
    ("activation", dict(activation="gelu"), ValueError),
    ("residual", dict(residual=X.half()), TypeError),
    ("residual", dict(residual=X[:1]), ValueError),
]  # fmt: skip


@pytest.mark.parametrize("name, overrides, error", BAD_NORMS)
def test_bad_norms(name, overrides, error):
    with pytest.raises(error, match=name):
        ops.noise_conditioned_norm(**norm_arguments(**overrides))


BAD_NOISE = [
    ("out", dict(out=X.double()), TypeError),
    ("out", dict(out=torch.zeros(2, 3, 4, 10)[..., ::2]), ValueError),
    ("seed", dict(seed=torch.zeros(3, dtype=I64)), ValueError),
    ("sample_id", dict(sample_id=torch.tensor([0, 2**56])), ValueError),
    ("sample_id", dict(sample_id=torch.tensor([0, -1])), ValueError),
    ("draw", dict(draw=-1), ValueError),
    ("draw", dict(draw=2**32), ValueError),
    ("stream", dict(stream=5), ValueError),
    ("stream", dict(stream=-(2**24)), ValueError),
    ("kind", dict(kind="gauss"), ValueError),
]  # fmt: skip


@pytest.mark.parametrize("name, overrides, error", BAD_NOISE)
def test_bad_noise(name, overrides, error):
    arguments = dict(out=X.clone(), seed=torch.arange(2), sample_id=torch.arange(2), draw=0, stream=0, kind="normal")
    with pytest.raises(error, match=name):
        ops.noise_fill_(**(arguments | overrides))
