"""The diffusers adapter against diffusers: schedulers in its pipelines, pipelines that save and load, generators."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")

from sgm_engine.engine.engine import Engine  # noqa: E402
from sgm_engine.integrations.diffusers import PlanPipeline, PlanScheduler, score_model  # noqa: E402
from sgm_engine.models import NCSN  # noqa: E402

PLANS = ["consistent_annealed", "annealed_langevin", "ancestral", "ddim"]
N = 3


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(4, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ).eval()


def generators(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def pipeline(unet, **options):
    pipe = PlanPipeline(unet, PlanScheduler(**options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loop(unet, scheduler, y, levels, generator):
    """What a pipeline does with a scheduler."""
    scheduler.set_timesteps(levels)
    with torch.no_grad():
        for t in scheduler.timesteps:
            found = unet(scheduler.scale_model_input(y, t), t.repeat(len(y)), return_dict=False)[0]
            y = scheduler.step(found, t, y, generator=generator).prev_sample
    return y


def start(seed=0):
    return torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_scheduler_in_a_loop_is_the_engine(unet, prediction, plan):
    """The same noise, start and plan: in the network's terms, step by step, or inside the engine."""
    options = dict(prediction_type=prediction, plan=plan, steps_per_level=2, step=0.9)
    got = loop(unet, PlanScheduler(**options), start(), 12, generators(1, 2, 3))
    pipe = pipeline(unet, **options)
    want = pipe(N, generators(1, 2, 3), 12, output_type="latent", latents=start()).images
    # A random network magnifies rounding through 25 evaluations; a coefficient that is 1% off would show all the same.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=5e-3 * float(want.abs().max()))


