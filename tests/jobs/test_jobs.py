"""Jobs: the same bytes however drawn, nothing lost, nothing wrong unnoticed. Full counts: `python -m tests.faults`."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sgm_engine.cli import arguments
from sgm_engine.engine.engine import Engine
from sgm_engine.errors import EngineError, JobBusy
from sgm_engine.jobs.folder import Folder
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.identity import weights_digest
from sgm_engine.jobs.job import Job, generate
from sgm_engine.jobs.merge import merge
from sgm_engine.jobs.resample import resample
from sgm_engine.jobs.spec import JobError
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from sgm_engine.outputs.sample_ids import SampleIds
from sgm_engine.plans.plan import annealed_langevin
from tests import faults
from tests.faults import contents, toy_engine, toy_job, toy_plan

N, SHARD = 330, 100  # three shards and a short one


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete job."""
    out = tmp_path_factory.mktemp("jobs") / "whole"
    report = toy_job(out, N, SHARD).run()
    assert report.complete and (report.shards, report.samples, report.found) == (4, N, 0)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A complete job that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def wait(process):
    process.start()
    process.join(120)
    return process.exitcode


# ---- what a job draws


def test_every_format_holds_what_the_engine_draws(tmp_path):
    x = toy_engine().sample(70, seed=3, plan=toy_plan(), first_id=5)
    pixels = np.floor(x.clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255 + 0.5).astype(np.uint8)
    for name, form in FORMATS.items():
        job = toy_job(tmp_path / name, None, 32, format=name, ids="5-74", seed=3)
        assert job.run().complete
        found = [job.folder.read(job.spec, shard) for shard in range(3)]
        assert [i for record, _ in found for i in record.ids] == list(range(5, 75))
        samples = np.concatenate([samples for _, samples in found])
        assert np.array_equal(samples, x.numpy() if form.lossless else pixels), name
        assert verify(tmp_path / name).ok
    names = {form: sorted(contents(tmp_path / form)) for form in FORMATS}
    assert names["npz"] == ["README.md", *(f"manifest/00000{k}.json" for k in range(3)), "run.json"] + [
        f"shard-00000{k}.npz" for k in range(3)
    ]
    assert names["png"][:70] == [f"{i:06d}.png" for i in range(5, 75)]


def test_webdataset_reads_the_tar(tmp_path):
    wds = pytest.importorskip("webdataset", reason="pip install 'sgm-engine[test]'")
    toy_job(tmp_path / "tar", 40, 16, format="webdataset").run()
    toy_job(tmp_path / "npz", 40, 40).run()
    shards = [str(path) for path in sorted((tmp_path / "tar").glob("*.tar"))]
    found = list(wds.WebDataset(shards, shardshuffle=False).decode("l8"))
    with np.load(tmp_path / "npz" / "shard-000000.npz") as data:
        assert np.array_equal([item["png"] for item in found], data["arr_0"][..., 0])
    assert [item["json"]["sample_id"] for item in found] == list(range(40))


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_shares_make_the_same_bytes(whole, tmp_path, workers):
    reports = [toy_job(tmp_path / "job", N, SHARD).run(Worker(i, workers)) for i in reversed(range(workers))]
    assert contents(tmp_path / "job") == contents(whole)
    assert sum(report.samples for report in reports) == N
    assert [report.complete for report in reports] == [False] * (workers - 1) + [True]


