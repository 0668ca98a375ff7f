"""What the command does for those who type: near words, completion, levels by hand, a plan's name in full."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.cli.main import parser
from sgm_engine.engine.engine import Engine
from sgm_engine.jobs.job import generate

pytestmark = pytest.mark.filterwarnings("ignore:more than 1% of these values")  # of random networks


@pytest.mark.parametrize(
    "words, near",
    [
        (("smaple",), "did you mean sample?"),
        (("sample", "--npe", 5), "did you mean --nfe?"),
        (("eval", "--reference", "x", "--metrisc=mmd"), "did you mean --metrics?"),
        (("sample", "--sampler", "huen"), "did you mean heun?"),
        (("sample", "--zzzzzz"), None),
    ],
)
def test_near_words(sgm, words, near):
    done = sgm(*words)
    assert done.returncode == 2 and (near or "unrecognized arguments: --zzzzzz (see") in done.stderr
    assert near or "did you mean" not in done.stderr


@pytest.mark.parametrize("option, words", [("--set", "train"), ("--against", "eval x.npz --reference y.npz")])
def test_an_option_said_twice_says_both(option, words):
    args = parser().parse_args([*words.split(), option, "a=1", option, "b=2", "c=3"])
    assert vars(args)[option[2:]] == ["a=1", "b=2", "c=3"]


def test_completion_is_a_script_of_the_shell():
    pytest.importorskip("shtab", reason="pip install 'sgm-engine[test]'")
    command = [sys.executable, "-m", "sgm_engine", "--print-completion"]
    done = subprocess.run([*command, "bash"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    script = done.stdout + "\ntype -t _shtab_sgm; echo ${_shtab_sgm_sample___sampler_choices[@]}\n"
    run = subprocess.run(["bash", "--norc"], input=script, capture_output=True, text=True)
    assert run.stdout.split()[0] == "function" and "heun" in run.stdout, run.stderr
    assert "must be one of bash" in subprocess.run([*command, "dos"], capture_output=True, text=True).stderr


def test_completion_without_shtab_says_what_it_needs(sgm, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install 'sgm-engine[completion]'" in sgm("--print-completion", "bash").stderr


def test_levels_by_hand(sgm, tmp_path, tiny_weights):
    """Of a file that says none; a job keeps them for what comes after."""
    torch.save([{f"module.{name}": value for name, value in load_file(tiny_weights).items()}, {}], tmp_path / "old.pth")
    words = ["--checkpoint", "old.pth", "--image-size", 8, "--sigmas", "1,0.3,0.1", "--steps-per-level", 1]
    draw = ["sample", *words, "--step-lr", 1e-3, "--batch", 2, "--n", 3]
    assert sgm(*draw, "--out", "run/", "--format", "npz").returncode == 0
    assert json.loads(json.loads((tmp_path / "run/run.json").read_text())["notes"]["load"])["sigmas"] == [1, 0.3, 0.1]
    assert "equal to sample 2" in sgm("resample", "run", "--id", 2, "--out", "two.npz").stdout
    model = load_checkpoint(tmp_path / "old.pth", sigmas=[1, 0.3, 0.1], image_size=8)
    assert len(model.sigmas) == 3
    done = sgm("convert", "old.pth", "new.safetensors", *words[2:6])
    assert done.returncode == 0 and "3 levels" in sgm("doctor", "old.pth", *words[2:6]).stdout, done.stderr
    assert load_checkpoint(tmp_path / "new.safetensors").sigmas.equal(model.sigmas)
    for command in (("doctor", "old.pth"), ("convert", "old.pth", "other.safetensors")):
        assert "on the command line --config, --sigmas" in sgm(*command, "--image-size", 8).stderr
    assert "must be numbers separated by commas" in sgm(*draw, "--sigmas", "1;2").stderr


def test_the_plan_line_has_evaluations_levels_and_schedule(sgm, tiny_weights):
    draw = ["sample", "--checkpoint", tiny_weights, "--batch", 2, "--n", 2, "--nfe", 5]
    for out in ("x.npz", "run/"):
        done = sgm(*draw, "--sampler", "heun", "--schedule", "linear", "--out", out)
        assert "schedule=linear), 5 evaluations, σ 1 → 0.1\n" in done.stdout, done.stdout + done.stderr
    done = sgm(*draw, "--sampler", "sa_solver", "--tau", 1.2345678901, "--out", "x.npz")
    assert "plan: sa_solver(tau=1.23457, schedule=karras), 5" in done.stdout


def test_a_sample_of_a_programs_job(sgm, tmp_path, tiny_weights):
    generate(Engine(load_checkpoint(tiny_weights), 2), tmp_path / "run", 3, format="npz")
    done = sgm("resample", "run", "--id", 1)
    assert done.returncode == 2 and "made by a program" in done.stderr and "pass --checkpoint" in done.stderr
    assert sgm("resample", "run", "--id", 1, "--checkpoint", tiny_weights, "--out", "one.npz").returncode == 0
    assert np.load(tmp_path / "one.npz")["sample_id"].tolist() == [1]


@pytest.mark.parametrize("form", ["npz", "safetensors", "png"])
def test_samples_on_standard_output_are_those_of_the_file(form, tmp_path, tiny_weights, capsysbinary, monkeypatch):
    from sgm_engine.cli.main import main

    monkeypatch.chdir(tmp_path)
    draw = ["sample", "--checkpoint", str(tiny_weights), "--batch", "2", "--n", "3"]
    assert main([*draw, "--out", f"x.{form}"]) == 0
    capsysbinary.readouterr()
    assert main([*draw, "--out", "-", *([] if form == "png" else ["--format", form])]) == 0
    told = capsysbinary.readouterr()
    assert told.out == (tmp_path / f"x.{form}").read_bytes()
    assert b"3 samples in " in told.err and told.err.endswith(b"written: standard output\n")
    assert main([*draw, "--out", "-", "--quiet"]) == 0 and capsysbinary.readouterr().err == b""


@pytest.mark.parametrize(
    "words, why",
    [
        (["--format", "webdataset"], "argument --format: webdataset is for a folder; --out - takes png"),
        (["--shard-size", 2], "argument --shard-size: is for a folder, and --out - is one stream"),
    ],
)
def test_what_a_stream_cannot_be(words, why, sgm, tiny_weights):
    done = sgm("sample", "--checkpoint", tiny_weights, "--n", 1, "--out", "-", *words)
    assert done.returncode == 2 and why in done.stderr and done.stdout == ""


def test_no_picture_goes_to_a_terminal(sgm, tiny_weights, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    done = sgm("sample", "--checkpoint", tiny_weights, "--n", 1, "--out", "-")
    assert done.returncode == 2 and "and that is a terminal: add > FILE or | PROGRAM" in done.stderr
