"""Tuning: which plans are tried, which survive, and that the figures of the front are of samples not searched on."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch

from sgm_engine import pace
from sgm_engine.data.sets import from_array
from sgm_engine.engine.engine import Engine
from sgm_engine.evaluation.evaluate import summarise
from sgm_engine.evaluation.features import pixels
from sgm_engine.plans.plan import Plan, ancestral, annealed_langevin
from sgm_engine.plans.schedule import geometric, nearest_level
from sgm_engine.tuning import front as tuning_front
from sgm_engine.tuning.candidates import FAMILIES, draw_candidates
from sgm_engine.tuning.front import label
from sgm_engine.tuning.search import best, front, halve, samples_of
from sgm_engine.tuning.tune import Drawn, Tuner, plan_of_samples

SIGMAS = geometric(5, 0.05, 12)


def start(shift, sigma):
    return {"start_scale": sigma, "start_shift": shift}


class Fake:
    """A trial whose quality is known from the start."""

    def __init__(self, nfe, quality):
        self.plan = Plan(np.zeros(nfe, int), np.ones(nfe), np.ones(nfe), np.zeros(nfe), np.zeros(nfe))
        self.quality, self.n = quality, 0

    def __repr__(self):
        return f"{self.plan.nfe}:{self.quality}"


# -- candidates --------------------------------------------------------------------------------------------------------


def test_candidates_are_distinct_runnable_and_within_the_budget():
    plans = draw_candidates(SIGMAS, 30, 60, seed=1, start=partial(start, 0.13))
    assert len({p.digest for p in plans}) == 60 and {p.name for p in plans} == set(FAMILIES)
    for p in plans:
        assert 2 <= p.nfe <= 30 and p.start_shift == 0.13
        own = np.array_equal(p.sigma, SIGMAS[nearest_level(p.sigma, SIGMAS)])
        assert own or not p.metadata["own_levels"] or p.metadata["s_churn"] > 0
        assert Plan.from_json(p.to_json()) == p and p.name in label(p)
    assert len({p.metadata["schedule"] for p in plans}) == 4 and len({p.metadata["own_levels"] for p in plans}) == 2


def test_candidates_repeat_by_seed_and_are_refused_in_words():
    assert all(p.metadata["own_levels"] for p in draw_candidates(SIGMAS, 20, 8, between=False))
    a, b, c = (draw_candidates(SIGMAS, 20, 8, seed) for seed in (0, 0, 1))
    assert a == b and a != c
    assert {p.name for p in draw_candidates(SIGMAS, 20, 5, families=["heun"])} == {"heun"}
    with pytest.raises(ValueError, match=r"families must be of annealed_langevin.*got 'magic'"):
        draw_candidates(SIGMAS, 20, 8, families=["magic"])
    with pytest.raises(ValueError, match="found only 1 different plans"):
        draw_candidates([1.0, 0.1], 2, 5, families=["ddim"])
    with pytest.raises(ValueError, match="budget must be at least 2"):
        draw_candidates(SIGMAS, 1, 5)


# -- search ------------------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats():
    points = [(5, 3.0), (5, 2.0), (10, 2.0), (20, 1.0), (30, 1.5), (40, 0.5)]
    assert front(points, lambda p: p) == [(5, 2.0), (20, 1.0), (40, 0.5)]
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(p) for p in rng.integers(0, 6, (12, 2)).tolist()]
        beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
        assert set(front(points, lambda p: p)) == set(points) - beaten


def test_best_takes_whole_layers_then_the_best_quality_of_the_next():
    trials = [Fake(5, 3.0), Fake(10, 2.0), Fake(5, 4.0), Fake(10, 3.5), Fake(20, 2.5), Fake(30, 9.0)]
    kept = {str(t) for t in best(trials, 3)}
    assert kept == {"5:3.0", "10:2.0", "20:2.5"}  # the second layer is 5:4, 10:3.5, 20:2.5


def test_halving_draws_each_sample_once_and_gives_survivors_more():
    trials, log = [Fake(i + 2, q) for i, q in enumerate([5, 1, 4, 2, 3, 9, 8, 7])], []

    def extend(trial, n):
        log.append((trial, n - trial.n))
        trial.n = n

    alive = halve(trials, extend, 10, 30)
    assert sorted(t.n for t in trials) == [10, 10, 10, 10, 20, 20, 30, 30] and len(alive) == 2
    assert sum(drawn for _, drawn in log) == 8 * 10 + 4 * 10 + 2 * 10 == samples_of(8, 10, 30)
    assert samples_of(5, 16, 16) == 5 * 16 and samples_of(3, 2, 100) == 3 * 2 + 2 * 2 + 96
    assert min(t.quality for t in alive) == 1
    with pytest.raises(ValueError, match="first must be at least 2 and at most last, got 8 and 4"):
        halve(trials, extend, 8, 4)
    with pytest.raises(ValueError, match=r"keep must lie between 0 and 1, got 1"):
        halve(trials, extend, 4, 8, keep=1.0)


# -- the tuner on a model that is known: data N(0.5, 0.1²) in every pixel ----------------------------------------------


class Gaussian:
    """The exact score, at any sigmas."""

    def __init__(self, sigmas):
        self.sigmas, self.shape, self.total = sigmas, (1, 3, 3), torch.tensor(np.array(sigmas)) ** 2 + 0.1**2

    def at_sigmas(self, sigmas):
        return Gaussian(sigmas)

    def __call__(self, x, level):
        return (0.5 - x) / self.total[level].float()[:, None, None, None]


def engine_for(model):
    return Engine(model, 64)


@pytest.fixture(scope="module")
def tuner():
    x = 0.5 + 0.1 * np.random.default_rng(0).standard_normal((4000, 1, 3, 3))
    return Tuner(Gaussian(SIGMAS), engine_for, pixels(), summarise(from_array(x).blocks(), pixels(), "gaussian"))


def test_the_chosen_plan_reaches_the_floor_and_beats_a_poor_baseline(tuner):
    plans = draw_candidates(SIGMAS, 24, 12, seed=3, start=partial(start, 0.5))
    survivors = tuner.search(plans, 0, 64, 256)
    poor = annealed_langevin(SIGMAS[:8], 3, 0.5 * SIGMAS[7] ** 2, start_shift=0.5, denoise=False)  # stops at σ = 0.27
    outcome = tuner.confirm(survivors, 1000, 256, baseline=poor)
    assert outcome.chosen.nfe <= 24 and outcome.chosen.plan in plans
    assert outcome.chosen.quality.corrected < 0.005
    assert outcome.difference.high < 0
    assert [p.nfe for p in outcome.points] == sorted(p.nfe for p in outcome.points)


def test_held_out_figures_are_of_other_samples_than_the_search(tuner):
    trial = tuner.search([ancestral(SIGMAS, start_shift=0.5)], 0, 64, 64)[0]
    point = tuner.confirm([trial], 1000, 64).chosen
    assert point.quality.value != trial.quality
    again = tuner.confirm([trial], 0, 64).chosen  # the search's own seed and ids: the same samples
    assert again.quality.value == pytest.approx(trial.quality, rel=1e-9)


def test_a_plan_that_diverges_is_out(tuner):
    bad = Plan([0, 0], [SIGMAS[0]] * 2, [3e38, 3e38], [0, 0], [0, 0])
    good = ancestral(SIGMAS, start_shift=0.5)
    trials = tuner.search([bad, good], 0, 16, 16)
    assert [np.isfinite(t.quality) for t in trials] == [False, True]
    assert tuner.confirm(trials, 1, 16).chosen.plan == good
    with pytest.raises(ValueError, match="every plan that survived the search diverged"):
        tuner.confirm(trials[:1], 1, 16)


def test_the_figures_that_are_shown_lie_in_their_intervals(tuner, tmp_path, monkeypatch):
    """In the table, in the difference, and as bars of the picture."""
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    trial = tuner.search([ancestral(SIGMAS, start_shift=0.5)], 0, 16, 16)[0]
    outcome = tuner.confirm([trial], 1000, 16, baseline=ancestral(SIGMAS[:8], start_shift=0.5))
    drawn, make = [], tuning_front._figure
    monkeypatch.setattr(tuning_front, "_figure", lambda: drawn.append(make()) or drawn[-1])
    outcome.plot(tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert len(axes.containers) == len(outcome.points) == 2
    for point, bars in zip(sorted(outcome.points, key=lambda p: p.role == "baseline"), axes.containers, strict=True):
        q = point.quality
        assert q.low <= q.corrected <= q.high < q.value
        (bar,) = bars[2][0].get_segments()
        np.testing.assert_allclose(bar, [[point.nfe, q.low], [point.nfe, q.high]])
        assert bars[0].get_xydata().tolist() == [[point.nfe, q.corrected]]
        assert f"| {q.value:.3f} | {q.corrected:.3f} | {q.low:.3g}–{q.high:.3g} |" in outcome.table()
    d = outcome.difference
    assert d.low < d.corrected < d.high and f"corrected {d.corrected:.3f} ({d.low:.3f} to" in outcome.table()


@pytest.mark.parametrize("measure", ["sliced", "mmd"])
def test_other_measures_rank_alike(tuner, measure):
    other = Tuner(tuner.model, engine_for, pixels(), tuner.reference, measure)
    good, poor = ancestral(SIGMAS, start_shift=0.5), ancestral(SIGMAS[:8], start_shift=0.7)
    a, b = (other.search([plan], 0, 64, 64)[0] for plan in (good, poor))
    assert a.quality < b.quality
    with pytest.raises(ValueError, match="measure must be one of frechet, sliced, mmd, got 'fid'"):
        Tuner(tuner.model, engine_for, pixels(), tuner.reference, "fid")


def test_samples_drawn_before_serve_as_baseline(tuner, tmp_path):
    from sgm_engine.outputs.output import Output

    plan = ancestral(SIGMAS, start_shift=0.5)
    x = engine_for(tuner.model).sample(64, 1000, plan.on_levels(SIGMAS)).numpy()
    Output.parse(str(tmp_path / "x.safetensors")).write(x, range(64), {"plan": plan.to_json()})
    assert plan_of_samples(tmp_path) == plan == plan_of_samples(tmp_path / "x.safetensors")
    trial = tuner.search([plan], 0, 64, 64)[0]
    outcome = tuner.confirm([trial], 1000, 64, baseline=Drawn(from_array(x), plan))
    assert [p.role for p in outcome.points] == ["chosen", "baseline"] and outcome.difference.value == 0
    with pytest.raises(ValueError, match=r"only \.safetensors samples say which plan"):
        plan_of_samples(tmp_path / "x.npz")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "reference.npy", pixels)
    return tmp_path / "reference.npy"


def test_tune_writes_a_front_and_a_plan_that_can_be_used_again(sgm, tiny_weights, data, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "FIRST", 0.0)
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    small = ("--checkpoint", tiny_weights, "--batch", 16, "--reference", data)
    size = ("--candidates", 4, "--first", 8, "--last", 16, "--held-out", 16)
    done = sgm("tune", "--budget", 6, *small, *size, "--training", data, "--baseline", "annealed_langevin")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^sgm: \d+ of \d+ evaluations, \S+ evaluations/s, 00:\d\d:\d\d left$", done.stderr, re.M)
    files = [".lock", "front.json", "front.md", "front.png", "plan.json", "search.jsonl"]
    assert sorted(p.name for p in (tmp_path / "tuned").iterdir()) == files
    found = json.loads((tmp_path / "tuned/front.json").read_text())
    plan = Plan.from_json((tmp_path / "tuned/plan.json").read_text())
    chosen = [p for p in found["points"] if p["role"] == "chosen"]
    assert len(chosen) == 1 and Plan.from_json(json.dumps(chosen[0]["plan"])) == plan and plan.nfe <= 6
    assert "**chosen**" in done.stdout and "baseline" in done.stdout and "floor" in done.stdout
    assert (tmp_path / "tuned/front.png").read_bytes().startswith(b"\x89PNG")
    again = sgm(
        "eval",
        *small,
        "--n",
        16,
        "--seed",
        1000,
        "--plan",
        "tuned/plan.json",
        "--metrics",
        "frechet",
        "--json",
        "e.json",
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "e.json").read_text())["rows"][0]["value"] == pytest.approx(chosen[0]["value"])


def test_tune_writes_the_front_into_the_weights(sgm, tiny_weights, data, tmp_path):
    from sgm_engine.checkpoints.checkpoint import load_checkpoint

    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    size = ("--candidates", 4, "--first", 8, "--last", 8, "--held-out", 16, "--batch", 16)
    done = sgm("tune", "--budget", 6, "--checkpoint", tiny_weights, "--reference", data, "--training", data, *size,
               "--baseline", "annealed_langevin", "--write", "w.safetensors")  # fmt: skip
    assert done.returncode == 0 and "written: w.safetensors" in done.stdout, done.stderr
    assert "the weights have no law of the data" in done.stderr
    model, found = load_checkpoint(tmp_path / "w.safetensors"), json.loads((tmp_path / "tuned/front.json").read_text())
    assert model.law.mean.shape == (1, 8, 8) and model.front.n == 16 and model.front.reference == "reference.npy"
    held = {(p["nfe"], round(p["value"], 3), round(p["corrected"], 3)) for p in found["points"]}
    assert {(p.nfe, p.value, p.corrected) for p in model.front.points} <= held
    assert sgm("sample", "--checkpoint", "w.safetensors", "--nfe", 6, "--n", 2).returncode == 0
    done = sgm("tune", "--at", "3,5", "--checkpoint", "w.safetensors", "--reference", data, *size,
               "--families", "ddim,ancestral", "--out", "more", "--write", "w.safetensors")  # fmt: skip
    assert done.returncode == 0 and "no law" not in done.stderr, done.stderr
    drawn = [int(line.split()[2]) for line in done.stderr.splitlines() if line.startswith("n ")]
    assert max(drawn[:2]) <= 3 < max(drawn[2:]) <= 5
    assert len(load_checkpoint(tmp_path / "w.safetensors").front.command.split("; ")) == 2


BAD = [
    (["--budget", "9", "--write", "x.pt"], ["--write", "must end in .safetensors"]),
    ([], ["--budget", "--seconds"]),
    (["--budget", "1"], ["--budget", "at least 2"]),
    (["--budget", "9", "--seconds", "1"], ["not allowed with"]),
    (["--seconds", "0"], ["--seconds", "positive"]),
    (["--seconds", "1e-9"], ["--seconds", "buy no 2 evaluations"]),
    (["--budget", "9", "--families", "magic"], ["families", "magic"]),
    (["--budget", "9", "--held-out-seed", "0"], ["--held-out-seed", "must differ"]),
    (["--budget", "9", "--baseline", "absent.json"], ["absent.json"]),
    (["--budget", "9", "--held-out", "2"], ["--held-out", "needs 3 images, got 2"]),
    (["--budget", "9", "--reference", "two.npy"], ["--reference", "needs 3 images, got 2"]),
    (["--budget", "9", "--features", "magic:x"], ["features", "'magic:x'"]),
    (["--budget", "9", "--features", "torchscript:absent.pt"], ["absent.pt"]),
    (["--budget", "9", "--training", "absent"], ["absent"]),
    (["--budget", "9", "--out", "full/"], ["full", "not empty"]),
]


@pytest.mark.parametrize("args, words", BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_line(args, words, sgm, tiny_weights, data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    np.save(tmp_path / "two.npy", np.load(data)[:2])
    done = sgm("tune", "--checkpoint", tiny_weights, "--batch", 4, "--reference", data, *args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("sgm: ")
    for word in words:
        assert word in done.stderr
