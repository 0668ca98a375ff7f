"""Classifiers of potentials in the native executor: forward and input gradient against float64 autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine import Engine, ancestral, annealed_langevin, ddim, dpm_solver_2m, heun, sde_dpm_solver_2m
from sgm_engine.executors.native.executor import NativeNetwork, refusal
from sgm_engine.executors.native.norm import Norm, Table, film
from tests.cdm.potentials import digits, potential
from tests.native.classifiers import gradients_agree, score64, worst
from tests.native.layers import bits_of_any_threads, relative_error, run_layers

SHAPES = {
    "small": {},
    "vectors": {"image_size": 12, "width": 16, "mixing": (16, 24), "potentials": 5},
    "colour, two blocks": {"channels": 3, "width": 12, "blocks": 2, "multipliers": (1, 3)},
    "as cdm_mnist": {"image_size": 28, "width": 32, "mixing": (16, 256), "potentials": 12},
    "variance exploding": {"schedule": "ve_geometric"},
    "many classes": {"levels": 100, "schedule_options": {"sigma_max": 10.0, "sigma_min": 0.004}},
}


def case(name, batch=3, seed=0):
    """(model, x at levels from the first to the last, levels)."""
    model = potential(seed, **SHAPES[name])
    with torch.no_grad():
        model.classifier.head.weight.mul_(20)
    channels, size, _ = model.shape
    x = torch.from_numpy(digits(batch, 5, size, channels)).float() / 255
    level = torch.linspace(len(model.sigmas) - 1, 0, batch).long()
    generator = torch.Generator().manual_seed(1)
    return model, x + model.sigmas[level].view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator), level


def native(model, batch, precision="float32"):
    return NativeNetwork(model, batch, *model.shape[1:], precision)


@pytest.mark.parametrize("name", SHAPES)
def test_score_of_every_shape(name):
    model, x, level = case(name)
    want = score64(model, x, level)
    found = native(model, 3)(x, level)
    assert worst(found, want) < 5e-6
    assert relative_error(found, want) <= 2 * relative_error(model(x, level), want) + 1e-6
    other = case(name, seed=1)[0]
    assert worst(score64(other, x, level), want) > 1e-2  # the weights do matter


def test_on_every_instruction_set(isa):
    model, x, level = case("vectors")
    assert worst(native(model, 3)(x, level), score64(model, x, level)) < 5e-6


def test_other_precisions():
    model, x, level = case("vectors")
    want = score64(model, x, level)
    for precision in ("direct", "winograd"):
        assert worst(native(model, 3, precision)(x, level), want) < 5e-6
    assert 1e-5 < worst(native(model, 3, "bfloat16")(x, level), want) < 3e-2


def test_bits_depend_on_neither_threads_nor_neighbours(threads):
    model, x, level = case("vectors", batch=11)
    bits_of_any_threads(native(model, 11), x, level, threads, (1, 2, 3, 5))


def test_weights_and_base_follow():
    model, x, level = case("vectors")
    network = native(model, 3)
    before = network(x, level)
    assert network.sync() == 0
    with torch.no_grad():
        model.classifier.middle[1].mix1.weight.mul_(1.5)
        model.classifier.place.add_(0.3)
        model.classifier.before[0].film.linear.bias.add_(0.5)
        model.classifier.head.weight.mul_(0.5)
    base = model.classifier.features.base
    covariance = base.basis * (2 * base.log_variance.exp()) @ base.basis.T
    base.fit(base.mean + 0.1, covariance)
    assert torch.equal(network(x, level), before)
    assert network.sync() == 5  # mix1 on the way forward and back, the film's bias, the constant, all tables as one
    assert worst(network(x, level), score64(model, x, level)) < 5e-6


PLANS = {
    "ddim": lambda s: ddim(s, start_shift=0.5),
    "ancestral": lambda s: ancestral(s, start_shift=0.5),
    "churned": lambda s: ancestral(s, start_shift=0.5, eta=2.0),
    "heun": lambda s: heun(s, start_shift=0.5),
    "dpm": lambda s: dpm_solver_2m(s, start_shift=0.5),
    "sde": lambda s: sde_dpm_solver_2m(s, start_shift=0.5),
    "langevin": lambda s: annealed_langevin(s, 1, step_lr=1e-7),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("schedule", ["vp_geometric", "ve_geometric"])
def test_chains_equal_the_eager_executor(name, schedule):
    """Five samples in three slots: refilled, so each at its own level."""
    model = potential(schedule=schedule)
    plan = PLANS[name](model.sigmas)
    native, eager = (Engine(model, 3, executor=e).sample(5, seed=7, plan=plan) for e in ("native", "eager"))
    assert native.isfinite().all()
    double = copy.deepcopy(model).double()
    exact = Engine(lambda x, t: double(x.double(), t).float(), 3, sigmas=model.sigmas, shape=model.shape)
    want = exact.sample(5, seed=7, plan=plan).double()
    assert relative_error(native, want) <= 2 * relative_error(eager, want) + 1e-6


def test_gradient_of_each_layer_of_potentials(isa):
    torch.manual_seed(0)
    x, gamma = torch.randn(2, 6, 4, 6), torch.randn(64)
    first, third, dense = nn.Conv2d(6, 21, 1), nn.Conv2d(21, 5, 3, padding=1), nn.Conv2d(6 * 24, 42, 1)
    own = {conv: copy.deepcopy(conv).double() for conv in (first, third, dense)}
    rows = torch.randn(2, 21)
    fixed = Norm(21, 0, 0.0, (Table(lambda: rows[:1]), None, Table(lambda: rows[1:])))
    values = torch.randn(21, 4, 6)

    def flat(x):
        return x.permute(0, 2, 3, 1).reshape(len(x), -1, 1, 1)

    def filmed(g, v):
        given = g.conv(g.reshape(v, (144, 1, 1)), dense)
        return g.conv(g.conv(v, first), third, film(21, given), "silu")

    def filmed64(x):
        scale, shift = own[dense](flat(x)).chunk(2, 1)
        return own[third](F.silu(scale * own[first](x) + shift))

    cases = {
        "silu without a norm": (
            lambda g, v: g.conv(g.conv(v, first), third, None, "silu"),
            lambda x: own[third](F.silu(own[first](x))),
        ),
        "a fixed map": (
            lambda g, v: g.conv(g.conv(v, first), third, fixed, "silu"),
            lambda x: own[third](
                F.silu(rows[0].double()[:, None, None] * own[first](x) + rows[1].double()[:, None, None])
            ),
        ),
        "film": (filmed, filmed64),
        "a constant": (
            lambda g, v: g.conv(v, first, add=[g.constant(Table(lambda: values), (21, 4, 6))]),
            lambda x: own[first](x) + values.double(),
        ),
        "reshape": (
            lambda g, v: g.reshape(g.conv(g.reshape(v, (144, 1, 1)), dense), (7, 2, 3)),
            lambda x: own[dense](flat(x)).view(len(x), 2, 3, 7).permute(0, 3, 1, 2),
        ),
    }
    gradients_agree(cases, x, gamma)


def test_a_nan_is_seen_and_stays_where_it_is():
    model, x, level = case("small", batch=6)
    x[1, 0, 3, 3] = torch.nan
    score = native(model, 6)(x, level)
    assert score[1].isnan().any() and score[[0, 2, 3, 4, 5]].isfinite().all()


def test_auto_takes_the_native_executor():
    engine = Engine(potential(), 2, executor="auto")
    assert engine.sample(1).isfinite().all() and engine.executor == "native"


def test_what_it_refuses():
    model = potential()
    model.classifier.before[0].film.register_forward_hook(lambda *_: None)
    assert "hook" in str(refusal(model))


@pytest.mark.parametrize("shape", [(36, 1, 1), (9, 2, 2), (18, 1, 2), (4, 3, 3)])
def test_reshape_keeps_the_order_of_pixels(isa, shape):
    x = torch.randn(3, 6, 3, 2)
    want = x.permute(0, 2, 3, 1).reshape(3, *shape[1:], shape[0]).permute(0, 3, 1, 2)
    assert torch.equal(run_layers(lambda g, v: g.reshape(v, shape), x), want)
