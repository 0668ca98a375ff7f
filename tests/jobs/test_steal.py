"""Workers that are done take over what others have not written: --steal."""

from functools import partial

import pytest

from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from tests.faults import contents, toy_job
from tests.jobs.job_folders import SHARD as TOY_SHARD
from tests.jobs.job_folders import N as TOY_N
from tests.jobs.job_folders import flip, whole  # noqa: F401 - fixtures
from tests.jobs.object_server import objects, storage, url  # noqa: F401 - fixtures
from tests.jobs.painters import plain_job

N, SHARD = 45, 5  # nine shards


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The content of a complete job by name."""
    out = tmp_path_factory.mktemp("jobs") / "whole"
    assert plain_job(out, N, SHARD).run().complete
    return read(out)


def read(out):
    if isinstance(out, str):
        return {name: content for name, content in objects(out).items() if ".sgm" not in name}
    found = (f for f in out.rglob("*") if f.is_file() and ".sgm" not in f.parts)
    return {str(f.relative_to(out)): f.read_bytes() for f in found}


@pytest.fixture(params=["folder", "s3"])
def out(request, tmp_path):
    return request.getfixturevalue("url") if request.param == "s3" else tmp_path / "job"


def after(job, count, what):
    """Once ``count`` shards are drawn, ``what`` happens."""
    draw = job.source.draw

    def noted(*args):
        for k, drawn in enumerate(draw(*args), 1):
            yield drawn
            if k == count:
                what()

    job.source.draw = noted
    return job


def test_shards_of_lost_workers_are_taken_over(out, files):
    """One ends after a shard, one never comes; the one that is done draws the rest."""
    lost = plain_job(out, N, SHARD)
    lost.source.draw = partial(first_of, lost.source.draw)
    assert lost.run(Worker(0, 3)).shards == 1
    report = plain_job(out, N, SHARD).run(Worker(1, 3), steal=True)
    assert report.shards == 8 and sorted(report.stolen) == [2, 3, 5, 6, 8]
    assert report.complete and not report.lost and read(out) == files and verify(out).ok


def first_of(draw, *args):
    yield next(draw(*args))


def test_a_late_worker_does_not_draw_what_was_taken_over(out, files):
    """It pauses after two of its five shards; meanwhile the other one completes the job."""
    late, reports = plain_job(out, N, SHARD), []
    after(late, 2, lambda: reports.append(plain_job(out, N, SHARD).run(Worker(1, 2), steal=True)))
    report = late.run(Worker(0, 2), steal=True)
    assert reports[0].complete and sorted(reports[0].stolen)[-2:] == [6, 8]
    assert report.shards == 2 and report.found == 3 and report.stolen == set() and report.complete
    assert read(out) == files


def test_the_count_of_a_worker_that_steals_is_true(tmp_path):
    told = []
    plain_job(tmp_path / "job", N - 2, SHARD).run(Worker(1, 3), on_shard=told.append, steal=True)
    assert (told[-1].samples, told[-1].samples_in_all) == (N - 2, N - 2)
    assert (told[-1].shards, told[-1].shards_in_all) == (9, 9)


def test_a_damaged_shard_of_the_own_share_is_drawn_again(whole, tmp_path):
    """By an engine, whose batch runs on over its own shards and those of others."""
    out = tmp_path / "job"
    toy_job(out, TOY_N, TOY_SHARD).run(Worker(1, 3))
    flip(out / "shard-000001.npz")
    report = toy_job(out, TOY_N, TOY_SHARD).run(Worker(1, 3), steal=True)
    assert [e.shard for e in report.redrawn] == [1] and sorted(report.stolen) == [0, 2, 3]
    assert report.complete and contents(out) == contents(whole)


def test_without_it_shares_stay_apart(tmp_path):
    report = plain_job(tmp_path / "job", N, SHARD).run(Worker(1, 3))
    assert report.shards == 3 and report.stolen == set() and not report.complete
