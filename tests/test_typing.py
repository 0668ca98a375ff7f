"""The public surface is typed: a user's program passes mypy --strict, and no public signature leaves anything open."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sgm_engine

ROOT = Path(__file__).parents[1]
USER = ROOT / "tests" / "typed" / "user.py"


def check(folder, source):
    """mypy --strict of a program beside which sgm_engine is found as an installed package is: its own errors unsaid."""
    pytest.importorskip("mypy", reason="pip install 'sgm-engine[test]'")
    (folder / "user.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "user.py"]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]
    env = {"MYPYPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_users_program_is_clean(tmp_path):
    run = check(tmp_path, USER.read_text())
    assert run.returncode == 0, run.stdout + run.stderr


def test_and_its_mistakes_are_found(tmp_path):
    source = "from sgm_engine import Engine, geometric, load_bundled\nmodel, plan = load_bundled()\n"
    source += 'Engine(model, batch="16")\nEngine(model).sample(4).nonsense()\ngeometric(1, 0.1, 3).nonsense()\n'
    run = check(tmp_path, source)
    assert run.stdout.count("error:") == 3, run.stdout
    assert all(f"user.py:{line}: error" in run.stdout for line in (3, 5)) and '"Tensor"' in run.stdout


def test_the_marker_is_there():
    assert (Path(sgm_engine.__file__).parent / "py.typed").is_file()


def bare(function):
    """What a signature leaves without a type."""
    signature = inspect.signature(function)
    names = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    ends = function.__name__ != "__init__" and signature.return_annotation is signature.empty
    return names + ["its result"] * ends


@pytest.mark.parametrize("name", sgm_engine.__all__)
def test_public_signatures_are_whole(name):
    thing = getattr(sgm_engine, name)
    if not inspect.isclass(thing):
        assert bare(thing) == []
        return
    for method, found in vars(thing).items():
        if inspect.isfunction(found) and (method == "__init__" or not method.startswith("_")):
            assert bare(found) == [], method
