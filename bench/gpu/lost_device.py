"""A pytest plugin: a process whose device an error has left unusable ends, and pytest-xdist starts another.

Else one illegal access fails every test that this process would run after it. And what failed says why at once: a run
that is cut off comes to no summary.
"""

import os

import pytest

from bench.gpu.apart import unusable

_failed = False
_config: pytest.Config
LINES = 25  # of a failure


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config


@pytest.hookimpl(trylast=True)  # when the report is on its way
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        terminal = _config.pluginmanager.get_plugin("terminalreporter")
        for line in report.longreprtext.splitlines()[-LINES:]:
            terminal.write_line(f"| {line}")
    _failed = report.failed or (_failed and report.when != "setup")
    if report.when == "teardown" and _failed and "PYTEST_XDIST_WORKER" in os.environ and unusable():
        os._exit(1)
