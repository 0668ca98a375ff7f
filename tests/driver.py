"""Builds a program of tests/native over csrc/cpu without Python: as it is, or with an edit in a copy."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setup import CSRC, contraction
from setup import isas as isas_of

NATIVE = Path(__file__).parent / "native"
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized")
NOT_LINKED = ("binding", "norm")  # Python's part, and the op that is no part of the executor


class Driver:
    """Drivers built by one compiler with one set of flags in ``folder``.

    isas: of setup.ISAS. main_flags: for a program's own file alone, after ``flags``.
    """

    def __init__(
        self,
        folder: Path,
        flags: Iterable[str] = (),
        isas: Iterable[str] = ("generic",),
        cxx: str = "g++",
        main_flags: Iterable[str] = (),
    ):
        self.folder, self.cxx, self.isas = folder, cxx, set(isas)
        only = ["-DSGM_GENERIC_ONLY"] if set(isas) == {"generic"} else []
        self.flags = ["-std=c++17", "-g", "-pthread", *WARNINGS, *only, *flags]
        self.main_flags, self.built = list(main_flags), False

    def build(self, name: str = "plain", edited: Mapping[str, str] = {}, program: str = "driver") -> Path:
        """The path of tests/native/``program``.cpp, built. edited: file of csrc → its text instead.

        Build the plain one first: others share with it what they do not change.

        Raises CalledProcessError with the compiler's words in stderr.
        """
        folder, plain = self.folder / name, self.folder / "plain"
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "csrc" if edited else CSRC
        if edited:
            shutil.copytree(CSRC, source, dirs_exist_ok=True)
        for file, text in edited.items():
            (source / file).write_text(text)
        headers_too = not all(file.endswith(".cpp") for file in edited)

        def compiled(job: tuple[Path, list[str], str]) -> Path:
            file, flags, stem = job
            same = not headers_too and str(file.relative_to(source)) not in edited
            if same and (edited or self.built):
                return plain / f"{stem}.o"
            run(self.cxx, *self.flags, *flags, f"-I{source}", "-c", file, "-o", folder / f"{stem}.o")
            return folder / f"{stem}.o"

        jobs = []
        for file in sorted((source / "cpu").rglob("*.cpp")):
            stem = str(file.relative_to(source)).replace("/", ".")
            if file.name.startswith(NOT_LINKED):
                continue
            if file.stem.endswith("_isa"):
                for isa, flags in isas_of(file).items():
                    if isa in self.isas:
                        jobs.append((file, [contraction(file), *flags, f"-DSGM_ISA={isa}"], f"{stem}.{isa}"))
            else:
                jobs.append((file, [contraction(file)], stem))
        main = plain / f"main.{program}.o"
        if not main.exists():
            run(self.cxx, *self.flags, *self.main_flags, f"-I{CSRC}", "-c", NATIVE / f"{program}.cpp", "-o", main)
        with ThreadPoolExecutor(cores()) as pool:
            objects = list(pool.map(compiled, jobs))
        self.built = True
        run(self.cxx, *self.flags, main, *objects, "-o", folder / program)
        return folder / program


def changed(file: str, old: str, new: str) -> dict[str, str]:
    """csrc/``file`` with ``old``, which must occur once, become ``new``: for ``build``."""
    text = (CSRC / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"csrc/{file} holds {old!r} {text.count(old)} times: adapt the edit")
    return {file: text.replace(old, new)}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(*command: object, **environment: str) -> str:
    """stdout. Raises CalledProcessError. The tests' own SGM_ISA is none of a driver's, which may hold one set alone."""
    own = {name: value for name, value in os.environ.items() if name != "SGM_ISA"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=own | environment)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout
