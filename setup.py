"""Builds csrc with pybind11 and ninja. No torch at build time: Python passes data pointers.

    csrc/binding*.cpp, csrc/**/binding*.cpp   the only files that see Python's headers; compiled as one
    csrc/cpu/**/*_isa.cpp                     compiled once per instruction set, each in its own namespace (csrc/isa.h)
    csrc/cpu/**/*.cpp                         compiled once, for the baseline of the platform
    csrc/cuda/*.cu                            compiled by nvcc into sgm_engine/_cuda/libsgm_cuda.so

A new file that follows these names needs no line here. SGM_WITH_CUDA=auto|1|0 (default auto: where nvcc and a GPU are;
the CUDA library takes minutes to compile).
SGM_CUDA_ARCHS="90": CUDA for these GPUs alone, where one is at hand (default: CUDA_ARCHS below, and PTX).
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Distribution, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

CXX = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX += ["-fno-math-errno", "-fno-trapping-math"]
# Files of csrc/cpu without contraction to FMA: the same bits on every build, and equals whose difference is exactly 0.
EXACT = ("noise", "update", "norm_backward")
ISAS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
    ISAS |= {"avx2": avx2, "avx512": avx512, "avx512_bf16": [*avx512, "-mavx512bf16", "-DSGM_AVX512_BF16"]}
NO_BF16 = ("digest", "update")  # files of csrc/cpu to which the last of these is no use: SGM_DECLARE_UP_TO_AVX512
CUDA_ARCHS = (80, 90, 100, 120)  # plus PTX of 90 for whatever comes between and after


def contraction(source: Path) -> str:
    return "-ffp-contract=off" if source.name.startswith(EXACT) else "-ffp-contract=fast"


def isas(source: Path) -> dict[str, list[str]]:
    """The instruction sets that a file of csrc/cpu is compiled for, with their flags."""
    plain = source.name.startswith(NO_BF16)
    return {isa: flags for isa, flags in ISAS.items() if not (plain and isa == "avx512_bf16")}


def find_nvcc() -> str | None:
    """The path of nvcc, None when CUDA is not to be built."""
    want = os.environ.get("SGM_WITH_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        raise SystemExit(f"SGM_WITH_CUDA must be auto, 1 or 0, got {want!r}")
    if want == "auto" and not has_gpu():
        print("no CUDA library: there is no NVIDIA GPU here (SGM_WITH_CUDA=1 builds it all the same, in some minutes)")
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = None if want == "0" else shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if want == "1" and nvcc is None:
        raise SystemExit("SGM_WITH_CUDA=1 but no nvcc on PATH or in $CUDA_HOME/bin: install it or set SGM_WITH_CUDA=0")
    return nvcc


def has_gpu() -> bool:
    """Whether the driver shows a device: as a file, or to nvidia-smi (WSL)."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and b"GPU 0" in subprocess.run([smi, "-L"], capture_output=True).stdout


def cuda_archs() -> list[str]:
    """SGM_CUDA_ARCHS="90": machine code for these alone, which takes a fifth of the time. Empty: CUDA_ARCHS and PTX."""
    archs = os.environ.get("SGM_CUDA_ARCHS", "").replace(",", " ").split()
    if wrong := [a for a in archs if not re.fullmatch(r"\d{2,3}[af]?", a)]:
        raise SystemExit(f"SGM_CUDA_ARCHS must be numbers such as 90 or 100, got {wrong[0]!r}")
    return archs


