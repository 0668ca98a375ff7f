"""Numbers that are checked as they are read, and the parser of a program of ``python -m``."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)  # argparse takes -1e-5 for an option


class Program(argparse.ArgumentParser):
    """``python -m name``: its help names each default; what cannot be meant is one line and exit code 2.

    doc: the module's, shown above the options.
    """

    def __init__(self, name: str, doc: str):
        super().__init__(prog=f"python -m {name}", description=doc, formatter_class=_Help, allow_abbrev=False)
        self._negative_number_matcher = NEGATIVE

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Errors in here are the user's to mend: of files, of values, or of a package that is missing."""
        try:
            yield
        except ImportError as error:
            self.error(f"{error}: pip install 'sgm-engine[train,plot]'")
        except (ValueError, OSError) as error:
            self.error(str(error))


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        left_open = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        shown = not left_open and "default" not in said
        return f"{said} (default: %(default)s)" if shown else said


def at_least(low: int, high: int | None = None) -> Callable[[str], int]:
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


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value
