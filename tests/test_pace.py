"""What long work says of itself: through logging, and what the command makes of it."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest

from sgm_engine import pace
from sgm_engine.cli.console import Heard, heard
from sgm_engine.files.writing import write_file


class Clock:
    def __init__(self, step):
        self.now, self.step = 0.0, step

    def monotonic(self):
        self.now += self.step
        return self.now

    strftime, gmtime = staticmethod(pace.time.strftime), staticmethod(pace.time.gmtime)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_says_rate_and_time_left():
    assert pace.line(0, None, "samples", 2.0) == "0 samples, 0 samples/s"
    assert pace.line(20, 1000, "layers", 10.0) == "20 of 1000 layers, 2 layers/s, 00:08:10 left"
    assert pace.clock(90061) == "1 d 01:01:01" and pace.clock(59) == "00:00:59"


def test_nobody_hears_what_nobody_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(pace, "time", Clock(1.0))
    assert list(pace.paced("abc" * 20, 60, "packing", "layers")) == list("abc" * 20)
    assert caplog.records == []


def test_long_work_is_logged_after_10_seconds_and_every_30(monkeypatch, caplog):
    """A second for each of 75."""
    caplog.set_level("INFO", "sgm_engine")
    monkeypatch.setattr(pace, "time", Clock(1.0))
    assert list(pace.paced(range(75), 75, "packing weights", "layers")) == list(range(75))
    assert caplog.messages == [
        "packing weights: 9 of 75 layers, 0.9 layers/s, 00:01:13 left",
        "packing weights: 39 of 75 layers, 0.975 layers/s, 00:00:36 left",
        "packing weights: 69 of 75 layers, 0.986 layers/s, 00:00:06 left",
    ]
    caplog.clear()
    list(pace.paced(range(9), 9, "packing weights", "layers"))
    assert caplog.messages == []


def test_a_terminal_gets_a_bar_that_goes(monkeypatch):
    monkeypatch.setattr(pace, "time", Clock(1.0))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with heard("sgm_engine", Heard(), logging.DEBUG):
        list(pace.paced(range(40), 40, "packing weights", "layers"))
    shown = sys.stderr.getvalue().split("\r\033[K")
    assert len(shown) == 42 and shown[0] == shown[-1] == "" and "\n" not in sys.stderr.getvalue()
    assert shown[20].startswith("packing weights:  48%|") and "19/40 [00:20<00:22," in shown[20]


def test_a_bar_that_is_interrupted_makes_room(monkeypatch):
    monkeypatch.setattr(pace, "time", Clock(1.0))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyboardInterrupt), heard("sgm_engine", Heard(), logging.DEBUG):
        for n in pace.paced(range(40), 40, "packing weights", "layers"):
            if n == 20:
                raise KeyboardInterrupt
    assert sys.stderr.getvalue().endswith("\r\033[K")
    assert logging.getLogger("sgm_engine").handlers == [] and logging.getLogger("sgm_engine").propagate


def test_a_file_is_written_whole_piece_by_piece(monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", "sgm_engine")
    monkeypatch.setattr(pace, "time", Clock(6.0))
    content = bytes(range(256)) * 4096 * 3 + b"end"
    write_file(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == content
    assert caplog.messages == ["writing x: 1 of 4 MiB, 0.0833 MiB/s, 00:00:36 left"]
    write_file(tmp_path / "x", "")
    assert (tmp_path / "x").read_bytes() == b""


def test_conversion_and_packing_are_heard(sgm, tiny_weights, monkeypatch):
    """Off a terminal, lines; a quick command says nothing."""
    assert sgm("convert", tiny_weights, "copy.safetensors").stderr == ""
    monkeypatch.setattr(pace, "FIRST", 0.0)
    said = sgm("convert", tiny_weights, "copy.safetensors").stderr
    assert "sgm: reading weights: 0 of " in said and "sgm: writing copy.safetensors: 0 of " in said
    said = sgm("sample", "--checkpoint", tiny_weights, "--n", 1, "--batch", 1, "--executor", "native", "--out", "x.npz")
    assert "sgm: packing weights: 0 of " in said.stderr


def test_the_library_prints_nothing():
    """But programs of its own (``python -m``), and the lines that progress=True asks for."""
    root = Path(pace.__file__).parent
    texts = {str(p.relative_to(root)): p.read_text() for p in root.rglob("*.py")}
    printing = {name for name, text in texts.items() if re.search(r"(?<![\w.])print\(", text)}
    programs = {name for name, text in texts.items() if '__name__ == "__main__"' in text}
    assert {name for name in printing - programs if not name.startswith("cli/")} == {"pace.py"}