class Ninja:
    """A build.ninja in the making: rules once, then one edge a file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines = ["ninja_required_version = 1.8"]

    def rule(self, name: str, command: str, deps: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if deps else []

    def edge(self, rule: str, out: Path, inputs: list[Path], **variables: str) -> Path:
        quote = lambda p: str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
        self.lines.append(f"build {quote(out)}: {rule} {' '.join(map(quote, inputs))}")
        self.lines += [f"  {k} = {v}" for k, v in variables.items()]
        return out

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(self.lines) + "\n"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = os.environ.get("MAX_JOBS", str(cores))
        with open(self.folder / "lock", "w") as lock:  # one build at a time
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.folder / "build.ninja").write_text(text)
            subprocess.run([*ninja_command(), "-C", str(self.folder), "-j", jobs], check=True)


def ninja_command() -> list[str]:
    try:
        import ninja  # the wheel, in an isolated build

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        if found := shutil.which("ninja"):
            return [found]
        raise SystemExit("no ninja: pip install ninja") from None


def together(ninja: Ninja, name: str, sources: list[Path], flags: str) -> Path:
    """One object of files that share headers, which take longer to compile than what is in the files."""
    ninja.folder.mkdir(parents=True, exist_ok=True)
    unit, text = ninja.folder / f"{name}.cpp", "".join(f'#include "{source}"\n' for source in sources)
    if not unit.is_file() or unit.read_text() != text:
        unit.write_text(text)
    return ninja.edge("cxx", ninja.folder / f"{name}.o", [unit], flags=flags)


def build_cpu(ninja: Ninja, module: Path) -> None:
    import pybind11

    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if cxx is None:
        raise SystemExit("no C++ compiler: install g++ (Debian: apt install g++) or set CXX")
    python = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    common = f"{' '.join(CXX)} -I{CSRC} {os.environ.get('CXXFLAGS', '')}"
    ninja.rule("cxx", f"{cxx} -MD -MF $out.d {common} $flags -c $in -o $out")
    # Linked beside and moved into place: a process that has the old module loaded keeps it.
    python_later = (
        "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    )  # its symbols, as it loads the module
    link = (
        f"{cxx} -shared {python_later} -pthread $in -o $out.new {os.environ.get('LDFLAGS', '')} && mv -f $out.new $out"
    )
    ninja.rule("link", link, deps=False)
    sources = sorted(CSRC.rglob("*.cpp"))
    bindings = [s for s in sources if s.name.startswith("binding")]
    packs = [s for s in sources if s.name == "pack.cpp"]  # loops over weights
    kernels = [s for s in sources if s.stem.endswith("_isa")]
    rest = [s for s in sources if s not in bindings + packs + kernels]
    objects = [
        together(ninja, "bindings", bindings, f"{python} -O1"),
        together(ninja, "packs", packs, "-ffp-contract=fast"),
        together(ninja, "rest", rest, "-ffp-contract=off -O1"),
    ]
    for source in kernels:
        name = str(source.relative_to(CSRC)).replace("/", ".")
        for isa, flags in isas(source).items():
            quiet = ["-Wno-psabi", "-Wno-maybe-uninitialized"]  # GCC 12's AVX-512 headers trip the second
            variant = " ".join([contraction(source), *flags, f"-DSGM_ISA={isa}", *quiet])
            objects.append(ninja.edge("cxx", ninja.folder / f"{name}.{isa}.o", [source], flags=variant))
    ninja.edge("link", module, objects)


def build_cuda(ninja: Ninja, library: Path, nvcc: str) -> None:
    """csrc/cuda/*.cu → one shared library without libtorch, loaded through ctypes."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    if not sources:
        return
    archs = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in cuda_archs() or CUDA_ARCHS)
    archs += "" if cuda_archs() else " -gencode arch=compute_90,code=compute_90"
    flags = f"-std=c++17 -O3 -I{CSRC} -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden {archs}"
    ninja.rule("nvcc", f"{nvcc} -MD -MF $out.d {flags} $exact -c $in -o $out")
    ninja.rule("nvlink", f"{nvcc} -shared -cudart static {archs} $in -o $out.new && mv -f $out.new $out", deps=False)
    exact = {s: "--fmad=false" if s.name.startswith(EXACT) else "" for s in sources}
    objects = [ninja.edge("nvcc", ninja.folder / f"cuda.{s.name}.o", [s], exact=exact[s]) for s in sources]
    ninja.edge("nvlink", library, objects)


def build(target: Path) -> None:
    """sgm_engine/_C… and, with nvcc, sgm_engine/_cuda/libsgm_cuda.so under ``target``, whatever setuptools there is."""
    module = target / "sgm_engine" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library = target / "sgm_engine" / "_cuda" / "libsgm_cuda.so"
    ninja = Ninja(ROOT / "build" / f"ninja-{sys.implementation.cache_tag}")  # kept: the next build is incremental
    module.parent.mkdir(parents=True, exist_ok=True)
    build_cpu(ninja, module)
    if nvcc := find_nvcc():
        library.parent.mkdir(parents=True, exist_ok=True)
        build_cuda(ninja, library, nvcc)
    ninja.run()


class BuildExt(build_ext):
    def run(self) -> None:
        # Where setuptools would put it: build/lib… for a wheel, the source tree for an editable install.
        build(ROOT if self.inplace else Path(self.build_lib).resolve())

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh", ".inc")]

    def get_outputs(self) -> list[str]:
        out = Path(self.build_lib) / "sgm_engine"
        return [str(p) for p in (*out.glob("_C*.so"), *out.glob("_cuda/*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    if sys.platform == "win32":
        raise SystemExit("sgm-engine builds on Linux and macOS; on Windows use WSL 2")
    if int(setuptools.__version__.split(".")[0]) < 77:
        here = f"{sys.executable} -c 'import setup; setup.build(setup.ROOT)'"
        raise SystemExit(f"setuptools {setuptools.__version__} is older than 77: update it, or build in place: {here}")
    kernels = ["sgm_engine.kernels", *(f"sgm_engine.kernels.{p}" for p in find_packages("kernels"))]
    readme = ROOT / "README.md"
    setup(
        version=re.search(r'__version__ = "(.+)"', (ROOT / "sgm_engine" / "__init__.py").read_text())[1],
        long_description=readme.read_text() if readme.exists() else "",
        long_description_content_type="text/markdown",
        packages=[*find_packages(include=["sgm_engine", "sgm_engine.*"]), *kernels],
        package_dir={"sgm_engine.kernels": "kernels"},
        package_data={
            "sgm_engine": ["py.typed", "weights/*", "evaluation/weights/*", "training/configs/*.yaml", "_cuda/*.so"],
            "sgm_engine.kernels.tables": ["*.json"],
        },
        ext_modules=[Extension("sgm_engine._C", ["csrc/binding.cpp"])],
        cmdclass={"build_ext": BuildExt},
        distclass=BinaryDistribution,
    )
