"""The two commands for a GPU that is new: their stages, what they compile beforehand, and what they leave."""

import json
import math
import os
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import triton

import bench.gpu
from bench.gpu import __main__ as gpu
from bench.gpu import checks, compiling, convolutions, counts, network, runs, stages
from sgm_engine.kernels.triton.launch import Launch


def test_the_counts_of_a_step():
    """Of the accelerated NCSN on CIFAR-10, each by hand from its definition."""
    ops = counts.step()
    found = Counter(op.kind for op in ops)
    assert (found["convolution"], found["bias"], found["norm"]) == (75, 2, 71)
    assert counts.total(ops, "kernels") == 75 + 2 + 2 * 71 + 4 + 7 == 230  # sums, and what there is one of
    convolutions_of = {
        "res1": 4 * 128 * 128 * 9 * 32**2,
        "res2": (128 * 128 * 9 * 32**2) + (128 * 256 * 16 * 16**2) + 2 * 256 * 256 * 9 * 16**2 + 128 * 256 * 16**2,
        "res3, res4": 2 * 5 * 256 * 256 * 9 * 16**2,
        "refine1": (4 + 2 + 2) * 256 * 256 * 9 * 16**2,
        "refine2": (8 + 2 + 2 + 2) * 256 * 256 * 9 * 16**2,
        "refine3": (8 * 256 * 256 + 2 * 256 * 128 + 4 * 128 * 128) * 9 * 16**2,
        "refine4": (4 + 1 + 2 + 6) * 128 * 128 * 9 * 32**2 + (4 + 1) * 128 * 128 * 9 * 16**2,
        "the ends": 2 * 3 * 128 * 9 * 32**2,
    }
    assert counts.total(ops, "flops") == 2 * sum(convolutions_of.values())
    biased = (128 + 3) * 32**2  # the first convolution, which two read, and the last
    assert counts.moved(ops, "bias") == 2 * 2 * biased
    biases = Counter(op.form[4:] for op in ops if op.kind == "norm")  # of 19
    assert biases[True, False] + biases[False, True] + 2 * biases[True, True] == 25


def test_what_the_bench_goes_by_are_the_counts():
    ops = counts.step()
    for assumed, counted in (
        (network.FLOPS, counts.total(ops, "flops")),
        (network.BYTES, counts.floor(ops)),
        (network.WEIGHTS, counts.total(ops, "weights")),
    ):
        assert assumed == pytest.approx(counted, rel=1e-3)
    found = counts.convolutions(ops)
    assert set(convolutions.SHAPES) == set(found) and found[128, 128, 16, 1] == 9 and (128, 256, 16, 1) not in found
    work = {shape: found[shape] * shape[0] * shape[1] * shape[2] ** 2 for shape in convolutions.SHAPES}
    assert list(work.values()) == sorted(work.values(), reverse=True)
    assert sum(work[s] for s in runs.SHAPES) / sum(work.values()) > 0.9


def test_the_counts_as_they_are_printed(capsys):
    print("\n".join(counts.lines(counts.step())))
    said = capsys.readouterr().out
    assert "bias                        2        2            0.00    0.07\n" in said
    assert "3×3 256→256 at 16², dilation 1: 32, 49.8% of the operations\n" in said


@triton.jit
def wrong_kernel(x_ptr, SIZE: triton.language.constexpr):
    no_such_name(SIZE)  # noqa: F821


def test_kernels_compile_side_by_side(tmp_path, monkeypatch):
    """Into Triton's cache, one that is launched twice once; one that does not compile is a row."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(8, 32, 4, 4, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    good = compiling.of_norm(tuple(x.shape[1:]), {"activation": "elu"})
    launches = [*enumerate(good), *enumerate(good), ("wrong", Launch(wrong_kernel, 1, {"x_ptr": x}, {"SIZE": 1}))]
    row, failed = compiling.compiling(90, lambda: iter(launches))
    assert (row["compiled"], row["of"]) == (2, 3) and row["s of a core"] > 0
    assert failed["case"] == "wrong" and "no_such_name" in failed["failed"]
    assert len(list(tmp_path.glob("*/*.cubin"))) == 2


def test_what_is_to_be_compiled_is_found_in_another_process(monkeypatch):
    """PyTorch's threads do not survive a fork, and every stage after this one forks."""
    here, step = os.getpid(), counts.step

    def elsewhere(ngf, side):
        assert os.getpid() != here
        return step(ngf, side)

    monkeypatch.setattr(counts, "step", elsewhere)
    names = [name for name, _ in compiling.of_step(4, 8)]
    assert len(names) == 2 * 71 + 4


def fake_run(monkeypatch, tmp_path, made, spent):
    """A run of 60 s, of which some are spent when its stages begin."""
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: bench.gpu.BEGAN + spent))
    table = tmp_path / "conv.json"
    table.write_text("{}")
    monkeypatch.setattr(gpu, "TABLES", [table])
    monkeypatch.setattr(gpu, "describe_machine", lambda: [{"gpu": "fake", "capability": "9.0"}])
    monkeypatch.setattr(gpu, "make_importable", lambda: None)
    monkeypatch.setitem(gpu.RUNS, "first", runs.Run(60, {}, lambda arch, folder: made(arch, folder, table)))
    return gpu.main(["--run", "first", "--out", str(tmp_path / "out")])


