"""What a job takes a model for: every value that decides its samples, and a refusal that names the one that changed."""

import functools
import os
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sgm_engine import Engine, accelerate, as_score, classifier_free, classifier_guided, load_bundled, posterior
from sgm_engine.jobs.identity import identity_of, settings
from sgm_engine.jobs.job import Job
from sgm_engine.jobs.spec import JobError
from sgm_engine.models import NCSN
from sgm_engine.models.inverse import blur, mask
from sgm_engine.plans.plan import annealed_langevin
from tests import mutations

SIGMAS, SHAPE = (1.0, 0.3), (1, 8, 8)
PLAN = annealed_langevin(SIGMAS, steps_per_level=1, step_lr=1e-3)
GAIN = 2.0


def twice(x):
    return GAIN * x


class Net(nn.Module):
    """Whatever a module of a user's may be made of."""

    slope = 1.0

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.conv.weight.data = torch.randn(1, 1, 3, 3, generator=generator)
        self.conv.bias.data.zero_()
        self.drop = nn.Dropout(0.5)
        self.sigmas, self.shape = SIGMAS, SHAPE
        self.scale, self.label, self.plain = 1.5, 3, torch.ones(1, 8, 8)
        self.config, self.table, self.stages = SimpleNamespace(depth=2), {"width": 4}, [1, [2, 3]]
        self.act, self.part = twice, functools.partial(torch.clamp, min=-5.0)
        bias = 0.25
        self.closure = lambda x: x + bias
        self.eval()

    def forward(self, x, level):
        return self.closure(self.part(self.act(self.conv(x) * self.scale + self.plain))) * self.slope


def set_global(net, monkeypatch):
    monkeypatch.setitem(globals(), "GAIN", 3.0)


def set_class(net, monkeypatch):
    monkeypatch.setattr(Net, "slope", 2.0)


def set_forward(net, monkeypatch):
    monkeypatch.setattr(Net, "forward", lambda self, x, level: self.conv(x))


def set_closure(net, _):
    bias = 0.5
    net.closure = lambda x: x + bias


def fill(net, _):
    net.plain.fill_(2)


MUTATIONS = {
    "a float": (lambda n, _: setattr(n, "scale", 7.5), ["scale"]),
    "a class label": (lambda n, _: setattr(n, "label", 4), ["label"]),
    "a plain tensor, replaced": (lambda n, _: setattr(n, "plain", torch.zeros(1, 8, 8)), ["plain"]),
    "a plain tensor, filled": (fill, ["plain"]),
    "a field of a config": (lambda n, _: setattr(n.config, "depth", 3), ["config.depth"]),
    "an entry of a dict": (lambda n, _: n.table.update(width=5), ["table['width']"]),
    "an item of a list": (lambda n, _: n.stages[1].append(4), ["stages[1]"]),
    "a function": (lambda n, _: setattr(n, "act", torch.relu), ["act", "act()", "act.GAIN"]),
    "a partial's keyword": (lambda n, _: n.part.keywords.update(min=-1.0), ["part.keywords['min']"]),
    "a closure's value": (set_closure, ["closure.bias"]),
    "a global that a function names": (set_global, ["act.GAIN"]),
    "an attribute of the class": (set_class, ["Net.slope"]),
    "the code of forward": (set_forward, ["Net()"]),
    "a forward of the object's own": (lambda n, _: setattr(n, "forward", lambda x, level: x), ["forward()"]),
    "a hook": (lambda n, _: n.register_forward_hook(lambda m, i, o: o), None),
    "a layer's hook": (lambda n, _: n.conv.register_forward_pre_hook(lambda m, i: i), ["layers of torch.nn"]),
    "a layer's padding": (lambda n, _: setattr(n.conv, "padding_mode", "circular"), ["layers of torch.nn"]),
    "a dropout's mode": (lambda n, _: n.drop.train(), ["layers of torch.nn"]),
    "a new attribute": (lambda n, _: setattr(n, "extra", 1), ["extra"]),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_every_change_is_seen_where_it_is(what, monkeypatch):
    change, where = MUTATIONS[what]
    net = Net()
    before = settings(net)
    assert settings(Net()) == before == settings(net)
    change(net, monkeypatch)
    now = settings(net)
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    assert changed and set(where or ()) <= set(changed)


def test_networks_of_this_package_say_nothing_but_their_weights():
    net, _ = load_bundled()
    assert settings(net) == settings(accelerate(net)) == {}


def guided(**changes):
    base = NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8)
    with torch.no_grad():
        for p in base.parameters():
            p.fill_(0.01)
    ones = torch.full(SHAPE, changes.pop("y", 0.5))
    known = torch.ones(SHAPE, dtype=torch.bool)
    known[0, 0, 0] = changes.pop("pixel", True)
    kind = changes.pop("kind")
    if kind == "free":
        return classifier_free(base, base, changes.pop("weight", 1.5))
    if kind == "classifier":
        slope = changes.pop("slope", 1.0)
        return classifier_guided(base, lambda x, s: -slope * x.square().sum((1, 2, 3)), changes.pop("scale", 1.0))
    operator = blur(torch.ones(3, 3) / 9, SHAPE) if changes.pop("blurred", False) else mask(known, SHAPE)
    return posterior(base, operator, ones, changes.pop("noise", 0.1))


