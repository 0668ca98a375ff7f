"""The two commands of a first GPU run, end to end on the pretended device, with a clock: ``python -m tests.rehearsal``.

The build, Triton's compilers, processes, limits, rows and files are the real ones. The network and the shapes that are
timed are small, what runs in place of kernels is PyTorch on the CPU, and what the device can do is a constant: no time
of a row means anything. In a bare tree it shows the build of a bare machine. --out: where the results go.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def pretended(run: str, folder: Path) -> int:
    """One command, in this process, which must not have imported the package yet."""
    import tests.pretend_cuda  # noqa: F401 - from here on there is a device
    from bench.gpu import __main__ as gpu
    from bench.gpu import network, norms, runs, timing
    from sgm_engine.kernels import cuda
    from sgm_engine.kernels.triton import noise as triton_noise
    from sgm_engine.kernels.triton import norm as triton_norm
    from sgm_engine.kernels.triton import update as triton_update

    network.NGF, network.SIDE, network.STEPS, network.CORE_BATCHES = 4, 8, 1, (2, 1)
    network.checked = lambda score, want, most=0.1: 0.0  # so small a network is no measure of bfloat16
    runs.SHAPES, runs.NORMS, runs.BATCHES = [(128, 128, 16, 1), (128, 128, 16, 2)], [(32, 8)], (2, 1)
    norms.SHAPES = runs.NORMS
    timing.peak_flops, timing.copy_bandwidth = lambda: 1e15, lambda: 1e12
    timing.copies = lambda size: 2
    timing.kernels_of = lambda step: step() or {"what stands in for kernels": (1, 0.0)}
    cuda.noise_fill, cuda.langevin_update = triton_noise.noise_fill, triton_update.langevin_update
    cuda.norm = lambda n, variant="auto": triton_norm.norm(n)
    cuda.norm_workspace_size = triton_norm.norm_workspace_size
    return gpu.main(["--run", run, "--out", str(folder)])


def timeline(folder: Path) -> list[str]:
    """A line for each stage of the results in a folder."""
    (path,) = folder.glob("*-pretended.json")
    lines, at = [], 0.0
    for stage in json.loads(path.read_text())["stages"]:
        good = sum(not row.get("failed") for row in stage["rows"])
        lines.append(f"{at:7.1f} s  {stage['name']}: {stage['seconds']} s, {good} of {len(stage['rows'])} rows good")
        at += stage["seconds"]
    return [*lines, f"files: {', '.join(sorted(path.name for path in folder.iterdir()))}"]


def main() -> int:
    # Not a Program: the package must not have been imported when the device is pretended.
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of what both write and say")
    parser.add_argument("--run", choices=("first", "second"), help="this one, in this process (default: both)")
    options = parser.parse_args()
    if options.run:
        return pretended(options.run, options.out)
    for run in ("first", "second"):
        folder, began = options.out / run, time.perf_counter()
        command = [sys.executable, "-m", "tests.rehearsal", "--run", run, "--out", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "said.log", "w") as said:
            subprocess.run(command, stdout=said, stderr=subprocess.STDOUT)
        print("\n".join([f"== {run}: {time.perf_counter() - began:.0f} s", *timeline(folder)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
