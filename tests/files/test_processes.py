"""Files among processes: those that were killed, those with the same id, those that fork."""

import fcntl
import os

import pytest

from sgm_engine.files.locks import LockFile
from sgm_engine.files.writing import check_writable, staged
from tests.forks import forked, forks


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path, monkeypatch):
    """In a container every process may have id 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    killed = staged(tmp_path / "out")
    killed.__enter__()
    check_writable(tmp_path / "out")
    with staged(tmp_path / "out"):
        pass
    assert (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 2


@forks
def test_a_lock_goes_with_its_owner_though_that_forked(tmp_path):
    """And a fork that closes its copy takes nothing from the owner."""
    lock, other = LockFile(tmp_path / "lock"), LockFile(tmp_path / "lock")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with forked(lock.close):
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other.close()
    with pytest.raises(ValueError, match="this lock is closed"):
        lock.fileno()
