"""Registers, spills and instructions of every GPU kernel, read from its compiled form; no GPU is needed.

``python -m bench.registers [CSRC]`` prints JSON, kernel → counts, for sm_90: Triton's kernels, and those of the CUDA
sources in CSRC/cuda where nvcc is installed. The hardware hands registers out eight at a time.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.compare import Row

TARGET, UNIT = "sm_90", 8
EXACT = ("noise", "update")  # as in setup.py
HASHES = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?_cu)_[0-9a-f]{8}")  # of the path, in an anonymous namespace's name


def triton_kernels() -> dict[str, dict[str, int]]:
    from sgm_engine.kernels.aot import compile as aot

    found = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name, case in aot.cases().items():
            report, ptx = aot.report(case, TARGET), aot.compile_launch(case.launch, aot.TARGETS[TARGET]).asm["ptx"]
            found[name] = {
                "registers": report.registers,
                "spills": report.spills,
                "PTX instructions": instructions(ptx),
            }
    return found


def instructions(ptx: str) -> int:
    """Lines that a thread may execute: no labels, directives or braces."""
    return len(re.findall(r"^\s*(?:@!?%p\d+\s+)?[a-z][\w.]*\s?[^;]*;", ptx, re.M))


def cuda_kernels(csrc: Path) -> dict[str, dict[str, int]]:
    """Of each kernel in csrc/cuda/*.cu by its mangled name; {} without nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if nvcc is None:
        return {}
    found: dict[str, dict[str, int]] = {}
    for source in sorted((csrc / "cuda").glob("*.cu")):
        command = [nvcc, "-std=c++17", "-O3", f"-I{csrc}", "-cubin", f"-arch={TARGET}", "-Xptxas", "-v"]
        command += ["--fmad=false"] * source.name.startswith(EXACT)
        done = subprocess.run([*command, str(source), "-o", os.devnull], capture_output=True, text=True, check=True)
        said = done.stdout + done.stderr
        names = [HASHES.sub(r"\1", name) for name in re.findall(r"Compiling entry function '(\w+)'", said)]
        registers = map(int, re.findall(r"Used (\d+) registers", said))
        spilled = map(int, re.findall(r"(\d+) bytes spill stores", said))
        for name, used, spills in zip(names, registers, spilled, strict=True):
            found[name] = {"registers": used, "spills": spills}
    return found


def rows(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> list[Row]:
    """What is worse, a row each, after one that says how many kernels both trees have.

    Worse: another unit of registers, a spill more, or 2% more instructions.
    """
    units = lambda registers: -(-registers // UNIT)  # noqa: E731
    both = [name for name in after if name in before]
    worse = []
    for name in both:
        for what, count in after[name].items():
            was = before[name].get(what, count)
            grown = units(count) > units(was) if what == "registers" else count > was * (1.02 if "PTX" in what else 1)
            ratio = count / was if was else math.inf
            worse += [Row(f"{name}: {what}", "MORE", "", "", was, count, ratio, ratio, ratio)] if grown else []
    total = Row("GPU kernels for sm_90", "ok" if both else "new", f"{len(worse)} counts are worse", "kernels")
    total.base, total.head = len(before), len(after)
    return [total, *worse]


if __name__ == "__main__":
    found = triton_kernels()
    if len(sys.argv) > 1:
        found |= cuda_kernels(Path(sys.argv[1]))
    json.dump(found, sys.stdout)
