"""What objectives compute whatever surrounds them: unbiased targets by enumeration, precision, shapes, σ = 0."""

import itertools
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from sgm_engine.keys import Key
from sgm_engine.models.cdm.classes import SCHEDULES
from sgm_engine.models.cdm.potential import PotentialNet
from sgm_engine.models.ncsn import NCSN, NCSNv2
from sgm_engine.models.score_model import as_score
from sgm_engine.training import objectives
from sgm_engine.training.objectives import posterior_mean
from sgm_engine.training.toy import TRIPLE, Mixture

FOUR = torch.tensor([[0.0, 0.0], [1.0, 0.5], [-0.5, 1.0], [0.3, -0.8]], dtype=torch.float64)
SIGMA = 0.6


class Fixed:
    """In a Key's place: draws 0, 1, … are the tensors given."""

    def __init__(self, *draws):
        self.draws = draws

    def normal(self, like, draw=0):
        return self.draws[draw].to(like)


class Silent(torch.nn.Module):
    """Answers 0 and keeps what it was asked; the gradient of a loss in the answer tells the target."""

    def __init__(self, sigma=SIGMA, dtype=torch.float64):
        super().__init__()
        self.sigmas = torch.tensor([sigma], dtype=dtype)

    def forward(self, x, level):
        self.asked, self.answer = x, torch.zeros_like(x, requires_grad=True)
        return self.answer


def stable_targets(x, z, **options):
    """x̄ of stable_target for the batch x, noise z, at σ: ∂loss/∂s = −(x̄ − x̃) at s = 0."""
    model = Silent()
    zero = torch.zeros(len(x), dtype=torch.int64)
    losses = objectives.stable_target(model, x, zero, Fixed(z), reduction="none", **options)
    (gradient,) = torch.autograd.grad(losses.sum(), model.answer)
    return model.asked - gradient


def expected_target(y, k, target, weighted=False):
    """E[target | ỹ = y] over all 4^k batches of independent points, each as likely as its own image explains y."""
    total = weight = 0
    for batch in itertools.product(range(4), repeat=k):
        x = FOUR[list(batch)]
        likelihood = torch.exp(-(y - x[0]).square().sum() / (2 * SIGMA**2))
        noise = ((y - x) / SIGMA).clone()  # only the first sample's matters: its ỹ is y
        total, weight = total + likelihood * target(x, noise)[0], weight + likelihood
    return (total, weight) if weighted else total / weight


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("y", [[0.2, 0.1], [-0.4, 0.9], [1.5, -1.0]])
def test_stable_target_is_unbiased(y, k):
    """Every batch enumerated; and it is biased where the reference is the set itself, beside the batch."""
    y = torch.tensor(y, dtype=torch.float64)
    exact = posterior_mean(y[None], FOUR, torch.full((1, 1), SIGMA, dtype=torch.float64))[0]
    unbiased = expected_target(y, k, stable_targets)
    torch.testing.assert_close(unbiased, exact, rtol=0, atol=1e-14)
    whole = expected_target(y, k, partial(stable_targets, reference=FOUR, reference_only=True))
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-14)
    with pytest.warns(UserWarning, match=rf"reference holds {k} of the batch's {k} points, .* reference_only=True"):
        twice = expected_target(y, k, partial(stable_targets, reference=FOUR))
    assert (twice - exact).norm() > 0.01 * SIGMA


def test_a_reference_drawn_from_the_set_is_unbiased():
    """One point and two more, each any of the four, its own among them: what ReferenceBatch draws."""
    y = torch.tensor([0.2, 0.1], dtype=torch.float64)
    exact = posterior_mean(y[None], FOUR, torch.full((1, 1), SIGMA, dtype=torch.float64))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own point may be among them
        drawn = [
            expected_target(y, 1, partial(stable_targets, reference=FOUR[list(two)]), weighted=True)
            for two in itertools.product(range(4), repeat=2)
        ]
    mean = sum(total for total, _ in drawn) / sum(weight for _, weight in drawn)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-14)


