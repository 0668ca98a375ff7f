"""How a job ends where somebody removes its shards, forks, or gives it a disk that cannot be written."""

import os
import subprocess
import sys
import threading

import pytest

from sgm_engine.jobs.folder import Folder
from sgm_engine.jobs.job import Report
from sgm_engine.jobs.spec import JobError
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from sgm_engine.jobs.writer import Writer
from sgm_engine.outputs.sample_ids import SampleIds
from tests.faults import contents, toy_job
from tests.forks import forked, forks
from tests.jobs.job_folders import SHARD, N, copy, whole  # noqa: F401 - fixtures


@pytest.mark.parametrize("what", ["manifest/000000.json", "000001.png"])
def test_shards_that_go_while_a_job_runs_are_no_success(sgm, tiny_weights, tmp_path, monkeypatch, what):
    publish = Folder.publish

    def remove(self, spec, shard, *args):
        publish(self, spec, shard, *args)
        if shard == 1:
            (tmp_path / "run" / what).unlink()

    sample = ["sample", "--checkpoint", tiny_weights, "--batch", 4, "--n", 8, "--shard-size", 4, "--out", "run/"]
    with monkeypatch.context() as m:
        m.setattr(Folder, "publish", remove)
        done = sgm(*sample)
    assert done.returncode == 1 and "shard 0 went from run/" in done.stderr
    assert sgm(*sample).returncode == 0 and verify(tmp_path / "run").ok


def test_a_share_is_whole_or_says_what_is_lost(copy):
    for name in ("shard-000001.npz", "manifest/000002.json"):
        (copy / name).unlink()
    job = toy_job(copy, N, SHARD)
    assert job.folder.lost(job.spec, range(4)) == [1, 2] and job.folder.lost(job.spec, range(0, 4, 3)) == []
    job.stop()
    report = job.run()
    assert (report.stopped, report.complete) == (True, False) and set(report.lost) == {1, 2}
    assert toy_job(copy, N, SHARD).run(Worker(1, 2)).lost == []


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder below ``tmp_path / "disk"`` read-only."""
    disk, mounted = tmp_path / "disk", False
    disk.mkdir()
    if os.geteuid() == 0:  # whom permissions do not stop
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
        if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a read-only disk takes the right to mount one")
        mounted = True

    def freeze(folder):
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        else:
            folder.chmod(0o555)

    yield freeze
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)
    else:
        for folder in disk.iterdir():
            folder.chmod(0o755)


def test_a_complete_job_is_complete_where_nothing_can_be_written(tmp_path, read_only):
    out = tmp_path / "disk/job"
    toy_job(out, N, SHARD).run()
    before = contents(out)
    read_only(out)
    report = toy_job(out, N, SHARD).run()
    assert report.complete and (report.found, report.shards) == (4, 0) and contents(out) == before


def test_an_incomplete_one_says_that_it_cannot_write(tmp_path, read_only):
    out = tmp_path / "disk/job"
    toy_job(out, N, SHARD).run(Worker(0, 2))
    read_only(out)
    with pytest.raises(OSError, match=r"Read-only file system|Permission denied"):
        toy_job(out, N, SHARD).run()
    assert toy_job(out, N, SHARD).run(Worker(0, 2)) == Report(Worker(0, 2), found=2)


@forks
def test_a_fork_of_the_writer_neither_writes_nor_holds_the_lock(copy):
    job = toy_job(copy, N, SHARD)

    def write():
        with pytest.raises(JobError, match="was forked from the one that writes"):
            job.folder.publish(job.spec, 0, {"shard-000000.npz": b""}, [])

    with job.folder.writing(job.spec, Worker(), {}, ""):
        fork = forked(write)
        fork.__enter__()
    with job.folder.writing(job.spec, Worker(), {}, ""):  # JobBusy if the fork held the lock
        fork.__exit__(None, None, None)
    assert verify(copy).ok


@forks
def test_a_fork_leaves_the_writers_block():
    """Its queue is full and its thread is the parent's."""
    go = threading.Event()
    with Writer(lambda drawn: go.wait(60), lambda: None) as writer:
        writer.put("a shard")
        writer.put("another")
        with forked(lambda: writer.__exit__(None, None, None)):
            go.set()


class Counted(tuple):
    """Counts the ranges that are looked at."""

    looked_at = 0

    def __iter__(self):
        for item in tuple.__iter__(self):
            Counted.looked_at += 1
            yield item

    def __getitem__(self, key):
        found = tuple.__getitem__(self, key)
        Counted.looked_at += len(found) if isinstance(key, slice) else 1
        return found


def test_many_scattered_ids_are_looked_up_not_searched(monkeypatch):
    monkeypatch.setattr(Counted, "looked_at", 0)
    ids = SampleIds.of([*range(2000, 4000, 2), *range(0, 2000, 2)])
    ids.ranges = Counted(ids.ranges)
    assert all((i in ids) == (i % 2 == 0 and 0 <= i < 4000) for i in range(-3, 4003))
    assert [ids.index(i) for i in (2000, 3998, 0, 1998)] == [0, 999, 1000, 1999]
    shards = [ids[k : k + 8] for k in range(0, 2000, 8)]
    assert [i for shard in shards for i in shard] == [*range(2000, 4000, 2), *range(0, 2000, 2)]
    assert Counted.looked_at < 20_000, "each of 4,000 looks and 250 slices walks over ranges that do not concern it"
    with pytest.raises(ValueError, match="sample id 1 is not among"):
        ids.index(1)
