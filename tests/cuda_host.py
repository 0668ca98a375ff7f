"""What the tests of CUDA C++ share: the library built for the CPU (cuda_on_host.h), layouts, dtypes and poison."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm_engine.kernels import cuda

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def build(folder: Path):
    """The library, built in ``folder`` and loaded."""
    compiler = (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")).split()
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DSGM_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}"]
    jobs = []
    for source in SOURCES:
        header = ["-include", str(ROOT / "tests" / "cuda_on_host.h"), "-x", "c++", str(source)]
        jobs.append(subprocess.Popen([*compiler, *flags, "-c", *header, "-o", str(folder / f"{source.stem}.o")]))
    assert all(job.wait() == 0 for job in jobs)
    objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
    library = folder / "libsgm_cuda.so"
    subprocess.run([*compiler, "-shared", "-Wl,-z,defs", *objects, "-o", str(library)], check=True)
    return cuda.library(library)


def poisoned(shape, layout, dtype=torch.float32, device="cpu"):
    return torch.full(shape, float("nan"), dtype=dtype, device=device).to(memory_format=LAYOUTS[layout])


def bits(t):
    return t.detach().cpu().contiguous().numpy().view(np.uint32)
