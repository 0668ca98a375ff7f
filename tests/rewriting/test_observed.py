"""What a record of a module sees: every change that decides what it computes, not what a call itself writes."""

import copy
from collections import defaultdict

import pytest
import torch
from torch import nn

from sgm_engine.models.score_model import as_score
from sgm_engine.rewriting import observed, records
from sgm_engine.rewriting.acceleration import accelerate
from sgm_engine.rewriting.altered import altered
from sgm_engine.rewriting.observed import Observed
from tests.mutations import LEVELS, MUTATIONS, SETTINGS, Block, Model

WEIGHTS = ("parameter changed", "buffer changed")  # others watch what weights hold


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name not in WEIGHTS])
def test_every_ingredient_is_in_the_record(name):
    model, undo = as_score(Model(1, "closed").eval()), []
    record = Observed(model)
    assert record.changed() is None
    try:
        MUTATIONS[name](model.model, undo, 1.5)
        assert record.changed() is not None and Observed(model).changed() is None
    finally:
        for back in reversed(undo):
            back()


NEEDS = {  # a part of the record → a change that only it sees
    "_function": "closure",
    "_class": "Conv2d.forward",
    "_object": "config's config",
    "_items": "config's list",
    "_nothing": "hook",
    "_names": "global",
    "_kind": "class of a part",
    "Entries": "float",
    "Empty": "pre-hook",
    "Kinds": "class of a part",
    "State": "slot",
    "tensor": "tensor filled",
    "array": "array",
    "_digest": "tensor through NumPy",
}


@pytest.mark.parametrize("part", NEEDS)
def test_an_ingredient_left_out_is_missed(part, monkeypatch):
    """The control of the test above."""
    if part in ("Entries", "Empty", "Kinds", "State"):
        monkeypatch.setattr(getattr(records, part), "same", lambda self: True)
    elif part == "_digest":
        monkeypatch.setattr(records, part, lambda t: 0)
    elif part in ("tensor", "array"):
        monkeypatch.setattr(observed, part, lambda what: ())
    else:
        monkeypatch.setattr(observed._Walk, part, lambda self, *_: None)
    model, undo = Model(1, "closed").eval(), []
    record = Observed(model)
    try:
        MUTATIONS[NEEDS[part]](model, undo, 1.5)
        assert record.changed() is None
    finally:
        for back in reversed(undo):
            back()


def test_the_name_of_what_changed():
    model = Model(1, "open").eval()
    record = Observed(model)
    model.config.terms[1] = 3.0
    assert record.changed() == "Model.config.terms"
    model.config.terms[1] = 1.0
    model.gain = float("1.0")  # an equal number, assigned again
    assert record.changed() is None and record.records[0].same()
    model.blocks[0].mix = 0.25
    assert record.changed() == "Model.blocks.0.mix"


class Listed(list):
    pass


class Table(defaultdict):
    pass


@pytest.mark.parametrize("what, change", [
    (Listed([1.0]), lambda w: setattr(w, "scale", 2.0)),
    (torch.zeros(1), lambda w: setattr(w, "scale", 2.0)),
    (Table(float), lambda w: setattr(w, "default_factory", int)),
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_what_a_container_has_beside_its_items(what, change):
    what.__dict__["scale"] = 1.0
    model = Model(1, "open").eval()
    model.extra = what
    record = Observed(model)
    assert record.changed() is None
    change(what)
    assert record.changed().startswith("Model.extra")


def test_counters_and_caches_of_a_call_are_left_out():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.cache, self.log, self.scale = 0, {}, [], 1.0

        def forward(self, x):
            self.calls += 1
            self.cache["last"] = x
            self.log.append(self.calls)
            return x * self.scale

    model = Counting()
    record = Observed(model)
    model(torch.ones(1))
    record = record.settle()
    for _ in range(3):
        model(torch.ones(1))
    assert record.changed() is None
    model.scale = 2.0
    assert record.changed() == "Counting.scale"


def test_weights_are_known_by_identity_and_trainers_by_name():
    model = Model(1, "open").eval()
    model.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    record = Observed(model)
    model(torch.rand(1, 2, 8, 8), torch.zeros(1, dtype=torch.int64)).sum().backward()
    model.optimizer.step()
    assert record.changed() is None
    model.first.weight = nn.Parameter(torch.zeros_like(model.first.weight))
    assert record.changed() == "Model.first.weight"


def test_a_copy_of_a_record_is_of_the_copy():
    model = Model(1, "open").eval()
    other, record = copy.deepcopy((model, Observed(model)))
    model.gain = 2.0
    assert record.changed() is None
    other.gain = 2.0
    assert record.changed() == "Model.gain"


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["float", "config's field", "hook", "forward of a layer", "class attribute", "Conv2d.forward"]
)
def test_an_accelerated_module_follows(name):
    model, undo = Model(1, "open").eval(), []
    fast, x, level = accelerate(model), torch.rand(2, 2, 8, 8), torch.tensor([0, 2])
    fast(x, level)
    try:
        MUTATIONS[name](model, undo, 1.5)
        torch.testing.assert_close(fast(x, level), model(x, level), rtol=1e-5, atol=1e-5)
    finally:
        for back in reversed(undo):
            back()


def test_layers_that_are_not_what_their_class_says(monkeypatch):
    conv = nn.Conv2d(1, 1, 3)
    assert altered(conv) is None and altered(Block(4)) is None
    seamless = nn.Conv2d(1, 1, 3)
    seamless._conv_forward = lambda *a: nn.Conv2d._conv_forward(seamless, *a)
    assert altered(seamless) == "its _conv_forward was replaced"
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *a: a[0])
    assert altered(conv) == "Conv2d._conv_forward was replaced"
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert altered(nn.ReLU()) == "it has hooks"
    handle.remove()
    assert altered(nn.ReLU()) is None and len(LEVELS) == 3 and SETTINGS.gain == 1.0


@pytest.mark.parametrize("executor", ["native", "hybrid", "accelerated"])
def test_a_trace_leaves_parameters_that_can_be_swapped(executor):
    from sgm_engine.engine.engine import Engine

    model = Model(0, "open").eval()
    run = accelerate(model, Model.shape) if executor == "accelerated" else Engine(model, 2, executor=executor)
    torch.utils.swap_tensors(model.first.weight, nn.Parameter(torch.zeros_like(model.first.weight)))
    assert not model.first.weight.any() and run is not None