def test_a_reference_of_other_points_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stable_targets(FOUR[:2], FOUR[2:], reference=FOUR[2:])
    with pytest.raises(ValueError, match="reference_only=True needs a reference"):
        stable_targets(FOUR[:2], FOUR[2:], reference_only=True)


def loss(name, model, x, key, **options):
    return getattr(objectives, name)(model, x, torch.zeros(len(x), dtype=torch.int64), key, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stable_target_under_autocast(dtype):
    """A network that takes no products: the loss is that of float32 to the bit, at the least and the largest noise."""
    for sigma, size in ((0.01, 2), (348.0, 256)):
        x = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
        key, model = Key(1, torch.arange(4)), lambda x, level: -0.5 * x
        model = as_score(model, sigmas=[sigma])
        want = loss("stable_target", model, x, key)
        with torch.autocast("cpu", dtype):
            assert loss("stable_target", model, x, key).equal(want)
        assert want.isfinite()


@pytest.mark.parametrize(
    "name, options",
    [
        ("denoising", {}),
        ("implicit", {}),
        ("sliced", {}),
        ("denoising_autoencoder", {}),
        ("stable_target", {}),
        ("explicit", {"score": lambda x, level: -2 * x}),
    ],
)
def test_data_in_16_bits(name, options):
    """Noise, target and loss are float32; the network is fed what the data came in."""
    fed = []

    class Half:
        sigmas = torch.tensor([0.01])

        def __call__(self, x, level):
            fed.append(x.dtype)
            return -x

    x = torch.linspace(0, 1, 8).view(4, 2).bfloat16()
    key = Key(1, torch.arange(4))
    found = loss(name, Half(), x, key, **options)
    assert found.dtype == torch.float32 and set(fed) == {torch.bfloat16}
    in_full = loss(name, Half(), x.float(), key, **options)
    assert found.item() == pytest.approx(in_full.item(), rel=0.05)  # x̃ is rounded for the network alone


def test_a_classifier_of_noise_under_autocast():
    """The logits of a network of potentials: 16 bits may move the potential, not the Gaussian's densities."""
    classes = SCHEDULES["vp_geometric"](16, sigma_min=0.01, sigma_max=10.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PotentialNet(1, 8, classes, width=8, mixing=(4, 16)).train()
    u = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    want = net.features(u)
    with torch.autocast("cpu", torch.bfloat16):
        found = net.features(u)
        base = net.features.base.noise_pred(want.z, torch.full((5,), 3))
    for mine, theirs in zip(found, want, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert torch.equal(base, net.features.base.noise_pred(want.z, torch.full((5,), 3)))


def longdouble_mean(y, c, sigma):
    """The posterior mean by differences, in 80-bit floats."""
    y, c = y.numpy().astype(np.longdouble), c.numpy().astype(np.longdouble)
    logits = -np.square(y[:, None] - c).sum(2) / (2 * np.longdouble(sigma) ** 2)
    weight = np.exp(logits - logits.max(1, keepdims=True))
    return weight / weight.sum(1, keepdims=True) @ c


@pytest.mark.parametrize("offset, sigma", [(0, 0.003), (100, 0.001), (0, 0.5)])
def test_weights_of_float32_points(offset, sigma):
    """Errors in σ's, of the toy mixture: what remains is that float32 holds y to 4e-6 at 100."""
    c = (TRIPLE.sample(Key(1, torch.arange(4096))) + offset).float()
    y = c[:64] + sigma * Key(2, torch.arange(64)).normal(c[:64])
    found = posterior_mean(y, c, torch.full((64, 1), sigma))
    rounding = 2**-24 * max(offset, 2) / sigma
    assert abs(found.double().numpy() - longdouble_mean(y, c, sigma)).max() / sigma < 2 * rounding + 1e-5


def test_weights_of_float64_points_far_apart():
    """Where even float64 cannot expand ‖y − x‖²: 10,000 wide at σ = 1e-4."""
    c = 1e4 * TRIPLE.sample(Key(1, torch.arange(64)))
    c = torch.cat([c, c + 2e-4])
    y = c[:16] + 1e-4 * Key(2, torch.arange(16)).normal(c[:16])
    found = posterior_mean(y, c, torch.full((16, 1), 1e-4, dtype=torch.float64))
    assert abs(found.numpy() - longdouble_mean(y, c, 1e-4)).max() < 1e-4 * 1e-4


# -- shapes ------------------------------------------------------------------------------------------------------------

OF_SCORES = [
    name for name in objectives.OBJECTIVES if name not in ("cdm", "ddm")
]  # which take networks of their own, of data without noise too

SHAPES = {
    "one channel for three": lambda x: x[:, :1],
    "an energy": lambda x: x.flatten(1).sum(1).view(-1, 1, 1, 1),
    "a number a sample": lambda x: x.flatten(1).sum(1),
    "a batch of one": lambda x: x[:1],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*OF_SCORES, "explicit", "edm", "multi_sample"])
def test_an_answer_of_another_shape_is_refused(name, shape):
    model = as_score(lambda x, level: x, sigmas=[1.0])
    wrong = lambda x, level: SHAPES[shape](x)  # noqa: E731
    wrong.sigmas = model.sigmas
    options = {"explicit": {"score": model}, "multi_sample": {"copies": 4}}.get(name, {})
    x = torch.zeros(2, 3, 2, 2)
    levels = torch.ones(2) if name == "edm" else torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"model must return a tensor of x's shape \[2, 3, 2, 2\], got \["):
        getattr(objectives, name)(wrong, x, levels, Key(0, torch.arange(2)), **options)


def test_four_copies_are_not_one_answer():
    """M·C channels for C, and of one channel too, where a broadcast would have hidden it."""
    model = as_score(lambda x, level: x, sigmas=[1.0])
    with pytest.raises(ValueError, match=r"shape \[2, 1, 2, 2\], got \[2, 4, 2, 2\]"):
        loss("multi_sample", model, torch.zeros(2, 1, 2, 2), Key(0, torch.arange(2)), copies=4)
    with pytest.raises(ValueError, match=r"shape \[2, 2\], got \[2, 1\]"):
        loss("explicit", model, torch.zeros(2, 2), Key(0, torch.arange(2)), score=lambda x, level: x[:, :1])


# -- σ = 0 -------------------------------------------------------------------------------------------------------------


class Zero:
    sigmas = torch.tensor([1.0, 0.0])

    def __call__(self, x, level):
        return -2 * x


@pytest.mark.parametrize("name", [*OF_SCORES, "explicit", "multi_sample"])
def test_no_noise_is_refused(name):
    options = {"explicit": {"score": Zero()}, "multi_sample": {"copies": 1}}.get(name, {})
    with pytest.raises(ValueError, match=r"model\.sigmas must be positive, got 0"):
        loss(name, Zero(), torch.ones(2, 2), Key(0, torch.arange(2)), **options)


def test_no_noise_elsewhere():
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        objectives.edm(lambda x, s: x, torch.ones(2, 2), torch.tensor([1.0, 0.0]), Key(0, torch.arange(2)))
    parzen = Mixture([1, 1], [[0, 0], [1, 1]], [0, 0])
    with pytest.raises(ValueError, match="sigma must be positive where points have no width, got 0"):
        parzen.score(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="stds must be at least 0, got -1"):
        Mixture([1.0], [[0, 0]], [-1])


@pytest.mark.parametrize("make", [NCSN, NCSNv2])
@pytest.mark.parametrize("training", [True, False])
def test_networks_in_float64(make, training):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make([1.0, 0.1], channels=1, ngf=4, image_size=8).train(training)
    x, level = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    single = net(x, level)
    double = net.double()(x.double(), level)
    assert double.dtype == torch.float64
    assert (double - single).abs().max() < 1e-4 * double.abs().max()
    value = loss("denoising", net, x.double(), Key(0, torch.arange(2)))
    assert value.dtype == torch.float64
