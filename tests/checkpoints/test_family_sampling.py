"""Samples of a loaded checkpoint are those of the authors' samplers, from the same noise, by every executor."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgm_engine import Engine, ancestral, ddim, heun, karras, load_checkpoint
from sgm_engine.kernels import reference
from tests.family_files import (
    diffusers_folder,
    edm_arguments,
    edm_pickle,
    golden,
    lucidrains_file,
    network_of,
    relative,
    score_sde_files,
)


def edm_file(folder):
    config, state, _ = golden("edm_ddpmpp_32")
    network = network_of("edm_ddpmpp_32", config)
    network.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    return edm_pickle(folder / "edm.pkl", network, edm_arguments(config)), network.double()


@torch.no_grad()
def test_heun_of_edm_is_a_loop_in_float64(tmp_path):
    """arXiv 2206.00364, algorithm 1, of 18 steps in the units of the network, against the file's own plan."""
    path, network = edm_file(tmp_path)
    model = load_checkpoint(path)
    start = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = Engine(model, batch=1, executor="eager").sample(1, init=(start * 80 + 1) / 2)

    def slope(y, sigma):
        total = sigma**2 + 0.25
        told = torch.full((1,), np.log(sigma) / 4, dtype=torch.float64)
        denoised = 0.25 / total * y + sigma * 0.5 / total**0.5 * network(y / total**0.5, told)
        return (y - denoised) / sigma

    sigmas = [*karras(80, 0.002, 18), 0.0]
    y = start.double() * 80
    for sigma, after in pairwise(sigmas):
        first = slope(y, sigma)
        euler = y + (after - sigma) * first
        y = euler if after == 0 else y + (after - sigma) * (first + slope(euler, after)) / 2
    assert relative(2 * x - 1, y) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("prediction, clip, variance", [
    ("epsilon", False, "fixed_small"), ("epsilon", True, "fixed_large"), ("v_prediction", False, "fixed_large"),
    ("v_prediction", True, "fixed_small"), ("sample", True, "fixed_small"),
])  # fmt: skip
def test_ddpm_and_ddim_of_diffusers(tmp_path, monkeypatch, prediction, clip, variance):
    """Step for step with the same noise; DDIM with clipping as use_clipped_model_output says."""
    diffusers = pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")
    from diffusers.schedulers import scheduling_ddpm

    own = {"prediction_type": prediction, "clip_sample": clip, "num_train_timesteps": 40, "beta_end": 0.2,
           "variance_type": variance}  # fmt: skip
    diffusers_folder(tmp_path / "pipe", own)
    model = load_checkpoint(tmp_path / "pipe")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "pipe" / "unet")
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def states(plan_of, levels):
        """After every step, in the scheduler's units."""
        sigmas, seen = model.levels(levels, own=True), []
        y = start / 2 * (1 + (2 * sigmas[0]) ** 2) ** 0.5 + 0.5
        plan = plan_of(sigmas, **model.options_of(plan_of.__name__, sigmas[0]))
        engine = Engine(model.at_sigmas(sigmas), batch=1, executor="eager")
        engine.sample(1, seed=3, plan=plan, init=y, callback=lambda info: seen.append(info.x.clone()))
        return [(2 * x - 1) / np.hypot(1, 2 * after) for x, after in zip(seen, [*sigmas[1:], 0.0], strict=True)]

    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "pipe" / "scheduler")
    scheduler.set_timesteps(10)
    y = start
    for t, x in zip(scheduler.timesteps, states(ddim, 10), strict=True):
        y = scheduler.step(unet(y, t).sample, t, y, use_clipped_model_output=clip).prev_sample
        assert relative(x, y.double()) < 1e-5

    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "pipe" / "scheduler")
    scheduler.set_timesteps(40)
    y, draw = start, 0

    def noise(*_, **__):
        return reference.noise((1, 3, 8, 8), torch.tensor([3]), torch.tensor([0]), draw)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noise)
    found = states(ancestral, 40)
    for draw, t in enumerate(scheduler.timesteps, 1):  # draw: of noise()
        y = scheduler.step(unet(y, t).sample, t, y).prev_sample
        assert relative(found[draw - 1], y.double()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_the_command_draws_what_the_pipeline_draws(sgm, tmp_path, monkeypatch, sampler):
    """DDIMPipeline and DDPMPipeline themselves, given our noise; their pictures are clamped, and so are ours."""
    diffusers = pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")
    from diffusers.pipelines.ddim import pipeline_ddim
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    clip = {"clip_sample": True, "num_train_timesteps": 40, "beta_end": 0.2}
    diffusers_folder(tmp_path / "pipe", clip)
    nfe, draws = {"ddim": 10, "ancestral": 40}[sampler], iter(range(100))

    def noise(shape, **_):
        return reference.noise(shape, torch.tensor([3]), torch.tensor([0]), next(draws))

    for module in (pipeline_ddim, pipeline_ddpm, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", noise)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "pipe" / "unet")
    kind, options = (diffusers.DDPMScheduler, {}) if sampler == "ancestral" else (
        diffusers.DDIMScheduler, {"use_clipped_model_output": True})  # fmt: skip
    pipeline = diffusers.DDPMPipeline if sampler == "ancestral" else diffusers.DDIMPipeline
    pipeline = pipeline(unet, kind.from_pretrained(tmp_path / "pipe" / "scheduler"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(num_inference_steps=nfe, output_type="np", **options).images
    run = sgm("sample", "--checkpoint", "pipe", "--sampler", sampler, "--nfe", nfe, "--n", 1, "--batch", 1, "--seed", 3,
              "--out", "x.safetensors")  # fmt: skip
    assert run.returncode == 0, run.stderr
    ours = load_file(tmp_path / "x.safetensors")["samples"].clamp(0, 1)
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2).double()
    assert theirs.std() > 0.1 and relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("family", ["score_sde", "edm", "lucidrains", "diffusers", "clipped"])
def test_every_executor_draws_the_same(tmp_path, family):
    if family == "score_sde":
        model = load_checkpoint(*score_sde_files(tmp_path, "score_sde_ncsnpp_ve_32"))
    elif family == "edm":
        model = load_checkpoint(edm_file(tmp_path)[0])
    elif family == "lucidrains":
        lucidrains_file(tmp_path / "model-1.pt")
        model = load_checkpoint(tmp_path / "model-1.pt", image_size=16)
    else:
        diffusers_folder(tmp_path / "pipe", {"clip_sample": family == "clipped"})
        model = load_checkpoint(tmp_path / "pipe")
    sigmas = model.levels(3)
    plan = heun(sigmas, **model.start_at(sigmas[0]))
    model = model.at_sigmas(sigmas)
    eager = Engine(model, batch=2, executor="eager").sample(2, plan=plan)
    auto = Engine(model, batch=2, executor="auto").sample(2, plan=plan)
    assert eager.isfinite().all() and relative(auto, eager.double()) < 2e-5  # of five evaluations


def test_a_folder_in_one_command(sgm, tmp_path):
    diffusers_folder(tmp_path / "pipe", num_class_embeds=4)
    run = sgm(
        "sample", "--checkpoint", "pipe", "--class-labels", 3, "--n", 2, "--nfe", 4, "--out", "x.npz", "--batch", 2
    )
    assert run.returncode == 0, run.stderr
    assert "plan: dpm_solver_2m(" in run.stdout and "4 NFE a sample" in run.stdout
    assert "weights: diffusers UNet2DModel, DDPMScheduler, epsilon (UNet2D), 3×8×8, class 3" in run.stdout
    first = np.load(tmp_path / "x.npz")["arr_0"]
    assert first.shape == (2, 8, 8, 3) and first.dtype == np.uint8
    done = sgm("convert", "pipe", "one.safetensors")
    assert done.returncode == 0 and "written: one.safetensors (diffusers UNet2DModel" in done.stdout, done.stderr
    again = sgm("sample", "--checkpoint", "one.safetensors", "--class-labels", 3, "--n", 2, "--nfe", 4, "--out",
                "y.npz", "--batch", 2)  # fmt: skip
    assert again.returncode == 0 and np.array_equal(np.load(tmp_path / "y.npz")["arr_0"], first)
    other = sgm("sample", "--checkpoint", "pipe", "--class-labels", 1, "--n", 2, "--nfe", 4, "--out", "z.npz")
    assert other.returncode == 0 and not np.array_equal(np.load(tmp_path / "z.npz")["arr_0"], first)
    assert "class_label must be 0 to 3" in sgm("sample", "--checkpoint", "pipe", "--class-labels", 4).stderr
    said = sgm("doctor", "pipe", "--json")
    assert "UNet2D), 3×8×8, class none" in json.loads(said.stdout)["pipe"]
    assert sgm("convert", "one.safetensors", "back/").returncode == 0
    assert (tmp_path / "back" / "model_index.json").is_file()


def test_a_job_of_a_family_is_drawn_again(sgm, tmp_path):
    """Whatever decided how the file was read is in the job: its flags, its size, its class."""
    lucidrains_file(tmp_path / "model-1.pt")
    common = ("--checkpoint", "model-1.pt", "--image-size", 8, "--nfe", 3, "--batch", 2)
    run = sgm("sample", *common, "--n", 3, "--out", "job/", "--format", "npz")
    assert run.returncode == 0, run.stderr
    again = sgm("resample", "job", "--id", 2, "--out", "two.safetensors")
    assert again.returncode == 0 and "equal to sample 2" in again.stdout, again.stderr
