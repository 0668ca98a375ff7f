"""The command: ``python -m bench.gpu``."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

import bench.gpu
from bench.gpu.checks import ROOT, build, make_importable, ncu, sanitize, tests
from bench.gpu.convolutions import convolutions
from bench.gpu.kernels import backends, kernels
from bench.gpu.network import end_to_end, step_times
from bench.gpu.stages import Row, run_stages, write_results


def describe_machine() -> Row:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=bench.gpu.__doc__.splitlines()[0])
    parser.add_argument("--sanitize", action="store_true", help="also run compute-sanitizer's four tools")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="default: bench/results"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--minutes", type=float, default=9.5, metavar="N", help="all stages together; default: 9.5")
    return parser.parse_args(arguments)


STAGES: dict[str, Callable[[], Iterable[Row]]] = {
    "build": build,
    "tests": tests,
    "sanitize": sanitize,
    "kernels": kernels,
    "convolutions": convolutions,
    "backends": backends,
    "ncu": ncu,
    "step": step_times,
    "end-to-end": end_to_end,
}


# Seconds of each stage, at most: what overruns keeps the rows it has, and the next stage has its own time.
LIMITS = {
    "build": 240,
    "tests": 300,
    "sanitize": 200,
    "kernels": 150,
    "convolutions": 480,  # some ninety kernels to compile
    "backends": 300,
    "ncu": 120,
    "step": 240,
    "end-to-end": 90,
}
OPTIONAL = ("sanitize", "convolutions", "backends", "ncu")  # two write the tables that layers and ops go by


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: there is no CUDA device on this machine, so there is nothing to measure", file=sys.stderr)
        return 2
    make_importable()
    names = options.only or [
        name for name in STAGES if name not in OPTIONAL or (name == "sanitize" and options.sanitize)
    ]
    machine, today = describe_machine(), datetime.date.today()
    chosen = {name: STAGES[name] for name in STAGES if name in names}
    record = partial(write_results, options.out, machine, today=today)
    stages = run_stages(chosen, partial(print, flush=True), LIMITS, options.minutes * 60, record)
    path = record(stages)
    print(path.read_text())
    print(f"written to {path} and {path.with_suffix('.json').name}")
    return 1 if any(stage.failed for stage in stages) else 0


if __name__ == "__main__":
    sys.exit(main())
