"""What every sub-command of ``sgm`` shares: exit codes, one line on stderr, and signals."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sgm_engine.cli.arguments import BadInput

DONE, FAULT, USAGE, DIVERGED, BUSY, DAMAGED, INTERRUPTED, UNREAD, TERMINATED = 0, 1, 2, 3, 4, 5, 130, 141, 143
DEBUG = bool(os.environ.get("SGM_DEBUG"))  # tracebacks instead of one line


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: it unwinds like Ctrl-C."""


def say(what: object) -> None:
    """One line on stderr, whatever is in it."""
    print(f"sgm: {shown(' '.join(str(what).split()))}", file=sys.stderr, flush=True)


def shown(text: object) -> str:
    """What comes from a file, for a terminal: characters that would steer it are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say_beside_bar(line: str) -> None:
    """One line on stderr, above a bar where one is shown."""
    from tqdm import tqdm

    tqdm.write(shown(line), sys.stderr)
    sys.stderr.flush()


class Heard(logging.Handler):
    """What the library logs: lines on stderr; on a terminal a bar for what takes long, gone when it is done."""

    def __init__(self):
        super().__init__()
        self.terminal, self._barred = sys.stderr.isatty(), False

    def emit(self, record: logging.LogRecord) -> None:
        pace = getattr(record, "pace", None)
        if record.levelno >= logging.INFO:
            if pace is None or not self.terminal:
                say(record.getMessage())
        elif pace is not None:
            self._bar(pace)

    def _bar(self, pace) -> None:
        from tqdm import tqdm

        bar = tqdm.format_meter(pace.n, pace.total, pace.seconds, unit=f" {pace.units}", prefix=pace.doing, ncols=80)
        self._barred = pace.n < pace.total
        print(end=f"\r\033[K{shown(bar) if self._barred else ''}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """An interrupted bar makes room for what is said next."""
        if self._barred:
            print(end="\r\033[K", file=sys.stderr, flush=True)
        super().close()


class Printed(logging.Handler):
    """What a command is there to say: its log on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


@contextmanager
def heard(name: str, handler: logging.Handler, level: int) -> Iterator[None]:
    """The logger ``name`` speaks through ``handler`` alone inside, and as before after it."""
    log = logging.getLogger(name)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
        handler.close()


def complain(code: int, error: object) -> int:
    say(error)
    return code


def plainly(error: BaseException) -> str:
    """What an error says; where memory ran out, what to do about it instead of an allocator's words."""
    if isinstance(error, (MemoryError, RuntimeError)) and "torch" in sys.modules:
        from sgm_engine.errors import out_of_memory

        if out_of_memory(error):
            return "out of memory: take a smaller batch, or leave other programs less"
    return str(error) or type(error).__name__


def rate(per_second: float) -> str:
    """Three digits or more, and no power of ten."""
    return f"{per_second:.3g}" if per_second < 1000 else f"{per_second:.0f}"


def plan_line(plan) -> str:
    """What was sampled with: name, options, evaluations, noise."""
    from sgm_engine.plans.report import plan_words

    return f"plan: {shown(plan_words(plan, 6))}, {plan.nfe} evaluations, σ {plan.sigma[0]:.4g} → {plan.sigma[-1]:.2g}"


def some(things: list) -> str:
    """The first few of them, as text."""
    return ", ".join(map(str, things[:4])) + (", …" if len(things) > 4 else "")


@contextmanager
def bad_input() -> Iterator[None]:
    """Errors in here are the user's to mend: BadInput. That somebody else is at it is none."""
    from sgm_engine.errors import JobBusy

    try:
        yield
    except JobBusy:
        raise
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if DEBUG:
            raise
        raise BadInput(plainly(error)) from error


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt and SIGTERM Terminated, but in no import: amid PyTorch's C++ that aborts."""
    again: list[threading.Timer] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if not _importing(frame):
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        again.append(threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, number)))
        again[-1].daemon = True
        again[-1].start()

    with _handling(handler, [signal.SIGINT, signal.SIGTERM]):
        try:
            yield
        finally:
            for timer in again:
                timer.cancel()


def _importing(frame: FrameType | None) -> bool:
    """Whether a module that the command needs is being imported there."""
    while frame is not None and frame.f_globals.get("__name__") != "sgm_engine.cli.main":
        if frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def stoppable(stop: Callable[[], None]) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM calls ``stop`` and is noted in the list; the second one raises."""
    caught: list[int] = []

    def handler(number, frame) -> None:
        if caught:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        caught.append(number)
        stop()

    with _handling(handler, [signal.SIGINT, signal.SIGTERM]):
        yield caught


@contextmanager
def _handling(handler: Callable, numbers: list[int]) -> Iterator[None]:
    """Python handles signals in the main thread; what the parent has told to be ignored stays ignored."""
    main = threading.current_thread() is threading.main_thread()
    heard = [n for n in numbers if main and signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {n: signal.signal(n, handler) for n in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
