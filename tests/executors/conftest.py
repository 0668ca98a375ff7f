"""Networks of a few channels."""

import pytest

from tests.executors.graph_engines import Tiny, small_net


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def tiny():
    return Tiny()