@pytest.mark.parametrize(
    "kind, change, said",
    [
        ("free", {"weight": 7.5}, "the model's weight was 1.5 and is now 7.5"),
        ("classifier", {"scale": 3.0}, r"the model's terms\[0\].scale was 1.0 and is now 3.0"),
        ("classifier", {"slope": 2.0}, r"the model's terms\[0\].log_prob.slope was 1.0 and is now 2.0"),
        ("posterior", {"noise": 0.2}, r"terms\[0\].noise was 0.1 and is now 0.2"),
        ("posterior", {"y": 0.75}, r"terms\[0\].y was float32"),
        ("posterior", {"pixel": False}, r"terms\[0\].operator.forward.weight was float32"),
        ("posterior", {"blurred": True}, r"terms\[0\].operator"),
    ],
    ids=str,
)
def test_a_job_is_not_resumed_with_another_guidance(tmp_path, kind, change, said):
    def job(**changes):
        model = guided(kind=kind, **changes)
        return Job(Engine(model, 2, executor="eager", shape=SHAPE), tmp_path / "job", 2, plan=PLAN, format="npz")

    assert job().run().complete
    assert job().run().complete  # the same again: nothing to do
    with pytest.raises(JobError, match=said):
        job(**change)


def test_a_change_after_the_job_was_made_is_refused_when_it_draws(tmp_path):
    net = Net()
    job = Job(Engine(net, 2, executor="eager"), tmp_path / "job", 2, plan=PLAN, format="npz")
    net.scale = 2.0
    with pytest.raises(JobError, match=r"scale was 1\.5 and is now 2\.0"):
        job.run()


def test_what_cannot_be_told_from_another_names_the_argument(tmp_path):
    net = Net()
    net.lock = threading.Lock()
    engine = Engine(net, 2, executor="eager")
    with pytest.raises(ValueError, match=r"weights: lock is a lock, .*pass weights='…'"):
        Job(engine, tmp_path / "job", 2, plan=PLAN, format="npz")
    assert Job(engine, tmp_path / "job", 2, plan=PLAN, format="npz", weights="mine").run().complete


def test_a_model_that_holds_itself():
    net = Net()
    net.itself, net.pair = [net], (net.config, net.config)
    found = settings(net)
    assert found["itself[0]"] == "the same as the model" and found["pair[1]"] == "the same as config"


def test_a_wrapped_functions_network_is_seen_in_its_closure():
    net = Net()
    score = as_score(lambda x, level: net(x, level), sigmas=SIGMAS)
    before = settings(score)
    with torch.no_grad():
        net.conv.weight.add_(1)
    now = settings(score)
    assert [name for name in before if before[name] != now[name]] == ["model.net.conv.weight"]


DRAWS = int(os.environ.get("SGM_MUTATIONS", "66"))  # by hand: SGM_MUTATIONS=600


def test_every_random_change_of_a_random_model_is_another_identity():
    """What test_truth.py does to a model between two requests, to a job between two runs."""
    missed = []
    for draw in range(DRAWS):
        pick, name = random.Random(draw), list(mutations.MUTATIONS)[draw % len(mutations.MUTATIONS)]
        model, undo = mutations.Model(pick.randrange(100), "closed").eval(), []
        before = identity_of(model)
        assert identity_of(model) == before
        try:
            mutations.MUTATIONS[name](model, undo, pick.uniform(1.2, 2))
            if identity_of(model) == before:
                missed.append(name)
        finally:
            for back in reversed(undo):
                back()
    assert missed == []
