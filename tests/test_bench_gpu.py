"""What can be checked of bench/gpu without a GPU: arguments, stages, results, and the programs it would time."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import test_cuda
import torch
from triton.runtime.errors import OutOfResources

from bench.gpu import __main__ as gpu
from bench.gpu import apart, checks, convolutions, exercise, kernels, network, norms, sanitize, stages, timing
from sgm_engine.kernels import (
    backend_table,
    conv_table,
    cuda,
    ops,
    reference,
    triton_conv,
    triton_float8,
    triton_noise,
    triton_norm,
    triton_update,
)
from sgm_engine.kernels.launch import Launch

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
    failed, one, two, status = checks.tests(tmp_path / "out")
    assert failed == {"case": "tests/test_one.py::test_bad", "failed": "failed"}
    assert one == {"case": "tests/test_one.py", "result": "1 failed, 1 passed", "failed": None}
    assert two["failed"] == "no test passed" and status == {"case": "pytest", "failed": "exit status 1"}
    assert "assert 1 == 2" in (tmp_path / "out" / "tests.log").read_text()


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


def test_what_the_sanitizer_watches_runs(host_library, monkeypatch):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    on_the_cpu(monkeypatch)
    exercise.cuda()


def on_the_cpu(monkeypatch):
    for module in (exercise, kernels, norms, network, convolutions, timing):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (kernels, network, convolutions):
        monkeypatch.setattr(module, "apart", lambda cases, seconds=60: iter(rows_of(cases())))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_the_sanitizer_knows_every_triton_kernel_by_its_name(monkeypatch):
    on_the_cpu(monkeypatch)
    launched = set()
    monkeypatch.setattr(Launch, "__call__", lambda launch: launched.add(launch.kernel.__name__))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    exercise.triton()
    assert {f"kne={name}" for name in launched} == set(sanitize.KERNELS["triton"])


@pytest.mark.parametrize("what", norms.FORMS)
def test_a_kernel_is_checked_before_it_is_timed(host_library, monkeypatch, what):
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setattr(norms, "DEVICE", "cpu")
    call, check = norms.case(cuda, 2, 32, 8, torch.bfloat16, torch.channels_last, what)
    assert check() is not None  # nothing was written yet
    call()
    assert check() is None


# The stages that measure, with a timer that only counts ---------------------------------------------------------------


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


def rows_of(cases):
    return [row for _, measure in cases for row in measure()]


@pytest.fixture
def no_gpu(host_library, monkeypatch):
    """Every stage runs on the CPU: the host's build of the library, in place of Triton too, and a fake timer."""
    timed = []

    def microseconds(calls):
        for call in calls:
            call()
        timed.append(len(calls))
        return 10.0

    on_the_cpu(monkeypatch)
    monkeypatch.setattr(cuda, "library", lambda: host_library)
    monkeypatch.setattr(triton_update, "langevin_update", cuda.langevin_update)
    monkeypatch.setattr(triton_noise, "noise_fill", cuda.noise_fill)
    monkeypatch.setattr(triton_norm, "norm", cuda.norm)
    monkeypatch.setattr(triton_norm, "norm_workspace_size", cuda.norm_workspace_size)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "fake")
    monkeypatch.setattr(timing, "microseconds", microseconds)
    monkeypatch.setattr(timing, "copies", lambda size: 2)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(timing, "peak_flops", lambda: 1e15)
    return timed


def test_the_stage_of_kernels(no_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "BATCHES", (2,))
    monkeypatch.setattr(norms, "BATCHES", (2, 128))
    monkeypatch.setattr(norms, "SHAPES", [(32, 2)])
    rows = rows_of(kernels.kernels())
    assert [r for r in rows if r.get("failed")] == []
    assert {r["backend"] for r in rows[1:]} == {"CUDA", "Triton", "CUDA cluster", "CUDA portable"}
    measured = [r for r in rows if "µs" in r]
    assert len(measured) == 4 + 2 * (3 * 3 + 2 * 2) == len(no_gpu) and set(no_gpu) == {2}
    small = next(r for r in measured if r["case"].startswith("add + norm + ELU") and r["batch"] == 128)
    assert small["floor µs"] == 4 * 2 * 128 * 32 * 4 / 1e6 and small["share"] == small["floor µs"] / 10
    assert small["goal"] == "missed" and measured[0]["goal"] == "none"