def test_a_network_that_gives_scores():
    """NCSN as a "score" network: the scheduler's loop, and the engine by itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NCSN([1.0, 0.3, 0.1], channels=1, ngf=4, divide_by_sigma=True, image_size=8).eval()
    scheduler = PlanScheduler(
        prediction_type="score", sigmas=[1.0, 0.3, 0.1], plan="annealed_langevin", steps_per_level=2
    )
    got = loop(lambda x, t, return_dict: (net(x, t),), scheduler, start(), 3, torch.Generator().manual_seed(1))
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(1)))
    want = Engine(net, N).sample(N, seed, scheduler.plan, init=start())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert scheduler.init_noise_sigma == 1.0 and scheduler.timesteps.tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_ddim_is_its_euler(unet):
    """EulerDiscreteScheduler keeps x itself where ours keeps what the network reads; the same network calls else."""
    theirs = diffusers.EulerDiscreteScheduler(beta_schedule="linear", timestep_spacing="linspace")
    theirs.set_timesteps(9)
    x = start() * theirs.sigmas[0]
    want = loop(unet, theirs, x, 9, None)
    ours = PlanScheduler(plan="ddim")
    ours.set_timesteps(9)
    got = loop(unet, ours, x * ours.scales[0], 9, None)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_what_it_shares_with_ddpm(unet):
    """The noised images of training, and the estimate of the clean image."""
    theirs, ours = diffusers.DDPMScheduler(clip_sample=False), PlanScheduler()
    noise, t = start(1), torch.tensor([0, 500, 999])
    torch.testing.assert_close(ours.add_noise(start(), noise, t), theirs.add_noise(start(), noise, t))
    theirs.set_timesteps(1000)
    for i in (0, 300, 999):
        ours.set_timesteps(1000)
        ours.set_begin_index(999 - i)
        want = theirs.step(noise, i, start()).pred_original_sample
        torch.testing.assert_close(
            ours.step(noise, i, start()).pred_original_sample, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())
        )


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_beta_schedules_are_theirs(schedule):
    theirs, ours = diffusers.DDPMScheduler(beta_schedule=schedule), PlanScheduler(beta_schedule=schedule)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-9)


def test_in_their_pipelines(unet):
    config = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    scheduler = PlanScheduler.from_config(config, plan="ancestral")
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
    pipe = diffusers.DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    first, again = (
        pipe(2, num_inference_steps=6, generator=generators(1)[0], output_type="np").images for _ in range(2)
    )
    assert first.shape == (2, 8, 8, 1) and np.array_equal(first, again)
    assert type(diffusers.DDIMScheduler.from_config(scheduler.config)) is diffusers.DDIMScheduler


def test_scheduler_is_saved_and_loaded(tmp_path):
    options = dict(plan="annealed_langevin", steps_per_level=3, step=0.2, prediction_type="v_prediction")
    scheduler = PlanScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    loaded = PlanScheduler.from_pretrained(tmp_path)
    assert loaded.plan == scheduler.plan and {k: loaded.config[k] for k in options} == options


def test_pipeline_is_saved_and_loaded(unet, tmp_path):
    pipe = pipeline(unet, plan="ancestral")
    want = pipe(2, generators(1, 2), 5, "pt").images
    pipe.save_pretrained(tmp_path)
    loaded = PlanPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(2, generators(1, 2), 5, "pt").images, want)


def test_a_generator_is_an_image(unet):
    pipe = pipeline(unet)
    together = pipe(3, generators(5, 6, 7), 6, "latent").images
    mixed = pipe(3, generators(5, 9, 6), 6, "latent").images
    assert torch.equal(mixed[0], together[0]) and not torch.equal(mixed[1], together[1])
    # In another place of the batch PyTorch's matrix products round otherwise, in the time embedding for one.
    torch.testing.assert_close(mixed[2], together[1], rtol=1e-3, atol=1e-3 * float(together[1].abs().max()))
    one = torch.Generator().manual_seed(5)
    assert not torch.equal(pipe(3, one, 6, "pt").images, pipe(3, one, 6, "pt").images), "a generator moves on"
    with pytest.raises(ValueError, match="list of 3, got 2"):
        pipe(3, generators(1, 2), 6)


def test_output_types(unet):
    pipe = pipeline(unet)
    pt, array, pil, latent = (pipe(2, generators(1, 2), 5, kind).images for kind in ("pt", "np", "pil", "latent"))
    assert torch.equal(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert len(pil) == 2 and np.abs(np.array(pil[0]) / 255 - array[0, :, :, 0]).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(pipe(2, generators(1, 2), 5, "pt", return_dict=False)[0], pt)


def test_callback_sees_every_step_and_can_stop(unet):
    pipe, steps = pipeline(unet), []
    final = pipe(2, generators(1, 2), 6, "latent").images

    def look(p, i, t, tensors):
        steps.append((i, int(t), tensors["latents"].clone()))
        return tensors

    assert torch.equal(pipe(2, generators(1, 2), 6, "latent", callback_on_step_end=look).images, final)
    assert [(i, t) for i, t, _ in steps] == list(enumerate(pipe.scheduler.timesteps.tolist())) and len(steps) == 6
    torch.testing.assert_close(steps[-1][2], final)

    def stop(p, i, t, tensors):
        p._interrupt = i == 3
        return tensors

    stopped = pipe(2, generators(1, 2), 6, "latent", callback_on_step_end=stop).images
    torch.testing.assert_close(stopped * pipe.scheduler.scales[4], steps[3][2], rtol=1e-5, atol=1e-5)
    assert pipe.interrupt and torch.equal(pipe(2, generators(1, 2), 6, "latent").images, final)

    with pytest.raises(ValueError, match="cannot be replaced"):
        pipe(1, None, 6, callback_on_step_end=lambda p, i, t, tensors: {"latents": tensors["latents"] * 0})


def test_a_run_begins_anew_with_set_timesteps(unet):
    scheduler = PlanScheduler(plan="ancestral")
    first = loop(unet, scheduler, start(), 5, generators(1)[0])
    assert torch.equal(loop(unet, scheduler, start(), 5, generators(1)[0]), first)
    with pytest.raises(ValueError, match="the run of 5 rows has ended"):
        scheduler.step(start(), 0, start())
    assert not torch.equal(loop(unet, scheduler, start(), 5, generators(2)[0]), first)


def test_half_precision_in_and_out():
    scheduler = PlanScheduler()
    after = scheduler.step(start().bfloat16(), scheduler.timesteps[0], start().bfloat16(), generators(1)[0])
    assert after.prev_sample.dtype == after.pred_original_sample.dtype == torch.bfloat16


def test_score_model_of_any_scheduler(unet):
    """D = x + σ²·score is DDPM's own estimate of the clean image."""
    theirs = diffusers.DDPMScheduler(clip_sample=False)
    score = score_model(unet, theirs, 11)
    level, t = torch.full((N,), 5), 500
    sigma, clean = score.sigmas[5], start()
    assert int(score.condition[5]) == t and score.shape == (1, 8, 8)
    x = clean + sigma * start(1)
    with torch.no_grad():
        got = x + sigma**2 * score(x, level)
        y = x / (1 + sigma**2) ** 0.5
        want = theirs.step(unet(y, t).sample, t, y).pred_original_sample
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert Engine(score, 2).sample(3).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(prediction_type="flows"), "prediction_type must be one of"),
        (dict(plan="heun"), "plan must be one of"),
        (dict(prediction_type="score"), "sigmas"),
        (dict(sigmas=[1.0, 0.1]), "sigmas"),
        (dict(beta_schedule="sigmoid"), "beta_schedule must be"),
    ],
)
def test_bad_schedulers(options, says):
    with pytest.raises(ValueError, match=says):
        PlanScheduler(**options)


def test_bad_calls(unet):
    scheduler = PlanScheduler()
    with pytest.raises(ValueError, match="num_inference_steps must be from 1 to 1000"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match=r"none of scheduler\.timesteps"):
        scheduler.step(start(), 17, start())
    with pytest.raises(ValueError, match="output_type"):
        pipeline(unet)(output_type="jpeg")
    with pytest.raises(ValueError, match="a plan cannot stand for ScoreSdeVeScheduler"):
        score_model(unet, diffusers.ScoreSdeVeScheduler())
    with pytest.raises(ValueError, match="may hold 'latents' only"):
        pipeline(unet)(callback_on_step_end_tensor_inputs=["prompt_embeds"])
