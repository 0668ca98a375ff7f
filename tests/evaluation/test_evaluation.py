"""The evaluation: every figure against a closed form or an independent oracle, its interval, and streams."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from sgm_engine.evaluation.frechet import _jackknife, _student, frechet, frechet_difference, frechet_distance
from sgm_engine.evaluation.moments import GroupedMoments, Moments


def grouped(x, groups=None, block=None):
    moments = GroupedMoments(x.shape[1], groups)
    for start in range(0, len(x), block or len(x)):
        moments.update(x[start : start + (block or len(x))])
    return moments


def random_covariance(rng, dim, rank=None):
    root = rng.standard_normal((dim, rank or dim))
    return root @ root.T / dim


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("groups", [2, 5, 64])
def test_moments_of_a_stream_are_those_of_the_whole(block, groups):
    x = np.random.default_rng(0).standard_normal((1000, 5)) @ np.diag([1, 2, 3, 1e-3, 1]) + 1e6  # E[x²] − E[x]² cancels
    found = grouped(x, groups, block).moments()
    assert found.n == 1000
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-7, atol=1e-9)


def test_weighted_moments_are_those_of_repeated_groups():
    x = np.random.default_rng(1).standard_normal((100, 3))
    weights = np.array([0, 3, 1, 0, 1])
    repeated = np.concatenate([np.repeat(x[g::5], w, 0) for g, w in enumerate(weights)])
    found = grouped(x, 5, 13)._weighted(np.stack([weights, np.ones(5)]))
    for i, z in enumerate((repeated, x)):
        assert found.n[i] == len(z)
        np.testing.assert_allclose(found.mean[i], z.mean(0), atol=1e-14)
        np.testing.assert_allclose(found.covariance[i], np.cov(z.T), atol=1e-14)


def test_moments_refuse_what_is_no_vector():
    moments = GroupedMoments(3)
    with pytest.raises(ValueError, match=r"\[b, 3\], got \[4, 2\]"):
        moments.update(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="NaN"):
        moments.update(np.full((4, 3), np.nan))
    with pytest.raises(ValueError, match="at least 2 vectors, got 0"):
        moments.moments()


def test_frechet_distance_in_one_dimension_is_its_closed_form():
    a, b = Moments(9, np.array([1.0]), np.array([[4.0]])), Moments(9, np.array([-2.0]), np.array([[9.0]]))
    assert frechet_distance(a, b) == pytest.approx(3**2 + (3 - 2) ** 2, rel=1e-14)


@pytest.mark.parametrize("rank", [8, 3])
def test_frechet_distance_agrees_with_scipys_root(rank):
    """rank 3 of 8: a singular covariance, whose plain root may fail or turn complex."""
    rng = np.random.default_rng(2)
    a = Moments(9, rng.standard_normal(8), random_covariance(rng, 8))
    b = Moments(9, rng.standard_normal(8), random_covariance(rng, 8, rank))
    eigenvalues = scipy.linalg.eigvals(a.covariance @ b.covariance).real.clip(0)
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    if rank == 8:
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        assert np.trace(root) == pytest.approx(np.sqrt(eigenvalues).sum(), rel=1e-9)


@pytest.mark.parametrize("n, dim, scale, shift", [(300, 3, 1.5, 0.5), (1500, 3, 1.5, 0.5), (300, 8, 1.0, 0.3)])
def test_frechet_intervals_cover_the_true_distance(n, dim, scale, shift):
    """300 experiments, 95% intervals: below 92% happens by chance once in 60, and the seeds are fixed."""
    rng, covered, errors = np.random.default_rng(3), 0, []
    true = shift**2 + (scale - 1) ** 2
    for _ in range(300):
        x, y = rng.standard_normal((n, dim)), rng.standard_normal((n, dim))
        y[:, 0] = scale * y[:, 0] + shift
        found = frechet(grouped(y), grouped(x))
        covered += found.low <= true <= found.high
        errors.append((found.value - true, found.corrected - true))
    print(f"{covered} of 300")
    assert 0.92 <= covered / 300 <= 0.99
    plain, corrected = np.abs(np.mean(errors, 0))
    assert corrected < plain / 2  # the bias of a finite n is mostly taken out


def test_frechet_differences_cover_the_true_one():
    rng, covered = np.random.default_rng(5), 0
    true = (1.5 - 1) ** 2 - 0.3**2
    for _ in range(200):
        x, y, z = (rng.standard_normal((300, 3)) for _ in "xyz")
        found = frechet_difference(grouped(y * [1.5, 1, 1]), grouped(z + np.array([0.3, 0, 0])), grouped(x))
        covered += found.low <= true <= found.high
    assert 0.91 <= covered / 200 <= 0.99


def test_the_jackknife_of_a_mean_is_exact():
    """Its variance is s²/n where every group is one vector; Student's quantile is scipy's."""
    x = np.random.default_rng(6).standard_normal(40)
    left_out = (x.sum() - x) / 39
    bias, variance, groups = _jackknife(left_out, x.mean())
    assert (abs(bias) < 1e-12, groups) == (True, 40) and variance == pytest.approx(x.var(ddof=1) / 40)
    for freedom in (6, 7, 15, 63):
        assert _student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-4)


def test_frechet_difference_sees_which_set_is_better():
    rng = np.random.default_rng(4)
    reference, good, bad = (grouped(rng.standard_normal((600, 4)) * s) for s in (1, 1, 1.4))
    assert frechet_difference(good, bad, reference).high < 0 < frechet_difference(bad, good, reference).low
    other = grouped(rng.standard_normal((600, 4)))
    same = frechet_difference(good, other, reference)
    assert same.low < 0 < same.high
