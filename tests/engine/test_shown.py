"""What an engine and a plan say of themselves: one line, and what a notebook shows."""

import base64
import io
import sys

from PIL import Image

from sgm_engine import heun
from tests.engine.engines import SIGMAS, engine


def test_one_line():
    plan = heun([10.0, 1.0, 0.1])
    assert repr(plan) == "<Plan heun: 5 evaluations, σ 10 → 0.1, start 0 + 10·N(0, 1)>"
    says = repr(engine())
    assert says == "<Engine of function: 1×8×8, 3 levels σ 1 → 0.1, executor eager, float32, batch 4, on cpu>"


def test_notebooks_show_the_table_and_its_figure(monkeypatch):
    plan = heun(SIGMAS)
    shown = plan._repr_html_()
    assert "<pre>heun: 5 network evaluations" in shown and "→" not in shown.split("</pre>")[1]
    picture = Image.open(io.BytesIO(base64.b64decode(shown.split("base64,")[1].split('"')[0])))
    assert picture.width > 300
    of_engine = engine()._repr_html_()
    assert "&lt;Engine of function" in of_engine and "annealed_langevin: 301 network evaluations" in of_engine
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "<img" not in plan._repr_html_() and plan._repr_html_().startswith("<pre>")
