"""Does the gate find what is planted? ``python -m bench.plants --times 20 --unchanged 9``: hours; fewer, fewer.

A clone of HEAD with every plant in it is built once: a commit, so that what the plants do to the compiler's choices is
in both trees. A line in its working tree wakes one: a function spins until its workload has taken a share more of CPU
time, or memory is kept twice. ``pytest bench/ --base HEAD`` must fail there on that workload, and pass while all sleep.
A row is a trial. Those of plants that do not meet in a workload share a run of pytest. They are kept in
bench/results/plants.json, so that another day adds to them; bench/results/plants.md is the table.
"""

from __future__ import annotations

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

from bench.common import about as device
from bench.trees import ROOT, run
from bench.trials import table
from bench.verdicts import FAIL, ORDER
from sgm_engine.programs.arguments import Program, at_least, positive

SCRATCH = ROOT / "build" / "plants"
RESULTS = ROOT / "bench" / "results" / "plants.json"
CPP = """
#include <stdlib.h>
#include <time.h>
namespace {
struct KEY {
  static double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }
  static inline const double share = getenv("KEY") ? atof(getenv("KEY")) : 0;
  static inline int calls = 0;
  const bool pays = share > 0 && ++calls % EVERY == 0;
  const double began = pays ? now() : 0;
  ~KEY() {
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
    edits = (include, include + CPP), (function, f"{function}\n  const KEY planted;")
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
TWICE = (
    "        self._twice = b'1' * (self.graph.native.bytes() if float(__import__('os').environ.get('KEY', 0)) else 0)\n"
)
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


def woken(package: str, shares: Mapping[str, str]) -> str:
    """sgm_engine/__init__.py with the plants of ``shares`` awake, by key, and all others asleep, whatever a parent's
    environment says."""
    shares = {plant.key: shares.get(plant.key, "0") for plant in (*PLANTS.values(), MEMORY)}
    return package.replace('"""\n', f'"""\n__import__("os").environ.update({shares})\n', 1)


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
    package = SCRATCH / "sgm_engine" / "__init__.py"
    package.write_text(woken(package.read_text(), {}))
    run("git", "-c", "user.name=bench", "-c", "user.email=@", "commit", "-qam", "Plants, asleep", cwd=SCRATCH)


def alarms(cases: list[str], seconds: int, awake: Mapping[str, str]) -> list[list[str]]:
    """The rows of each case, the plants awake against those asleep. RuntimeError if something else went wrong."""
    tests = [f"bench/test_base.py::{case}" for case in cases]
    command = [sys.executable, "-m", "pytest", *tests, "--base", "HEAD", f"--seconds={seconds}"]
    package = SCRATCH / "sgm_engine" / "__init__.py"
    asleep = package.read_text()
    try:
        package.write_text(woken((ROOT / "sgm_engine" / "__init__.py").read_text(), awake))
        done = subprocess.run(command, cwd=SCRATCH, capture_output=True, text=True)
    finally:
        package.write_text(asleep)
    said = [line for line in done.stdout.splitlines() if line.split(" ")[0] in ORDER]
    rows = [[line for line in said if case.partition("[")[2][:-1] in line] for case in cases]
    if done.returncode != any(line.startswith(FAIL) for line in said) or not all(rows):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-1000:])
    return rows


def main() -> int:
    parser = Program("bench.plants", __doc__.splitlines()[0])
    parser.add_argument("--times", type=at_least(0), default=3, metavar="N", help="of each plant")
    parser.add_argument("--unchanged", type=at_least(0), default=2, metavar="N",
        help="runs with nothing planted, six trials each")  # fmt: skip
    parser.add_argument("--seconds", type=at_least(1), default=55, metavar="N",
        help="of a workload, at most: more on a busy machine")  # fmt: skip
    parser.add_argument("--minutes", type=positive, metavar="X", help="begin no trial after that many")
    parser.add_argument("--only", metavar="TEXT", help="plants whose name contains TEXT")
    args = parser.parse_args()
    scratch()
    cases = sorted({plant.case for plant in (*PLANTS.values(), MEMORY)})
    runs = [((i + 0.9) / args.unchanged, {case: case for case in cases}, {}) for i in range(args.unchanged)]
    for i, apart, share in itertools.product(range(args.times), (False, True), (0.1, 0.05)):
        those = {f"+{share:.0%} in {name}": plant for name, plant in PLANTS.items() if plant.apart == apart}
        if not apart and share == 0.1:
            those["memory twice"] = MEMORY
        those = {name: plant for name, plant in those.items() if (args.only or "") in name}
        awake = {plant.key: f"{share / plant.part:.3f}" for plant in those.values()}
        if those:
            runs.append(((i + apart / 2) / args.times, {name: plant.case for name, plant in those.items()}, awake))
    trials, bad = json.loads(RESULTS.read_text()) if RESULTS.exists() else [], 0
    end = time.monotonic() + 60 * (args.minutes or math.inf)
    for _, those, awake in sorted(runs, key=lambda run: run[0]):
        if (began := time.monotonic()) > end:
            break
        found = alarms(list(those.values()), args.seconds, awake)
        about = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round((time.monotonic() - began) / len(those)),
            "load": round(os.getloadavg()[0], 1),
            "machine": f"{os.cpu_count()} cores of {device()['device']}",
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


if __name__ == "__main__":
    sys.exit(main())
