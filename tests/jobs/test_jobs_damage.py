"""Jobs: damage is found and mended; another job is refused; races have one winner."""

import errno
import os
import shutil
import sys

import pytest

from sgm_engine.errors import JobBusy
from sgm_engine.jobs.folder import Folder
from sgm_engine.jobs.job import Job
from sgm_engine.jobs.merge import merge
from sgm_engine.jobs.spec import JobError
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from sgm_engine.plans.plan import annealed_langevin
from tests import faults
from tests.faults import contents, toy_engine, toy_job, toy_plan
from tests.jobs.job_folders import SHARD, N, copy, flip, whole  # noqa: F401 - fixtures


def foreign_record(out):
    toy_job(out.parent / "other", N, SHARD, seed=1).run()
    for name in ("manifest/000001.json", "shard-000001.npz"):
        shutil.copy(out.parent / "other" / name, out / name)


DAMAGE = {
    "a flipped bit": (lambda out: flip(out / "shard-000001.npz"), "corrupt"),
    "a shorter file": (lambda out: os.truncate(out / "shard-000001.npz", 100), "corrupt"),
    "no file": (lambda out: (out / "shard-000001.npz").unlink(), "missing"),
    "no record": (lambda out: (out / "manifest/000001.json").unlink(), "missing"),
    "an empty record": (lambda out: (out / "manifest/000001.json").write_text(""), "corrupt"),
    "a record of nothing": (lambda out: (out / "manifest/000001.json").write_text("[]"), "corrupt"),
    "a flipped digest": (lambda out: flip(out / "manifest/000001.json", -60), "corrupt"),
    "another shard's file": (lambda out: shutil.copy(out / "shard-000002.npz", out / "shard-000001.npz"), "corrupt"),
    "another shard's record": (
        lambda out: shutil.copy(out / "manifest/000002.json", out / "manifest/000001.json"),
        "foreign",
    ),
    "another job's shard": (foreign_record, "foreign"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_mended(copy, whole, damage):
    harm, kind = DAMAGE[damage]
    harm(copy)
    found = verify(copy)
    assert [(p.shard, p.kind) for p in found.problems] == [(1, kind)] and not found.ok
    assert found.samples == N - SHARD and f"1 {kind}" in str(found)
    with pytest.raises(JobError, match=f"shard 1 is {kind}"):
        merge([copy], copy.parent / "all.npz")
    assert not list(copy.parent.glob("*all.npz*"))
    assert toy_job(copy, N, SHARD).run().shards == 1
    assert contents(copy) == contents(whole) and verify(copy).ok


def test_strange_files_are_named(copy):
    for name in ("shard-000004.npz", "notes.txt", "manifest/000004.json", "shard-1.npz"):
        (copy / name).write_text("")
    assert verify(copy).unexpected == ["manifest/000004.json", "notes.txt", "shard-000004.npz", "shard-1.npz"]


CHANGES = {
    "seed": {"seed": 1},
    "ids": {"n": N - 1},  # more would extend it: test_jobs_grow.py
    "format": {"format": "safetensors"},
    "shard_size": {"shard_size": SHARD + 1},
    "weights": {"weights": "other"},
    "plan": {"plan": annealed_langevin(faults.SIGMAS, steps_per_level=2, step_lr=1e-3)},
}


@pytest.mark.parametrize("what", [*CHANGES, "batch"])
def test_a_changed_job_is_refused_and_says_what_changed(whole, what):
    before = contents(whole)
    options = {"n": N, "shard_size": SHARD, "format": "npz", "weights": "toy", "plan": toy_plan()} | CHANGES.get(
        what, {}
    )
    with pytest.raises(JobError, match=f"holds another job: {what} was .* and is now .*[^,]") as error:
        Job(toy_engine(32 if what == "batch" else 64), whole, **options)
    assert str(error.value).count(" was ") == 1 and contents(whole) == before


def test_a_run_json_that_was_changed_is_refused(copy):
    text = (copy / "run.json").read_text()
    (copy / "run.json").write_text(text.replace('"seed": "0"', '"seed": "1"'))
    for use in (lambda: toy_job(copy, N, SHARD), lambda: verify(copy)):
        with pytest.raises(JobError, match="run hash does not fit"):
            use()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name, word in (("full", "not empty"), ("file", "is a file"), ("no/where", "there is no folder")):
        with pytest.raises(JobError, match=word):
            toy_job(tmp_path / name, 1)
    with pytest.raises(JobError, match="holds no job"):
        verify(tmp_path / "full")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_kills_cost_a_shard_at_the_most(tmp_path):
    faults.kills(tmp_path, 12, n=6_003, horizon=0.4)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a tmpfs takes root on Linux")
def test_a_disk_that_is_full(tmp_path):
    try:
        print(faults.full_disk(tmp_path, 4, n=300))
    except OSError as error:
        if "cannot mount" not in str(error):
            raise
        pytest.skip(str(error))


def test_every_call_that_can_find_a_full_disk(tmp_path, monkeypatch):
    """ENOSPC from each write, fsync, link and rename of a job in turn; of a write, half is on the disk by then."""
    run = lambda out: toy_job(out, 90, 30).run()  # noqa: E731
    run(tmp_path / "whole")
    whole, calls, fail_at = contents(tmp_path / "whole"), [], None

    def failing(real):
        def call(*args, **places):
            calls.append(real.__name__)
            if len(calls) - 1 == fail_at:
                if real.__name__ == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **places)

        return call

    for name in ("write", "fsync", "replace", "link"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    run(tmp_path / "counted")
    points = len(calls)
    assert points >= 3 * 8 and {"write", "fsync", "replace", "link"} == set(calls)
    for point in range(points):
        out, fail_at, calls[:] = tmp_path / f"job-{point}", point, []
        with pytest.raises(OSError, match="No space left"):
            run(out)
        assert not list(out.glob(".sgm/tmp/*")) and faults.torn(out, whole) == 0
        fail_at = None
        assert run(out).complete and contents(out) == whole
        shutil.rmtree(out)


def test_every_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    dirty, seen, fsync, write = set(), [], os.fsync, os.write
    monkeypatch.setattr(os, "write", lambda fd, content: (dirty.add(fd), write(fd, content))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (dirty.discard(fd), fsync(fd))[1])

    def noted(real):
        return lambda *args, **places: (seen.append(len(dirty)), real(*args, **places))[1]

    for name in ("replace", "link"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    assert toy_job(tmp_path / "job", 90, 30).run().complete
    assert len(seen) >= 6 and not any(seen)


def test_one_writer_wins_a_race(tiny_weights, tmp_path):
    counts = faults.racers(tmp_path, tiny_weights, rounds=2)
    assert counts == {"rounds": 2, "one winner": 2, "refused with code 4": 6}


def test_shares_that_overlap_are_refused(tmp_path):
    out, spec = tmp_path / "job", toy_job(tmp_path / "job", N, SHARD).spec
    writing = lambda *worker: Folder(out).writing(spec, Worker(*worker), {}, "")  # noqa: E731
    with writing(0, 2), writing(1, 2):
        for other in ((0, 2), (1, 2), (0, 1), (0, 3), (2, 3)):
            with pytest.raises(JobBusy), writing(*other):
                pass
    with writing(0, 1), pytest.raises(JobBusy, match="0-of-1 is writing"), writing(1, 2):
        pass
    with writing(1, 2):
        pass
