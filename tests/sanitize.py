"""The C++ of csrc/cpu under the compiler's sanitizers: ``python -m tests.sanitize``, every instruction set of this CPU.

tests/native/driver.cpp runs random networks, chains, teams and concurrent callers, built with AddressSanitizer and
UndefinedBehaviorSanitizer, then with ThreadSanitizer. Both must stay silent; and each must find what is planted for it.
tests/native/test_native_driver.py does the same with one instruction set and fewer networks.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from subprocess import CalledProcessError
from typing import NamedTuple

from tests.driver import Driver, changed, run

EXECUTOR = "cpu/executor/executor.cpp"


class Sanitizer(NamedTuple):
    flags: tuple[str, ...]
    planted: dict[str, tuple[str, str, str]]  # words of the report that must come → arguments of ``changed``


SANITIZERS = {
    "address and undefined behaviour": Sanitizer(
        ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        {
            "heap-buffer-overflow": (
                "cpu/executor/plan.cpp",
                "Buffer(taps * channels * columns",
                "Buffer((taps - 1) * channels * columns",
            ),
            "misaligned address": (
                EXECUTOR,
                "w.rows = team->allocate(aligned_rows * size)",
                "w.rows = (float*)((char*)team->allocate(aligned_rows * size) + 1)",
            ),
        },
    ),
    "threads": Sanitizer(
        ("-O1", "-fsanitize=thread"),
        {
            "data race": (
                EXECUTOR,
                "generation.store(generation + 1, std::memory_order_release)",
                "generation.store(generation + 1, std::memory_order_relaxed)",
            ),
            "ThreadSanitizer: data race": (
                "cpu/pool.cpp",
                "running_.fetch_sub(1, std::memory_order_release)",
                "running_.fetch_sub(1, std::memory_order_relaxed)",
            ),
        },
    ),
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def check(name: str, folder: Path, isas: tuple[str, ...], networks: int, say=print) -> None:
    """Raises AssertionError if the sanitizer reports something, or misses what is planted."""
    sanitizer = SANITIZERS[name]
    driver = Driver(folder / name.split()[0], sanitizer.flags, isas, main_flags=["-O0"])
    plain = driver.build()
    for isa in isas:
        for precision in ("float32", "bfloat16", "direct", "winograd"):
            try:
                say(run(plain, networks, precision, 3, SGM_ISA=isa, **ENVIRONMENT).strip())
            except CalledProcessError as found:
                raise AssertionError(f"{name}, {isa}, {precision}:\n{found.stderr[-6000:]}") from None
    for i, (words, edit) in enumerate(sanitizer.planted.items()):
        try:
            run(driver.build(f"planted{i}", changed(*edit)), networks, "float32", 3, SGM_ISA=isas[0], **ENVIRONMENT)
        except CalledProcessError as found:
            assert words in found.stderr, f"{name}: not what was planted:\n{found.stderr[-6000:]}"
            say(f"planted in {edit[0]}: found ({words})")
        else:
            raise AssertionError(f"{name}: what was planted in {edit[0]} was not found")


def main() -> int:
    from sgm_engine import _C

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sgm-sanitize-") as folder:
        for name in SANITIZERS:
            print(f"== {name}")
            try:
                check(name, Path(folder), tuple(_C.isas()), 150)
            except AssertionError as failure:
                print(failure, file=sys.stderr)
                return 1
    print(f"clean ({time.monotonic() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
