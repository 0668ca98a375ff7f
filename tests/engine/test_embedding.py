"""An engine inside somebody else's program computes what it computes alone, whatever PyTorch is switched to there."""

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sgm_engine.engine.engine import Engine
from sgm_engine.errors import Cancelled, Divergence, SampleDiverged
from sgm_engine.models import NCSN
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.plans.samplers import predictor_corrector, sde_dpm_solver_2m
from sgm_engine.plans.schedule import geometric

SIGMAS = geometric(1, 0.1, 3)
PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)
CPU = pytest.mark.parametrize("executor", ["native", "hybrid", "eager"])


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval().requires_grad_(False)


@contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "inference mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
}


@pytest.mark.parametrize("ambient", AMBIENT)
@CPU
def test_what_the_caller_has_switched_on_changes_nothing(executor, ambient):
    """Engines made inside and used outside, the reverse, and both; plans that need more buffers come later."""
    model = network()
    plans = [sde_dpm_solver_2m(SIGMAS).on_levels(SIGMAS), predictor_corrector(SIGMAS).on_levels(SIGMAS)]
    outside = Engine(model, 2, executor=executor)
    expected = outside.sample(3, 1, PLAN)
    with AMBIENT[ambient]():
        inside = Engine(model, 2, executor=executor)
        found = [engine.sample(3, 1, plan) for plan in plans for engine in (inside, outside)]
        assert inside.sample(3, 1, PLAN).equal(expected) and outside.sample(3, 1, PLAN).equal(expected)
    assert inside.sample(3, 1, PLAN).equal(expected)
    again = [engine.sample(3, 1, plan) for plan in plans for engine in (outside, inside)]
    assert all(a.equal(b) for a, b in zip(found, again, strict=True))


def zero(model):
    model.begin_conv.register_forward_hook(lambda module, inputs, output: output * 0)


def replaced(model):
    model.forward = lambda x, level: x * 0


def replaced_inside(model):
    model.begin_conv.forward = lambda x: x.new_zeros(len(x), 4, 8, 8)


class Doubled(NCSN):
    def forward(self, x, level):
        return 2 * super().forward(x, level)


def subclassed(model):
    model.__class__ = Doubled


class Lora(nn.Module):
    """As peft wraps a layer: its weight is that of the layer, its output is not."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Conv2d(base.in_channels, base.out_channels, 3, padding=1)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.down(x)


def adapted(model):
    model.begin_conv = Lora(model.begin_conv)


def parametrized(model):
    parametrizations.weight_norm(model.begin_conv)


@pytest.mark.filterwarnings("ignore:executor='native' cannot run this model")
@pytest.mark.parametrize("change", [zero, replaced, replaced_inside, subclassed, adapted, parametrized])
def test_a_published_network_that_was_changed_is_computed_as_changed(change):
    """Before the engine is made, and after: then it says that it cannot, or follows."""
    model = network()
    engine = Engine(model, 2)
    before = engine.sample(2, 1, PLAN)
    assert engine.executor == "native"
    with torch.random.fork_rng():
        change(model)
    model.requires_grad_(False)
    expected = Engine(model, 2, executor="eager").sample(2, 1, PLAN)
    assert change is parametrized or (expected - before).abs().max() > 0.01
    torch.testing.assert_close(Engine(model, 2).sample(2, 1, PLAN), expected, rtol=0, atol=1e-4)
    try:
        found = engine.sample(2, 1, PLAN)
    except ValueError as error:
        assert "cannot run this model" in str(error)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("executor", ["native", "eager"])
def test_memory_goes_with_the_engine(executor):
    """At once, without the garbage collector: packed weights are as large as the model."""
    engine = Engine(network(), 2, executor=executor)
    engine.sample(1, 1, PLAN)
    parts = [weakref.ref(engine), weakref.ref(engine._slots.x)]
    if executor == "native":
        parts.append(weakref.ref(engine._executor.network.graph))
    gc.collect()
    gc.disable()
    try:
        del engine
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


def test_bfloat16_parameters_have_levels():
    assert Engine(network().bfloat16(), 2, executor="native").sample(2, 1, PLAN).isfinite().all()


def test_a_model_of_inference_mode_is_refused():
    with torch.inference_mode():
        model = network()
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode.*make it outside"):
        Engine(model, 2)


def test_what_travels_between_processes():
    """A plan stays read-only, errors keep what they carry: a pool waits for ever for one that cannot be made again."""
    for again in (pickle.loads(pickle.dumps(PLAN)), copy.deepcopy(PLAN)):
        assert again == PLAN
        with pytest.raises(ValueError, match="read-only"):
            again.a[0] = 5
    diverged = [Divergence(3, 1, 0, 1.0)]
    for error in (SampleDiverged(diverged, [1], torch.ones(1)), Cancelled("stopped", diverged, [1], torch.ones(1))):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
        assert (again.divergences, again.sample_ids, again.samples.tolist()) == (diverged, [1], [1.0])
    with pytest.raises(TypeError, match="an Engine cannot be copied or pickled: send the model"):
        pickle.dumps(Engine(network(), 2))
