"""Small files that took a minute, six gigabytes, or ended in a traceback: one line, exit code 2, soon."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "data" / "hostile"
SAMPLE = ("sample", "--n", "1", "--batch", "1", "--out", "x.npz")
EVAL = ("eval", "x.npy", "--reference")


def job(folder: Path, run: Path) -> str:
    folder.mkdir()
    shutil.copy(run, folder / "run.json")
    return "job/"


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", DATA / "cdm_blocks_100000.safetensors", "x.safetensors"),
        ("convert", DATA / "cdm_width_overflow.safetensors", "x.safetensors"),
        *((*SAMPLE, "--checkpoint", DATA / f"{name}.pth") for name in ("pth_dag_tuple_key", "pth_legacy_keys_dag")),
        *((*SAMPLE, "--plan", DATA / f"{name}.json") for name in ("plan_a_1e200", "plan_metadata_list")),
        (*SAMPLE, "--plan", "deep.json"),
        *((command, DATA / f"run_{name}.json") for command in ("verify", "resample", "merge")
          for name in ("device_empty", "ids_int", "shard_size_0")),
        (*EVAL, "x.npy", "--features", f"classifier:{DATA}/classifier_classes_25e6.safetensors"),
        (*EVAL, "x.npy", "--features", f"export:{DATA}/pth_dag_tuple_key.pth"),
        ("eval", "x.npz", "--reference", "x.npy"),
        (*EVAL, "zero.npy"),
        (*EVAL, "zero.npz"),
        ("train", "--config", "mnist_tiny", "--data", ".", "--out", "run", "--set", "levels=600000000"),
        ("train", "--config", "deep.json", "--data", ".", "--out", "run"),
    ],
    ids=lambda arguments: " ".join(Path(a).name for a in map(str, arguments) if a not in SAMPLE[1:]),
)  # fmt: skip
def test_one_line_and_soon(sgm, tmp_path, arguments):
    (tmp_path / "deep.json").write_text("[" * 50_000)
    np.save(tmp_path / "x.npy", np.zeros((9, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "whole.npz", np.zeros((9, 8, 8, 1), np.uint8))
    (tmp_path / "x.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    (tmp_path / "zero.npy").symlink_to("/dev/zero")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    if arguments[0] in ("verify", "resample", "merge"):
        options = {"resample": ("--id", "0"), "merge": ("--out", "x.npz"), "verify": ()}[arguments[0]]
        arguments = (arguments[0], job(tmp_path / "job", arguments[1]), *options)
    sgm("doctor")  # imports PyTorch
    start = time.process_time()
    done = sgm(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert len(lines) == 1 and lines[0].startswith("sgm: ") and len(lines[0]) < 600, done.stderr
    assert time.process_time() - start < 2 and not (tmp_path / "x.safetensors").exists()
