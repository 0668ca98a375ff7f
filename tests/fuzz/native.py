"""The C++ and the ops on random input under AddressSanitizer and UndefinedBehaviorSanitizer: until a time is spent.

``python -m tests.fuzz.native --seconds 40 --seed 0``: four equal parts of it go to random networks against double
precision, networks described with wrong numbers, failing allocations and starts of threads (tests/native), and calls of
the ops with wrong arguments (ops.py). Building comes on top. 0: all silent; 1: the report, and how to see it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sgm_engine.programs.arguments import Program, at_least, number
from tests.driver import Driver, run
from tests.sanitize import ENVIRONMENT, SANITIZERS

FLAGS = SANITIZERS["address and undefined behaviour"].flags
ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {  # of tests/native → arguments for a seed
    "driver": lambda seed: (4, ("float32", "bfloat16", "direct", "winograd")[seed % 4], 3, 4 * seed),
    "hostile": lambda seed: (40, 40 * seed),
    "faults": lambda seed: (1, 4, seed),
}
BUILD = """
import sys, pathlib, setup
setup.ISAS = {"generic": []}
ninja = setup.Ninja(pathlib.Path(sys.argv[1]))
setup.build_cpu(ninja, pathlib.Path(sys.argv[2]))
ninja.run()
"""


def build_module(folder: Path) -> Path:
    """sgm_engine._C with the sanitizers and one instruction set, for a Python that has their libraries preloaded."""
    path = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = " ".join((*FLAGS, "-g", "-fno-sanitize=vptr", "-DSGM_GENERIC_ONLY"))  # pybind11 hides its types from vptr
    environment = os.environ | {"CXXFLAGS": flags, "LDFLAGS": flags}
    subprocess.run(
        [sys.executable, "-c", BUILD, folder / "ninja", path],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
    )
    return path


def preloaded() -> dict[str, str]:
    """The environment in which Python can load what ``build_module`` made."""
    cxx = (os.environ.get("CXX") or "g++").split()
    libraries = [run(*cxx, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    return ENVIRONMENT | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }  # Python leaks on purpose


def seeds(first: int, seconds: float) -> Iterator[int]:
    """first, first + 1, … until the time is spent; one at least."""
    end = time.monotonic() + seconds
    yield first
    while time.monotonic() < end:
        first += 1
        yield first


def fuzz(seed: int, seconds: float, folder: Path, say=print) -> None:
    """Raises CalledProcessError for what was found."""
    driver = Driver(folder, FLAGS, main_flags=["-O0"])
    for program, arguments in PROGRAMS.items():
        path = driver.build(program=program)
        for at in seeds(1000 * seed, seconds / 4):
            run(path, *arguments(at), **ENVIRONMENT)
        say(f"{program}: seeds {1000 * seed} to {at}, silent")
    module = build_module(folder)
    command = (sys.executable, "-m", "tests.fuzz.ops", "--module", module, "--seed", seed, "--seconds", seconds / 4)
    say(run(*command, **preloaded()).strip())


def main() -> int:
    parser = Program("tests.fuzz.native", __doc__.splitlines()[0])
    parser.add_argument("--seconds", type=number, default=40, metavar="X", help="of running")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="another one, other input")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sgm-fuzz-") as folder:
        try:
            fuzz(arguments.seed, arguments.seconds, Path(folder))
        except subprocess.CalledProcessError as found:
            output = (found.stderr or found.stdout or b"")[-6000:]
            print(output if isinstance(output, str) else output.decode(), file=sys.stderr)
            print("found by", *map(str, found.cmd), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
