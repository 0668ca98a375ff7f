"""Configurations of diffusers' schedulers: what a plan stands for equals their own steps; what it cannot is refused."""

import numpy as np
import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers", reason="pip install 'sgm-engine[integrations]'")

from sgm_engine import Engine  # noqa: E402
from sgm_engine.integrations.diffusers import PlanScheduler, score_model  # noqa: E402
from sgm_engine.jobs.settings import settings  # noqa: E402

SHAPE, LEVELS = (1, 8, 8), 7


class Net(nn.Module):
    """Called as a UNet2DModel; smooth in its input and in what it is told."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.conv.weight.data = 0.3 * torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
        self.conv.bias.data.fill_(0.1)
        self.config = type("Config", (), {"in_channels": 1, "sample_size": 8})()

    @property
    def dtype(self):
        return self.conv.weight.dtype

    def forward(self, x, t, return_dict=True):
        told = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 1000
        return (torch.tanh(self.conv(x)) + 0.5 * torch.sin(told),)


@pytest.fixture
def net():
    return Net().eval()


def start(n=3):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def theirs(scheduler, net, x):
    """The library's own loop."""
    scheduler.set_timesteps(LEVELS)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # a flow has neither
    read = getattr(scheduler, "scale_model_input", lambda x, t: x)
    clipped = {"use_clipped_model_output": True} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
    for t in scheduler.timesteps:
        x = scheduler.step(net(read(x, t), t)[0], t, x, **clipped).prev_sample
    return x


@torch.no_grad()
def ours(scheduler, net, y):
    scheduler.set_timesteps(LEVELS)
    y = y * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        y = scheduler.step(net(scheduler.scale_model_input(y, t), t)[0], t, y).prev_sample
    return y


SEVEN = dict(num_train_timesteps=LEVELS, beta_start=0.05, beta_end=0.6)  # every level: then its steps are the plan's
EQUAL = {
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow, shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": diffusers.EDMEulerScheduler(),
    "edm, other levels": diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=40.0, sigma_data=1.0, rho=5.0),
    "edm, exponential": diffusers.EDMEulerScheduler(sigma_schedule="exponential"),
    "edm, v": diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
    "ddim": diffusers.DDIMScheduler(**SEVEN, clip_sample=False),
    "ddim, clipped": diffusers.DDIMScheduler(**SEVEN, clip_sample=True),
    "ddim, clipped at .3": diffusers.DDIMScheduler(**SEVEN, clip_sample_range=0.3),
}


@pytest.mark.parametrize("what", EQUAL)
def test_a_scheduler_of_the_same_configuration_takes_the_same_steps(what, net):
    library = EQUAL[what]
    scheduler = PlanScheduler.from_config(library.config, plan="ddim")
    want = theirs(library, net, start())
    got = ours(scheduler, net, start())
    tolerance = 1e-3 if what.startswith("flow") else 1e-4  # a flow begins at t = 1 − 10⁻⁴
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("what", EQUAL)
def test_the_engine_inside_is_the_scheduler_step_by_step(what, net):
    scheduler = PlanScheduler.from_config(EQUAL[what].config, plan="ddim")
    scheduler.set_timesteps(LEVELS)
    engine = Engine(score_model(net, scheduler), 3, shape=SHAPE, executor="eager")
    assert len(engine.sigmas) == LEVELS
    scale = scheduler.init_noise_sigma / scheduler.scales[0]
    found = engine.sample(3, 0, scheduler.plan, init=start() * scale)
    want = ours(scheduler, net, start())
    tolerance = 1e-3 if what.startswith("flow") else 2e-5  # x of data + σ·noise at σ = 10⁴, in float32
    assert (found - want).norm() <= tolerance * want.norm()


def test_clipping_matters_and_is_of_the_estimate(net):
    plain, clipped = (PlanScheduler(plan="ddim", clip_sample=c, clip_sample_range=0.2) for c in (False, True))
    x, t = start(), plain.timesteps[30]
    found = net(x, t)[0]
    free, held = (s.step(found, t, x) for s in (plain, clipped))
    assert free.pred_original_sample.abs().max() > 0.2
    torch.testing.assert_close(held.pred_original_sample, free.pred_original_sample.clamp(-0.2, 0.2))
    assert (free.prev_sample - held.prev_sample).abs().max() > 1e-3


def test_the_clip_of_a_configuration_reaches_the_samples(net):
    engine = Engine(score_model(net, diffusers.DDPMScheduler(clip_sample_range=0.1), 5), 4, executor="eager")
    assert 0 < engine.sample(4, 0).abs().max() <= 0.1 + 1e-4