def test_what_a_run_leaves(monkeypatch, tmp_path):
    """Rows with times by kernel name, and the tables that it wrote: they come back from --out alone."""
    by_name = [{"kernel": "stats", "launches": 71, "ms": 0.5, "share": 0.1}]

    def made(arch, folder, table):
        def step():
            table.write_text('{"fake": {}}')
            yield {"case": "engine", "batch": 128, "cuDNN timed": False, "ms a step": 5.0, "by kernel name": by_name}

        return {arch: step}

    assert fake_run(monkeypatch, tmp_path, made, spent=5) == 0
    found = {path.name.split("-")[-1]: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert set(found) == {"conv.json", "fake.json", "fake.md"} and found["conv.json"] == '{"fake": {}}'
    (stage,) = json.loads(found["fake.json"])["stages"]
    assert stage["name"] == "90" and stage["rows"][0]["by kernel name"] == by_name
    title = "### engine 128 cuDNN not timed, by kernel name\n\n| kernel | launches | ms | share |"
    assert title in found["fake.md"] and "| stats | 71 | 0.5 | 0.1 |" in found["fake.md"]
    assert "| case | batch | cuDNN timed | ms a step |\n" in found["fake.md"]


def test_a_run_ends_when_its_time_is_over(monkeypatch, tmp_path):
    """Whatever its last stage still does, with the time to end taken off; the table that it had begun stays."""
    began = time.perf_counter()

    def made(arch, folder, table):
        def slow():
            yield {"case": "measured"}
            time.sleep(60)

        return {"fast": lambda: [{"case": "done"}], "slow": slow}

    assert fake_run(monkeypatch, tmp_path, made, spent=60 - runs.END_S - 1) == 1
    assert time.perf_counter() - began < 20
    (path,) = (tmp_path / "out").glob("*-fake.json")
    fast, slow = json.loads(path.read_text())["stages"]
    assert fast["failed"] is None and slow["rows"] == [{"case": "measured"}]
    assert slow["failed"] == "stopped after 1 s, its share of the time"


def test_the_runs():
    """Within a command's ten minutes, and both within the fifteen of a machine; what matters most first."""
    assert sum(run.seconds for run in runs.RUNS.values()) <= 13 * 60 and runs.RUNS["first"].seconds <= 560
    for run in runs.RUNS.values():
        made = run.stages("90", checks.ROOT)
        *early, last = made
        assert list(run.limits) == list(made) and run.limits[last] == math.inf
        assert sum(run.limits[name] for name in early) + runs.END_S <= run.seconds
    first = [name for name, _ in network.core()]
    assert first[:4] == [f"{name} at {batch}" for batch in (128, 1) for name in network.CORE_ENGINES]
    assert len(first) == 4 + 8 and all("compile" in name for name in first[-4:])
    tiles = runs.work().tiles
    assert 3 <= len(tiles) <= 4 and runs.work().shapes[0] == (256, 256, 16, 1)


def test_a_run_takes_no_stages(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--run", "first", "--only", "tests"])
    assert "--run has its own stages" in capsys.readouterr().err


def test_like_is_compared_with_like(monkeypatch):
    rows = [
        {"case": "engine a", "batch": 1, "cuDNN timed": True, "ms a step": 2.0},
        {"case": "engine b", "batch": 1, "cuDNN timed": False, "ms a step": 3.0},
        {"case": "eager", "batch": 1, "cuDNN timed": False, "ms a step": 12.0},
        {"case": "eager", "batch": 1, "cuDNN timed": True, "ms a step": 12.0},
        {"case": "eager", "batch": 128, "cuDNN timed": True, "ms a step": 12.0},
    ]
    monkeypatch.setattr(network, "apart", lambda cases, seconds: iter(rows))
    assert [row.get("engine is faster by") for row in network.step_times(network.core)] == [None, None, 4.0, 6.0, None]


def test_tests_that_are_cut_off_leave_what_they_had(tmp_path, monkeypatch):
    """The counts so far of each file, and why what failed did."""
    (tmp_path / "tests").mkdir()
    body = "import time\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_long(): time.sleep(60)\n"
    (tmp_path / "tests" / "test_one.py").write_text(body)
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "GPU_TESTS", ["tests/test_one.py"])
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)

    def until_it_is_long():
        for row in checks.tests(tmp_path):
            yield row
            if row.get("failed") == "failed":
                raise stages.Overrun

    (stage,) = stages.run_stages({"tests": until_it_is_long}, lambda line: None)
    assert stage.rows[0] == {"case": "tests/test_one.py", "result": "1 failed, 1 passed", "failed": None}
    assert stage.failed.startswith("tests/test_one.py::test_bad: failed; stopped after")
