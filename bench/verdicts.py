"""The table that ``pytest bench/ --base`` ends with."""

from __future__ import annotations

import os
from collections import Counter

from bench.compare import FAIL, Row

ORDER = (*FAIL, "accepted", "undecided", "new", "ok")  # worst first


def line(row: Row) -> str:
    if row.verdict == "new":
        return f"{row.verdict:9}  {row.name:42}  nothing to compare with: {row.note}"
    digits = 0 if row.base == round(row.base) and row.head == round(row.head) else 2 if row.unit == "ms" else 1
    times = f"{row.base:>13,.{digits}f} → {row.head:<13,.{digits}f} {row.unit:2}"
    if row.unit != "ms":
        return f"{row.verdict:9}  {row.name:42} {times}  {row.note}"
    return f"{row.verdict:9}  {row.name:42} {times}  {row.ratio:6.3f} [{row.low:.3f}, {row.high:.3f}]  {row.note}"


def lines(rows: list[Row], commit: str) -> list[str]:
    """Every row, worst first, and a last line that says how many there are of each kind."""
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = Counter(row.verdict for row in rows)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict])
    head = [f"against {commit[:12]}: base → this tree, median ratio [bounds]; load {load} on {cores} cores"]
    return [*head, *map(line, sorted(rows, key=lambda row: ORDER.index(row.verdict))), said]
