"""Each benchmark finds what it imports: no other test here reads all of them."""

import subprocess
import sys
from pathlib import Path


def test_every_benchmark_is_collected():
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and "bench/test_cdm.py" in done.stdout, done.stdout
