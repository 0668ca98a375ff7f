"""Shared by the tests: a tiny network on disk, and a run of the command."""

import subprocess
import sys

import pytest


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
def sgm(tmp_path):
    """Runs ``sgm ARGUMENTS`` in tmp_path as a process of its own; returns the finished process, output as text."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "sgm_engine", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, **options)

    return run
