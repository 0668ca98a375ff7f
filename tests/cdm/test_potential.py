"""The parts of PotentialNet in float64, each against its own formula; the two phases; what is fitted without steps."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from sgm_engine import annealed_langevin, load_checkpoint, save_checkpoint
from sgm_engine.cdm.metropolis import mala
from sgm_engine.keys import Key
from sgm_engine.models.cdm import classes as schedules
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.models.cdm.gaussian import GaussianBase, image_moments
from sgm_engine.models.cdm.model import CDM
from sgm_engine.models.cdm.potential import PotentialNet
from sgm_engine.training.cdm_fits import fit_base, fit_biases, noisy_logits
from sgm_engine.training.cdm_objective import cdm, ddm
from tests.cdm.potentials import digits, potential

FORMS = {"vp": schedules.vp_geometric(12, 10.0, 0.05), "ve": schedules.ve_geometric(12, 10.0, 0.05, reference=3.0)}


def gaussian(dim=16, classes=FORMS["vp"]):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / dim + 0.01 * torch.eye(dim, dtype=torch.float64)
    base = GaussianBase(dim, classes)
    base.fit(mean, covariance)
    return base, mean, covariance


@pytest.mark.parametrize("form", FORMS)
def test_the_base_alone_is_the_gaussian(form):
    """Density and score of every class, and of data, to 1e-10."""
    classes = FORMS[form]
    base, mean, covariance = gaussian(classes=classes)
    model = CDM(lambda u: base(u), classes)
    u = torch.randn(6, 16, dtype=torch.float64)
    for t in range(classes.levels + 2):
        s, n = classes.signal[t], classes.noise[t]
        total = s**2 * covariance + n**2 * torch.eye(16, dtype=torch.float64)
        exact, column = MultivariateNormal(s * mean, total), torch.full((6,), t)
        assert (model.class_log_prob(u, column) - exact.log_prob(u)).abs().max() < 1e-10
        score = -torch.linalg.solve(total, (u - s * mean).T).T
        found, _ = model.noise_pred(u, column)
        assert (found + n * score).abs().max() < 1e-10
        assert (base.noise_pred(base.whiten(u), column) + n * score).abs().max() < 1e-10
    assert (model.log_prob(u) - MultivariateNormal(mean, covariance).log_prob(u)).abs().max() < 1e-10


def test_the_moments_of_dequantised_images():
    images = digits(300)
    mean, covariance = image_moments(images, 2.0, -1.0)
    x = 2 * (torch.from_numpy(images).double().flatten(1) + 0.5) / 256 - 1
    assert (mean - x.mean(0)).abs().max() < 1e-12
    expected = torch.cov(x.T, correction=0) + torch.eye(64, dtype=torch.float64) * (2 / 256) ** 2 / 12
    assert (covariance - expected).abs().max() < 1e-12
    with pytest.raises(ValueError, match="positive definite"):
        GaussianBase(2, FORMS["vp"]).fit(torch.zeros(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_rounded_file_is_a_gaussian_still(dtype):
    base, *_ = gaussian()
    other = GaussianBase(16, FORMS["vp"])
    other.load_state_dict({name: t.to(dtype) for name, t in base.state_dict().items()}, assign=True)
    assert (other.basis.T @ other.basis - torch.eye(16)).abs().max() < 1e-14
    assert 0 < (other.basis - base.basis).abs().max() < 2e-3
    covariance = other.basis * other.log_variance.exp() @ other.basis.T
    u = torch.randn(3, 16, dtype=torch.float64)
    f = other(u)
    found = f[:, 0] - 8 * np.log(2 * np.pi)
    assert (found - MultivariateNormal(other.mean, covariance).log_prob(u)).abs().max() < 1e-10
    again = copy.deepcopy(other)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again.basis, other.basis)  # a resumed run has the same bits


def test_the_features_by_their_formulas():
    net = potential().classifier.double()
    features, base = net.features, net.features.base
    u = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    found = features(u)
    f = base(u)
    assert torch.equal(found.densities, f)
    p = f.softmax(1)
    noise, signal = base.noise.clamp(min=base.noise[1]), base.signal
    covariance = base.basis * base.log_variance.exp() @ base.basis.T
    shares, centres = [], []
    for s, n in zip(signal, noise, strict=True):
        total = s**2 * covariance + n**2 * torch.eye(64, dtype=torch.float64)
        shares.append(n**2 * torch.linalg.inv(total))
        centres.append(shares[-1] @ (s * base.mean))
    r = torch.einsum("nt,tij,nj->ni", p, torch.stack(shares), u.flatten(1)) - p @ torch.stack(centres)
    sigma = torch.exp(p @ noise.log())[:, None]
    y = (r / sigma).view_as(u)
    assert (found.noise - y).abs().max() < 1e-9
    white, image = (p @ signal)[:, None], u.flatten(1)
    planes = [y.flatten(1), image - r, *(torch.tanh((image + k * white) / (3 * sigma)) for k in (1, -1))]
    assert (found.planes.flatten(1) - torch.cat(planes, 1)).abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_gradient_against_differences(form):
    classes = FORMS[form]
    torch.manual_seed(0)
    net = PotentialNet(1, 8, classes, 8, (1, 2), 1, 3, (4, 8)).double().eval()
    model = CDM(net, classes, (1, 8, 8))
    fit_base(model, digits())
    torch.nn.init.normal_(net.head.weight, 0, 3)
    t = torch.tensor([1, 4, 9, 12])
    u0, noise = torch.from_numpy(digits(4)) / 127.5 - 1, torch.randn(4, 1, 8, 8, dtype=torch.float64)
    u = model.signal[t].view(-1, 1, 1, 1) * u0 + model.noise[t].view(-1, 1, 1, 1) * noise
    found, _ = model.noise_pred(u, t)
    base = net.features.base.noise_pred(net.features.base.whiten(u), t).view_as(u)
    assert (found - base).flatten(1).norm(dim=1)[1:3].min() > 0.02 * found[1:3].norm()  # the network does matter
    v, h = torch.randn_like(u), 1e-6
    slope = (model.class_log_prob(u + h * v, t) - model.class_log_prob(u - h * v, t)) / (2 * h)
    assert torch.allclose(-(found * v).flatten(1).sum(1), model.noise[t] * slope, rtol=1e-6, atol=1e-7)
    single = model.float().noise_pred(u.float(), t)[0].double()
    assert (single - found).norm() < 2e-5 * found.norm()


def test_both_phases_train_every_weight():
    model, key = potential().train(), Key(0, torch.arange(16))
    x, t = torch.from_numpy(digits(16)).float() / 256, 1 + torch.arange(16) % 12
    names = {}
    for objective in (cdm, ddm):
        model.zero_grad()
        objective(model, x, t, key).backward()
        names[objective] = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    everything = {name for name, _ in model.named_parameters()}
    assert names[cdm] == everything
    assert names[ddm] == everything - {"classifier.head.bias"}  # no score depends on a bias


def test_the_direct_denoiser_by_its_formula():
    model = potential().double()
    net = model.classifier
    u, t = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([3, 11])
    found = net.features(u)
    a = net._fields(found)
    weight = net.head.weights(net.features.base.missed)[t]
    residual = 2 * F.pixel_shuffle(torch.einsum("nm,nmchw->nchw", weight, a), 2)
    base = net.features.base.noise_pred(found.z, t).view_as(u)
    assert torch.allclose(model.noise_pred_direct(u, t), base - residual, rtol=1e-12)
    unet = CDM(torch.nn.Identity(), FORMS["vp"])
    with pytest.raises(ValueError, match="Identity has no direct denoiser"):
        unet.noise_pred_direct(u, t)


def test_fitted_biases_lower_the_cross_entropy_and_leave_the_score():
    model, images = potential(), digits(600)
    x, level = torch.rand(4, 1, 8, 8), torch.arange(4)
    score = model(x, level)
    before, after = fit_biases(model, images)
    assert after < before - 0.05
    assert torch.equal(model(x, level), score)
    assert abs(fit_biases(model, images)[0] - after) < 1e-3  # the fit is where it ends
    t = torch.arange(600) % 14
    held_out = noisy_logits(model, torch.from_numpy(digits(600, seed=1)), t, Key(9, torch.arange(600)))
    assert abs(float(F.cross_entropy(held_out, t)) - after) < 0.3


def test_classes_are_drawn_as_the_prior_says():
    model = potential(focus=(0.3, 3.0, 0.25))
    sigmas = model.classes.sigmas[::-1]
    middle = (sigmas >= 0.3) & (sigmas <= 3)
    assert np.allclose(model.prior[1:-1] / model.prior[0], np.where(middle, 1, 0.25))
    u = (torch.arange(100_000) + 0.5) / 100_000
    counts = torch.bincount(model.draw_class(u), minlength=14)
    assert (counts / 100_000 - torch.tensor(model.prior)).abs().max() < 1e-4


def test_a_file_keeps_the_model(tmp_path):
    model = potential()
    save_checkpoint(model, tmp_path / "m.safetensors")
    again = load_checkpoint(tmp_path / "m.safetensors")
    x, level = torch.rand(2, 1, 8, 8), torch.tensor([0, 9])
    assert (again(x, level) - model(x, level)).abs().max() < 1e-4 * model(x, level).abs().max()
    assert torch.allclose(again.log_prob(x), model.log_prob(x), atol=1e-2)


def test_a_u_net_s_file_says_what_it_said():
    config = CDMConfig(1, 8, 8, (1, 2), 1, "ddpm", 10)
    assert not {"potentials", "mixing", "focus"} & set(config.to_json().replace('"', " ").split())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mixing": None}, "mixing must be"),
        ({"potentials": None}, "potentials must be an integer"),
        ({"fourier": (1,)}, "fourier belongs to a U-Net"),
        ({"baseline": (0.0, 1.0)}, "baseline belongs to a U-Net"),
        ({"image_size": 10}, "divides by 4"),
        ({"multipliers": (1, 2, 2)}, "two multipliers"),
        ({"image_size": 100}, "at most 4096 pixels, got 1×100²"),
        ({"levels": 90_000}, "pixels × levels of at most 4000000, got 90000 levels"),
        ({"potentials": 50_000}, "at most 65536 channels"),
        ({"focus": (1.0, 0.5, 0.3)}, "focus needs 0 <= least < greatest"),
        ({"focus": (1.0, 0.5)}, "focus must be"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        potential(**changes)


@pytest.mark.parametrize("schedule", ["vp_geometric", "ve_geometric"])
def test_metropolis_steps_go_by_its_density(schedule):
    """Small steps are nearly all taken; where the density lies about its score by a factor, they are not."""
    model = potential(schedule=schedule)
    sigmas = model.sigmas[-3:]
    plan = annealed_langevin(sigmas, 4, step_lr=2e-6, denoise=False, start="normal", start_scale=0.3, start_shift=0.5)
    found = mala(model, plan.on_levels(model.sigmas), 16)
    assert found.x.isfinite().all() and found.acceptance[2:].min() > 0.8
    logits = model.classifier.forward
    model.classifier.forward = lambda u: 3 * logits(u).detach() + (logits(u) - logits(u).detach())
    assert mala(model, plan.on_levels(model.sigmas), 16).acceptance[2:].min() < found.acceptance[2:].min()
