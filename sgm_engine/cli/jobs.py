"""``sgm sample`` into a folder, ``sgm merge``, ``sgm verify``, ``sgm resample``. Heavy imports are inside functions."""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path

from sgm_engine.cli.arguments import MAX_ID, STREAM, at_least
from sgm_engine.cli.console import (
    DAMAGED,
    DIVERGED,
    DONE,
    FAULT,
    INTERRUPTED,
    TERMINATED,
    bad_input,
    complain,
    plan_line,
    rate,
    say,
    shown,
    some,
    stoppable,
)
from sgm_engine.cli.model import chosen_model, device_of, how_to_load

JOB_OPTIONS = ("format", "shard_size", "worker", "steal", "ray", "actors", "patience")  # a stream has a format too
LINE_EVERY = 60.0  # seconds between two lines of progress of Ray's actors


def register(commands) -> None:
    """Add ``merge``, ``verify`` and ``resample`` to the subparsers of ``sgm``."""
    p = commands.add_parser("merge", help="the shards of a job → one file")
    p.description = "Write the samples of one job, or of several that differ in their ids, into one file."
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="complete jobs of `sgm sample`")
    p.add_argument("--out", required=True, metavar="PATH", help=".npz (uint8) or .safetensors (float32)")
    p.set_defaults(run=merge)

    p = commands.add_parser("verify", help="every shard of a job against its record")
    p.description = "Read a whole job and compare it with its manifest. Exit code 5 if anything is missing or wrong."
    p.add_argument("folder", metavar="FOLDER")
    p.set_defaults(run=verify)

    p = commands.add_parser("resample", help="one sample of a job again, the same bytes")
    p.description = "Draw one sample of a job again and compare it with what the job holds."
    p.add_argument("folder", metavar="FOLDER")
    p.add_argument("--id", required=True, type=at_least(0, MAX_ID), metavar="N", help="its sample id")
    p.add_argument("--out", metavar="PATH", help=".safetensors (float32), .npz or .png (default: sample-N.safetensors)")
    p.add_argument("--checkpoint", metavar="PATH", help="where the weights are now (default: where they were)")
    p.add_argument("--config", metavar="PATH", help="the config.yml that came with a .pth")
    p.set_defaults(run=resample)


def wanted(args: argparse.Namespace) -> bool:
    """Whether ``sgm sample`` is asked for a job: into a folder. ValueError if the arguments contradict each other."""
    from sgm_engine.jobs.worker import Worker
    from sgm_engine.outputs.output import is_folder

    stream, suffix = args.out == STREAM, Path(args.out).suffix
    named = args.format is not None and suffix not in (".png", ".npz", ".safetensors")
    folder = not stream and (is_folder(args.out) or named)
    given = [f"--{name.replace('_', '-')}" for name in JOB_OPTIONS[stream:] if getattr(args, name) is not None]
    if folder:
        if args.gif:
            raise ValueError("argument --gif: goes with a single file, not with a folder of shards: use two commands")
        for name in ("actors", "patience"):
            if args.ray is None and getattr(args, name):
                raise ValueError(f"argument --{name}: goes with --ray")
        for name in ("worker", "steal"):
            if args.ray is not None and getattr(args, name):
                raise ValueError(f"argument --{name}: not with --ray, whose actors share the work by themselves")
        return True
    if given:
        what = f"--out {args.out} is one {'stream' if stream else 'file'}"
        raise ValueError(f"argument {given[0]}: is for a folder, and {what}: --out FOLDER/")
    if (count := Worker.from_environment().count) > 1:
        raise ValueError(f"argument --out: {count} workers would all write {args.out}: --out FOLDER/ for shards")
    return False


def sample(args: argparse.Namespace) -> int:
    from sgm_engine.jobs.worker import Worker

    with bad_input():
        worker = Worker.parse(args.worker) if args.worker else Worker() if args.ray else Worker.from_environment()
        job, weights = _job(args)
    bar = False if args.quiet or args.progress is False else "bar" if args.progress else True
    with stoppable(job.stop) as caught:
        try:
            report = job.run(worker, bar, _Lines() if bar and args.ray else None, bool(args.steal))
        except OSError as error:
            error.filename = error.filename or str(job.folder.path)  # a full disk does not say which
            raise
    for problem in report.redrawn:
        say(f"{problem}: drawn again")
    if not args.quiet:
        _print(job, report, weights)
    if caught:
        code, how = (TERMINATED, "terminated") if caught[0] == signal.SIGTERM else (INTERRUPTED, "interrupted")
        return complain(code, f"{how}; nothing is half-written, and the same command goes on from here")
    if report.lost:
        which = f"shard{'s' if len(report.lost) > 1 else ''} {some(report.lost)}"
        return complain(FAULT, f"{which} went from {args.out} while this job ran: the same command draws them again")
    # A worker of several answers for the job only once all of it is there: a launcher stops the others on a failure.
    diverged = job.diverged() if report.complete else report.diverged
    if diverged:
        say(f"{len(diverged)} samples became non-finite and are left out: {some(diverged)}")
    return DIVERGED if diverged and report.complete else DONE


def merge(args: argparse.Namespace) -> int:
    with bad_input():
        from sgm_engine.jobs.merge import merge

        count = merge(args.folders, args.out)
    print(f"written: {args.out} ({count} samples)")
    return DONE


