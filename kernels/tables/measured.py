"""Tables of what was measured offline, as JSON beside the kernels: {device: {case: what is fastest there}}."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")
Table = dict[str, dict[str, Value]]


def read(path: Path, what: str, value: Callable[[object], Value]) -> Table[Value]:
    """value: of what the file holds for a case. ValueError names the file, and what is wrong with it."""
    try:
        found = json.loads(path.read_text())
        return {device: {case: value(v) for case, v in cases.items()} for device, cases in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of {what} ({error}): measure again, or put {{}} there") from error


def write(table: Table[Value], path: Path, plain: Callable[[Value], object]) -> None:
    """Sorted, so that two measurements can be compared line by line."""
    content = {device: {c: plain(v) for c, v in sorted(cases.items())} for device, cases in sorted(table.items())}
    path.write_text(json.dumps(content, indent=1) + "\n")