def test_an_array_of_three_makes_the_same_bytes(whole, tmp_path, monkeypatch):
    for task in (4, 6, 8):
        for name, value in (("ID", task), ("COUNT", 3), ("MIN", 4), ("MAX", 8)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        report = toy_job(tmp_path / "job", N, SHARD).run()
        assert report.worker == Worker((task - 4) // 2, 3)
    assert report.complete and contents(tmp_path / "job") == contents(whole)


def test_torchrun_makes_the_same_bytes(tiny_weights, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "sgm_engine"]
    options = ["--checkpoint", str(tiny_weights), "--batch", "4", "--n", "50", "--shard-size", "8", "--device", "cpu"]
    command = [*torchrun, "sample", *options, "--out", "two/"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "worker 0 of 2" in done.stdout and "worker 1 of 2" in done.stdout
    from sgm_engine.cli.main import main

    assert main(["sample", *options, "--out", f"{tmp_path}/one/", "--quiet"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.png"))) == 50


def test_workers_follow_their_environment():
    of = lambda **env: Worker.from_environment({k: str(v) for k, v in env.items()})  # noqa: E731
    array = {f"SLURM_ARRAY_TASK_{k}": v for k, v in (("COUNT", 3), ("MIN", 1), ("MAX", 9), ("ID", 5))}
    assert of() == Worker(0, 1)
    assert of(RANK=1, WORLD_SIZE=4) == Worker(1, 4)
    assert of(RANK=1) == Worker(0, 1)
    assert of(**array) == Worker(1, 3)
    assert of(**array, RANK=1, WORLD_SIZE=2) == Worker(3, 6)
    assert Worker.parse("2/5") == Worker(2, 5)
    shares = [list(Worker(i, 3).share(8)) for i in range(3)]
    assert sorted(chain.from_iterable(shares)) == list(range(8))
    for bad in (array | {"SLURM_ARRAY_TASK_ID": 4}, array | {"SLURM_ARRAY_TASK_MAX": 8}, {"RANK": 4, "WORLD_SIZE": 4}):
        with pytest.raises(ValueError, match=r"worker|SLURM_ARRAY_TASK_ID"):
            of(**bad)
    for bad in ("5/5", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="worker"):
            Worker.parse(bad)


def test_ray_makes_the_same_bytes_when_an_actor_dies(whole, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")
    from sgm_engine.jobs.ray_pool import ray_job

    engine = {"batch": 64, "sigmas": faults.SIGMAS, "shape": (1, 4, 4), "executor": "eager"}
    options = {"format": "npz", "weights": "toy", "plan": toy_plan(), "shard_size": 10}
    toy_job(tmp_path / "one", N, 10).run()
    ray.cloudpickle.register_pickle_by_value(faults)  # actors cannot import from tests/
    try:
        with pytest.raises(ValueError, match=r"could not be made: .*executor must be one of"):
            ray_job(faults.toy_score, tmp_path / "no", N, actors=1, **engine | {"executor": "abacus"}, **options)
        job = ray_job(faults.toy_score, tmp_path / "two", N, actors=2, **engine, **options)
        victim = ray.get(job.source.actors[0].__ray_call__.remote(lambda self: os.getpid()))
        assert victim != os.getpid()
        killed = []

        def kill(progress):
            if progress.shards == 3:
                os.kill(victim, signal.SIGKILL)
                killed.append(progress.shards)

        with pytest.warns(UserWarning, match="another one draws it"):
            report = job.run(on_shard=kill)
    finally:
        ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(faults)
    assert report.complete and killed == [3]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ---- resuming


def test_a_resumed_job_draws_what_is_missing_only(copy, whole):
    (copy / "shard-000002.npz").unlink()
    report = toy_job(copy, N, SHARD).run()
    assert (report.found, report.shards, [p.kind for p in report.redrawn]) == (3, 1, ["missing"])
    assert toy_job(copy, N, SHARD).run().shards == 0
    assert contents(copy) == contents(whole)


def flip(path, place=-40):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def foreign_record(out):
    toy_job(out.parent / "other", N, SHARD, seed=1).run()
    for name in ("manifest/000001.json", "shard-000001.npz"):
        shutil.copy(out.parent / "other" / name, out / name)


DAMAGE = {
    "a flipped bit": (lambda out: flip(out / "shard-000001.npz"), "corrupt"),
    "a shorter file": (lambda out: os.truncate(out / "shard-000001.npz", 100), "corrupt"),
    "no file": (lambda out: (out / "shard-000001.npz").unlink(), "missing"),
    "no record": (lambda out: (out / "manifest/000001.json").unlink(), "missing"),
    "an empty record": (lambda out: (out / "manifest/000001.json").write_text(""), "corrupt"),
    "a record of nothing": (lambda out: (out / "manifest/000001.json").write_text("[]"), "corrupt"),
    "a flipped digest": (lambda out: flip(out / "manifest/000001.json", -60), "corrupt"),
    "another shard's file": (lambda out: shutil.copy(out / "shard-000002.npz", out / "shard-000001.npz"), "corrupt"),
    "another shard's record": (
        lambda out: shutil.copy(out / "manifest/000002.json", out / "manifest/000001.json"),
        "foreign",
    ),
    "another job's shard": (foreign_record, "foreign"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_mended(copy, whole, damage):
    harm, kind = DAMAGE[damage]
    harm(copy)
    found = verify(copy)
    assert [(p.shard, p.kind) for p in found.problems] == [(1, kind)] and not found.ok
    assert found.samples == N - SHARD and f"1 {kind}" in str(found)
    with pytest.raises(JobError, match=f"shard 1 is {kind}"):
        merge([copy], copy.parent / "all.npz")
    assert not list(copy.parent.glob("*all.npz*"))
    assert toy_job(copy, N, SHARD).run().shards == 1
    assert contents(copy) == contents(whole) and verify(copy).ok


def test_strange_files_are_named(copy):
    for name in ("shard-000004.npz", "notes.txt", "manifest/000004.json", "shard-1.npz"):
        (copy / name).write_text("")
    assert verify(copy).unexpected == ["manifest/000004.json", "notes.txt", "shard-000004.npz", "shard-1.npz"]


CHANGES = {
    "seed": {"seed": 1},
    "ids": {"n": N + 1},
    "format": {"format": "safetensors"},
    "shard_size": {"shard_size": SHARD + 1},
    "weights": {"weights": "other"},
    "plan": {"plan": annealed_langevin(faults.SIGMAS, steps_per_level=2, step_lr=1e-3)},
}


@pytest.mark.parametrize("what", [*CHANGES, "batch"])
def test_a_changed_job_is_refused_and_says_what_changed(whole, what):
    before = contents(whole)
    options = {"n": N, "shard_size": SHARD, "format": "npz", "weights": "toy", "plan": toy_plan()} | CHANGES.get(
        what, {}
    )
    with pytest.raises(JobError, match=f"holds another job: {what} was .* and is now .*[^,]") as error:
        Job(toy_engine(32 if what == "batch" else 64), whole, **options)
    assert str(error.value).count(" was ") == 1 and contents(whole) == before


def test_a_run_json_that_was_changed_is_refused(copy):
    text = (copy / "run.json").read_text()
    (copy / "run.json").write_text(text.replace('"seed": "0"', '"seed": "1"'))
    for use in (lambda: toy_job(copy, N, SHARD), lambda: verify(copy)):
        with pytest.raises(JobError, match="run hash does not fit"):
            use()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name, word in (("full", "not empty"), ("file", "is a file"), ("no/where", "there is no folder")):
        with pytest.raises(JobError, match=word):
            toy_job(tmp_path / name, 1)
    with pytest.raises(JobError, match="holds no job"):
        verify(tmp_path / "full")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


# ---- faults


def test_kills_cost_a_shard_at_the_most(tmp_path):
    faults.kills(tmp_path, 12, n=6_003, horizon=0.4)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a tmpfs takes root on Linux")
def test_a_disk_that_is_full(tmp_path):
    try:
        print(faults.full_disk(tmp_path, 4, n=300))
    except OSError as error:
        if "cannot mount" not in str(error):
            raise
        pytest.skip(str(error))


def test_every_call_that_can_find_a_full_disk(tmp_path, monkeypatch):
    """ENOSPC from each write, fsync, link and rename of a job in turn; of a write, half is on the disk by then."""
    run = lambda out: toy_job(out, 90, 30).run()  # noqa: E731
    run(tmp_path / "whole")
    whole, calls, fail_at = contents(tmp_path / "whole"), [], None

    def failing(real):
        def call(*args, **places):
            calls.append(real.__name__)
            if len(calls) - 1 == fail_at:
                if real.__name__ == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **places)

        return call

    for name in ("write", "fsync", "replace", "link"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    run(tmp_path / "counted")
    points = len(calls)
    assert points >= 3 * 8 and {"write", "fsync", "replace", "link"} == set(calls)
    for point in range(points):
        out, fail_at, calls[:] = tmp_path / f"job-{point}", point, []
        with pytest.raises(OSError, match="No space left"):
            run(out)
        assert not list(out.glob(".sgm/tmp/*")) and faults.torn(out, whole) == 0
        fail_at = None
        assert run(out).complete and contents(out) == whole
        shutil.rmtree(out)


def test_one_writer_wins_a_race(tiny_weights, tmp_path):
    counts = faults.racers(tmp_path, tiny_weights, rounds=2)
    assert counts == {"rounds": 2, "one winner": 2, "refused with code 4": 6}


def test_shares_that_overlap_are_refused(tmp_path):
    out, spec = tmp_path / "job", toy_job(tmp_path / "job", N, SHARD).spec
    writing = lambda *worker: Folder(out).writing(spec, Worker(*worker), {}, "")  # noqa: E731
    with writing(0, 2), writing(1, 2):
        for other in ((0, 2), (1, 2), (0, 1), (0, 3), (2, 3)):
            with pytest.raises(JobBusy), writing(*other):
                pass
    with writing(0, 1), pytest.raises(JobBusy, match="0-of-1 is writing"), writing(1, 2):
        pass
    with writing(1, 2):
        pass


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
        calls = []

        def sick(x, level, at=(sample // 4) * 7 + row, slot=sample % 4, calls=calls):
            score = faults.toy_score(x, level)
            if len(calls) == at:  # samples 0–3, then 4–7, then 8–11 fill the four slots
                score[slot, 0, 1, 2] = float("nan")
            calls.append(level)
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


def test_weights_that_change_while_a_job_draws_are_noticed(tmp_path):
    class Net(torch.nn.Module):
        sigmas, shape = faults.SIGMAS, (1, 4, 4)

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, level):
            return self.scale * faults.toy_score(x, level)

    net = Net()
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


# ---- writing beside sampling


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


# ---- merging, drawing again


def test_merging_is_what_one_file_would_have_been(tmp_path):
    from safetensors.numpy import save

    from sgm_engine.outputs.output import Output

    x = toy_engine().sample(N, plan=toy_plan())
    Output.parse(f"{tmp_path}/one.npz").write(x, range(N))
    for form in FORMATS:
        toy_job(tmp_path / form, N, SHARD, format=form).run()
        assert merge([tmp_path / form], tmp_path / "all.npz") == N
        assert (tmp_path / "all.npz").read_bytes() == (tmp_path / "one.npz").read_bytes(), form
    merge([tmp_path / "safetensors"], tmp_path / "all.safetensors")
    one = save({"samples": x.numpy(), "sample_id": np.arange(N)})
    assert (tmp_path / "all.safetensors").read_bytes() == one


def test_merging_jobs_of_one_run(whole, tmp_path):
    toy_job(tmp_path / "rest", None, 64, ids=range(N, N + 100)).run()
    merge([whole, tmp_path / "rest"], tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as data:
        assert data["sample_id"].tolist() == list(range(N + 100)) and len(data["arr_0"]) == N + 100
    toy_job(tmp_path / "other", None, 64, ids=[1000], seed=1).run()
    for wrong, word in ((whole, "overlap"), (tmp_path / "other", "seed was 0 and is now 1")):
        with pytest.raises(JobError, match=word):
            merge([whole, wrong], tmp_path / "no.npz")
    for name, word in (("no.safetensors", "8 bits a value"), ("no.png", "must end in"), ("a/b.npz", "no folder")):
        with pytest.raises((ValueError, OSError), match=word):
            merge([whole], tmp_path / name)
    assert not list(tmp_path.glob("*no.*"))


def test_one_sample_again_has_the_same_bytes(whole, tmp_path):
    x, compared = resample(toy_engine(), whole, 217, weights="toy")
    assert compared and np.array_equal(x, toy_engine().sample(N, plan=toy_plan())[217].numpy())
    toy_job(tmp_path / "job", N, SHARD).run(Worker(0, 2))
    assert resample(toy_engine(), tmp_path / "job", 150, weights="toy")[1] is False
    for engine, sample, weights, word in (
        (toy_engine(32), 1, "toy", "batch was 64 and is now 32"),
        (toy_engine(), 1, "other", "weights was toy and is now other"),
        (toy_engine(), N, "toy", "not among the ids"),
        (toy_engine(64, lambda x, level: -x), 1, "toy", "is not what"),
    ):
        with pytest.raises(JobError, match=word):
            resample(engine, whole, sample, weights)


# ---- arguments


def test_bad_arguments_are_named(tmp_path):
    base = {"n": 4, "plan": toy_plan(), "weights": "toy"}
    for change, word in (
        ({"n": -1}, "n must be"),
        ({"n": 2.0}, "n must be an integer"),
        ({"n": None}, "pass n"),
        ({"ids": "0-3"}, "pass n"),
        ({"n": None, "ids": "3-1"}, "ids: a range goes up"),
        ({"n": None, "ids": [1, 1]}, "ids: sample id 1 comes twice"),
        ({"n": None, "ids": [-1]}, "ids: sample ids"),
        ({"n": None, "ids": [2**56]}, "below 2"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"format": "jpg"}, "format must be one of png, npz, safetensors, webdataset"),
        ({"shard_size": 0}, "shard_size"),
        ({"plan": "ddim"}, "plan must be a Plan"),
        ({"weights": None}, "weights: a function"),
        ({"weights": ""}, "weights must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=word):
            Job(toy_engine(), tmp_path / "job", **base | change)
    with pytest.raises(TypeError, match="engine must be an Engine"):
        Job(faults.toy_score, tmp_path / "job", 4)
    two = Engine(faults.toy_score, batch=2, sigmas=faults.SIGMAS, shape=(2, 4, 4))
    with pytest.raises(ValueError, match="1 or 3 channels"):
        Job(two, tmp_path / "job", **base)
    assert not (tmp_path / "job").exists()


BAD = [
    (["--out", "s.png", "--format", "npz"], ["--format", "one file"]),
    (["--out", "s.npz", "--shard-size", "4"], ["--shard-size", "one file"]),
    (["--out", "s/", "--gif", "s.gif"], ["--gif"]),
    (["--out", "s/", "--worker", "4/4"], ["worker 4 of 4"]),
    (["--out", "s/", "--worker", "two"], ["'two'"]),
    (["--out", "s/", "--actors", "2"], ["--actors", "--ray"]),
    (["--out", "s/", "--format", "jpg"], ["--format", "'jpg'"]),
    (["--out", "s/", "--shard-size", "0"], ["--shard-size"]),
    (["--out", "no/where/"], ["no/where", "no folder"]),
]


@pytest.mark.parametrize("args, words", BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(args, words, sgm, tiny_weights, tmp_path):
    done = sgm("sample", "--checkpoint", tiny_weights, "--n", 4, *args)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert os.listdir(tmp_path) == []


def test_the_commands(sgm, tiny_weights, tmp_path):
    sample = ["sample", "--checkpoint", tiny_weights, "--batch", 4, "--seeds", "0-9,20", "--out", "run", "--format"]
    done = sgm(*sample, "safetensors", "--shard-size", 4)
    assert (done.returncode, done.stderr) == (0, "") and "3 of 3 shards" in done.stdout
    assert "0 samples in" in sgm(*sample, "safetensors", "--shard-size", 4).stdout
    assert sgm(*sample, "safetensors", "--shard-size", 4, "--quiet").stdout == ""
    done = sgm(*sample, "npz")
    assert done.returncode == 2 and "format was safetensors and is now npz" in done.stderr
    assert sgm("verify", "run").stdout.startswith("11 of 11 samples in 3 of 3 shards are good; 0 missing")
    assert sgm("merge", "run", "--out", "all.safetensors").stdout == "written: all.safetensors (11 samples)\n"
    done = sgm("resample", "run", "--id", 20)
    assert done.returncode == 0 and "equal to sample 20 of run" in done.stdout
    every, one = (load_file(tmp_path / name) for name in ("all.safetensors", "sample-20.safetensors"))
    assert one["samples"][0].tobytes() == every["samples"][10].tobytes()
    assert sgm("resample", "run", "--id", 12).returncode == 2
    flip(tmp_path / "run" / "shard-000001.safetensors")
    done = sgm("verify", "run")
    assert done.returncode == 5 and "shard 1 is corrupt: the sha256" in done.stdout and "draws again" in done.stderr
    assert sgm("merge", "run", "--out", "no.npz").returncode == 2
    done = sgm(*sample, "safetensors", "--shard-size", 4)
    assert done.returncode == 0 and "shard 1 is corrupt" in done.stderr and "drawn again" in done.stderr
    assert sgm("verify", "run").returncode == 0
    assert sgm("verify", "absent").returncode == 2
    with Folder(tmp_path / "run").writing(Folder(tmp_path / "run").load()[0], Worker(), {}, ""):
        done = sgm(*sample, "safetensors", "--shard-size", 4)
    assert done.returncode == 4 and done.stderr.count("\n") == 1


def test_a_plan_between_the_levels_is_drawn_again_too(sgm, tiny_weights, tmp_path):
    few = ["--sampler", "heun", "--nfe", 5]
    done = sgm("sample", "--checkpoint", tiny_weights, "--batch", 4, "--n", 3, *few, "--out", "run/")
    assert done.returncode == 0, done.stderr
    done = sgm("resample", "run", "--id", 2, "--out", "two.png")
    assert done.returncode == 0 and "equal to sample 2" in done.stdout, done.stderr
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "run" / "000002.png").read_bytes()


def test_a_diverged_job_ends_with_its_own_code(sgm, tiny_weights, monkeypatch, tmp_path):
    from sgm_engine.checkpoints import checkpoint

    load = checkpoint.load_checkpoint

    def sick(*args):
        model, calls = load(*args), []

        def poison(module, inputs, score):
            calls.append(score)
            if len(calls) == 3:
                score[1] = float("nan")

        model.register_forward_hook(poison)
        return model

    monkeypatch.setattr(checkpoint, "load_checkpoint", sick)
    sample = ["sample", "--checkpoint", tiny_weights, "--batch", 4, "--n", 6, "--out", "run/", "--executor", "eager"]
    for _ in range(2):  # the second finds it all there, and the record of what is not
        done = sgm(*sample, "--device", "cpu", "--quiet")
        assert done.returncode == 3
        assert "1 samples became non-finite and are left out: sample 1 at row 2" in done.stderr
    assert sorted(path.name for path in (tmp_path / "run").glob("*.png")) == [f"{i:06d}.png" for i in (0, 2, 3, 4, 5)]
    assert sgm("verify", "run").returncode == 0


def test_workers_never_share_one_file(sgm, tiny_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = sgm("sample", "--checkpoint", tiny_weights, "--n", 4, "--out", "s.npz")
    assert done.returncode == 2 and "2 workers would all write s.npz" in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_run_is_described(whole):
    run = json.loads((whole / "run.json").read_text())
    assert run["run"] == json.loads((whole / "manifest/000000.json").read_text())["run"]
    assert run["job"]["batch"] == 64 and run["job"]["executor"] == "eager" and run["job"]["engine"]
    card = (whole / "README.md").read_text()
    assert run["run"] in card and "330 samples" in card and "licence" in card


def test_weights_digests_tell_models_apart():
    one, same, other = (torch.nn.Linear(3, 3) for _ in range(3))
    same.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    assert weights_digest(one.bfloat16()) != weights_digest(same)


def test_sample_ids_are_ranges():
    ids = SampleIds.parse("2-3,6,0,100-199")
    assert [*ids[:5]] == [2, 3, 6, 0, 100] and len(ids) == 104 and str(ids) == "2-3,6,0,100-199"
    assert all(ids[i] == value and ids.index(value) == i for i, value in enumerate(ids))
    for low in range(0, 105, 3):
        for high in range(low, 105, 4):
            assert list(ids[low:high]) == list(ids)[low:high]
    assert SampleIds.parse(str(ids)) == ids == SampleIds.of(list(ids)) and SampleIds.of([]) == SampleIds.parse("")
    assert len(SampleIds.parse(f"0-{2**55}")) == 2**55 + 1
    assert SampleIds.of(range(7)) == SampleIds.of(iter(range(7)))
    for bad in ("5-2", "1,2,1", "0-5,3", "0-", "a", "-1", str(2**56)):
        with pytest.raises(ValueError):
            SampleIds.parse(bad)


def test_what_is_offered_is_what_there_is():
    assert tuple(FORMATS) == arguments.FORMATS
