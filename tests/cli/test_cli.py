"""The command: what it writes, what it refuses and how it stops."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from sgm_engine.cli import arguments

pytestmark = pytest.mark.filterwarnings("ignore:more than 1% of these values")  # of random networks


@pytest.fixture
def draw(sgm, tiny_weights):
    """Runs ``sgm sample`` on the tiny network."""
    return lambda *args: sgm("sample", "--checkpoint", tiny_weights, "--batch", 4, *args)


def fails(process, code, *words):
    """One line on stderr that holds the words, nothing on stdout, no traceback, that exit code."""
    assert process.returncode == code, process.stderr
    assert process.stdout == ""
    assert process.stderr.startswith("sgm: ") and process.stderr.count("\n") == 1, process.stderr
    for word in words:
        assert word in process.stderr


def read(path):
    with np.load(path) as data:
        return data["arr_0"], data["sample_id"].tolist()


def test_every_form_holds_the_same_samples(draw, tmp_path):
    for name in ("s.npz", "s.safetensors", "s/", "s.png"):
        done = draw("--n", 5, "--out", name)
        assert (done.returncode, done.stderr) == (0, "")
    pixels, ids = read(tmp_path / "s.npz")
    assert (pixels.dtype, pixels.shape, ids) == (np.uint8, (5, 8, 8, 1), [0, 1, 2, 3, 4])
    assert len({image.tobytes() for image in pixels}) == 5
    with safe_open(tmp_path / "s.safetensors", "np") as data:
        x = data.get_tensor("samples")
        assert data.metadata()["seed"] == "0" and '"annealed_langevin"' in data.metadata()["plan"]
    assert np.array_equal(np.floor(np.clip(x, 0, 1).transpose(0, 2, 3, 1) * 255 + 0.5), pixels)
    pictures = [f"{i:06d}.png" for i in range(5)]
    assert sorted(os.listdir(tmp_path / "s")) == [".sgm", *pictures, "README.md", "manifest", "run.json"]
    for i in range(5):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"s/{i:06d}.png")), pixels[i, :, :, 0])
    grid = np.asarray(Image.open(tmp_path / "s.png"))  # 3 columns, 2 rows, 2 pixels between
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2)
    assert np.array_equal(grid[12:20, 12:20], pixels[4, :, :, 0])
    assert sorted(os.listdir(tmp_path)) == ["s", "s.npz", "s.png", "s.safetensors"]


def test_the_report_says_what_was_done_and_quiet_does_not(draw):
    report = draw("--n", 3, "--out", "s.npz").stdout
    assert re.search(r"^3 samples in [\d.]+ s: \S+ samples/s, 7 NFE a sample, \S+ NFE/s$", report, re.M)
    assert "plan: annealed_langevin(steps_per_level=2, step_lr=0.001, convention=code, denoise=True)" in report
    assert re.search(r"float32 on .*, executor (native|graph|eager), batch 4$", report, re.M)
    assert "written: s.npz" in report
    quiet = draw("--n", 3, "--out", "s.npz", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_sample_i_is_sample_i_and_the_seed_counts(draw, tmp_path):
    draw("--n", 8, "--out", "all.npz")
    draw("--ids", "2-3,6,0", "--out", "some.npz")
    draw("--seeds=7", "--out", "one.npz")
    draw("--n", 8, "--seed", 2**64 - 1, "--out", "other.npz")
    every, _ = read(tmp_path / "all.npz")
    some, ids = read(tmp_path / "some.npz")
    assert ids == [2, 3, 6, 0] and np.array_equal(some, every[ids])
    assert np.array_equal(read(tmp_path / "one.npz")[0], every[7:])
    assert not (read(tmp_path / "other.npz")[0] == every).all(axis=(1, 2, 3)).any()


def test_plan_options_change_the_plan(draw, tmp_path):
    nfe = lambda *args: int(re.search(r"(\d+) NFE a sample", draw("--n", 2, "--out", "s.npz", *args).stdout)[1])  # noqa: E731
    assert [nfe(), nfe("--no-denoise"), nfe("--steps-per-level", 5), nfe("--plan", "ddim")] == [7, 6, 16, 3]
    pictures = set()
    for args in ((), ("--convention", "paper"), ("--step-lr", "7e-4"), ("--no-denoise",)):
        draw("--n", 2, "--out", "s.safetensors", *args)
        with safe_open(tmp_path / "s.safetensors", "np") as data:
            pictures.add(data.get_tensor("samples").tobytes())
    assert len(pictures) == 4


def test_gif_ends_with_the_samples(draw, tmp_path):
    assert draw("--n", 6, "--out", "s.png", "--gif", "s.gif").returncode == 0
    with Image.open(tmp_path / "s.gif") as gif, Image.open(tmp_path / "s.png") as png:
        assert gif.n_frames == 7  # every row of a short plan
        gif.seek(6)
        last, picture = np.asarray(gif.convert("L")).astype(int), np.asarray(png).astype(int)
        assert last.shape == picture.shape and abs(last - picture).max() <= 1
        gif.seek(0)
        assert not np.array_equal(np.asarray(gif.convert("L")), last)


BAD = [
    (["--n", "-3"], ["--n", "-3"]),
    (["--n", "many"], ["--n", "'many'"]),
    (["--n", "0"], ["--n", "at least 1 sample"]),
    (["--n", str(2**56)], ["--n", "2**56"]),
    (["--n", str(10**12), "--out", "s.npz"], ["--out FOLDER/", "GiB"]),
    (["--ids", "5-2"], ["--ids", "'5-2'"]),
    (["--ids", "1,2,1"], ["--ids", "twice"]),
    (["--ids", "0-"], ["--ids"]),
    (["--ids", str(2**56)], ["--ids", "2**56"]),
    (["--n", "2", "--ids", "1"], ["not allowed with"]),
    (["--seed", "-1"], ["--seed", "-1"]),
    (["--seed", str(2**64)], ["--seed", "2**64"]),
    (["--batch", "0"], ["--batch", "0"]),
    (["--batch", str(2**31)], ["--batch", "2**31"]),
    (["--batch", str(2**31 - 1), "--executor", "eager"], ["out of memory", "smaller batch"]),
    (["--steps-per-level", str(10**9)], ["steps_per_level", "1000000000"]),
    (["--sampler", "euler", "--nfe", str(10**11)], ["nfe", "100000000000"]),
    (["--steps-per-level", "0"], ["--steps-per-level"]),
    (["--step-lr", "0"], ["step_lr", "positive"]),
    (["--step-lr", "nan"], ["step_lr", "nan"]),
    (["--step-lr", "1"], ["diverge", "step_lr"]),
    (["--convention", "other"], ["--convention", "'other'"]),
    (["--plan", "magic"], ["--plan", "'magic'", "ddim"]),
    (["--plan", "absent.json"], ["--plan", "absent.json", "No such file"]),
    (["--plan", "full/garbage.json"], ["--plan", "full/garbage.json", "not a plan"]),
    (["--conditioning", "nearest"], ["--conditioning", "--nfe"]),
    (["--plan", "ddim", "--step-lr", "1e-5"], ["ddim", "takes no step_lr"]),
    (["--precision", "fp8"], ["--precision", "'fp8'"]),
    (["--device", "abacus"], ["--device", "'abacus'"]),
    (["--executor", "graph", "--device", "cpu"], ["graph", "CUDA"]),
    (["--unknown"], ["--unknown"]),
    (["--out", "s.jpg"], ["'s.jpg'", ".npz"]),
    (["--out", "no/where.png"], ["no/where.png", "no folder"]),
    (["--out", "/proc/s.png"], ["/proc"]),
    (["--out", "full/"], ["full", "not empty"]),
    (["--out", ""], ["--out", "empty"]),
    (["--gif", "no/where.gif"], ["no/where.gif"]),
    (["--gif", "s.png"], ["--gif", ".gif", "'s.png'"]),
    (["--gif", "full/folder.gif"], ["full/folder.gif", "folder"]),
    (["--checkpoint", ""], ["--checkpoint", "empty"]),
    (["--checkpoint", "absent.safetensors"], ["absent.safetensors"]),
    (["--checkpoint", "full"], ["full"]),
    (["--checkpoint", "full/garbage"], ["garbage"]),
    (["--config", "absent.yml"], ["config"]),
]


@pytest.mark.parametrize("args, words", BAD, ids=[" ".join(args)[:40] for args, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(args, words, draw, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "garbage").write_bytes(b"not weights")
    (tmp_path / "full" / "garbage.json").write_bytes(b"not a plan")
    (tmp_path / "full" / "folder.gif").mkdir()
    fails(draw(*args), 2, *words)
    assert os.listdir(tmp_path) == ["full"]


def test_bad_weights_are_one_line(draw, tiny_weights, tmp_path):
    """Increasing sigmas, a missing tensor and a wrong shape, in a file that is otherwise right."""
    from safetensors.numpy import load_file, save_file

    with safe_open(tiny_weights, "np") as file:
        metadata = file.metadata()
    state = load_file(tiny_weights)
    first = next(name for name in state if name.startswith("begin_conv.weight"))
    rising = metadata | {"config": metadata["config"].replace("[1.0, ", "[0.01, ")}
    cases = [
        (state, rising, "sigmas"),
        ({k: v for k, v in state.items() if k != first}, metadata, first),
        (state | {first: state[first][:, :, :2].copy()}, metadata, first),
    ]
    assert rising != metadata
    for tensors, notes, word in cases:
        save_file(tensors, tmp_path / "bad.safetensors", notes)
        fails(draw("--checkpoint", "bad.safetensors"), 2, "bad.safetensors", word)
        assert os.listdir(tmp_path) == ["bad.safetensors"]


def test_no_command_and_a_wrong_one(sgm):
    fails(sgm(), 2, "COMMAND")
    fails(sgm("draw"), 2, "'draw'", "'sample'")


def test_samples_that_diverge_are_left_out_and_said(draw, tmp_path, monkeypatch):
    from sgm_engine.checkpoints import checkpoint

    load = checkpoint.load_checkpoint

    def sick(*args):
        model, calls = load(*args), []

        def poison(module, inputs, score):  # the second sample of the first batch, in its third step
            calls.append(score)
            if len(calls) == 5:  # after the two questions at the start
                score[1] = float("nan")

        model.register_forward_hook(poison)
        return model

    where = ["--device", "cpu", "--executor", "eager"]  # the one that calls the module, hooks and all
    assert draw("--n", 6, "--out", "well.npz", *where).returncode == 0
    monkeypatch.setattr(checkpoint, "load_checkpoint", sick)
    done = draw("--n", 6, "--out", "sick.npz", "--gif", "sick.gif", *where)
    assert done.returncode == 3
    assert "1 samples became non-finite and are left out: sample 1 at row 2" in done.stderr
    well, sick = read(tmp_path / "well.npz"), read(tmp_path / "sick.npz")
    assert sick[1] == [0, 2, 3, 4, 5]
    assert np.array_equal(sick[0], well[0][sick[1]])


@pytest.mark.parametrize(
    "redirection, code", [("| true; exit ${PIPESTATUS[0]}", 141), (">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)]
)
@pytest.mark.parametrize("arguments", ["train --list", "--help"])
def test_output_that_nobody_reads(tmp_path, arguments, redirection, code):
    """Also where the locale is not UTF-8: --list prints what files hold that are. What is printed waits in a buffer."""
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    plain |= {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = f"{{ sleep 0.2; {sys.executable} -m sgm_engine {arguments}; }} {redirection}"
    done = subprocess.run(["bash", "-c", command], env=plain, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_nothing_can_hold(tmp_path):
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = f"{sys.executable} -m sgm_engine train --list > /dev/full"
    done = subprocess.run(["bash", "-c", command], env=plain, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_full_disk_is_one_line(draw, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    fails(draw("--n", 2, "--out", "s.npz"), 1, "No space left on device: 's.npz'")
    assert os.listdir(tmp_path) == []


def test_convert_makes_a_file_that_samples(sgm, tiny_weights, tmp_path):
    import torch
    from safetensors.torch import load_file

    torch.save([{f"module.{name}": value for name, value in load_file(tiny_weights).items()}, {}], tmp_path / "old.pth")
    done = sgm("convert", "old.pth", "new.safetensors")
    fails(done, 2, "old.pth", "config")  # nothing published has three levels, and the file does not say them
    fails(sgm("convert", "old.pth", "no/new.safetensors"), 2, "no/new.safetensors")
    (tmp_path / "config.yml").write_text(
        "data: {channels: 1, image_size: 8}\nmodel: {sigma_begin: 1, sigma_end: 0.1, num_classes: 3, ngf: 4}\n"
    )
    done = sgm("convert", "old.pth", "new.safetensors", "--config", "config.yml")
    assert (
        done.returncode == 0 and "written: new.safetensors (NCSN, 1×8×8, ngf 4, 3 levels, not averaged)" in done.stdout
    ), done.stderr
    done = sgm("sample", "--checkpoint", "new.safetensors", "--n", 1, "--steps-per-level", 1, "--step-lr", 1e-3)
    assert done.returncode == 0, done.stderr


def test_help_and_version_answer_without_pytorch():
    code = """import sys
from sgm_engine.cli.main import main
try: main(sys.argv[1:])
finally: print('torch' in sys.modules)"""
    for argument, word in (
        (["--help"], "sample"),
        (["sample", "--help"], "--step-lr"),
        (["--version"], "sgm-engine 0."),
    ):
        run = subprocess.run([sys.executable, "-c", code, *argument], capture_output=True, text=True, timeout=60)
        assert run.returncode == 0 and word in run.stdout and run.stdout.endswith("False\n")


def test_what_is_offered_is_what_there_is():
    from sgm_engine.executors.choice import EXECUTORS
    from sgm_engine.executors.network import PRECISIONS
    from sgm_engine.plans.samplers import SAMPLERS

    assert {*arguments.PLANS, *arguments.SAMPLERS} == {*SAMPLERS}
    assert EXECUTORS == arguments.EXECUTORS
    assert {*arguments.PRECISIONS, "float8"} == {*PRECISIONS}  # float8: `sgm sample` alone offers it
