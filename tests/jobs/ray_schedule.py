"""A job on a Ray cluster under random kills, freezes and lost nodes: ``python -m tests.jobs.ray_schedule``.

For each seed: the bytes are those of one process, within --bound seconds. Actors draw next to nothing (painters.py).
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tests.faults import contents
from tests.jobs import painters
from tests.jobs.painters import plain_job, ray_plain_job

NODES = 2


class Schedule:
    """What happens after which shard."""

    def __init__(self, cluster, nodes, job, seed, shards, counts):
        self.cluster, self.nodes, self.job, self.random = cluster, nodes, job, random.Random(seed)
        events = [event for event, count in counts.items() for _ in range(count)]
        self.random.shuffle(events)
        self.at = dict(zip(sorted(self.random.sample(range(1, shards), len(events))), events, strict=True))
        self.frozen, self.done = [], dict.fromkeys(counts, 0)

    def __call__(self, count):
        if event := self.at.pop(count, None):
            getattr(self, event)()
            self.done[event] += 1

    def kill(self):
        self._signal(signal.SIGKILL)

    def freeze(self):
        self.frozen.append(self._signal(signal.SIGSTOP))

    def lose(self):
        """A node goes, another comes."""
        self.cluster.remove_node(self.nodes.pop(self.random.randrange(NODES)), allow_graceful=False)
        self.nodes.append(one_more(self.cluster))

    def _signal(self, number):
        pids = [m.pid for m in self.job.source.crew.members if m.ready and m.pid not in self.frozen]
        if not pids:
            return 0
        pid = self.random.choice(pids)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid


def one_more(cluster):
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


def run(cluster, nodes, out, seed, n, shard_size, counts, bound):
    """The counts of what happened, and the seconds."""
    job = ray_plain_job(out, n, shard_size, pause=0.02, patience=60.0)
    schedule = Schedule(cluster, nodes, job, seed, job.spec.shards, counts)
    draw, began = job.source.draw, time.monotonic()

    def noted(*args):
        for count, drawn in enumerate(draw(*args), 1):
            yield drawn
            schedule(count)
            if time.monotonic() - began > bound:
                job.stop()

    job.source.draw = noted
    try:
        report = job.run()
    finally:
        for pid in filter(None, schedule.frozen):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    seconds = time.monotonic() - began
    assert report.complete and seconds < bound, f"seed {seed}: {report.shards} shards after {seconds:.0f} s"
    return schedule.done | {"seconds": round(seconds)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--n", type=int, default=20_000)
    p.add_argument("--shard-size", type=int, default=100)
    p.add_argument("--kill", type=int, default=6)
    p.add_argument("--freeze", type=int, default=4)
    p.add_argument("--lose", type=int, default=3)
    p.add_argument("--bound", type=float, default=300.0, help="seconds a seed")
    args = p.parse_args()
    ray.cloudpickle.register_pickle_by_value(painters)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    nodes = [one_more(cluster) for _ in range(NODES)]
    counts = {"kill": args.kill, "freeze": args.freeze, "lose": args.lose}
    with tempfile.TemporaryDirectory() as name:
        plain_job(Path(name) / "whole", args.n, args.shard_size).run()
        whole = contents(Path(name) / "whole")
        for seed in range(args.seeds):
            out = Path(name) / f"seed-{seed}"
            found = run(cluster, nodes, out, seed, args.n, args.shard_size, counts, args.bound)
            differing = len(dict(whole.items() ^ contents(out).items()))
            print(json.dumps({"seed": seed, "samples": args.n, **found, "differing files": differing}), flush=True)
            assert not differing
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
