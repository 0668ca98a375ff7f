"""Options of ``pytest bench/``: --benchmark-quick for a few minutes' worth of gates, --peers for the table of peers."""

from __future__ import annotations

import pytest
import torch

from sgm_engine import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--benchmark-quick", action="store_true", help="only what is marked quick: the gates of .ci/run")
    group.addoption("--peers", action="store_true", help="also the networks against every peer installed (hours)")
    group.addoption("--peer", action="append", default=[], metavar="NAME", help="only this peer (may be repeated)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of --benchmark-quick, unless marked full as well")
    config.addinivalue_line("markers", "full: a parameter that --benchmark-quick leaves out")
    config.addinivalue_line("markers", "peers: runs with --peers only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect rather than skip: what was not asked for is no skipped check."""
    quick, peers = config.getoption("--benchmark-quick"), config.getoption("--peers")

    def wanted(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        return ("peers" not in marks or peers) and (not quick or ("quick" in marks and "full" not in marks))

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.getoption("--peers"):
        from bench import table

        files = table.write()
        if files:
            terminalreporter.write_line(table.markdown(table.load()))
            terminalreporter.write_line("written: " + ", ".join(str(file) for file in files))


@pytest.fixture(params=[pytest.param(1, id="1t"), pytest.param(2, id="2t", marks=pytest.mark.full)])
def threads(request: pytest.FixtureRequest):
    """The benchmark on one thread and on two, PyTorch's and ours."""
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(request.param)
    _C.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before[0])
    _C.set_num_threads(before[1])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads(), _C.num_threads()
    torch.set_num_threads(1), _C.set_num_threads(1)
    yield
    torch.set_num_threads(before[0]), _C.set_num_threads(before[1])
