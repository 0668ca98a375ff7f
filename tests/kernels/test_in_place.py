"""What an op that writes into its arguments owes: version counters, refused gradients, no shared memory."""

import pytest
import torch

from sgm_engine.kernels import ops
from tests.kernels.test_ops import KNOWN, update_arguments

OPS = torch.ops.sgm_engine
KEEP = torch.tensor([[1.0, 0.3], [0, 0]])


def noise(out, sample_id=None):
    ids = torch.arange(len(out)) if sample_id is None else torch.tensor(sample_id)
    ops.noise_fill_(out, torch.arange(len(out)), ids, 0, 0, "normal")


@pytest.mark.parametrize("write", ["noise", "update"])
def test_a_tensor_saved_for_backward_is_missed(write):
    x, w = torch.randn(2, 3, 4, 5), torch.ones((), requires_grad=True)
    loss = (w * x).sum()  # dw is Σ x
    noise(x) if write == "noise" else ops.langevin_update_(**update_arguments(x=x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_versions_of_all_that_is_written_and_of_nothing_else():
    for keep in (None, KEEP):
        arguments = update_arguments(keep=keep, gain=torch.ones(2), **KNOWN)
        before = {k: t._version for k, t in arguments.items() if t is not None}
        OPS.langevin_update_(**arguments)
        raised = {k for k, version in before.items() if arguments[k]._version > version}
        assert raised == {"x", "row", "bad_row"} | ({"previous"} if keep is not None else set())
    out = torch.empty(2, 3, 4, 5)
    version = out._version
    noise(out)
    assert out._version > version


@pytest.mark.parametrize("name", ["x", "score", "previous", "coef", "gain", "known"])
def test_an_update_in_place_gives_no_gradient(name):
    arguments = update_arguments(gain=torch.ones(2), **KNOWN)
    arguments[name] = arguments[name].clone().requires_grad_()
    before = arguments["x"].detach().clone()
    with pytest.raises(RuntimeError, match=f"{name} requires one: call it under torch.no_grad"):
        OPS.langevin_update_(**arguments)
    assert torch.equal(arguments["x"], before)
    with torch.no_grad():  # as torch does
        OPS.langevin_update_(**arguments)


def test_noise_spares_a_leaf_that_learns():
    w = torch.zeros(2, 3, 4, 5, requires_grad=True)
    for out in (w, w * 1):
        with pytest.raises(RuntimeError, match="out requires one"):
            noise(out)
    assert not w.any()
    with torch.no_grad():
        noise(w)
    assert w.all()


def test_the_update_out_of_place_has_no_gradient_in_coef():
    arguments = {k: v for k, v in update_arguments().items() if k not in ("stop", "bad_row")}
    arguments["coef"].requires_grad_()
    with pytest.raises(RuntimeError, match="coef"):
        ops.langevin_update(**arguments)


SQUARE = (2, 4, 4, 4)


def overlaps():
    """(name, a call's arguments in which that one shares memory with what is written)."""
    x = torch.randn(SQUARE)
    buffer = torch.randn(2 * x.numel())
    vectors = torch.zeros(9, dtype=torch.int64)
    yield "score", dict(x=x, score=x.permute(0, 3, 1, 2))  # dense, NHWC, of x's own memory
    yield "score", dict(x=buffer[:128].view(SQUARE), score=buffer[64:192].view(SQUARE))
    yield "score", dict(x=x, score=x.view(torch.bfloat16).view(-1)[:128].view(SQUARE))
    yield "previous", dict(x=x, previous=x.permute(0, 3, 1, 2))
    yield "previous", dict(x=x, previous=x, keep=KEEP)
    yield "known", dict(x=x, known=x, known_sigma=KNOWN["known_sigma"], known_draw=KNOWN["known_draw"])
    yield "coef", dict(x=x, coef=x.view(-1)[:8].view(2, 4))
    yield "gain", dict(x=x, gain=x.view(-1)[:2])
    yield "score", dict(x=torch.randn(SQUARE), score=x, previous=x, keep=KEEP)
    yield "stop", dict(row=vectors[:2], stop=vectors[1:3])
    yield "sample_id", dict(row=vectors[:2], sample_id=vectors[:2])
    yield "bad_row", dict(row=vectors[:2], bad_row=vectors[:2])


@pytest.mark.parametrize("case", range(len(list(overlaps()))))
def test_overlaps_are_refused(case):
    name, overrides = list(overlaps())[case]
    arguments = update_arguments(SQUARE) | overrides
    before = {k: t.clone() for k, t in arguments.items()}
    with pytest.raises(ValueError, match=f"(?=.*{name}).*shares memory with .*clone"):
        ops.langevin_update_(**arguments)
    for k, t in before.items():
        torch.testing.assert_close(arguments[k], t, rtol=0, atol=0, equal_nan=True)


def test_noise_of_ids_that_it_would_overwrite_is_refused():
    out = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="sample_id shares memory with out"):
        ops.noise_fill_(out, torch.arange(2), out.view(torch.int64).view(-1)[:2], 0, 0, "normal")


def test_what_may_be_shared_is_right():
    """score and previous that are x itself; a view of x that is not dense, which is copied; ids of one tensor."""
    for format in (torch.contiguous_format, torch.channels_last):
        for share in ("score", "previous", "both", "transposed"):
            x = torch.randn(SQUARE).contiguous(memory_format=format)
            own = {"score": x, "previous": x} if share == "both" else {share: x}
            if share == "transposed":
                own = {"score": x.transpose(2, 3)}
            apart, shared = update_arguments(SQUARE), update_arguments(SQUARE)
            for name in ("score", "previous"):
                shared[name] = apart[name] = torch.randn(SQUARE)
            apart |= {name: t.clone() for name, t in own.items()} | {"x": x.clone()}
            shared |= own | {"x": x}
            for arguments in (apart, shared):
                arguments["seed"] = arguments["sample_id"]
                ops.langevin_update_(**arguments)
            assert torch.equal(shared["x"], apart["x"]), (format, share)


@pytest.mark.parametrize("bad", [-1, 2**56, 2**63 - 1, -(2**63)])
def test_ids_of_live_slots_are_refused_alike(bad):
    ids = torch.tensor([3, bad])
    with pytest.raises(ValueError, match=rf"sample_id must be in \[0, 2\^56\), got {bad} at 1"):
        noise(torch.empty(2, 3, 4, 5), [3, bad])
    arguments = update_arguments(sample_id=ids)
    before = arguments["x"].clone()
    with pytest.raises(ValueError, match=r"sample_id must be in \[0, 2\^56\)"):
        ops.langevin_update_(**arguments)
    assert torch.equal(arguments["x"], before) and not arguments["row"].any()
    with pytest.raises(ValueError, match=r"sample_id must be in \[0, 2\^56\)"):
        ops.langevin_update(**{k: v for k, v in arguments.items() if k not in ("stop", "bad_row")})
    ops.langevin_update_(**(arguments | dict(stop=torch.tensor([1, 0]))))  # the second is idle


X = torch.randn(2, 8, 3, 4)
GAMMA = torch.randn(8)
BAD_BACKWARD = [
    ("grad", dict(grad=torch.ones(2, 8, 3, 3)), ValueError),
    ("grad", dict(grad=torch.ones(1)), ValueError),
    ("grad", dict(grad=torch.ones(2, 8, 3, 4, dtype=torch.float64)), TypeError),
    ("gamma", dict(gamma=torch.ones(7)), ValueError),
    ("gamma", dict(gamma=GAMMA.double()), TypeError),
    ("gamma", dict(gamma=torch.ones(2, 8)), ValueError),
    ("gamma", dict(gamma=torch.ones(16)[::2]), ValueError),
    ("beta", dict(beta=torch.ones(9)), ValueError),
    ("beta", dict(beta=GAMMA.to("meta")), ValueError),
    ("groups", dict(groups=3), ValueError),
    ("groups", dict(groups=0), ValueError),
    ("groups", dict(groups=-4), ValueError),
    ("groups", dict(groups=2**62), ValueError),
    ("activation", dict(activation="gelu"), ValueError),
    ("x", dict(x=X[0]), ValueError),
    ("x", dict(x=X.double(), grad=X.double()), TypeError),
    ("x", dict(x=X[:, :, :0], grad=X[:, :, :0]), ValueError),
]  # fmt: skip


@pytest.mark.parametrize("name, overrides, error", BAD_BACKWARD)
def test_bad_gradients_of_a_norm(name, overrides, error):
    good = dict(grad=torch.ones_like(X), x=X, gamma=GAMMA, beta=GAMMA, activation="silu", eps=1e-5, groups=4)
    assert torch.isfinite(OPS.norm_backward(**good)[0]).all()
    with pytest.raises(error, match=name):
        OPS.norm_backward(**(good | overrides))
