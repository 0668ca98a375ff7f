"""What the tests of jobs share."""

import shutil
from pathlib import Path

import pytest

from tests.faults import toy_job

N, SHARD = 330, 100  # three shards and a short one


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete job."""
    out = tmp_path_factory.mktemp("jobs") / "whole"
    report = toy_job(out, N, SHARD).run()
    assert report.complete and (report.shards, report.samples, report.found) == (4, N, 0)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A complete job that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def flip(path, place=-40):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