def test_the_stage_that_writes_the_table_of_backends(no_gpu, monkeypatch, tmp_path):
    """CUDA C++ is put down where it is right and faster; other devices' entries stay."""
    monkeypatch.setattr(kernels, "BATCHES", (2,))
    monkeypatch.setattr(norms, "BATCHES", (2,))
    monkeypatch.setattr(norms, "SHAPES", [(32, 2)])
    monkeypatch.setattr(backend_table, "PATH", tmp_path / "table.json")
    (tmp_path / "table.json").write_text('{"sm_80": {"x": "CUDA"}, "sm_90": {"old": "CUDA"}}')
    times = iter([3.0, 9.0] + [5.0] * 99)
    monkeypatch.setattr(timing, "microseconds", lambda calls: next(times))
    rows = list(kernels.backends())
    written = backend_table.read(tmp_path / "table.json")
    assert written["sm_80"] == {"x": "CUDA"} and len(written["sm_90"]) == 2 + len(norms.FORMS)
    assert written["sm_90"].pop("langevin_update NHWC bfloat16 NHWC 2^12") == "CUDA"
    assert set(written["sm_90"].values()) == {"Triton"}, "a tie is Triton's"
    assert rows[-1]["case"] == f"{2 + len(norms.FORMS)} cases to table.json, CUDA C++ in 1 of them"


def test_a_kernel_that_is_wrong_is_not_timed(no_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "BATCHES", ())
    monkeypatch.setattr(norms, "BATCHES", (2,))
    monkeypatch.setattr(norms, "SHAPES", [(32, 2)])
    monkeypatch.setattr(triton_norm, "norm", lambda *arguments: arguments[8].zero_())
    wrong = [r for r in rows_of(kernels.kernels()) if r.get("failed")]
    assert len(wrong) == len(norms.FORMS) and all(r["backend"] == "Triton" and "µs" not in r for r in wrong)


@pytest.fixture
def tuning(no_gpu, monkeypatch, tmp_path):
    """Of one convolution, whose kernel is PyTorch here; the second tile of each kind is wrong. Returns a setter."""

    def convolution(x, weight, bias, residual, dilation, out, partial, tile, scale=None):
        if scale is None:
            y = torch.nn.functional.conv2d(x.float(), weight.float(), bias.float(), 1, dilation, dilation)
        else:
            y = reference.float8_convolution(x, weight, scale, 1.0, bias, None, dilation)
        out.copy_(y if residual is None else y + residual.float())
        if tile in (triton_conv.TILES[1], triton_conv.FLOAT8_TILES[1]):
            out.zero_()
        if tile == triton_conv.LARGE_TILES[0]:
            raise OutOfResources(2**18, 2**17, "shared memory")

    def norm(x, *rest, partials):
        assert partials.shape in ((1, 2, 2, 256), (1, 4, 2, 256), (1, 1, 2, 256))  # 256 pixels in tiles of 128, 64, 256
        return ops.noise_conditioned_norm(x, *rest)

    (tmp_path / "table.json").write_text('{"another": {"shape": {}}, "fake": {"of before": {}}}')
    monkeypatch.setattr(conv_table, "PATH", tmp_path / "table.json")
    monkeypatch.setattr(convolutions, "SHAPES", [(128, 256, 16, 2)])
    monkeypatch.setattr(convolutions, "BATCHES", (1,))
    monkeypatch.setattr(triton_conv, "convolution", convolution)
    monkeypatch.setattr(triton_float8, "quantise", lambda x, s, out: out.copy_(reference.quantised(x, s)))
    monkeypatch.setattr(ops, "inference_norm", norm)

    def run(capability, times):
        times = iter(times)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(timing, "microseconds", lambda calls: (calls[0](), next(times))[1])
        rows = list(convolutions.convolutions())
        assert next(times, None) is None
        table = conv_table.read(tmp_path / "table.json")
        assert table.pop("another") == {"shape": triton_conv.ConvTile()}
        return rows, table["fake"]

    return run


SHAPE = "128×16×16 128→256 3×3 d2 at 1"


