"""The stages that come before a measurement: build, tests, sanitizer."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.gpu.stages import Row

GPU_TESTS = [
    f"tests/test_{name}.py"
    for name in ("gpu", "cuda", "triton", "triton_conv", "triton_float8", "triton_norm_backward", "graphs", "numerics")
]
RESULT = "(?P<result>PASSED|FAILED|ERROR|SKIPPED)"
TEST = r"(?P<file>tests/\w+\.py)::(?P<test>.+?)"
OUTCOME = (re.compile(rf"{RESULT} {TEST}\s*$"), re.compile(rf"^{TEST} {RESULT}\b"))  # of pytest -v -n, of pytest -v
ROOT = Path(__file__).resolve().parent.parent.parent


def shell(*command: str, **variables: str) -> str:
    """Output of a command run in the source tree; RuntimeError with its last lines if it fails."""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment() | variables)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} exited {run.returncode}: …{(run.stdout + run.stderr)[-1500:]}")
    return run.stdout + run.stderr


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


def build() -> list[Row]:
    """The C++ module and the CUDA library, this for the GPU at hand alone."""
    major, minor = torch.cuda.get_device_capability()
    archs = os.environ.get("SGM_CUDA_ARCHS") or f"{major}{minor}"
    shell(sys.executable, "-c", "import setup; setup.build(setup.ROOT)", SGM_CUDA_ARCHS=archs)
    make_importable()
    from sgm_engine.kernels import cuda

    if cuda.library() is None:
        raise RuntimeError(f"the build left no {cuda.PATH}")
    return []


def tests() -> Iterator[Row]:
    """pytest of all that knows a GPU, side by side where pytest-xdist is installed: most of the time is compilation."""
    workers = min(8, len(os.sched_getaffinity(0))) if importlib.util.find_spec("xdist") else 0
    parallel = ["-n", str(workers)] if workers > 1 else []
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", *parallel, "-k", "not host"]  # those run without a GPU too
    command = [sys.executable, "-m", "pytest", *options, *GPU_TESTS]
    found: dict[str, Counter] = {file: Counter() for file in GPU_TESTS}
    failures: list[str] = []
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    try:
        for line in run.stdout:
            if failures or re.match("=+ (FAILURES|ERRORS) =+", line):
                failures.append(line)
            elif (outcome := outcome_of(line)) and outcome[0] in found:
                file, test, result = outcome
                found[file][result] += 1
                if result in ("FAILED", "ERROR"):
                    yield {"case": f"{file}::{test}", "failed": result.lower()}
        run.wait()
    finally:
        run.kill()
    print("".join(failures)[-8000:], flush=True)
    for file, counts in found.items():
        said = ", ".join(f"{count} {result.lower()}" for result, count in sorted(counts.items()))
        yield {"case": file, "result": said or "no test", "failed": None if counts["PASSED"] else "no test passed"}
    if run.returncode:
        yield {"case": "pytest", "failed": f"exit status {run.returncode}"}


def outcome_of(line: str) -> tuple[str, str, str] | None:
    """(file, test, result) of a line of pytest -v, with or without -n."""
    match = next((match for pattern in OUTCOME if (match := pattern.search(line))), None)
    return match.group("file", "test", "result") if match else None


def sanitize() -> Iterator[Row]:
    """compute-sanitizer's four tools over every CUDA kernel, at once: most of their time is PyTorch's start."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise RuntimeError("not run: there is no compute-sanitizer")
    ours = ["--kernel-name", "kns=sgm"]
    # initcheck has to see who writes what our kernels read. Every tensor has memory of its own, or what is written
    # beyond one would lie in PyTorch's next.
    checks = {"memcheck": ours, "racecheck": ours, "synccheck": ours, "initcheck": []}
    alone = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, "-c", "from bench.gpu.kernels import exercise; exercise()"]
    runs = {}
    try:
        for check, kernels in checks.items():
            command = [tool, "--tool", check, "--error-exitcode", "9", *kernels, *program]
            runs[check] = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=alone
            )
        for check, run in runs.items():
            out, _ = run.communicate()
            summary = [line.strip("= \n") for line in out.splitlines() if re.search("(ERROR|RACECHECK) SUMMARY", line)]
            clean = run.returncode == 0 and bool(summary)
            yield {"case": check, "result": "; ".join(summary), "failed": None if clean else f"…{out[-1500:]}"}
    finally:
        for run in runs.values():
            run.kill()


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
    run = subprocess.run(
        [*command, sys.executable, "-c", "from bench.gpu.kernels import exercise; exercise()"],
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
