"""Weights are shared: whoever writes to them, and however, an engine draws as a fresh eager one would, or says no."""

import copy
import os
import random
import threading
from itertools import count

import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.network import Network
from sgm_engine.integrations.deepinv import Denoiser
from sgm_engine.jobs.job import Job
from sgm_engine.models import NCSN
from sgm_engine.plans.plan import annealed_langevin
from sgm_engine.rewriting.acceleration import accelerate
from tests.writers import FUSED, SIGMAS, STRUCTURAL, WRITERS, flip, one_element, optimizer_step, permute, tiny_net

PLAN = annealed_langevin(SIGMAS, 6, step_lr=1e-3)  # 18 steps: more than lie between two looks
DRAWS = int(os.environ.get("SGM_DRAWS", "8"))  # of each executor and precision
RUNS = [("native", "float32"), ("native", "direct"), ("hybrid", "float32"), ("eager", "bfloat16"), ("eager", "float32")]
RUNS += [("native", "bfloat16")]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh(net, executor, precision):
    """What the same network draws with nothing remembered: eagerly, or by the same arithmetic in 16 bits."""
    other = copy.deepcopy(net)
    plain = precision in ("float32", "direct")
    how = {"executor": "eager", "precision": "float32"} if plain else {"executor": executor, "precision": precision}
    return Engine(other, 2, **how)


def error(x, want):
    return ((x - want).norm() / want.norm()).item()


@pytest.mark.parametrize("executor, precision", RUNS)
def test_any_writer_is_seen_or_refused(executor, precision):
    """Random writers between requests and within one; SGM_DRAWS=60 for hundreds of draws. Nothing is silently stale."""
    draw = random.Random(f"{executor} {precision} {DRAWS}")
    torch.manual_seed(0)
    net, engine, silent, refused, felt = tiny_net(), None, [], 0, 0
    for i in range(DRAWS):
        engine = engine or Engine(net, 2, executor=executor, precision=precision)
        writer = draw.choice(STRUCTURAL if i % 8 == 7 else WRITERS)
        within = draw.random() < 0.5
        before = fresh(net, executor, precision).sample(4, plan=PLAN)
        try:
            if within:  # the first two are drawn by the weights before, the others begin after the write
                stream = engine.stream(range(4), plan=PLAN)
                drawn = [next(stream)[1], next(stream)[1]]
                what = writer(net, draw) or writer.__name__
                drawn = torch.stack([*drawn, *(x for _, x in stream)])[2:]
            else:
                what = writer(net, draw) or writer.__name__
                drawn = engine.sample(4, plan=PLAN)[2:]
        except ValueError as refusal:
            assert "cannot run this model" in str(refusal)
            refused, net, engine = refused + 1, tiny_net(i), None
            continue
        want = fresh(net, executor, precision).sample(4, plan=PLAN)[2:]
        felt += error(before[2:], want) > 1e-3
        if error(drawn, want) > 2e-4:
            silent.append((i, what, "within" if within else "between", error(drawn, want)))
        if writer in STRUCTURAL or not torch.isfinite(want).all() or want.abs().max() > 50:
            net, engine = tiny_net(i), None
    print(f"\n{executor} {precision}: {DRAWS} draws, {refused} refused, {felt} felt, silent: {silent}")
    assert not silent
    assert felt >= 0.6 * (DRAWS - refused)


@pytest.mark.parametrize("executor, precision", RUNS)
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_step_within_a_request(executor, precision, name):
    """torch's fused optimizers raise no version; the next step sees them, in a request that is watched step by step."""
    net = tiny_net()
    engine = Engine(net, 2, executor=executor, precision=precision)
    versions, scores = [p._version for p in net.parameters()], []

    def callback(info):
        scores.append(engine._executor.score.clone())
        if info.step == 1:
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            net.end.bias.grad = torch.full_like(net.end.bias, -1.0)
            options = {} if name == "SGD" else {"weight_decay": 0.0}
            getattr(torch.optim, name)(net.parameters(), lr=5.0, fused=True, **options).step()

    engine.sample(2, plan=PLAN, callback=callback)
    assert versions == [p._version for p in net.parameters()]
    assert (scores[1] - scores[0]).mean() > 3  # the bias rose by 5, and is divided by σ = 1


