"""compute-sanitizer over every kernel."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

from bench.gpu.checks import running, shell
from bench.gpu.stages import Row

CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck")
# The host's backtraces cost more than the checks, and there is no heap on the device. The program has to come to its
# first call of CUDA in time: eight of them import PyTorch at once.
OPTIONS = ("--error-exitcode", "9", "--show-backtrace", "device", "--print-limit", "5", "--check-device-heap", "no")
OPTIONS += ("--launch-timeout", "120")
FIRST_PORT = 49152
# By the names of the functions: those of csrc/cuda have the namespace in theirs.
KERNELS = {
    "cuda": ("kns=sgm",),
    "triton": tuple(
        f"kne={name}_kernel"
        for name in ("noise", "update", "stats", "group", "apply", "pool", "backward", "conv", "quantise")
    ),
}


def sanitize(
    folder: Path, backends: tuple[str, ...] = tuple(KERNELS), checks: tuple[str, ...] = CHECKS
) -> Iterator[Row]:
    """All tools at once: most of their time is PyTorch's start. What they say: sanitize.log."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise RuntimeError("not run: there is no compute-sanitizer")
    folder.mkdir(parents=True, exist_ok=True)
    runs, ports = {}, count(FIRST_PORT, 100)
    with ExitStack() as stack:
        log = stack.enter_context(open(folder / "sanitize.log", "w"))
        for backend in backends:
            if backend == "triton":
                try:
                    shell(*exercise(backend))  # compiles them, while the others run: compilers need not be watched
                except RuntimeError as error:
                    yield {"case": "Triton's kernels, not watched yet", "failed": str(error)}
                    break
            for check in checks:
                command = [tool, *options(check, backend), "--port", str(next(ports)), *exercise(backend)]
                # Every tensor has memory of its own, or what is written beyond one would lie in PyTorch's next.
                out = stack.enter_context(TemporaryFile("w+", errors="replace"))
                run = stack.enter_context(running(command, out, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
                runs[f"{check}, {backend}"] = run, out
        while runs:  # as they end, so that what is late costs none of the others
            for name, (run, out) in list(runs.items()):
                if (status := run.poll()) is not None:
                    out.seek(0)
                    log.write(f"### {name}\n{(said := out.read())}\n")
                    log.flush()
                    yield row(name, status, said)
                    del runs[name]
            time.sleep(0.2)


def options(check: str, backend: str) -> list[str]:
    # initcheck has to see who writes what our kernels read.
    names = () if check == "initcheck" else KERNELS[backend]
    return ["--tool", check, *OPTIONS, *(option for name in names for option in ("--kernel-name", name))]


def exercise(backend: str) -> list[str]:
    return [sys.executable, "-c", f"from bench.gpu import exercise; exercise.{backend}()"]


def row(case: str, status: int, said: str) -> Row:
    """Of a tool that has ended: what it counted, and the beginning and the end of what it found."""
    summary = [line.strip("= \n") for line in said.splitlines() if re.search("(ERROR|RACECHECK) SUMMARY", line)]
    lines = [line for line in said.splitlines() if line.strip("= ")]
    begin, end = "\n".join(lines[:20])[:800], "\n".join(lines[-5:])[-400:]
    clean = status == 0 and bool(summary)
    return {"case": case, "result": "; ".join(summary), "failed": None if clean else f"exit {status}: {begin} … {end}"}
