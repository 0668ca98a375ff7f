"""A run on object storage: trained in a temporary folder of this machine, and put under its URL at every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgm_engine.files.reading import read_bytes
from sgm_engine.files.storage import Prefix, scratch_folder
from sgm_engine.files.writing import write_file

CONFIG = "config.yaml"


class Mirror:
    """``folder``, and what is under ``url``: each object is put whole, and nothing is locked.

    Two processes with one config put the same bytes. Of two with different ones that begin together the first to put
    config.yaml has the URL.
    """

    def __init__(self, url: str, folder: Path):
        """Reads what a run goes on from. ValueError if something else is under ``url``."""
        self.url, self.folder, self._far = url.rstrip("/"), folder, Prefix(url)
        names = self._far.tree()
        self._begun = CONFIG in names
        if names and not self._begun:
            raise ValueError(f"--out {self.url}: holds something else than a run of this command: name another")
        for name in names:
            if name in (CONFIG, "metrics.csv") or name.startswith(("checkpoints/", "csv/", "tensorboard/")):
                path = self._local(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, self._far.read(name))
        self._put = self._files()

    def _local(self, name: str) -> Path:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise ValueError(f"--out {self.url}: holds {name!r}, which names no file of a run: name another")
        return self.folder / name

    def begin(self) -> None:
        """Puts config.yaml. ValueError if another process has begun a run there since ``url`` was read."""
        config = read_bytes(self.folder / CONFIG)
        if self._begun:
            self._far.write(CONFIG, config)
        elif not self._far.create(CONFIG, config) and self._far.read(CONFIG) != config:
            raise ValueError(f"{self.url}: another run has just begun there: name another")
        self._begun = True

    def put(self) -> None:
        """Put what has changed, then remove what is gone: there is a whole checkpoint at any time."""
        files = self._files()
        for name, state in files.items():
            if self._put.get(name) != state:
                self._far.write(name, read_bytes(self.folder / name))
        for name in self._put.keys() - files.keys():
            self._far.remove(name)
        self._put = files

    def shown(self, text: str) -> str:
        """A message, with the URL in place of the folder."""
        return text.replace(str(self.folder), self.url)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change, by name; what begins with a dot is of this machine."""
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        names = {path.relative_to(self.folder): path.stat() for path in found}
        return {
            name.as_posix(): (stat.st_size, stat.st_mtime_ns)
            for name, stat in names.items()
            if not any(part.startswith(".") for part in name.parts)
        }


@contextmanager
def mirrored(url: str) -> Iterator[Mirror]:
    """A Mirror of ``url`` and of a folder that ends with the block."""
    with scratch_folder() as folder:
        yield Mirror(url, folder)
