"""A search whose figures are kept on object storage, on a real S3 server of this machine."""

import pytest

from sgm_engine.evaluation.features import pixels
from sgm_engine.tuning.kept import Kept, claimed
from sgm_engine.tuning.tune import Tuner
from tests.jobs.object_server import objects, storage, url  # noqa: F401 - fixtures
from tests.tuning.test_kept import PLANS, tuned
from tests.tuning.test_tuning import engine_for, tuner  # noqa: F401 - fixtures


def test_a_search_that_was_cut_off_goes_on_to_the_same_front(tuner, url):
    whole, table = tuned(tuner, {})
    known, drawn = [], []
    for room in (40, 10**9):
        with claimed(url) as kept:
            kept.begin({"seed": 0})
            known.append(len(kept))
            drawn.append(tuned(tuner, kept, room))
    assert known == [0, 2] and [t for _, t in drawn] == [None, table] and drawn[1][0] <= whole - 2 * 16
    with claimed(url) as kept:
        assert kept.about == {"seed": 0} and tuned(tuner, kept) == (2 * 32, table)
        with pytest.raises(ValueError, match=f"{url} holds another search: seed was 0 and is now 1"):
            kept.begin({"seed": 1})


def test_the_first_of_two_searches_has_the_prefix(url):
    """Both have found it empty."""
    with claimed(url) as late, claimed(url) as first:
        first.begin({"seed": 0})
        first["search", 0, 8, "a"] = [float("inf")]
        with pytest.raises(ValueError, match="holds another search: seed was 0 and is now 1"):
            late.begin({"seed": 1})
        with claimed(url) as same:
            same.begin({"seed": 0})
            assert dict(same) == {("search", 0, 8, "a"): [float("inf")]} and isinstance(same, Kept)


def test_the_outcome_is_put_and_what_is_not_a_search_is_left_alone(tuner, url, tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'sgm-engine[test]'")
    new = Tuner(tuner.model, engine_for, pixels(), tuner.reference)
    outcome = new.confirm(new.search(PLANS[:2], 0, 8, 8), 1000, 8)
    outcome.write(url)
    outcome.write(tmp_path)
    assert objects(url) == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="is there already and not empty"), claimed(url):
        pass
