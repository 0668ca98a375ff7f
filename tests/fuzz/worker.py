"""One process of the fuzzer: cases FIRST … FIRST + COUNT − 1 of a part; says when each begins, and what it found."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np

MEMORY, ADDRESSES = 1 << 30, 3 << 30  # bytes that a case may use; and may reserve, so that the machine lives
AGAIN = 3000  # cases after which a process ends: its peak of memory is for ever


def main(part: str, seed: int, first: int, count: int) -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        case = importlib.import_module(f"tests.fuzz.{part}").cases(Path(name) / "corpus")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, size + ADDRESSES))
        for number in range(first, first + min(count, AGAIN)):
            print(f"{number} begins", file=out)
            folder = Path(name) / "case"
            folder.mkdir()
            before = peak_memory()
            try:
                finding = case(number, np.random.default_rng([seed, number]), folder)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:200]
                finding = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {text}"
            peak = peak_memory()
            if peak > MEMORY and peak > before:
                finding = f"{finding or ''} {peak / 2**30:.2f} GB at its peak".strip()
            if finding:
                print(f"{number} {finding}", file=out)
            print(f"{number} done", file=out)
            shutil.rmtree(folder)
            if peak > MEMORY:
                return


def peak_memory() -> int:
    """Bytes that this program has held at most; getrusage counts its parent's too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
