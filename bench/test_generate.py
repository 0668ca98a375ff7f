"""A job against the bare engine: what shards, digests, records and the writing thread cost.

The job's own work is timed alone, on samples that were drawn before, and set against the engine's time: two threads
side by side slow each other down by more than the whole job costs wherever they share a core. That the engine takes no
more steps in a job is counted. The clock is the process's CPU time, in which a thread beside the sampling is not free.
"""

import itertools
import time

import pytest
import torch

from bench.common import about, paired_ratio
from sgm_engine import _C
from sgm_engine.engine.engine import Engine
from sgm_engine.jobs.job import generate
from sgm_engine.jobs.verify import verify
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plans.plan import annealed_langevin

# A shard is no multiple of the batch: drawing them one by one would take more steps. To know its model costs a job a
# fixed time: 64 samples reach 0.976 in PNG, 32 reach 0.967.
N, BATCH, SHARD = 64, 8, 12


@pytest.fixture(scope="module")
def engine():
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1)
    _C.set_num_threads(1)
    torch.manual_seed(0)
    yield Engine(NCSN(torch.logspace(0, -2, 10).tolist(), channels=1, ngf=32, image_size=28).eval(), batch=BATCH)
    torch.set_num_threads(before[0])
    _C.set_num_threads(before[1])


@pytest.mark.quick
@pytest.mark.parametrize("form", ["npz", "png"])
def test_a_job_against_the_bare_engine(benchmark, monkeypatch, engine, tmp_path, form):
    """11 evaluations a sample, a hundredth of what NCSN's own plan takes: nearly the worst case for a job."""
    plan = annealed_langevin(engine.sigmas, steps_per_level=1)
    number, stream, steps = itertools.count(), engine.stream, []

    def job():
        report = generate(engine, tmp_path / f"{next(number)}", N, plan=plan, format=form, shard_size=SHARD)
        assert report.complete and report.samples == N

    bare = lambda: engine.sample(N, plan=plan)  # noqa: E731
    engine.sample(N, plan=plan, callback=steps.append)
    alone = len(steps)
    monkeypatch.setattr(engine, "stream", lambda *args, **kw: stream(*args, **kw, callback=steps.append))
    job()
    assert len(steps) == 2 * alone, f"a job takes {len(steps) - alone} steps, the engine {alone}"

    drawn = dict(stream(range(N), plan=plan))
    monkeypatch.setattr(engine, "stream", lambda ids, *args, **kw: ((i, drawn[i]) for i in ids))
    job()
    assert verify(tmp_path / "1").ok
    assert all((tmp_path / "0" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "1").glob(f"*.{form}"))
    cost = paired_ratio(job, bare, pairs=10, clock=time.process_time)
    monkeypatch.undo()
    benchmark.pedantic(job, rounds=1)
    reached = [1 / (1 + share) for share in (cost.high, cost.median, cost.low)]
    text = "{1:.3f} [{0:.3f}, {2:.3f}]".format(*reached)
    benchmark.extra_info |= about() | {"job's throughput over the engine's": text}
    print(f"\n{form}: the job reaches {text} of the bare engine's throughput ({cost.g_seconds:.2f} s of CPU time)")
    assert reached[2] >= 0.97, f"a job reaches {text} of the bare engine's throughput; at least 0.97 is promised"
