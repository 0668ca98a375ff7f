"""The command: ``python -m bench.gpu``."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

import bench.gpu
from bench.gpu.apart import apart
from bench.gpu.checks import ROOT, build, make_importable, ncu, tests
from bench.gpu.convolutions import convolutions
from bench.gpu.kernels import backends, kernels
from bench.gpu.network import end_to_end, step_times
from bench.gpu.runs import END_S, RUNS
from bench.gpu.sanitize import sanitize
from bench.gpu.stages import Row, Stage, run_stages, write_results
from sgm_engine.programs.arguments import Program, positive


def describe_machine() -> list[Row]:
    """One row; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    import triton

    properties = torch.cuda.get_device_properties(0)
    row = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    return [row]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Program("bench.gpu", bench.gpu.__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="also run compute-sanitizer's four tools")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="default: bench/results"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--run", choices=RUNS, help="one of the two commands for a GPU that is new")
    parser.add_argument("--minutes", type=positive, default=9.5, metavar="N", help="all stages together; default: 9.5")
    options = parser.parse_args(arguments)
    if options.run and (options.only or options.sanitize):
        parser.error("--run has its own stages: leave out --only and --sanitize")
    return options


# In this order. This process uses no CUDA: what does has a process of its own.
STAGES: dict[str, Callable[..., Iterable[Row]]] = {
    "build": build,
    "tests": tests,
    "sanitize": sanitize,
    "kernels": partial(apart, kernels),
    "backends": backends,
    "convolutions": convolutions,
    "ncu": ncu,
    "end-to-end": partial(apart, end_to_end, 120),
    "step": step_times,
}
# Seconds of each stage, at most, while another follows: what overruns keeps the rows it has.
LIMITS = {
    "build": 180,
    "tests": 300,
    "sanitize": 200,
    "kernels": 150,
    "convolutions": 300,  # some ninety kernels to compile
    "backends": 150,
    "ncu": 120,
    "end-to-end": 150,
    "step": 300,
}
TABLES = [ROOT / "kernels" / "tables" / name for name in ("conv.json", "backend.json")]  # what is found goes to --out
SHOWN = 5000  # characters of the results that are printed: all is in the files
OPTIONAL = ("sanitize", "convolutions", "backends", "ncu")  # two write the tables that layers and ops go by


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    machine: Row = next(apart(lambda: [("machine", describe_machine)]), {})
    if "gpu" not in machine:
        why = f": {machine['failed']}" if machine else ", so there is nothing to measure"
        print(f"bench.gpu: there is no CUDA device on this machine{why}", file=sys.stderr)
        return 2
    make_importable()
    arch, tables = str(machine["capability"]).replace(".", ""), {path: path.read_bytes() for path in TABLES}

    def record(done: list[Stage]) -> Path:
        for path, before in tables.items():
            if path.read_bytes() != before:
                shutil.copy(path, options.out)
        return write_results(options.out, machine, done, datetime.date.today())

    options.out.mkdir(parents=True, exist_ok=True)
    if options.run:
        run = RUNS[options.run]
        chosen, limits = run.stages(arch, options.out), run.limits
        seconds = run.seconds - END_S - (time.perf_counter() - bench.gpu.BEGAN)
    else:
        chosen, limits, seconds = _chosen(options, arch), LIMITS, options.minutes * 60
    done = run_stages(chosen, partial(print, flush=True), limits, seconds, record)
    path = record(done)
    text = path.read_text()
    print(text if len(text) < SHOWN else f"{text[:SHOWN]}\n…")
    print("\n".join(stage.summary() for stage in done))  # once more: the end of a long output is what is looked at
    print(f"written to {path} and {path.with_suffix('.json').name}")
    return 1 if any(stage.failed for stage in done) else 0


def _chosen(options: argparse.Namespace, arch: str) -> dict[str, Callable[[], Iterable[Row]]]:
    names = options.only or [
        name for name in STAGES if name not in OPTIONAL or (name == "sanitize" and options.sanitize)
    ]
    stages = STAGES | {
        "build": partial(build, arch),
        "tests": partial(tests, options.out),
        "sanitize": partial(sanitize, options.out),
    }
    return {name: stage for name, stage in stages.items() if name in names}


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # and not wait for a process that the driver holds on to
