"""Training under Lightning: the module, the callbacks on live weights, resume, DDP and the command."""

import copy
import gc
import io
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from PIL import Image

from tests.fake_graphs import FakeGraphs

pl = pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")
from lightning.pytorch.callbacks import EMAWeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from sgm_engine.data.images import Batches  # noqa: E402
from sgm_engine.engine.engine import Engine  # noqa: E402
from sgm_engine.executors.graphs import GraphExecutor  # noqa: E402
from sgm_engine.training import run  # noqa: E402
from sgm_engine.training.callbacks import EMA, SampleGrid, live_network  # noqa: E402
from sgm_engine.training.module import ScoreModule  # noqa: E402
from sgm_engine.training.toy import ScoreMLP  # noqa: E402
from tests.training.runs import (  # noqa: E402
    IMAGES,
    PLAN,
    SIGMAS,
    data,  # noqa: F401 - fixtures
    fit,
    tiny_net,
)

POINTS = IMAGES.reshape(-1, 1, 1, 2)


def points_net():
    return ScoreMLP(SIGMAS, width=8)


class Watch(pl.Callback):
    """After every grid: what the engine is, where its weights lie, and whether its samples are those of the average."""

    def __init__(self, grids):
        self.grids, self.seen, self.samples = grids, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        engine, network = self.grids.engine, live_network(trainer, pl_module)
        pointers = tuple(t.data_ptr() for t in (*network.parameters(), *network.buffers()))
        self.seen.append((id(engine), engine.model is network, pointers, engine.stats.captures))
        fresh = Engine(copy.deepcopy(network).eval(), 4, executor="eager").sample(3, 0, PLAN)
        self.samples.append((self.grids.draw(trainer, pl_module), fresh))


class GraphGrid(SampleGrid):
    """SampleGrid on the graph executor, with the backend of test_executor that records and replays without a GPU."""

    def draw(self, trainer, pl_module):
        if self.engine is None:
            network = live_network(trainer, pl_module)
            self.engine = Engine(network, 4, executor="eager")
            self.engine._bind(GraphExecutor(FakeGraphs()))
        return super().draw(trainer, pl_module)


@pytest.mark.parametrize("average", [EMA, EMAWeightAveraging])
def test_grids_come_from_the_live_average(tmp_path, average):
    """Every grid: the same engine, on the averaged network itself, one capture for all; samples follow the weights."""
    grids = GraphGrid(every=1, n=3, plan=PLAN)
    watch = Watch(grids)
    fit(tmp_path, 5, [average(decay=0.5), grids, watch], points_net(), POINTS)
    assert len(watch.seen) == 5 and len(set(watch.seen)) == 1
    assert watch.seen[0][1] and watch.seen[0][3] == 1
    for drawn, fresh in watch.samples:
        torch.testing.assert_close(drawn, fresh, rtol=0, atol=1e-5)
    drawn = torch.stack([x for x, _ in watch.samples])
    assert (drawn[1:] - drawn[:-1]).abs().amax((1, 2, 3, 4)).min() > 1e-4  # a stale copy would not pass
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"{i:08d}.png" for i in range(1, 6)]


def test_grids_without_an_average_leave_the_module_training(tmp_path):
    grids = SampleGrid(every=1, n=2, plan=PLAN)
    watch = Watch(grids)
    _, module = fit(tmp_path, 2, [grids, watch])
    assert module.network.training and watch.seen[0][1]
    assert watch.seen[0][2][0] == next(module.network.parameters()).data_ptr()


def test_a_grid_takes_few_steps_and_says_once_what_it_costs(tmp_path):
    said = []
    fit(tmp_path, 3, [SampleGrid(every=1, n=2, say=said.append)])
    levels = len(tiny_net().sigmas)
    assert len(said) == 1 and said[0].startswith(f"a grid of 2 samples, {levels} evaluations each: ")
    assert said[0].endswith(" s, every 1 steps")


def test_every_logger_that_takes_pictures_gets_the_grid(tmp_path):
    """Lightning's W&B logger has log_image, TensorBoard's experiment add_image, CSV's neither."""
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    wandb, board = create_autospec(WandbLogger, instance=True), TensorBoardLogger(tmp_path, "board")
    loggers = [wandb, board, CSVLogger(tmp_path, "csv")]
    trainer = SimpleNamespace(loggers=loggers, global_step=7, default_root_dir=tmp_path)
    SampleGrid()._write(trainer, image)
    (name, images), options = wandb.log_image.call_args
    assert (name, images[0] is image, options) == ("samples", True, {"step": 7})
    board.experiment.flush()
    events = EventAccumulator(board.log_dir).Reload()
    (kept,) = events.Images("samples")
    assert kept.step == 7 and np.array_equal(Image.open(io.BytesIO(kept.encoded_image_string)), image)
    assert (tmp_path / "samples" / "00000007.png").is_file()


