"""A search that is stopped goes on; two do not share a folder; what is in the way is said before anything is drawn."""

import json

import numpy as np
import pytest

from sgm_engine.errors import JobBusy
from sgm_engine.evaluation.features import pixels
from sgm_engine.plans.plan import ancestral
from sgm_engine.tuning import kept as module
from sgm_engine.tuning.candidates import FAMILIES
from sgm_engine.tuning.kept import Kept, claimed
from sgm_engine.tuning.tune import Tuner
from tests.tuning.test_tuning import SIGMAS, data, draw_candidates, engine_for, start, tuner  # noqa: F401 - fixtures

NAMED = [name for name in FAMILIES if name != "sa_solver"]  # which plans are drawn again depends on what was drawn
PLANS = draw_candidates(SIGMAS, 24, 6, seed=3, families=NAMED, start=lambda sigma: start(0.5, sigma))


class Counting(Tuner):
    """Counts its samples; a disk that is full after ``room`` of them."""

    drawn, room = 0, 10**9

    def _draw(self, plan, ids, seed, lost, tell):
        for block in super()._draw(plan, ids, seed, lost, tell):
            self.drawn += len(block)
            if self.drawn > self.room:
                raise OSError(28, "No space left on device")
            yield block


def tuned(old, kept, room=10**9):
    """(samples drawn, the outcome's table) of a search for the best of PLANS; None for a search that was cut off."""
    new = Counting(old.model, engine_for, pixels(), old.reference, kept=kept)
    new.room = room
    try:
        survivors = new.search(PLANS, 0, 16, 64)
        table = new.confirm(survivors, 1000, 32, baseline=ancestral(SIGMAS, start_shift=0.5)).table()
    except OSError:
        table = None
    return new.drawn, table


def test_a_search_that_was_cut_off_goes_on_to_the_same_front(tuner, tmp_path):
    whole, table = tuned(tuner, {})
    drawn = []
    for room in (40, 130, 10**9):  # in the first round, then in the second
        with claimed(tmp_path / "out") as kept:
            kept.begin({"seed": 0})
            before = len(kept)
            drawn.append(tuned(tuner, kept, room))
            assert len(kept) > before
    assert [t for _, t in drawn] == [None, None, table]
    assert drawn[2][0] < whole - 4 * 16, "what was measured is drawn again"
    with claimed(tmp_path / "out") as kept:
        again = tuned(tuner, kept)
    assert again == (2 * 32, table)  # the chosen plan and the baseline, whose difference is of samples


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    with claimed(tmp_path / "out") as kept:
        kept.begin({"seed": 0})
        kept["search", 1, 8, "a"], kept["search", 1, 8, "b"] = [0.1, None], [float("inf")]
    log = tmp_path / "out" / module.LOG
    log.write_text(log.read_text()[:-5])
    with claimed(tmp_path / "out") as kept:
        assert kept == {("search", 1, 8, "a"): [0.1, None]} and kept.about == {"seed": 0}
        kept["search", 1, 8, "b"] = [0.3]
    assert Kept(tmp_path / "out") == {("search", 1, 8, "a"): [0.1, None], ("search", 1, 8, "b"): [0.3]}


def test_one_search_at_a_time_and_no_other_in_its_folder(tmp_path):
    with claimed(tmp_path / "out") as kept:
        with pytest.raises(JobBusy, match="another process tunes in"), claimed(tmp_path / "out"):
            pass
        kept.begin({"seed": 0})
    with claimed(tmp_path / "out") as kept, pytest.raises(ValueError, match="seed was 0 and is now 1"):
        kept.begin({"seed": 1})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="not empty"), claimed(tmp_path / "full"):
        pass
    with pytest.raises(KeyError), claimed(tmp_path / "unused"):
        raise KeyError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "out"]


def test_the_command_goes_on_and_is_refused_where_it_must_be(sgm, tiny_weights, data, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    tune = ["tune", "--budget", 6, "--checkpoint", tiny_weights, "--batch", 16, "--reference", data]
    tune += ["--candidates", 4, "--first", 8, "--last", 16, "--held-out", 16]
    with claimed(tmp_path / "tuned"):
        done = sgm(*tune)
    assert done.returncode == 4 and "another process tunes in" in done.stderr and "\nn " not in done.stderr
    assert sgm(*tune, "--reference", "absent.npy").returncode == 2 and not (tmp_path / "tuned").exists()
    assert sgm(*tune).returncode == 0
    first = json.loads((tmp_path / "tuned/front.json").read_text())
    done = sgm(*tune)
    assert done.returncode == 0 and "it goes on from there" in done.stderr
    again = json.loads((tmp_path / "tuned/front.json").read_text())
    for front in (first, again):
        front["about"].pop("seconds")
    assert again == first
    done = sgm(*tune, "--seed", 7)
    assert done.returncode == 2 and "tuned holds another search: plans was" in done.stderr
    np.save(data, np.zeros((60, 8, 8), np.uint8))
    assert "reference was" in sgm(*tune).stderr
