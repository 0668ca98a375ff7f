"""The CUDA C++ kernels on PTX: the library built for the CPU (cuda_on_host.h) decides on launches, nvcc's PTX runs."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from sgm_engine.kernels import cuda
from tests.ptx.launches import Simulator, extent
from tests.ptx.machine import Grid, run
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import Program, entries, parse

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
EXACT = ("noise", "update")  # as in setup.py: every operation rounded on its own
_RUNNER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 3,
    ctypes.c_size_t,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def ptx(source: str, target: str) -> str:
    """What nvcc makes of csrc/cuda/source.cu, with setup.py's flags. $SGM_PTX_CACHE: a folder for it, of one run."""
    cached = Path(os.environ["SGM_PTX_CACHE"], f"{source}.{target}.ptx") if "SGM_PTX_CACHE" in os.environ else None
    if cached and cached.exists():
        return cached.read_text()
    text = _compile(source, target)
    if cached:
        whole = cached.with_suffix(f".{os.getpid()}")
        whole.write_text(text)
        whole.replace(cached)
    return text


def _compile(source: str, target: str) -> str:
    exact = ["--fmad=false"] if source in EXACT else []
    command = [NVCC, "-std=c++17", "-O3", *exact, f"-I{CSRC}", "-ptx", f"-arch={target.replace('sm', 'compute')}"]
    done = subprocess.run([*command, str(CSRC / "cuda" / f"{source}.cu"), "-o", "-"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel_of(symbol: str) -> str:
    """A kernel's mangled name without its unnamed namespace, which each compiler calls by another name."""
    return re.sub(r"^_ZN3sgm4cuda(\d+)_GLOBAL__N_\w*?(\d+)([a-z]+_kernel)", r"\3", symbol)


class CudaOnPtx:
    """Takes the launches of a library that was built for the CPU."""

    def __init__(self, simulator: Simulator):
        self.simulator = simulator
        self.tensors: list[Tensor] = []
        self.error: BaseException | None = None
        self.launches = self.instructions = 0
        self._callback = _RUNNER(self._run)  # kept: C holds no reference
        self.symbols: dict[int, str] = {}  # of kernels, by their address
        self.programs: dict[str, Program] = {}

    @functools.cached_property
    def text(self) -> dict[str, tuple[str, str]]:
        """kernel_of a name → (PTX, the name there)."""
        found = {}
        for source in sorted(p.stem for p in (CSRC / "cuda").glob("*.cu")):
            text = ptx(source, self.simulator.target)
            found |= {kernel_of(name): (text, name) for name in entries(text)}
        return found

    def program(self, kernel: str) -> Program:
        if kernel not in self.programs:
            self.programs[kernel] = parse(*self.text[kernel])
        return self.programs[kernel]

    def take(self, library: ctypes.CDLL, path: str) -> None:
        """From now on."""
        listed = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        table = {name: int(at, 16) for at, name in re.findall(r"^([0-9a-f]{16}) \w (\S+)$", listed, re.M)}
        base = ctypes.cast(library.sgm_host_run_by, ctypes.c_void_p).value - table["sgm_host_run_by"]
        self.symbols = {base + at: name for name, at in table.items() if "_kernel" in name}
        library.sgm_host_run_by(self._callback)

    def watching(self, launcher: Callable) -> Callable:
        """The launcher; what it is given is what its kernels may touch, and what they did wrong is raised."""

        @functools.wraps(launcher)
        def launch(*given, **named):
            self.tensors, self.error = list(_tensors((*given, *named.values()))), None
            try:
                return launcher(*given, **named)
            except RuntimeError:
                if self.error is not None:
                    raise self.error from None
                raise

        return launch

    def _run(self, address, width, height, threads, shared, cluster, data, size) -> int:
        try:
            program = self.program(kernel_of(self.symbols[address]))
            given = ctypes.string_at(data, size).ljust(program.parameter_bytes, b"\0")
            grid = Grid(given, (width, height), threads, shared, cluster)
            memory = GlobalMemory(map(extent, self.tensors))
            self.instructions += run(program, grid, memory, self.simulator.rough, self.simulator.backwards)
            self.launches += 1
        except BaseException as error:  # C++ cannot pass it on
            self.error = error
            return 999
        return 0


def _tensors(given) -> Iterator[Tensor]:
    for value in given:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif dataclasses.is_dataclass(value):
            yield from _tensors([getattr(value, f.name) for f in dataclasses.fields(value)])


def install(simulator: Simulator) -> CudaOnPtx:
    """Every library built for the CPU that is loaded from now on runs its kernels on PTX."""
    on_ptx, load = CudaOnPtx(simulator), cuda.library

    @functools.cache
    def library(path: Path = cuda.PATH):
        loaded = load(path)
        if loaded is not None and path != cuda.PATH:
            on_ptx.take(loaded, str(path))
        return loaded

    cuda.library = library
    for name in ("noise_fill", "langevin_update", "norm"):
        setattr(cuda, name, on_ptx.watching(getattr(cuda, name)))
    return on_ptx
