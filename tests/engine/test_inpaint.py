"""Inpainting as the engine does it: the law, what the network sees, executors, arguments. The op has its own file."""

import math
import signal

import numpy as np
import pytest
import torch

from sgm_engine.engine.engine import Engine
from sgm_engine.executors.eager import EagerExecutor
from sgm_engine.executors.graphs import GraphExecutor
from sgm_engine.executors.network import Network
from sgm_engine.executors.slots import Job, Slots, Tables
from sgm_engine.kernels import noise, ops
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import annealed_langevin, ddim
from sgm_engine.plans.samplers import dpm_solver_2m, heun, predictor_corrector, sde_dpm_solver_2m
from sgm_engine.plans.schedule import geometric
from tests.executors.test_executor import run
from tests.kernels.test_update import same_bits

SIGMAS = geometric(1, 0.1, 5)
SHAPE = (1, 4, 4)


def pairs(sigmas, rho=0.8):
    """The score of pairs (x₁, x₂) ~ N(0, [[1, ρ], [ρ, 1]]), as the two channels of a plane."""
    one = 1 + torch.tensor(np.array(sigmas)) ** 2
    p, q = ((v / (one**2 - rho**2)).float()[:, None, None, None] for v in (one, torch.full_like(one, rho)))
    return lambda x, level: q[level] * x.flip(1) - p[level] * x


def test_inpainting_a_gaussian():
    """Known x₁ = 1: the other is N(.8, .6²), of which NCSN's way makes .792 ± .01 and .613 ± .01 (L = 50, T = 100)."""
    sigmas, shape, rho = geometric(10, 0.01, 50), (2, 64, 64), 0.8
    plan = annealed_langevin(sigmas, 100, 2e-5, start="normal", start_scale=10.0, denoise=False)
    mean, variance, shared = 0.0, 100.0, 0.0  # of x₂; its covariance with the noise of the known one
    for i, (sigma, b, c) in enumerate(zip(plan.sigma, plan.b, plan.c, strict=True)):
        det = (1 + sigma**2) ** 2 - rho**2
        keep, pull = 1 - b * (1 + sigma**2) / det, b * rho / det
        shared = 0.0 if i % 100 == 0 else shared
        variance = keep**2 * variance + 2 * keep * pull * shared + (pull * sigma) ** 2 + c**2
        mean, shared = keep * mean + pull, keep * shared + pull * sigma**2
    assert abs(mean - 0.792) <= 0.01 and abs(variance**0.5 - 0.613) <= 0.01
    engine = Engine(pairs(sigmas), 2, sigmas=sigmas, shape=shape)
    x = engine.inpaint(torch.ones(shape), torch.tensor([True, False])[:, None, None], 2, plan=plan).double()
    n = x[:, 1].numel()
    assert (x[:, 0] == 1).all()
    assert abs(x[:, 1].mean() - mean) <= 4.9 * (variance / n) ** 0.5
    assert abs(x[:, 1].var() / variance - 1) <= 4.9 * (2 / n) ** 0.5


class Seen:
    """A model that keeps what it is asked."""

    def __init__(self):
        self.x = []

    def __call__(self, x, level):
        self.x.append(x.clone())
        return -x


@pytest.mark.parametrize("redraw", ["level", "step"])
def test_what_the_network_sees_of_known_pixels(redraw):
    """known + σ·z of the inpaint stream, drawn at the first row of a level or at every row; the rest is the state."""
    plan, model, ids, seed = annealed_langevin(SIGMAS, 3, 1e-3), Seen(), [0, 1, 2], 9
    known, where = torch.rand(3, *SHAPE), torch.rand(SHAPE) > 0.5
    x = Engine(model, 3, sigmas=SIGMAS, shape=SHAPE).inpaint(known, where, seed=seed, plan=plan, redraw=redraw)
    for row, seen in enumerate(model.x):
        draw = row + 1 if redraw == "step" else int(np.flatnonzero(plan.sigma == plan.sigma[row])[0]) + 1
        z = noise.fill((3, *SHAPE), np.full(3, seed), np.array(ids), draw, noise.STREAM["inpaint"], "normal")
        want = known + np.float32(plan.sigma[row]) * torch.from_numpy(z)
        assert torch.equal(seen[:, where], want[:, where]), row
    assert torch.equal(x[:, where], known[:, where]) and not torch.equal(x[:, ~where], known[:, ~where])


