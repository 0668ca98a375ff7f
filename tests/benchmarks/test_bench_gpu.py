"""What can be checked of bench/gpu without a GPU: arguments, stages, processes, results."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import apart, checks, sanitize, stages


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


def test_a_stage_that_overruns_keeps_its_rows_and_the_next_one_runs():
    """Whatever catches errors in between; and each stage is on record as soon as it is over."""

    def slow():
        yield {"case": "measured"}
        try:
            time.sleep(10)
        except Exception:
            yield {"case": "swallowed"}

    def late():
        time.sleep(0.4)
        return [{"case": "late"}]

    recorded, said = [], []
    kinds = {"slow": slow, "late": late, "over": late}
    began = time.perf_counter()
    done = stages.run_stages(
        kinds, said.append, {"slow": 0.2}, 0.5, lambda found: recorded.append([s.name for s in found])
    )
    assert time.perf_counter() - began < 5
    assert [(s.rows, s.failed and s.failed[:7]) for s in done] == [
        ([{"case": "measured"}], "stopped"), ([], "stopped"), ([], "stopped")
    ]  # fmt: skip
    assert recorded == [["slow"], ["slow", "late"], ["slow", "late", "over"]] and len(said) == 3
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("line, outcome", [
    ("[gw1] [  3%] PASSED tests/test_a.py::test_b[(3, 5)-x] \n", ("tests/test_a.py", "test_b[(3, 5)-x]", "PASSED")),
    ("tests/test_a.py::test_b[(3, 5)-x] SKIPPED (no GPU)  [ 9%]\n", ("tests/test_a.py", "test_b[(3, 5)-x]", "SKIPPED")),
    ("tests/test_a.py::test_b FAILED                      [100%]\n", ("tests/test_a.py", "test_b", "FAILED")),
    ("scheduling tests via LoadScheduling\n", None),
    ("tests/test_a.py::test_b \n", None),
])  # fmt: skip
def test_lines_of_pytest(line, outcome):
    assert checks.outcome_of(line) == outcome


def test_every_file_of_a_gpus_tests_is_there_and_its_lines_are_read():
    assert all((checks.ROOT / file).is_file() for file in checks.GPU_TESTS)
    runs = re.compile(r"^run_(interpreted|pretended)\(globals\(\)\)", re.MULTILINE)
    known = [file for file in checks.ROOT.glob("tests/*/*.py") if runs.search(file.read_text())]
    assert {str(file.relative_to(checks.ROOT)) for file in known} <= set(checks.GPU_TESTS)
    assert all(checks.outcome_of(f"{file}::test_a PASSED")[0] == file for file in checks.GPU_TESTS)


@pytest.mark.parametrize("workers", [True, False])
def test_the_stage_of_tests(tmp_path, monkeypatch, workers):
    """What failed is a row at once; a file without a test that passed has failed as well. As quiet as in this tree."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text((gpu.ROOT / "pyproject.toml").read_text())
    (tmp_path / "tests" / "test_one.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    (tmp_path / "tests" / "test_two.py").write_text("import pytest\ndef test_host(): pass\n")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "GPU_TESTS", ["tests/test_one.py", "tests/test_two.py"])
    if not workers:
        monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    one, failed, two, status = checks.tests(tmp_path / "out")
    assert failed == {"case": "tests/test_one.py::test_bad", "failed": "failed"}
    assert one == {"case": "tests/test_one.py", "result": "1 failed, 1 passed", "failed": None}
    assert two["failed"] == "no test passed" and status == {"case": "pytest", "failed": "exit status 1"}
    assert "E   assert 1 == 2" in (tmp_path / "out" / "tests.log").read_text()


def test_a_test_that_leaves_the_device_unusable_fails_no_other(tmp_path, monkeypatch):
    """Its process ends, as does one that hangs, and the tests that it would have run go to another."""
    (tmp_path / "test_all.py").write_text(
        "import os, time, pytest, torch\n"
        "def no_more(): raise RuntimeError('an illegal memory access was encountered')\n"
        "def test_spoils():\n"
        "    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, no_more\n"
        "    no_more()\n"
        "@pytest.mark.parametrize('i', range(6))\n"
        "def test_after(i): torch.cuda.is_initialized() and no_more()\n"
    )
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    command = [sys.executable, "-m", "pytest", *checks.PYTEST, "-n", "1", "test_all.py"]
    monkeypatch.setenv("PYTHONPATH", str(gpu.ROOT))
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert said.count(" PASSED ") == 6 and "an illegal memory access" in said and "crashed while running" in said


@pytest.fixture
def fake_sanitizer(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    said = 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"; echo "========= ERROR SUMMARY: 0 errors"'
    tool.write_text(f"#!/bin/sh\n{said}; [ $2 != racecheck ]\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path=None: str(tool))


def test_the_stage_of_the_sanitizer(tmp_path, monkeypatch, fake_sanitizer):
    """Four tools for both backends at once, each with its verdict; every tensor has memory of its own."""
    monkeypatch.setattr(sanitize, "shell", lambda *command: None)
    rows = {row["case"]: row for row in sanitize.sanitize(tmp_path)}
    assert set(rows) == {f"{check}, {backend}" for backend in ("cuda", "triton") for check in sanitize.CHECKS}
    assert {name for name, row in rows.items() if row["failed"]} == {"racecheck, cuda", "racecheck, triton"}
    said = rows["racecheck, cuda"]["failed"]
    assert said.startswith("exit 1: 1 --tool racecheck --error-exitcode 9 ") and "exercise.cuda()" in said
    assert rows["memcheck, triton"]["result"] == "ERROR SUMMARY: 0 errors"
    logs = dict(part.split("\n", 1) for part in (tmp_path / "sanitize.log").read_text().split("### ")[1:])
    assert "--kernel-name kne=noise_kernel --kernel-name kne=update_kernel" in logs["memcheck, triton"]
    assert "--kernel-name" not in logs["initcheck, triton"]
    assert len({said.split("--port ")[1].split()[0] for said in logs.values()}) == 8


def test_kernels_that_do_not_run_are_not_watched(tmp_path, monkeypatch, fake_sanitizer):
    def shell(*command):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(sanitize, "shell", shell)
    first, *others = sanitize.sanitize(tmp_path)
    assert "illegal" in first["failed"] and {row["case"] for row in others} == {f"{c}, cuda" for c in sanitize.CHECKS}


def test_a_sanitizer_that_found_something():
    said = (
        "========= COMPUTE-SANITIZER\n========= Invalid read\n"
        + "=========\n" * 99
        + "========= ERROR SUMMARY: 1 error\n"
    )
    row = sanitize.row("memcheck, cuda", 9, said)
    assert row["result"] == "ERROR SUMMARY: 1 error" and "exit 9" in row["failed"] and "Invalid read" in row["failed"]
    races = sanitize.row("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert races["failed"] is None and races["result"].startswith("RACECHECK SUMMARY: 0 hazards")
    assert sanitize.row("synccheck", 0, "")["failed"], "a tool that says nothing has seen nothing"


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
    monkeypatch.setattr(gpu, "describe_machine", lambda: [{"gpu": "fake", "capability": "9.0"}])
    monkeypatch.setattr(gpu, "make_importable", lambda: None)
    fake = some_stages()
    monkeypatch.setattr(
        gpu,
        "STAGES",
        {"last": fake["last"], "sanitize": fake["breaks"]} | ({"breaks": fake["breaks"]} if status else {}),
    )
    assert gpu.main(["--out", str(tmp_path)]) == status


def test_what_a_case_does_to_its_process_is_its_own():
    """Rows come one by one, in order; what follows a case that fails in any way runs all the same."""

    def breaks():
        yield {"case": "half"}
        raise ValueError("wrong")

    def spoils():
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, no_more
        return [{"case": "measured"}]

    def no_more():
        raise RuntimeError("gone")

    def good(name):
        return [{"case": name, "process": os.getpid()}]

    cases = {
        "a": partial(good, "a"),
        "breaks": breaks,
        "b": partial(good, "b"),
        "dies": lambda: os._exit(11),
        "c": partial(good, "c"),
        "hangs": lambda: time.sleep(60),
        "d": partial(good, "d"),
        "spoils": spoils,
        "e": partial(good, "e"),
    }
    rows = list(apart.apart(lambda: cases.items(), seconds=2))
    assert [r.get("case") for r in rows] == [
        "a", "half", "breaks", "b", "dies", "c", "hangs", "d", "measured", "spoils", "e"
    ]  # fmt: skip
    failed = {r["case"]: r["failed"] for r in rows if "failed" in r}
    assert failed == {
        "breaks": "ValueError: wrong",
        "dies": "its process died: exit status 11",
        "hangs": "stopped: nothing came from it in 2 s",
        "spoils": "left the device unusable to its process: RuntimeError: gone",
    }
    process = {r["case"]: r["process"] for r in rows if "process" in r}
    assert process["a"] == process["b"] != os.getpid() and len(set(process.values())) == 4


def test_a_stage_that_loses_every_process_is_given_up(monkeypatch):
    monkeypatch.setattr(apart, "MOST_LOST", 2)
    rows = list(apart.apart(lambda: [(f"dies {i}", lambda: os._exit(11)) for i in range(9)]))
    assert [r["case"] for r in rows] == ["dies 0", "dies 1", "all that would follow"]


def test_a_stage_whose_time_is_over_leaves_no_process(tmp_path):
    def cases():
        yield "one", lambda: [{"case": "one", "process": os.getpid()}]
        yield "hangs", lambda: time.sleep(60)

    began = time.perf_counter()
    (stage,) = stages.run_stages({"s": lambda: apart.apart(cases)}, lambda line: None, {}, 1)
    assert time.perf_counter() - began < 10 and stage.failed.startswith("stopped after 1 s")
    with pytest.raises(ProcessLookupError):
        os.kill(stage.rows[0]["process"], 0)


def test_what_ncu_says():
    text = """==PROF== Connected
"ID","Kernel Name","a.pct","b.pct","c.pct"
"","","%","%","%"
"0","void norm<float>(Norm, Tiling)","80.5","10","50"
"1","void norm<float>(Norm, Tiling)","60.0","20","40"
"2","update(Update)","1,000.0","3","90"
"""
    rows = checks.ncu_rows(text, {"memory %": "a.pct", "compute %": "b.pct", "occupancy %": "c.pct"})
    assert [(r["case"], r["memory %"], r["compute %"]) for r in rows] == [
        ("void norm<float>", 60.0, 20.0), ("update", 1000.0, 3.0)
    ]  # fmt: skip
