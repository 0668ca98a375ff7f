"""Runs a test file as a GPU's, in a process of its own, and reports each test where it was asked for: under Triton's
interpreter, or on a pretended device.

The interpreter has to be chosen before Triton is imported, and then holds for the whole process, which would spoil the
tests that compile. With a GPU nothing of this happens: the same tests run on CUDA tensors.
"""

import functools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
ON_PTX = "SGM_PTX" in os.environ  # tests/ptx runs what is compiled for a GPU
COMPILED = DEVICE == "cuda" or ON_PTX


def run_interpreted(module: dict) -> None:
    """To be called last in a test file, with globals(): without a GPU, its tests report what a child process found."""
    if not COMPILED and not INTERPRETED:
        _report_all(module)


def run_pretended(module: dict) -> None:
    """Likewise, with pretend_cuda.py."""
    if not torch.cuda.is_available():
        _report_all(module, "-p", "tests.pretend_cuda")


def _report_all(module: dict, *options: str) -> None:
    for name, test in list(module.items()):
        if name.startswith("test_"):
            module[name] = _reporting(test, module["__file__"], options)


def convert_float8_exactly() -> None:
    """In the interpreter: float32 → float8 e4m3 → float16 by PyTorch. Its own rounds ties up and overflows."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        if target == tl.float8e4nv:
            x = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.float8e4nv:
            x = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn)
            return x.to(torch.float16).view(torch.int16).numpy()
        return theirs(data, source, target, rounding_mode)

    interpreter._convert_float = convert


def _reporting(test, file: str, options: tuple[str, ...]):
    @functools.wraps(test)
    def report(**_):
        node = os.environ["PYTEST_CURRENT_TEST"].split("::", 1)[1].rsplit(" (", 1)[0]
        results, output = _run(file, *options)
        assert node in results, f"{node} did not run in the child process:\n{output}"
        outcome, message = results[node]
        if outcome == "skipped":
            pytest.skip(message)
        if outcome != "passed":
            pytest.fail(f"in the child process: {message}", pytrace=False)

    return report


@functools.cache
def _run(file: str, *options: str) -> tuple[dict[str, tuple[str, str]], str]:
    """Name → (passed | skipped | failure | error, text) of every test of the file, and what pytest printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    path = os.pathsep.join(filter(None, [str(Path(file).parent), os.environ.get("PYTHONPATH")]))
    interpret = {} if "pretend_cuda" in options else {"TRITON_INTERPRET": "1"}  # there no kernel runs
    environment |= {"PYTHONPATH": path} | interpret
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", file, *options, "-p", "no:cacheprovider", f"--junitxml={report}"]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        results = {case.get("name"): _outcome(case) for case in cases}
    return results, finished.stdout + finished.stderr


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for child in case:
        if child.tag == "skipped":
            return "skipped", child.get("message")
        if child.tag in ("failure", "error"):
            return child.tag, child.text
    return "passed", ""
