"""The command ``sgm``. Heavy imports live inside functions, so that ``sgm --help`` answers at once."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from pathlib import Path

import sgm_engine
from sgm_engine.arguments import BadInput, parser
from sgm_engine.console import (
    BUSY,
    DEBUG,
    DIVERGED,
    DONE,
    FAULT,
    INTERRUPTED,
    TERMINATED,
    UNREAD,
    USAGE,
    Terminated,
    bad_input,
    complain,
    plainly,
    rate,
    say,
    some,
    terminable,
)
from sgm_engine.errors import JobBusy

FILMED = 64  # samples in a GIF


def main(argv: list[str] | None = None) -> int:
    warnings.showwarning = lambda message, *where: say(f"warning: {message}")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # a terminal without σ shows a question mark
    try:
        with terminable():
            args = parser(sample, convert, doctor).parse_args(argv)
            return args.run(args)
    except BadInput as error:
        return complain(USAGE, error)
    except JobBusy as error:
        return complain(BUSY, error)
    except Terminated:
        return complain(TERMINATED, "terminated; nothing is half-written")
    except KeyboardInterrupt:
        return complain(INTERRUPTED, "interrupted; nothing is half-written")
    except BrokenPipeError:  # `sgm doctor | head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so once more as it ends
        return UNREAD
    except (OSError, MemoryError, RuntimeError, ValueError) as error:  # a full disk, a batch too large, …
        if DEBUG:
            raise
        return complain(FAULT, f"{plainly(error)} (SGM_DEBUG=1 shows where)")


def sample(args: argparse.Namespace) -> int:
    """``sgm sample``: whatever can be refused is refused before the first network evaluation."""
    from sgm_engine.jobs import command

    with bad_input():
        job = command.wanted(args)
    if job:
        return command.sample(args)
    with bad_input():
        ids, out, gif = _targets(args)
        engine, plan, weights = _engine(args)
        processor = _processor(engine.device)
        if gif or out.form == "grid":
            from sgm_engine.images import check_channels

            check_channels(engine.shape[0])
        samples = _memory(len(ids), engine.shape)

    from sgm_engine.film import Film

    bar = not args.quiet and (sys.stderr.isatty() if args.progress is None else args.progress)
    film = Film(ids[:FILMED], plan, engine.shape) if gif else None
    parts = [(ids[:FILMED], film), (ids[FILMED:], None)] if gif else [(ids, None)]
    drawn, diverged = [], []
    start = time.perf_counter()
    for part, callback in parts:
        for sample_id, x in engine.stream(part, args.seed, plan, callback, bar and len(part) > 0, diverged.append):
            samples[len(drawn)] = x.cpu()
            drawn.append(sample_id)
    seconds = time.perf_counter() - start

    if diverged and not drawn:
        return complain(
            DIVERGED, f"all {len(diverged)} samples became non-finite, nothing is written: {some(diverged)}"
        )
    options = ", ".join(f"{name}={value}" for name, value in plan.metadata.items())
    how = f"{engine.numerics} on {processor}, executor {engine.executor}, batch {engine.batch}"
    about = {"sgm_engine": sgm_engine.__version__, "weights": weights.name, "seed": str(args.seed), "how": how}
    about |= {"plan": plan.to_json()} | ({"float8": engine.float8.to_json()} if engine.float8 else {})
    out.write(samples[: len(drawn)], drawn, about)
    if film:
        film.save(gif, drawn)
    if not args.quiet:
        speed, nfe = len(drawn) / seconds, plan.nfe
        print(f"{len(drawn)} samples in {seconds:.2f} s: {rate(speed)} samples/s, {nfe} NFE a sample, "
              f"{rate(speed * nfe)} NFE/s")  # fmt: skip
        print(f"plan: {plan.name}({options})")
        print(f"how: {how}")
        print(f"written: {out.path}" + (f" and {gif}" if gif else ""))
    if diverged:
        return complain(DIVERGED, f"{len(diverged)} samples became non-finite and are left out: {some(diverged)}")
    return DONE


def convert(args: argparse.Namespace) -> int:
    """``sgm convert``: an original checkpoint → our .safetensors."""
    with bad_input():
        from sgm_engine import checkpoint
        from sgm_engine.output import check_writable

        check_writable(Path(args.target))
        options = {"config": args.config, "image_size": args.image_size, "ema": args.ema, "sha256": args.sha256}
        config = checkpoint.convert(args.source, args.target, **options)
    shape = f"{config.channels}×{config.image_size}×{config.image_size}"
    print(f"written: {args.target} ({config.architecture}, {shape}, ngf {config.ngf}, {len(config.sigmas)} levels)")
    return DONE


def doctor(args: argparse.Namespace) -> int:
    from sgm_engine.doctor import facts, render

    found = facts()
    if args.json:
        import json

        print(json.dumps(found, indent=2))
    else:
        print(render(found))
    return DONE


def _targets(args: argparse.Namespace):
    """(sample ids, Output, path of the GIF or None), all checked."""
    from sgm_engine.output import Output, check_writable

    ids = range(args.n) if args.ids is None else args.ids
    out, gif = Output.parse(args.out), Path(args.gif).expanduser() if args.gif else None
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
    """(Engine, Plan, path of the weights)."""
    from sgm_engine.engine import Engine

    model, plan, weights, float8 = load_model(args)
    device = device_of(args.device)
    return Engine(model, args.batch, device, args.precision, args.executor, float8=float8), plan, weights


def load_model(args: argparse.Namespace):
    """(model, Plan, path of the weights, scales of float8 or None)."""
    from sgm_engine.bundled import bundled_path
    from sgm_engine.checkpoint import load_checkpoint
    from sgm_engine.float8_choice import chosen_scales
    from sgm_engine.plan_choice import chosen

    weights = Path(args.checkpoint).expanduser() if args.checkpoint else bundled_path()
    model = load_checkpoint(weights, args.config)
    conditioned, plan = chosen(model, args)
    scales = chosen_scales(args, model, device_of(args.device), Path(args.out).expanduser(), args.quiet)
    return conditioned, plan, weights, scales


def device_of(name: str) -> str:
    """--device as PyTorch names it: the GPU of this process where torchrun started several."""
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if rank.isdecimal() and torch.cuda.is_available() else "cuda"


def _processor(device) -> str:
    """The processor behind a torch device, in words."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    from sgm_engine import _C

    return f"{device.type} ({_C.isa()}, {_C.num_threads()} threads)"
