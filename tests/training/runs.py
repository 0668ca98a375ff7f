"""What the tests of training share."""

import warnings

import numpy as np
import pytest
import torch

pl = pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")
from torch.utils.data import DataLoader  # noqa: E402

from sgm_engine.data.images import Batches  # noqa: E402
from sgm_engine.models import NCSN  # noqa: E402
from sgm_engine.plans.plan import annealed_langevin  # noqa: E402
from sgm_engine.training.module import ScoreModule  # noqa: E402

SIGMAS = [1.0, 0.3, 0.1]


PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)


IMAGES = (np.arange(40 * 64) * 37 % 251).astype(np.uint8).reshape(40, 1, 8, 8)


TINY = "architecture: NCSN\nngf: 4\nsigma_begin: 1.0\nsigma_end: 0.1\nlevels: 3\nbatch: 4\nlr: 1e-3\nlog_every: 1\n"


TINY += "plan: {name: annealed_langevin, steps_per_level: 1, step_lr: 1e-3}\nsave_every: 5\nsample_every: 10\n"


@pytest.fixture(autouse=True)
def quiet():
    """One thread, and none of Lightning's advice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def tiny_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NCSN(SIGMAS, channels=1, ngf=4, divide_by_sigma=True, image_size=8)


def fit(folder, steps, callbacks, network=None, images=IMAGES, **options):
    module = ScoreModule(network or tiny_net(), lr=1e-3, seed=3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(Batches(images, 4, seed=3), None))
    return trainer, module


@pytest.fixture
def data(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path
