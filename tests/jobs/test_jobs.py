"""Jobs: the same bytes however drawn, nothing lost, nothing wrong unnoticed. Full counts: `python -m tests.faults`."""

import os
import signal
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest

from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from tests import faults
from tests.faults import contents, toy_engine, toy_job, toy_plan
from tests.jobs.job_folders import SHARD, N, copy, whole  # noqa: F401 - fixtures


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
    assert of(JOB_COMPLETION_INDEX=2, JOB_COMPLETIONS=5) == Worker(2, 5)
    assert of(JOB_COMPLETION_INDEX=2, JOB_COMPLETIONS=5, RANK=1, WORLD_SIZE=2) == Worker(5, 10)
    with pytest.raises(ValueError, match=r"JOB_COMPLETIONS must be an integer, got None; or pass --worker INDEX/COUNT"):
        of(JOB_COMPLETION_INDEX=2)
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
        killed = []

        def kill(progress):
            if progress.shards == 3:
                killed.append(next(m.pid for m in job.source.crew.members if m.queue))
                os.kill(killed[0], signal.SIGKILL)

        with pytest.warns(UserWarning, match="another actor draws it"):
            report = job.run(on_shard=kill)
    finally:
        ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(faults)
    assert report.complete and len(killed) == 1 and killed[0] != os.getpid()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_resumed_job_draws_what_is_missing_only(copy, whole):
    (copy / "shard-000002.npz").unlink()
    report = toy_job(copy, N, SHARD).run()
    assert (report.found, report.shards, [p.kind for p in report.redrawn]) == (3, 1, ["missing"])
    assert toy_job(copy, N, SHARD).run().shards == 0
    assert contents(copy) == contents(whole)
