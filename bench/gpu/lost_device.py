"""A pytest plugin: a process whose device an error has left unusable ends, and pytest-xdist starts another.

Else one illegal access fails every test that this process would run after it.
"""

import os

import pytest

from bench.gpu.apart import unusable

_failed = False


@pytest.hookimpl(trylast=True)  # when the report is on its way
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    _failed = report.failed or (_failed and report.when != "setup")
    if report.when == "teardown" and _failed and "PYTEST_XDIST_WORKER" in os.environ and unusable():
        os._exit(1)
