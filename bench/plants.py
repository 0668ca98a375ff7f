"""Does the gate find what is planted? ``python -m bench.plants --times 20 --unchanged 9``: hours; fewer, fewer.

A clone of HEAD with every plant in it is built once: a commit, so that what the plants do to the compiler's choices is
in both trees. A line in its working tree wakes one: a function spins until its workload has taken a share more of CPU
time, or memory is kept twice. ``pytest bench/ --base HEAD`` must fail there on that workload, and pass while all sleep.
A row is a trial. Those of plants that do not meet in a workload share a run of pytest. They are kept in
bench/results/plants.json, so that another day adds to them; bench/results/plants.md is the table.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from bench.trees import ROOT, run
from bench.verdicts import FAIL, ORDER

SCRATCH = ROOT / "build" / "plants"
RESULTS = ROOT / "bench" / "results" / "plants.json"
CPP = """
#include <stdlib.h>
#include <time.h>
namespace {
struct Planted {
  static double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }
  static inline const double share = getenv("KEY") ? atof(getenv("KEY")) : 0;
  static inline int calls = 0;
  const bool pays = share > 0 && ++calls % EVERY == 0;
  const double began = pays ? now() : 0;
  ~Planted() {
    if (!pays) return;
    const double end = now() + EVERY * share * (now() - began);
    while (now() < end) {
    }
  }
};
}  // namespace
"""
PYTHON = """
def _planted(function):
    import functools, itertools, os, time

    share, calls = float(os.environ.get("KEY", 0)), itertools.count(1)
    if not share:
        return function

    @functools.wraps(function)
    def call(*args, **kwargs):
        if next(calls) % EVERY:
            return function(*args, **kwargs)
        began = time.thread_time()
        out = function(*args, **kwargs)
        end = time.thread_time()
        end += EVERY * share * (end - began)
        while time.thread_time() < end:
            pass
        return out

    return call

