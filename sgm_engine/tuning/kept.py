"""What a search has measured: a line of JSON for each candidate, in the folder that it claims before all else; or an
object each on object storage, which nobody claims: equal searches put equal figures."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgm_engine.errors import JobBusy
from sgm_engine.files.limits import most_text
from sgm_engine.files.locks import LockFile
from sgm_engine.files.reading import read_bytes
from sgm_engine.files.storage import Prefix, is_url
from sgm_engine.files.writing import append_line, remove

LOG, LOCK = "search.jsonl", ".lock"
FAR, ABOUT = "search", "about.json"
Key = tuple[str, int, int, str]  # "search" or "held out", seed, samples, digest of the plan


class Kept(dict[Key, list]):
    """Figures by Key: what is put in is on the disk, what an earlier run put in is there."""

    def __init__(self, folder: Path | str):
        """folder: on a disk; of FarKept a URL."""
        self.folder, self.about = folder, None
        for text in self._texts():
            self._take(text)

    def begin(self, about: dict[str, object]) -> None:
        """ValueError, saying what differs, if the folder holds the figures of another search than ``about``."""
        about = json.loads(json.dumps(about))
        if self.about is None:
            self.about = self._begin(about)
        changed = [k for k in about | self.about if about.get(k) != self.about.get(k)]
        if changed:
            k = changed[0]
            what = f"{k} was {self.about.get(k)!s:.60} and is now {about.get(k)!s:.60}"
            raise ValueError(f"{self.folder} holds another search: {what}. Ask for the same, or name another folder")

    def __setitem__(self, key: Key, figures: list) -> None:
        super().__setitem__(key, figures)
        what, seed, n, plan = key
        self._put(key, json.dumps({"of": what, "seed": str(seed), "n": n, "plan": plan, "figures": figures}))

    def _take(self, text: str) -> None:
        try:
            entry = json.loads(text)
            if "search" in entry:
                self.about = dict(entry["search"])
            else:
                figures = [v if v is None else float(v) for v in entry["figures"]]
                key = str(entry["of"]), int(entry["seed"]), int(entry["n"]), str(entry["plan"])
                super().__setitem__(key, figures)
        except (ValueError, TypeError, KeyError):  # a kill or a full disk cut it off: it is measured again
            pass

    @property
    def path(self) -> Path:
        return self.folder / LOG

    def _texts(self) -> list[str]:
        if not self.path.exists():
            return []
        text = read_bytes(self.path, most_text()).decode()
        if not text.endswith("\n"):
            append_line(self.path, "")
        return text.splitlines()

    def _begin(self, about: dict[str, object]) -> dict[str, object]:
        append_line(self.path, json.dumps({"search": about}))
        return about

    def _put(self, key: Key, text: str) -> None:
        append_line(self.path, text)


class FarKept(Kept):
    """Under URL/search/: about.json, created only if it is absent, and an object for each figure."""

    def _texts(self) -> list[str]:
        self._prefix = Prefix(self.folder).folder(FAR)
        return [self._prefix.read(name, most_text()).decode() for name in self._prefix.names()]

    def _begin(self, about: dict[str, object]) -> dict[str, object]:
        self._prefix.check_conditional("conditional")
        self._prefix.create(ABOUT, json.dumps({"search": about}).encode())
        return json.loads(self._prefix.read(ABOUT, most_text()))["search"]  # another search may have been first

    def _put(self, key: Key, text: str) -> None:
        self._prefix.write(f"{hashlib.sha256(repr(key).encode()).hexdigest()}.json", text.encode())


@contextmanager
def claimed(folder: Path | str) -> Iterator[Kept]:
    """Hold ``folder``, made if it is not there, for one search: JobBusy if another process does. ValueError if there is
    something else in it. What a search did not begin in is left as it was. A URL is read, and held by nobody."""
    if is_url(folder):
        if (names := Prefix(folder).names()) and FAR not in names:
            raise ValueError(f"{folder} is there already and not empty: name a new prefix")
        yield FarKept(folder)
        return
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
