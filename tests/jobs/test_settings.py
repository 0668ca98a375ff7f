"""What of a model is no weight and decides its samples: every part is seen, named, and missed if it is left out."""

import functools
import logging
import random
import types
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from sgm_engine import Engine
from sgm_engine.errors import EngineError
from sgm_engine.jobs import settings as settings_module
from sgm_engine.jobs.identity import weights_digest
from sgm_engine.jobs.job import Job
from sgm_engine.jobs.settings import settings
from sgm_engine.jobs.spec import Geometry, JobSpec
from sgm_engine.models import NCSN
from sgm_engine.outputs.sample_ids import SampleIds
from sgm_engine.plans.plan import annealed_langevin, consistent_annealed

SIGMAS = (1.0, 0.3)
PLAN = annealed_langevin(SIGMAS, steps_per_level=1, step_lr=1e-3)
LOG = logging.getLogger(__name__)
OUTER = types.ModuleType("outer")
OUTER.inner = types.ModuleType("outer.inner")
OUTER.inner.gain = 1.0


class Named:
    """A class as a config."""

    gain, terms = 1.0, [1.0]


class Holder:
    def __init__(self):
        self.power = 1.0


class Listed(list):
    pass


class Silent:
    """Of which there is nothing but the class."""


class Net(nn.Module):
    sigmas, shape, terms, held, mean = SIGMAS, (1, 8, 8), [1.0], Holder(), torch.zeros(1)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.conv.weight), nn.init.zeros_(self.conv.bias)
        self.named, self.listed, self.table, self.act = Named, Listed([1.0]), defaultdict(float), Silent()
        self.labelled = torch.zeros(1)
        self.labelled.scale = 1.0
        self.gain = 1.0
        self.eval()

    @functools.cached_property
    def slow(self):
        return 2.0

    def forward(self, x, level, weight=1.5, *, shift=0.0):
        LOG.debug("%s", np.shape(x))
        return self.conv(x) * weight * self.gain * OUTER.inner.gain * Named.gain + shift


