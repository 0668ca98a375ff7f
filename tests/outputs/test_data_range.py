"""Data in [−1, 1], or any other range: what is written is what the same samples make when mapped by hand."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from sgm_engine import Engine, SamplerService, as_score, at_sigmas, geometric
from sgm_engine.checkpoints.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from sgm_engine.data.sets import from_array, open_images
from sgm_engine.evaluation.draw import drawn
from sgm_engine.jobs.formats import FORMATS
from sgm_engine.jobs.job import Job, generate
from sgm_engine.jobs.merge import merge
from sgm_engine.jobs.resample import resample
from sgm_engine.jobs.spec import JobError, JobSpec
from sgm_engine.models.guidance import classifier_free, with_drift
from sgm_engine.outputs import images
from sgm_engine.outputs.output import Output

N, SHARD = 10, 4


class Coins(nn.Module):
    """The exact denoiser of pixels that are 0 or 1, scaled to ``low`` and ``high``."""

    def __init__(self, low, high):
        super().__init__()
        self.middle = nn.Parameter(torch.tensor((low + high) / 2), requires_grad=False)
        self.half = (high - low) / 2

    def forward(self, x, sigma):
        variance = sigma[:, None, None, None] ** 2
        return self.middle + self.half * torch.tanh(self.half * (x - self.middle) / variance)


def engine(low=-1, high=1, named=True, **options):
    """named: whether the model says its range."""
    data_range = (low, high) if named else None
    score = as_score(Coins(low, high), "denoiser", geometric(20, 0.05, 12), data_range=data_range)
    return Engine(score, 4, shape=(1, 4, 4), **options)


@pytest.fixture(scope="module")
def samples():
    return engine().sample(N, seed=3)


def by_hand(x, low=-1.0, high=1.0):
    """uint8 [N, H, W, C]."""
    unit = (torch.as_tensor(x) - low) / (high - low)
    return np.floor(unit.clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255 + 0.5).astype(np.uint8)


def test_to_uint8_maps_the_range_to_bytes():
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0, -1.1, 1.1]).reshape(1, 1, 2, 3)
    assert images.to_uint8(x, (-1, 1)).ravel().tolist() == [0, 64, 128, 255, 0, 255]
    assert images.to_uint8(128 * x.clamp(0) + 1, (1, 129)).ravel().tolist() == [0, 0, 0, 255, 0, 255]


@pytest.mark.parametrize("bad", [(1, -1), (0, 0), (0, float("inf")), (0, 1, 2), 3, "ab", (None, 1)])
def test_a_range_ascends(bad):
    for refuses in (
        lambda: images.to_uint8(torch.zeros(1, 1, 2, 2), bad),
        lambda: as_score(Coins(0, 1), "denoiser", [1.0, 0.5], data_range=bad),
        lambda: Engine(lambda x, level: x, 1, sigmas=[1.0], shape=(1, 2, 2), data_range=bad),
        lambda: from_array(np.zeros((1, 1, 2, 2)), data_range=bad),
    ):
        with pytest.raises(ValueError, match=r"data_range must be \(low, high\), such as \(-1, 1\), got"):
            refuses()


def test_samples_and_pictures_of_an_engine(samples):
    assert samples.min() < -0.9 and samples.max() > 0.9
    pictures = engine().pictures(samples)
    assert np.array_equal(pictures, by_hand(samples)) and pictures.min() == 0 and pictures.max() == 255
    assert np.array_equal(engine(named=False, data_range=(-1, 1)).pictures(samples), pictures)
    assert not np.array_equal(engine(named=False, data_range=(-2, 2)).pictures(samples), pictures)


def test_what_is_made_of_a_model_has_its_range():
    score = engine().model
    for other in (
        at_sigmas(score, [3.0, 1.0]),
        with_drift(score, lambda x, s: 0 * x),
        classifier_free(score, score, 2),
    ):
        assert Engine(other, 1, shape=(1, 4, 4)).data_range == (-1, 1)
    assert as_score(score).data_range == (-1, 1)


@pytest.mark.parametrize("form", FORMATS)
def test_jobs_merges_and_resampling(tmp_path, samples, form):
    low, high, want = -1.0, 1.0, by_hand(samples)
    assert generate(engine(), tmp_path / "job", N, seed=3, format=form, shard_size=SHARD).complete
    job = Job(engine(), tmp_path / "job", N, seed=3, format=form, shard_size=SHARD)
    lossless = FORMATS[form].lossless
    for shard in range(3):
        record, held = job.folder.read(job.spec, shard)
        assert np.array_equal(held, (samples.numpy() if lossless else want)[record.ids])
    assert resample(engine(), tmp_path / "job", 7)[1]
    merge([tmp_path / "job"], tmp_path / "all.npz")
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], want)
    if lossless:
        merge([tmp_path / "job"], tmp_path / "all.safetensors")
        for path in (tmp_path / "all.safetensors", tmp_path / "job" / "shard-000000.safetensors"):
            with safe_open(path, "np") as file:
                assert json.loads(file.metadata()["data_range"]) == [low, high]
    assert "[-1, 1]" in (tmp_path / "job" / "README.md").read_text()
    assert JobSpec.from_json((tmp_path / "job" / "run.json").read_text())[0] == job.spec
    with pytest.raises(JobError, match="data_range was"):
        Job(engine(data_range=(-2, 2)), tmp_path / "job", N, seed=3, format=form, shard_size=SHARD)
    with pytest.raises(JobError, match="data_range was"):
        resample(engine(data_range=(-2, 2)), tmp_path / "job", 7)


def test_files(tmp_path, samples):
    want, ids = by_hand(samples), range(N)
    for name in ("x.npz", "x.png", "x.safetensors"):
        Output.parse(str(tmp_path / name)).write(samples.numpy(), ids, None, (-1.0, 1.0))
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], want)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), images.grid(want)[:, :, 0])
    assert np.array_equal(open_images(tmp_path / "x.safetensors").all().permute(0, 2, 3, 1), want)


def test_a_service_gives_them_to_its_engine(samples):
    with SamplerService(engine()) as service:
        x = service.submit(N, seed=3).result()
        assert np.array_equal(service.engine.pictures(x), by_hand(samples))


def test_the_evaluation_draws_and_reads_them(tmp_path, samples):
    want = torch.from_numpy(by_hand(samples)).permute(0, 3, 1, 2)
    mine = engine()
    assert torch.equal(torch.cat([*drawn(mine, mine.default_plan, range(N), 3, [], size=4)]), want)
    np.save(tmp_path / "x.npy", samples.numpy())
    assert torch.equal(open_images(tmp_path / "x.npy", data_range=(-1, 1)).all(), want)
    assert torch.equal(from_array(samples, data_range=(-1, 1)).all(), want)
    with pytest.raises(ValueError, match=r"name their range, data_range=\(-1, 1\) or --data-range -1 1"):
        open_images(tmp_path / "x.npy").all()


def test_both_adapters_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")
    from sgm_engine.integrations.diffusers import PlanPipeline, PlanScheduler, score_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
        unet = diffusers.UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=2, **blocks).eval()
    scheduler = PlanScheduler(clip_sample=True)
    pipe = PlanPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    x, pictures = (pipe(3, torch.Generator().manual_seed(0), 5, output_type=form).images for form in ("latent", "pil"))
    assert x.min() < -0.5
    assert np.array_equal(np.stack([np.asarray(p) for p in pictures])[..., None], by_hand(x))
    for clip in (True, False):
        mine = Engine(score_model(unet, PlanScheduler(clip_sample=clip), 5), 3)
        assert mine.data_range == (-1, 1) and np.array_equal(mine.pictures(x), by_hand(x))


def test_a_checkpoint_keeps_its_range(tmp_path, tiny_weights):
    model = load_checkpoint(tiny_weights, data_range=(-1, 1))
    assert Engine(at_sigmas(model, [0.8, 0.2]), 1).data_range == (-1, 1)
    save_checkpoint(model, tmp_path / "of.safetensors")
    assert load_checkpoint(tmp_path / "of.safetensors").data_range == (-1, 1)
    assert load_checkpoint(tiny_weights).data_range == (0, 1)
    save_checkpoint(load_checkpoint(tiny_weights), tmp_path / "same.safetensors")
    assert (tmp_path / "same.safetensors").read_bytes() == Path(tiny_weights).read_bytes()
    with pytest.raises(CheckpointError, match="data_range must be"):
        load_checkpoint(tiny_weights, data_range=(1, 1))


def test_the_command(sgm, tmp_path, tiny_weights):
    def draw(*more):
        done = sgm("sample", "--checkpoint", tiny_weights, "--batch", 4, "--n", 5, "--data-range", -2, 3, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "of data in [-2, 3]" in draw("--out", "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        want = by_hand(file.get_tensor("samples"), -2, 3)
    draw("--out", "x.npz")
    draw("--out", "run/")
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], want)
    assert sgm("resample", "run", "--id", 3, "--out", "three.png").returncode == 0
    for picture in ("three.png", "run/000003.png"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / picture)), want[3, :, :, 0])
    generate(Engine(load_checkpoint(tiny_weights), 4, data_range=(-2, 3)), tmp_path / "made", 5)
    assert sgm("resample", "made", "--id", 3, "--checkpoint", tiny_weights, "--out", "same.png").returncode == 0
    assert (tmp_path / "same.png").read_bytes() == (tmp_path / "three.png").read_bytes()
    assert sgm("convert", tiny_weights, "new.safetensors", "--data-range", -2, 3).returncode == 0
    assert load_checkpoint(tmp_path / "new.safetensors").data_range == (-2, 3)
    figures = []
    own = ["--n", 5, "--checkpoint", tiny_weights, "--batch", 4, "--data-range", -2, 3]
    for measured in (["x.npz"], ["x.safetensors"], own):
        done = sgm("eval", *measured, "--reference", "x.npz", "--metrics", "sliced", "--json", "report.json")
        assert done.returncode == 0, done.stderr
        figures.append(json.loads((tmp_path / "report.json").read_text())["rows"][0]["value"])
    assert figures == [0, 0, 0]


def test_clamping_is_said_once_with_the_remedy(tmp_path):
    remedy = r"lie outside the data range \[0, 1\], .* name it: data_range=\(-1, 1\), --data-range -1 1\."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        generate(engine(named=False), tmp_path / "job", N, shard_size=SHARD)
    assert len(caught) == 1 and re.search(remedy, str(caught[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(engine(), tmp_path / "good", N, shard_size=SHARD)
        images.to_uint8(torch.full((1, 1, 10, 10), 1.2))  # the noise of samples
        x = torch.zeros(1, 1, 10, 10)
        x[..., 0, 0] = 9
        images.to_uint8(x)  # 1% of the values
        x[..., 0, 1] = 9
        with pytest.raises(UserWarning, match=remedy):
            images.to_uint8(x)
