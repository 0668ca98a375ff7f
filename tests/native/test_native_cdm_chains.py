"""Chains of classification diffusion models in the native executor; what it refuses."""

import copy
import ctypes

import pytest
import torch
from torch import nn

from sgm_engine import Engine, ancestral, annealed_langevin, ddim, dpm_solver_2m, heun
from sgm_engine.executors.native.cdm import _ends
from sgm_engine.executors.native.executor import NativeNetwork, refusal
from sgm_engine.executors.native.kernel import Kernel
from sgm_engine.executors.native.norm import Unsupported
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.networks import MLP
from tests.native.classifiers import LEVELS, gradient_of, question, score64, small, worst
from tests.native.layers import relative_error


def test_weights_follow_training():
    model = small(baseline=(0.0, 1.0))
    x, level = question(model, 2)
    network = NativeNetwork(model, 2, 12, 12)
    before = network(x, level)
    assert network.sync() == 0
    with torch.no_grad():
        model.classifier.down[0].conv1.weight.mul_(1.5)
        model.classifier.middle[1].qkv.weight.add_(0.1)
        model.classifier.head.weight.mul_(2)
        model.classifier.norm.bias.add_(0.5)
    assert torch.equal(network(x, level), before)
    assert network.sync() == 7  # each on the way forward and back, the head once
    assert worst(network(x, level), score64(model, x, level)) < 5e-6


PLANS = {
    "ddim": lambda s: ddim(s, start_shift=0.5),
    "ancestral": lambda s: ancestral(s, start_shift=0.5),
    "heun": lambda s: heun(s, start_shift=0.5),
    "dpm": lambda s: dpm_solver_2m(s, start_shift=0.5),
    "langevin": lambda s: annealed_langevin(s, 1, step_lr=1e-7),
}


@pytest.mark.parametrize("name", PLANS)
def test_chains_equal_the_eager_executor(name, threads):
    """Five samples in three slots: refilled, so each at its own level. The same noise, twice the distance at most."""
    threads(2)
    model = small(levels=8, baseline=(-0.2, 0.6), fourier=(2,))
    plan = PLANS[name](model.sigmas)
    native, eager = (Engine(model, 3, executor=e).sample(5, seed=7, plan=plan) for e in ("native", "eager"))
    double = copy.deepcopy(model).double()
    exact = Engine(lambda x, t: double(x.double(), t).float(), 3, sigmas=model.sigmas, shape=model.shape)
    want = exact.sample(5, seed=7, plan=plan).double()
    assert relative_error(native, want) <= 2 * relative_error(eager, want) + 1e-6


def test_calls_take_no_memory(threads):
    """malloc's own count of what is in use, before and after a thousand steps in one call after another."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [("numbers", ctypes.c_size_t * 10)]  # 4: bytes of maps, 7: of the heap, in use

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")
    libc.mallinfo2.restype = Mallinfo2

    def in_use():
        found = libc.mallinfo2().numbers
        return found[4] + found[7]

    threads(1)
    model = small()
    x, level = question(model, 2)
    native, score = NativeNetwork(model, 2, 12, 12).graph.native, torch.empty_like(x)
    call = x.data_ptr(), level.data_ptr(), score.data_ptr(), 2
    native.run(*call)
    before = in_use()
    for _ in range(1000):
        native.run(*call)
    assert in_use() - before < 4096


def test_auto_takes_the_native_executor():
    engine = Engine(small(), 2, executor="auto")
    assert engine.sample(1, plan=ddim(engine.sigmas, start_shift=0.5)).isfinite().all()
    assert engine.executor == "native" and "winograd" in engine.describe()


def test_a_nan_is_seen():
    model = small()
    x, level = question(model, 2)
    x[0, 0, 3, 3] = torch.nan
    score = NativeNetwork(model, 2, 12, 12)(x, level)
    assert score[0].isnan().any() and score[1].isfinite().all()


def points():
    classes = small().classes
    return CDM(MLP(2, classes), classes, (2, 1, 1))


def with_term():
    model = small()
    model.classifier.head.register_parameter("other", nn.Parameter(torch.zeros(1)))
    return model


def hooked():
    model = small()
    model.classifier.middle[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (points, "a classifier that is MLP"),
        (with_term, "a head with other terms.* other"),
        (hooked, "classifier.middle.0: it has hooks"),
        (lambda: small().double(), "classifier.begin.weight is torch.float64"),
        (lambda: small(fourier=(31,)), "octave n of 2\\^n must be from 0 to 30, got 31"),
    ],
)
def test_what_it_cannot_run_is_named(make, message):
    model = make()
    assert refusal(model) is not None
    with pytest.raises(ValueError, match=message):
        Engine(model, 1, executor="native")


def test_wrong_use_of_the_layers_is_named():
    model = small()
    network = NativeNetwork(model, 2, 12, 12)
    x, level = question(model, 2)
    for call, message in (
        (lambda: network(x, level + LEVELS), f"level.* must be in \\[0, {LEVELS}\\)"),
        (lambda: network(x[:, :, 1:], level), "x must be float32 \\[B, 1, 12, 12\\]"),
        (lambda: network.graph.native.set_embedding((x.data_ptr(), 5)), "5 numbers a level, as many as before, got 5"),
        (lambda: gradient_of(lambda g, v: g.attention(v, 2), x, torch.ones(9)), "1 heads of 2 channels from 1"),
        (lambda: gradient_of(lambda g, v: g.mean_pool(v), x, torch.ones(9)), "the gradient of the layer mean_pool"),
        (lambda: gradient_of(lambda g, v: g.slice(v, 1, 1), x, torch.ones(9)), "its input has 1 channels"),
    ):
        with pytest.raises((ValueError, IndexError), match=message):
            call()


def unturned(kernel):
    """A transposed kernel whose taps were not turned round."""
    right = TRANSPOSED(kernel)
    return Kernel(right.c_in, right.c_out, right.size, lambda: right.weight().flip(2, 3), right.bias, right.tensors,
                  1, right.padding, right.dilation)  # fmt: skip


TRANSPOSED = Kernel.transposed


def test_planted_defects_are_refused(monkeypatch):
    """A wrong graph does not start: it is compared with the module."""
    model = small()
    monkeypatch.setattr(Kernel, "transposed", unturned)
    with pytest.raises(Unsupported, match="would differ"):
        NativeNetwork(model, 2, 12, 12)
    monkeypatch.undo()
    factor = torch.tensor([1, 1, 1, 1.1, 1])
    monkeypatch.setattr("sgm_engine.executors.native.cdm._ends", lambda m: _ends(m).map(lambda t: t * factor))
    with pytest.raises(Unsupported, match="would differ"):
        NativeNetwork(model, 2, 12, 12)
