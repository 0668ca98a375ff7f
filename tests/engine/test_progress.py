"""What a long request says: a bar on a terminal, elsewhere lines with a rate and the time left."""

import io
import sys

import pytest

from sgm_engine import pace
from sgm_engine.engine import progress
from tests.engine.engines import PLAN, engine
from tests.test_pace import Clock, Terminal


def test_lines_have_a_rate_and_the_time_left(monkeypatch, capsys):
    """A second a look: a line after 10 of them, then every 30."""
    monkeypatch.setattr(pace, "time", Clock(1.0))
    with progress.counting(1000, "image") as tell:
        for _ in range(75):
            tell(2)
    assert capsys.readouterr().err.splitlines() == [
        "sgm: 20 of 1000 images, 2 images/s, 00:08:10 left",
        "sgm: 80 of 1000 images, 2 images/s, 00:07:40 left",
        "sgm: 140 of 1000 images, 2 images/s, 00:07:10 left",
    ]


@pytest.mark.parametrize("terminal, show, bar", [(True, True, True), (False, "bar", True), (False, True, False)])
def test_an_engine_shows_it(monkeypatch, terminal, show, bar):
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(pace, "time", Clock(11.0))
    quiet = engine().sample(9, plan=PLAN)
    assert stderr.getvalue() == ""
    assert engine().sample(9, plan=PLAN, progress=show).equal(quiet)
    assert ("9/9" in stderr.getvalue()) == bar and ("sgm: " in stderr.getvalue()) == (not bar)
