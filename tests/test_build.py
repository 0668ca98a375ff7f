"""The built module: nothing compiled for a better CPU can end up as everybody's copy of an inline function."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OBJECTS = sorted(
    (Path(__file__).parent.parent / "build" / f"ninja-{sys.implementation.cache_tag}").glob("*_isa.cpp.*.o")
)


def shared_names(listing: str, isa: str) -> list[str]:
    """Weak symbols (inline functions, templates) of an object that are outside sgm::<isa>."""
    lines = (line.split(maxsplit=1) for line in listing.splitlines())
    found = ((line[0], line[1]) for line in lines if len(line) == 2)
    return [s for kind, s in found if kind in "WVu" and f"sgm::{isa}::" not in s and not s.startswith("DW.ref")]


@pytest.mark.skipif(
    not OBJECTS or shutil.which("nm") is None, reason="needs the objects of a build in this tree, and nm"
)
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: p.name)
def test_no_shared_inline_functions(path):
    listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert listing
    listing = "\n".join(line[17:] for line in listing.splitlines())  # without addresses
    assert shared_names(listing, path.name.split(".")[-2]) == []


def test_a_shared_function_would_be_seen():
    listing = "W std::vector<int>::push_back(int&&)\nW sgm::avx2::f<int>(int)\nT sgm::avx2::g()\n"
    assert shared_names(listing, "avx2") == ["std::vector<int>::push_back(int&&)"]
