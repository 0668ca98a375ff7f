"""Ctrl-C, at any moment: exit code 130, one line, nothing half-written."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sgm_engine.cli import doctor


@pytest.mark.parametrize("when", ["while sampling", *(f"{t} s into PyTorch" for t in (0.0, 0.1, 0.2, 0.4, 0.7))])
def test_ctrl_c_leaves_nothing_behind(tiny_weights, tmp_path, when):
    if when != "while sampling" and sys.platform != "linux":
        pytest.skip("needs /proc to see when PyTorch is loaded")
    command = [sys.executable, "-m", "sgm_engine", "sample", "--checkpoint", tiny_weights, "--n", "1000000"]
    command += ["--batch", "4", "--out", "s.npz", "--gif", "s.gif", "--progress"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=heed, **pipes)
    if when == "while sampling":  # the bar has begun
        seen = ""
        while "sample" not in seen:
            seen += process.stderr.read(1)
    else:  # an exception that goes through its C++ aborts the process
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            time.sleep(0.01)
        time.sleep(float(when.split()[0]))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == "" and err.splitlines()[-1] == "sgm: interrupted; nothing is half-written"
    assert "Traceback" not in err and os.listdir(tmp_path) == []


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_import_is_finished_first(sgm, tmp_path, monkeypatch, number, code):
    module = f"interrupted_{code}"
    body = f"import os, time\nos.kill(os.getpid(), {number})\nfor _ in range(100): time.sleep(0.001)\nwhole = True\n"
    (tmp_path / f"{module}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)

    def run(args):
        __import__(module)
        time.sleep(10)
        return 0

    monkeypatch.setattr(doctor, "doctor", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert sgm("doctor").returncode == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert sys.modules.pop(module).whole
