"""What is typed and cannot be meant: one line that names the argument and the value, and what would do instead."""

import re

import numpy as np
import pytest

from sgm_engine.cli.arguments import Parser
from sgm_engine.cli.main import parser

S3 = "on object storage, and {} are read from a disk"
DRAW, EVAL, TUNE = ("sample", "--n", 2), ("eval", "x.npy", "--reference", "x.npy"), ("tune", "--reference", "x.npy")
BAD = [
    ((*DRAW, "--steps-per-level", 2, "--nfe", 4), "takes no steps_per_level (taken by annealed_langevin, consistent_"),
    ((*DRAW, "--tau", 1, "--sampler", "heun", "--nfe", 5), "the plan heun takes no tau (taken by sa_solver)"),
    ((*DRAW, "--eta", 0.5), "takes no eta (taken by consistent_annealed, ancestral, ddim)"),
    ((*DRAW, "--step-lr", "x"), "argument --step-lr: must be a number, got 'x'"),
    ((*DRAW, "--step-lr", "-1e-5"), "step_lr must be positive and finite, got -1e-05"),
    ((*DRAW, "--schedule", "linear"), "argument --schedule: needs --nfe"),
    ((*DRAW, "--emulate-float8"), "argument --emulate-float8: goes with --precision float8"),
    ((*DRAW, "--out", "job/", "--worker", "2"), "worker must be INDEX/COUNT, such as 0/4, got '2'"),
    ((*DRAW, "--out", "job/", "--worker", "3/2"), "worker 3 of 2: the index counts from 0"),
    ((*DRAW, "--checkpoint", "s3://b/x.pth"), f"argument --checkpoint: s3://b/x.pth is {S3.format('weights')}"),
    (("convert", "s3://b/x.pth", "y.safetensors"), f"s3://b/x.pth: is {S3.format('weights')}"),
    (("convert", "x", "y.safetensors", "--image-size", 0), "argument --image-size: must be at least 1, got 0"),
    (("eval", "--reference", "s3://b/x:test"), f"s3://b/x:test is {S3.format('images')}"),
    (("train", "--advise", "--data", "s3://b/x"), f"s3://b/x is {S3.format('images')}"),
    ((*EVAL, "--n", 5), "argument --n: says how samples are drawn, and x.npy holds them"),
    ((*EVAL, "--batch", 5), "argument --batch: says how samples are drawn"),
    ((*EVAL, "--device", "cpu"), "argument --device: says how samples are drawn"),
    ((*EVAL, "--checkpoint", "x.pth"), "argument --checkpoint: says how samples are drawn"),
    ((*EVAL, "--nll", "--weights", "cdm", "--nfe", 5), "argument --nfe: says how samples are drawn"),
    ((*EVAL, "--nll-tolerance", 0.1), "argument --nll-tolerance: goes with --nll"),
    ((*EVAL, "--training", "x.npy", "--copies", "x.jpg"), "argument --copies: must end in .png, got 'x.jpg'"),
    ((*TUNE, "--seconds", -1), "argument --seconds: must be a positive number, got '-1'"),
    ((*TUNE, "--budget", 5, "--families", "heun,"), "families must be of annealed_langevin"),
    (("plans", "x.pth", "--checkpoint", "y.pth"), "argument --checkpoint: x.pth and y.pth are two models"),
    (("plans", "--picture", "x.jpg"), "argument --picture: must end in .png, got 'x.jpg'"),
    (("plans", "--weights", "cdm", "--picture", "x.png"), "argument --picture: no front of plans came with these"),
    (("doctor", "--image-size", 3), "argument --image-size: goes with FILE"),
    (("doctor", "--no-ema", "--json"), "argument --ema: goes with FILE"),
    (("resample", "job", "--id", -1), "argument --id: must be at least 0"),
    (("resample", "job", "--id", "x"), "argument --id: must be an integer, got 'x'"),
]


@pytest.mark.parametrize("words, says", BAD, ids=[" ".join(map(str, words)) for words, _ in BAD])
def test_one_line(sgm, tmp_path, words, says):
    np.save(tmp_path / "x.npy", np.zeros((9, 28, 28, 1), np.uint8))
    done = sgm(*words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert says in done.stderr and done.stderr.startswith("sgm: ") and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_numbers_below_zero_in_every_notation(sgm, tmp_path):
    for low in ("-1", "-5e-1", "-.5", "-1.E+0"):
        args = parser().parse_args(["sample", "--data-range", low, "1e0"])
        assert args.data_range == [float(low), 1.0]


def test_a_model_without_a_front_says_so_in_json(sgm):
    done = sgm("plans", "--weights", "cdm", "--json")
    assert done.returncode == 0 and '"front": null' in done.stdout


def test_a_likelihood_among_the_metrics_has_its_model(sgm, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((9, 28, 28, 1), np.uint8))
    done = sgm(*EVAL, "--metrics", "nll", "--weights", "cdm", "--json", "r.json")
    assert done.returncode == 0 and re.search(r"bits per dimension +-?\d", done.stdout), done.stderr


def test_the_weights_are_told_as_they_are_whatever_the_plan_steps_through(sgm, tiny_weights):
    for out in ("x.npz", "job/"):
        done = sgm(*DRAW, "--checkpoint", tiny_weights, "--nfe", 5, "--batch", 2, "--out", out)
        assert "weights: NCSN, 1×8×8, ngf 4, 3 levels\n" in done.stdout, done.stderr


# -- help ------------------------------------------------------------------------------------------------------------


def actions(of, name="sgm"):
    for action in of._actions:
        for word, command in action.choices.items() if isinstance(action.choices, dict) else ():
            yield from actions(command, f"{name} {word}")
        if action.help:
            yield name, action


def test_each_default_that_help_names_is_the_one_taken():
    """A number that it names is the argument's own default, or that of the code where the argument is left open."""
    from sgm_engine.cli import eval as scores
    from sgm_engine.jobs import ray_pool, spec
    from sgm_engine.plans.samplers import sa_solver

    left_open = {"shard_size": spec.SHARD_SIZE, "patience": ray_pool.PATIENCE, "tau": sa_solver.__defaults__[0]}
    left_open |= {"nll_tolerance": scores.TOLERANCE}
    seen = 0
    for name, action in actions(parser()):
        found = re.search(r"\(default: ([\d.]+)\)", action.help)
        if found:
            default = action.default
            if default is None:
                default = scores.COUNT if (name, action.dest) == ("sgm eval", "n") else left_open.get(action.dest, 0)
            assert float(found[1]) == default, (name, action.dest)
            seen += 1
        elif isinstance(action.default, (int, float)) and not isinstance(action.default, bool):
            pytest.fail(f"{name} {action.option_strings}: help does not say the default {action.default}")
    assert seen > 15


def test_every_option_has_a_word_of_help():
    without = [a.option_strings or a.dest for p in each(parser()) for a in p._actions if not (a.help or a.metavar)]
    assert without == []


def each(of: Parser):
    yield of
    for action in of._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from each(command)
