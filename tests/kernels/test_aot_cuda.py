"""CUDA C++ compiled for every supported GPU, with none at hand: no spills, no stack, wide accesses, nothing fused."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
ARCHS = (80, 90, 100, 120)
KERNELS = {
    "library": 0,
    "noise": 3,
    "norm": 24,
    "norm_cluster": 6,
    "norm_pool": 9,
    "update": 18,
}  # file → instantiations
EXACT = ("noise", "update")  # as in setup.py: every operation rounded on its own
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
WIDE = re.compile(r"PixelPatch|Li[48]ELb|cluster_kernel")  # in a mangled name: a kernel that moves packs

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def nvcc(name: str, *options: str) -> tuple[bytes, str]:
    """csrc/cuda/name.cu → (the output file, what the compiler said)."""
    fmad = ["--fmad=false"] if name.startswith(EXACT) else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [
            NVCC,
            "-std=c++17",
            "-O3",
            f"-I{CSRC}",
            *fmad,
            *options,
            str(CSRC / "cuda" / f"{name}.cu"),
            "-o",
            str(out),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return out.read_bytes(), run.stdout + run.stderr


@functools.cache
def cubin(name: str, arch: int) -> tuple[str, str]:
    """(ptxas' report, SASS)."""
    binary, report = nvcc(name, "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        sass = subprocess.run([cuobjdump(), "--dump-sass", file.name], capture_output=True, text=True)
    assert sass.returncode == 0, sass.stderr
    return report, sass.stdout


def cuobjdump() -> str:
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        bundled = Path("/nonexistent")
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    assert found, "no cuobjdump: it comes with Triton and with the CUDA toolkit"
    return found


def functions(sass: str) -> dict[str, str]:
    """Mangled name → its instructions."""
    parts = re.split(r"Function : (\S+)", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_source_is_listed():
    assert {p.stem for p in (CSRC / "cuda").glob("*.cu")} == set(KERNELS)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills_or_stack(name, arch):
    report, sass = cubin(name, arch)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(stacks) == KERNELS[name]
    assert set(stacks) <= {("0", "0", "0")}, report
    assert len(functions(sass)) == KERNELS[name]
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [name for name, kernels in KERNELS.items() if kernels])
def test_main_kernels_access_memory_16_bytes_at_a_time(name, arch):
    wide = {k: v for k, v in functions(cubin(name, arch)[1]).items() if WIDE.search(k)}
    assert len(wide) == {"noise": 2, "norm": 12, "norm_cluster": 6, "norm_pool": 3, "update": 12}[name]
    for kernel, code in wide.items():
        if name == "norm_cluster" and arch < 90:
            assert "LDG" not in code  # an empty body: clusters came with sm_90
            continue
        assert re.search(r"\bSTG\.E\.(\w+\.)*128", code), kernel
        assert name == "noise" or re.search(r"\bLDG\.E\.(\w+\.)*128", code), kernel
        assert not re.search(r"\b(LDG|STG)\.E\.(\w+\.)*[US](8|16)\b", code), kernel


@pytest.mark.parametrize("name", EXACT)
def test_exact_kernels_hold_no_fused_multiply_add(name):
    ptx = nvcc(name, "-ptx", "-arch=sm_90")[0].decode()
    assert ptx.count("mul.rn.f32") > 20 and "sqrt.rn.f32" in ptx
    assert not re.findall(r"\b(?:fma|mad)\.\w*\.?f32", ptx)
    assert not re.findall(r"\.(?:approx|ftz)\b", ptx)


def test_ptx_for_later_gpus_holds_the_cluster_kernel():
    ptx = nvcc("norm_cluster", "-ptx", "-arch=compute_90")[0].decode()
    assert "barrier.cluster.arrive" in ptx and "mapa" in ptx
