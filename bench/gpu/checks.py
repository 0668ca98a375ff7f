"""The stages in which nothing is timed: build, tests, and what Nsight Compute says."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.gpu.stages import Row

PYTEST = ("-v", "-o", "addopts=", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.gpu.lost_device")
TEST_S = 120  # of a test: what takes longer hangs

GPU_TESTS = [
    f"tests/{room}/test_{name}.py"
    for room, names in (
        ("executors", "gpu gpu_memory graphs buckets"),
        ("kernels", "cuda cuda_norm cuda_whole triton triton_update triton_norm triton_conv triton_conv_table"),
        ("kernels", "triton_float8 triton_norm_backward"),
        ("engine", "numerics"),
    )
    for name in names.split()
]
RESULT = "(?P<result>PASSED|FAILED|ERROR|SKIPPED)"
TEST = r"(?P<file>tests/[\w/]+\.py)::(?P<test>.+?)"
OUTCOME = (re.compile(rf"{RESULT} {TEST}\s*$"), re.compile(rf"^{TEST} {RESULT}\b"))  # of pytest -v -n, of pytest -v
ROOT = Path(__file__).resolve().parent.parent.parent


def shell(*command: str, **variables: str) -> str:
    """Output of a command run in the source tree; RuntimeError with its last lines if it fails."""
    with running(list(command), **variables) as run:
        said, _ = run.communicate()
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {run.returncode}: …{said[-1500:]}")
    return said


def environment() -> dict[str, str]:
    """This process's import path for its children, whose own folder must not come first (PYTHONSAFEPATH)."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTHONSAFEPATH": "1",
        "SGM_WITH_CUDA": "1",
    }


def make_importable() -> None:
    """This tree's modules come first, whatever is installed."""
    sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p) != ROOT)]


def build(arch: str) -> list[Row]:
    """The C++ module and the CUDA library, this for the GPU at hand alone."""
    archs = os.environ.get("SGM_CUDA_ARCHS") or arch
    shell(sys.executable, "-c", "import setup; setup.build(setup.ROOT)", SGM_CUDA_ARCHS=archs)
    make_importable()
    from sgm_engine.kernels import cuda

    if cuda.library() is None:
        raise RuntimeError(f"the build left no {cuda.PATH}")
    return []


def tests(folder: Path) -> Iterator[Row]:
    """pytest of all that knows a GPU, side by side where pytest-xdist is installed. All that it says: tests.log."""
    there = importlib.util.find_spec
    workers = min(12, len(os.sched_getaffinity(0))) if there("xdist") else 0
    parallel = ["-n", str(workers)] if workers > 1 else []
    # By thread: a kernel that hangs takes no signal; its process ends, and pytest-xdist starts another one.
    limit = [f"--timeout={TEST_S}", "--timeout-method=thread"] if parallel and there("pytest_timeout") else []
    options = [*PYTEST, *parallel, *limit, "-k", "not host and not order_of_threads"]  # those run without a GPU too
    found: dict[str, Counter] = {file: Counter() for file in GPU_TESTS}
    failures: list[str] = []
    bad: set[str] = set()
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}  # of files, which go on counting when they have been handed out
    with running([sys.executable, "-m", "pytest", *options, *GPU_TESTS]) as run, open(folder / "tests.log", "w") as log:
        for line in run.stdout:
            log.write(line)
            log.flush()
            if failures or re.match("=+ (FAILURES|ERRORS) =+", line):
                failures.append(line)
            elif (outcome := outcome_of(line)) and outcome[0] in found:
                file, test, result = outcome
                found[file][result] += 1
                if file not in rows:
                    yield rows.setdefault(file, {"case": file})
                rows[file] |= _counted(found[file])
                if result in ("FAILED", "ERROR") and (case := f"{file}::{test}") not in bad:
                    bad.add(case)
                    yield {"case": case, "failed": result.lower()}
        status = run.wait()
    print("".join(failures)[:6000], flush=True)
    for file in (file for file in found if file not in rows):
        yield {"case": file, **_counted(found[file])}
    if status:
        yield {"case": "pytest", "failed": f"exit status {status}"}


def _counted(counts: Counter) -> Row:
    said = ", ".join(f"{count} {result.lower()}" for result, count in sorted(counts.items()))
    return {"result": said or "no test", "failed": None if counts["PASSED"] else "no test passed"}


@contextmanager
def running(command: list[str], out: object = subprocess.PIPE, **variables: str) -> Iterator[subprocess.Popen]:
    """A command in the source tree, all that it says going to ``out``; then it is gone, and what it has started."""
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=environment() | variables, start_new_session=True,
    )  # fmt: skip
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def outcome_of(line: str) -> tuple[str, str, str] | None:
    """(file, test, result) of a line of pytest -v, with or without -n."""
    match = next((match for pattern in OUTCOME if (match := pattern.search(line))), None)
    return match.group("file", "test", "result") if match else None


def ncu() -> list[Row]:
    """Nsight Compute's view of every kernel of the library, where it is installed and may read the counters."""
    tool = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if tool is None:
        raise RuntimeError("not run: there is no ncu")
    metrics = {
        "memory %": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
        "compute %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    }
    command = [tool, "--csv", "--page", "raw", "--metrics", ",".join(metrics.values()), "--kernel-name", "regex:sgm"]
    command += ["--clock-control", "none"]  # the clocks are not ours to change
    run = subprocess.run(
        [*command, sys.executable, "-c", "from bench.gpu import exercise; exercise.cuda()"],
        cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=500,
    )  # fmt: skip
    if run.returncode or "ERR_NVGPUCTRPERM" in run.stdout:
        raise RuntimeError(f"not run: ncu exited {run.returncode}: …{(run.stdout + run.stderr)[-500:]}")
    return ncu_rows(run.stdout, metrics)


def ncu_rows(text: str, metrics: dict[str, str]) -> list[Row]:
    """The worst launch of each kernel in ncu's raw CSV, which begins with lines that are not CSV; row 2 holds units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    worst: dict[str, Row] = {}
    for record in list(csv.DictReader(lines))[1:]:
        row: Row = {"case": record["Kernel Name"].split("(")[0]}
        row |= {name: float(record[metric].replace(",", "")) for name, metric in metrics.items()}
        before = worst.setdefault(str(row["case"]), row)
        if row["memory %"] < before["memory %"]:
            worst[str(row["case"])] = row
    return list(worst.values())
