"""A larger n extends a job: what is there stays, the rest is drawn, and the end is that of the larger job from new."""

import json

import pytest

from sgm_engine.jobs.merge import merge
from sgm_engine.jobs.spec import JobError
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from tests.faults import contents, toy_job

FORMS = ("npz", "png", "webdataset", "safetensors")


def samples_of(folder):
    """The files of samples, and what run.json says of the job."""
    files = {name: content for name, content in contents(folder).items() if not name.startswith("manifest")}
    return {name: content for name, content in files.items() if name not in ("run.json", "README.md")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [20, 25])  # 10 ids a shard: whole ones, and a short one
def test_it_ends_as_the_larger_job(tmp_path, form, first):
    """In two steps."""
    whole = toy_job(tmp_path / "whole", 45, 10, format=form)
    whole.run()
    assert toy_job(tmp_path / "job", first, 10, format=form).run().complete
    before = samples_of(tmp_path / "job")
    report = toy_job(tmp_path / "job", 40, 10, format=form).run()
    assert report.complete and (report.found, report.shards, report.redrawn) == (2, 2, [])
    report = toy_job(tmp_path / "job", 45, 10, format=form).run()
    assert report.complete and (report.found, report.shards) == (4, 1)
    after = samples_of(tmp_path / "job")
    assert after == samples_of(tmp_path / "whole")
    if first == 20:
        assert all(after[name] == content for name, content in before.items())
    found = verify(tmp_path / "job")
    assert found.ok, found.problems
    assert merge([tmp_path / "job"], tmp_path / "all.npz") == 45
    assert (tmp_path / "job" / "README.md").read_text().startswith("# 45 samples")
    assert toy_job(tmp_path / "job", 45, 10, format=form).run().shards == 0


def test_a_short_shard_of_a_job_that_grew_is_said_until_it_is_drawn_again(tmp_path):
    toy_job(tmp_path / "job", 25, 10).run()
    grown = toy_job(tmp_path / "job", 30, 10)
    share = next(i for i in range(3) if 2 not in Worker(i, 3).share(3))
    grown.run(Worker(share, 3))  # somebody else's shard is the one
    found = verify(tmp_path / "job")
    assert [(p.shard, p.kind) for p in found.problems] == [(2, "outgrown")] and "1 outgrown" in str(found)
    assert grown.run().complete and verify(tmp_path / "job").ok


def test_records_do_not_come_from_another_job(tmp_path):
    """A record with the hash of a job that this one has not grown from is foreign, as ever."""
    toy_job(tmp_path / "job", 20, 10).run()
    toy_job(tmp_path / "other", 20, 10, seed=9).run()
    record = tmp_path / "job" / "manifest" / "000001.json"
    record.write_text((tmp_path / "other" / "manifest" / "000001.json").read_text())
    report = toy_job(tmp_path / "job", 30, 10).run()
    assert report.complete and report.found == 1 and [error.kind for error in report.redrawn] == ["foreign"]
    assert samples_of(tmp_path / "job") == (toy_job(tmp_path / "new", 30, 10).run() and samples_of(tmp_path / "new"))


@pytest.mark.parametrize(
    "change", [{"n": 10}, {"n": 30, "seed": 1}, {"n": None, "ids": "5-40"}, {"n": 30, "shard": 15}]
)
def test_anything_else_is_refused(tmp_path, change):
    toy_job(tmp_path / "job", 20, 10).run()
    was = contents(tmp_path / "job")
    with pytest.raises(JobError, match="holds another job"):
        toy_job(tmp_path / "job", change.pop("n"), change.pop("shard", 10), **change)
    assert contents(tmp_path / "job") == was


def test_workers_and_a_card_that_was_filled_in(tmp_path):
    """A worker of the smaller job that is still at it writes shards of the larger one."""
    late = toy_job(tmp_path / "job", 40, 10)
    late.run(Worker(0, 2))
    card = tmp_path / "job" / "README.md"
    card.write_text(card.read_text() + "mine\n")
    grown = toy_job(tmp_path / "job", 60, 10)
    grown.run(Worker(0, 2))
    with pytest.raises(JobError, match=r"holds another job: ids was 0-59 and is now 0-39"):
        toy_job(tmp_path / "job", 40, 10)
    assert grown.run(Worker(1, 2)).complete and verify(tmp_path / "job").ok
    assert card.read_text().endswith("mine\n")
    assert json.loads((tmp_path / "job" / "run.json").read_text())["earlier"] == ["0-39"]


def test_what_it_says_to_have_grown_from_must_be_its_own_ids(tmp_path):
    toy_job(tmp_path / "job", 20, 10).run()
    path = tmp_path / "job" / "run.json"
    for earlier in (["0-5,9"], ["5-7"], [3], "0-3", {"a": 1}, ["0-99"]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"earlier": earlier}))
        with pytest.raises(JobError, match=r"run\.json: "):
            verify(tmp_path / "job")
