"""What the command ``sgm`` understands. Nothing heavy is imported here: ``sgm --help`` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import sgm_engine
from sgm_engine.sample_ids import SampleIds

PLANS = ("annealed_langevin", "consistent_annealed", "reverse_diffusion", "ancestral", "ddim")
SAMPLERS = ("ancestral", "reverse_diffusion", "ddim", "euler", "heun", "dpm_solver_2m", "sde_dpm_solver_2m",
            "predictor_corrector")  # fmt: skip
SCHEDULES = ("geometric", "karras", "linear", "cosine")
EXECUTORS = ("auto", "eager", "native", "hybrid", "graph")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "direct")
FORMATS = ("png", "npz", "safetensors", "webdataset")
PLAN_OPTIONS = ("steps_per_level", "step_lr", "convention", "denoise", "eta")
MAX_SEED, MAX_ID, MAX_BATCH = 2**64, 2**56, 2**31  # each the first that is too large

EXAMPLES = """\
examples:
  sgm sample                               64 digits from the bundled weights, as one picture: samples.png
  sgm sample --gif annealing.gif           and how they came out of the noise
  sgm sample --n 1000 --out digits.npz     what FID tools read: arr_0, uint8 [N, H, W, C]
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

OVERVIEW = """\
examples:
  sgm sample             64 digits from the bundled weights → samples.png
  sgm sample --help      what can be drawn, how, and where to
  sgm doctor             what is installed here, and which backend will run
"""


class BadInput(Exception):
    """What the user can mend: one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **options):
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **options)

    def parse_args(self, *args, **options):
        """An empty text is a variable of the shell's that was not set: no default is taken in its place."""
        found = super().parse_args(*args, **options)
        for name, value in vars(found).items():
            if value == "" or (isinstance(value, list) and "" in value):
                raise BadInput(f"argument --{name.replace('_', '-')}: must not be empty")
        return found

    def error(self, message: str):
        raise BadInput(f"{message} (see `{self.prog} --help`)")