"""


@dataclass(frozen=True)
class Plant:
    """edits: (text that occurs once in ``file``, what takes its place). key: the variable of the environment that wakes
    it. case: of pytest, that must fail.

    every: one call in so many spins, for all of them, where to read the clock costs as much as what is planted.
    apart: others would be part of its workload. part: what the function has of its workload's time.
    """

    key: str
    file: str
    edits: tuple[tuple[str, str], ...]
    case: str
    every: int = 1
    apart: bool = False
    part: float = 1.0


def cpp(key: str, file: str, include: str, function: str, case: str, **options) -> Plant:
    edits = (include, include + CPP), (function, f"{function}\n  const Planted planted;")
    return Plant(key, file, edits, case, **options)


def python(key: str, file: str, before: str, function: str, case: str, **options) -> Plant:
    indent = " " * (len(function) - len(function.lstrip()))
    edits = (before, PYTHON + before), (function, f"{indent}@_planted\n{function}")
    return Plant(key, file, edits, case, **options)


PLANTS = {
    "a Winograd kernel": cpp(
        "SGM_PLANT_WINOGRAD",
        "csrc/cpu/executor/winograd.h",
        "#pragma once",
        "static void winograd(const Run& run, const Layer& layer, const Conv& conv) {",
        "test_time[convolutions 3x3 B=1]",
    ),
    "the norm": cpp(
        "SGM_PLANT_NORM",
        "csrc/cpu/norm.cpp",
        '#include "cpu/pool.h"',
        "void norm(const Norm& a) {",
        "test_time[norm f32 nhwc 1x128x32x32]",
        every=16,
        part=0.56,  # the rest is PyTorch's and Python's
    ),
    "Python's side of a request": python(
        "SGM_PLANT_REQUEST",
        "sgm_engine/engine/engine.py",
        "class Engine(Loop):",
        "    def sample(\n",
        "test_time[Python's side of a request]",
        apart=True,
    ),
    "packing": python(
        "SGM_PLANT_PACK",
        "sgm_engine/executors/native/executor.py",
        "class NativeNetwork:",
        "    def sync(self, states",
        "test_time[pack NCSN ngf 64]",
    ),
    "the PNG writer": python(
        "SGM_PLANT_PNG",
        "sgm_engine/outputs/images.py",
        "def save_png(",
        "def save_png(",
        "test_time[1,000 PNGs]",
        every=16,
    ),
    "packing, C++ alone": cpp(
        "SGM_PLANT_SET_CONV",
        "csrc/cpu/executor/build.cpp",
        '#include "cpu/executor/executor.h"',
        "void Executor::set_conv(int index, Array weight, Array bias) {",
        "test_time[pack NCSN ngf 64]",
        apart=True,
        part=0.77,  # the rest looks for what has changed
    ),
}
PACKED = "        self._packed()\n        self.model,"
TWICE = "        self._twice = b'1' * (self.graph.native.bytes() if 'KEY' in __import__('os').environ else 0)\n"
MEMORY = Plant(
    "SGM_PLANT_MEMORY",
    "sgm_engine/executors/native/executor.py",
    ((PACKED, TWICE + PACKED),),
    "test_count[an engine, NCSN ngf 64 B=8]",
)


def edited(plant: Plant, text: str) -> str:
    """ValueError if the file is no longer what the plant is written for."""
    for old, new in plant.edits:
        if text.count(old) != 1:
            raise ValueError(f"{plant.file} holds {old!r} {text.count(old)} times: adapt the plant")
        text = text.replace(old, new.replace("KEY", plant.key).replace("EVERY", str(plant.every)))
    return text


def scratch() -> None:
    """The clone: a commit on HEAD with every plant in it."""
    if not SCRATCH.exists():
        run("git", "clone", "-q", "--shared", ROOT, SCRATCH)
    plants = (*PLANTS.values(), MEMORY)
    before = {file: (file.read_text(), file.stat().st_mtime_ns) for file in {SCRATCH / plant.file for plant in plants}}
    run("git", "fetch", "-q", ROOT, "HEAD", cwd=SCRATCH)
    run("git", "checkout", "-q", "--force", "--detach", "FETCH_HEAD", cwd=SCRATCH)
    for plant in plants:
        file = SCRATCH / plant.file
        file.write_text(edited(plant, file.read_text()))
    for file, (text, when) in before.items():
        if file.read_text() == text:  # nothing to build
            os.utime(file, ns=(when, when))
    run("git", "-c", "user.name=bench", "-c", "user.email=@", "commit", "-qam", "Plants, asleep", cwd=SCRATCH)


def alarms(cases: list[str], seconds: int, awake: Mapping[str, str]) -> list[list[str]]:
    """The rows of each case, the plants awake against those asleep. RuntimeError if something else went wrong."""
    tests = [f"bench/test_base.py::{case}" for case in cases]
    command = [sys.executable, "-m", "pytest", *tests, "--base", "HEAD", f"--seconds={seconds}"]
    package = SCRATCH / "sgm_engine" / "__init__.py"
    asleep = package.read_text()
    try:
        package.write_text(asleep.replace('"""\n', f'"""\n__import__("os").environ.update({dict(awake)})\n', 1))
        done = subprocess.run(command, cwd=SCRATCH, capture_output=True, text=True)
    finally:
        package.write_text(asleep)
    said = [line for line in done.stdout.splitlines() if line.split(" ")[0] in ORDER]
    rows = [[line for line in said if case.partition("[")[2][:-1] in line] for case in cases]
    if done.returncode != any(line.startswith(FAIL) for line in said) or not all(rows):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-1000:])
    return rows


def limits(found: int, of: int, error: float = 0.025) -> tuple[float, float]:
    """Clopper and Pearson's, 95%, of the probability that ``found`` of ``of`` shows."""

    def at_least(k: int, p: float) -> float:
        return sum(math.comb(of, j) * p**j * (1 - p) ** (of - j) for j in range(k, of + 1))

    def solve(k: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(k, middle) < wanted else (low, middle)
        return low

    return solve(found, error) if found else 0.0, solve(found + 1, 1 - error) if found < of else 1.0


def table(trials: list[dict]) -> str:
    days, machines = sorted({t["date"][:10] for t in trials}), sorted({t["machine"] for t in trials})
    loads = sorted(t["load"] for t in trials)
    lines = [
        "# What the gate finds of what is planted\n",
        f"`python -m bench.plants`, {days[0]} to {days[-1]}, on {'; '.join(machines)}, with a load of "
        f"{loads[0]:.0f} to {loads[-1]:.0f}. The limits are those of Clopper and Pearson, 95%.\n",
        "| planted | alarms | of trials | probability of an alarm | a trial took, median |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(t["planted"] for t in trials):
        those = [t for t in trials if t["planted"] == name]
        found, took = sum(t["alarm"] for t in those), sorted(t["seconds"] for t in those)[len(those) // 2]
        low, high = limits(found, len(those))
        lines.append(f"| {name} | {found} | {len(those)} | {low:.2f} to {high:.2f} | {took:.0f} s |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plants", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="of each plant (default: 3)")
    parser.add_argument(
        "--unchanged", type=int, default=2, help="runs with nothing planted, six trials each (default: 2)"
    )
    parser.add_argument(
        "--seconds", type=int, default=55, help="of a workload, at most: more on a busy machine (default: 55)"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no trial after that many")
    parser.add_argument("--only", default="", metavar="TEXT", help="plants whose name contains TEXT")
    args = parser.parse_args()
    scratch()
    cases = sorted({plant.case for plant in (*PLANTS.values(), MEMORY)})
    runs = [((i + 0.9) / args.unchanged, {case: case for case in cases}, {}) for i in range(args.unchanged)]
    for i, apart, share in itertools.product(range(args.times), (False, True), (0.1, 0.05)):
        those = {f"+{share:.0%} in {name}": plant for name, plant in PLANTS.items() if plant.apart == apart}
        if not apart and share == 0.1:
            those["memory twice"] = MEMORY
        those = {name: plant for name, plant in those.items() if args.only in name}
        awake = {plant.key: f"{share / plant.part:.3f}" for plant in those.values()}
        if those:
            runs.append(((i + apart / 2) / args.times, {name: plant.case for name, plant in those.items()}, awake))
    trials, bad = json.loads(RESULTS.read_text()) if RESULTS.exists() else [], 0
    end = time.monotonic() + 60 * args.minutes
    for _, those, awake in sorted(runs, key=lambda run: run[0]):
        if (began := time.monotonic()) > end:
            break
        found = alarms(list(those.values()), args.seconds, awake)
        about = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round((time.monotonic() - began) / len(those)),
            "load": round(os.getloadavg()[0], 1),
            "machine": machine(),
        }
        for (name, _), rows in zip(those.items(), found, strict=True):
            alarm = any(row.startswith(FAIL) for row in rows)
            planted = name if awake else "nothing"
            trials.append({"planted": planted, "alarm": alarm, "rows": rows} | about)
            bad += alarm != bool(awake)
            print(planted, *rows, sep="\n  ", flush=True)
        RESULTS.write_text(json.dumps(trials, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(trials))
    return int(bool(bad))


def machine() -> str:
    from bench.common import about

    return f"{os.cpu_count()} cores of {about()['device']}"


if __name__ == "__main__":
    sys.exit(main())
