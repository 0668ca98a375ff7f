"""Jobs on object storage: a real S3 server that is busy, breaks puts, and serves jobs that do not know each other."""

from functools import partial

import numpy as np
import pytest

from sgm_engine.cli.main import main
from sgm_engine.jobs.bucket import Bucket, ShardWriter
from sgm_engine.jobs.merge import merge
from sgm_engine.jobs.source import Drawn
from sgm_engine.jobs.spec import JobError
from sgm_engine.jobs.verify import verify
from sgm_engine.jobs.worker import Worker
from tests.jobs.object_server import BUCKET, objects, storage, url  # noqa: F401 - fixtures
from tests.jobs.painters import Painter, plain_job

N, SHARD = 18, 4
SHARDS = [f"shard-{k:06d}.npz" for k in range(5)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of the same job on a disk, by name."""
    return on_disk(tmp_path_factory.mktemp("jobs") / "whole")


def on_disk(out, **options):
    assert plain_job(out, N, SHARD, **options).run().complete
    files = [f for f in out.rglob("*") if f.is_file() and ".sgm" not in f.parts]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def drawn(found):
    """Less the mark that the storage knows conditions."""
    return {name: content for name, content in found.items() if name != ".sgm/conditional"}


@pytest.mark.parametrize("form", ["npz", "png"])
def test_the_objects_are_the_files(url, tmp_path, form):
    files = on_disk(tmp_path / "job", format=form)
    report = plain_job(url, N, SHARD, format=form).run()
    assert report.complete and report.shards == 5 and drawn(objects(url)) == files
    found, above = verify(url), url.removesuffix("/run")
    assert found.ok and (found.good, found.samples) == (5, N)
    assert merge([url], tmp_path / "far.npz") == merge([tmp_path / "job"], f"{above}/near.npz") == N
    assert objects(above)["near.npz"] == (tmp_path / "far.npz").read_bytes()


def test_what_is_damaged_or_missing_is_drawn_again(storage, url, whole):
    import s3fs

    fs = s3fs.S3FileSystem()
    assert plain_job(url, N, SHARD).run().complete
    fs.rm(f"{url}/{SHARDS[1]}")
    fs.pipe_file(f"{url}/{SHARDS[2]}", whole[SHARDS[2]][:-1] + b"?")
    fs.rm(f"{url}/manifest/000003.json")
    fs.pipe_file(f"{url}/stranger", b"")
    found = verify(url)
    assert [(p.shard, p.kind) for p in found.problems] == [(1, "missing"), (2, "corrupt"), (3, "missing")]
    assert found.unexpected == ["stranger"]
    storage.log.clear()
    report = plain_job(url, N, SHARD).run()
    assert (report.found, report.shards, [e.shard for e in report.redrawn]) == (2, 3, [1, 2]) and report.complete
    fs.rm(f"{url}/stranger")
    assert drawn(objects(url)) == whole and verify(url).ok


def test_workers_share_a_prefix_and_any_number_may_write(url, whole):
    reports = [plain_job(url, N, SHARD).run(Worker(*w)) for w in ((0, 2), (1, 3), (1, 2))]
    assert [(r.shards, r.found, r.complete) for r in reports] == [(3, 0, False), (1, 1, False), (1, 1, True)]
    assert drawn(objects(url)) == whole


def test_what_another_machine_changes_is_seen(url):
    """fsspec keeps listings, and knows of its own changes alone."""
    import s3fs

    job = plain_job(url, N, SHARD)
    assert job.run().complete and len(job.folder.recorded(job.spec)) == 5
    s3fs.S3FileSystem(skip_instance_cache=True).rm(f"{url}/manifest/000001.json")
    assert job.folder.recorded(job.spec) == {0, 2, 3, 4} and job.folder.lost(job.spec, range(5)) == [1]


@pytest.mark.parametrize("fault", ["busy", "cut", "unheard"])
def test_a_put_that_fails_is_tried_again(storage, url, whole, fault):
    """Three times each; aiohttp by itself tries once more where a connection breaks."""
    storage.faults = {name: [fault] * 3 for name in ("run.json", SHARDS[0], "manifest/000002.json")}
    with pytest.warns(UserWarning, match=r"run\.json: .*; tried again"):
        report = plain_job(url, N, SHARD).run()
    assert report.complete and drawn(objects(url)) == whole
    assert not any(storage.faults.values())


@pytest.mark.parametrize("fault", ["busy", "cut"])
@pytest.mark.filterwarnings("ignore:.*tried again")
def test_a_put_that_never_succeeds_ends_the_job_and_the_next_one_goes_on(storage, url, whole, fault):
    storage.faults = {SHARDS[2]: [fault] * 1000}
    with pytest.raises(OSError, match="object storage") as caught:
        plain_job(url, N, SHARD).run()
    assert caught.value.filename == f"{url}/{SHARDS[2]}"
    assert drawn(objects(url)).items() < whole.items() and SHARDS[2] not in objects(url)
    assert {p.kind for p in verify(url).problems} == {"missing"}
    storage.faults.clear()
    report = plain_job(url, N, SHARD).run()
    assert report.found == 2 and report.complete and drawn(objects(url)) == whole


def test_of_two_jobs_on_one_prefix_the_first_has_it(url, whole):
    """Both have found the prefix empty."""
    late, first = plain_job(url, N, SHARD, seed=1), plain_job(url, N, SHARD)
    begun = Bucket.begun

    def slow(bucket):
        """The late one looks, then the first begins."""
        answer = begun(bucket)
        if bucket is late.folder and not answer:
            assert first.run().complete
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "begun", slow)
        with pytest.raises(JobError, match="holds another job: seed was 0 and is now 1"):
            late.run()
    assert drawn(objects(url)) == whole
    with pytest.raises(JobError, match="holds another job: seed was 0 and is now 2"):
        plain_job(url, N, SHARD, seed=2)


def test_a_stalled_writer_spoils_nothing(url, whole):
    """It sleeps between two shards while its prefix is emptied and another job completes there."""
    import s3fs

    stalled = plain_job(url, N, SHARD, seed=1)

    def others(source, spec, shards, settle, *rest):
        for k, shard in enumerate(source(spec, shards, settle, *rest)):
            if k == 2:
                settle()
                s3fs.S3FileSystem().rm(url, recursive=True)
                assert plain_job(url, N, SHARD).run().complete
            yield shard

    stalled.source.draw = partial(others, stalled.source.draw)
    with pytest.raises(JobError, match="was emptied or replaced while this job wrote there"):
        stalled.run()
    assert drawn(objects(url)) == whole


def test_a_writer_that_stalls_within_a_put_spoils_nothing(url, whole, monkeypatch):
    """It has just seen that the prefix is its own."""
    stalled = plain_job(url, N, SHARD, seed=1)
    assert stalled.run().complete
    import s3fs

    s3fs.S3FileSystem().rm(url, recursive=True)
    assert plain_job(url, N, SHARD).run().complete
    own, asked = Bucket._check_own, []
    monkeypatch.setattr(Bucket, "_check_own", lambda *args: asked.append(1) or (len(asked) > 1 and own(*args)))
    with pytest.raises(JobError, match="was emptied or replaced"):
        ShardWriter(url, stalled.spec)(3, np.arange(12, 16), np.zeros((4, 1, 2, 2), np.float32), [])
    assert drawn(objects(url)) == whole


def test_storage_without_conditional_puts_is_refused(storage, url):
    storage.conditional = False
    with pytest.raises(ValueError, match=r"takes no conditional puts \(If-None-Match\)"):
        plain_job(url, N, SHARD).run()
    assert [name for name in objects(url) if "conditional" not in name] == []


def test_more_ids_are_refused_with_the_remedy(url):
    assert plain_job(url, N, SHARD).run().complete
    with pytest.raises(JobError, match=r"gets no more: draw the others with --ids under another name, and merge both"):
        plain_job(url, N + 1, SHARD)


def test_what_is_written_where_it_was_drawn_is_not_written_again(storage, url, whole):
    """As Ray's actors do: the driver puts run.json alone."""
    job = plain_job(url, N, SHARD)

    def far(spec, shards, *_):
        for shard in shards:
            yield Drawn(shard, *ShardWriter(url, spec)(shard, *Painter().draw(b"", str(spec.shard_ids(shard)))))

    job.source.draw = far
    report = job.run()
    assert report.complete and (report.shards, report.samples) == (5, N) and drawn(objects(url)) == whole
    assert sum(method == "PUT" and path.endswith(SHARDS[0]) for method, path in storage.log) == 1


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ("ftp://host/run", r"object storage is one of s3://BUCKET/NAME, gs://.*, got 'ftp://host/run'"),
        ("s3://", r"object storage is one of s3://BUCKET/NAME"),
        ("az://samples/run", r"az:// needs adlfs \(.*\): pip install 'sgm-engine\[storage\]' adlfs"),
    ],
)
def test_urls_that_cannot_be_had_are_refused(out, what):
    with pytest.raises(ValueError, match=what):
        plain_job(out, N, SHARD)


