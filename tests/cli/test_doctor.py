"""doctor.py: says what is there, and what is not, without ever failing."""

import builtins
import json
import os
import subprocess
import sys

import pytest
import torch

import sgm_engine
from sgm_engine import _C
from sgm_engine.cli import doctor


def test_facts_are_those_of_this_machine():
    found = doctor.facts()
    assert list(found) == ["system", "packages", "cpu", "gpu", "ops", "executor", "weights"]
    assert sgm_engine.__version__ in found["system"]["sgm-engine"]
    assert found["packages"]["torch"] == torch.__version__
    assert found["cpu"]["instruction set"].startswith(_C.isa())
    assert found["cpu"]["threads"].startswith(str(_C.num_threads()))
    gpu = torch.cuda.is_available()
    assert found["gpu"]["device"].startswith("none: ") != gpu
    assert gpu or [*found["executor"]] == ["float32", "bfloat16", "direct"]
    assert all(said.startswith("graph" if gpu else "native") for said in found["executor"].values())
    assert set(found["ops"]) == {"noise_fill_", "langevin_update_", "noise_conditioned_norm"}


def test_text_holds_every_fact_on_a_line_of_its_own():
    found = doctor.facts()
    lines = doctor.render(found).splitlines()
    for section, values in found.items():
        assert section in lines
        for name, value in values.items():
            assert any(line.split(None, 1)[0] == name.split()[0] and line.endswith(value) for line in lines if line)


def test_weights_are_listed_without_numpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sgm_engine.checkpoints.bundled", None)  # its first import
    assert [*doctor._weights()] == ["cdm_mnist", "mnist"]


def test_a_missing_package_is_one_line(sgm, monkeypatch):
    monkeypatch.setitem(sys.modules, "sgm_engine.engine.engine", None)
    done = sgm("sample")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "there is no module sgm_engine.engine.engine: pip install sgm-engine brings it" in done.stderr


def test_json_on_the_command_line(sgm):
    done = sgm("doctor", "--json")
    assert done.returncode == 0 and json.loads(done.stdout).keys() == doctor.facts().keys()


@pytest.mark.parametrize("forced, said", [("generic", "generic: forced by SGM_ISA"), ("abacus", "abacus")])
def test_a_forced_instruction_set_is_said(forced, said):
    """In a process of its own: the choice is made once. One that cannot be had is reported, not raised."""
    command = [sys.executable, "-m", "sgm_engine", "doctor"]
    done = subprocess.run(command, env=os.environ | {"SGM_ISA": forced}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and said in done.stdout


@pytest.mark.parametrize("missing", ["torch", "sgm_engine._C", "triton"])
def test_what_is_missing_is_said_and_not_raised(missing, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    def import_module(name):
        return without(name) if name == missing else __import__(name, fromlist=["_"])

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    found = doctor.facts()
    if missing == "torch":
        assert "PyTorch is missing" in found["gpu"]["device"]
    if missing == "sgm_engine._C":
        assert found["cpu"]["C++ kernels"].startswith("the C++ of sgm_engine is not built in ")
        assert "not built" in found["ops"]["langevin_update_"]
    assert doctor.render(found)
