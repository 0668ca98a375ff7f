"""Training under Lightning: the module, the callbacks on live weights, resume, DDP and the command."""

import copy
import csv
import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from tests.fake_graphs import FakeGraphs

pl = pytest.importorskip("lightning.pytorch", reason="training needs the extra [train]")

from lightning.pytorch.callbacks import EMAWeightAveraging  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from sgm_engine.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from sgm_engine.cli.console import Terminated  # noqa: E402
from sgm_engine.data.images import Batches  # noqa: E402
from sgm_engine.engine.engine import Engine  # noqa: E402
from sgm_engine.executors.graphs import GraphExecutor  # noqa: E402
from sgm_engine.models import NCSN  # noqa: E402
from sgm_engine.plans.plan import annealed_langevin  # noqa: E402
from sgm_engine.training import objectives  # noqa: E402
from sgm_engine.training.callbacks import EMA, SampleGrid, live_network  # noqa: E402
from sgm_engine.training.module import ScoreModule  # noqa: E402
from sgm_engine.training.toy import ScoreMLP  # noqa: E402

SIGMAS = [1.0, 0.3, 0.1]
PLAN = annealed_langevin(SIGMAS, 2, step_lr=1e-3)
IMAGES = (np.arange(40 * 64) * 37 % 251).astype(np.uint8).reshape(40, 1, 8, 8)
POINTS = IMAGES.reshape(-1, 1, 1, 2)
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


def points_net():
    return ScoreMLP(SIGMAS, width=8)


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


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def losses(folder):
    """{step: loss} of metrics.csv; a step that was done twice, before a kill and after it, must agree with itself."""
    rows = {}
    for step, loss, _ in csv.reader((folder / "metrics.csv").read_text().splitlines()):
        assert rows.setdefault(int(step), loss) == loss
    return rows


def train_command(*arguments):
    return [sys.executable, "-m", "sgm_engine", "train", "--config", "tiny.yaml", "--data", "images.npy", *arguments]


