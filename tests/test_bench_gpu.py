"""What can be checked of bench/gpu without a GPU: arguments, stages, results, and the programs it would time."""

import datetime
import json
import subprocess
import sys

import pytest
import test_cuda
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import kernels, stages
from sgm_engine.kernels import cuda

host_library = test_cuda.host_library


def test_without_a_gpu_it_says_so_and_exits_2():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    run = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "bench.gpu: there is no CUDA device on this machine, so there is nothing to measure\n"


def test_arguments():
    assert not gpu.parse([]).sanitize and gpu.parse([]).out == gpu.ROOT / "bench" / "results"
    options = gpu.parse(["--sanitize", "--out", "here", "--only", "tests", "kernels"])
    assert options.sanitize and str(options.out) == "here" and options.only == ["tests", "kernels"]
    with pytest.raises(SystemExit) as refused:
        gpu.parse(["--only", "nothing"])
    assert refused.value.code == 2


def some_stages():
    def breaks():
        raise RuntimeError("no such kernel")

    good = [{"case": "norm", "µs": 12.3456789, "failed": None}, {"case": "a|b", "share": 0.5}]
    return {"good": lambda: good, "breaks": breaks, "partly": lambda: [{"case": "x", "failed": "wrong"}], "last": list}


def test_a_failing_stage_is_recorded_and_the_others_go_on():
    said = []
    done = stages.run_stages(some_stages(), said.append)
    assert [s.name for s in done] == ["good", "breaks", "partly", "last"]
    assert [s.failed for s in done] == [None, "RuntimeError: no such kernel", "x: wrong", None]
    assert len(said) == 4 and "no such kernel" in said[1]


def test_results_hold_every_stage(tmp_path):
    done = stages.run_stages(some_stages(), lambda line: None)
    path = stages.write_results(
        tmp_path / "new", {"gpu": "NVIDIA H200 (80)", "torch": "2"}, done, datetime.date(2030, 1, 2)
    )
    assert path.name == "2030-01-02-nvidia-h200-80.md"
    record = json.loads(path.with_suffix(".json").read_text())
    assert [s["failed"] for s in record["stages"]] == [s.failed for s in done]
    assert record["stages"][0]["rows"][0]["µs"] == 12.3456789
    text = path.read_text()
    assert "| norm | 12.35 |  |  |" in text and "a/b" in text and "**RuntimeError: no such kernel**" in text


@pytest.mark.parametrize("status", [0, 1])
def test_exit_status(tmp_path, monkeypatch, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe_machine", lambda: {"gpu": "fake"})
    monkeypatch.setattr(gpu, "make_importable", lambda: None)
    fake = some_stages()
    monkeypatch.setattr(
        gpu,
        "STAGES",
        {"last": fake["last"], "sanitize": fake["breaks"]} | ({"breaks": fake["breaks"]} if status else {}),
    )
    assert gpu.main(["--out", str(tmp_path)]) == status


def test_what_the_sanitizer_watches_runs(host_library, monkeypatch):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    kernels.exercise()


@pytest.mark.parametrize("residual", [False, True])
def test_a_kernel_is_checked_before_it_is_timed(host_library, monkeypatch, residual):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    call, check = kernels.norm_case(cuda, 2, 16, 8, torch.bfloat16, torch.channels_last, residual, "cluster")
    assert check() is not None  # nothing was written yet
    call()
    assert check() is None
