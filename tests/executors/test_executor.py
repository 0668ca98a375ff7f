"""Executors: eager and native, slots, tables and the network. Graphs have a file of their own."""

import copy

import pytest
import torch
from torch import nn

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.choice import make_executor
from sgm_engine.executors.eager import EagerExecutor
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Job, Slots, Tables
from sgm_engine.plans.plan import annealed_langevin, consistent_annealed
from tests.executors.graph_engines import PLAN, SHAPE, SIGMAS, eager_engine
from tests.recorder import Recorder

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["net", "gaussian"])
def test_a_step_reads_nothing_back(net, model):
    """Every operation of an eager step, recorded: none of them reads device memory to the host."""
    sigma2 = torch.tensor(SIGMAS, dtype=torch.float32) ** 2
    call = net if model == "net" else lambda x, level: -x / sigma2[level][:, None, None, None]
    engine = eager_engine(call, sigmas=SIGMAS, shape=SHAPE)
    engine.sample(1, plan=PLAN)
    with Recorder() as recorder, torch.no_grad():
        engine._executor.step()
    names = [str(call[0]) for call in recorder.calls]
    assert names[0].startswith("aten.index_select") and names[-1].startswith("sgm_engine.langevin_update_")


def test_a_model_is_asked_about_states_of_its_levels():
    """One that divides its input by σ sees numbers of order 1, not the rounding of a constant."""
    sigmas, seen = torch.tensor([150.0, 1.0]), []

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("sigmas", sigmas)

        def forward(self, x, level):
            seen.append((x.detach().abs().amax((1, 2, 3)) / self.sigmas[level]).tolist())
            return -x / self.sigmas[level][:, None, None, None] ** 2

    for _ in range(2):
        Engine(Scaled(), 2, shape=SHAPE, executor="eager").sample(1, plan=annealed_langevin([150.0, 1.0]))
    assert seen[:2] == [[pytest.approx(1.5, rel=0.2)], [pytest.approx(1.5, rel=0.2)] * 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_be_had_is_refused(net):
    with pytest.raises(ValueError, match="executor='graph' needs a CUDA device, got cpu"):
        Engine(net, executor="graph")
    with pytest.raises(ValueError, match=r"device='cuda' needs .* use device='cpu'"):
        Engine(net, device="cuda")
    with pytest.raises(ValueError, match=r"executor must be one of .* got 'fast'"):
        make_executor("fast", Network(net, "float32", CPU), 1)
    with pytest.raises(ValueError, match=r"executor='native' cannot run this model: function .* use executor='eager'"):
        Engine(lambda x, level: x, sigmas=SIGMAS, shape=SHAPE, executor="native")


# -- native ------------------------------------------------------------------------------------------------------------


def _replace(net):
    net.end_conv.weight = nn.Parameter(net.end_conv.weight.detach() * 2)


def _move(net):
    net.end_conv.weight.data = net.end_conv.weight.data * 2


def _move_norm(net):
    net.normalizer.embed.weight.data = net.normalizer.embed.weight.data * 2


def test_native_is_the_choice_of_auto_where_it_can_run(net):
    assert Engine(net, 4).executor == "native"
    assert Engine(lambda x, level: x, 4, sigmas=SIGMAS, shape=SHAPE).executor == "eager"


def test_native_draws_what_eager_draws(net):
    native = Engine(net, 4, executor="native")
    infos = []
    got = native.sample(6, 1, PLAN, callback=lambda info: infos.append(info.denoised.clone()))
    torch.testing.assert_close(got, eager_engine(net).sample(6, 1, PLAN), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(infos[-1], got[4:], rtol=1e-4, atol=1e-4)
    assert torch.equal(got, native.sample(6, 1, PLAN))  # many steps a call, the same bits


@pytest.mark.parametrize(
    "change", [_replace, _move, _move_norm, lambda net: net.end_conv.weight.data.copy_(torch.ones(1, 4, 3, 3))]
)
def test_native_sees_every_change_of_the_weights(net, change):
    native = Engine(net, 4, executor="native")
    before = native.sample(4, 1, PLAN)
    change(net)
    after = native.sample(4, 1, PLAN)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, eager_engine(net).sample(4, 1, PLAN), rtol=1e-4, atol=1e-4)


def test_direct_is_float32_without_winograd(net):
    """It draws what the native executor's direct convolutions compute, and no other executor says that it does."""
    engine = Engine(net, 4, precision="direct")
    algorithms = {engine._executor.network.graph.native.algorithm(i) for i in engine._executor.network.graph.convs}
    assert engine.executor == "native" and algorithms == {"direct float32"}
    got = engine.sample(6, 1, PLAN)
    torch.testing.assert_close(got, eager_engine(net).sample(6, 1, PLAN), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs executor='native', not 'eager'; use precision='float32'"):
        Engine(net, 4, precision="direct", executor="eager")
    with pytest.raises(ValueError, match=r"needs executor='native', which cannot run this model: function .*"):
        Engine(lambda x, level: x, sigmas=SIGMAS, shape=SHAPE, precision="direct")


# -- slots and tables --------------------------------------------------------------------------------------------------


def run(slots, executor, jobs):
    """Drain ``jobs`` through slots → {sample id: x}, and the steps taken."""
    out, steps = {}, 0
    slots.refill(jobs)
    while slots.live:
        k = slots.steps_to_harvest()
        executor.run(k)
        slots.advance(k)
        steps += k
        assert slots.row.tolist() == [
            job.rows.start + done if job else row
            for job, done, row in zip(slots.jobs, slots.done, slots.row.tolist(), strict=True)
        ]
        done, x, _ = slots.harvest()
        out.update((job.sample_id, sample) for job, sample in zip(done, x, strict=True))
        slots.refill(jobs)
    return out, steps


def test_plans_of_different_lengths_share_a_batch():
    """Samples at different rows of different plans in one network call: each equals its run alone."""
    sigma2 = torch.tensor(SIGMAS, dtype=torch.float32) ** 2

    def model(x, level):
        return -x / sigma2[level][:, None, None, None]

    plans = [PLAN, consistent_annealed(SIGMAS, 2, start_shift=0.5), annealed_langevin(SIGMAS, 5, step_lr=1e-3)]
    slots, tables, executor = Slots(3, SHAPE, CPU), Tables(CPU), EagerExecutor()
    executor.bind(Network(model, "float32", CPU), slots, tables)
    rows = [tables.add(plan) for plan in plans]
    jobs = [Job(i, 5 + i % 2, plans[i % 3], rows[i % 3]) for i in range(10)]
    out, steps = run(slots, executor, iter(jobs))
    assert sorted(out) == list(range(10))
    assert steps < sum(job.plan.nfe for job in jobs) / 3 + max(plan.nfe for plan in plans)
    for job in jobs:
        alone = Engine(model, 1, sigmas=SIGMAS, shape=SHAPE).sample(1, job.seed, job.plan, first_id=job.sample_id)
        assert torch.equal(out[job.sample_id], alone[0])


def test_draws_restart_with_each_plan():
    tables = Tables(CPU)
    first, second = tables.add(PLAN), tables.add(consistent_annealed(SIGMAS))
    assert tables.add(PLAN) == first and second.start == first.stop
    for rows in (first, second):
        assert tables.draw[rows.start : rows.stop].tolist() == list(range(1, len(rows) + 1))


def test_a_full_table_starts_over_and_grows():
    tables = Tables(CPU, capacity=8)
    other = consistent_annealed(SIGMAS, 2)
    assert tables.add(PLAN) == range(7) and tables.add(other) == range(6) and tables.capacity == 8
    assert tables.level[:6].tolist() == other.level.tolist()
    long = annealed_langevin(SIGMAS, 5, step_lr=1e-3)
    assert tables.add(long) == range(16) and tables.capacity == 16 and len(tables.level) == 17


def test_a_slot_that_ends_on_the_last_row_of_the_table(net):
    """Its row is one past the table; the look-up of its level must still be valid."""
    slots, tables, executor = Slots(2, SHAPE, CPU), Tables(CPU, capacity=PLAN.nfe), EagerExecutor()
    executor.bind(Network(net, "float32", CPU), slots, tables)
    jobs = iter([Job(i, 0, PLAN, tables.add(PLAN)) for i in range(3)])
    out, steps = run(slots, executor, jobs)
    assert len(out) == 3 and steps == 2 * PLAN.nfe


# -- the network -------------------------------------------------------------------------------------------------------


def test_bfloat16_casts_convolution_weights_alone(net):
    before = copy.deepcopy(net.state_dict())
    network = Network(net, "bfloat16", CPU)
    network.sync()
    cast = {id(p): buffer for p, buffer in network._casts}
    for name, p in net.named_parameters():
        assert (id(p) in cast) == ("embed" not in name), name
        if id(p) in cast:
            assert cast[id(p)].dtype == torch.bfloat16 and torch.equal(cast[id(p)], p.bfloat16()), name
    assert network.forward_module is net and len(cast) > 20
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in net.state_dict().items())


def test_bfloat16_is_near_float32(net):
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0, 1, 2])
    network = Network(net, "bfloat16", CPU)
    network.sync()
    with torch.no_grad():
        exact, score = net(x, level), network(x, level)
    error = (score - exact).norm() / exact.norm()
    assert 1e-5 < error < 5e-2


