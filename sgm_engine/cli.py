"""The command ``sgm``. Heavy imports live inside functions, so that ``sgm --help`` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sgm_engine

DONE, FAULT, USAGE, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130
MAX_ID = 2**56
FILMED = 64  # samples in a GIF
PLANS = ("annealed_langevin", "consistent_annealed", "reverse_diffusion", "ancestral", "ddim")
PLAN_OPTIONS = ("steps_per_level", "step_lr", "convention", "denoise", "eta")

EXAMPLES = """\
examples:
  sgm sample                                      64 digits from the bundled weights → samples.png
  sgm sample --n 1000 --out digits.npz            what FID tools read: `arr_0`, uint8 [N, H, W, C]
  sgm sample --ids 0-63,1000 --out digits/        PNG files; sample 1000 alone has the same noise
  sgm sample --gif annealing.gif                  the picture, and how it came out of the noise
  sgm sample --checkpoint my.safetensors --steps-per-level 50 --step-lr 1e-5 --out my.safetensors

exit codes: 0 done; 1 a fault while running; 2 bad input; 3 some samples diverged (the others are written); 130 Ctrl-C.
What is written appears complete or not at all.
"""


class BadInput(Exception):
    """What the user can mend: one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message} (see `{self.prog} --help`)")


def main(argv: list[str] | None = None) -> int:
    warnings.showwarning = lambda message, *where: _say(f"warning: {message}")
    for stream in (sys.stdout, sys.stderr):  # a terminal without σ shows a question mark
        stream.reconfigure(errors="replace")
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except BadInput as error:
        return _complain(USAGE, error)
    except KeyboardInterrupt:
        return _complain(INTERRUPTED, "interrupted; nothing is half-written")
    except OSError as error:  # a full disk, a folder that went away
        if os.environ.get("SGM_DEBUG"):
            raise
        return _complain(FAULT, error)


def _complain(code: int, error: object) -> int:
    _say(error)
    return code


def _say(what: object) -> None:
    """One line on stderr, whatever is in it."""
    print(f"sgm: {' '.join(str(what).split())}", file=sys.stderr)


def _parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="sgm", description=sgm_engine.__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--version", action="version", version=f"sgm-engine {sgm_engine.__version__}")
    parser.set_defaults(run=lambda args: parser.print_help() or USAGE)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    draw = commands.add_parser("sample", help="draw samples", epilog=EXAMPLES, formatter_class=form)
    draw.description = "Draw samples from a score network by annealed Langevin dynamics."
    draw.set_defaults(run=sample)

    what = draw.add_argument_group("what to draw")
    which = what.add_mutually_exclusive_group()
    which.add_argument("--n", type=_count, default=64, metavar="N", help="samples, with ids 0 to N-1 (default: 64)")
    which.add_argument(
        "--ids",
        "--seeds",
        type=_ids,
        metavar="RANGES",
        help="sample ids such as 0-63,100 instead of --n (--seeds is how EDM spells it)",
    )
    what.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="noise is a pure function of (seed, sample id, step), so any sample can be drawn again "
        "by itself, on any machine (default: 0)",
    )
    what.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="weights: .safetensors of this package, or a .pth of NCSN or "
        "NCSNv2 as published (default: the bundled ones, MNIST digits)",
    )
    what.add_argument("--config", metavar="PATH", help="the config.yml that came with a .pth")

    how = draw.add_argument_group("plan", "what is left out comes with the weights")
    how.add_argument(
        "--plan", metavar="NAME", help=f"{', '.join(PLANS)} (default: the weights' own, with their settings)"
    )
    how.add_argument("--steps-per-level", type=_positive, metavar="N", help="network evaluations at each noise level")
    how.add_argument(
        "--step-lr",
        type=float,
        metavar="X",
        help="step size α at the last noise level; times (σ/σ_last)² at the others",
    )
    how.add_argument(
        "--convention",
        choices=["code", "paper"],
        help="x + α·s + √(2α)·z as in NCSN's code, or x + α/2·s + √α·z as in its paper",
    )
    how.add_argument("--denoise", action=argparse.BooleanOptionalAction, help="end with x + σ²·s, a step without noise")
    how.add_argument("--eta", type=float, metavar="X", help="of consistent_annealed: 1 denoises and noises afresh")

    where = draw.add_argument_group("execution")
    where.add_argument(
        "--batch",
        type=_positive,
        metavar="N",
        help="slots computed together; fix it where bits matter (default: 16 on a CPU, 128 on a GPU)",
    )
    where.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    where.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of the network; x stays float32"
    )
    where.add_argument("--executor", choices=["auto", "eager", "graph"], default="auto")

    out = draw.add_argument_group("output")
    out.add_argument(
        "--out",
        default="samples.png",
        metavar="PATH",
        help="x.png: one grid; x.npz: uint8; x.safetensors: float; x/: PNG files (default: samples.png)",
    )
    out.add_argument("--gif", metavar="PATH", help="the annealing of the first samples, as denoised images")
    noise = out.add_mutually_exclusive_group()
    noise.add_argument("--progress", action=argparse.BooleanOptionalAction, help="a bar (default: on a terminal)")
    noise.add_argument("--quiet", action="store_true", help="print errors only")

    turn = commands.add_parser("convert", help="turn a published .pth into a .safetensors that says what it is")
    turn.description = "Turn a .pth of NCSN or NCSNv2 into a .safetensors that holds its configuration."
    turn.add_argument("source", metavar="OLD.pth")
    turn.add_argument("target", metavar="NEW.safetensors")
    turn.add_argument("--config", metavar="PATH", help="the config.yml that came with it")
    turn.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="the averaged weights (default: if there are any)"
    )
    turn.set_defaults(run=convert)

    look = commands.add_parser("doctor", help="say what is installed and which backend runs what, and why")
    look.description = "Say what is installed, which backend will run each op, and why."
    look.add_argument("--json", action="store_true", help="for programs")
    look.set_defaults(run=doctor)
    return parser


