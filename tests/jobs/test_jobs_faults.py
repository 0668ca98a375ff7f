"""Jobs under faults: signals, divergence, weights that change, memory, progress."""

import os
import signal
import threading
from itertools import count

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sgm_engine.engine.engine import Engine
from sgm_engine.errors import EngineError
from sgm_engine.jobs.folder import Folder
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.job import Job, generate
from sgm_engine.jobs.spec import JobError
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from sgm_engine.plans.plan import annealed_langevin
from tests import faults
from tests.faults import toy_engine, toy_job, toy_plan
from tests.jobs.job_folders import SHARD, N, copy, whole  # noqa: F401 - fixtures


def wait(process):
    process.start()
    process.join(120)
    return process.exitcode


def test_leftovers_of_a_killed_writer_go(tmp_path):
    job = toy_job(tmp_path / "job", N, SHARD)
    job.run(Worker(0, 2))
    leftovers = [tmp_path / "job/.sgm/tmp" / f"{worker}.1.1" for worker in ("0-of-2", "1-of-2", "0-of-1")]
    for leftover in leftovers:
        leftover.write_text("half")
    job.run(Worker(1, 2))
    assert [leftover.exists() for leftover in leftovers] == [True, False, False]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_stops_soon_and_the_job_goes_on(tiny_weights, tmp_path, number, code):
    out, log = tmp_path / "job", tmp_path / "log"
    process = faults.server().Process(target=faults.endless, args=(tiny_weights, out, log))
    process.start()
    while not (out / "manifest" / "000001.json").exists() and process.is_alive():
        process.join(0.01)
    os.kill(process.pid, number)
    process.join(60)
    if process.is_alive():
        process.kill()
    assert process.exitcode == code
    assert "the same command goes on from here" in log.read_text()
    found = verify(out)
    assert found.good >= 2 and {p.kind for p in found.problems} == {"missing"}
    assert not found.unexpected and not list(out.glob(".sgm/tmp/*"))


def test_stop_ends_within_a_few_steps_and_keeps_what_is_done(tmp_path):
    steps = []

    def slow(x, level):
        steps.append(level)
        return faults.toy_score(x, level)

    plan = annealed_langevin(faults.SIGMAS, steps_per_level=40, step_lr=1e-4)  # 121 steps
    engine = toy_engine(8, slow)
    job = Job(engine, tmp_path / "job", 800, plan=plan, weights="toy", format="npz", shard_size=8)
    at = []

    def stop(progress):
        if progress.shards == 3:
            job.stop()
            at.append(len(steps))

    report = job.run(on_shard=stop)
    assert report.stopped and not report.complete and 3 <= report.shards <= 4
    assert len(steps) - at[0] <= 16
    assert job.run().complete and verify(tmp_path / "job").ok


