"""The report of an evaluation: every figure, copies, streams, and what is refused."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from sgm_engine.evaluation.distances import mmd, sliced_wasserstein
from sgm_engine.evaluation.evaluate import METRICS, Reservoir, Summary, copies, evaluate, pairs, summarise
from sgm_engine.evaluation.features import Extractor, pixels


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
    found["distance"][7] = 0.0  # the nearest of all
    drawn = pairs(summaries[2], summaries[0], training.split(64), found, 3)
    assert drawn.shape == (6, *training.shape[2:], training.shape[1])
    np.testing.assert_array_equal(drawn[0], stolen[7].permute(1, 2, 0))
    np.testing.assert_array_equal(drawn[3], training[7].permute(1, 2, 0))


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