@pytest.mark.parametrize(
    "name", ["ScoreSdeVe", "CMStochasticIterative", "DDPMWuerstchen", "ScoreSdeVp", "VQDiffusion", "IPNDM"]
)
def test_other_families_are_refused_by_name(name):
    cls = getattr(diffusers, f"{name}Scheduler", None)
    with pytest.raises(ValueError, match=f"a plan cannot stand for {name}Scheduler: .*DDPMScheduler"):
        PlanScheduler.from_config({"_class_name": f"{name}Scheduler"})
    if cls is not None and name != "VQDiffusion":
        with pytest.raises(ValueError, match="a plan cannot stand for"):
            PlanScheduler.from_config(cls().config)  # without its name
        with pytest.raises(ValueError, match=f"a plan cannot stand for {name}Scheduler"):
            score_model(None, cls())


@pytest.mark.parametrize("name, field", [
    ("CosineDPMSolverMultistep", "solver_order"), ("LCM", "original_inference_steps"),
    ("TCD", "original_inference_steps"), ("CogVideoXDDIM", "snr_shift_scale"), ("RePaint", "eta"),
])  # fmt: skip
def test_a_configuration_without_its_name_is_known_by_its_fields(name, field):
    config = getattr(diffusers, f"{name}Scheduler")().config
    with pytest.raises(ValueError, match=f"a plan cannot stand for this configuration with '{field}'"):
        PlanScheduler.from_config(config)


def test_a_field_of_the_first_versions_is_honoured():
    config = {"_class_name": "DDPMScheduler", "predict_epsilon": False, "tensor_format": "pt"}
    assert PlanScheduler.from_config(config).config.prediction_type == "sample"
    assert PlanScheduler.from_config(config | {"predict_epsilon": True}).config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "library, says",
    [
        (diffusers.DDPMScheduler(thresholding=True), "thresholding=True of .* cannot be honoured"),
        (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True .* infinite sigma"),
        (diffusers.DDPMScheduler(variance_type="learned_range"), "twice the channels"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type='continuous' .* as_score"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas=True"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "use_flow"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_what_cannot_be_honoured_is_refused(library, says, net):
    with pytest.raises(ValueError, match=says):
        PlanScheduler.from_config(library.config)
    with pytest.raises(ValueError, match=says):
        score_model(net, library)


def test_solvers_of_one_family_say_the_same_of_a_network():
    betas = dict(beta_start=0.0002, beta_end=0.01, beta_schedule="scaled_linear")
    names = ("DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete")
    found = [PlanScheduler.from_config(getattr(diffusers, f"{n}Scheduler")(**betas).config) for n in names]
    for scheduler in found:
        scheduler.set_timesteps(9)
    assert all(np.array_equal(s.sigmas, found[0].sigmas) and s.kind == "vp_noise_prediction" for s in found)


@pytest.mark.parametrize("what", ["edm", "flow, shifted", "ddim, clipped at .3"])
def test_a_saved_scheduler_comes_back(what, tmp_path):
    scheduler = PlanScheduler.from_config(EQUAL[what].config)
    scheduler.save_pretrained(tmp_path)
    again = PlanScheduler.from_pretrained(tmp_path)
    assert again.config.clip_sample == scheduler.config.clip_sample
    assert np.array_equal(again.sigmas, scheduler.sigmas) and again.kind == scheduler.kind
    noisy = [s.add_noise(start(), start(), s.timesteps[[3, 4, 5]]) for s in (scheduler, again)]
    assert torch.equal(*noisy)


def test_sigmas_as_a_tensor_are_saved(tmp_path):
    scheduler = PlanScheduler(prediction_type="score", sigmas=torch.tensor([1.0, 0.5, 0.25]))
    scheduler.save_pretrained(tmp_path)
    assert np.array_equal(PlanScheduler.from_pretrained(tmp_path).sigmas, scheduler.sigmas)


def test_what_a_job_says_of_a_network_of_the_library():
    """Its classes reach far: all that they read is one digest."""
    width = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "in_channels": 1}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    net, other = (diffusers.UNet2DModel(sample_size=8, out_channels=1, **width, **kinds) for _ in range(2))
    before = settings(net)
    assert settings(other) == before and "installed libraries" in before
    net.mid_block.resnets[0].output_scale_factor = 2.0
    now = settings(net)
    assert [name for name in now if now[name] != before.get(name)] == ["mid_block.resnets.0.output_scale_factor"]