CHANGES = {  # what → (how, where it is seen)
    "list of the class": (lambda n, m: m.setattr(Net, "terms", [2.0]), "Net.terms"),
    "object of the class": (lambda n, m: m.setattr(Net.held, "power", 2.0), "Net.held.power"),
    "tensor of the class": (lambda n, m: m.setattr(Net, "mean", torch.ones(1)), "Net.mean"),
    "class as a config": (lambda n, m: m.setattr(Named, "gain", 2.0), "Net.forward.Named.gain"),
    "list of a config": (lambda n, m: m.setattr(Named, "terms", [2.0]), "Net.forward.Named.terms"),
    "default": (lambda n, m: m.setattr(Net.forward, "__defaults__", (7.5,)), "Net.forward.default[0]"),
    "keyword's default": (lambda n, m: m.setitem(Net.forward.__kwdefaults__, "shift", 1.0), "Net.forward.shift"),
    "module in a module": (lambda n, m: m.setattr(OUTER.inner, "gain", 2.0), "Net.forward.OUTER.inner.gain"),
    "attribute of a list": (lambda n, m: setattr(n.listed, "scale", 2.0), "listed.scale"),
    "factory of a dict": (lambda n, m: setattr(n.table, "default_factory", int), "table.default_factory"),
    "attribute of a tensor": (lambda n, m: setattr(n.labelled, "scale", 2.0), "labelled.scale"),
    "class of an object": (lambda n, m: setattr(n, "act", Holder()), "act.power"),
    "what a layer keeps": (lambda n, m: setattr(n.conv, "_reversed_padding_repeated_twice", [1] * 4),
                           "layers of torch.nn"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_seen_where_it_is(what, monkeypatch):
    change, where = CHANGES[what]
    net = Net()
    before = settings(net)
    assert settings(Net()) == before
    change(net, monkeypatch)
    now = settings(net)
    assert before.get(where) != now.get(where)


INGREDIENTS = {  # a part of the walk → the change that only it sees
    "_namespace": "class as a config",
    "_bound": "default",
    "_attributes": "module in a module",
    "_items": "attribute of a list",
    "_tensor": "tensor of the class",
    "_code": "object of the class",
    "_globals": "module in a module",
    "_layer": "what a layer keeps",
    "_of": "list of the class",
    "visit": "attribute of a tensor",
}


@pytest.mark.parametrize("part", INGREDIENTS)
def test_an_ingredient_left_out_is_missed(part, monkeypatch):
    """The control of the test above."""
    monkeypatch.setattr(settings_module._Walk, part, lambda self, *_: None)
    net = Net()
    before = settings(net)
    CHANGES[INGREDIENTS[part]][0](net, monkeypatch)
    assert settings(net) == before


def test_what_says_nothing_of_samples():
    net, told = Net(), settings(Net())
    assert net.slow == 2.0  # and is kept
    LOG.setLevel(logging.INFO)
    assert settings(net) == told and told["Net.forward.np"] == "numpy"  # not where it is installed


@pytest.mark.parametrize(
    "value",
    [random.Random(0), np.array([1, None]), np.array(["a"]), torch.eye(2).to_sparse()],
    ids=["generator", "objects", "texts", "sparse"],
)
def test_what_cannot_be_told_from_another_is_named(value):
    net = Net()
    net.odd = value
    with pytest.raises(ValueError, match=rf"^weights: odd is a {type(value).__name__}, .*pass weights='…'"):
        settings(net)
    if isinstance(value, torch.Tensor):
        del net.odd
        net.register_buffer("odd", value)
        with pytest.raises(ValueError, match=r"^weights: odd is a Tensor"):
            weights_digest(net)


class Bent(NCSN):
    """Of somebody's own."""

    bend = 1.0

    def forward(self, x, level):
        return super().forward(x, level) * self.bend


def ncsn(cls=NCSN):
    return cls(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval()


OWN = {
    "hook": (lambda n: n.begin_conv.register_forward_hook(lambda m, i, o: o * 2), "begin_conv.altered"),
    "pre-hook": (lambda n: n.register_forward_pre_hook(lambda m, i: i), "_forward_pre_hooks"),
    "padding": (lambda n: setattr(n.begin_conv, "padding_mode", "circular"), "layers of torch.nn"),
    "dilation": (lambda n: setattr(n.begin_conv, "dilation", (2, 2)), "layers of torch.nn"),
    "seamless": (lambda n: setattr(n.end_conv, "_conv_forward", lambda *a: a[0]), "end_conv.altered"),
    "forward": (lambda n: setattr(n, "forward", lambda x, level: x), "altered"),
    "part": (lambda n: setattr(n, "end_conv", nn.Identity()), "layers of torch.nn"),
}


@pytest.mark.parametrize("what", OWN)
def test_a_network_of_this_package_that_was_changed(what):
    net = ncsn()
    assert settings(net) == {}
    OWN[what][0](net)
    now = settings(net)
    assert any(name.startswith(OWN[what][1]) for name in now)


@pytest.mark.parametrize("layer", [nn.Conv2d, NCSN])
def test_a_class_that_was_changed_under_a_network_of_this_package(layer, monkeypatch):
    """What its configuration builds has the changed class too, and is no measure of it."""
    model, before = ncsn(), layer.forward
    assert settings(model) == {}
    monkeypatch.setattr(layer, "forward", lambda self, *args: before(self, *args))
    changed = settings(model)
    assert changed and settings(ncsn()) == changed  # whichever comes first
    monkeypatch.undo()
    assert settings(model) == {}


def test_the_quick_answer_is_that_of_the_walk(monkeypatch):
    """Numbers of another type are other numbers."""
    for name, value in (("groups", True), ("groups", 1.0), ("dilation", [1, 1]), ("padding_mode", "reflect"), ("a", 1)):
        model = ncsn()
        setattr(model.begin_conv, name, value)
        quick = settings(model)
        with monkeypatch.context() as patch:
            patch.setattr(settings_module, "as_built", lambda part, config: False)
            assert quick == settings(model) != {}, name


def test_a_network_made_of_one_of_this_package(monkeypatch):
    net = ncsn(Bent)
    before = settings(net), weights_digest(net)
    monkeypatch.setattr(Bent, "bend", 2.0)
    assert settings(net)["Bent.bend"] == "2.0" and before[0]["Bent.bend"] == "1.0"
    assert weights_digest(net) == before[1] != weights_digest(ncsn())


def test_a_model_that_changes_while_a_job_draws(tmp_path):
    net = Net()
    job = Job(Engine(net, 2, executor="eager"), tmp_path / "job", 6, plan=PLAN, format="npz", shard_size=2)

    def change(progress):
        net.gain = 7.5

    with pytest.raises(EngineError, match=r"the model changed while a job drew .*gain was 1\.0 and is now 7\.5"):
        job.run(on_shard=change)
    net.gain = 1.0
    assert job.run().complete


SPEC = JobSpec(
    "w", PLAN, 0, SampleIds.parse("0-7"), (1, 8, 8), "npz", 4, Geometry("float32", "eager", 2, "cpu avx2", "2.13.0")
)
OTHER = {
    "weights": {"weights": "v"}, "model": {"model": {"scale": "2.0"}}, "plan": {"plan": consistent_annealed(SIGMAS, 1)},
    "seed": {"seed": 1}, "ids": {"ids": SampleIds.parse("1-8")}, "shape": {"shape": (1, 8, 16)},
    "data_range": {"data_range": (-1.0, 1.0)}, "engine": {"engine": "0.0.1"}, "format": {"format": "png"},
    "shard_size": {"shard_size": 8},
    **{name: {"geometry": replace(SPEC.geometry, **{name: value})} for name, value in
       {"precision": "bfloat16", "executor": "native", "batch": 4, "device": "cpu avx512", "torch": "2.12.0"}.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_a_job_has_no_ingredient_that_another_would_stand_for(name):
    """Each alone makes another job; so one left out would make two jobs one."""
    assert set(OTHER) == {*SPEC.identity, "model", "data_range"}
    other = replace(SPEC, **OTHER[name])
    here, there = SPEC.identity, other.identity
    assert [key for key in here | there if here.get(key) != there.get(key)] == [name]
    assert other.run != SPEC.run and " was " in SPEC.changes(other)