def sample(args: argparse.Namespace) -> int:
    """``sgm sample``: whatever can be refused is refused before the first network evaluation."""
    with _bad_input():
        ids, out, gif = _targets(args)
        engine, plan, weights = _engine(args)
        if gif or out.form in ("grid", "folder"):
            from sgm_engine.images import check_channels

            check_channels(engine.shape[0])

    import numpy as np

    from sgm_engine.film import Film

    film = Film(ids[:FILMED], plan, engine.shape) if gif else None
    bar = not args.quiet and (sys.stderr.isatty() if args.progress is None else args.progress)
    samples, drawn, diverged = np.empty((len(ids), *engine.shape), np.float32), [], []
    start = time.perf_counter()
    for part, callback in ((ids[:FILMED], film), (ids[FILMED:], None)) if gif else ((ids, None),):
        for sample_id, x in engine.stream(part, args.seed, plan, callback, bar, diverged.append):
            samples[len(drawn)] = x.cpu()
            drawn.append(sample_id)
    seconds = time.perf_counter() - start

    how = f"{args.precision} on {_place(engine.device)}, executor {engine.executor}, batch {engine.batch}"
    if drawn or not diverged:
        about = {"seed": args.seed, "weights": weights.name, "plan": plan.to_json(), "how": how}
        about["sgm_engine"] = sgm_engine.__version__
        out.write(samples[: len(drawn)], drawn, {key: str(value) for key, value in about.items()})
        if film:
            film.save(gif, drawn)
    if not args.quiet:
        rate = len(drawn) / seconds
        print(
            f"{len(drawn)} samples in {seconds:.2f} s: {rate:.3g} samples/s, "
            f"{plan.nfe} NFE a sample, {rate * plan.nfe:.4g} NFE/s"
        )
        print(f"{_summary(plan)}; {how}")
        print(f"written: {out.path}" + (f", {gif}" if gif else "") if drawn or not diverged else "written: nothing")
    if diverged:
        shown = ", ".join(map(str, diverged[:4])) + (", …" if len(diverged) > 4 else "")
        return _complain(DIVERGED, f"{len(diverged)} of {len(ids)} samples became non-finite and are left out: {shown}")
    return DONE


def convert(args: argparse.Namespace) -> int:
    """``sgm convert``: an original checkpoint → our .safetensors."""
    with _bad_input():
        from sgm_engine import checkpoint
        from sgm_engine.output import check_writable

        check_writable(Path(args.target))
        config = checkpoint.convert(args.source, args.target, config=args.config, ema=args.ema)
    print(
        f"{args.target}: {config.architecture}, {config.channels}×{config.image_size}×{config.image_size}, ngf {config.ngf}"
    )
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


@contextmanager
def _bad_input() -> Iterator[None]:
    """Errors in here are the user's to mend: BadInput. SGM_DEBUG=1 shows where they come from."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if os.environ.get("SGM_DEBUG"):
            raise
        raise BadInput(error) from error


def _targets(args: argparse.Namespace):
    """(sample ids, Output, path of the GIF or None), all checked."""
    from sgm_engine.output import Output, check_writable

    ids = range(args.n) if args.ids is None else args.ids
    out, gif = Output.parse(args.out), Path(args.gif).expanduser() if args.gif else None
    if not ids and (gif or out.form == "grid"):
        raise ValueError("argument --n: a picture needs at least 1 sample, got 0")
    out.check()
    if gif:
        check_writable(gif)
    return ids, out, gif


def _engine(args: argparse.Namespace):
    """(Engine, Plan, path of the weights)."""
    from sgm_engine.bundled import bundled_path, plan_for
    from sgm_engine.checkpoint import load_checkpoint
    from sgm_engine.engine import Engine

    weights = Path(args.checkpoint).expanduser() if args.checkpoint else bundled_path()
    model = load_checkpoint(weights, args.config)
    given = {name: getattr(args, name) for name in PLAN_OPTIONS}
    plan = plan_for(model, args.plan, **{name: value for name, value in given.items() if value is not None})
    device = args.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Engine(model, args.batch, device, args.precision, args.executor), plan, weights


def _place(device) -> str:
    """The processor behind a torch device, in words."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    from sgm_engine import _C

    return f"{device.type} ({_C.isa()}, {_C.num_threads()} threads)"


def _summary(plan) -> str:
    options = ", ".join(f"{name}={value}" for name, value in plan.metadata.items())
    return f"plan {plan.name}({options})"


def _positive(text: str) -> int:
    return _integer(text, 1)


def _count(text: str) -> int:
    return _integer(text, 0)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**64)


def _integer(text: str, low: int, high: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if value < low or (high is not None and value >= high):
        limit = f" and below 2**{high.bit_length() - 1}" if high else ""
        raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, got {value}")
    return value


def _ids(text: str) -> list[int]:
    """ "0-63,100" → [0, …, 63, 100]."""
    ids: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low = _integer(first, 0, MAX_ID)
        high = _integer(last, 0, MAX_ID) if dash else low
        if high < low:
            raise argparse.ArgumentTypeError(f"a range runs from low to high, got {part!r}")
        ids.extend(range(low, high + 1))
    if len(set(ids)) < len(ids):
        raise argparse.ArgumentTypeError(f"names a sample id twice: {text!r}")
    return ids
