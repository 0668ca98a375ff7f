"""Shared by the tests: a tiny network on disk, and the command."""

import os
from types import SimpleNamespace

import pytest

from sgm_engine import _C

# Before PyTorch is imported: tests run side by side, and two of its thread pools on one core wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory):
    """Writes a random NCSN of three levels in the package's own format: its path."""
    import torch

    from sgm_engine.checkpoints.checkpoint import save_checkpoint
    from sgm_engine.models import NCSN

    def write(ngf, image_size, steps_per_level):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = NCSN([1.0, 0.3, 0.1], channels=1, ngf=ngf, divide_by_sigma=True, image_size=image_size)
        model.plan = {"name": "annealed_langevin", "steps_per_level": steps_per_level, "step_lr": 1e-3}
        path = tmp_path_factory.mktemp("weights") / f"ngf{ngf}.safetensors"
        save_checkpoint(model, path)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_weights(random_weights):
    """8×8, ngf 4; its plan takes 7 evaluations."""
    return random_weights(ngf=4, image_size=8, steps_per_level=2)


@pytest.fixture
def sgm(tmp_path, monkeypatch, capsys):
    """Runs ``sgm ARGUMENTS`` in tmp_path: its returncode, stdout, stderr. In this process: PyTorch takes seconds."""
    from sgm_engine.cli.main import main

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture(params=_C.isas())
def isa(request):
    """Runs the test once for each instruction set of this CPU."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads():
    """A function that sets the number of threads; undone after the test."""
    before = _C.num_threads()
    yield _C.set_num_threads
    _C.set_num_threads(before)
