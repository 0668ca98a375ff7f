"""Registers a thread of every GPU kernel, read from its compiled form; no GPU is needed.

``python -m bench.registers [CSRC]`` prints JSON, kernel → registers, for sm_90: Triton's kernels, and those of the CUDA
sources in CSRC/cuda where nvcc is installed. The hardware hands registers out eight at a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET, UNIT = "sm_90", 8
EXACT = ("noise", "update")  # as in setup.py
HASHES = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?_cu)_[0-9a-f]{8}")  # of the path, in an anonymous namespace's name


def triton_registers() -> dict[str, int]:
    from sgm_engine.kernels.aot import compile as aot

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        return {name: aot.report(case, TARGET).registers for name, case in aot.cases().items()}


def cuda_registers(csrc: Path) -> dict[str, int]:
    """Of each kernel in csrc/cuda/*.cu by its mangled name; {} without nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if nvcc is None:
        return {}
    found: dict[str, int] = {}
    for source in sorted((csrc / "cuda").glob("*.cu")):
        command = [nvcc, "-std=c++17", "-O3", f"-I{csrc}", "-cubin", f"-arch={TARGET}", "-Xptxas", "-v"]
        command += ["--fmad=false"] * source.name.startswith(EXACT)
        done = subprocess.run([*command, str(source), "-o", os.devnull], capture_output=True, text=True, check=True)
        said = done.stdout + done.stderr
        names = [HASHES.sub(r"\1", name) for name in re.findall(r"Compiling entry function '(\w+)'", said)]
        found |= dict(zip(names, map(int, re.findall(r"Used (\d+) registers", said)), strict=True))
    return found


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Kernels that take more units of registers than they did; new ones have nothing to be compared with."""
    units = lambda registers: -(-registers // UNIT)  # noqa: E731
    return [name for name in after if name in before and units(after[name]) > units(before[name])]


if __name__ == "__main__":
    found = triton_registers()
    if len(sys.argv) > 1:
        found |= cuda_registers(Path(sys.argv[1]))
    json.dump(found, sys.stdout)
