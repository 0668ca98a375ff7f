"""A Ray cluster that loses nodes, freezes, is busy or broken: the job ends in bounded time, with the same bytes.

Actors draw next to nothing (painters.py), without PyTorch. Each test has a clock, which stops a job that hangs.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from sgm_engine.errors import EngineError
from sgm_engine.jobs import ray_crew
from sgm_engine.jobs.job import Job
from sgm_engine.jobs.ray_pool import RaySource
from sgm_engine.jobs.record import sha256
from sgm_engine.jobs.verify import verify
from tests.faults import contents
from tests.jobs import painters
from tests.jobs.object_server import objects, storage, url  # noqa: F401 - fixtures
from tests.jobs.painters import Painter, plain_job, plain_spec, ray_plain_job

ray = pytest.importorskip("ray", reason="needs the extra [ray]")

ROOT = Path(__file__).parents[2]
CLOCK = 240  # seconds of a test, of which it takes a few: a busy machine takes longer, a job that hangs for ever
N, SHARD = 400, 10


@pytest.fixture(scope="module")
def cluster():
    """A head that draws nothing. Nodes are added by the tests."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(painters)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(painters)


@pytest.fixture(scope="module")
def node(cluster):
    """A node of one CPU that stays."""
    return one_more(cluster)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("ray") / "whole"
    assert plain_job(out, N, SHARD).run().complete
    return contents(out)


def one_more(cluster, **options):
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20, **options)


def occupied():
    """Somebody else's actor, which has a CPU."""

    class Busy:
        def at_it(self):
            return True

    busy = ray.remote(Busy).options(num_cpus=1).remote()
    assert ray.get(busy.at_it.remote(), timeout=CLOCK)
    return busy


def remove(cluster, *nodes):
    """Until Ray knows that they are gone: for ten seconds it would still place actors there."""
    for node in cluster.worker_nodes & set(nodes):
        cluster.remove_node(node, allow_graceful=False)
    ids, began = {node.node_id for node in nodes}, time.monotonic()
    while any(n["Alive"] and n["NodeID"] in ids for n in ray.nodes()):
        assert time.monotonic() - began < CLOCK
        time.sleep(0.05)


@contextmanager
def leaving(cluster, node):
    try:
        yield
    finally:
        remove(cluster, node)


def run(job, events=()):
    """The report of a job within the clock, and what it warned of. events: {k: what is called after k shards}."""
    clock, draw, events = threading.Timer(CLOCK, job.stop), job.source.draw, dict(events)

    def noted(*args):
        for k, drawn in enumerate(draw(*args), 1):
            yield drawn
            events.pop(k, lambda: None)()

    job.source.draw = noted
    clock.start()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            report = job.run()
    finally:
        clock.cancel()
        job.source.draw = draw
    assert not report.stopped, f"not finished within {CLOCK} s: {[str(w.message) for w in said]}"
    return report, "\n".join(str(w.message) for w in said)


def test_a_node_joins_and_another_is_lost(cluster, whole, tmp_path):
    """The node that draws at first goes; the one that came meanwhile has to finish."""
    first, later = one_more(cluster), []
    job = ray_plain_job(tmp_path / "job", N, SHARD, pause=0.02)
    events = {3: lambda: later.append(one_more(cluster)), 8: lambda: cluster.remove_node(first, allow_graceful=False)}
    try:
        report, said = run(job, events)
        assert report.complete and contents(tmp_path / "job") == whole
    finally:
        remove(cluster, first, *later)
    assert "another actor draws it" in said


def test_actors_that_are_frozen_or_killed_or_have_no_room(cluster, node, whole, tmp_path, monkeypatch):
    """Four actors are asked for where two have room; one of these is frozen, the other killed."""
    monkeypatch.setattr(ray_crew, "LEAST", 1.5)
    more, frozen = one_more(cluster), []
    job = ray_plain_job(tmp_path / "job", N, SHARD, pause=0.02, actors=4, patience=CLOCK)
    drawing = lambda: next(m.pid for m in job.source.crew.members if m.queue and m.pid not in frozen)  # noqa: E731

    def freeze():
        frozen.append(drawing())
        os.kill(frozen[0], signal.SIGSTOP)

    with leaving(cluster, more):
        try:
            report, said = run(job, {3: freeze, 6: lambda: os.kill(drawing(), signal.SIGKILL)})
        finally:
            for pid in frozen:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert report.complete and contents(tmp_path / "job") == whole
    assert "others draw it too" in said and "another actor draws it" in said


