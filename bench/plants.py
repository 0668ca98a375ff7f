"""Does the gate find what is planted? ``python -m bench.plants --times 20 --unchanged 50``: many hours; fewer, fewer.

In a scratch clone at HEAD, a function spins for a share of its own CPU time after each call, or keeps memory twice;
``pytest bench/ --base HEAD`` must fail on the workload that uses it, and pass where nothing is planted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.trees import ROOT, run
from bench.verdicts import FAIL, ORDER

SCRATCH = ROOT / "build" / "plants"
CPP = """
#include <time.h>
namespace {
struct Planted {
  static double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }
  static inline int calls = 0;
  const bool pays = ++calls % EVERY == 0;
  const double began = pays ? now() : 0;
  ~Planted() {
    if (!pays) return;
    const double end = now() + EVERY * SHARE * (now() - began);
    while (now() < end) {
    }
  }
};
}  // namespace
"""
PYTHON = """
def _planted(function):
    import functools, itertools, time

    calls = itertools.count(1)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if next(calls) % EVERY:
            return function(*args, **kwargs)
        began = time.thread_time()
        out = function(*args, **kwargs)
        end = time.thread_time()
        end += EVERY * SHARE * (end - began)
        while time.thread_time() < end:
            pass
        return out

    return call

"""


@dataclass(frozen=True)
class Plant:
    """edits: (text that occurs once in ``file``, what takes its place). case: of pytest, that must fail.

    every: one call in so many spins, for all of them, where to read the clock costs as much as what is planted.
    """

    file: str
    edits: tuple[tuple[str, str], ...]
    case: str
    every: int = 1


def cpp(file: str, include: str, function: str, case: str, every: int = 1) -> Plant:
    return Plant(file, ((include, include + CPP), (function, f"{function}\n  const Planted planted;")), case, every)


def python(file: str, before: str, function: str, case: str, every: int = 1) -> Plant:
    indent = " " * (len(function) - len(function.lstrip()))
    return Plant(file, ((before, PYTHON + before), (function, f"{indent}@_planted\n{function}")), case, every)


PLANTS = {
    "a Winograd kernel": cpp(
        "csrc/cpu/executor/winograd.h",
        "#pragma once",
        "static void winograd(const Run& run, const Layer& layer, const Conv& conv) {",
        "test_time[convolutions 3x3 B=1]",
    ),
    "the norm": cpp(
        "csrc/cpu/norm.cpp",
        '#include "cpu/pool.h"',
        "void norm(const Norm& a) {",
        "test_time[norm f32 nhwc 1x128x32x32]",
        every=16,
    ),
    "Python's side of a request": python(
        "sgm_engine/engine/engine.py",
        "class Engine(Loop):",
        "    def sample(\n",
        "test_time[Python's side of a request]",
    ),
    "packing": cpp(
        "csrc/cpu/executor/build.cpp",
        '#include "cpu/executor/internal.h"',
        "void Executor::set_conv(int index, Array weight, Array bias) {",
        "test_time[pack convolutions 3x3]",
    ),
    "the PNG writer": python(
        "sgm_engine/outputs/images.py",
        "def save_png(",
        "def save_png(",
        "test_time[1,000 PNGs]",
        every=16,
    ),
}
PACKED = "        self._packed()\n        self.model,"
MEMORY = Plant(
    "sgm_engine/executors/native/executor.py",
    ((PACKED, "        self._twice = b'1' * self.graph.native.bytes()\n" + PACKED),),
    "test_count[an engine, NCSN ngf 64 B=8]",
)


def edited(plant: Plant, text: str, share: float) -> str:
    """ValueError if the file is no longer what the plant is written for."""
    for old, new in plant.edits:
        if text.count(old) != 1:
            raise ValueError(f"{plant.file} holds {old!r} {text.count(old)} times: adapt the plant")
        text = text.replace(old, new.replace("SHARE", str(share)).replace("EVERY", str(plant.every)))
    return text


def alarm(cases: Iterable[str], seconds: int) -> bool:
    """Whether the scratch tree is worse than HEAD in one of the cases. RuntimeError if that was not told."""
    tests = [f"bench/test_base.py::{case}" for case in sorted(set(cases))]
    command = [sys.executable, "-m", "pytest", *tests, "--base", "HEAD", f"--seconds={seconds}"]
    done = subprocess.run(command, cwd=SCRATCH, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.split(" ")[0] in ORDER]
    worse = [line for line in rows if line.startswith(FAIL)]
    if done.returncode != bool(worse) or not rows:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-1000:])
    print("\n".join(rows), flush=True)
    return bool(worse)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plants", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="of each plant (default: 3)")
    parser.add_argument("--unchanged", type=int, default=10, help="comparisons with nothing planted (default: 10)")
    parser.add_argument(
        "--seconds", type=int, default=55, help="of a workload, at most: more on a busy machine (default: 55)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="plants whose name contains TEXT")
    args = parser.parse_args()
    plants = {f"+{share:.0%} in {name}": (plant, share) for name, plant in PLANTS.items() for share in (0.1, 0.05)}
    plants = {name: p for name, p in (plants | {"memory twice": (MEMORY, 0)}).items() if args.only in name}
    if not SCRATCH.exists():
        run("git", "clone", "-q", "--shared", ROOT, SCRATCH)
    run("git", "fetch", "-q", ROOT, "HEAD", cwd=SCRATCH)
    run("git", "checkout", "-q", "--force", "--detach", "FETCH_HEAD", cwd=SCRATCH)
    missed, alarms = 0, 0
    for i in range(args.unchanged):
        alarms += alarm([plant.case for plant, _ in plants.values()], args.seconds)
        print(f"nothing planted: {alarms} alarms in {i + 1} comparisons", flush=True)
    for name, (plant, share) in plants.items():
        file, found = Path(SCRATCH, plant.file), 0
        before = file.read_text()
        try:
            file.write_text(edited(plant, before, share))
            for i in range(args.times):
                found += alarm([plant.case], args.seconds)
                print(f"{name}: found {found} of {i + 1}", flush=True)
        finally:
            file.write_text(before)
        missed += args.times - found
    return int(bool(missed or alarms))


if __name__ == "__main__":
    sys.exit(main())
