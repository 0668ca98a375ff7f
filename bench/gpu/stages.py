"""Stages of a run, and the files that they end in."""

from __future__ import annotations

import datetime
import json
import math
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

Row = dict[str, object]
RECORD_S = 5.0
SAID = 1500  # characters that are said of a stage: all of it is in the files


@dataclass
class Stage:
    """What a stage came to. failed: a sentence, or None."""

    name: str
    seconds: float = 0.0
    failed: str | None = None
    rows: list[Row] = field(default_factory=list)

    def summary(self) -> str:
        failed = self.failed or ""
        short = failed if len(failed) <= SAID else f"{failed[:SAID]} … {len(failed) - SAID} characters more"
        return f"{self.name}: {short or 'passed'} ({self.seconds} s, {len(self.rows)} rows)"


class Overrun(BaseException):
    """A stage's time is over. No Exception: a row that fails is recorded and the next one is measured."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Overrun in the main thread when they are over."""

    def stop(*_: object) -> None:
        raise Overrun

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_stages(
    stages: dict[str, Callable[[], Iterable[Row]]],
    say: Callable[[str], None] = print,
    limits: dict[str, float] | None = None,
    seconds: float = math.inf,
    record: Callable[[list[Stage]], object] = list,
) -> list[Stage]:
    """Run every stage; an exception ends its stage, not the run. A row with "failed" set fails its stage.

    limits: seconds of a stage, at most, while others follow; seconds: of them all. What a stage had measured when its
    time was over stays.
    record: called with the stages so far after each of them, and every RECORD_S within one, so that nothing is lost if
    the run is stopped.
    """
    done: list[Stage] = []
    end = time.perf_counter() + seconds
    for name, function in stages.items():
        stage, recorded = Stage(name), (began := time.perf_counter())
        done.append(stage)
        last = len(done) == len(stages)
        limit = min(math.inf if last else (limits or {}).get(name, math.inf), end - began)
        try:
            if limit <= 0:
                raise Overrun
            with time_limit(limit if limit < math.inf else 0), closing(row for row in function()) as rows:
                for row in rows:
                    stage.rows.append(row)
                    if time.perf_counter() - recorded > RECORD_S:
                        recorded = time.perf_counter()
                        stage.seconds = round(recorded - began, 1)
                        record(done)
        except Overrun:
            stage.failed = f"stopped after {max(limit, 0):.0f} s, its share of the time"
        except Exception as error:
            traceback.print_exc()
            stage.failed = f"{type(error).__name__}: {error}"
        bad = [f"{_name(row)}: {row['failed']}" for row in stage.rows if row.get("failed")]
        stage.failed = "; ".join([*bad, *filter(None, [stage.failed])]) or None
        stage.seconds = round(time.perf_counter() - began, 1)
        record(done)
        say(stage.summary())
    return done


def write_results(folder: Path, machine: Row, stages: list[Stage], today: datetime.date) -> Path:
    """DATE-GPU.json and DATE-GPU.md in folder; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{today.isoformat()}-{re.sub('[^a-z0-9]+', '-', str(machine['gpu']).lower()).strip('-')}"
    record = {"date": today.isoformat(), "machine": machine, "stages": [asdict(stage) for stage in stages]}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    lines = [f"# {machine['gpu']}, {today.isoformat()}", "", *(f"- {k}: {v}" for k, v in machine.items()), ""]
    for stage in stages:
        lines += [f"## {stage.name}: {'failed' if stage.failed else 'passed'} ({stage.seconds} s)", ""]
        lines += [f"**{stage.failed}**", ""] if stage.failed else []
        lines += table(stage.rows)
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines))
    return path


def table(rows: list[Row]) -> list[str]:
    """Markdown; the columns are the keys of all rows, in the order in which they come. Rows in a row: tables below."""
    if not rows:
        return []
    nested = {key for row in rows for key, value in row.items() if isinstance(value, list)}
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in nested]
    body = [f"| {' | '.join(_cell(row.get(c)) for c in columns)} |" for row in rows]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *body, ""]
    for row in rows:
        for key in row.keys() & nested:
            lines += [f"### {_name(row)}, {key}", "", *table(row[key])]
    return lines


def _name(row: Row) -> str:
    words = [str(row[key]) for key in ("case", "backend", "batch") if key in row]
    if "cuDNN timed" in row:
        words.append(f"cuDNN {'' if row['cuDNN timed'] else 'not '}timed")
    return " ".join(words) or "?"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else " ".join(str(value).replace("|", "/").split())
