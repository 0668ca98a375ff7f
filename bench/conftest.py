"""Options of ``pytest bench/``: --base for another revision, --benchmark-quick for a few minutes' worth, --peers."""

from __future__ import annotations

import pytest
import torch

from bench import history, trees, verdicts
from bench.compare import NOT_COMPARED, SECONDS
from sgm_engine import _C


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--benchmark-quick", action="store_true", help="only what is marked quick: the gates of .ci/run")
    group.addoption(
        "--base", nargs="?", const=trees.AUTO, metavar="REV",
        help="only the comparison of this tree with a revision (default: where this branch left main)",
    )  # fmt: skip
    group.addoption("--seconds", type=float, default=SECONDS, help="of a workload, at most (default: %(default)s)")
    group.addoption(
        "--slower-ok", action="append", default=[], metavar="PATTERN", help="these workloads may be slower (repeatable)"
    )
    group.addoption(
        "--keep", action="store_true", help="write the ratios to bench/results/base, for make bench-history"
    )
    group.addoption("--peers", action="store_true", help="also the networks against every peer installed (hours)")
    group.addoption("--peer", action="append", default=[], metavar="NAME", help="only this peer (may be repeated)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "base: runs with --base only, and nothing else does")
    config.addinivalue_line("markers", "quick: part of --benchmark-quick, unless marked full as well")
    config.addinivalue_line("markers", "full: a parameter that --benchmark-quick leaves out")
    config.addinivalue_line("markers", "peers: runs with --peers only")
    config.base_rows, config.base_accepted = [], dict.fromkeys(config.getoption("--slower-ok"), "--slower-ok")
    if (base := config.getoption("--base")) is not None:
        try:
            config.base_commit = trees.revision(base)
            config.base_accepted |= trees.accepted(config.base_commit)
        except trees.CannotCompare as why:
            pytest.exit(f"NOT COMPARED: {why}", returncode=NOT_COMPARED)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect rather than skip: what was not asked for is no skipped check."""
    quick, peers = config.getoption("--benchmark-quick"), config.getoption("--peers")
    base = config.getoption("--base") is not None

    def wanted(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        return (
            ("base" in marks) == base
            and ("peers" not in marks or peers)
            and (not quick or ("quick" in marks and "full" not in marks))
        )

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if rows := config.base_rows:
        lines = verdicts.lines(rows, config.base_commit)
        for line in lines:
            terminalreporter.write_line(line)
        if config.getoption("--keep"):
            terminalreporter.write_line(f"written: {history.keep(rows, config.base_commit)}")
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
