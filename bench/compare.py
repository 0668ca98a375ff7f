"""Did a kernel get slower? ``python -m bench.compare BASE`` compares revision BASE with the working tree.

Both are built and installed side by side on this machine. Fresh processes time every workload, one thread, in the
order A B B A …, so that a drift of the machine's speed cancels within a pair. A workload fails when the lower 95%
bound of its median ratio (working tree / BASE) is above 1.05, twice in a row. Exact counts are compared too: the
registers of every GPU kernel (compiled for sm_90) may not take another allocation unit, and where valgrind is present,
the instructions that the C++ kernels execute may grow by 2%.

Exit status: 0 no workload is slower, 1 at least one is, 2 the comparison could not be made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
SLOWER, PAIRS, MORE_INSTRUCTIONS = 1.05, 16, 1.02


class CannotCompare(Exception):
    """Something other than speed stands in the way."""


def lower_bound(ratios: list[float], confidence: float = 0.95) -> float:
    """A lower confidence bound of the median, from order statistics: exact, whatever the distribution.

    P(median < k-th smallest of n) = Σ_{i<k} C(n, i)/2ⁿ; the largest k that keeps this ≤ 1 − confidence.
    """
    n, ordered, tail, k = len(ratios), sorted(ratios), 0.0, 0
    while tail + math.comb(n, k) / 2**n <= 1 - confidence:
        tail += math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        raise ValueError(f"{n} pairs are too few for a {confidence:.0%} bound")
    return ordered[k - 1]


def run(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise CannotCompare(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def install(source: Path, target: Path) -> None:
    """Build the tree at ``source`` as a package under ``target``, apart from what this environment has."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*command, "--target", str(target), str(source)], source, os.environ | {"SGM_WITH_CUDA": "0"})


def environment(package: Path, runner: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package), str(runner)]),
        "SGM_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # glibc keeps what is freed: a fresh mapping a call would time the kernel's page faults, not ours
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    }


def measure(package: Path, runner: Path, names: list[str]) -> dict[str, float | str]:
    return json.loads(run([sys.executable, "-m", "bench.measure", *names], runner, environment(package, runner)))


def compare_times(base: Path, head: Path, runner: Path, names: list[str], pairs: int) -> dict[str, list[float]]:
    """ratios head/base by workload, one a pair; workloads that BASE cannot run are left out and named."""
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for pair in range(pairs):
        order = [("base", base), ("head", head)][:: 1 if pair % 2 == 0 else -1]
        times = {label: measure(package, runner, list(ratios)) for label, package in order}
        for name in list(ratios):
            before, after = times["base"][name], times["head"][name]
            if isinstance(after, str):
                raise CannotCompare(f"{name}: the working tree fails: {after}")
            if isinstance(before, str):
                print(f"  new, nothing to compare with: {name} ({before[:80]})")
                del ratios[name]
                continue
            ratios[name].append(after / before)
    return ratios


def report(ratios: dict[str, list[float]]) -> list[str]:
    """Print one line a workload; return those that are slower."""
    slower = []
    for name, values in ratios.items():
        bound = lower_bound(values)
        verdict = "SLOWER" if bound > SLOWER else "ok"
        print(f"  {verdict:6} {name:36} median {statistics.median(values):.3f}  lower bound {bound:.3f}")
        if bound > SLOWER:
            slower.append(name)
    return slower


def compare_instructions(base: Path, head: Path, runner: Path) -> list[str]:
    """Names of the C++ kernels that execute over 2% more instructions than BASE's."""
    if shutil.which("valgrind") is None:
        print("instructions: not counted, valgrind is not installed")
        return []
    from bench.instructions import CASES, count

    grown = []
    for case in CASES:
        before, after = (count(case, environment(package, runner), runner) for package in (base, head))
        if before is None:
            print(f"  new, nothing to compare with: {case}")
            continue
        if after is None:
            raise CannotCompare(f"{case}: the working tree cannot run it")
        ratio = after / before
        verdict = "MORE" if ratio > MORE_INSTRUCTIONS else "ok"
        print(f"  {verdict:6} {case:36} {before:,} → {after:,} instructions ({ratio:.4f})")
        if ratio > MORE_INSTRUCTIONS:
            grown.append(case)
    return grown


def compare_registers(base: Path, head: Path, runner: Path, sources: dict[Path, Path]) -> list[str]:
    """Names of the GPU kernels that take more registers than BASE's."""
    from bench.registers import grown

    counts = []
    for package in (base, head):
        command = [sys.executable, "-m", "bench.registers", str(sources[package])]
        counts.append(json.loads(run(command, runner, environment(package, runner))))
    before, after = counts
    more = grown(before, after)
    for name in more:
        print(f"  MORE   {name}: {before[name]} → {after[name]} registers")
    print(f"  registers of {len(before.keys() & after.keys())} GPU kernels compared, {len(more)} take more")
    return more


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the git revision to compare the working tree with, such as HEAD~1 or origin/main")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"pairs of processes (default {PAIRS}; at least 5)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the workloads whose name contains TEXT")
    parser.add_argument("--repeat", type=int, default=1, help="repeat the whole comparison, to see how often it alarms")
    parser.add_argument("--times-only", action="store_true", help="leave out the counts of registers and instructions")
    args = parser.parse_args(argv)
    names = [name for name in WORKLOADS if args.only in name]
    if not names:
        parser.error(f"--only {args.only!r} matches none of: {', '.join(WORKLOADS)}")
    if args.pairs < 5:
        parser.error(f"--pairs {args.pairs}: a 95% bound needs at least 5")
    with tempfile.TemporaryDirectory(prefix="sgm-compare-") as folder:
        scratch = Path(folder)
        worktree, base, head, runner = (scratch / n for n in ("worktree", "base", "head", "runner"))
        try:
            run(["git", "worktree", "add", "--detach", str(worktree), args.base], ROOT)
            try:
                install(worktree, base)
                shutil.copytree(worktree / "csrc", scratch / "csrc")
            finally:
                run(["git", "worktree", "remove", "--force", str(worktree)], ROOT)
            install(ROOT, head)
            shutil.copytree(ROOT / "bench", runner / "bench")  # the same yardstick for both
            failures = 0
            for _ in range(args.repeat):
                slower = report(compare_times(base, head, runner, names, args.pairs))
                if slower:
                    print("once more, to be sure:")
                    slower = report(compare_times(base, head, runner, slower, args.pairs))
                failures += bool(slower)
            if args.repeat > 1:
                print(f"{failures} of {args.repeat} comparisons failed")
            grown = []
            if not args.times_only:
                grown += compare_registers(base, head, runner, {base: scratch / "csrc", head: ROOT / "csrc"})
                grown += compare_instructions(base, head, runner)
        except CannotCompare as problem:
            print(f"bench.compare: {problem}", file=sys.stderr)
            return 2
    return 1 if failures or grown else 0


if __name__ == "__main__":
    sys.exit(main())
