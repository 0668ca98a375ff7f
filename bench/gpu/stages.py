"""Stages of a run, and the files that they end in."""

from __future__ import annotations

import datetime
import json
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

Row = dict[str, object]


@dataclass
class Stage:
    """What a stage came to. failed: a sentence, or None."""

    name: str
    seconds: float = 0.0
    failed: str | None = None
    rows: list[Row] = field(default_factory=list)


def run_stages(stages: dict[str, Callable[[], list[Row]]], say: Callable[[str], None] = print) -> list[Stage]:
    """Run every stage; an exception ends its stage, not the run. A row with "failed" set fails its stage."""
    done = []
    for name, function in stages.items():
        stage, began = Stage(name), time.perf_counter()
        try:
            stage.rows = function()
            bad = [f"{row.get('case', '?')}: {row['failed']}" for row in stage.rows if row.get("failed")]
            stage.failed = "; ".join(bad) or None
        except Exception as error:
            traceback.print_exc()
            stage.failed = f"{type(error).__name__}: {error}"
        stage.seconds = round(time.perf_counter() - began, 1)
        say(f"{name}: {stage.failed or 'passed'} ({stage.seconds} s)")
        done.append(stage)
    return done


def write_results(folder: Path, machine: Row, stages: list[Stage], today: datetime.date) -> Path:
    """DATE-GPU.json and DATE-GPU.md in folder; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{today.isoformat()}-{re.sub('[^a-z0-9]+', '-', str(machine['gpu']).lower()).strip('-')}"
    record = {"date": today.isoformat(), "machine": machine, "stages": [asdict(stage) for stage in stages]}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"# {machine['gpu']}, {today.isoformat()}", "", *(f"- {k}: {v}" for k, v in machine.items()), ""]
    for stage in stages:
        lines += [f"## {stage.name}: {'failed' if stage.failed else 'passed'} ({stage.seconds} s)", ""]
        lines += [f"**{stage.failed}**", ""] if stage.failed else []
        lines += table(stage.rows)
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines))
    return path


def table(rows: list[Row]) -> list[str]:
    """Markdown; the columns are the keys of all rows, in the order in which they come."""
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cell = lambda v: f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v).replace("|", "/")  # noqa: E731
    body = [f"| {' | '.join(cell(row.get(c)) for c in columns)} |" for row in rows]
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *body, ""]
