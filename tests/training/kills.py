"""What ``sgm train`` survives, counted: ``python -m tests.training.kills`` kills it 20 times, at random moments.

The run's folder and the temporary folder lie on two file systems where there is a /dev/shm. Processes are forked from a
server that has done its imports.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np

from sgm_engine.programs.arguments import Program, at_least
from tests.training.runs import IMAGES, TINY

STEPS, HORIZON = 60, 4.0  # seconds: the latest moment of a kill


def train(folder: str, temporary: str) -> None:
    import torch

    from sgm_engine.cli.main import main

    torch.set_num_threads(1)
    tempfile.tempdir = temporary
    os.chdir(Path(folder).parent)
    with open("log", "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    options = ["--config", "tiny.yaml", "--data", "images.npy", "--accelerator", "cpu"]
    raise SystemExit(main(["train", *options, "--out", folder, "--set", f"steps={STEPS}", "save_every=3"]))


def results(folder: Path) -> dict[str, str]:
    """The sha256 of the weights and of every picture."""
    files = [folder / "model.safetensors", *sorted((folder / "samples").iterdir())]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def losses(folder: Path) -> dict[int, str]:
    """Of each step; one that was done twice has the same loss both times."""
    found: dict[int, str] = {}
    metrics = folder / "metrics.csv"
    for row in metrics.read_text().splitlines() if metrics.exists() else ():
        step, loss, _ = row.split(",")
        assert found.setdefault(int(step), loss) == loss, row
    return found


def kills(folder: Path, temporary: Path, count: int = 20, seed: int = 0) -> dict[str, object]:
    """SIGKILL ``count`` times, each time the same command again; every run that is complete has the same bytes."""
    context, moments = multiprocessing.get_context("forkserver"), random.Random(seed)
    context.set_forkserver_preload(["sgm_engine.cli.main", "sgm_engine.training.run", "torch._dynamo"])
    np.save(folder / "images.npy", IMAGES)
    (folder / "tiny.yaml").write_text(TINY)

    def run(name: str, seconds: float | None = None) -> bool:
        """Whether it came to its end within so many seconds; else it is killed."""
        process = context.Process(target=train, args=(str(folder / name), str(temporary)))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "log").read_text()[-2000:]
        return process.exitcode == 0

    assert run("whole")
    whole, found = results(folder / "whole"), {"kills": 0, "at steps": [], "whole runs": 0}
    while found["kills"] < count:
        while not run("run", moments.uniform(0, HORIZON) if found["kills"] < count else None):
            found["kills"] += 1
            found["at steps"].append(max(losses(folder / "run"), default=0))
        found["whole runs"] += 1
        assert results(folder / "run") == whole, "the bytes differ from those of a run without kills"
        assert losses(folder / "run") == losses(folder / "whole"), "the losses differ"
        kept = sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())
        assert kept == [f"{STEPS - 3:08d}.ckpt", f"{STEPS:08d}.ckpt"], kept
        shutil.rmtree(folder / "run")
    left = [p.name for p in temporary.iterdir()]
    assert not left, left
    return found | {"differing bytes": 0, "orphans": 0}


def main() -> None:
    parser = Program("tests.training.kills", __doc__.split("\n")[0])
    parser.add_argument("--count", type=at_least(1), default=20, metavar="N", help="kills")
    count, memory = parser.parse_args().count, "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory() as run, tempfile.TemporaryDirectory(dir=memory) as temporary:
        print(json.dumps(kills(Path(run), Path(temporary), count)))


if __name__ == "__main__":
    main()
