"""Where the compiled module is: beside this file, in an installation that a clone stands before, or nowhere."""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from os import path

NOT_BUILT = (
    "the C++ of sgm_engine is not built in {}: `pip install -e .` builds it there, `pip install .` for other folders"
)


def built(package: str) -> bool:
    """Whether a folder sgm_engine/ has the compiled module of this Python."""
    return any(path.isfile(path.join(package, f"_C{suffix}")) for suffix in EXTENSION_SUFFIXES)


def elsewhere(package: str) -> str | None:
    """The folder of an installed sgm_engine further down on sys.path; a warning says that it is taken.

    Python puts the folder that it is started in first: in a clone, ``import sgm_engine`` finds the sources.
    """
    for entry in sys.path:
        other = path.join(path.abspath(entry or "."), "sgm_engine")
        if path.isfile(path.join(other, "__init__.py")) and not path.samefile(other, package) and built(other):
            warnings.warn(
                f"the C++ of the source tree {path.dirname(package)} is not built, so the installation in {other} is "
                "used, not these sources: `pip install -e .` builds it here",
                stacklevel=3,
            )
            return other
    return None
