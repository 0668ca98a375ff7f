"""Plans that travel with weights, from the command: ``sgm plans``, ``sgm doctor``, ``--nfe``, ``--quality``, jobs."""

import json
import shutil

import numpy as np
import pytest

from sgm_engine.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from sgm_engine.jobs.folder import Folder
from tests.checkpoints.test_notes import FRONT, LAW

SMALL = ("--n", 3, "--batch", 2)


@pytest.fixture
def weights(tiny_weights, tmp_path):
    model = load_checkpoint(tiny_weights)
    model.law, model.front = LAW, FRONT
    save_checkpoint(model, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_plans_and_doctor_print_the_front(sgm, weights, tiny_weights, tmp_path):
    for command in ("plans", "doctor"):
        done = sgm(command, weights)
        assert done.returncode == 0 and FRONT.table() in done.stdout and "start: from the data's law" in done.stdout
        done = sgm(command, tiny_weights)
        assert "no front of plans came with these weights" in done.stdout and "assumed: no law" in done.stdout
    assert len(json.loads(sgm("plans", weights, "--json").stdout)["front"]["points"]) == 3
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    assert sgm("plans", weights, "--picture", "f.png").returncode == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    done = sgm("plans", tiny_weights, "--picture", "g.png")
    assert done.returncode == 2 and "--picture" in done.stderr and not (tmp_path / "g.png").exists()


@pytest.mark.parametrize(
    "given, nfe, name",
    [
        ((), 3, "sde_dpm_solver_2m"),
        (("--nfe", 4), 3, "sde_dpm_solver_2m"),
        (("--nfe", 5), 5, "dpm_solver_2m"),
        (("--quality", "draft"), 2, "ddim"),
        (("--quality", "best"), 5, "dpm_solver_2m"),
        (("--nfe", 5, "--conditioning", "nearest"), 5, "dpm_solver_2m"),
        (("--plan", "annealed_langevin"), 7, "annealed_langevin"),
        (("--steps-per-level", 1), 4, "annealed_langevin"),
        (("--sampler", "ddim", "--nfe", 4), 4, "ddim"),
    ],
)
def test_what_sgm_sample_takes(sgm, weights, given, nfe, name):
    done = sgm("sample", "--checkpoint", weights, *given, *SMALL, "--out", "x.npz")
    assert done.returncode == 0, done.stderr
    assert f"{nfe} NFE a sample" in done.stdout and f"plan: {name}(" in done.stdout and "path" not in done.stdout
    around = "a mean of each pixel" if name != "annealed_langevin" else "0 + 1·U[0, 1)"
    assert f"start: {around}" in done.stdout and "assumed" not in done.stdout


def test_a_file_without_them_says_what_it_assumes(sgm, tiny_weights):
    done = sgm("sample", "--checkpoint", tiny_weights, "--nfe", 4, *SMALL, "--out", "x.npz")
    assert "start: 0 + 1·N(0, 1), assumed: no law of the data came with the weights" in done.stdout
    assert "dpm_solver_2m" in done.stdout and "4 NFE" in done.stdout


@pytest.mark.parametrize(
    "given, says",
    [
        (("--quality", "fine"), "--quality"),
        (("--quality", "good", "--nfe", 4), "--quality: good and --nfe exclude each other"),
        (("--quality", "good", "--eta", 0.5), "--quality: good and --eta exclude each other"),
        (("--quality", "good", "--plan", "ddim"), "--plan: ddim and --quality exclude each other"),
    ],
)
def test_what_does_not_go_together(sgm, weights, given, says):
    done = sgm("sample", "--checkpoint", weights, *given, *SMALL, "--out", "x.npz")
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", [(), ("--nfe", 4), ("--sampler", "heun", "--nfe", 5), ("--plan", "ddim")])
def test_a_job_goes_on_with_the_plan_that_it_was_begun_with(sgm, weights, tiny_weights, tmp_path, given):
    """Begun with weights that had no notes: the same command goes on, and its samples are the same bytes."""
    shutil.copy(weights, tmp_path / "noted.safetensors")
    shutil.copy(tiny_weights, weights)
    job = ("sample", "--checkpoint", weights, *given, "--batch", 2, "--format", "npz", "--shard-size", 2, "--n", 4)
    assert sgm(*job, "--out", "job/").returncode == sgm(*job, "--out", "whole/").returncode == 0
    before = Folder(tmp_path / "job").load()[0].plan
    (tmp_path / "job/shard-000001.npz").unlink()
    shutil.copy(tmp_path / "noted.safetensors", weights)
    done = sgm(*job, "--out", "job/")
    assert done.returncode == 0, done.stderr
    assert "found: 1 shards" in done.stdout and Folder(tmp_path / "job").load()[0].plan == before
    for name in ("shard-000000.npz", "shard-000001.npz"):
        assert (tmp_path / "job" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sgm(*job, "--out", "new/").returncode == 0
    assert Folder(tmp_path / "new").load()[0].plan != before
    done = sgm(*job[:3], "--sampler", "euler", "--nfe", 6, *job[-8:], "--out", "job/")
    assert done.returncode == 2 and "job holds another job:" in done.stderr and "plan was" in done.stderr


def test_a_job_of_the_rule_as_it_was_goes_on(sgm, tiny_weights, tmp_path):
    """--nfe 9 alone meant DPM-Solver++(2M)."""
    job = ("sample", "--checkpoint", tiny_weights, *SMALL, "--out", "job/")
    assert sgm(*job, "--sampler", "dpm_solver_2m", "--nfe", 9).returncode == 0
    done = sgm(*job, "--nfe", 9)
    assert done.returncode == 0 and "found: 1 shards" in done.stdout and "dpm_solver_2m" in done.stdout, done.stderr
    assert sgm(*job[:-1], "new/", "--nfe", 9).stdout.count("sde_dpm_solver_2m") == 1


def test_a_plan_file_is_what_it_says_in_a_job_too(sgm, weights, tmp_path):
    """It is complete, its start too: another start is another job."""
    from sgm_engine.plans.samplers import sde_dpm_solver_2m

    sigmas = np.float64([1.0, 0.3, 0.1])
    for name, shift in (("a", 0.5), ("b", 0.6)):
        (tmp_path / f"{name}.json").write_text(sde_dpm_solver_2m(sigmas, start_shift=shift).to_json())
    job = ("sample", "--checkpoint", weights, *SMALL, "--out", "job/")
    assert sgm(*job, "--plan", "a.json").returncode == 0
    assert sgm(*job, "--plan", "a.json").returncode == 0
    done = sgm(*job, "--plan", "b.json")
    assert done.returncode == 2 and "job holds another job:" in done.stderr and "plan was" in done.stderr


def test_eval_measures_what_sample_draws(sgm, weights, tmp_path):
    np.save(tmp_path / "reference.npy", np.random.default_rng(1).integers(0, 256, (30, 8, 8), dtype=np.uint8))
    common = ("--checkpoint", weights, "--reference", "reference.npy", "--n", 8, "--batch", 4, "--metrics", "sliced")
    for given, nfe in (((), 3), (("--nfe", 5), 5), (("--quality", "draft"), 2)):
        done = sgm("eval", *common, *given)
        assert done.returncode == 0 and f"{nfe} NFE" in done.stdout, done.stderr
    done = sgm("eval", *common, "--nfe", 5, "--plan", "ddim")
    assert done.returncode == 2 and "--plan: ddim and --nfe exclude each other" in done.stderr
