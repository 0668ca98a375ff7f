"""``sgm sample``: a file or a picture; a folder of shards is a job (jobs.py). Heavy imports live inside functions."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import sgm_engine
from sgm_engine.cli import jobs
from sgm_engine.cli.arguments import (
    FORMATS,
    MAX_ID,
    MAX_SEED,
    PLANS,
    QUALITIES,
    SAMPLERS,
    SCHEDULES,
    STREAM,
    add_execution,
    add_ray,
    add_weights,
    at_least,
    number,
    plan_name,
    sample_ids,
)
from sgm_engine.cli.console import DIVERGED, DONE, bad_input, complain, plan_line, rate, shown, some
from sgm_engine.cli.model import assumed, chosen_model, device_of, processor

FILMED = 64  # samples in a GIF

EXAMPLES = """\
examples:
  sgm sample                               64 digits from the bundled weights, as one picture: samples.png
  sgm sample --weights cdm                 from the bundled classification diffusion model
  sgm sample --gif annealing.gif           and how they came out of the noise
  sgm sample --nfe 20                      the best plan of at most 20 evaluations; --quality best: whatever it takes
  sgm sample --plan annealed_langevin      NCSN's own sampler, 121 evaluations
  sgm sample --n 1000 --out digits.npz     what FID tools read: arr_0, uint8 [N, H, W, C]
  sgm sample --n 1000 --format npz --out - | program                    the same bytes on standard output
  sgm sample --ids 0-63,1000 --out digits/ PNG files; sample 1000 gets the noise that it always gets
  sgm sample --n 50000 --out run/ --format npz     a job in shards: stopped or killed, the same command goes on
  torchrun --nproc-per-node 8 -m -- sgm_engine sample --n 50000 --out run/ --format npz
  sgm sample --checkpoint checkpoint.pth --config config.yml --step-lr 1e-5 --out mine.safetensors

exit codes:
  0 done · 1 a fault while running · 2 bad input, nothing was drawn · 3 some samples diverged, the others are written
  · 4 another process writes this job · 5 sgm verify found damage · 130 interrupted (SIGINT) · 143 terminated (SIGTERM)
  · 141 nobody reads what is printed (SIGPIPE).
  What is written appears complete under its name, or not at all.
