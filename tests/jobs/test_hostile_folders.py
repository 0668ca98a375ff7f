"""Folders of jobs that come from somebody else: links, pipes, counts without end; and folders that change hands."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from sgm_engine.jobs.folder import Folder, ShardError
from sgm_engine.jobs.spec import JobError
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from tests.faults import contents, toy_job

N, SHARD = 24, 8
DATA = Path(__file__).parents[1] / "data" / "hostile"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "whole"
    assert toy_job(out, N, SHARD).run().complete
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "job"))


def elsewhere(folder: Path) -> Path:
    folder.mkdir()
    (folder / "precious").write_text("kept")
    return folder


@pytest.mark.parametrize("name", [".sgm/tmp", ".sgm/locks", ".sgm", "manifest"])
@pytest.mark.parametrize("complete", [True, False])
def test_no_link_to_a_folder_is_followed(copy, tmp_path, name, complete):
    """Of a complete job, or of a folder that holds nothing else."""
    target = elsewhere(tmp_path / "elsewhere")
    if not complete:
        shutil.rmtree(copy)
        (copy / name).parent.mkdir(parents=True)
    elif name != "manifest":
        shutil.rmtree(copy / name)
    else:
        shutil.move(copy / name, tmp_path / "elsewhere" / "records")
        target = tmp_path / "elsewhere" / "records"
    (copy / name).symlink_to(target)
    before = contents(tmp_path / "elsewhere")
    if complete or name != "manifest":  # with a manifest and no run.json it is no job's folder
        with pytest.raises(JobError, match="link"):
            toy_job(copy, N, SHARD).run()
    else:
        with pytest.raises(JobError, match="holds no job"):
            toy_job(copy, N, SHARD).run()
    assert contents(tmp_path / "elsewhere") == before


def test_no_link_to_a_file_is_followed(copy, tmp_path):
    for name in ("shard-000001.npz", "manifest/000001.json"):
        shutil.move(copy / name, tmp_path / "moved")
        (copy / name).symlink_to(tmp_path / "moved")
        (problem,) = verify(copy).problems
        assert (problem.shard, problem.kind) == (1, "foreign") and "is a link" in str(problem)
        (copy / name).unlink()
        shutil.move(tmp_path / "moved", copy / name)
    shutil.move(copy / "run.json", tmp_path / "moved")
    (copy / "run.json").symlink_to(tmp_path / "moved")
    with pytest.raises(JobError, match="is a link"):
        verify(copy)


@pytest.mark.parametrize("name", ["shard-000001.npz", "manifest/000001.json", "run.json"])
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_is_no_file_is_not_waited_for(copy, name, kind):
    (copy / name).unlink()
    os.mkfifo(copy / name) if kind == "pipe" else (copy / name).symlink_to("/dev/zero")
    if name == "run.json":
        with pytest.raises(JobError, match=r"run\.json.* is (a link|not a regular file)"):
            verify(copy)
    else:
        assert [p.shard for p in verify(copy).problems] == [1]


def rewritten(copy: Path, **fields) -> None:
    """run.json with other fields in its job, and hashes that fit."""
    spec, notes = Folder(copy).load()
    content = json.loads(spec.to_json(notes))
    content["job"] |= fields
    import hashlib

    content["run"] = hashlib.sha256(json.dumps(content["job"], sort_keys=True).encode()).hexdigest()
    (copy / "run.json").write_text(json.dumps(content))


def test_ids_without_end_are_counted_not_listed(copy):
    rewritten(copy, ids=f"0-{2**56 - 1}")
    found = verify(copy)
    assert [(p.shard, p.count) for p in found.problems if p.kind == "missing"] == [(3, 2**53 - 3)]
    assert f"{2**53 - 3} missing, 0 corrupt, 3 foreign" in str(found)
    rewritten(copy, ids=f"0-{2**56 - 1}", shard_size=2**55)
    run, name = Folder(copy).load()[0].run, copy / "manifest/000000.json"
    record = json.loads(name.read_text()) | {"run": run, "ids": f"0-{2**55 - 1}"}
    name.write_text(json.dumps(record))
    with pytest.raises(ShardError, match="fewer bytes than"):
        Folder(copy).record(Folder(copy).load()[0], 0)


@pytest.mark.parametrize(
    "fields",
    [{"shard_size": 0}, {"shard_size": True}, {"ids": 7}, {"format": "tiff"}, {"device": ""}, {"device": "tpu x"},
     {"shape": [1, 8]}, {"shape": [1, 8, -8]}, {"shape": 3}, {"batch": 1.5}, {"seed": 3}, {"seed": "x"},
     {"weights": "\x1b[2J"}, {"precision": None}, {"ids": "5-2"}],
    ids=str,
)  # fmt: skip
def test_a_run_json_of_no_job_is_refused(copy, fields):
    rewritten(copy, **fields)
    with pytest.raises(JobError, match=r"run\.json: not a job's run\.json") as caught:
        verify(copy)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["device_empty", "ids_int", "shard_size_0"])
def test_the_run_json_that_ended_in_a_traceback(copy, name):
    shutil.copy(DATA / f"run_{name}.json", copy / "run.json")
    with pytest.raises(JobError, match="not a job's run"):
        verify(copy)


@pytest.mark.parametrize("notes", [[], None, {"checkpoint": 3}, {"float8": []}], ids=str)
def test_notes_are_names_and_texts(copy, notes):
    content = json.loads((copy / "run.json").read_text()) | {"notes": notes}
    (copy / "run.json").write_text(json.dumps(content))
    with pytest.raises(JobError, match="notes must be"):
        verify(copy)


def test_samples_of_another_shape_are_foreign(copy):
    """The digests fit: somebody made it so. Merged, every sample behind it would be another one's bytes."""
    import hashlib
    import io

    import numpy as np

    file = io.BytesIO()
    np.savez(file, arr_0=np.zeros((SHARD, 2, 2, 1), np.uint8), sample_id=np.arange(8, 16))
    (copy / "shard-000001.npz").write_bytes(file.getvalue())
    record = json.loads((copy / "manifest/000001.json").read_text())
    digest = {"bytes": len(file.getvalue()), "sha256": hashlib.sha256(file.getvalue()).hexdigest()}
    record["files"]["shard-000001.npz"] = digest
    (copy / "manifest/000001.json").write_text(json.dumps(record))
    assert [p.kind for p in verify(copy).problems] == ["foreign"]


