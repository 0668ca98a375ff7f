"""Shared by the tests: a tiny network on disk, and the command."""

import os
from types import SimpleNamespace

import pytest

# Before PyTorch is imported: tests run side by side, and two of its thread pools on one core wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A random NCSN (8×8, ngf 4, three levels) in the package's own format; its plan takes 7 evaluations."""
    import torch

    from sgm_engine.checkpoint import save_checkpoint
    from sgm_engine.models import NCSN

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NCSN([1.0, 0.3, 0.1], channels=1, ngf=4, divide_by_sigma=True, image_size=8)
    model.plan = {"name": "annealed_langevin", "steps_per_level": 2, "step_lr": 1e-3}
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(model, path)
    return path


@pytest.fixture
def sgm(tmp_path, monkeypatch, capsys):
    """Runs ``sgm ARGUMENTS`` in tmp_path: its returncode, stdout, stderr. In this process: PyTorch takes seconds."""
    from sgm_engine.cli import main

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    return run