"""


def register(commands) -> None:
    p = commands.add_parser("sample", help="draw samples", epilog=EXAMPLES)
    yes_no = argparse.BooleanOptionalAction
    p.description = "Draw samples from a score network."

    group = p.add_argument_group("what to draw")
    ids = group.add_mutually_exclusive_group().add_argument
    ids("--n", type=at_least(0, MAX_ID), default=64, metavar="N", help="that many samples, ids 0 to N-1 (default: 64)")
    ids(
        "--ids",
        "--seeds",
        type=sample_ids,
        metavar="IDS",
        help="these sample ids, such as 0-63,100 (--seeds: EDM's name for it)",
    )
    add = group.add_argument
    add("--seed", type=at_least(0, MAX_SEED), default=0, metavar="N",
        help="noise depends on (seed, sample id, step) and nothing else (default: 0)")  # fmt: skip
    add_weights(add)

    add = p.add_argument_group("plan", "Whatever is not given here comes with the weights.").add_argument
    add("--plan", type=plan_name, metavar="NAME", help=f"{', '.join(PLANS)}; or FILE.json, a plan that was saved")
    add("--quality", choices=QUALITIES, help="of the plans that came with the weights; good is the default there")
    add("--nfe", type=at_least(1), metavar="N", help="network evaluations a sample; alone: the best plan of at most N")
    add("--sampler", choices=SAMPLERS, metavar="NAME", help=f"few steps, with --nfe: {', '.join(SAMPLERS)}")
    add("--schedule", choices=SCHEDULES, metavar="NAME",
        help=f"of its sigmas: {', '.join(SCHEDULES)} (default: the weights' own, or karras)")  # fmt: skip
    add("--conditioning", choices=("interpolated", "nearest"),
        help="between the model's levels: its norms' rows interpolated (default), or its nearest level")  # fmt: skip
    add("--steps-per-level", type=at_least(1), metavar="N", help="network evaluations (NFE) at each noise level")
    add("--step-lr", type=number, metavar="X", help="step size α at the last level; α·(σ/σ_last)² at the others")
    add(
        "--convention",
        choices=("code", "paper"),
        help="x + α·s + √(2α)·z (code), or half that α, as NCSN's paper writes",
    )
    add("--denoise", action=yes_no, help="end with x + σ²·s, a step without noise")
    add("--eta", type=number, metavar="X", help="of consistent_annealed (1: afresh), ddim (0–1), ancestral (2 churns)")
    add("--tau", type=number, metavar="X", help="of sa_solver: noise, in units of the reverse diffusion's (default: 1)")

    add_execution(p.add_argument_group("execution").add_argument)

    group = p.add_argument_group("output")
    add = group.add_argument
    add(
        "--out",
        default="samples.png",
        metavar="PATH",
        help=".png: a grid; .npz: uint8; .safetensors: float32; name/, s3://…: shards; -: stdout (samples.png)",
    )
    add("--gif", metavar="PATH", help="the annealing of the first 64 samples, as the network denoises them")
    add = group.add_mutually_exclusive_group().add_argument
    add("--progress", action=yes_no, help="a bar (default: on a terminal; elsewhere a line now and then)")
    add("--quiet", action="store_true", help="print nothing but errors")

    add = p.add_argument_group("jobs", "For --out FOLDER/. The same command goes on with what is missing.").add_argument
    add("--format", choices=FORMATS, help=f"{', '.join(FORMATS)} (default: png); of --out - too")
    add("--shard-size", type=at_least(1), metavar="N", help="sample ids in a shard (default: 256)")
    add(
        "--worker",
        metavar="I/K",
        help="take share I of K (default: as torchrun, Slurm or Kubernetes says, else everything)",
    )
    add("--steal", action="store_const", const=True, help="then draw what other workers have not written yet")
    add_ray(add)
    p.set_defaults(run=sample)


def sample(args: argparse.Namespace) -> int:
    """``sgm sample``: whatever can be refused is refused before the first network evaluation."""
    with bad_input():
        job = jobs.wanted(args)
    if job:
        return jobs.sample(args)
    with bad_input():
        ids, out, gif = _targets(args)
        engine, plan, weights, loaded = _engine(args)
        cpu_or_gpu = processor(engine.device)
        if gif or out.form == "grid":
            from sgm_engine.outputs.images import check_channels

            check_channels(engine.shape[0])
        samples = _memory(len(ids), engine.shape)

    from sgm_engine.cli.film import Film
    from sgm_engine.plans.report import start_words

    bar = False if args.quiet or args.progress is False else "bar" if args.progress else True
    film = Film(ids[:FILMED], plan, engine.shape, data_range=engine.data_range) if gif else None
    parts = [(ids[:FILMED], film), (ids[FILMED:], None)] if gif else [(ids, None)]
    drawn, diverged = [], []
    start = time.perf_counter()
    for part, callback in parts:
        for sample_id, x in engine.stream(
            part, args.seed, plan, callback, bar if len(part) else False, diverged.append
        ):
            samples[len(drawn)] = x.cpu()
            drawn.append(sample_id)
    seconds = time.perf_counter() - start

    if diverged and not drawn:
        return complain(
            DIVERGED, f"all {len(diverged)} samples became non-finite, nothing is written: {some(diverged)}"
        )
    how = f"{engine.numerics} on {cpu_or_gpu}, executor {engine.executor}, batch {engine.batch}"
    about = {"sgm_engine": sgm_engine.__version__, "weights": weights.name, "seed": str(args.seed), "how": how}
    about |= {"plan": plan.to_json()} | ({"float8": engine.float8.to_json()} if engine.float8 else {})
    out.write(samples[: len(drawn)], drawn, about, engine.data_range)
    if film:
        film.save(gif, drawn)
    if not args.quiet:
        speed, nfe = len(drawn) / seconds, plan.nfe
        lines = [
            f"{len(drawn)} samples in {seconds:.2f} s: {rate(speed)} samples/s, {nfe} NFE a sample, "
            f"{rate(speed * nfe)} NFE/s",
            shown(f"weights: {loaded}"),
            plan_line(plan),
            shown(f"start: {start_words(plan)}{assumed(engine.model)}"),
            f"how: {how}",
            f"written: {out}" + (f" and {gif}" if gif else ""),
        ]
        print("\n".join(lines), file=sys.stderr if args.out == STREAM else sys.stdout)
    if diverged:
        return complain(DIVERGED, f"{len(diverged)} samples became non-finite and are left out: {some(diverged)}")
    return DONE


def _targets(args: argparse.Namespace):
    """(sample ids, Output, path of the GIF or None), all checked."""
    from sgm_engine.files.writing import check_writable
    from sgm_engine.outputs.output import Output, Stream

    ids = range(args.n) if args.ids is None else args.ids
    out = Stream.of(args.format or "png") if args.out == STREAM else Output.parse(args.out)
    gif = Path(args.gif).expanduser() if args.gif else None
    if not ids and (gif or out.form == "grid"):
        raise ValueError("argument --n: a picture needs at least 1 sample, got 0")
    out.check()
    if gif:
        if gif.suffix.lower() != ".gif":
            raise ValueError(f"argument --gif: must end in .gif, got {args.gif!r}")
        check_writable(gif)
    return ids, out, gif


def _memory(n: int, shape: tuple[int, int, int]):
    """float32 [n, C, H, W] for samples that go into one file; ValueError if the machine has no such memory."""
    import numpy as np

    try:
        return np.empty((n, *shape), np.float32)
    except (MemoryError, ValueError):
        size = n * 4 * math.prod(shape) / 2**30
        raise ValueError(f"{n} samples for one file are {size:.3g} GiB: take --out FOLDER/, for shards") from None


def _engine(args: argparse.Namespace):
    """(Engine, Plan, path of the weights, what was loaded in words)."""
    from sgm_engine.engine.engine import Engine

    model, plan, weights, float8, loaded = chosen_model(args)
    device = device_of(args.device)
    return Engine(model, args.batch, device, args.precision, args.executor, float8=float8), plan, weights, loaded
