"""What a job survives, counted: ``python -m tests.faults`` runs everything, ``--kills 200`` and so on choose.

Processes are forked from a server that has imported PyTorch and run nothing, so that hundreds of them take a minute.
tests/jobs/ runs small counts of the same functions.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

SIGMAS = (1.0, 0.3, 0.1)
PRELOAD = [
    "sgm_engine.cli.main",
    "sgm_engine.jobs.job",
    "sgm_engine.executors.native.executor",
    "sgm_engine.checkpoints.checkpoint",
    "torch._dynamo",
]


def toy_score(x, level):
    """Of data N(½, ¼²) at noise σ: (½ − x)/(σ² + ¼²)."""
    import torch

    return (0.5 - x) / (torch.tensor(SIGMAS)[level][:, None, None, None] ** 2 + 0.0625)


def toy_engine(batch: int = 64, model=toy_score):
    import torch

    from sgm_engine.engine.engine import Engine

    torch.set_num_threads(1)
    return Engine(model, batch=batch, sigmas=SIGMAS, shape=(1, 4, 4), executor="eager")


def toy_plan():
    from sgm_engine.plans.plan import annealed_langevin

    return annealed_langevin(SIGMAS, steps_per_level=1, step_lr=1e-3)


def toy_job(out, n: int, shard_size: int = 500, **options):
    from sgm_engine.jobs.job import Job

    options = {"format": "npz", "weights": "toy", "plan": toy_plan(), "shard_size": shard_size} | options
    return Job(toy_engine(), out, n, **options)


def contents(folder) -> dict[str, str]:
    """The sha256 of every file of a job but its locks."""
    files = (f for f in sorted(Path(folder).rglob("*")) if f.is_file() and ".sgm" not in f.parts)
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def torn(folder, whole: dict[str, str]) -> int:
    """Files with a final name that are not, to the byte, what they are in the end."""
    return sum(whole.get(name) != digest for name, digest in contents(folder).items())


def ids_on_disk(folder) -> list[int]:
    import numpy as np

    found = []
    for file in sorted(Path(folder).glob("shard-*.npz")):
        with np.load(file) as data:
            assert len(data["arr_0"]) == len(data["sample_id"])
            found += data["sample_id"].tolist()
    return found


def server():
    """Forks processes from one that has done its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def logged_run(out, n: int, log) -> None:
    """Run the job; a line in ``log`` for each shard that is complete in memory."""
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    job = toy_job(out, n)
    draw = job.source.draw

    def noted(*args):
        for drawn in draw(*args):
            os.write(fd, f"{drawn.shard}\n".encode())
            yield drawn

    job.source.draw = noted
    job.run()


def kills(folder: Path, count: int = 200, n: int = 50_003, seed: int = 0, horizon: float = 0.7) -> dict[str, int]:
    """SIGKILL at random moments of jobs of n samples, each run again until it is complete."""
    context, moments = server(), random.Random(seed)
    toy_job(folder / "whole", n).run()
    whole = contents(folder / "whole")
    found = {"kills": 0, "jobs": 0, "runs": 0, "most shards redone by a kill": 0, "shards redone": 0, "torn files": 0}
    while found["kills"] < count:
        out, log = folder / f"job-{found['jobs']}", folder / f"log-{found['jobs']}"
        complete, before = False, 0
        while not complete:
            process = context.Process(target=logged_run, args=(str(out), n, str(log)))
            process.start()
            if found["kills"] < count:
                process.join(moments.uniform(0, horizon))
            else:
                process.join()
            killed = process.is_alive()
            if killed:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            complete = process.exitcode == 0
            assert complete or killed, f"the job ended with exit code {process.exitcode}"
            found["runs"] += 1
            found["kills"] += killed
            found["torn files"] += torn(out, whole)
            drawn = log.read_text().split() if log.exists() else []
            redone = len(drawn) - len(set(drawn)) - before
            before += redone
            found["shards redone"] += redone
            found["most shards redone by a kill"] = max(found["most shards redone by a kill"], redone)
        found["jobs"] += 1
        assert contents(out) == whole, "the bytes differ from those of a run without kills"
        assert sorted(ids_on_disk(out)) == list(range(n)), "ids are missing or there twice"
        shutil.rmtree(out)
    assert found["most shards redone by a kill"] <= 1 and found["torn files"] == 0, found
    return found | {"samples asked": n, "ids found": n, "differing bytes": 0}


def full_run(out, n: int) -> None:
    try:
        toy_job(out, n, shard_size=50).run()
    except OSError as error:
        sys.exit(error.errno)