@pytest.mark.parametrize("executor, precision", [("eager", "float32"), ("eager", "bfloat16"), ("native", "float32")])
def test_a_running_request_follows_the_weights(net, executor, precision):
    engine = Engine(net, 4, executor=executor, precision=precision)
    seen = []

    def callback(info):
        seen.append(engine._executor.score.abs().max().item())
        if info.step == 2:
            with torch.no_grad():
                net.end_conv.weight.zero_()
                net.end_conv.bias.zero_()

    engine.sample(4, plan=PLAN, callback=callback)
    assert all(value > 0 for value in seen[:2]) and not any(seen[2:])


@pytest.mark.parametrize("executor", ["eager", "native"])
def test_unchanged_weights_are_looked_at_once_a_request(net, executor, monkeypatch):
    engine = Engine(net, 2, executor=executor)
    calls, sync = [], engine._executor.sync_weights
    monkeypatch.setattr(engine._executor, "sync_weights", lambda: (calls.append(1), sync()))
    engine.sample(6, plan=PLAN)
    assert engine.stats.steps > 2 and len(calls) == 1


def test_sync_weights_within_a_request(net):
    engine = eager_engine(net, precision="bfloat16")
    seen = []

    def callback(info):
        if info.step == 2:
            net.end_conv.weight.data.zero_()  # a write that no version tells of
            net.end_conv.bias.data.zero_()
        if info.step == 4:
            engine.sync_weights()
        seen.append(engine._executor.score.abs().max().item())

    engine.sample(4, plan=PLAN, callback=callback)
    assert all(value > 0 for value in seen[:4]) and not any(seen[4:])


