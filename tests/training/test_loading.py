"""The order of images in a user's own loop: workers, processes, a resumed run; and weights in other precisions."""

import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sgm_engine.data.images import Batches

pl = pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")

from sgm_engine.training.callbacks import EMA, SampleGrid  # noqa: E402
from sgm_engine.training.loader import ImageBatches  # noqa: E402
from sgm_engine.training.module import ScoreModule  # noqa: E402
from tests.training.runs import IMAGES, PLAN, quiet, tiny_net  # noqa: E402, F401

OFF = {"accelerator": "cpu", "max_epochs": -1, "logger": False, "enable_progress_bar": False}
OFF |= {"enable_model_summary": False}


def take(loader, n):
    iterator = iter(loader)
    return [next(iterator) for _ in range(n)]


def test_workers_share_the_batches_in_order():
    batches = Batches(IMAGES, 4, seed=3)
    got = take(DataLoader(batches, None, num_workers=2), 5)
    assert all(torch.equal(x, batches.read(t)) for t, x in enumerate(got))


def test_processes_share_a_batch(monkeypatch):
    whole = Batches(IMAGES, 8, seed=3).read(2)
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        batches = Batches(IMAGES, 4, seed=3)
        parts.append(batches.read(2))
        copy = pickle.loads(pickle.dumps(batches))
        monkeypatch.setenv("RANK", "0")
        assert torch.equal(copy.read(2), parts[-1])  # a worker that is started afresh keeps its process's place
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(Batches(IMAGES, 4, seed=3, rank=1, world=2).read(2), parts[1])


GROUP = """
import sys, numpy as np, torch
from sgm_engine.data.images import Batches
torch.distributed.init_process_group("gloo")
for name in ("RANK", "WORLD_SIZE"):
    import os; os.environ.pop(name)
x = Batches(np.load(sys.argv[1]), 4, seed=3).read(2)
parts = [torch.empty_like(x) for _ in range(2)]
torch.distributed.all_gather(parts, x)
assert torch.equal(torch.cat(parts), Batches(np.load(sys.argv[1]), 8, seed=3, rank=0, world=1).read(2))
torch.distributed.destroy_process_group()
"""


def test_a_process_group_is_asked(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    (tmp_path / "group.py").write_text(GROUP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    done = subprocess.run(
        [*launch, "group.py", "images.npy"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_position_is_kept():
    straight = take(Batches(IMAGES, 4, seed=3), 6)
    first = Batches(IMAGES, 4, seed=3)
    assert first.state_dict() == {"batch": 0}
    take(first, 4)
    second = Batches(IMAGES, 4, seed=3)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(take(second, 2), straight[4:], strict=True))
    assert Batches(IMAGES, 4, start=3).state_dict() == Batches(IMAGES, 4, start=lambda: 3).state_dict() == {"batch": 3}


@pytest.mark.parametrize(
    "place, says", [((1, None), "give both or neither"), ((2, 2), r"rank must lie in \[0, world\)")]
)
def test_a_bad_place(place, says):
    with pytest.raises(ValueError, match=says):
        Batches(IMAGES, 4, rank=place[0], world=place[1])


class Seen(pl.Callback):
    def __init__(self):
        self.batches, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, *_):
        self.batches.append(batch.clone())
        self.losses.append(trainer.callback_metrics["loss"].item())


def lightning_run(folder, steps, resume=None, workers=0, **options):
    seen, module = Seen(), ScoreModule(tiny_net(), lr=1e-3, seed=3)
    trainer = pl.Trainer(max_steps=steps, callbacks=[seen], default_root_dir=folder, enable_checkpointing=False,
        **OFF | options)  # fmt: skip
    trainer.fit(module, ImageBatches(IMAGES, 4, seed=3, workers=workers), ckpt_path=resume, weights_only=True)
    return trainer, seen


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_in_the_middle_of_an_epoch(tmp_path, workers):
    """Saved after three batches of ten, and gone on with: the batches and the losses of the run that never stopped."""
    _, straight = lightning_run(tmp_path, 5)
    trainer, _ = lightning_run(tmp_path, 3, workers=workers)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    _, rest = lightning_run(tmp_path, 5, resume=tmp_path / "three.ckpt", workers=workers)
    assert len(rest.batches) == 2
    assert all(torch.equal(a, b) for a, b in zip(rest.batches, straight.batches[3:], strict=True))
    assert rest.losses == straight.losses[3:]


def test_accumulated_batches_go_on(tmp_path):
    _, seen = lightning_run(tmp_path, 2, accumulate_grad_batches=2)
    want = take(Batches(IMAGES, 4, seed=3), 4)
    assert all(torch.equal(a, b) for a, b in zip(seen.batches, want, strict=True))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_in_other_precisions(tmp_path, precision):
    """Noise and loss stay float32, so the first loss is float32's to the rounding of the weights; grids are drawn."""
    _, plain = lightning_run(tmp_path, 1)
    grids = SampleGrid(every=1, n=2, plan=PLAN, folder=tmp_path / "grids")
    seen, module = Seen(), ScoreModule(tiny_net(), lr=1e-4, adam_eps=1e-4, seed=3)  # 1e-8 is 0 in float16
    trainer = pl.Trainer(max_steps=1, precision=precision, callbacks=[EMA(0.9), seen, grids], default_root_dir=tmp_path,
        enable_checkpointing=False, **OFF)  # fmt: skip
    coarse = pytest.warns(UserWarning, match="too coarse to move") if precision != "64-true" else nullcontext()
    with coarse:
        trainer.fit(module, ImageBatches(IMAGES, 4, seed=3))
    assert seen.losses[0] == pytest.approx(plain.losses[0], rel={"64-true": 1e-5}.get(precision, 0.05))
    assert next(module.parameters()).dtype == {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(
        precision, torch.float64
    )
    assert len(list((tmp_path / "grids").iterdir())) == 1
