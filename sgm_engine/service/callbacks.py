"""What clients hang on their futures runs beside the service's thread: a slow callback holds up nobody else."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

LOG = logging.getLogger("concurrent.futures")  # where a Future says that a callback failed


class Callbacks:
    """What the service's thread would have called gets a thread for each request; others run where they are called."""

    def __init__(self) -> None:
        self.service: threading.Thread | None = None  # the service's thread
        self._put_off: list[Callable[[], object]] = []  # touched by that thread alone
        self._lock, self._threads = threading.Lock(), set[threading.Thread]()

    def call(self, callback: Callable[[Future], object], future: Future) -> None:
        if threading.current_thread() is self.service:
            self._put_off.append(partial(callback, future))
        else:
            callback(future)

    def start(self) -> None:
        """Run what was put off, in its order. Where no thread can start it runs here."""
        if not self._put_off:
            return
        calls, self._put_off = self._put_off, []
        thread = threading.Thread(target=self._run, args=(calls,), name="SamplerService.callback")
        try:
            with self._lock:
                thread.start()
                self._threads = {t for t in self._threads if t.is_alive()} | {thread}
        except RuntimeError:
            self._run(calls)

    def join(self) -> None:
        """Return when all have run; at once if a callback asks, for it would wait for itself."""
        with self._lock:
            threads = set(self._threads)
        if threading.current_thread() not in threads:
            for thread in threads:
                thread.join()

    @staticmethod
    def _run(calls: list[Callable[[], object]]) -> None:
        for call in calls:
            try:
                call()
            except Exception:
                LOG.exception("exception calling callback %r", call)


class ClientFuture(Future):
    def __init__(self, callbacks: Callbacks):
        super().__init__()
        self._callbacks = callbacks

    def add_done_callback(self, fn: Callable[[Future], object]) -> None:
        super().add_done_callback(partial(self._callbacks.call, fn))


def check_process(owner: int) -> None:
    """RuntimeError in a fork of the process ``owner``: threads, and locks that they held, are not in it."""
    if os.getpid() != owner:
        raise RuntimeError(
            "this service was made before a fork, and its thread is in the parent: start processes with spawn, "
            "or make the service in the child"
        )
