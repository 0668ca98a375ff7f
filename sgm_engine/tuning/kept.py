"""What a search has measured, a line of JSON for each candidate, in the folder that it claims before all else."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgm_engine.errors import JobBusy
from sgm_engine.files.limits import most_text
from sgm_engine.files.locks import LockFile
from sgm_engine.files.reading import read_bytes
from sgm_engine.files.writing import append_line, remove

LOG, LOCK = "search.jsonl", ".lock"
Key = tuple[str, int, int, str]  # "search" or "held out", seed, samples, digest of the plan


class Kept(dict[Key, list]):
    """Figures by Key: what is put in is on the disk, what an earlier run put in is there."""

    def __init__(self, folder: Path):
        self.path, self.about = folder / LOG, None
        if self.path.exists():
            self._read()

    def begin(self, about: dict[str, object]) -> None:
        """ValueError, saying what differs, if the folder holds the figures of another search than ``about``."""
        about = json.loads(json.dumps(about))
        if self.about is None:
            append_line(self.path, json.dumps({"search": about}))
            self.about = about
        changed = [k for k in about | self.about if about.get(k) != self.about.get(k)]
        if changed:
            k = changed[0]
            what = f"{k} was {self.about.get(k)!s:.60} and is now {about.get(k)!s:.60}"
            raise ValueError(
                f"{self.path.parent} holds another search: {what}. Ask for the same, or name another folder"
            )

    def __setitem__(self, key: Key, figures: list) -> None:
        super().__setitem__(key, figures)
        what, seed, n, plan = key
        entry = {"of": what, "seed": str(seed), "n": n, "plan": plan, "figures": figures}
        append_line(self.path, json.dumps(entry))

    def _read(self) -> None:
        text = read_bytes(self.path, most_text()).decode()
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                if "search" in entry:
                    self.about = dict(entry["search"])
                else:
                    figures = [v if v is None else float(v) for v in entry["figures"]]
                    key = str(entry["of"]), int(entry["seed"]), int(entry["n"]), str(entry["plan"])
                    super().__setitem__(key, figures)
            except (ValueError, TypeError, KeyError):  # a kill or a full disk cut it off: it is measured again
                continue
        if not text.endswith("\n"):
            append_line(self.path, "")


@contextmanager
def claimed(folder: Path) -> Iterator[Kept]:
    """Hold ``folder``, made if it is not there, for one search: JobBusy if another process does. ValueError if there is
    something else in it. What a search did not begin in is left as it was."""
    made = not folder.exists()
    if not made and (others := {p.name for p in folder.iterdir()} - {LOCK}) and LOG not in others:
        raise ValueError(f"{folder} is there already and not empty: name a new folder")
    folder.mkdir(exist_ok=True)
    with LockFile(folder / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise JobBusy(f"another process tunes in {folder}: let it finish, or name another folder") from None
            raise ValueError(f"{folder}: this file system cannot lock files ({error.strerror}): name another") from None
        kept = Kept(folder)
        try:
            yield kept
        finally:
            if not kept.path.exists():
                remove(folder / LOCK)
                if made:
                    folder.rmdir()