# ---- folders that change hands, and file systems that lack something


@pytest.mark.parametrize("how", ["folder", "what is in it"])
def test_a_stalled_writer_leaves_another_jobs_shards_alone(tmp_path, how):
    out = tmp_path / "job"
    mine, theirs = toy_job(out, N, SHARD, seed=0), toy_job(tmp_path / "theirs", N, SHARD, seed=1)
    theirs.run()
    with mine.folder.writing(mine.spec, Worker(), {}, "card"):
        mine.folder.publish(mine.spec, 0, {"shard-000000.npz": b"mine"}, [])
        if how == "folder":
            shutil.rmtree(out)
        else:
            for entry in out.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        other = toy_job(out, N, SHARD, seed=1)
        assert other.run().complete
        with pytest.raises(JobError, match="removed or replaced"):
            mine.folder.publish(mine.spec, 1, {"shard-000001.npz": b"mine"}, [])
    assert contents(out) == contents(tmp_path / "theirs") and verify(out).ok


def test_a_writer_stopped_between_two_calls_writes_into_what_it_holds(tmp_path, monkeypatch):
    """The folder is replaced after the last look at its lock: what is left of the old one takes the shard, or none."""
    out = tmp_path / "job"
    mine = toy_job(out, N, SHARD, seed=0)
    with mine.folder.writing(mine.spec, Worker(), {}, "card"):
        monkeypatch.setattr(mine.folder, "_check_held", lambda: None)
        out.rename(tmp_path / "moved")
        assert toy_job(out, N, SHARD, seed=1).run().complete
        before = contents(out)
        mine.folder.publish(mine.spec, 0, {"shard-000000.npz": b"mine"}, [])
    assert contents(out) == before and (tmp_path / "moved/shard-000000.npz").read_bytes() == b"mine"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_hard_links_the_bytes_are_the_same(whole, tmp_path, monkeypatch, code):
    def refuse(*args, **places):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    assert toy_job(tmp_path / "job", N, SHARD).run().complete
    assert contents(tmp_path / "job") == contents(whole)
    with pytest.raises(JobError, match="holds another job: seed was 0"):
        toy_job(tmp_path / "job", N, SHARD, seed=1)


def test_a_folder_that_cannot_be_synced(whole, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert toy_job(tmp_path / "job", N, SHARD).run().complete
    assert contents(tmp_path / "job") == contents(whole)


def test_a_folder_that_cannot_be_listed_is_named_before_anything_is_drawn(copy, tmp_path, monkeypatch):
    def refuse(fd):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    (tmp_path / "empty").mkdir()
    for out in (copy, tmp_path / "empty"):
        with pytest.raises(OSError, match=r"cannot be listed: allow it, or name another folder.*(job|empty)"):
            toy_job(out, N, SHARD)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(fd, mode):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=r"cannot lock files .*use another folder.*/job") as caught:
        toy_job(tmp_path / "job", N, SHARD).run()
    assert caught.value.filename == str(tmp_path / "job")
