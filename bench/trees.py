"""The two trees of a comparison: a revision, built once and kept in build/base, and the working tree, where it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KEPT = ROOT / "build" / "base"
MOST = 4  # revisions that are kept
BUILD = [sys.executable, "-c", "import setup; setup.build(setup.ROOT)"]
AUTO = "merge base with main"


class CannotCompare(Exception):
    """Something other than speed stands in the way, in one line."""


def run(*command: object, cwd: Path | None = None) -> str:
    """stdout of a command, in ROOT. CannotCompare with the last line that it said."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd or ROOT,
        env=os.environ | {"SGM_WITH_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        raise CannotCompare(f"{' '.join(map(str, command[:4]))} …: {said[-1]}")
    return done.stdout.strip()


def revision(name: str) -> str:
    """The commit of a revision, 40 digits; AUTO: where this branch left main. CannotCompare."""
    if name != AUTO:
        try:
            return run("git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except CannotCompare:
            shallow = run("git", "rev-parse", "--is-shallow-repository") == "true"
            why = " (this clone is shallow: git fetch --deepen 50)" if shallow else ""
            raise CannotCompare(f"--base {name}: there is no such commit here{why}") from None
    for main in ("origin/main", "main"):
        try:
            return run("git", "merge-base", "HEAD", main)
        except CannotCompare:
            continue
    raise CannotCompare("--base: there is no main to compare with: name a revision, such as --base HEAD~1")


def base(commit: str) -> Path:
    """A folder with that commit's source and its C++ built. CannotCompare."""
    needs_builder()
    place = KEPT / f"{commit[:12]}-{sys.implementation.cache_tag}"
    if not place.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT, prefix="part-") as part:
            source = Path(part, "source")
            source.mkdir()
            run("git", "archive", "-o", f"{part}/source.tar", commit)
            run("tar", "-xf", f"{part}/source.tar", "-C", source)
            if same_build(commit):
                for module in (ROOT / "sgm_engine").glob("_C*.so"):
                    shutil.copy2(module, source / "sgm_engine")
            else:
                run(*BUILD, cwd=source)
                shutil.rmtree(source / "build")
            source.rename(place)
    os.utime(place)
    for old in sorted(KEPT.glob("*-*"), key=lambda p: p.stat().st_mtime)[:-MOST]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def same_build(commit: str) -> bool:
    """Whether the working tree's C++ is that commit's, so that its module serves both."""
    return subprocess.run(["git", "diff", "--quiet", commit, "--", "csrc", "setup.py"], cwd=ROOT).returncode == 0


def head() -> Path:
    """The working tree, its C++ up to date. CannotCompare."""
    needs_builder()
    run(*BUILD)
    return ROOT


def kept(base: Path, what: str, make: Callable[[], object]) -> object:
    """``make()`` of the base, or what it was the last time that this bench asked: in a file beside its source."""
    bench = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(HERE.glob("*.py"))))
    file = base / f"count-{what.replace(' ', '-')}-{bench.hexdigest()[:12]}.json"
    if file.exists():
        return json.loads(file.read_text())
    if (found := make()) is not None:
        file.write_text(json.dumps(found))
    return found


def needs_builder() -> None:
    for module in ("pybind11", "ninja"):
        try:
            __import__(module)
        except ImportError:
            raise CannotCompare(f"{module}, which builds the C++, is missing: pip install 'sgm-engine[test]'") from None


def accepted(commit: str) -> dict[str, str]:
    """Patterns of workloads that may be slower, and why: trailers "Slower: PATTERN because REASON" since ``commit``."""
    lines = run("git", "log", "--format=%(trailers:key=Slower,valueonly)", f"{commit}..HEAD").splitlines()
    pairs = (line.partition(" because ") for line in lines if " because " in line)
    return {pattern.strip(): reason.strip() for pattern, _, reason in pairs}
