"""The command ``sgm``. Heavy imports live inside functions, so that ``sgm --help`` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

import sgm_engine
from sgm_engine.cli import convert, doctor, eval, jobs, plans, sample, train, tune
from sgm_engine.cli.arguments import BadInput, Parser
from sgm_engine.cli.console import (
    BUSY,
    DEBUG,
    FAULT,
    INTERRUPTED,
    TERMINATED,
    UNREAD,
    USAGE,
    Heard,
    Terminated,
    complain,
    heard,
    interruptible,
    plainly,
    say,
)
from sgm_engine.errors import JobBusy

COMMANDS = (sample, convert, doctor, plans, jobs, train, eval, tune)  # as `sgm --help` lists them
OVERVIEW = """\
examples:
  sgm sample             64 digits from the bundled weights → samples.png
  sgm sample --help      what can be drawn, how, and where to
  sgm doctor             what is installed here, and which backend will run
"""


def main(argv: list[str] | None = None) -> int:
    warnings.showwarning = lambda message, *where: say(f"warning: {message}")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # a terminal without σ shows a question mark
    try:
        listener = Heard()
        with heard("sgm_engine", listener, logging.DEBUG if listener.terminal else logging.INFO), interruptible():
            try:
                args = parser().parse_args(argv)
                return args.run(args)
            finally:
                _flush()
    except BadInput as error:
        return complain(USAGE, error)
    except JobBusy as error:
        return complain(BUSY, error)
    except Terminated:
        return complain(TERMINATED, "terminated; nothing is half-written")
    except KeyboardInterrupt:
        return complain(INTERRUPTED, "interrupted; nothing is half-written")
    except BrokenPipeError:  # `sgm doctor | head -1`: nobody reads on
        return UNREAD
    except ModuleNotFoundError as error:
        if DEBUG:
            raise
        return complain(FAULT, f"there is no module {error.name}: pip install sgm-engine brings it (see `sgm doctor`)")
    except (OSError, MemoryError, RuntimeError, ValueError) as error:  # a full disk, a batch too large, …
        if DEBUG:
            raise
        return complain(FAULT, f"{plainly(error)} (SGM_DEBUG=1 shows where)")


def _flush() -> None:
    """stdout, while it is known what to say if nobody reads it or the disk is full."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so once more as it ends
        raise


class Completion(argparse.Action):
    """Prints what a shell needs to complete the command's words, and ends."""

    def __call__(self, parser, namespace, shell, option=None):
        try:
            import shtab
        except ImportError:
            raise BadInput("--print-completion needs shtab: pip install 'sgm-engine[completion]'") from None
        if shell not in shtab.SUPPORTED_SHELLS:
            raise BadInput(f"--print-completion: must be one of {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}")
        print(shtab.complete(parser, shell))
        parser.exit()


def parser() -> Parser:
    """The parser; ``args.run(args)`` does what was asked for and returns an exit code."""
    top = Parser(prog="sgm", description=sgm_engine.__doc__, epilog=OVERVIEW)
    top.add_argument("--version", action="version", version=f"sgm-engine {sgm_engine.__version__}")
    top.add_argument(
        "--print-completion",
        action=Completion,
        metavar="SHELL",
        help="a script that completes these words (needs shtab)",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.register(commands)
    return top
