"""Class labels, guidance without a classifier, dropout, and the denoiser of the same network."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from sgm_engine import Engine, ancestral, annealed_langevin, load_checkpoint, save_checkpoint
from sgm_engine.cdm import mala
from sgm_engine.jobs.identity import weights_digest
from sgm_engine.keys import Key
from sgm_engine.models.cdm.classes import variance_exploding
from sgm_engine.models.cdm.config import CDMConfig
from sgm_engine.models.cdm.layers import Dropout, dropping
from sgm_engine.models.cdm.model import CDM, DDM
from sgm_engine.models.cdm.potential import PotentialNet
from sgm_engine.plans.law import DataLaw
from sgm_engine.training.cdm_objective import ddm
from tests.cdm.potentials import SMALL, digits, potential
from tests.native.classifiers import question, small

CLASSES = variance_exploding([2.0, 1.0, 0.5], 3.0)
MEANS = (-1.0, 2.0)  # of label 0 and 1, equally often; each class of data is N(mean, .5²)


class Known(nn.Module):
    """The exact classifier of the labels' two Gaussians, one number a sample; label 2: of their mixture."""

    labels = 2

    def forward(self, u, label):
        std = torch.tensor((0.25 * CLASSES.signal**2 + CLASSES.noise**2) ** 0.5)
        parts = [torch.distributions.Normal(m * torch.tensor(CLASSES.signal), std).log_prob(u) for m in MEANS]
        both = torch.stack([*parts, torch.logsumexp(torch.stack(parts), 0) - torch.tensor(2.0).log()], 1)
        return both[torch.arange(len(u)), label]


def score_of(mean, x, sigma):
    return -(x - mean) / (0.25 + sigma**2)


def test_each_label_has_its_own_law_and_none_has_the_mixture():
    model = CDM(Known(), CLASSES, (1,))
    x, level = torch.linspace(-3, 4, 12, dtype=torch.float64)[:, None], torch.arange(12) % 3
    sigma = model.sigmas.double()[level][:, None]
    for label, mean in enumerate(MEANS):
        told = model.with_class(label)
        assert torch.allclose(told(x, level), score_of(mean, x, sigma), rtol=1e-6)
        want = torch.distributions.Normal(mean, 0.5).log_prob(x)[:, 0]
        assert torch.allclose(told.log_prob(x).double(), want.double(), atol=1e-6)
    law = torch.distributions.Normal(torch.tensor(MEANS, dtype=torch.float64), (0.25 + sigma**2).sqrt())
    share = (law.log_prob(x)).softmax(1)
    want = sum(share[:, i : i + 1] * score_of(m, x, sigma) for i, m in enumerate(MEANS))
    assert torch.allclose(model(x, level), want, rtol=1e-6)


def test_guidance_is_the_published_sum_of_two_scores():
    """(1 + w)·conditional − w·unconditional of arXiv 2402.10095's program: guidance is 1 + w here."""
    model = CDM(Known(), CLASSES, (1,))
    x, level = torch.linspace(-3, 4, 9, dtype=torch.float64)[:, None], torch.arange(9) % 3
    w = 1.25
    want = (1 + w) * model.with_class(1)(x, level) - w * model(x, level)
    guided = model.with_class(1, 1 + w)
    assert torch.allclose(guided(x, level), want, rtol=1e-9)
    assert torch.allclose(guided.log_q_and_score(x, level)[1], want, rtol=1e-9)
    assert guided.at_sigmas(model.sigmas[:2]).guidance == 1 + w
    with pytest.raises(ValueError, match="guidance must be 1 for a density"):
        guided.log_prob(x)


def test_chains_of_a_label():
    class Images(Known):
        def forward(self, u, label):
            return super().forward(u.flatten(1), label)

    model = CDM(Images(), CLASSES, (1, 1, 1)).with_class(1)
    plan = annealed_langevin(model.sigmas.tolist(), 40, 0.05, start_shift=0.5, denoise=False)
    x = mala(model, plan, 2000).x
    assert abs(float(x.mean()) - MEANS[1]) < 0.08 and abs(float(x.std()) - (0.25 + 0.25) ** 0.5) < 0.06