def test_a_run_is_never_silent_for_long(tmp_path, caplog, monkeypatch):
    """25 s a step, figures every 4: a line after the first step, and between figures once 30 s had none."""
    now = [0.0]
    caplog.set_level("INFO", "sgm_engine")
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    report = run.Report(tmp_path, 4, keep=None)
    trainer = SimpleNamespace(global_step=0, max_steps=10, is_global_zero=True)
    trainer.callback_metrics = {"loss": torch.tensor(2.0)}
    report.on_train_start(trainer, None)
    for step in range(1, 9):
        now[0], trainer.global_step = 25.0 * step, step
        report.on_train_batch_end(trainer, None, None)
    said = [line.split() for line in caplog.messages]
    assert [words[1] for words in said] == ["1/10", "3/10", "4/10", "6/10", "8/10"]
    assert said[0][2:] == ["25.000", "s/step", "00:03:45", "left"]
    assert said[2][2:] == ["loss", "2.000", "25.000", "s/step", "00:02:30", "left"]


def test_ema_is_the_running_average_by_hand(tmp_path):
    weights = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights.append(pl_module.network.begin_conv.weight.detach().clone())

    ema = EMA(0.9)
    averages = []

    class KeepAverage(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            averages.append(live_network(trainer, pl_module).begin_conv.weight.detach().clone())

    _, module = fit(tmp_path, 6, [Keep(), ema, KeepAverage()])
    average = weights[0]
    for n, (w, kept) in enumerate(zip(weights, averages, strict=True)):
        if n:  # the first update copies
            d = min(0.9, (1 + n) / (10 + n))
            average = d * average + (1 - d) * w
        torch.testing.assert_close(kept, average, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.network.begin_conv.weight.detach(), average, rtol=0, atol=1e-6)
    assert torch.equal(module.network.sigmas, tiny_net().sigmas)  # untouched to the bit


@pytest.mark.parametrize("executor", ["graph", "native"])
def test_fifty_turns_of_training_and_sampling(executor):
    """One engine, one network, 50 times a step and a draw: no new capture, no growth, samples follow the weights."""
    network, images = (points_net(), POINTS) if executor == "graph" else (tiny_net(), IMAGES)
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    module, data = ScoreModule(network, seed=3), Batches(images, 4)
    engine = Engine(network, 4, executor="eager" if executor == "graph" else executor)
    if executor == "graph":
        engine._bind(GraphExecutor(FakeGraphs()))
    last, alive = None, []
    for turn in range(50):
        network.train()
        loss = module.loss(data.read(turn), torch.arange(4 * turn, 4 * turn + 4))
        adam.zero_grad()
        loss.backward()
        adam.step()
        network.eval()
        x = engine.sample(3, 0, PLAN)
        assert last is None or (x - last).abs().max() > 5e-5
        last = x
        if turn % 10 == 9:
            fresh = Engine(copy.deepcopy(network), 4, executor="eager").sample(3, 0, PLAN)
            torch.testing.assert_close(x, fresh, rtol=0, atol=2e-5)
            gc.collect()
            alive.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert alive[1:] == alive[1:2] * 4
    if executor == "graph":
        assert engine.stats.captures == 1 and engine._executor.backend.replays == 50 * PLAN.nfe


def test_precision_is_lightnings(tmp_path):
    """Mixed precision trains float32 parameters, to the bit as the same steps by hand under PyTorch's autocast."""
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        trainer, module = fit(tmp_path, 3, [], precision=precision)
        found[precision] = trainer.callback_metrics["loss"].item()
    by_hand = ScoreModule(tiny_net(), lr=1e-3, seed=3)
    adam = torch.optim.Adam(by_hand.parameters(), 1e-3)
    for step, x in zip(range(3), Batches(IMAGES, 4, seed=3), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = by_hand.loss(x, torch.arange(4 * step, 4 * step + 4))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert found["bf16-mixed"] == loss.item() != found["32-true"]
    for trained, want in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert trained.dtype == torch.float32 and torch.equal(trained, want)


def test_other_peoples_data_and_objective(tmp_path):
    """Float batches from any DataLoader, labels beside them, and a function of one's own as the objective."""
    seen = []

    def objective(model, x, levels, key):
        seen.append((x.dtype, levels.clone(), key.sample_id.clone()))
        return model(x, levels).square().mean()

    data = torch.utils.data.TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8))
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(ScoreModule(tiny_net(), objective), DataLoader(data, 4, shuffle=True))
    assert [ids.tolist() for _, _, ids in seen] == [[4 * i + j for j in range(4)] for i in range(4)]
    assert seen[0][0] == torch.float32 and all(level.min() >= 0 and level.max() < 3 for _, level, _ in seen)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"objective": "likelihood"}, "objective must be one of"),
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"decay": 0.5}, "needs steps"),
        ({"decay": 2.0, "steps": 5}, "decay must lie in"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_arguments(wrong, words):
    with pytest.raises(ValueError, match=words):
        ScoreModule(tiny_net(), **wrong)


def test_learning_rate():
    module = ScoreModule(tiny_net(), warmup=10, decay=0.25, steps=100)
    assert [module.learning_rate(t) for t in (0, 4, 9, 50, 75, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.04])
