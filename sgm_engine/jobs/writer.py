"""The thread that encodes and writes shards while the next one is drawn."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from sgm_engine.jobs.source import Drawn


class Writer:
    """``with Writer(write, on_error) as writer: writer.put(drawn)``; all that was put is written when the block ends.

    At most one shard waits. on_error is called, from the thread, when ``write`` raises; ``put``, ``settle`` and the end
    of the block raise the same error, and what is put after it is dropped.
    """

    def __init__(self, write: Callable[[Drawn], None], on_error: Callable[[], None]):
        self._write, self._on_error = write, on_error
        self._queue: queue.Queue[Drawn | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sgm-writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._thread.is_alive():  # after a fork it is not: it goes on in the parent
            self._queue.put(None)
            self._thread.join()
        if self._error and (kind is None or issubclass(kind, Exception)):
            raise self._error from None

    def put(self, drawn: Drawn) -> None:
        self._raise()
        self._queue.put(drawn)

    def settle(self) -> None:
        """Wait until all that was put is on the disk."""
        self._queue.join()
        self._raise()

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _run(self) -> None:
        while True:
            drawn = self._queue.get()
            if drawn is not None and self._error is None:
                try:
                    self._write(drawn)
                except BaseException as error:
                    self._error = error
                    self._on_error()
            self._queue.task_done()
            if drawn is None:
                return
