"""A pytest plugin: the tests of kernels run on PTX, Triton's launches and those of CUDA C++.

$SGM_PTX: sm_90 or sm_80, and after a comma each: rough (approximate instructions as inexact as the manual lets them
be), backwards (the last block first).
"""

import os

import pytest
import triton

from tests.ptx import cuda_library
from tests.ptx.launches import Simulator

TARGET, *HOW = os.environ["SGM_PTX"].split(",")
SIMULATOR = Simulator(TARGET, "rough" in HOW, "backwards" in HOW)
CUDA = cuda_library.install(SIMULATOR) if cuda_library.NVCC else None


def pytest_configure(config: pytest.Config) -> None:
    triton.JITFunction.run = lambda kernel, *given, **named: SIMULATOR.run(kernel, *given, **named)


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.write_line(
        f"Triton for {TARGET}: {SIMULATOR.launches} launches of {len(SIMULATOR.compiled)} kernels, "
        f"{SIMULATOR.instructions:,} instructions"
    )
    if CUDA is None:
        terminalreporter.write_line("CUDA C++ did not run on PTX: nvcc is not installed")
    else:
        terminalreporter.write_line(f"CUDA C++: {CUDA.launches} launches, {CUDA.instructions:,} instructions")
