"""A run's folder: what may change when it is resumed does, what is kept is whole and finite, one process has it."""

import csv
import shutil

import numpy as np
import pytest
import torch

pl = pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")

from safetensors.torch import load_file  # noqa: E402

from sgm_engine.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from sgm_engine.training import keeping, run  # noqa: E402
from sgm_engine.training.config import TrainConfig  # noqa: E402
from tests.training.runs import IMAGES, TINY, quiet  # noqa: E402, F401

ARGUMENTS = ("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run", "--accelerator", "cpu", "--set")


def write_data(folder):
    np.save(folder / "images.npy", IMAGES)
    (folder / "tiny.yaml").write_text(TINY)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of four steps, saved at two and four."""
    folder = tmp_path_factory.mktemp("begun")
    write_data(folder)
    (folder / "set").mkdir()
    np.save(folder / "set" / "train.npy", IMAGES[:32])
    np.save(folder / "set" / "test.npy", IMAGES[32:])
    config = TrainConfig.read(folder / "tiny.yaml", {"steps": 4, "save_every": 2, "sample_every": 0, "warmup": 2})
    run.prepare(config, folder / "set", folder / "run").fit("cpu")
    return folder


def resumed(begun, tmp_path, **changes):
    """The run gone on with; what its optimizer was set to at each step, and its trainer."""
    shutil.copytree(begun / "run", tmp_path / "run")
    config = TrainConfig.read(tmp_path / "run" / "config.yaml", {"steps": 6} | changes)
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
            seen.append((optimizer.param_groups[0]["lr"], norm.item(), trainer.precision, trainer.gradient_clip_val))

    job = run.prepare(config, begun / "set", tmp_path / "run")
    own = job._callbacks
    job._callbacks = lambda: [Watch(), *own()]
    job.fit("cpu")
    return seen


def rates(seen):
    return [rate for rate, *_ in seen]


def test_unchanged_options_resume_unchanged(begun, tmp_path):
    assert rates(resumed(begun, tmp_path)) == [1e-3, 1e-3]


@pytest.mark.parametrize(
    "changes, want",
    [
        ({"lr": 5e-5}, [5e-5, 5e-5]),
        ({"warmup": 10}, [5e-4, 6e-4]),
        ({"decay": 0.5}, [1e-3 * 2 / 3, 1e-3 / 3]),
    ],
)
def test_the_learning_rate_is_the_resumed_runs(begun, tmp_path, changes, want):
    assert rates(resumed(begun, tmp_path, **changes)) == pytest.approx(want, rel=1e-6)


def test_the_other_options_take_effect(begun, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(run, "compile_norms", compiled.append)
    plan = {"name": "annealed_langevin", "steps_per_level": 3, "step_lr": 2e-3}
    every = {"log_every": 2, "sample_every": 3, "save_every": 3, "validate_every": 1}
    options = {"clip": 0.5, "precision": "bfloat16", "compile_norms": True, "weights": "float16", "plan": plan}
    changed = {"steps", "lr", "warmup", "decay", *every, *options}
    elsewhere = {"direct_steps", "drop_every"}  # test_cdm_phases.py, test_labels.py
    assert changed | elsewhere == run.MAY_CHANGE  # a new option wants a test
    seen = resumed(begun, tmp_path, steps=8, **every, **options)
    assert len(seen) == 4 and {precision for *_, precision, _ in seen} == {"bf16-mixed"} and len(compiled) == 1
    assert {clip for *_, clip in seen} == {0.5}
    steps = [int(row[0]) for row in csv.reader((tmp_path / "run" / "metrics.csv").read_text().splitlines())]
    assert steps == [1, 2, 3, 4, 6, 8]
    assert [p.name for p in (tmp_path / "run" / "samples").iterdir()] == ["00000006.png"]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000006.ckpt", "00000008.ckpt"]
    logged = "".join(p.read_text() for p in (tmp_path / "run" / "csv").rglob("metrics.csv"))
    assert "val_loss" in logged
    assert {t.dtype for t in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float16}
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").plan == plan


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_run_that_became_nan_keeps_a_good_checkpoint(begun, tmp_path, log_every):
    """lr = 1e30 on resume: nothing that is not finite is saved, and the message names what is good."""
    with pytest.raises(RuntimeError, match=r"the loss is (nan|inf) at step 6: lower lr.*00000004.ckpt is good"):
        resumed(begun, tmp_path, lr=1e30, steps=60, save_every=1, log_every=log_every)
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["00000004.ckpt"]  # the weights of step 5 were finite, and of no use
    config = TrainConfig.read(tmp_path / "run" / "config.yaml", {"steps": 6, "lr": 1e-3})
    run.prepare(config, begun / "set", tmp_path / "run").fit("cpu")
    assert not list(keeping.not_finite(load_file(tmp_path / "run" / "model.safetensors")))


@pytest.mark.parametrize("cut", ["half", "empty", "bits"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(begun, tmp_path, caplog, cut):
    shutil.copytree(begun / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "00000004.ckpt"
    content = bytearray(newest.read_bytes())
    if cut == "bits":
        content[len(content) // 2] ^= 255
    newest.write_bytes(content[: {"half": len(content) // 2, "empty": 0, "bits": len(content)}[cut]])
    config = TrainConfig.read(tmp_path / "run" / "config.yaml")
    job = run.prepare(config, begun / "set", tmp_path / "run")
    assert job.resume.name == "00000002.ckpt"
    assert "00000004.ckpt: damaged; going on from" in caplog.text and "00000002.ckpt" in caplog.text
    job.lock.close()
    job.resume.write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000002.ckpt: is damaged, and there is no whole checkpoint"):
        run.prepare(config, begun / "set", tmp_path / "run")


def test_orphans_go(begun, tmp_path):
    """What a kill left half-written, a run with another save_every, or a copy of the folder: two remain."""
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(begun / "run", tmp_path / "run")
    for name in ("00000001.ckpt", "00000003.ckpt"):
        shutil.copy(folder / "00000002.ckpt", folder / name)
    (folder / ".00000005.ckpt.1234.tmp").write_bytes(b"half")
    config = TrainConfig.read(tmp_path / "run" / "config.yaml", {"steps": 5})
    run.prepare(config, begun / "set", tmp_path / "run").fit("cpu")
    assert sorted(p.name for p in folder.iterdir()) == ["00000004.ckpt", "00000005.ckpt"]


def test_two_processes_in_one_folder(sgm, tmp_path):
    write_data(tmp_path)
    (tmp_path / "run").mkdir()
    with keeping.lock(tmp_path / "run"):
        done = sgm(*ARGUMENTS, "steps=1")
        assert done.returncode == 2 and "run: another process trains there" in done.stderr
    assert sgm(*ARGUMENTS, "steps=1", "sample_every=0").returncode == 0


def test_nan_is_not_saved(begun, tmp_path):
    """With a save at the step whose update is not finite."""
    with pytest.raises(RuntimeError, match=r"network.* is not finite at step 6: lower lr.*00000004.ckpt is good"):
        resumed(begun, tmp_path, lr=1e30, steps=60, save_every=6, log_every=50)


def test_a_save_is_whole_or_absent(tmp_path, monkeypatch):
    """It is written beside its target: no temporary folder, perhaps on another file system, has a part in it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    files, path = keeping.WholeFiles(), tmp_path / "checkpoints" / "00000001.ckpt"
    files.save_checkpoint({"state_dict": {"w": torch.ones(3)}, "global_step": 1}, path)
    assert keeping.whole(path) and torch.load(path, weights_only=True)["global_step"] == 1

    def dies(checkpoint, file):
        file.write(path.read_bytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"global_step": 2}, path.with_name("00000002.ckpt"))
    assert [p.name for p in path.parent.iterdir()] == ["00000001.ckpt"]


def test_not_finite_names_tensors():
    state = {"a": [torch.ones(2), {"b": torch.tensor([1.0, torch.inf])}], "n": torch.tensor([3]), "s": "text"}
    assert list(keeping.not_finite(state)) == ["a.1.b"]
