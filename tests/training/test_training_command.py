"""``sgm train``: resume, processes, interrupts, bad input, the configs that come with the package."""

import csv
import os
import re
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

pl = pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")
from safetensors.torch import load_file  # noqa: E402

from sgm_engine.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from sgm_engine.cli.console import Terminated  # noqa: E402
from sgm_engine.training import objectives  # noqa: E402
from sgm_engine.training.callbacks import SampleGrid  # noqa: E402
from sgm_engine.training.module import ScoreModule  # noqa: E402
from tests.training.runs import (  # noqa: E402
    IMAGES,
    PLAN,
    data,  # noqa: F401 - fixtures
    fit,
)


def losses(folder):
    """{step: loss} of metrics.csv; a step that was done twice, before a kill and after it, must agree with itself."""
    rows = {}
    for step, loss, _ in csv.reader((folder / "metrics.csv").read_text().splitlines()):
        assert rows.setdefault(int(step), loss) == loss
    return rows


def train_command(*arguments):
    return [sys.executable, "-m", "sgm_engine", "train", "--config", "tiny.yaml", "--data", "images.npy", *arguments]


KILLED = """
import os, signal, sys
from sgm_engine.cli.main import main
from sgm_engine.training import run

append = run.append_line

def append_line(path, line):
    append(path, line)
    if line.startswith("13,"):
        os.kill(os.getpid(), signal.SIGKILL)

run.append_line = append_line
main(sys.argv[1:])
"""


