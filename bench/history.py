"""Ratios by commit: ``python -m bench.history`` draws what ``pytest bench/ --base REV --keep`` has written.

A file of bench/results/base is one comparison. The speed of a commit is its base's times its ratio, and 1 where nothing
is known of the base, so that many small steps add up to a line that rises.
"""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys
from pathlib import Path

from bench.compare import Row
from sgm_engine.programs.arguments import Program

FOLDER = Path(__file__).resolve().parent / "results" / "base"
DRIFTED = 1.05


def keep(rows: list[Row], base: str) -> Path:
    """One comparison as a file; of the same two commits, the last one stays."""
    git = ["git", "-C", str(FOLDER.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    head = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    ratios = {row.name: round(row.ratio, 4) for row in rows if math.isfinite(row.ratio)}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{base[:12]}-{head[:12]}{'-dirty' if head.endswith('dirty') else ''}.json"
    file.write_text(json.dumps({"date": date, "base": base, "head": head, "ratios": ratios}, indent=1) + "\n")
    return file


def lines(kept: list[dict]) -> dict[str, list[tuple[str, float]]]:
    """workload → (commit, time over that of the first commit known), in the order of dates."""
    found: dict[str, list[tuple[str, float]]] = {}
    for comparison in sorted(kept, key=lambda c: c["date"]):
        for name, ratio in comparison["ratios"].items():
            line = found.setdefault(name, [])
            before = next((level for commit, level in reversed(line) if commit == comparison["base"]), None)
            if before is None:
                before = 1.0
                line.append((comparison["base"], before))
            line.append((comparison["head"], before * ratio))
    return found


def draw(found: dict[str, list[tuple[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    for name, line in sorted(found.items(), key=lambda item: -item[1][-1][1]):
        axes.plot([level for _, level in line], marker=".", label=f"{line[-1][1]:.3f} {name}")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(xlabel="commits compared", ylabel="time over the first commit's")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Exit status 1 if a workload has drifted above 1.05 in all."""
    kept = [json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))]
    if not kept:
        print(f"nothing is kept in {FOLDER}: pytest bench/ --base REV --keep", file=sys.stderr)
        return 2
    found = lines(kept)
    draw(found, FOLDER.parent / "base.png")
    drifted = [f"{line[-1][1]:.3f} {name}" for name, line in found.items() if line[-1][1] > DRIFTED]
    print(f"{len(kept)} comparisons of {len(found)} workloads: {FOLDER.parent / 'base.png'}")
    print("\n".join(["slower than at the first commit:", *drifted]) if drifted else "none has drifted above 1.05")
    return int(bool(drifted))


if __name__ == "__main__":
    Program("bench.history", __doc__).parse_args()
    sys.exit(main())
