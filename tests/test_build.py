"""The built module: nothing compiled for a better CPU can end up as everybody's copy of an inline function."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import setup

OBJECTS = sorted(
    (Path(__file__).parent.parent / "build" / f"ninja-{sys.implementation.cache_tag}").glob("*_isa.cpp.*.o")
)


def shared_names(listing: str, isa: str) -> list[str]:
    """Weak symbols (inline functions, templates) of an object that are outside sgm::<isa>."""
    lines = (line.split(maxsplit=1) for line in listing.splitlines())
    found = ((line[0], line[1]) for line in lines if len(line) == 2)
    return [s for kind, s in found if kind in "WVu" and f"sgm::{isa}::" not in s and not s.startswith("DW.ref")]


@pytest.mark.skipif(
    not OBJECTS or shutil.which("nm") is None, reason="needs the objects of a build in this tree, and nm"
)
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: p.name)
def test_no_shared_inline_functions(path):
    listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert listing
    listing = "\n".join(line[17:] for line in listing.splitlines())  # without addresses
    assert shared_names(listing, path.name.split(".")[-2]) == []


@pytest.mark.parametrize(
    "archs, want", [("", ["80", "90", "100", "120"]), ("90", ["90"]), ("90a, 100", ["90a", "100"])]
)
def test_which_gpus_the_cuda_library_is_for(monkeypatch, tmp_path, archs, want):
    monkeypatch.setenv("SGM_CUDA_ARCHS", archs)
    ninja = setup.Ninja(tmp_path)
    setup.build_cuda(ninja, tmp_path / "library.so", "nvcc")
    text = "\n".join(ninja.lines)
    assert list(dict.fromkeys(re.findall(r"code=sm_(\w+)", text))) == want
    assert ("code=compute_90" in text) == (not archs)


def test_a_gpu_that_is_none(monkeypatch):
    monkeypatch.setenv("SGM_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="SGM_CUDA_ARCHS must be numbers such as 90 or 100, got 'hopper'"):
        setup.cuda_archs()


def test_an_old_setuptools_is_told_how():
    """It would refuse pyproject.toml, in many words."""
    script = (
        "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=setup.ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "setuptools 65.5.0 is older than 77: update it, or build in place:" in run.stderr


def test_a_source_tree_imports_without_an_installation(tmp_path):
    """kernels/ lies beside sgm_engine/ there, and within it once installed."""
    script = (
        "import sgm_engine.kernels.dispatch as d, sgm_engine.kernels.tables.backend as b; print(d.__file__, b.read())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(setup.ROOT), *sys.path])}
    command = [sys.executable, "-S", "-c", script]  # without the hooks of an editable installation
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.stdout.startswith(str(setup.ROOT / "kernels" / "dispatch.py")), run.stderr


def test_a_shared_function_would_be_seen():
    listing = "W std::vector<int>::push_back(int&&)\nW sgm::avx2::f<int>(int)\nT sgm::avx2::g()\n"
    assert shared_names(listing, "avx2") == ["std::vector<int>::push_back(int&&)"]
