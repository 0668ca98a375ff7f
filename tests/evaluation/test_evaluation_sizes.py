"""Evaluation at real sizes: long vectors of few images, sets of a handful, constant images."""

import json
import time

import numpy as np
import pytest
import torch

from sgm_engine.evaluation import moments
from sgm_engine.evaluation.evaluate import evaluate, summarise
from sgm_engine.evaluation.features import pixels
from sgm_engine.evaluation.frechet import frechet, frechet_difference, frechet_distance
from sgm_engine.evaluation.moments import GroupedMoments, Moments

DIM = 600


def vectors(n, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n, DIM)) * np.linspace(0.1, 2, DIM) + rng.standard_normal(DIM)


def grouped(x):
    found = GroupedMoments(x.shape[1])
    for start in range(0, len(x), 100):
        found.update(x[start : start + 100])
    return found


def dense(x):
    return Moments(len(x), x.mean(0), np.cov(x.T))


@pytest.mark.parametrize("n, m", [(12, 40), (40, 12), (12, 900), (900, 12)])
def test_a_factor_gives_the_distance_of_the_covariance(n, m):
    """12 and 40 vectors of 600 numbers are kept; of 900 the covariance is, and either way round."""
    x, y = vectors(n, 0), vectors(m, 1, 1.3)
    a, b = grouped(x).moments(), grouped(y).moments()
    assert (a.factor is None, b.factor is None) == (n > DIM, m > DIM)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(dense(x), dense(y)), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(dense(x), dense(y)), rel=1e-6)
    assert a.trace == pytest.approx(np.trace(np.cov(x.T)))


def test_a_set_that_outgrows_its_vectors_has_the_moments_of_the_whole():
    x = vectors(700, 2) + 1e3
    found = grouped(x).moments()
    assert found.factor is None and found.n == 700
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-7, atol=1e-9)


def test_intervals_of_kept_vectors_are_those_of_the_jackknife():
    """Leaving one of ten vectors out, from the dense moments of the others."""
    x, y = vectors(10, 3), vectors(14, 4)
    found = frechet(grouped(x), grouped(y))
    whole = frechet_distance(dense(y), dense(x))
    of_x = np.array([frechet_distance(dense(y), dense(np.delete(x, i, 0))) for i in range(10)])
    of_y = np.array([frechet_distance(dense(x), dense(np.delete(y, i, 0))) for i in range(14)])
    bias = 9 * (of_x.mean() - whole) + 13 * (of_y.mean() - whole)
    assert found.value == pytest.approx(whole, rel=1e-6) and found.corrected == pytest.approx(
        max(0, whole - bias), rel=1e-4
    )
    assert found.low <= found.corrected <= found.high
    difference = frechet_difference(grouped(x), grouped(x), grouped(y))
    assert difference.value == 0 and difference.low <= 0 <= difference.high


def images(n, size, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [32, 128])
def test_a_dozen_real_images_take_seconds(size):
    """3,072 and 49,152 numbers an image: the covariance would have 2.4·10⁹ of them."""
    start = time.process_time()
    mine, theirs = (summarise(images(12, size, seed).split(5), pixels(), total=12) for seed in (0, 1))
    report = evaluate(mine, theirs, replicates=20)
    assert {row.metric for row in report.rows} >= {"Fréchet distance", "sliced W1", "precision"}
    assert time.process_time() - start < 20


def test_what_has_no_room_is_refused_at_the_first_block_and_names_the_remedy():
    def blocks():
        yield images(2, 128)
        pytest.fail("went on")

    with pytest.raises(ValueError, match=r"50000 images of 49152 features each need .* GiB: .*--features classifier"):
        summarise(blocks(), pixels(), total=50_000)


def test_without_a_total_it_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(moments, "DENSE", 599)
    monkeypatch.setattr(moments, "KEPT", 8 * DIM * 50)
    found = GroupedMoments(DIM)
    found.update(vectors(50, 0))
    with pytest.raises(ValueError, match="or at most 50 images"):
        found.update(vectors(1, 0))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_small_sets_lose_only_what_cannot_be_had(n):
    mine, theirs = (summarise([images(n, 8, seed)], pixels()) for seed in (0, 1))
    report = evaluate(mine, theirs, replicates=20)
    found = {row.metric: row for row in report.rows}
    assert {"Fréchet distance", "sliced W1", "mmd"} <= set(found)
    assert ("precision" in found) == (n > 5) == ("precision cannot be had" not in report.notes)
    assert np.isnan(found["Fréchet distance"].low) == (n == 2)
    assert not np.isinf([(row.low, row.high) for row in report.rows]).any()
    assert n == 2 or found["mmd"].low < found["mmd"].high
    assert "none" in report.table() if n == 2 else "Fréchet" in report.table()
    assert json.loads(report.to_json())["rows"][0]["low"] is None or n > 2
    with pytest.raises(ValueError, match="k must be at least 1 and below both sizes") if n <= 5 else _nothing():
        evaluate(mine, theirs, ["precision"], replicates=20)


def test_constant_images_have_figures():
    grey, other = (summarise([torch.full((4, 1, 8, 8), v, dtype=torch.uint8)], pixels()) for v in (0, 255))
    rows = {row.metric: row for row in evaluate(grey, other, replicates=20).rows}
    assert rows["Fréchet distance"].value == pytest.approx(64) and rows["sliced W1"].value > 0
    same = {row.metric: row for row in evaluate(grey, grey, replicates=20).rows}
    assert same["Fréchet distance"].value == same["sliced W1"].value == 0


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return False