def test_command_and_resume_after_a_kill(sgm, data):
    """SIGKILL in the middle, the same command again: the same curve to the last digit, and the same weights."""
    changes = ("--accelerator", "cpu", "--set", "steps=40", "weights=float16")
    arguments = ("--config", "tiny.yaml", "--data", "images.npy", *changes)
    straight = sgm("train", *arguments, "--out", "straight")
    assert straight.returncode == 0, straight.stderr
    process = subprocess.Popen(
        train_command("--out", "killed", *changes), cwd=data,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics, deadline = data / "killed" / "metrics.csv", time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < 13:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (data / "killed" / "model.safetensors").exists()
    again = sgm("train", *arguments, "--out", "killed")
    assert again.returncode == 0 and "resumed at step" in again.stdout
    assert losses(data / "killed") == losses(data / "straight")
    weights = [(data / name / "model.safetensors").read_bytes() for name in ("killed", "straight")]
    assert weights[0] == weights[1]
    assert {t.dtype for t in load_file(data / "killed" / "model.safetensors").values()} == {torch.float16}
    drawn = sgm("sample", "--checkpoint", "killed/model.safetensors", "--n", 4, "--out", "x.png")
    assert drawn.returncode == 0, drawn.stderr


def test_two_processes_take_the_step_of_one(sgm, data):
    """torchrun with two processes on the same global batch: the same losses up to the rounding of a sum."""
    arguments = ("--set", "steps=4", "save_every=0", "sample_every=2", "--accelerator", "cpu")
    one = sgm("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "one", *arguments)
    assert one.returncode == 0, one.stderr
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, *train_command("--out", "two", *arguments)[1:]]
    done = subprocess.run(command, cwd=data, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ({step: float(v) for step, v in losses(data / name).items()} for name in ("one", "two"))
    assert list(two) == [1, 2, 3, 4]
    assert two == pytest.approx(one, rel=1e-5)
    assert (data / "two" / "samples" / "00000004.png").exists()


def test_validation_is_of_the_average(sgm, data):
    """val_loss at the last step is the objective of the weights that are written, on test.npy, with fixed noise."""
    (data / "set").mkdir()
    np.save(data / "set" / "train.npy", IMAGES[:32])
    np.save(data / "set" / "test.npy", IMAGES[32:])
    arguments = ("--config", "tiny.yaml", "--data", "set", "--out", "run", "--accelerator", "cpu", "--tensorboard")
    every = ("validate_every=3", "sample_every=3", "save_every=6")
    objective = ("objective=sliced", "objective_options={projections: 2}")
    done = sgm("train", *arguments, "--set", "steps=6", *every, *objective)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((data / "run" / "csv" / "version_0" / "metrics.csv").read_text().splitlines()))
    logged = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    network = load_checkpoint(data / "run" / "model.safetensors")
    module = ScoreModule(network, partial(objectives.sliced, projections=2))
    seen = []
    module.log = lambda name, value, **_: seen.append(value.item())
    for i in (0, 1):
        module.validation_step(torch.from_numpy(IMAGES[32 + 4 * i : 36 + 4 * i].copy()), i)
    assert len(logged) == 2 and logged[-1] == pytest.approx(sum(seen) / 2, rel=1e-5)
    assert list((data / "run").glob("tensorboard/*/events*"))


def test_a_finished_run_stays_as_it_is(sgm, data):
    """The command once more writes the average again, not the last weights; a changed run is refused."""
    arguments = ("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run", "--accelerator", "cpu")
    assert sgm(*arguments, "--set", "steps=5", "sample_every=0").returncode == 0
    first = (data / "run" / "model.safetensors").read_bytes()
    assert sgm(*arguments, "--set", "steps=5", "sample_every=0").returncode == 0
    assert (data / "run" / "model.safetensors").read_bytes() == first
    other = sgm(*arguments, "--set", "steps=5", "ngf=8")
    assert other.returncode == 2 and "run holds a run with ngf=4, not 8: name another folder" in other.stderr
    np.save(data / "images.npy", IMAGES[::-1])
    other = sgm(*arguments, "--set", "steps=5")
    assert other.returncode == 2 and "run on other data" in other.stderr


def test_a_loss_that_is_not_finite_stops_the_run(sgm, data):
    done = sgm("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run", "--accelerator", "cpu",
        "--set", "steps=40", "lr=1e30", "sample_every=0", "save_every=0")  # fmt: skip
    assert done.returncode == 1 and "the loss is " in done.stderr and "lower lr" in done.stderr
    assert not (data / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_control_c(sgm, data, monkeypatch, error, code):
    def interrupted(*_):
        raise error

    monkeypatch.setattr("sgm_engine.training.run.Report.on_train_batch_end", interrupted)
    assert sgm("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run").returncode == code


def test_a_grid_of_diverged_samples_is_a_warning(tmp_path):
    """A network that answers NaN costs the picture, not the training."""

    class Spoil(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            pl_module.network.end_conv.bias.data.fill_(torch.nan)

    with pytest.warns(UserWarning, match="step 1: 2 of 2 samples diverged"):
        fit(tmp_path, 1, [Spoil(), SampleGrid(every=1, n=2, plan=PLAN)])
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (("--data", "nowhere"), "nowhere: there is no such file or folder"),
        (("--config", "nothing"), "no such file, and none of cdm_cifar10, "),
        (("--set", "lr=fast"), "lr must be a number, got 'fast'"),
        (("--set", "learning_rate=1"), "unknown learning_rate; there are: "),
        (("--set", "levels=0"), "at least 2 levels"),
        (("--set", "lr=: :"), "--set lr: ': :' is no YAML value"),
        (("--out", "tiny.yaml"), "--out tiny.yaml: is a file"),
        (("--out", "."), "--out .: holds something else than a run"),
        pytest.param(
            ("--accelerator", "gpu"),
            "--accelerator: there is no GPU",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one"),
        ),
        (("--set", "batch"), "--set takes NAME=VALUE, got 'batch'"),
        (("--set", "objective=explicit"), "objective must be one of denoising"),
        (("--set", "precision=int8"), "precision must be one of float32"),
        (("--set", "validate_every=5"), "needs held-out data"),
        (("--set", "plan={name: nonesuch}"), "plan must be one of"),
        (("--init", "tiny.yaml"), "tiny.yaml"),
    ],
)
def test_bad_input_is_one_line(sgm, data, change, words):
    arguments = {"--config": "tiny.yaml", "--data": "images.npy", "--out": "run"} | {change[0]: change[1]}
    done = sgm("train", *(word for pair in arguments.items() for word in pair))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_without_lightning(sgm, data, monkeypatch):
    monkeypatch.delitem(sys.modules, "sgm_engine.training.run", raising=False)
    monkeypatch.delattr("sgm_engine.training.run", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    done = sgm("train", "--config", "tiny.yaml", "--data", "images.npy", "--out", "run")
    assert done.returncode == 2 and "pip install 'sgm-engine[train]'" in done.stderr


def test_bundled_configs(sgm):
    from sgm_engine.training.config import TrainConfig, config_names

    listed = sgm("train", "--list")
    assert listed.returncode == 0
    for name in config_names():
        config = TrainConfig.read(name)
        assert name in listed.stdout and config.lr > 0
        ours = ("ancestral", "ddim") if config.architecture == "CDM" else ("annealed_langevin",)
        assert config.model(3, 32).plan["name"] in ours
    assert TrainConfig.read("ncsnv2_cifar10").plan["step_lr"] == 6.2e-6  # YAML reads 6.2e-6 as text, 2e-5 too


def test_examples_of_the_configs_are_what_was_published():
    """Against checkpoint.PUBLISHED, which the loader of published weights goes by."""
    from sgm_engine.checkpoints.checkpoint import PUBLISHED
    from sgm_engine.training.config import TrainConfig

    for name, channels in (("ncsn_mnist", 1), ("ncsn_cifar10", 3), ("ncsnv2_cifar10", 3), ("ncsnv2_celeba", 3)):
        config = TrainConfig.read(name)
        published = PUBLISHED[config.architecture, config.levels, channels]
        assert config.sigma_begin == published.sigma_begin and config.sigma_end == 0.01
        assert {"denoise": True} | dict(config.plan) == {"name": "annealed_langevin"} | published.plan
