"""The engine end to end on the CPU: a step against PyTorch's, a short chain, start-up time, and exact counts.

Ratios are floors that a regression would break, not boasts: the README's table comes from ``--peers``.
"""

import subprocess
import sys
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.common import about, paired_ratio
from sgm_engine import _C
from sgm_engine.engine.engine import Engine
from sgm_engine.kernels import reference
from sgm_engine.models import blocks
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import annealed_langevin

BATCH = 8


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return NCSN(torch.logspace(0, -2, 10).tolist(), channels=1, ngf=32).eval()


def eager_loop(model, plan, x):
    """Annealed Langevin as it is usually written: the plain formulas, torch.randn_like, one batch."""
    for level, b, c in zip(plan.level.tolist(), plan.b.tolist(), plan.c.tolist(), strict=True):
        score = model(x, torch.full((len(x),), level))
        x = x + b * score + c * torch.randn_like(x)
    return x


def published_loop(model, plan, x):
    """The loop of the published sampler: each state is clamped and copied to the host before its step."""
    images = []
    for level, b, c in zip(plan.level.tolist(), plan.b.tolist(), plan.c.tolist(), strict=True):
        images.append(torch.clamp(x, 0.0, 1.0).to("cpu"))
        score = model(x, torch.ones(len(x), dtype=torch.int64) * level)
        x = x + b * score + c * torch.randn_like(x)
    return images


@pytest.fixture
def plain_norm(monkeypatch):
    """The networks' norms as plain PyTorch formulas: what a user has without the engine."""
    monkeypatch.setattr(blocks.ops, "noise_conditioned_norm", reference.noise_conditioned_norm)


@pytest.mark.quick
def test_chain_against_eager(benchmark, model, plain_norm):
    """A short chain of the engine against the eager loop, both on the machine's threads."""
    plan = annealed_langevin(model.sigmas, steps_per_level=1, denoise=False)
    engine = Engine(model, batch=BATCH)
    assert engine.executor == "native"
    x0 = torch.rand(BATCH, *model.shape)
    with torch.no_grad():
        ours = engine._network(x0, torch.zeros(BATCH, dtype=torch.int64))
        torch.testing.assert_close(ours, model(x0, torch.zeros(BATCH, dtype=torch.int64)), rtol=1e-4, atol=1e-4)

        def chain():
            return engine.sample(BATCH, plan=plan)

        ratio = paired_ratio(lambda: eager_loop(model, plan, x0), chain, pairs=5)
        published = paired_ratio(lambda: published_loop(model, plan, x0), chain, pairs=3)
    benchmark.pedantic(chain, rounds=3)
    benchmark.extra_info |= about() | {
        "eager": str(ratio),
        "published loop": str(published),
        "NFE/s": round(BATCH * plan.nfe / ratio.g_seconds, 1),
        "samples/s of this plan": round(BATCH / ratio.g_seconds, 2),
    }
    print(f"\nchain of {plan.nfe} steps, ngf 32, 28×28, B = {BATCH}: {ratio} eager, {published} the published loop")
    assert ratio.high > 2.0, f"the engine is {ratio} times the eager loop; it was at least twice as fast"