def full_disk(folder: Path, points: int = 20, n: int = 1000) -> dict[str, int]:
    """A real full disk: a tmpfs with room for 0, 1, … of a job's files; then more room. OSError without the right."""
    context = server()
    toy_job(folder / "whole", n, shard_size=50).run()
    whole = contents(folder / "whole")
    pages = sum(4 + 4 * (f.stat().st_size // 4096) for f in (folder / "whole").rglob("*") if f.is_file())
    found = {"points": 0, "stopped with ENOSPC": 0, "torn files": 0, "leftovers": 0, "resumed to the same bytes": 0}
    for point in range(points):
        disk = folder / f"disk-{point}"
        disk.mkdir()
        size = 8 + (pages - 8) * point // points
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k,mode=700", "tmpfs", str(disk)]
        if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
            raise OSError(f"cannot mount a tmpfs: {done.stderr.strip()}")
        try:
            process = context.Process(target=full_run, args=(str(disk / "job"), n))
            process.start()
            process.join()
            found["points"] += 1
            found["stopped with ENOSPC"] += process.exitcode == 28
            found["torn files"] += torn(disk / "job", whole)
            found["leftovers"] += len(list(disk.glob("job/.sgm/tmp/*")))
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            toy_job(disk / "job", n, shard_size=50).run()
            found["resumed to the same bytes"] += contents(disk / "job") == whole
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    assert found["stopped with ENOSPC"] == found["resumed to the same bytes"] == points, found
    assert found["torn files"] == found["leftovers"] == 0, found
    return found


def race(barrier, weights, out) -> None:
    from sgm_engine.cli import main as cli
    from sgm_engine.errors import JobBusy
    from sgm_engine.jobs import folder, lock

    @contextmanager
    def together(*args):
        """The lock, taken when everybody is there and kept until everybody has tried."""
        barrier.wait()
        try:
            with lock.locked(*args) as held:
                yield held
                barrier.wait()
        except JobBusy:
            barrier.wait()
            raise

    folder.locked = together
    options = ["--batch", "4", "--n", "64", "--steps-per-level", "5", "--step-lr", "1e-4", "--format", "npz"]
    command = ["sample", "--checkpoint", str(weights), "--out", str(out), "--shard-size", "16", *options]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        sys.exit(cli.main(command))


def racers(folder: Path, weights, rounds: int = 50, count: int = 4) -> dict[str, int]:
    """``count`` commands for one folder at once: one draws, the others leave with exit code 4."""
    from sgm_engine.cli.console import BUSY, DONE
    from sgm_engine.jobs.verify import verify

    context, found = server(), {"rounds": 0, "one winner": 0, "refused with code 4": 0}
    for number in range(rounds):
        out, barrier = folder / f"race-{number}", context.Barrier(count)
        processes = [context.Process(target=race, args=(barrier, weights, f"{out}/")) for _ in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = sorted(process.exitcode for process in processes)
        found["rounds"] += 1
        found["one winner"] += codes == [DONE] + [BUSY] * (count - 1)
        found["refused with code 4"] += codes.count(BUSY)
        assert codes == [DONE] + [BUSY] * (count - 1) and verify(out).ok, codes
    return found


def endless(weights, out, log) -> None:
    """A command that takes long enough to be stopped; its stderr goes to ``log``."""
    from sgm_engine.cli import main as cli

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    options = ["--batch", "4", "--steps-per-level", "50", "--step-lr", "1e-4", "--shard-size", "4", "--format", "npz"]
    with open(log, "w") as stderr, redirect_stderr(stderr):
        sys.exit(cli.main(["sample", "--checkpoint", str(weights), *options, "--out", f"{out}/", "--n", "100000"]))


def peak_memory(out, n: int, pipe) -> None:
    """Run a job; send the peak of resident memory in KiB."""
    import resource

    toy_job(out, n, 100).run()
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    from sgm_engine.programs.arguments import Program, at_least

    p = Program("tests.faults", __doc__)
    p.add_argument("--kills", type=at_least(1), metavar="N", help="that many SIGKILLs (200 where all runs)")
    p.add_argument("--full-disk", type=at_least(1), metavar="N", help="at that many points (20); mounts tmpfs, as root")
    p.add_argument("--races", type=at_least(1), metavar="N", help="that many rounds of 4 racers (50)")
    args = p.parse_args()
    everything = not any(vars(args).values())
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.monotonic()
        for title, wanted, usual, run in (
            ("kills", args.kills, 200, kills),
            ("full_disk", args.full_disk, 20, full_disk),
            ("races", args.races, 50, lambda f, count: racers(f, tiny_weights(f), count)),
        ):
            if wanted or everything:
                (folder / title).mkdir()
                counts = run(folder / title, wanted or usual)
                print(f"{title} ({time.monotonic() - start:.0f} s): {json.dumps(counts)}", flush=True)


def tiny_weights(folder: Path) -> Path:
    """A random NCSN (8×8, ngf 4, three levels) in the package's own format."""
    import torch

    from sgm_engine.checkpoints.checkpoint import save_checkpoint
    from sgm_engine.models import NCSN

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NCSN([1.0, 0.3, 0.1], channels=1, ngf=4, divide_by_sigma=True, image_size=8)
    model.plan = {"name": "annealed_langevin", "steps_per_level": 2, "step_lr": 1e-3}
    save_checkpoint(model, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


if __name__ == "__main__":
    main()