def verify(args: argparse.Namespace) -> int:
    with bad_input():
        from sgm_engine.jobs.verify import verify

        found = verify(args.folder)
    for problem in found.problems:
        print(shown(problem))
    for name in found.unexpected:
        print(shown(f"{name} is unexpected: no part of this job"))
    for divergence in found.diverged:
        print(f"{divergence} diverged and was left out")
    print(found)
    if found.problems:
        say("the `sgm sample` that began this job draws again what is missing or damaged")
    return DONE if found.ok else DAMAGED


def resample(args: argparse.Namespace) -> int:
    with bad_input():
        from sgm_engine.checkpoints.bundled import bundled_path
        from sgm_engine.checkpoints.checkpoint import load_checkpoint
        from sgm_engine.engine.engine import Engine
        from sgm_engine.jobs.bucket import open_folder
        from sgm_engine.jobs.resample import model_of, resample
        from sgm_engine.outputs.images import save_png
        from sgm_engine.outputs.output import Output
        from sgm_engine.rewriting.float8.config import Float8Config

        spec, notes = open_folder(args.folder).load()
        out = Output.parse(args.out or f"sample-{args.id}.safetensors")
        out.check()
        if args.checkpoint is None and "checkpoint" not in notes:
            raise ValueError(
                f"{args.folder} was made by a program and does not say where its weights are: pass --checkpoint, or "
                "call sgm_engine.jobs.resample.resample(engine, folder, id) with the program's own engine"
            )
        checkpoint = args.checkpoint or notes.get("checkpoint")
        options = json.loads(notes.get("load") or "{}")
        model = load_checkpoint(checkpoint or bundled_path(), args.config or notes.get("config"), **options)
        geometry = spec.geometry
        device = geometry.device.split()[0]
        model = model_of(spec, model)
        precision = geometry.precision.split()[0]  # a digest of the scales follows on "float8"
        float8 = Float8Config.from_json(notes["float8"]) if "float8" in notes else None
        options = {"float8": float8, "data_range": spec.data_range}
        engine = Engine(model, geometry.batch, device, precision, geometry.executor, **options)
        x, compared = resample(engine, args.folder, args.id)
    if out.form == "grid":  # the picture itself, as a folder of PNG files holds it
        save_png(out.path, engine.pictures(x[None])[0])
    else:
        out.write(x[None], [args.id], data_range=engine.data_range)
    how = "equal to" if compared else "not compared, for it is missing or damaged there, with"
    print(f"written: {out.path} ({how} sample {args.id} of {args.folder})")
    return DONE


def _job(args: argparse.Namespace):
    """The Job of ``sgm sample``, all arguments checked, and what was loaded, in words."""
    from sgm_engine.engine.engine import Engine
    from sgm_engine.jobs.job import Job
    from sgm_engine.jobs.spec import SHARD_SIZE

    model, plan, weights, float8, loaded = chosen_model(args, _begun(args.out))
    paths = {"checkpoint": str(weights.resolve()) if args.checkpoint or args.weights else None}
    is_path = args.config and not args.config.startswith("--")  # ADM's flags are none
    paths["config"] = str(Path(args.config).expanduser().resolve()) if is_path else args.config
    given = how_to_load(args)
    paths |= {"load": json.dumps(given)} if given else {}
    options = {"n": args.n if args.ids is None else None, "ids": args.ids, "seed": args.seed, "plan": plan}
    options |= {"format": args.format or "png", "shard_size": args.shard_size or SHARD_SIZE, "notes": paths}
    if args.ray:
        from sgm_engine.jobs.ray_pool import PATIENCE, ray_job

        pool = {"address": args.ray, "actors": args.actors, "device": args.device, "batch": args.batch}
        pool |= {"precision": args.precision, "executor": args.executor, "float8": float8}
        pool |= {"patience": args.patience or PATIENCE}
        return ray_job(model, args.out, **options, **pool), loaded
    engine = Engine(model, args.batch, device_of(args.device), args.precision, args.executor, float8=float8)
    return Job(engine, args.out, **options), loaded


def _begun(out: str):
    """The plan of the job in that folder; None where there is none, or one that cannot be read, which Job will say."""
    from sgm_engine.jobs.bucket import open_folder
    from sgm_engine.jobs.spec import JobError

    try:
        return open_folder(out).load()[0].plan
    except JobError:
        return None


def _print(job, report, weights: str) -> None:
    from sgm_engine.plans.report import start_words

    spec, geometry = job.spec, job.spec.geometry
    speed = report.samples / report.seconds if report.samples else 0.0
    if report.found:
        print(f"found: {report.found} shards that were there already")
    if report.stolen:
        print(f"taken over: {len(report.stolen)} shards of other workers")
    print(
        f"{report.samples} samples in {report.seconds:.2f} s: {rate(speed)} samples/s, {spec.plan.nfe} NFE a sample, "
        f"{rate(speed * spec.plan.nfe)} NFE/s"
    )
    print(shown(f"weights: {weights}"))
    print(plan_line(spec.plan))
    print(shown(f"start: {start_words(spec.plan)}"))
    print(f"how: {geometry.precision} on {geometry.device}, executor {geometry.executor}, batch {geometry.batch}")
    share = f", worker {report.worker.index} of {report.worker.count}" if report.worker.count > 1 else ""
    there = len(job.folder.recorded(spec))
    print(f"written: {job.folder.path} ({there} of {spec.shards} shards are there{share})")


class _Lines:
    """A line of progress now and then, for a log."""

    def __init__(self):
        self._next = time.monotonic() + LINE_EVERY

    def __call__(self, progress) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_EVERY
            say(progress)
