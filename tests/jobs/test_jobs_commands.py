"""What is done with a job: merge, verify, resample; its commands, arguments and card."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sgm_engine.cli import arguments
from sgm_engine.engine.engine import Engine
from sgm_engine.jobs.folder import Folder
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.identity import weights_digest
from sgm_engine.jobs.job import Job
from sgm_engine.jobs.merge import merge
from sgm_engine.jobs.resample import resample
from sgm_engine.jobs.spec import JobError
from sgm_engine.jobs.worker import Worker
from sgm_engine.outputs.sample_ids import SampleIds
from tests import faults
from tests.faults import toy_engine, toy_job, toy_plan
from tests.jobs.job_folders import (
    SHARD,
    N,
    flip,
    whole,  # noqa: F401 - fixtures
)


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
    (["--out", "s/", "--patience", "9"], ["--patience", "--ray"]),
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
        def poison(module, inputs, score):
            if len(score) == 4 and (inputs[1] == 1).all():  # rows 2 and 3, of the whole batch
                score[1] = float("nan")

        model = load(*args)
        model.register_forward_hook(poison)
        return model

    monkeypatch.setattr(checkpoint, "load_checkpoint", sick)
    sample = ["sample", "--checkpoint", tiny_weights, "--batch", 4, "--n", 4, "--out", "run/", "--executor", "eager"]
    for _ in range(2):  # the second finds it all there, and the record of what is not
        done = sgm(*sample, "--device", "cpu", "--quiet")
        assert done.returncode == 3
        assert "1 samples became non-finite and are left out: sample 1 at row 2" in done.stderr
    assert sorted(path.name for path in (tmp_path / "run").glob("*.png")) == [f"{i:06d}.png" for i in (0, 2, 3)]
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