def soft(x, level):
    """A score that joins neighbouring pixels."""
    return -(x + 0.5 * x.roll(1, -1)) / (1 + torch.tensor(SIGMAS, dtype=torch.float32)[level] ** 2)[:, None, None, None]


def by_two_ops(model, known, where, seed, plan, redraw):
    """What Engine.inpaint draws, one op after the other: known pixels, network, update."""
    n = len(known)
    ids, seeds = torch.arange(n), torch.full((n,), seed)
    x, bad_row = torch.empty_like(known), torch.full((n,), ops.NO_BAD_ROW)
    ops.noise_fill_(x, seeds, ids, 0, 0, plan.start)
    x.mul_(plan.start_scale).add_(plan.start_shift)
    table = torch.from_numpy(np.stack([getattr(plan, name) for name in "abcdef"], 1)).float()
    draw, previous = torch.arange(1, plan.nfe + 1, dtype=torch.int32), torch.zeros_like(x)
    for row, sigma in enumerate(plan.sigma):
        first = row if redraw == "step" else int(np.flatnonzero(np.diff(plan.sigma[: row + 1], prepend=0))[-1])
        z = torch.empty_like(known)
        ops.noise_fill_(z, seeds, ids, first + 1, noise.STREAM["inpaint"], "normal")
        noisy = known + torch.tensor(sigma).float() * z
        x = torch.where(where, noisy, x)
        score = model(x, torch.full((n,), int(plan.level[row])))
        gain = 1 / score.square().mean((1, 2, 3)).sqrt() if plan.adaptive[row] else torch.ones(n)
        slots = (torch.full((n,), row), torch.full((n,), plan.nfe), seeds, ids, bad_row)
        coef, keep = table[:, :4].contiguous(), table[:, 4:].contiguous()
        ops.langevin_update_(x, score, coef, draw, *slots, previous, keep, gain)
    return torch.where(where, known, x)


PLANS = {
    "langevin": annealed_langevin(SIGMAS, 3, 1e-3),
    "not denoised": annealed_langevin(SIGMAS, 2, 1e-3, denoise=False),
    "ddim": ddim(SIGMAS),
    "heun": heun(SIGMAS),
    "dpm": dpm_solver_2m(SIGMAS),
    "sde-dpm": sde_dpm_solver_2m(SIGMAS),
    "adaptive": predictor_corrector(SIGMAS),
}


