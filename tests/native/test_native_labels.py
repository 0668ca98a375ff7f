"""Labels and guidance in the native executor, and the published U-Net, against float64 autograd."""

import pytest
import torch
from torch import nn

from sgm_engine import Engine, ancestral
from sgm_engine.executors.native.executor import NativeNetwork
from tests.cdm.potentials import potential
from tests.native.classifiers import question, score64, small, worst
from tests.native.layers import bits_of_any_threads

MODELS = {
    "U-Net": lambda: loud(small(labels=3, baseline=(-0.7, 0.6))),
    "published": lambda: loud(small(labels=3, published=True, multipliers=(1, 1, 2), width=32, attention=(3,))),
    "potentials": lambda: told(potential(labels=3)),
}
TOLD = [(None, 1.0), (1, 1.0), (2, 2.5), (0, 0.3)]


def loud(model):
    nn.init.normal_(model.classifier.head.weight, std=30.0)
    nn.init.normal_(model.classifier.told.label.weight, std=3.0)
    return model


def told(model):
    nn.init.normal_(model.classifier.features.label, std=2.0)
    nn.init.normal_(model.classifier.head.weight, std=5.0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_score_of_each_label_and_guidance(name):
    plain = MODELS[name]()
    x, level = question(plain, 3)
    free = score64(plain, x, level)
    for label, guidance in TOLD:
        model = plain.with_class(label, guidance)
        want = score64(model, x, level)
        found = NativeNetwork(model, 3, *model.shape[1:])(x, level)
        assert worst(found, want) < 5e-6, (label, guidance)
        if label is not None:
            assert worst(free, want) > 1e-3  # the label does matter
            one = score64(plain.with_class(label), x, level)
            assert torch.allclose(want, free + guidance * (one - free), rtol=1e-6, atol=1e-6 * float(want.abs().max()))


def test_on_every_instruction_set(isa):
    model = MODELS["published"]().with_class(1, 2.5)
    x, level = question(model, 2)
    assert worst(NativeNetwork(model, 2, 12, 12)(x, level), score64(model, x, level)) < 5e-6


@pytest.mark.parametrize("name", ["U-Net", "potentials"])
def test_auto_is_native_and_follows_training(name, recwarn):
    model = MODELS[name]().with_class(1, 2.0)
    engine, eager = Engine(model, 2), Engine(model, 2, executor="eager")
    plan = ancestral(model.sigmas.tolist(), start_shift=0.5)
    first = engine.sample(2, plan=plan)
    assert "executor native" in repr(engine) and not [w for w in recwarn if "native" in str(w.message)]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    second, want = engine.sample(2, plan=plan), eager.sample(2, plan=plan)
    assert not torch.equal(first, second)
    assert (second - want).abs().max() < 1e-3 * want.abs().max()


def test_any_number_of_threads_gives_the_same_bits(threads):
    model = MODELS["published"]().with_class(1, 2.0)
    x, level = question(model, 8)
    bits_of_any_threads(NativeNetwork(model, 8, 12, 12), x, level, threads)
