"""``sgm sample --precision float8``: where the scales come from, emulated on a CPU."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from sgm_engine.checkpoints.checkpoint import load_checkpoint
from sgm_engine.engine.engine import Engine
from sgm_engine.rewriting.float8.config import Float8Config
from sgm_engine.tuning import float8_calibration as calibration
from sgm_engine.tuning.float8_calibration import calibrate_float8
from tests.cli.test_cli import fails

EMULATED = ("--precision", "float8", "--emulate-float8")


@pytest.fixture(scope="module")
def weights(random_weights):
    """An NCSN wide enough for float8: 32 and 64 channels, 4×4 pixels."""
    return random_weights(ngf=32, image_size=4, steps_per_level=1)


@pytest.fixture
def draw(sgm, weights, monkeypatch):
    """Runs ``sgm sample`` on that network, calibrated by three evaluations."""
    monkeypatch.setattr(calibration, "EVALUATIONS", 3)
    where = ("sample", "--checkpoint", weights, "--batch", 2, "--executor", "eager", "--device", "cpu")
    return lambda *args: sgm(*where, *args)


def test_scales_are_taken_once_written_and_read(draw, weights, tmp_path):
    first = draw(*EMULATED, "--n", 2, "--float8", "scales.json", "--out", "a.safetensors")
    lines = first.stderr.splitlines()
    assert first.returncode == 0 and lines[0] == "sgm: float8: taking scales from 16 samples in bfloat16"
    assert lines[1:] == ["sgm: float8: scales written to scales.json"]
    scales = Float8Config.from_json((tmp_path / "scales.json").read_text())
    model = load_checkpoint(weights)
    assert scales == calibrate_float8(model) and not scales.emulate  # good on a GPU as well
    again = draw(*EMULATED, "--n", 2, "--float8", "scales.json", "--out", "b.safetensors")
    assert (again.returncode, again.stderr) == (0, "")
    assert f"how: float8 {replace(scales, emulate=True).digest} on cpu" in again.stdout
    anew = draw(*EMULATED, "--n", 2, "--out", "c.safetensors")
    assert anew.stderr == "sgm: float8: taking scales from 16 samples in bfloat16; --float8 FILE keeps them\n"
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        x, kept = file.get_tensor("samples"), Float8Config.from_json(file.metadata()["float8"])
    engine = Engine(model, 2, precision="float8", executor="eager", float8=kept)
    assert torch.equal(engine.sample(2), x)


def test_a_job_goes_on_with_its_own_scales_and_refuses_others(draw, sgm, tmp_path):
    job = (*EMULATED, "--n", 4, "--shard-size", 2, "--format", "safetensors", "--out", "job/")
    assert draw(*job).returncode == 0
    (tmp_path / "job/shard-000001.safetensors").unlink()
    resumed = draw(*job)
    assert resumed.returncode == 0 and "calibrat" not in resumed.stderr and "taking scales" not in resumed.stderr
    assert "found: 1 shards" in resumed.stdout and sgm("verify", "job").returncode == 0
    done = sgm("resample", "job", "--id", 3, "--out", "one.safetensors")
    assert "equal to sample 3 of job" in done.stdout, done.stderr
    scales = json.loads(json.loads((tmp_path / "job/run.json").read_text())["notes"]["float8"])
    (tmp_path / "other.json").write_text(json.dumps(scales | {"margin": 4.0}))
    fails(draw(*job, "--float8", "other.json"), 2, "job holds another job: precision was float8", "is now float8")
    fails(draw(*job[3:]), 2, "precision was float8", "is now float32")


def test_eval_draws_what_sample_draws(draw, sgm, weights, tmp_path):
    scales = (*EMULATED, "--float8", "scales.json")
    for precision, name in ((scales, "float8.npz"), ((), "float32.npz")):
        assert draw(*precision, "--n", 8, "--out", name).returncode == 0
    own = ("eval", "--n", 8, "--checkpoint", weights, "--batch", 2, "--executor", "eager", "--device", "cpu", *scales)
    for name, same in (("float8.npz", True), ("float32.npz", False)):
        done = sgm(*own, "--reference", name, "--metrics", "sliced", "--json", "report.json")
        assert done.returncode == 0, done.stderr
        (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
        assert (row["value"] == 0) is same
    fails(sgm(*own[:-3], "--reference", "float8.npz"), 2, "--precision", "needs a CUDA device", "--emulate-float8")


def test_tune_searches_in_it(draw, sgm, weights, tmp_path):
    assert draw(*EMULATED, "--n", 4, "--float8", "scales.json", "--out", "float8.npz").returncode == 0
    few = ("--budget", 3, "--candidates", 2, "--first", 2, "--last", 2, "--held-out", 2, "--measure", "sliced")
    where = ("--checkpoint", weights, "--batch", 2, "--executor", "eager", "--device", "cpu", "--out", "tuned/")
    done = sgm("tune", *few, *where, *EMULATED, "--float8", "scales.json", "--reference", "float8.npz")
    assert done.returncode == 0, done.stderr
    scales = replace(Float8Config.from_json((tmp_path / "scales.json").read_text()), emulate=True)
    about = json.loads((tmp_path / "tuned/front.json").read_text())["about"]
    assert about["precision"] == f"float8 {scales.digest}"


BAD = [
    (("--precision", "float8"), ["--precision", "needs a CUDA device", "bfloat16", "--emulate-float8"]),
    (("--float8", "scales.json"), ["--float8", "--precision float8"]),
    (("--emulate-float8",), ["--emulate-float8", "--precision float8"]),
    ((*EMULATED, "--float8", "bad.json"), ["--float8", "bad.json", "not a float8 calibration"]),
    ((*EMULATED, "--float8", "."), ["--float8", "directory"]),
    ((*EMULATED, "--float8", "no/scales.json"), ["no/scales.json", "no folder"]),
    ((*EMULATED, "--out", "job/", "--worker", "0/2"), ["--float8", "several workers", "--float8 FILE"]),
    ((*EMULATED, "--float8", "foreign.json"), ["another network", "'nonesuch'"]),
]


@pytest.mark.parametrize("args, words", BAD, ids=[" ".join(args)[12:60] for args, _ in BAD])
def test_bad_input(args, words, draw, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "foreign.json").write_text(Float8Config({"nonesuch": 1.0}).to_json())
    before = sorted(tmp_path.iterdir())
    fails(draw(*args), 2, *words)
    assert sorted(tmp_path.iterdir()) == before


def test_a_network_without_layers_for_float8(sgm, tiny_weights):
    done = sgm("sample", "--checkpoint", tiny_weights, *EMULATED)
    assert done.returncode == 2 and "precision='float8' finds nothing to do" in done.stderr