@pytest.mark.parametrize("label, guidance, message", [
    (2, 1.0, r"class_label must be one of the network's classes, 0 to 1; got 2"),
    (True, 1.0, "class_label must be"),
    (None, 2.0, "guidance must be 1 without a class_label"),
    (1, float("nan"), "guidance"),
])  # fmt: skip
def test_bad_labels(label, guidance, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CDM(Known(), CLASSES, (1,)).with_class(label, guidance)
    with pytest.raises((ValueError, TypeError), match=message):
        CDMConfig(**SMALL, labels=2, class_label=label, guidance=guidance)


def test_a_network_without_labels_has_none():
    model = small()
    with pytest.raises(ValueError, match="none: the network has no classes"):
        model.with_class(0)
    with pytest.raises(ValueError, match="labels: this network has none"):
        model.logits(torch.zeros(1, 1, 12, 12), torch.tensor([0]))


@pytest.mark.parametrize("changes, message", [
    ({"labels": -1}, "labels must be an integer"), ({"dropout": 1.0}, "dropout must lie in"),
    ({"dropout": 0.1}, "belong to a U-Net"), ({"published": True}, "belong to a U-Net"),
    ({"denoiser": 1}, "denoiser must be true or false"),
])  # fmt: skip
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        CDMConfig(**SMALL | changes)


def test_a_file_keeps_label_and_guidance(tmp_path):
    model = potential(labels=3)
    nn.init.normal_(model.classifier.features.label)
    save_checkpoint(model, tmp_path / "x.safetensors")
    plain = load_checkpoint(tmp_path / "x.safetensors")
    assert (plain.labels, plain.class_label, plain.guidance) == (3, None, 1.0)
    assert "class_label" not in plain.config.to_json() and "dropout" not in plain.config.to_json()
    guided = load_checkpoint(tmp_path / "x.safetensors", class_labels=2, guidance=3.0)
    assert (guided.class_label, guided.guidance) == (2, 3.0) and guided.config != plain.config
    x, level = question(guided, 3)
    assert torch.equal(guided(x, level), plain.with_class(2, 3.0)(x, level))
    assert (guided(x, level) - plain(x, level)).abs().max() > 1e-3
    plain.law = DataLaw(0.2, 0.3)
    view = plain.with_class(1, 2.0)
    assert view.law is plain.law and view.config == dataclasses.replace(plain.config, class_label=1, guidance=2.0)
    save_checkpoint(view, tmp_path / "view.safetensors")
    assert load_checkpoint(tmp_path / "view.safetensors").config == view.config
    digests = {weights_digest(m) for m in (plain, view, plain.with_class(1), plain.with_class(2, 2.0))}
    assert len(digests) == 4  # a job of one class is no other's


@pytest.mark.parametrize("options, limit", [({"labels": 3}, 0.25), ({"patch": 2, "fourier": (1,)}, 0.65)])
def test_a_unet_that_denoises_learns_one_law(options, limit):
    """Of data that are all 0, E[ε | u] is u/noise: at its optimum the loss is 0."""
    config = CDMConfig(1, 8, 8, (1, 2), 1, "vp_geometric", 4, {"sigma_max": 3.0, "sigma_min": 0.5}, denoiser=True,
                       **options)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.build()
    assert isinstance(model, DDM) and not hasattr(model, "log_prob")
    told = torch.randint(0, 4, (16,)) if model.labels else None
    adam, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for step in range(60):
        levels = torch.arange(16) % model.training_levels
        loss = ddm(model, torch.full((16, 1, 8, 8), 0.5), levels, Key(0, torch.arange(16) + 16 * step), told)
        adam.zero_grad(), loss.backward(), adam.step()
        losses.append(float(loss))
    assert losses[0] > 0.8 and sum(losses[-10:]) / 10 < limit
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.classifier.told.parameters())
    assert Engine(model, 4).sample(4).isfinite().all()


def test_the_denoiser_of_a_base_alone_is_its_score():
    cdm = potential()
    nn.init.zeros_(cdm.classifier.head.weight)
    other = DDM(cdm.classifier, cdm.classes, cdm.shape, cdm.scale, cdm.shift).double()
    x, level = question(cdm, 4)
    assert torch.allclose(other(x.double(), level), copy.deepcopy(cdm).double()(x.double(), level), rtol=1e-7)
    assert isinstance(CDMConfig(**SMALL, denoiser=True).build().classifier, PotentialNet)


def test_dropped_numbers_are_the_sample_s_own():
    layer, x = Dropout(0.3).train(), torch.randn(6, 4, 5, 5)
    ids = torch.tensor([7, 3, 11, 2, 5, 900])
    with dropping(layer, Key(1, ids)):
        y = layer(x)
    kept = y != 0
    assert torch.allclose(y[kept], x[kept] / 0.7) and 0.6 < kept.float().mean() < 0.8
    with dropping(layer, Key(1, ids[[4, 1]])):  # in another batch, at another place
        assert torch.equal(layer(x[[4, 1]]), y[[4, 1]])
    with dropping(layer, Key(2, ids)):
        assert not torch.equal(layer(x) != 0, kept)
    assert torch.equal(layer(x), x)  # outside of a loss
    with dropping(layer.eval(), Key(1, ids)):
        assert torch.equal(layer(x), x)


def test_dropout_reaches_every_block_and_no_draw_twice():
    model = small(dropout=0.5).train()
    layers = [part for part in model.modules() if isinstance(part, Dropout)]
    assert len(layers) == 8
    u, ids = torch.randn(2, 1, 12, 12), torch.arange(2)
    plain = model.logits(u)
    with dropping(model, Key(0, ids)):
        one, two = model.logits(u), model.logits(u)
        assert sorted(layer.draw for layer in layers) == list(range(8))
    assert torch.equal(one, two) and not torch.allclose(one, plain) and torch.equal(model.logits(u), plain)
    assert torch.allclose(model.eval().logits(u), small().logits(u), atol=1e-4)


def test_labels_of_potentials_are_learnt_from_images():
    """Every parameter gets a gradient, the rows of the labels that were met among them."""
    model = potential(labels=3).train()
    x = torch.from_numpy(digits(6)).float() / 255
    told = torch.tensor([0, 0, 2, 2, 3, 3])
    loss = ddm(model, x, torch.arange(6) + 2, Key(0, torch.arange(6)), told)
    loss.backward()
    rows = model.classifier.features.label.grad.abs().amax(1)
    assert rows[[0, 2, 3]].min() > 0 and rows[1] == 0


def test_ancestral_chains_of_a_guided_network_end():
    model = potential(labels=3).with_class(1, 2.0)
    x = Engine(model, 4).sample(4, plan=ancestral(model.sigmas.tolist(), start_shift=0.5))
    assert x.isfinite().all()
