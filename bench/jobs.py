"""What a job costs beside its samples, on many workers: ``python -m bench.jobs``. Samples cost nothing here.

workers   1, 2 and 4 processes on the cores of this machine, one job: its shards a second, and CPU time a shard
shards    a tenth of --shards, and all: CPU time a shard to write, to resume as one worker of 1,000, to verify
driver    as many shards on 1,000 pretended Ray actors: CPU time of the command a shard
ray       with Ray installed: the same on two real actors, Ray's own part included

The folder is in TMPDIR: TMPDIR=/dev/shm leaves the disk out. CPU time, since the clock is everybody's.
"""

import argparse
import json
import pickle
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from sgm_engine.jobs.ray_crew import Crew
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from sgm_engine.programs.arguments import Program, at_least
from tests.jobs import painters
from tests.jobs.painters import Painter, plain_job, ray_plain_job

SIZE = 10  # samples a shard
ACTORS, AT_ONCE = 1000, 5  # answers that come between two looks


def cpu(what):
    """(CPU seconds of this process, the result)."""
    start = time.process_time()
    result = what()
    return time.process_time() - start, result


def share(out, shards, worker):
    return plain_job(out, shards * SIZE, SIZE).run(Worker.parse(worker))


def warm_up():
    """What is imported when a first job runs."""
    with tempfile.TemporaryDirectory() as name:
        plain_job(f"{name}/job", SIZE, SIZE).run()


def one(out, shards, worker):
    warm_up()
    began = time.perf_counter()
    seconds, report = cpu(lambda: share(out, shards, worker))
    return {"cpu": seconds, "from": began, "to": time.perf_counter(), "shards": report.shards}


def workers(folder, shards):
    for count in (1, 2, 4):
        command = [sys.executable, "-m", "bench.jobs", "--out", f"{folder}/{count}", "--shards", str(shards)]
        started = [
            subprocess.Popen([*command, "--worker", f"{i}/{count}"], stdout=subprocess.PIPE, text=True)
            for i in range(count)
        ]
        found = [json.loads(p.communicate()[0]) for p in started]
        seconds = max(f["to"] for f in found) - min(f["from"] for f in found)
        assert sum(f["shards"] for f in found) == shards and verify(f"{folder}/{count}").ok
        yield {
            "workers": count,
            "shards/s by the clock": round(shards / seconds),
            "CPU ms a shard": round(1e3 * sum(f["cpu"] for f in found) / shards, 3),
        }


def folders(folder, shards):
    warm_up()
    for count in (shards // 10, shards):
        out = f"{folder}/{count}-shards"
        written, report = cpu(lambda out=out, count=count: plain_job(out, count * SIZE, SIZE).run())
        resumed, again = cpu(lambda out=out, count=count: share(out, count, "7/1000"))
        verified, found = cpu(lambda out=out: verify(out))
        assert report.complete and again.complete and found.ok
        yield {
            "shards": count,
            "written, ms a shard": round(1e3 * written / count, 3),
            "resumed by one of 1,000, s": round(resumed, 2),
            "verified, ms a shard": round(1e3 * verified / count, 3),
        }


class Pretended:
    """Ray as the crew calls it: each actor answers at some time."""

    exceptions = SimpleNamespace(RayError=ZeroDivisionError, RayTaskError=ZeroDivisionError)
    cloudpickle = pickle

    def __init__(self):
        self.answers, self.ready = {}, set()

    def put(self, value):
        return value

    def remote(self, cls):
        return self

    def options(self, **options):
        return SimpleNamespace(
            remote=lambda make: SimpleNamespace(hello=self._call(HELLO), draw=self._call(([], None, [])))
        )

    def _call(self, answer):
        return SimpleNamespace(remote=lambda *args: self._ref(answer))

    def _ref(self, answer):
        self.answers[len(self.answers)] = answer
        return len(self.answers) - 1

    def wait(self, refs, num_returns=1, timeout=0):
        if num_returns == 1 and timeout:
            self.ready = set(random.sample(refs, min(AT_ONCE, len(refs))))
        ready = [ref for ref in refs if ref in self.ready][:num_returns]
        return ready, [ref for ref in refs if ref not in set(ready)]

    def get(self, ref):
        return self.answers[ref]

    def nodes(self):
        return [{"NodeID": "n", "Alive": True, "NodeManagerHostname": "n", "Resources": {"CPU": ACTORS}}]

    def kill(self, actor):
        """It is gone."""


HELLO = ("n", "n", 0), None, pickle.dumps(({}, None))


def driver(shards):
    for count in (shards // 10, shards):
        crew = Crew(Pretended(), b"", "CPU", ACTORS, {}, 3600.0)
        seconds, drawn = cpu(lambda crew=crew, count=count: sum(1 for _ in crew.draw(b"", range(count), str_of, never)))
        assert drawn == count
        yield {"shards": count, "pretended actors": ACTORS, "driver's CPU ms a shard": round(1e3 * seconds / count, 3)}


def str_of(shard):
    return (str(shard),)


def never():
    return False


def on_ray(folder, shards):
    import ray

    ray.cloudpickle.register_pickle_by_value(painters)
    job = ray_plain_job(f"{folder}/ray", shards * SIZE, SIZE, make=Painter, actors=2, address="local")
    seconds, report = cpu(job.run)
    assert report.complete
    ray.shutdown()
    yield {"shards": shards, "Ray actors": 2, "driver's CPU ms a shard": round(1e3 * seconds / shards, 3)}


def main():
    p = Program("bench.jobs", __doc__)
    p.add_argument("--shards", type=at_least(10), default=100_000, metavar="N", help="of the largest job")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    p.add_argument("--out", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        print(json.dumps(one(args.out, args.shards, args.worker)))
        return
    with tempfile.TemporaryDirectory() as name:
        few = max(args.shards // 20, 8)
        for kind in (workers(name, few), folders(name, args.shards), driver(args.shards)):
            for line in kind:
                print(json.dumps(line), flush=True)
        try:
            lines = list(on_ray(Path(name), few))
        except ImportError:
            lines = [{"ray": "not installed"}]
        print(json.dumps(lines[0]))


if __name__ == "__main__":
    main()
