"""What the commands of ``sgm`` have in common: types of arguments, groups of them, the parser's class. Nothing heavy is
imported here, and no command: ``sgm --help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterator

from sgm_engine.outputs.sample_ids import SampleIds
from sgm_engine.programs.arguments import NEGATIVE, at_least, number, positive

PLANS = ("annealed_langevin", "consistent_annealed", "reverse_diffusion", "ancestral", "ddim")
SAMPLERS = ("ancestral", "reverse_diffusion", "ddim", "euler", "heun", "dpm_solver_2m", "sde_dpm_solver_2m",
            "sa_solver", "predictor_corrector")  # fmt: skip
SCHEDULES = ("geometric", "karras", "linear", "cosine")
EXECUTORS = ("auto", "eager", "native", "hybrid", "graph")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "direct")
FORMATS = ("png", "npz", "safetensors", "webdataset")
STREAM = "-"  # standard output
QUALITIES = ("draft", "good", "best")
PLAN_OPTIONS = ("steps_per_level", "step_lr", "convention", "denoise", "eta", "tau")
MAX_SEED, MAX_ID, MAX_BATCH = 2**64, 2**56, 2**31  # each the first that is too large


class BadInput(Exception):
    """What the user can mend: one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    def __init__(self, *args, **options):
        options |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **options)
        self._negative_number_matcher = NEGATIVE

    def parse_args(self, *args, **options):
        """An empty text is a variable of the shell's that was not set: no default is taken in its place."""
        found = super().parse_args(*args, **options)
        for name, value in vars(found).items():
            if value == "" or (isinstance(value, list) and "" in value):
                raise BadInput(f"argument --{name.replace('_', '-')}: must not be empty")
        return found

    def error(self, message: str):
        raise BadInput(f"{message}{self._meant(message)} (see `{self.prog} --help`)")

    def _meant(self, message: str) -> str:
        """What comes near to a word that is none."""
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = [word.strip(" '") for word in found[2].split(",")]
        elif found := re.search(r"unrecognized arguments: (-[^ =]*)", message):
            known = list(self._all_options())
        else:
            return ""
        near = difflib.get_close_matches(found[1], known, 1)
        return f"; did you mean {near[0]}?" if near else ""

    def _all_options(self) -> Iterator[str]:
        """Those of the commands too: the parser above them reports what is left."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from command._all_options()


def plan_name(text: str) -> str:
    """The name of a plan, or the path of one."""
    if text not in PLANS and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(PLANS)}, or FILE.json, got {text!r}")
    return text


def levels(text: str) -> list[float]:
    """Noise levels, separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, got {text!r}") from None


def sample_ids(text: str) -> SampleIds:
    try:
        if not text:
            raise ValueError("name at least one sample id")
        return SampleIds.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, in {text!r}") from None


def add_engine(group) -> None:
    """What model.engines reads."""
    add_weights(group.add_argument)
    add_execution(group.add_argument)


def add_weights(add: Callable) -> None:
    """What model.load_model reads."""
    add("--checkpoint", metavar="PATH",
        help="weights: a file of any family, a diffusers folder, hf:owner/name (default: bundled, MNIST)")  # fmt: skip
    add("--weights", metavar="NAME", help="bundled weights by name: mnist (an NCSN), cdm_mnist, or how one begins: cdm")
    add("--config", metavar="PATH", help="what came with them: config.yml, score_sde's config .py, ADM's flags")
    add("--image-size", type=at_least(1), metavar="N", help="in pixels, where neither weights nor config say it")
    add(
        "--sigmas",
        type=levels,
        metavar="A,B,…",
        help="noise levels, descending, where neither weights nor config say them",
    )
    add("--data-range", type=number, nargs=2, metavar=("LOW", "HIGH"),
        help="of the data, the network's and that of floating point images, where no file says it: -1 1")  # fmt: skip
    add("--class-labels", type=at_least(0), metavar="N", help="the class to draw, of a network with classes")
    add("--guidance", type=positive, metavar="W", help="towards that class, without a classifier; 1: none (of a CDM)")
    add("--ema", action=argparse.BooleanOptionalAction, help="averaged weights (default: where there are any)")


def add_execution(add: Callable) -> None:
    """How a model is run."""
    add("--batch", type=at_least(1, MAX_BATCH), metavar="N",
        help="samples computed together; bits hold at one batch (default: 16 on a CPU, 128 on a GPU)")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    add_precision(add)
    add("--executor", choices=EXECUTORS, default="auto",
        help="auto: graph (one CUDA graph, replayed) on a GPU; native (C++), hybrid or eager on a CPU")  # fmt: skip


def add_ray(add: Callable) -> None:
    add("--ray", nargs="?", const="local", metavar="ADDRESS",
        help="draw with Ray actors: here, or on the cluster at ray://… (needs the extra [ray])")  # fmt: skip
    add("--actors", type=at_least(1), metavar="N", help="with --ray (default: one for each GPU, or each CPU core)")
    add("--patience", type=at_least(1), metavar="SECONDS",
        help="with --ray: end after so long without an answer, saying what is waited for (default: 3600)")  # fmt: skip


def add_precision(add: Callable) -> None:
    """What float8_choice.chosen_scales reads, and --precision itself."""
    add("--precision", choices=(*PRECISIONS, "float8"), default="float32",
        help="of the network; direct: float32 without Winograd, on a CPU; tf32, float8: on a GPU")  # fmt: skip
    add("--float8", metavar="FILE",
        help="scales of --precision float8, written if FILE is new (default: taken anew, of 16 samples)")  # fmt: skip
    add("--emulate-float8", action="store_true", help="the same numbers on any device, slowly")