def test_a_diverged_sample_is_recorded_and_never_written(tmp_path):
    """A NaN in one sample at one row, 30 times: that sample is quarantined, every other one has its usual bytes."""
    plan = annealed_langevin(faults.SIGMAS, steps_per_level=2, step_lr=1e-3)  # 7 rows
    options = {"plan": plan, "weights": "toy", "format": "safetensors", "shard_size": 4}
    generate(toy_engine(4), tmp_path / "well", 12, **options)
    well = [load_file(tmp_path / "well" / f"shard-00000{k}.safetensors") for k in range(3)]
    for sample, row in [(i % 12, i % 7) for i in range(30)]:
        calls = count()

        def sick(x, level, at=(sample // 4) * 7 + row, slot=sample % 4, calls=calls):
            score = faults.toy_score(x, level)
            if len(x) == 4 and next(calls) == at:  # not of the one or two images that an engine asks about first
                score[slot, 0, 1, 2] = float("nan")  # samples 0–3, then 4–7, then 8–11 fill the four slots
            return score

        out = tmp_path / f"{sample}-{row}"
        report = generate(toy_engine(4, sick), out, 12, **options)
        assert [(d.sample_id, d.row) for d in report.diverged] == [(sample, row)] and report.complete
        found = verify(out)
        assert found.ok and found.samples == report.samples == 11 and found.diverged == report.diverged
        for k, usual in enumerate(well):
            kept, keep = load_file(out / f"shard-00000{k}.safetensors"), usual["sample_id"] != sample
            assert all(np.array_equal(kept[name], usual[name][keep]) for name in ("samples", "sample_id"))
    again = generate(toy_engine(4), out, 12, **options)
    assert again.shards == 0 and again.diverged == report.diverged


def test_a_shard_may_be_all_diverged(tmp_path):
    sick = lambda x, level: torch.full_like(x, float("nan"))  # noqa: E731
    for form in FORMATS:
        report = generate(
            toy_engine(4, sick), tmp_path / form, 6, plan=toy_plan(), weights="t", format=form, shard_size=4
        )
        assert len(report.diverged) == 6 and report.complete and report.samples == 0
        assert verify(tmp_path / form).ok


class Scaled(torch.nn.Module):
    """The toy's score times a weight."""

    sigmas, shape = faults.SIGMAS, (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, level):
        return self.scale * faults.toy_score(x, level)


def test_weights_that_change_while_a_job_draws_are_noticed(tmp_path):
    net = Scaled()
    job = Job(Engine(net, batch=8, executor="eager"), tmp_path / "job", 400, shard_size=8, plan=toy_plan())

    def train(progress):
        if progress.shards == 2:
            with torch.no_grad():
                net.scale.mul_(0.5)

    with pytest.raises(EngineError, match="weights changed"):
        job.run(on_shard=train)
    with pytest.raises(JobError, match="weights was"):
        Job(Engine(net, batch=8, executor="eager"), tmp_path / "job", 400, shard_size=8, plan=toy_plan())
    with pytest.raises(JobError, match="weights are not those"):
        job.run()
    with torch.no_grad():
        net.scale.fill_(1.0)
    assert job.run().complete


def test_a_shard_whose_last_sample_diverged_is_no_less_checked(tmp_path, monkeypatch):
    engine = Engine(Scaled(), batch=8, executor="eager")
    job, stream = Job(engine, tmp_path / "job", 8, shard_size=8, plan=toy_plan()), engine.stream

    def changed(*args, **options):
        engine.model.scale.data.fill_(torch.nan)
        return stream(*args, **options)

    monkeypatch.setattr(engine, "stream", changed)
    with pytest.raises(EngineError, match="weights changed"):
        job.run()


def test_the_next_shard_is_drawn_while_one_is_written(tmp_path, monkeypatch):
    """The write of shard 0 waits until the model has been called for shard 1: it never would be if writing blocked."""
    calls, more = [], threading.Event()

    def model(x, level):
        calls.append(level)
        if len(calls) > 25 * 4 // 2 + 8:  # well into the second half of the batches of shards 0 and 1
            more.set()
        return faults.toy_score(x, level)

    publish = Folder.publish

    def slow(self, spec, shard, *args):
        assert more.wait(60), "nothing was drawn while shard 0 was being written"
        publish(self, spec, shard, *args)

    monkeypatch.setattr(Folder, "publish", slow)
    options = {"plan": toy_plan(), "weights": "toy", "format": "npz", "shard_size": 100}
    assert generate(toy_engine(8, model), tmp_path / "job", 200, **options).complete


def test_a_shard_is_on_the_disk_before_the_next_is_complete(tmp_path, monkeypatch):
    """What a kill can cost: never are there two finished shards that are not written."""
    job, unwritten, most = toy_job(tmp_path / "job", 4_000, 200), set(), []
    draw, publish = job.source.draw, job.folder.publish

    def drawn(*args):
        for shard in draw(*args):
            unwritten.add(shard.shard)
            most.append(len(unwritten))
            yield shard

    def written(spec, shard, *args):
        threading.Event().wait(0.01)  # a slow disk
        publish(spec, shard, *args)
        unwritten.discard(shard)

    monkeypatch.setattr(job.source, "draw", drawn)
    monkeypatch.setattr(job.folder, "publish", written)
    assert job.run().complete and len(most) == 20 and max(most) == 1


def test_memory_does_not_grow_with_n(tmp_path):
    context, peaks = faults.server(), []
    for n in (1_000, 16_000):
        ours, theirs = context.Pipe()
        assert wait(context.Process(target=faults.peak_memory, args=(tmp_path / str(n), n, theirs))) == 0
        peaks.append(ours.recv())
    assert peaks[1] <= 1.02 * peaks[0], f"peak resident memory in KiB: {peaks}"


def test_progress_counts_samples_and_shards(copy):
    for name in ("shard-000001.npz", "shard-000003.npz"):
        (copy / name).unlink()
    seen = []
    toy_job(copy, N, SHARD).run(on_shard=seen.append)
    assert [(p.shards, p.shards_in_all, p.samples_in_all) for p in seen] == [(3, 4, N), (4, 4, N)]
    assert seen[-1].samples == N and seen[-1].seconds_left == 0 and seen[0].rate > 0
    assert "330 of 330 samples, 4 of 4 shards" in str(seen[-1])