@pytest.mark.quick
def test_long_chain_of_a_small_network(benchmark, plain_norm):
    """8×8 and ngf 32, where almost all of an eager step is overhead: 1,000 steps of one sample, one thread."""
    torch.manual_seed(0)
    model = NCSN(torch.logspace(0, -2, 10).tolist(), channels=1, ngf=32, image_size=8).eval()
    threads = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1), _C.set_num_threads(1)
    try:
        engine = Engine(model, batch=1)
        plan, part = (annealed_langevin(model.sigmas, steps_per_level=steps, denoise=False) for steps in (100, 2))
        with torch.no_grad():
            x0 = torch.rand(1, *model.shape)
            calls = (lambda: eager_loop(model, part, x0)), (lambda: engine.sample(1, plan=plan))
            eager = paired_ratio(*calls, pairs=3, clock=time.process_time)
        ratio = eager.median * plan.nfe / part.nfe  # 20 steps of the loop stand for 1,000
        benchmark.pedantic(lambda: engine.sample(1, plan=plan), rounds=1)
    finally:
        torch.set_num_threads(threads[0]), _C.set_num_threads(threads[1])
    benchmark.extra_info |= about() | {"eager": round(ratio, 1), "NFE/s": round(plan.nfe / eager.g_seconds, 1)}
    print(f"\n1,000 steps, ngf 32, 8×8, one sample: {ratio:.1f} eager, {plan.nfe / eager.g_seconds:.0f} NFE/s")
    assert ratio > 12, f"{ratio:.1f} times the eager loop; it was over 15"


class Counter(TorchDispatchMode):
    """Counts aten calls and what would make a GPU wait."""

    def __init__(self):
        super().__init__()
        self.calls, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.waits += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.quick
@pytest.mark.parametrize(("executor", "most"), [("native", 0), ("eager", 300)])
def test_counts_per_step(model, executor, most):
    """aten calls a step (a difference, so that set-up cancels), and none that waits for the device.

    Every 16 steps the engine looks at the weights, one call a tensor: counted by itself, in a chain of 40.
    """
    engine = Engine(model, batch=2, executor=executor)
    counts = []
    for steps in (2, 3, 8):
        plan = annealed_langevin(model.sigmas[:5], steps_per_level=steps, denoise=False)
        engine.sample(2, plan=plan)
        with Counter() as counter:
            engine.sample(2, plan=plan)
        counts.append(counter)
    per_step = (counts[1].calls - counts[0].calls) / 5
    looks = (counts[2].calls - counts[1].calls - 25 * per_step) / 2
    print(f"\n{executor}: {per_step:.1f} aten calls a step, {looks:.0f} a look")
    assert 0 <= per_step <= most
    assert looks <= 1.1 * sum(1 for _ in (*model.parameters(), *model.buffers()))
    assert counts[1].waits == counts[0].waits, "a step reads back to the host"


@pytest.mark.quick
@pytest.mark.parametrize("executor", ["native", "eager"])
def test_memory_is_flat(model, executor):
    """Resident memory over 300 steps after the first 30: no growth beyond 5% (the allocator's own rounding)."""
    resource = pytest.importorskip("resource", reason="Unix only")
    engine = Engine(model, batch=2, executor=executor)
    plan = annealed_langevin(model.sigmas, steps_per_level=3, denoise=False)
    engine.sample(2, plan=plan)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        engine.sample(2, plan=plan)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after <= 1.05 * before, f"peak resident memory grew from {before} to {after} KiB"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("what", "code", "most"),
    [
        ("help", "import sys; sys.argv = ['sgm', '--help']\nfrom sgm_engine.cli.main import main\nmain()", 0.5),
        ("import", "import sgm_engine", 0.5),
        (
            "first sample",
            "import sgm_engine as s; m, p = s.load_bundled(); s.Engine(m, batch=1).sample(1, plan=p)",
            None,
        ),
    ],
    ids=["help", "import", "first_sample"],
)
def test_start_up(benchmark, what, code, most):
    """CPU seconds from an empty process, over those of an interpreter that imports torch; ``most`` is of that."""

    def cpu_seconds(program: str) -> float:
        before = _children()
        subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False)
        return _children() - before

    benchmark.pedantic(lambda: cpu_seconds(code), rounds=3)
    share = min(cpu_seconds(code) for _ in range(3)) / min(cpu_seconds("import torch") for _ in range(3))
    benchmark.extra_info |= about() | {"of importing torch": round(share, 2)}
    print(f"\n{what}: {share:.2f} of the time that importing torch takes")
    if most is not None:
        assert share < most, f"{what} takes {share:.2f} of an import of torch: something heavy is imported at the top"


def _children() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