def test_a_node_without_the_package_is_named_and_left_aside(cluster, node, whole, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['sgm_engine'] = None  # no such package")
    busy = occupied()
    bad = one_more(cluster, env_vars={"PYTHONPATH": str(tmp_path)})  # the only one with room
    source = RaySource(partial(Painter, 0.02), "auto", None, "cpu", CLOCK)

    told = threading.Event()

    def free():
        while not source.crew.aside and not told.wait(0.01):
            pass
        ray.kill(busy)

    threading.Thread(target=free).start()
    with leaving(cluster, bad):
        try:
            with pytest.warns(UserWarning, match="is left aside: ModuleNotFoundError: .*sgm_engine"):
                source.describe()
        finally:
            told.set()
        report, said = run(Job.from_source(source, plain_spec(N, SHARD), tmp_path / "job"))
        assert list(source.crew.aside) == [bad.node_id] and "left aside" not in said
    assert report.complete and contents(tmp_path / "job") == whole


def test_a_job_that_no_node_can_draw_says_why(cluster, node, tmp_path):
    with pytest.raises(ValueError, match=r"could not be made: no node .* can draw: .*TypeError"):
        ray_plain_job(tmp_path / "job", N, SHARD, make=partial(Painter, 0.0, None, "too many"))
    job = ray_plain_job(tmp_path / "job", N, SHARD, make=partial(Painter, 0.0, 57))
    with pytest.raises(EngineError, match=r"shard 5 failed 3 times, at last on .*: ArithmeticError: sample 57"):
        run(job)
    assert {p.kind for p in verify(tmp_path / "job").problems} == {"missing"} and not job.source.crew.members


def test_a_busy_cluster_is_waited_for_with_a_limit(cluster, node, tmp_path):
    busy = occupied()
    began = time.monotonic()
    waiting = pytest.warns(UserWarning, match=r"1 actors wait for a CPU or start; 0 of 1 CPUs are free")
    with waiting, pytest.raises(ValueError, match=r"nothing came from Ray for 2 s: 1 actors wait"):
        ray_plain_job(tmp_path / "job", N, SHARD, patience=2.0)
    assert time.monotonic() - began < CLOCK
    ray.kill(busy)
    job = ray_plain_job(tmp_path / "job", 20, SHARD)
    for _ in range(2):
        report, _ = run(job)
        assert report.complete
        (tmp_path / "job" / "shard-000001.npz").unlink()  # a second run of the same job has actors too


def test_a_driver_is_killed_and_another_goes_on(cluster, node, whole, tmp_path):
    code = f"from tests.jobs.painters import drive; drive({cluster.address!r}, {str(tmp_path / 'job')!r}, {N}, {SHARD})"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    began = time.monotonic()
    while not (tmp_path / "job/manifest/000002.json").exists():
        assert driver.poll() is None and time.monotonic() - began < CLOCK
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    report, _ = run(ray_plain_job(tmp_path / "job", N, SHARD))
    assert report.complete and 3 <= report.found < N // SHARD and contents(tmp_path / "job") == whole


def test_actors_put_shards_on_object_storage_themselves(cluster, node, storage, url, tmp_path):
    """One node has the credentials, and room. The server is busy for one put; the command gets no samples."""
    busy = occupied()
    more = one_more(cluster, env_vars=storage.environment)
    storage.faults = {"shard-000003.npz": ["busy"]}
    with leaving(cluster, more):
        job, drawn = ray_plain_job(url, N, 50), []
        draw = job.source.draw
        job.source.draw = lambda *args: (drawn.append(d) or d for d in draw(*args))
        report, _ = run(job)
    ray.kill(busy)
    assert report.complete and report.samples == N and {d.samples for d in drawn} == {None}
    assert plain_job(tmp_path / "job", N, 50).run().complete
    names = {name: content for name, content in objects(url).items() if ".sgm" not in name}
    assert {name: sha256(content) for name, content in names.items()} == contents(tmp_path / "job")