def test_command_and_resume_after_a_kill(sgm, data):
    """SIGKILL in the middle, the same command again: the same curve to the last digit, and the same weights.

    ``python -m tests.training.kills`` does it at random moments.
    """
    changes = ("--accelerator", "cpu", "--set", "steps=40", "weights=float16")
    arguments = ("--config", "tiny.yaml", "--data", "images.npy", *changes)
    straight = sgm("train", *arguments, "--out", "straight")
    assert straight.returncode == 0, straight.stderr
    lines = straight.stdout.splitlines()
    assert re.fullmatch(r"step +1/40  loss [\d.]+  [\d.]+ s/step  \d\d:\d\d:\d\d left", lines[0]), lines
    assert re.search(r"step +40/40  loss [\d.]+  [\d.]+ s/step  00:00:00 left", straight.stdout)
    command = [sys.executable, "-c", KILLED, "train", *arguments, "--out", "killed"]
    killed = subprocess.run(
        command, cwd=data, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (data / "killed" / "model.safetensors").exists()
    again = sgm("train", *arguments, "--out", "killed")
    assert again.returncode == 0 and "resumed at step 10" in again.stdout
    assert losses(data / "killed") == losses(data / "straight")
    weights = [(data / name / "model.safetensors").read_bytes() for name in ("killed", "straight")]
    assert weights[0] == weights[1]
    assert {t.dtype for t in load_file(data / "killed" / "model.safetensors").values()} == {torch.float16}
    drawn = sgm("sample", "--checkpoint", "killed/model.safetensors", "--n", 4, "--out", "x.png")
    assert drawn.returncode == 0, drawn.stderr


def test_two_processes_take_the_step_of_one(sgm, data):
    """torchrun with two processes on the same global batch: the same losses up to the rounding of a sum."""
    arguments = ("--set", "steps=4", "save_every=0", "sample_every=2", "--accelerator", "cpu")
    one = sgm("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "one", *arguments)
    assert one.returncode == 0, one.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, *train_command("--out", "two", *arguments)[1:]]
    done = subprocess.run(command, cwd=data, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ({step: float(v) for step, v in losses(data / name).items()} for name in ("one", "two"))
    assert list(two) == [1, 2, 3, 4]
    assert two == pytest.approx(one, rel=1e-5)
    assert (data / "two" / "samples" / "00000004.png").exists()


def test_validation_is_of_the_average(sgm, data):
    """val_loss at the last step is the objective of the weights that are written, on test.npy, with fixed noise."""
    (data / "set").mkdir()
    np.save(data / "set" / "train.npy", IMAGES[:32])
    np.save(data / "set" / "test.npy", IMAGES[32:])
    arguments = ("--config", "tiny.yaml", "--data", "set", "--out", "run", "--accelerator", "cpu", "--tensorboard")
    every = ("validate_every=3", "sample_every=3", "save_every=6")
    objective = ("objective=sliced", "objective_options={projections: 2}")
    done = sgm("train", *arguments, "--set", "steps=6", *every, *objective)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((data / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()))
    logged = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    network = load_checkpoint(data / "run" / "model.safetensors")
    module = ScoreModule(network, partial(objectives.sliced, projections=2))
    seen = []
    module.log = lambda name, value, **_: seen.append(value.item())
    for i in (0, 1):
        module.validation_step(torch.from_numpy(IMAGES[32 + 4 * i : 36 + 4 * i].copy()), i)
    assert len(logged) == 2 and logged[-1] == pytest.approx(sum(seen) / 2, rel=1e-5)
    assert list((data / "run").glob("tensorboard/*/events*"))


def test_a_finished_run_stays_as_it_is(sgm, data):
    """The command once more writes the average again, not the last weights; a changed run is refused."""
    arguments = ("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run", "--accelerator", "cpu")
    assert sgm(*arguments, "--set", "steps=5", "sample_every=0").returncode == 0
    first = (data / "run" / "model.safetensors").read_bytes()
    assert sgm(*arguments, "--set", "steps=5", "sample_every=0").returncode == 0
    assert (data / "run" / "model.safetensors").read_bytes() == first
    other = sgm(*arguments, "--set", "steps=5", "ngf=8")
    assert other.returncode == 2 and "run holds a run with ngf=4, not 8: name another folder" in other.stderr
    np.save(data / "images.npy", IMAGES[::-1])
    other = sgm(*arguments, "--set", "steps=5")
    assert other.returncode == 2 and "run on other data" in other.stderr


def test_a_loss_that_is_not_finite_stops_the_run(sgm, data):
    done = sgm("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run", "--accelerator", "cpu",
        "--set", "steps=40", "lr=1e30", "sample_every=0", "save_every=0")  # fmt: skip
    assert done.returncode == 1 and "the loss is " in done.stderr and "lower lr" in done.stderr
    assert not (data / "run" / "model.safetensors").exists()

    assert not (data / "s3:").exists()


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_control_c(sgm, data, monkeypatch, error, code):
    def interrupted(*_):
        raise error

    monkeypatch.setattr("sgm_engine.training.run.Report.on_train_batch_end", interrupted)
    assert sgm("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run").returncode == code


def test_a_grid_of_diverged_samples_is_a_warning(tmp_path):
    """A network that answers NaN costs the picture, not the training."""

    class Spoil(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            pl_module.network.end_conv.bias.data.fill_(torch.nan)

    with pytest.warns(UserWarning, match="step 1: 2 of 2 samples diverged"):
        fit(tmp_path, 1, [Spoil(), SampleGrid(every=1, n=2, plan=PLAN)])
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (("--data", "nowhere"), "nowhere: there is no such file or folder"),
        (("--config", "nothing"), "no such file, and none of cdm_cifar10, "),
        (("--set", "lr=fast"), "lr must be a number, got 'fast'"),
        (("--set", "learning_rate=1"), "unknown learning_rate; there are: "),
        (("--set", "levels=0"), "levels must be between 1 and 100000, got 0"),
        (("--set", "lr=: :"), "--set lr: ': :' is no YAML value"),
        (("--out", "tiny.yaml"), "--out tiny.yaml: is a file"),
        (("--out", "."), "--out .: holds something else than a run"),
        pytest.param(
            ("--accelerator", "gpu"),
            "--accelerator: there is no GPU",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
        ),
        (("--set", "batch"), "--set takes NAME=VALUE, got 'batch'"),
        (("--set", "objective=explicit"), "objective must be one of denoising"),
        (("--set", "precision=int8"), "precision must be one of float32"),
        (("--set", "validate_every=5"), "needs held-out data"),
        (("--set", "plan={name: nonesuch}"), "plan must be one of"),
        (("--init", "tiny.yaml"), "tiny.yaml"),
    ],
)
def test_bad_input_is_one_line(sgm, data, change, words):
    arguments = {"--config": "tiny.yaml", "--data": "images.npy", "--out": "run"} | {change[0]: change[1]}
    done = sgm("train", *(word for pair in arguments.items() for word in pair))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_without_lightning(sgm, data, monkeypatch):
    monkeypatch.delitem(sys.modules, "sgm_engine.training.run", raising=False)
    monkeypatch.delattr("sgm_engine.training.run", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    done = sgm("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run")
    assert done.returncode == 2 and "pip install 'sgm-engine[train]'" in done.stderr


def test_bundled_configs(sgm):
    from sgm_engine.training.config import TrainConfig, config_names

    listed = sgm("train", "--list")
    assert listed.returncode == 0
    for name in config_names():
        config = TrainConfig.read(name)
        assert name in listed.stdout and config.lr > 0
        few = {"CDM": ("ancestral", "ddim"), "UNet2D": ("sde_dpm_solver_2m",), "SongUNet": ("heun",)}
        few |= {"NCSN": ("annealed_langevin", "sde_dpm_solver_2m")} if config.objective == "multi_sample" else {}
        side = config.image_size or 32
        assert config.model(3, side).plan["name"] in few.get(config.architecture, ("annealed_langevin",))
    assert TrainConfig.read("ncsnv2_cifar10").plan["step_lr"] == 6.2e-6  # YAML reads 6.2e-6 as text, 2e-5 too


def test_examples_of_the_configs_are_what_was_published():
    """Against checkpoint.PUBLISHED, which the loader of published weights goes by."""
    from sgm_engine.checkpoints.checkpoint import PUBLISHED
    from sgm_engine.training.config import TrainConfig

    for name, channels in (("ncsn_mnist", 1), ("ncsn_cifar10", 3), ("ncsnv2_cifar10", 3), ("ncsnv2_celeba", 3)):
        config = TrainConfig.read(name)
        published = PUBLISHED[config.architecture, config.levels, channels]
        assert config.sigma_begin == published.sigma_begin and config.sigma_end == 0.01
        assert {"denoise": True} | dict(config.plan) == {"name": "annealed_langevin"} | published.plan