def parser(sample: Callable, convert: Callable, doctor: Callable) -> Parser:
    """The parser; ``args.run(args)`` is one of the functions given here, each of which returns an exit code."""
    from sgm_engine.evaluation import command as eval_command
    from sgm_engine.jobs import command as job_commands
    from sgm_engine.training import command as train_command
    from sgm_engine.tuning import command as tune_command

    top = Parser(prog="sgm", description=sgm_engine.__doc__, epilog=OVERVIEW)
    top.add_argument("--version", action="version", version=f"sgm-engine {sgm_engine.__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add = commands.add_parser
    _sample(add("sample", help="draw samples", epilog=EXAMPLES)).set_defaults(run=sample)
    _convert(add("convert", help="a published .pth → .safetensors")).set_defaults(run=convert)
    _doctor(add("doctor", help="say what is installed, what will run, and why")).set_defaults(run=doctor)
    job_commands.register(commands)
    train_command.register(commands)
    eval_command.register(commands)
    tune_command.register(commands)
    return top


def _sample(p: Parser) -> Parser:
    yes_no = argparse.BooleanOptionalAction
    p.description = "Draw samples from a score network."

    group = p.add_argument_group("what to draw")
    ids = group.add_mutually_exclusive_group().add_argument
    ids("--n", type=_at_least(0, MAX_ID), default=64, metavar="N", help="that many samples, ids 0 to N-1 (default: 64)")
    ids(
        "--ids",
        "--seeds",
        type=_ids,
        metavar="IDS",
        help="these sample ids, such as 0-63,100 (--seeds: EDM's name for it)",
    )
    add = group.add_argument
    add("--seed", type=_at_least(0, MAX_SEED), default=0, metavar="N",
        help="noise depends on (seed, sample id, step) and nothing else (default: 0)")  # fmt: skip
    add(
        "--checkpoint",
        metavar="PATH",
        help="weights, .safetensors or a published .pth (default: bundled, MNIST digits)",
    )
    add("--config", metavar="PATH", help="the config.yml that came with a .pth")

    add = p.add_argument_group("plan", "Whatever is not given here comes with the weights.").add_argument
    add("--plan", type=_plan, metavar="NAME", help=f"{', '.join(PLANS)}; or FILE.json, a plan that was saved")
    add("--sampler", choices=SAMPLERS, metavar="NAME", help=f"few steps, with --nfe: {', '.join(SAMPLERS)}")
    add("--nfe", type=_at_least(1), metavar="N", help="network evaluations a sample, with --sampler")
    add(
        "--schedule", choices=SCHEDULES, metavar="NAME", help=f"of its sigmas: {', '.join(SCHEDULES)} (default: karras)"
    )
    add("--conditioning", choices=("interpolated", "nearest"),
        help="between the model's levels: its norms' rows interpolated (default), or its nearest level")  # fmt: skip
    add("--steps-per-level", type=_at_least(1), metavar="N", help="network evaluations (NFE) at each noise level")
    add("--step-lr", type=float, metavar="X", help="step size α at the last level; α·(σ/σ_last)² at the others")
    add(
        "--convention",
        choices=("code", "paper"),
        help="x + α·s + √(2α)·z (code), or half that α, as NCSN's paper writes",
    )
    add("--denoise", action=yes_no, help="end with x + σ²·s, a step without noise")
    add(
        "--eta", type=float, metavar="X", help="of consistent_annealed (1 denoises and noises afresh) and of ddim (0–1)"
    )

    add = p.add_argument_group("execution").add_argument
    add("--batch", type=_at_least(1, MAX_BATCH), metavar="N",
        help="samples computed together; bits hold at one batch (default: 16 on a CPU, 128 on a GPU)")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    _add_precision(add)
    add("--executor", choices=EXECUTORS, default="auto",
        help="auto: graph (one CUDA graph, replayed) on a GPU; native (C++), hybrid or eager on a CPU")  # fmt: skip

    group = p.add_argument_group("output")
    add = group.add_argument
    add("--out", default="samples.png", metavar="PATH",
        help=".png: one grid; .npz: uint8; .safetensors: float32; name/: shards (default: samples.png)")  # fmt: skip
    add("--gif", metavar="PATH", help="the annealing of the first 64 samples, as the network denoises them")
    add = group.add_mutually_exclusive_group().add_argument
    add("--progress", action=yes_no, help="a bar (default: on a terminal)")
    add("--quiet", action="store_true", help="print nothing but errors")

    add = p.add_argument_group("jobs", "For --out FOLDER/. The same command goes on with what is missing.").add_argument
    add("--format", choices=FORMATS, help=f"{', '.join(FORMATS)} (default: png)")
    add("--shard-size", type=_at_least(1), metavar="N", help="sample ids in a shard (default: 256)")
    add("--worker", metavar="I/K", help="take share I of K (default: from torchrun or a Slurm array, else everything)")
    add("--ray", nargs="?", const="local", metavar="ADDRESS",
        help="draw with Ray actors: here, or on the cluster at ray://… (needs the extra [ray])")  # fmt: skip
    add("--actors", type=_at_least(1), metavar="N", help="with --ray (default: one for each GPU, or each CPU core)")
    return p


def _add_precision(add: Callable) -> None:
    """What float8_choice.chosen_scales reads, and --precision itself."""
    add("--precision", choices=(*PRECISIONS, "float8"), default="float32",
        help="of the network; direct: float32 without Winograd, on a CPU; tf32, float8: on a GPU")  # fmt: skip
    add("--float8", metavar="FILE",
        help="scales of --precision float8, written if FILE is new (default: taken anew, of 16 samples)")  # fmt: skip
    add("--emulate-float8", action="store_true", help="the same numbers on any device, slowly")


def _convert(p: Parser) -> Parser:
    p.description = (
        "Turn a .pth of NCSN or NCSNv2 into a .safetensors that says what it is. Nothing in the .pth is executed."
    )
    p.add_argument("source", metavar="OLD.pth")
    p.add_argument("target", metavar="NEW.safetensors")
    p.add_argument("--config", metavar="PATH", help="the config.yml that came with it")
    p.add_argument("--image-size", type=int, metavar="N", help="in pixels, where neither file nor config says it")
    p.add_argument("--sha256", metavar="HEX", help="digest that OLD.pth must have: finds any damage")
    p.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)"
    )
    return p


def _doctor(p: Parser) -> Parser:
    p.description = "Say what is installed, which backend will run each op, and why."
    p.add_argument("--json", action="store_true", help="for programs")
    return p


def _at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    """A conversion of text to an integer in [low, high)."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
        if value < low or (high is not None and value >= high):
            limit = f" and below 2**{high.bit_length() - 1}" if high else ""
            raise argparse.ArgumentTypeError(f"must be at least {low}{limit}, got {value}")
        return value

    return integer


def _plan(text: str) -> str:
    """The name of a plan, or the path of one."""
    if text not in PLANS and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(PLANS)}, or FILE.json, got {text!r}")
    return text


def _ids(text: str) -> SampleIds:
    try:
        if not text:
            raise ValueError("name at least one sample id")
        return SampleIds.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, in {text!r}") from None
