"""The table of what bench.plants has tried, with limits for what so few trials tell."""

from __future__ import annotations

import math


def limits(found: int, of: int, error: float = 0.025) -> tuple[float, float]:
    """Clopper and Pearson's, 95%, of the probability that ``found`` of ``of`` shows."""

    def at_least(k: int, p: float) -> float:
        return sum(math.comb(of, j) * p**j * (1 - p) ** (of - j) for j in range(k, of + 1))

    def solve(k: int, wanted: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(k, middle) < wanted else (low, middle)
        return low

    return solve(found, error) if found else 0.0, solve(found + 1, 1 - error) if found < of else 1.0


def table(trials: list[dict]) -> str:
    days, machines = sorted({t["date"][:10] for t in trials}), sorted({t["machine"] for t in trials})
    loads = sorted(t["load"] for t in trials)
    lines = [
        "# What the gate finds of what is planted\n",
        f"`python -m bench.plants`, {days[0]} to {days[-1]}, on {'; '.join(machines)}, with a load of "
        f"{loads[0]:.0f} to {loads[-1]:.0f}. The limits are those of Clopper and Pearson, 95%.\n",
        "| planted | alarms | of trials | probability of an alarm | a trial took, median |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(t["planted"] for t in trials):
        those = [t for t in trials if t["planted"] == name]
        found, took = sum(t["alarm"] for t in those), sorted(t["seconds"] for t in those)[len(those) // 2]
        low, high = limits(found, len(those))
        lines.append(f"| {name} | {found} | {len(those)} | {low:.2f} to {high:.2f} | {took:.0f} s |")
    return "\n".join(lines) + "\n"