def test_a_bucket_that_is_not_there_is_named(storage):
    with pytest.raises(FileNotFoundError, match=r"object storage: .*nowhere/run"):
        plain_job("s3://nowhere/run", N, SHARD).run()


def test_the_commands_take_urls(url, tiny_weights, tmp_path, capsys):
    options = ["sample", "--checkpoint", str(tiny_weights), "--batch", "4", "--device", "cpu", "--n", "10", "--quiet"]
    shards = [*options, "--shard-size", "4", "--format", "npz"]
    assert main([*shards, "--out", f"{url}/"]) == main([*shards, "--out", f"{tmp_path}/job/"]) == 0
    assert main(["verify", url]) == 0
    assert main(["resample", url, "--id", "7", "--out", f"{tmp_path}/seven.npz"]) == 0
    assert main(["merge", url, "--out", f"{tmp_path}/far.npz"]) == 0
    assert main(["merge", f"{tmp_path}/job", "--out", f"{tmp_path}/near.npz"]) == 0
    assert (tmp_path / "far.npz").read_bytes() == (tmp_path / "near.npz").read_bytes()
    assert f"equal to sample 7 of {url}" in capsys.readouterr().out
    assert main([*options, "--out", f"{url}.npz"]) == 2
    assert "object storage takes a folder of shards" in capsys.readouterr().err
