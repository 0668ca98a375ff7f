"""A job on a Ray cluster under random kills, freezes and lost nodes: ``python -m tests.jobs.ray_schedule``.

For each seed: the bytes are those of one process, within --bound seconds. Actors draw next to nothing (painters.py).
"""

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

from sgm_engine.programs.arguments import Program, at_least, positive
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
    p = Program("tests.jobs.ray_schedule", __doc__)
    p.add_argument("--seeds", type=at_least(1), default=3, metavar="N", help="schedules")
    p.add_argument("--n", type=at_least(1), default=20_000, metavar="N", help="samples of a job")
    p.add_argument("--shard-size", type=at_least(1), default=100, metavar="N", help="sample ids in a shard")
    p.add_argument("--kill", type=at_least(0), default=6, metavar="N", help="actors killed in a schedule")
    p.add_argument("--freeze", type=at_least(0), default=4, metavar="N", help="actors frozen")
    p.add_argument("--lose", type=at_least(0), default=3, metavar="N", help="nodes lost")
    p.add_argument("--bound", type=positive, default=300.0, metavar="SECONDS", help="of a seed, at most")
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