@pytest.mark.parametrize("redraw", ["level", "step"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_engine_draws_what_two_ops_drew(plan, redraw):
    known, where = torch.rand(3, 3, 8, 8), torch.rand(3, 1, 8, 8) > 0.5
    where[:, :, :3], where[:, :, -2:] = True, False
    engine = Engine(soft, 3, sigmas=SIGMAS, shape=(3, 8, 8))
    got = engine.inpaint(known, where, seed=4, plan=PLANS[plan], redraw=redraw)
    assert same_bits(got, by_two_ops(soft, known, where, 4, PLANS[plan], redraw))


@pytest.mark.parametrize("redraw", ["level", "step"])
def test_slots_at_their_own_rows_of_their_own_plans(redraw):
    """Slots that start and stop at different rows draw what each draws alone."""
    names = ("langevin", "dpm", "not denoised")
    known, where = torch.rand(8, *SHAPE), torch.rand(8, *SHAPE) > 0.5
    slots, tables, executor = Slots(3, SHAPE, torch.device("cpu")), Tables(torch.device("cpu")), EagerExecutor()
    executor.bind(Network(soft, "float32", torch.device("cpu")), slots, tables)
    for name in names:
        slots.prepare(PLANS[name])
    slots.inpaint(known.where(where, math.nan), redraw)
    plans = [PLANS[names[i % 3]] for i in range(8)]
    out, _ = run(slots, executor, iter([Job(i, 6, p, tables.add(p), i) for i, p in enumerate(plans)]))
    for i, plan in enumerate(plans):
        alone = Engine(soft, 1, sigmas=SIGMAS, shape=SHAPE)
        assert torch.equal(out[i], alone.inpaint(known[i], where[i], 1, 6, plan, first_id=i, redraw=redraw)[0]), i


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval()


@pytest.mark.parametrize("executor", ["native", "graph"])
def test_executors_inpaint_alike(net, executor):
    from tests.fake_graphs import FakeGraphs

    plan, known, where = annealed_langevin(SIGMAS, 2, 1e-3), torch.rand(1, 8, 8), torch.rand(1, 8, 8) > 0.5
    eager, other = (
        Engine(net, 4, executor="eager"),
        Engine(net, 4, executor="eager" if executor == "graph" else "native"),
    )
    if executor == "graph":
        other._bind(GraphExecutor(FakeGraphs()))
    before = other.sample(5, 1, plan)
    got, want = (e.inpaint(known, where, 5, 1, plan) for e in (other, eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[:, ~where], before[:, ~where])
    assert torch.equal(other.sample(5, 1, plan), before)  # nothing is left behind
    pieces = torch.cat([other.inpaint(known, where, k, 1, plan, first) for first, k in ((0, 2), (2, 3))])
    assert torch.equal(pieces, got)


class Counted:
    """The native network, and how often its steps were asked for."""

    def __init__(self, native):
        self.native, self.calls = native, []

    def run_steps(self, **arguments):
        self.calls.append(arguments["steps"])
        self.native.run_steps(**arguments)

    def __getattr__(self, name):
        return getattr(self.native, name)


def test_a_native_chain_is_one_call_and_a_watched_one_the_same_steps(net):
    plan, known, where = annealed_langevin(SIGMAS, 2, 1e-3), torch.rand(12, 1, 8, 8), torch.rand(1, 8, 8) > 0.5
    engine, infos = Engine(net, 12, executor="native"), []  # in two portions: no more than 8 images run together
    graph = engine._executor.network.graph
    counted = graph.native = Counted(graph.native)
    got = engine.inpaint(known, where, 12, 1, plan)
    assert counted.calls == [plan.nfe]
    seen = lambda info: infos.append((info.before.clone(), info.x.clone()))  # noqa: E731
    assert torch.equal(engine.inpaint(known, where, 12, 1, plan, callback=seen), got)
    assert counted.calls[1:] == [1] * plan.nfe == [1] * len(infos)
    for row, (before, after) in enumerate(infos):  # before is what the network saw, after what the next row's will
        first = int(np.argmax(plan.sigma == plan.sigma[row]))
        z = noise.fill((12, 1, 8, 8), np.full(12, 1), np.arange(12), first + 1, noise.STREAM["inpaint"])
        want = known + np.float32(plan.sigma[row]) * torch.from_numpy(z)
        assert torch.equal(before[:, where], want[:, where]), row
        assert torch.equal(after, infos[row + 1][0] if row + 1 < plan.nfe else got)


def test_an_interrupted_native_chain_leaves_the_engine_whole(net):
    def stop(*_):
        raise KeyboardInterrupt

    plan, known, where = annealed_langevin(SIGMAS, 2, 1e-3), torch.rand(1, 8, 8), torch.rand(1, 8, 8) > 0.5
    engine = Engine(net, 4, executor="native")
    want = engine.inpaint(known, where, 6, 1, plan)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.inpaint(known, where, 6, 1, annealed_langevin(SIGMAS, 10**4, 1e-9))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(engine.inpaint(known, where, 6, 1, plan), want)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"known": torch.rand(1, 8, 7)}, r"known must be floats \[n, 1, 8, 8\]"),
        ({"known": torch.ones(1, 8, 8, dtype=torch.int64)}, "known must be floats"),
        ({"known": torch.rand(2, 1, 8, 8), "n": 3}, "n is 3, but known holds 2 images"),
        ({"known": torch.full((1, 8, 8), torch.nan)}, "finite where mask is True"),
        ({"mask": torch.ones(8, 8)}, "mask must be bool"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, r"mask must broadcast to \[1, 1, 8, 8\]"),
        ({"redraw": "never"}, "redraw must be one of"),
    ],
)
def test_bad_inpainting(net, arguments, says):
    arguments = {"known": torch.rand(1, 8, 8), "mask": torch.ones(8, 8, dtype=torch.bool)} | arguments
    with pytest.raises(ValueError, match=says):
        Engine(net, 2, executor="eager").inpaint(**arguments)
