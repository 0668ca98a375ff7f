"""Distances and scores that need no Gaussian: each against a closed form or an independent oracle."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from sgm_engine.evaluation import neighbours as neighbours_module
from sgm_engine.evaluation.classes import ClassTally
from sgm_engine.evaluation.distances import mmd, sliced_wasserstein, wasserstein_1d
from sgm_engine.evaluation.evaluate import bits_per_dimension
from sgm_engine.evaluation.neighbours import nearest, neighbourhood
from sgm_engine.evaluation.report import mean_estimate


@pytest.mark.parametrize("n, m", [(1, 1), (5, 3), (100, 257)])
def test_wasserstein_on_the_line_agrees_with_scipy(n, m):
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal(n), rng.standard_exponential(m)
    x[: n // 2] = x[0]  # ties
    assert wasserstein_1d(x, y) == pytest.approx(scipy.stats.wasserstein_distance(x, y), rel=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    """A shift by v moves every line by |θ·v|, whose mean is |v|·Γ(D/2)/(√π·Γ((D+1)/2))."""
    x = np.random.default_rng(5).standard_normal((50, 4))
    shift = np.array([3.0, 0, 0, 4])
    found = sliced_wasserstein(x, x + shift, projections=4000, replicates=2)
    exact = 5 * np.exp(scipy.special.gammaln(2) - scipy.special.gammaln(2.5)) / np.sqrt(np.pi)
    assert found.value == pytest.approx(exact, rel=0.02)  # 2.6 standard errors of 4,000 directions
    assert sliced_wasserstein(x, x, replicates=2).value == 0


@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
def test_mmd_agrees_with_its_definition(kernel):
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((9, 3)), rng.standard_normal((12, 3)) + 0.5
    z = np.concatenate([x, y])
    scale = np.median([np.sum((a - b) ** 2) for i, a in enumerate(z) for b in z[i + 1 :]])

    def k(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * scale)) if kernel == "rbf" else (a @ b / 3 + 1) ** 3

    within = [np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    expected = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert mmd(x, y, kernel, permutations=2, replicates=2).value == pytest.approx(expected, rel=1e-4)


def test_mmd_is_unbiased_and_its_p_values_are_uniform_where_the_laws_are_equal():
    rng = np.random.default_rng(7)
    found = [mmd(rng.standard_normal((30, 2)), rng.standard_normal((20, 2)), permutations=99, replicates=2, seed=i)
             for i in range(300)]  # fmt: skip
    values, p = np.array([f.value for f in found]), np.array([f.p for f in found])
    assert abs(values.mean()) < 4.9 * values.std() / 300**0.5
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-4
    assert set(np.round(p * 100)) <= set(range(1, 101))
    assert mmd(rng.standard_normal((60, 2)), rng.standard_normal((60, 2)) + 1).p == 1 / 501


def test_mmd_intervals_cover_the_true_distance():
    """Cubic kernel on the line, N(0, 1) against N(1, 1): the moments of both give the exact value."""
    rng, covered = np.random.default_rng(8), 0
    moments = np.array([[1, 0, 1, 0], [1, 1, 2, 4]], float)  # E x^0 … x^3
    true = np.array([1, 3, 3, 1]) @ np.square(moments[0] - moments[1])
    for trial in range(200):
        x, y = rng.standard_normal((200, 1)), rng.standard_normal((200, 1)) + 1
        found = mmd(x, y, "polynomial", permutations=2, replicates=200, seed=trial)
        covered += found.low <= true <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def brute_force(fake, real, k):
    def distances(a, b):
        return np.array([[np.linalg.norm(x - y) for y in b] for x in a])

    def radii(a):
        return np.sort(distances(a, a), 1)[:, k]  # 0 is the vector itself

    d, real_radius, fake_radius = distances(fake, real), radii(real), radii(fake)
    inside = d < real_radius
    return (
        inside.any(1).mean(),
        (d < fake_radius[:, None]).any(0).mean(),
        inside.sum(1).mean() / k,
        (d.min(0) < real_radius).mean(),
    )


@pytest.mark.parametrize("k", [1, 5])
def test_neighbourhood_agrees_with_brute_force_in_blocks_of_any_size(k, monkeypatch):
    rng = np.random.default_rng(9)
    fake, real = rng.standard_normal((41, 3)) * 1.5, rng.standard_normal((53, 3))
    expected = brute_force(fake, real, k)
    for block in (1024, 10, 1):
        monkeypatch.setattr(neighbours_module, "BLOCK", block)
        found = neighbourhood(fake, real, k)
        assert [f.value for f in found] == pytest.approx(expected, rel=1e-12)
    assert all(f.low <= f.value <= f.high for f in found)


def test_neighbourhood_tells_collapse_from_noise():
    rng = np.random.default_rng(10)
    real = rng.standard_normal((300, 2))
    collapsed = neighbourhood(0.05 * rng.standard_normal((300, 2)), real)
    noisy = neighbourhood(4 * rng.standard_normal((300, 2)), real)
    assert collapsed.precision.value > 0.99 and collapsed.recall.value < 0.2 and collapsed.coverage.value < 0.2
    assert noisy.precision.value < 0.7 and noisy.recall.value > 0.9


def test_nearest_agrees_with_brute_force_over_blocks():
    rng = np.random.default_rng(11)
    x, pool = rng.standard_normal((7, 4)), rng.standard_normal((50, 4))
    d = np.linalg.norm(x[:, None] - pool, axis=2)
    for size in (50, 8, 1):
        found = nearest(x, (pool[i : i + size] for i in range(0, 50, size)))
        assert found.index.tolist() == d.argmin(1).tolist()
        np.testing.assert_allclose(found.distance, d.min(1), rtol=1e-7)


def tally(logits, block=17):
    t = ClassTally(logits.shape[1])
    for start in range(0, len(logits), block):
        t.update(logits[start : start + block])
    return t


def test_classifier_score_at_its_ends_and_by_its_definition():
    sure = 1000.0 * np.eye(10)[np.arange(640) % 10]
    assert tally(sure).score().value == pytest.approx(10)
    assert tally(np.zeros((640, 10))).score().value == pytest.approx(1)
    assert tally(1000.0 * np.eye(10)[np.zeros(640, int)]).score().value == pytest.approx(1)
    logits = np.random.default_rng(12).standard_normal((500, 4)) * 3
    p = scipy.special.softmax(logits, 1)
    expected = np.exp(np.mean(np.sum(p * np.log(p / p.mean(0)), 1)))
    assert tally(logits).score().value == pytest.approx(expected, rel=1e-12)
    assert tally(logits, 500).score() == pytest.approx(tally(logits, 3).score(), nan_ok=True)


def test_classifier_score_of_ten_parts():
    """By its definition on each part; sets sorted by class and sets with classes in turn have all classes in each."""
    for order in (np.arange(640) % 10, np.sort(np.arange(640) % 10)):
        mean, deviation = tally(1000.0 * np.eye(10)[order]).parts()
        assert 8.5 < mean <= 10 and deviation < 0.5
    logits = np.random.default_rng(12).standard_normal((507, 4)) * 3
    p = scipy.special.softmax(logits, 1)
    part = np.concatenate([np.random.default_rng(b).permutation(10) for b in range(51)])[:507]
    scores = [np.exp(np.mean(np.sum(q * np.log(q / q.mean(0)), 1))) for q in (p[part == k] for k in range(10))]
    for block in (17, 507):
        assert tally(logits, block).parts() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    assert np.mean(scores) < tally(logits).score().value
    with pytest.raises(ValueError, match="a score of 10 parts needs as many images, got 9"):
        tally(logits[:9]).parts()


def test_class_imbalance_is_the_total_variation():
    a, b = tally(np.eye(4)[[0] * 30 + [1] * 10]), tally(np.eye(4)[[0] * 20 + [1] * 10 + [3] * 10])
    assert a.imbalance(b).value == pytest.approx(0.25)
    assert a.imbalance(a).value == 0
    assert a.shares().tolist() == [0.75, 0.25, 0, 0]


def test_bits_per_dimension_of_known_densities():
    images = torch.randint(0, 256, (400, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    uniform = bits_per_dimension(lambda x: torch.zeros(len(x)), images.split(100))
    assert uniform.value == uniform.low == uniform.high == 8  # 256 equal values
    normal = torch.distributions.Normal(0.5, 0.25)
    found = bits_per_dimension(lambda x: normal.log_prob(x.double()).sum((1, 2, 3)), images.split(150))
    x = (images.double() + 0.5) / 256  # dequantised, which costs little where the density is so flat
    expected = 8 - (-0.5 * ((x - 0.5) / 0.25) ** 2 - np.log(0.25 * np.sqrt(2 * np.pi))).mean() / np.log(2)
    assert found.value == pytest.approx(float(expected), abs=1e-3) and found.low < found.value < found.high
    with pytest.raises(ValueError, match=r"one number an image, \[100\], got \[100, 1\]"):
        bits_per_dimension(lambda x: torch.zeros(len(x), 1), images.split(100))


def test_a_mean_and_its_interval():
    rng = np.random.default_rng(13)
    covered = 0
    for trial in range(300):
        found = mean_estimate(rng.exponential(size=200), 200, trial)
        covered += found.low <= 1 <= found.high
    assert 0.89 <= covered / 300 <= 0.98