def test_a_write_that_nothing_tells_of_is_seen_within_16_steps():
    net, seen = tiny_net(), []
    engine = Engine(net, 2, executor="native")

    def callback(info):
        seen.append(engine._executor.score.abs().max().item())
        if info.step == 1:
            net.end.weight.data.zero_()
            net.end.bias.data.zero_()

    engine.sample(2, plan=PLAN, callback=callback)
    assert all(seen[:1]) and not any(seen[17:])


def test_training_in_another_thread():
    """A stream while a fused optimizer steps beside it: what begins after the last step is drawn by its weights."""
    net = tiny_net()
    engine, done = Engine(net, 2, executor="native"), threading.Event()

    def train():
        adam = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        for _ in range(20):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            adam.step()
        done.set()

    thread = threading.Thread(target=train)
    stream = engine.stream(count(), plan=PLAN)
    drawn = [next(stream)]
    thread.start()
    while not done.is_set():
        drawn.append(next(stream))
    thread.join()
    while len(drawn) % 2:
        drawn.append(next(stream))
    last = torch.stack([next(stream)[1] for _ in range(4)])[2:]
    first = len(drawn) + 2
    stream.close()
    want = fresh(net, "native", "float32").sample(2, plan=PLAN, first_id=first)
    assert error(last, want) < 2e-4


def test_force_makes_every_copy_anew():
    for executor, precision in RUNS:
        net = tiny_net()
        engine = Engine(net, 2, executor=executor, precision=precision)
        want = engine.sample(2, plan=PLAN)
        with engine._request(2):
            engine.sync_weights(force=True)
        assert torch.equal(engine.sample(2, plan=PLAN), want)
    native = Engine(tiny_net(), 2, executor="native")._executor.network
    assert native.sync() == 0 and native.sync(force=True) == len(native.graph.weights)


def fused_step(net, draw):
    return optimizer_step(net, draw, "SGD", "fused")


@pytest.mark.parametrize("write", [flip, permute, one_element, fused_step])
def test_what_is_derived_from_weights_elsewhere(write):
    """The kernels of accelerate, and deepinv's denoiser, follow the same writes."""
    draw, x, level = random.Random(0), torch.rand(2, 1, 8, 8), torch.tensor([0, 2])
    for make in (accelerate, Denoiser):
        net = tiny_net(kind=NCSN)
        made = make(net)
        call = (lambda: made(x, level)) if make is accelerate else (lambda: made(x, torch.tensor([1.0, 0.1])))  # noqa: B023
        with torch.no_grad():
            before = call()
            for _ in range(12):
                write(net, draw)
            variance = torch.tensor([1.0, 0.01])[:, None, None, None]
            want = net(x, level) if make is accelerate else x + variance * net(x, level)
            assert error(call(), want) < 1e-4 < error(before, want)


def test_a_job_notices_a_fused_step(tmp_path):
    net = tiny_net()
    job = Job(Engine(net, 2, executor="native"), tmp_path / "job", 4, plan=PLAN, shard_size=2)
    optimizer_step(net, random.Random(0), "AdamW", "fused")
    with pytest.raises(Exception, match="weights are not those"):
        job.run()


def test_an_engine_leaves_no_hook_behind():
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_post_hooks)
    engine = Engine(tiny_net(), 2, executor="native")
    assert len(optimizer._global_optimizer_post_hooks) == before + 1
    del engine
    assert len(optimizer._global_optimizer_post_hooks) == before


@pytest.mark.parametrize("executor", ["native", "hybrid"])
def test_a_step_that_is_under_way_is_no_disagreement(executor, monkeypatch):
    """A fused optimizer writes before anything tells of it: the proof, where a request begins, sees that it did."""
    net, original = tiny_net(), Network.original
    engine, writes = Engine(net, 2, executor=executor), [lambda: net.end.weight.data.mul_(2.0)]

    def meanwhile(self, x, level):
        for write in writes:
            write()
        return original(self, x, level)

    monkeypatch.setattr(Network, "original", meanwhile)
    for _ in range(3):  # the first also asks whether it draws, two calls of one image
        engine.sample(2, plan=PLAN)
    writes.clear()
    assert error(engine.sample(2, plan=PLAN), fresh(net, executor, "float32").sample(2, plan=PLAN)) < 2e-4
