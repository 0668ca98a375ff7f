"""Candidates drawn elsewhere, in whatever order: the search, its figures and what is kept of it are the same."""

import json

import numpy as np
import pytest
import torch

from sgm_engine.cli.main import main
from sgm_engine.evaluation.features import pixels
from sgm_engine.plans.plan import ancestral
from sgm_engine.tuning.pool import PlanPainter, Pool, as_text
from sgm_engine.tuning.tune import Tuner
from tests.tuning.test_kept import PLANS
from tests.tuning.test_tuning import Gaussian, data, engine_for, tuner  # noqa: F401 - fixtures

OPTIONS = {"batch": 64, "device": "cpu", "precision": "float32", "executor": "auto", "float8": None}


class Backwards:
    """A pool in this process, which answers the last task first; it ends after ``room`` answers."""

    def __init__(self, painter, room=10**9):
        self.painter, self.room, self.drawn = painter, room, []

    def draw(self, tasks):
        for place in reversed(range(len(tasks))):
            if len(self.drawn) >= self.room:
                raise OSError(28, "No space left on device")
            self.drawn.append(tasks[place])
            blocks, lost = self.painter.draw(b"", as_text(tasks[place]))
            yield place, ([torch.from_numpy(block) for block in blocks], lost)


class Elsewhere(Tuner):
    """Draws nothing by itself but the baseline."""

    def _draw(self, plan, ids, seed, lost, tell):
        assert (plan.digest, ids, seed) in self._ready or plan.name == "ancestral", "drawn in this process"
        return super()._draw(plan, ids, seed, lost, tell)


def tuned(old, pool, kept, told=lambda n: None):
    new = (Elsewhere if pool else Tuner)(old.model, engine_for, pixels(), old.reference, kept=kept, pool=pool)
    survivors = new.search(PLANS, 0, 16, 64, tell=told)
    return new.confirm(survivors, 1000, 32, baseline=ancestral(old.model.sigmas, start_shift=0.5), tell=told).table()


@pytest.fixture(scope="module")
def painter(tuner):
    return PlanPainter(tuner.model, OPTIONS)


def test_the_front_is_the_same(tuner, painter):
    kept, far, told, told_far = {}, {}, [], []
    pool = Backwards(painter)
    assert tuned(tuner, None, kept, told.append) == tuned(tuner, pool, far, told_far.append)
    assert far == kept and sum(told) == sum(told_far)
    assert sum(len(ids) for _, ids, seed in pool.drawn if seed == 0) == 6 * 16 + 3 * 16 + 2 * 32


def test_what_is_finished_is_kept_and_not_drawn_again(tuner, painter):
    """It is cut off in the first round, and in the second, for which what is known of a trial is drawn once more."""
    whole, kept, drawn = tuned(tuner, None, {}), {}, []
    for room, known in ((4, 4), (4, 7)):
        pool = Backwards(painter, room)
        with pytest.raises(OSError, match="No space"):
            tuned(tuner, pool, kept)
        assert len(kept) == known
        drawn.append([(ids.start, ids.stop) for _, ids, _ in pool.drawn])
    assert drawn == [[(0, 16)] * 4, [(0, 16)] * 2 + [(16, 32), (0, 16)]]
    assert tuned(tuner, Backwards(painter), kept) == whole


def test_samples_that_diverge_elsewhere_count(tuner):
    class Wild(Gaussian):
        def __call__(self, x, level):
            return torch.full_like(x, float("nan"))

        def at_sigmas(self, sigmas):
            return Wild(sigmas)

    pool = Backwards(PlanPainter(Wild(np.array(tuner.model.sigmas)), OPTIONS))
    new = Tuner(tuner.model, engine_for, pixels(), tuner.reference, pool=pool)
    assert {t.quality for t in new.search(PLANS[:2], 0, 8, 8)} == {float("inf")}


def test_options_that_do_not_go_together_are_named(tmp_path, capsys):
    common = ["tune", "--reference", str(tmp_path), "--out", f"{tmp_path}/out"]
    for given, what in (
        (["--budget", "8", "--actors", "2"], "argument --actors: goes with --ray"),
        (["--budget", "8", "--patience", "2"], "argument --patience: goes with --ray"),
        (["--seconds", "8", "--ray"], "argument --seconds: not with --ray"),
    ):
        assert main([*common, *given]) == 2
        assert what in capsys.readouterr().err


def test_actors_of_ray_draw_the_candidates(tuner):
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")
    from tests.tuning import test_tuning

    ray.cloudpickle.register_pickle_by_value(test_tuning)  # actors cannot import from tests/
    pool = None
    try:
        pool = Pool(tuner.model, OPTIONS, actors=2)
        kept = {}
        assert tuned(tuner, pool, kept) == tuned(tuner, None, {}) and len(kept) > 6
    finally:
        if pool is not None:
            pool.close()
        ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(test_tuning)


def test_the_command_tunes_on_ray(sgm, tiny_weights, data, tmp_path):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    tune = ["tune", "--budget", 6, "--checkpoint", tiny_weights, "--batch", 16, "--reference", data, "--device", "cpu"]
    tune += ["--candidates", 4, "--first", 8, "--last", 16, "--held-out", 16]
    done = sgm(*tune, "--ray", "--actors", 1, "--out", "far")
    assert done.returncode == 0, done.stderr
    assert sgm(*tune, "--out", "near").returncode == 0
    far, near = (json.loads((tmp_path / name / "front.json").read_text()) for name in ("far", "near"))
    assert far["about"].pop("seconds") >= 0 <= near["about"].pop("seconds")
    assert far == near