@pytest.mark.parametrize(
    "model, says",
    [
        (lambda x, level: x[:, :, 1:], r"score of x's shape \(4, 1, 8, 8\), got \(4, 1, 7, 8\)"),
        (lambda x, level: x.double(), "got torch.float64"),
        (lambda x, level: None, "got NoneType"),
        (lambda x, level: x.to("meta"), "got torch.float32 on meta"),
    ],
)
def test_a_wrong_score_is_named(model, says):
    with pytest.raises(ValueError, match=says):
        Engine(model, 4, sigmas=SIGMAS, shape=SHAPE).sample(1, plan=PLAN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "view"])
def test_scores_of_any_dtype_and_layout(dtype, layout):
    def model(x, level):
        score = (-x).to(dtype)
        if layout == "nhwc":
            return score.contiguous(memory_format=torch.channels_last)
        return score if layout == "nchw" else torch.stack([score, score], -1)[..., 0]

    def plain(x, level):
        return (-x).to(dtype).float()

    got, want = (Engine(m, 3, sigmas=SIGMAS, shape=(3, 4, 5)).sample(3, plan=PLAN) for m in (model, plain))
    assert torch.equal(got, want)


def test_training_mode_is_refused_where_it_matters(net):
    net.train()
    eager_engine(net).sample(1, plan=PLAN)
    net.add_module("drop", nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"training mode .* model.eval\(\)"):
        eager_engine(net).sample(1, plan=PLAN)
    net.eval()
    eager_engine(net).sample(1, plan=PLAN)


def test_precision_is_checked(net):
    with pytest.raises(ValueError, match=r"precision must be one of .* got 'float64'"):
        Engine(net, precision="float64")
    with pytest.raises(ValueError, match=r"needs an nn.Module"):
        Engine(lambda x, level: x, sigmas=SIGMAS, shape=SHAPE, precision="bfloat16")
