"""Painters for Ray's actors that draw next to nothing, without PyTorch. By value: actors cannot import tests/."""

import time

import numpy as np

SHAPE = (1, 2, 2)


class Painter:
    """float32 samples that depend on their id alone, ``pause`` seconds a shard."""

    about = ({"painter": "plain"}, None)

    def __init__(self, pause=0.0, fails=None):
        """fails: an id that raises."""
        import sgm_engine  # noqa: F401 - a node may lack it

        self.pause, self.fails = pause, fails

    def draw(self, job, ids):
        time.sleep(self.pause)
        found = [i for part in ids.split(",") for i in _range(*part.split("-"))]
        if self.fails in found:
            raise ArithmeticError(f"sample {self.fails} cannot be drawn")
        x = np.array(found, np.float32)[:, None, None, None] % 251 / 250 + np.zeros(SHAPE, np.float32)
        return np.array(found, np.int64), x, []


def _range(first, last=None):
    return range(int(first), int(last or first) + 1)


class Here:
    """The same in this process, as a Source."""

    def draw(self, spec, shards, settle, stopped, bar):
        from sgm_engine.jobs.source import Drawn

        for shard in shards:
            yield Drawn(shard, *Painter().draw(b"", str(spec.shard_ids(shard))))

    def cancel(self):
        """Nothing runs."""


def plain_spec(n, shard_size, seed=0, format="npz"):
    """A job of these painters."""
    from sgm_engine.jobs.identity import ModelIdentity
    from sgm_engine.jobs.job import make_spec
    from sgm_engine.jobs.spec import Geometry
    from tests.faults import toy_plan

    geometry = Geometry("float32", "eager", 1, "cpu any", "0")
    model = ModelIdentity("painter", {})
    return make_spec(geometry, SHAPE, (0.0, 1.0), model, toy_plan(), seed, n, None, format, shard_size)


def plain_job(out, n, shard_size, **options):
    """Drawn in this process."""
    from sgm_engine.jobs.job import Job

    return Job.from_source(Here(), plain_spec(n, shard_size, **options), out)


def ray_plain_job(out, n, shard_size, pause=0.0, make=None, actors=None, patience=240.0, address="auto"):
    """Drawn by the actors of the cluster that this process has joined."""
    from functools import partial

    from sgm_engine.jobs.job import Job
    from sgm_engine.jobs.ray_pool import RaySource

    source = RaySource(make or partial(Painter, pause), address, actors, "cpu", patience, out)
    source.describe()
    return Job.from_source(source, plain_spec(n, shard_size), out)


def drive(address, out, n, shard_size):
    """A driver of its own, slow enough to be killed."""
    import sys

    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray_plain_job(out, n, shard_size, pause=0.3, address=address).run()
