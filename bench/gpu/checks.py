"""The stages that come before a measurement: build, tests, sanitizer."""

from __future__ import annotations

import atexit
import csv
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.gpu.stages import Row

GPU_TESTS = [
    f"tests/test_{name}.py"
    for name in ("cuda", "triton", "triton_conv", "triton_float8", "executor", "graphs", "numerics")
]
ROOT = Path(__file__).resolve().parent.parent.parent


def shell(*command: str, timeout: float = 500) -> str:
    """Output of a command run in the source tree; RuntimeError with its last lines if it fails."""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment())
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
    """In a source tree that is not installed nothing maps kernels/ to sgm_engine.kernels: a folder of links does."""
    sys.path[:] = [str(ROOT), *(p for p in sys.path if p and Path(p) != ROOT)]
    if importlib.util.find_spec("sgm_engine.kernels") is not None:
        return
    overlay = Path(tempfile.mkdtemp(prefix="sgm-bench-"))
    atexit.register(shutil.rmtree, overlay)
    (overlay / "sgm_engine").mkdir()
    for entry in [*(ROOT / "sgm_engine").iterdir(), ROOT / "kernels"]:
        (overlay / "sgm_engine" / entry.name).symlink_to(entry)
    sys.path.insert(0, str(overlay))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sgm_engine"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def build() -> list[Row]:
    shell(sys.executable, "setup.py", "build_ext", "--inplace")
    make_importable()
    from sgm_engine.kernels import cuda

    if cuda.library() is None:
        raise RuntimeError(f"the build left no {cuda.PATH}")
    return []


def tests() -> list[Row]:
    rows: list[Row] = []
    for file in GPU_TESTS:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rs", file],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment(),
            timeout=400,
        )
        summary = run.stdout.strip().splitlines()[-1:] or ["no output"]
        rows.append(
            {"case": file, "result": summary[0], "failed": None if run.returncode == 0 else f"…{run.stdout[-1500:]}"}
        )
    return rows


def sanitize() -> list[Row]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise RuntimeError("not run: there is no compute-sanitizer")
    rows: list[Row] = []
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--kernel-regex", "kns=sgm"]
        run = subprocess.run(
            [*command, sys.executable, "-c", "from bench.gpu.kernels import exercise; exercise()"],
            cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=400,
        )  # fmt: skip
        out = run.stdout + run.stderr
        summary = [
            line.strip("= ") for line in out.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line
        ]
        clean = run.returncode == 0 and bool(summary)
        rows.append({"case": check, "result": "; ".join(summary), "failed": None if clean else f"…{out[-1500:]}"})
    return rows


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
