"""A job against the bare engine: what shards, digests, records and the writing thread cost.

The clock is the process's CPU time, in which a thread beside the sampling is not free: the stricter figure, and one
that holds on a busy machine. The wall time, with fsync and the overlap in it, is printed beside it.
"""

import itertools
import time

import pytest
import torch

from bench.common import about, paired_ratio
from sgm_engine import _C
from sgm_engine.engine import Engine
from sgm_engine.jobs.job import generate
from sgm_engine.jobs.verify import verify
from sgm_engine.models.ncsn import NCSN
from sgm_engine.plan import annealed_langevin

N, BATCH, SHARD = 32, 8, 16


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
def test_a_job_against_the_bare_engine(benchmark, engine, tmp_path, form):
    """11 evaluations a sample, a hundredth of what NCSN's own plan takes: nearly the worst case for a job."""
    plan = annealed_langevin(engine.sigmas, steps_per_level=1)
    number = itertools.count()

    def job():
        report = generate(engine, tmp_path / f"{next(number)}", N, plan=plan, format=form, shard_size=SHARD)
        assert report.complete and report.samples == N

    bare = lambda: engine.sample(N, plan=plan)  # noqa: E731
    wall = []
    for call in (bare, job, bare, job):
        start = time.perf_counter()
        call()
        wall.append(time.perf_counter() - start)
    assert verify(tmp_path / "0").ok
    ratio = paired_ratio(bare, job, pairs=6, clock=time.process_time)
    benchmark.pedantic(job, rounds=1)
    benchmark.extra_info |= about() | {"job's throughput over the engine's": str(ratio)}
    print(
        f"\n{form}: the job's throughput is {ratio} of the bare engine's in CPU time ({ratio.f_seconds:.2f} s of it), "
        f"{min(wall[::2]) / min(wall[1::2]):.2f} in wall time on this machine"
    )
    assert ratio.high >= 0.97, f"a job reaches {ratio} of the bare engine's throughput; at least 0.97 is promised"