@pytest.mark.parametrize("faster", [True, False])
def test_tuning_writes_what_is_faster_and_right(tuning, faster):
    """cuDNN, two tiles that are right, then the norm after it and with it, without and with a sum."""
    (product, *rows), table = tuning((8, 0), [10.0, 8.0 if faster else 9.9, 9.95, 20.0, 19.0, 30.0, 29.9])
    tile = triton_conv.TILES[0]
    assert product == {"case": "matrix product", "TFLOP/s": 1e3}
    assert table == ({f"bfloat16 {SHAPE}": tile} if faster else {}) | {f"bfloat16 {SHAPE}, then norm": tile}
    assert ["wrong by" in r["failed"] for r in rows if r.get("failed")] == [True]
    assert ["shared memory" in r["not run"] for r in rows if r.get("not run")] == [True]
    assert rows[0]["backend"] == "cuDNN" and rows[0]["share"] == 2 * 9 * 128 * 256 * 256 / 1e15 * 1e6 / 10
    assert [r["apart / it"] for r in rows if "apart / it" in r] == [20 / 19, 30 / 29.9]


def test_tuning_in_float8(tuning):
    """Beside bfloat16 where the device has it: with what makes its input, and the fastest tile that is right."""
    bfloat16 = [10.0, 11.0, 12.0, *[13.0] * (len(triton_conv.LARGE_TILES) - 1), *[5.0] * 4]
    rows, table = tuning((9, 0), [*bfloat16, 1.0, 7.0, 4.0, 9.0, 20.0, 20.0, 30.0, 15.0])
    assert sum(" TMA" in r.get("backend", "") for r in rows) == len(triton_conv.LARGE_TILES)
    rows = [r for r in rows if r["case"].startswith("float8")]
    key, tile = f"float8_e4m3fn {SHAPE}", triton_conv.FLOAT8_TILES[2]
    assert table == {key: tile, f"{key}, then sum and norm": tile}
    assert [r.get("µs") for r in rows] == [1.0, 7.0, None, 4.0, 9.0, 20.0, 15.0] and "wrong by" in rows[2]["failed"]
    assert rows[3]["cuDNN bfloat16 / it"] == 2.5 and rows[3]["cuDNN bfloat16 / it and quantise"] == 2.0
    assert all(r["error"] < 4e-3 for r in (rows[1], rows[3]))


def test_the_stages_of_a_step_and_of_chains(no_gpu, monkeypatch):
    monkeypatch.setattr(network, "NGF", 4)
    monkeypatch.setattr(network, "SIDE", 8)
    monkeypatch.setattr(network, "BATCHES", (2,))
    monkeypatch.setattr(network, "CHAINS", ((2, 1),))
    monkeypatch.setattr(
        network, "checked", lambda score, want, most=0.1: 0.01
    )  # so small a network is no measure of bfloat16
    monkeypatch.setattr(network, "ENGINES", {
        "eager bfloat16": {"precision": "bfloat16", "executor": "eager"},
        "graph bfloat16": {"precision": "bfloat16", "executor": "graph", "graph": {"unroll": 8}},
    })  # fmt: skip
    monkeypatch.setattr(network, "PEERS", ("eager",))
    network.problem.cache_clear()
    monkeypatch.setattr(timing, "kernels_of", lambda step: (step(), (7, 0.001))[1])
    monkeypatch.setattr(timing, "milliseconds", lambda step: (step(), 5.0)[1])
    ours, peer, refused = network.step_times()
    network.problem.cache_clear()
    assert ours["kernels a step"] == 7 and 0 < ours["gaps"] < 1 and ours["score error"] == 0.01
    assert ours["share of roofline"] * ours["ms a step"] == pytest.approx(1e3 * (58e6 * 2 + 60e6) / 1e12)
    assert "executor='graph' needs a CUDA device" in refused["failed"]
    assert peer["images/s"] == 2 / (0.005 * 1001) and peer["engine is faster by"] == 5.0 / ours["ms a step"]
    (chain,) = rows_of(network.end_to_end())
    assert chain["failed"] is None and chain["images/s of 1,001 NFE"] > 0


def test_a_score_that_is_wrong_is_not_timed():
    want = torch.ones(2, 3)
    assert network.checked(want.bfloat16() * 1.01, want) < 0.1
    for wrong in (want * 1.2, want * float("nan")):
        with pytest.raises(RuntimeError, match="score differs from float32"):
            network.checked(wrong, want)


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
