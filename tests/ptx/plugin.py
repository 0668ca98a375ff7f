"""A pytest plugin: the tests of kernels run on PTX, Triton's launches and those of CUDA C++.

$SGM_PTX: sm_90 or sm_80, and after a comma each: rough (approximate instructions as inexact as the manual lets them
be), backwards (the last block first).
"""

import os
from collections import Counter

import pytest
import triton

from tests.ptx import cuda_library
from tests.ptx.launches import Simulator

TARGET, *HOW = os.environ["SGM_PTX"].split(",")
SIMULATOR = Simulator(TARGET, "rough" in HOW, "backwards" in HOW)
CUDA = cuda_library.install(SIMULATOR) if cuda_library.NVCC else None
OF_WORKERS: Counter[str] = Counter()  # what pytest-xdist's processes have run


def counts() -> Counter[str]:
    """Of this process."""
    found = Counter(launches=SIMULATOR.launches, instructions=SIMULATOR.instructions)
    if CUDA is not None:
        found.update(cuda_launches=CUDA.launches, instructions=CUDA.instructions)
    return found


def pytest_configure(config: pytest.Config) -> None:
    triton.JITFunction.run = lambda kernel, *given, **named: SIMULATOR.run(kernel, *given, **named)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ptx"] = dict(counts())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    OF_WORKERS.update(getattr(node, "workeroutput", {}).get("ptx", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    total = counts() + OF_WORKERS
    terminalreporter.write_line(
        f"On PTX for {TARGET}: {total['launches']} launches of Triton, {total['cuda_launches']} of CUDA C++, "
        f"{total['instructions']:,} instructions"
    )
