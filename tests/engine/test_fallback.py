"""``auto`` runs whatever eager can, and says once what was in the way; a model must be a function of x and level."""

import copy
import multiprocessing
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.native import executor
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import annealed_langevin
from tests.mutations import LEVELS, MUTATIONS, Model

PLAN = annealed_langevin(LEVELS, 1, step_lr=1e-3)


def ncsn(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN(LEVELS, channels=1, ngf=4, divide_by_sigma=True, image_size=8, **options).eval()


def as_eager(engine, shape=None):
    """Whether its samples are those of a fresh eager engine, and the warnings that it gave."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = engine.sample(2, plan=PLAN)
    wanted = Engine(engine.model, 2, executor="eager", shape=shape).sample(2, plan=PLAN)
    return bool((found - wanted).norm() <= 1e-4 * wanted.norm()), [str(w.message) for w in said]


FOLLOWED = {  # by a recorded run of the module
    "hook": lambda m: m.end_conv.register_forward_hook(lambda s, a, o: o * 2),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.end_conv),
    "forward": lambda m: setattr(m, "forward", lambda x, level, f=m.forward: f(x, level) * 2),
    "padding": lambda m: (setattr(m.begin_conv, "padding_mode", "circular"),
                          setattr(m.begin_conv, "_reversed_padding_repeated_twice", [1, 1, 1, 1])),
}  # fmt: skip
GATES = {  # a product of two feature maps has no layer
    "hook": lambda m: m.end_conv.register_forward_hook(lambda s, a, o: o * o.flip(-1)),
    "forward": lambda m: setattr(m, "forward", lambda x, level, f=m.forward: f(x, level) * x.sigmoid()),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_live_engine_follows_what_has_layers(name):
    model = ncsn()
    engine, named = Engine(model, 2), Engine(model, 2, executor="native")
    engine.sample(1, plan=PLAN)
    before = named.sample(2, plan=PLAN)
    FOLLOWED[name](model)
    assert as_eager(engine) == (True, []) and engine.executor == "native"
    assert as_eager(named)[0] and (name == "weight norm" or not torch.equal(named.sample(2, plan=PLAN), before))


@pytest.mark.parametrize("name", GATES)
def test_a_live_engine_takes_the_next_best(name):
    model = ncsn()
    engine, named = Engine(model, 2), Engine(model, 2, executor="native")
    assert engine.executor == "native"
    engine.sample(1, plan=PLAN)
    GATES[name](model)
    same, said = as_eager(engine)
    assert same and engine.executor in ("hybrid", "eager"), said
    assert len(said) == 1 and "executor='native' cannot run this model" in said[0] and "from now on" in said[0]
    same, said = as_eager(engine)
    assert same and not said
    with pytest.raises(ValueError, match="executor='native' cannot run this model"):
        named.sample(1, plan=PLAN)


def test_what_native_cannot_run_from_the_start():
    model = ncsn()
    GATES["hook"](model)
    with pytest.warns(UserWarning, match=r"executor='native' cannot run this model: .*runs it"):
        engine = Engine(model, 2)
    assert as_eager(engine) == (True, [])
    with pytest.warns(UserWarning, match=r"executor='native' cannot run this model: .*runs it"):
        odd = Engine(Model(0, "open").eval(), 2, shape=(2, 7, 9), precision="float16")
    assert odd.executor == "eager"
    with pytest.warns(UserWarning, match=r"must divide by 2, got 27×29; running \w+ from now on"):
        engine = Engine(ncsn(), 2, shape=(1, 27, 29))
    assert engine.executor != "native"


def test_hooks_of_all_modules():
    engine = Engine(ncsn(), 2)
    engine.sample(1, plan=PLAN)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, a, o: o * 1.5 if isinstance(m, nn.Conv2d) else None
    )
    try:
        assert as_eager(engine)[0] and engine.executor == "eager"
    finally:
        handle.remove()


class Drawing(nn.Module):
    sigmas, shape = LEVELS, (2, 8, 8)

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(2, 2, 3, padding=1)
        self.attend = nn.MultiheadAttention(2, 1, dropout=0.5, batch_first=True)
        self.bend, self.norm = nn.RReLU(), nn.BatchNorm2d(2, track_running_stats=False)
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1))
        self.eval()

    def forward(self, x, level):
        h = self.conv(x)
        if self.kind == "dropout":
            h = F.dropout(h, 0.5)
        if self.kind == "batch":
            h = self.norm(h)
        if self.kind == "attention":
            tokens = h.flatten(2).transpose(1, 2)
            h = self.attend(tokens, tokens, tokens)[0].transpose(1, 2).reshape(h.shape)
        return self.normed(self.bend(h))


@pytest.mark.parametrize("executor", ["eager", "auto"])
@pytest.mark.parametrize("kind, part", [("attention", "attend"), ("", "bend"), ("", "normed")])
def test_every_part_has_its_mode(kind, part, executor):
    model = Drawing(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = Engine(model, 2, executor=executor)
    engine.sample(1, plan=PLAN)
    getattr(model, part).train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"{part}\S* is in training mode .* call model.eval\(\) first"):
        engine.sample(1, plan=PLAN)
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert as_eager(engine)[0]


@pytest.mark.parametrize("executor", ["eager", "auto"])
@pytest.mark.parametrize("kind", ["dropout", "batch"])
def test_what_is_no_function_of_x_and_level_is_refused(kind, executor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = Engine(Drawing(kind), 2, executor=executor)
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match="model must be a function of x and level, but two calls with one image differ"
    ):
        engine.sample(1, plan=PLAN)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("write", [lambda x: x.mul_(0.5), lambda x: x.clamp_(0, 1), lambda x: x.data.add_(1)])
def test_a_model_that_writes_to_its_input(write):
    model = lambda x, level: -write(x)  # noqa: E731
    engine = Engine(model, 2, sigmas=LEVELS, shape=(1, 4, 4))
    with pytest.warns(UserWarning, match="model writes to its input x") as said:
        found = engine.sample(2, plan=PLAN), engine.sample(2, plan=PLAN)
    assert len(said) == 1
    kind = Engine(lambda x, level: -write(x.clone()), 2, sigmas=LEVELS, shape=(1, 4, 4)).sample(2, plan=PLAN)
    assert torch.equal(found[0], kind) and torch.equal(found[1], kind)


def test_a_model_that_keeps_its_engine_can_be_copied():
    model = Model(0, "open").eval()
    model.engine = Engine(model, 2, executor="eager")
    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="make an Engine of the copy"):
        other.engine.sample(1)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model.engine)
    assert Engine(other, 2, executor="eager").sample(1, plan=PLAN).equal(model.engine.sample(1, plan=PLAN))


def _in_a_child(engine, found):
    try:
        engine.sample(1, plan=PLAN)
    except RuntimeError as error:
        found.put(str(error))


def test_after_a_fork_an_engine_says_so():
    context = multiprocessing.get_context("fork")
    engine, found = Engine(lambda x, level: -x, 2, sigmas=LEVELS, shape=(1, 4, 4)), context.Queue()
    child = context.Process(target=_in_a_child, args=(engine, found))
    child.start()
    assert "made before a fork" in found.get(timeout=60)
    child.join()


def test_seeds_of_numpy():
    engine = Engine(lambda x, level: -x, 2, sigmas=LEVELS, shape=(1, 4, 4))
    assert engine.sample(2, np.int64(3), PLAN).equal(engine.sample(2, 3, PLAN))
    many = engine.sample(3, [4, 2**64 - 1, 6], PLAN)
    assert engine.sample(3, np.array([4, 2**64 - 1, 6], np.uint64), PLAN).equal(many)
    assert engine.sample(2, torch.tensor([4, 6]), PLAN).equal(many[[0, 2]])
    with pytest.raises(ValueError, match="seed must be one integer or n = 3 of them, got 2"):
        engine.sample(3, np.array([1, 2]), PLAN)


def test_proofs_can_fail(monkeypatch):
    """The control of the changes in mutations.py: without records and proofs an engine draws as if nothing had been."""
    from sgm_engine.executors.witness import Witness
    from sgm_engine.rewriting.observed import Observed

    monkeypatch.setattr(Observed, "changed", lambda self: None)
    monkeypatch.setattr(Witness, "disagreement", lambda self, executor: None)
    for name in ("float", "config's field", "class attribute", "hook", "Conv2d.forward", "padding"):
        model, undo = Model(0, "open").eval(), []
        engine = Engine(model, 2, executor="native")
        before = engine.sample(2, plan=PLAN)
        try:
            MUTATIONS[name](model, undo, 1.5)
            assert engine.sample(2, plan=PLAN).equal(before), name
            assert not as_eager(engine)[0], name
        finally:
            for back in reversed(undo):
                back()


def test_what_no_record_sees_is_proved(monkeypatch):
    """An object of C's: here, whatever the record would have said."""
    from sgm_engine.rewriting.observed import Observed

    model = Model(0, "open").eval()
    engine = Engine(model, 2, executor="native")
    engine.sample(1, plan=PLAN)
    monkeypatch.setattr(Observed, "changed", lambda self: None)
    model.gain = 1.5
    assert as_eager(engine) == (True, []) and engine.executor == "native"


@pytest.mark.parametrize("batch, buckets", [(2, ()), (3, (1,))])
def test_auto_lowers_a_traced_network_once(batch, buckets, monkeypatch):
    """To find out whether it can is to do it; what is found is what runs, in the batch that was asked for."""
    model, made, lower = ncsn(), [], executor.lowered
    FOLLOWED["forward"](model)

    def counted(model, batch, *of):
        made.append(batch)
        return lower(model, batch, *of)

    monkeypatch.setattr(executor, "lowered", counted)
    engine = Engine(model, batch, buckets=buckets)
    assert engine.executor == "native" and made == [batch]
    named = Engine(model, batch, executor="native", buckets=buckets)
    assert engine.describe() == named.describe()
    assert engine.sample(batch, plan=PLAN).equal(named.sample(batch, plan=PLAN))
    model.end_conv.weight.data.mul_(2)
    assert engine.sample(1, plan=PLAN).equal(named.sample(1, plan=PLAN)) and len(made) == 2 + 2 * len(buckets)
    FOLLOWED["forward"](model)  # another network by now
    same, said = as_eager(engine)
    assert same and not said and engine.executor == "native"
