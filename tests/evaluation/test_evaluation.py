"""The evaluation: every figure against a closed form or an independent oracle, its interval, and streams."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from sgm_engine.evaluation import neighbours as neighbours_module
from sgm_engine.evaluation.classes import ClassTally
from sgm_engine.evaluation.distances import mmd, sliced_wasserstein, wasserstein_1d
from sgm_engine.evaluation.evaluate import METRICS, Reservoir, Summary, bits_per_dimension, copies, evaluate, summarise
from sgm_engine.evaluation.features import Extractor, pixels
from sgm_engine.evaluation.frechet import _jackknife, _student, frechet, frechet_difference, frechet_distance
from sgm_engine.evaluation.moments import GroupedMoments, Moments
from sgm_engine.evaluation.neighbours import nearest, neighbourhood
from sgm_engine.evaluation.report import mean_estimate


def grouped(x, groups=None, block=None):
    moments = GroupedMoments(x.shape[1], groups)
    for start in range(0, len(x), block or len(x)):
        moments.update(x[start : start + (block or len(x))])
    return moments


def random_covariance(rng, dim, rank=None):
    root = rng.standard_normal((dim, rank or dim))
    return root @ root.T / dim


# -- moments -----------------------------------------------------------------------------------------------------------


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


# -- Fréchet -----------------------------------------------------------------------------------------------------------


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


# -- Wasserstein -------------------------------------------------------------------------------------------------------


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


# -- MMD ---------------------------------------------------------------------------------------------------------------


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


# -- neighbours --------------------------------------------------------------------------------------------------------


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


# -- classes and likelihood --------------------------------------------------------------------------------------------


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


# -- the whole ---------------------------------------------------------------------------------------------------------


def images_of(rng, n, mean=128.0, std=30.0, side=4):
    x = rng.standard_normal((n, 1, side, side)) * std + mean
    return torch.from_numpy(x.clip(0, 255).astype(np.uint8))


def test_evaluate_reports_every_figure_and_the_better_set_is_better_in_each():
    rng = np.random.default_rng(14)
    classes = Extractor("pixels and classes", lambda x: (x.float().flatten(1) / 255, x.float().flatten(1)[:, :5] / 20))
    reference, floor, good, bad = (
        summarise(images_of(rng, 300, mean).split(64), classes) for mean in (128, 128, 128, 150)
    )
    fine, poor = (evaluate(s, reference, floor=floor, replicates=20) for s in (good, bad))
    assert len(fine.rows) == len(METRICS) and {"Fréchet distance", "classifier score"} < {r.metric for r in fine.rows}
    better = {r.metric: r.value for r in fine.rows}
    for row in poor.rows:
        if row.metric in ("Fréchet distance", "sliced W1", "mmd"):
            assert row.value > 2 * max(row.floor, better[row.metric])
        elif row.metric in ("precision", "density", "coverage", "recall"):
            assert row.value < better[row.metric] + 0.02
    assert next(r.p for r in poor.rows if r.metric == "mmd") < 0.01
    for row in fine.rows:
        assert row.metric in fine.table() and row.metric in fine.to_json()


def test_a_frechet_distance_is_called_fid_in_inceptions_features_only():
    rng = np.random.default_rng(15)
    for inception, name in ((True, "FID"), (False, "Fréchet distance")):
        extractor = Extractor("x", pixels().network, inception)
        a, b = (summarise([images_of(rng, 40)], extractor) for _ in range(2))
        assert [row.metric for row in evaluate(a, b, ["frechet"], replicates=2).rows] == [name]


def test_copies_are_found_and_strangers_are_not():
    rng = np.random.default_rng(16)
    training, reference, strangers = (images_of(rng, n) for n in (500, 100, 100))
    stolen = training[:100].clone()
    stolen[:, :, 0, 0] += 1
    summaries = [summarise([x], pixels()) for x in (reference, strangers, stolen)]
    fresh = copies(summaries[1], summaries[0], training.split(64))
    found = copies(summaries[2], summaries[0], training.split(64))
    assert found["closer"] == 1 and found["nearest"] == list(range(100)) and found["samples"]["median"] < 0.01
    assert fresh["closer"] < 0.1


def test_evaluate_refuses_what_it_cannot_measure():
    summary = summarise([images_of(np.random.default_rng(17), 10)], pixels())
    with pytest.raises(ValueError, match=r"metrics must be of frechet.*got beauty"):
        evaluate(summary, summary, ["beauty"])
    with pytest.raises(ValueError, match="score need features with classes, pixels have none"):
        evaluate(summary, summary, ["score"])
    with pytest.raises(ValueError, match=r"k must be .* below both sizes, got 10"):
        evaluate(summary, summary, ["recall"], k=10)
    with pytest.raises(ValueError, match="at least 2 images are needed, got 0"):
        summarise([], pixels())
    with pytest.raises(ValueError, match="kernel must be one of"):
        mmd(np.zeros((3, 2)), np.zeros((3, 2)), "cosine")
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[3, 4\]"):
        sliced_wasserstein(np.zeros((3, 2)), np.zeros((3, 4)))


def test_a_reservoir_is_a_uniform_sample_of_the_stream():
    counts = np.zeros(40)
    for seed in range(600):
        reservoir = Reservoir(10, seed)
        for start in range(0, 40, 7):
            reservoir.update(np.arange(start, min(start + 7, 40))[:, None])
        rows = reservoir.rows()[:, 0]
        assert len(set(rows)) == 10
        counts[rows] += 1
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    short = Reservoir(10)
    short.update(np.arange(4)[:, None])
    assert short.rows()[:, 0].tolist() == [0, 1, 2, 3] and len(short.rows(2)) == 2


def test_fifty_thousand_images_are_never_in_memory():
    """154 MB of pixels stream by; a reservoir of 1,000 of them is 3 MB."""
    means = Extractor("channel means", lambda x: x.float().mean((2, 3)))
    summary = Summary(means)
    tracemalloc.start()
    for i in range(50):
        summary.update(torch.full((1000, 3, 32, 32), i, dtype=torch.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.n == 50_000 and peak < 25e6
    np.testing.assert_allclose(summary.moments.moments().mean, 24.5)
