"""Score matching in general: other weights, clean data, other directions and corruptions, against closed forms."""

import math
from functools import partial

import pytest
import torch

from sgm_engine.keys import Key
from sgm_engine.training import objectives
from sgm_engine.training.toy import Mixture

N, STD, SLOPE = 100_000, 0.6, -1.7
DATA = Mixture([1.0], [[0.0, 0.0]], [STD])


class Linear:
    """s(x) = SLOPE·x at every level."""

    def __init__(self, *sigmas):
        self.sigmas = torch.tensor(sigmas, dtype=torch.float64)

    def __call__(self, x, level):
        return SLOPE * x


def mean_and_error(objective, model, x=None, key=None):
    key = Key(1, torch.arange(N)) if key is None else key
    x = DATA.sample(Key(0, torch.arange(N))) if x is None else x
    losses = objective(model, x, torch.zeros(len(x), dtype=torch.int64), key, reduction="none").detach()
    return losses.mean().item(), losses.std().item() / math.sqrt(len(losses))


# E over clean data N(0, STD²·I) in two dimensions: ½·SLOPE²·2·STD² + 2·SLOPE
CLEAN = SLOPE**2 * STD**2 + 2 * SLOPE


@pytest.mark.parametrize(
    "name, options",
    [
        ("implicit", {}),
        ("sliced", {}),
        ("sliced", {"directions": "rademacher"}),
        ("sliced", {"directions": "rademacher", "variance_reduced": False}),
    ],
)
def test_clean_data(name, options):
    """σ = 0: what Hyvärinen's and the sliced objective are on the data themselves, with a gradient in the model."""
    objective = partial(getattr(objectives, name), anneal_power=0, **options)
    value, error = mean_and_error(objective, Linear(0.0))
    assert value == pytest.approx(CLEAN, abs=5 * error)
    with pytest.raises(ValueError, match="take implicit or sliced with anneal_power=0"):
        mean_and_error(getattr(objectives, name), Linear(0.0))


def test_regularised():
    """Kingma and LeCun's λ·Σ_i (∂s_i/∂x_i)²: 2·λ·SLOPE² here, exactly and for every sample."""
    plain = mean_and_error(objectives.implicit, Linear(0.5))
    regularised = mean_and_error(partial(objectives.implicit, regularisation=0.3), Linear(0.5))
    assert regularised[0] - plain[0] == pytest.approx(0.5**2 * 0.3 * 2 * SLOPE**2, rel=1e-9)


@pytest.mark.parametrize("name", ["denoising", "explicit", "implicit", "sliced", "stable_target"])
def test_the_weight_of_a_level(name):
    """λ(σ) = σ^p: against p = 2, the default, sample by sample."""
    model, x = Linear(2.0, 0.5), DATA.sample(Key(0, torch.arange(64)))
    options = {"score": Linear(1.0)} if name == "explicit" else {}
    options = {"score": lambda x, level: -x} if name == "explicit" else options
    levels, key = torch.arange(64) % 2, Key(1, torch.arange(64))
    losses = [
        getattr(objectives, name)(model, x, levels, key, reduction="none", anneal_power=p, **options) for p in (2, 0, 1)
    ]
    sigma = model.sigmas[levels]
    for power, found in zip((0, 1), losses[1:], strict=True):
        torch.testing.assert_close(found, losses[0] * sigma ** (power - 2), rtol=1e-12, atol=0)


def test_rademacher_directions_leave_only_the_off_diagonal():
    """vᵀ∇s·v of v = ±1 is the trace exactly where ∇s is diagonal: no noise but the data's own."""
    objective = partial(objectives.sliced, directions="rademacher")
    x, key = DATA.sample(Key(0, torch.arange(100))), Key(1, torch.arange(100))
    arguments = Linear(0.5), x, torch.zeros(100, dtype=torch.int64), key
    exact = objectives.implicit(*arguments, reduction="none")
    torch.testing.assert_close(objective(*arguments, reduction="none"), exact, rtol=1e-12, atol=1e-12)
    assert (objectives.sliced(*arguments, reduction="none") - exact).abs().max() > 0.1
    with pytest.raises(ValueError, match="directions must be 'normal' or 'rademacher', got 'ones'"):
        objectives.sliced(*arguments, directions="ones")


def test_corruptions():
    """E‖r(x̃) − x‖² of r(x̃) = x̃·(1 + σ²·SLOPE) = g·x̃, a share of the elements masked or replaced by 0 or 1."""
    x, share, g = torch.rand(N, 2, generator=torch.Generator().manual_seed(0)).double(), 0.3, 1 + 0.25 * SLOPE
    kept = (1 - share) * (g - 1) ** 2 * 2 / 3  # E x² = 1/3, two elements
    masked = share * 2 / 3
    replaced = share * 2 * (0.5 * (1 / 3) + 0.5 * (g**2 - 2 * g / 2 + 1 / 3))
    for corruption, lost in {"masking": masked, "salt_and_pepper": replaced}.items():
        objective = partial(objectives.denoising_autoencoder, corruption=corruption, share=share)
        value, error = mean_and_error(objective, Linear(0.5), x)
        assert value == pytest.approx(kept + lost, abs=5 * error), corruption
    for options, words in (({"corruption": "blur"}, "corruption must be"), ({"share": 2}, "share must lie in")):
        with pytest.raises(ValueError, match=words):
            mean_and_error(
                partial(objectives.denoising_autoencoder, **{"corruption": "masking"} | options), Linear(0.5), x
            )
