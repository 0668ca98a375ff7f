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


@pytest.fixture
def clone(tmp_path):
    """A source tree that is not built."""
    skip = shutil.ignore_patterns("*.so", "__pycache__", "weights")
    shutil.copytree(setup.ROOT / "sgm_engine", tmp_path / "clone" / "sgm_engine", ignore=skip)
    shutil.copytree(setup.ROOT / "kernels", tmp_path / "clone" / "kernels", ignore=skip)
    return tmp_path / "clone"


def started_in(folder, *path, script):
    """``python -c script`` in a folder, which Python puts first, with further folders behind it."""
    script = f"import sys; sys.path[1:1] = {list(map(str, path))!r}; {script}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p and p != str(setup.ROOT))}
    command = [sys.executable, "-S", "-c", script]  # without the hooks of an editable installation
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_a_clone_that_is_not_built_hands_over_to_an_installation(clone, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for name in ("sgm_engine", "kernels"):
        (site / name).symlink_to(setup.ROOT / name)
    script = "import sgm_engine as s; from sgm_engine import _C, plans; print(s.__file__, _C.__file__, plans.__file__)"
    run = started_in(clone, site, script=script + "; import sgm_engine.kernels.dispatch as d; print(d.__file__)")
    assert run.returncode == 0, run.stderr
    assert all(name.startswith(str(site)) for name in run.stdout.split()), run.stdout
    assert (
        f"the C++ of the source tree {clone} is not built, so the installation in {site}/sgm_engine is used"
        in run.stderr
    )
    run = started_in(site, clone, script=script)  # the other way round there is nothing to say
    assert (run.returncode, run.stderr) == (0, "") and str(clone) not in run.stdout


def test_a_clone_without_an_installation_says_what_to_do(clone):
    run = started_in(
        clone, script="import sgm_engine; print(sgm_engine.geometric(1, 0.1, 2)); from sgm_engine import _C"
    )
    assert run.stdout == "[1.  0.1]\n" and run.returncode == 1
    says = f"ImportError: the C++ of sgm_engine is not built in {clone}/sgm_engine: `pip install -e .` builds it there"
    assert says in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "want, gpu, nvcc, built", [("auto", 1, 1, 1), ("auto", 0, 1, 0), ("auto", 1, 0, 0), ("0", 1, 1, 0), ("1", 0, 1, 1)]
)
def test_the_cuda_library_is_built_where_a_gpu_is_or_on_request(monkeypatch, tmp_path, capsys, want, gpu, nvcc, built):
    (tmp_path / "nvcc").touch(mode=0o755 if nvcc else 0o644)
    for name, value in (("SGM_WITH_CUDA", want), ("PATH", str(tmp_path)), ("CUDA_HOME", str(tmp_path / "none"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setup, "has_gpu", lambda: bool(gpu))
    assert setup.find_nvcc() == (str(tmp_path / "nvcc") if built else None)
    assert ("SGM_WITH_CUDA=1 builds it all the same" in capsys.readouterr().out) == (want == "auto" and not gpu)


def test_a_shared_function_would_be_seen():
    listing = "W std::vector<int>::push_back(int&&)\nW sgm::avx2::f<int>(int)\nT sgm::avx2::g()\n"
    assert shared_names(listing, "avx2") == ["std::vector<int>::push_back(int&&)"]
