"""The C++ of csrc/cpu under the compiler's sanitizers: ``python -m tests.sanitize``, every instruction set of this CPU.

tests/native/driver.cpp runs random networks, chains, teams and concurrent callers, built with AddressSanitizer and
UndefinedBehaviorSanitizer, then with ThreadSanitizer. The first also watch hostile.cpp, which describes networks with
wrong numbers, and faults.cpp, where allocations and starts of threads fail. All must be silent, and each must find what
is planted for it. tests/native/test_native_driver.py does the same with one instruction set and fewer networks.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from subprocess import CalledProcessError
from typing import NamedTuple

from tests.driver import Driver, changed, run

EXECUTOR, BUILD = "cpu/executor/executor.cpp", "cpu/executor/build.cpp"


class Sanitizer(NamedTuple):
    flags: tuple[str, ...]
    planted: dict[str, tuple[str, ...]]  # words of the report that must come → program, arguments of ``changed``
    programs: tuple[str, ...] = ()  # beside the driver


SANITIZERS = {
    "address and undefined behaviour": Sanitizer(
        ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        {
            "heap-buffer-overflow": (
                "driver",
                "cpu/executor/plan.cpp",
                "Buffer(times(taps, channels, columns)",
                "Buffer(times(taps - 1, channels, columns)",
            ),
            "misaligned address": (
                "driver",
                EXECUTOR,
                "w.rows = team->allocate(aligned_rows * size)",
                "w.rows = (float*)((char*)team->allocate(aligned_rows * size) + 1)",
            ),
            "is located in stack of thread": ("hostile", EXECUTOR, "if (row < 0 || end > chain.rows)", "if (row < 0)"),
            "made again": (
                "faults",
                BUILD,
                "  norm_tables_.resize(norms_.size());  // drops that of a norm() that failed\n",
                "",
            ),
            "place": (
                "faults",
                "cpu/pool.cpp",
                "  pool->start(threads_);\n  s.pool = pool.release();",
                "  s.pool = pool.release();\n  s.pool->start(threads_);",
            ),
        },
        ("hostile", "faults"),
    ),
    "threads": Sanitizer(
        ("-O1", "-fsanitize=thread"),
        {
            "data race": (
                "driver",
                EXECUTOR,
                "generation.store(generation + 1, std::memory_order_release)",
                "generation.store(generation + 1, std::memory_order_relaxed)",
            ),
            "ThreadSanitizer: data race": (
                "driver",
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
    arguments = {"driver": (networks, "float32", 3), "hostile": (6 * networks,), "faults": (2, 4)}
    for isa in isas:
        runs = [("driver", networks, precision, 3) for precision in ("float32", "bfloat16", "direct", "winograd")]
        runs += [(program, *arguments[program]) for program in sanitizer.programs]
        for program, *rest in runs:
            try:
                say(run(driver.build(program=program), *rest, SGM_ISA=isa, **ENVIRONMENT).strip())
            except CalledProcessError as found:
                raise AssertionError(f"{name}, {isa}, {program} {rest}:\n{found.stderr[-6000:]}") from None
    for i, (words, (program, *edit)) in enumerate(sanitizer.planted.items()):
        try:
            path = driver.build(f"planted{i}", changed(*edit), program)
            run(path, *arguments[program], SGM_ISA=isas[0], **ENVIRONMENT)
        except CalledProcessError as found:
            assert words in found.stderr, f"{name}: not what was planted:\n{found.stderr[-6000:]}"
            say(f"planted in {edit[0]}: {program} finds it ({words})")
        else:
            raise AssertionError(f"{name}: what was planted in {edit[0]} was not found")


def main() -> int:
    from sgm_engine import _C
    from sgm_engine.programs.arguments import Program

    Program("tests.sanitize", __doc__).parse_args()
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
