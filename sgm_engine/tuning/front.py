"""The outcome of a search on disk: the Pareto front as a table and a picture, and its plans."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sgm_engine.evaluation.report import Estimate
from sgm_engine.files.storage import is_url, staged_folder
from sgm_engine.files.writing import staged, write_file
from sgm_engine.plans.front import Front, Start, recipe_of
from sgm_engine.plans.front import Point as TravellingPoint
from sgm_engine.plans.plan import Plan
from sgm_engine.tuning.search import front

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart by colour-blind readers


@dataclass
class Point:
    """One plan measured on held-out seeds. role: "front", "chosen" or "baseline"."""

    label: str
    nfe: int
    quality: Estimate
    role: str
    plan: Plan | None = None

    @property
    def centre(self) -> float:
        """What the interval is of."""
        return self.quality.value if self.quality.corrected is None else self.quality.corrected


@dataclass
class Outcome:
    """points: by evaluations. measure, reference, n, floor: of the quality; about: how it was searched for."""

    points: list[Point]
    measure: str
    reference: str
    n: int
    floor: float | None
    difference: Estimate | None
    about: dict[str, object]

    @property
    def chosen(self) -> Point:
        return next(point for point in self.points if point.role == "chosen")

    def table(self) -> str:
        """Markdown."""
        lines = [
            f"{self.measure} of {self.n} samples to {self.reference}, held-out seed."
            " Corrected: without the bias of so few samples, and the interval is its own.",
            "",
            f"| NFE | {self.measure} | corrected | 95% interval | plan | |",
            "|---:|---:|---:|---|---|---|",
        ]
        for p in self.points:
            role = {"chosen": "**chosen**", "baseline": "baseline"}.get(p.role, "")
            corrected = "" if p.quality.corrected is None else f"{p.quality.corrected:.3f}"
            interval = f"{p.quality.low:.3g}–{p.quality.high:.3g}"
            lines.append(f"| {p.nfe} | {p.quality.value:.3f} | {corrected} | {interval} | {p.label} | {role} |")
        if self.floor is not None:
            lines.append(f"| | {self.floor:.3f} | | | {self.n} training images | floor |")
        if self.difference is not None:
            d = self.difference
            corrected = f"corrected {d.corrected:.3f} ({d.low:.3f} to {d.high:.3f})"
            lines += ["", f"Chosen minus baseline: {d.value:.3f}, {corrected}."]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        points = [
            {"nfe": p.nfe, "role": p.role, "label": p.label, **p.quality._asdict(),
             "plan": json.loads(p.plan.to_json()) if p.plan else None}
            for p in self.points
        ]  # fmt: skip
        rest = {k: getattr(self, k) for k in ("measure", "reference", "n", "floor", "about")}
        difference = self.difference and self.difference._asdict()
        return json.dumps(rest | {"chosen_minus_baseline": difference, "points": points}, indent=1, ensure_ascii=False)

    def plot(self, path: Path) -> None:
        """Evaluations, logarithmic, against quality; bars are the 95% intervals, each around the figure it is of.

        Where the bias of so few samples is taken out, crosses are the plain values, and the line is that of the floor.
        """
        from matplotlib.ticker import LogFormatter

        figure = _figure()
        axes = figure.add_subplot()
        for role, label, colour, marker in (
            ("front", "front", COLOURS[0], "o"),
            ("chosen", "chosen", COLOURS[1], "s"),
            ("baseline", "baseline", COLOURS[2], "D"),
        ):
            points = [p for p in self.points if p.role == role]
            if points:
                x, y = [p.nfe for p in points], [p.centre for p in points]
                low = [max(0.0, v - p.quality.low) for v, p in zip(y, points, strict=True)]
                high = [max(0.0, p.quality.high - v) for v, p in zip(y, points, strict=True)]
                axes.errorbar(x, y, [low, high], fmt=marker, color=colour, capsize=3, label=label)
        if plain := [p for p in self.points if p.quality.corrected is not None]:
            x, y = [p.nfe for p in plain], [p.quality.value for p in plain]
            axes.plot(x, y, "x", color="0.5", label="with the bias of so few samples")
        if self.floor is not None:
            axes.axhline(self.floor, color="0.5", linestyle=":", label="training images")
        axes.set(xscale="log", xlabel="network evaluations a sample (NFE)", ylabel=f"{self.measure}, {self.n} samples")
        for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            set_formatter(LogFormatter())  # 8, where its default is a power of ten
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        with staged(path) as file:
            figure.savefig(file, format="png", dpi=120)

    def travelling(self, levels, start: Start, precision: str, features: str, command: str) -> Front:
        """What goes into a weights file: the points that no other beats, for a model with these levels [L]."""
        best = front(self.points, lambda p: (p.nfe, p.quality.value))
        points = []
        for p in best:
            *figures, _, corrected = (v if v is None else round(v, 3) for v in p.quality)
            points.append(TravellingPoint(p.nfe, *figures, recipe_of(p.plan, levels, start), corrected))
        seed = int(self.about["held_out_seed"])
        reference = Path(self.reference).name  # where it lies is nobody else's concern
        return Front(points, self.measure, reference, features, precision, command, self.n, seed)

    def write(self, folder: Path | str) -> None:
        """front.md, front.json, front.png and plan.json, the chosen one, in a folder that is there, or under a URL."""
        if is_url(folder):
            with staged_folder(folder) as near:
                self.write(near)
            return
        write_file(folder / "front.md", self.table())
        write_file(folder / "front.json", self.to_json())
        write_file(folder / "plan.json", self.chosen.plan.to_json() + "\n")
        self.plot(folder / "front.png")


def plot_front(front: Front, path: Path) -> None:
    """The front of a weights file as a picture."""
    good = front.named("good")
    points = [
        Point(p.words(), p.nfe, Estimate(p.value, p.low, p.high, None, p.corrected), "chosen" if p is good else "front")
        for p in front.points
    ]
    Outcome(points, front.measure, front.reference, front.n, None, None, {}).plot(path)


def check_plotting() -> None:
    """ValueError if there is nothing to draw with; asked before the search rather than after it."""
    _figure()


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"the picture needs matplotlib ({error}): pip install 'sgm-engine[plot]'") from None
    return Figure(figsize=(6, 4), layout="constrained")


def label(plan: Plan) -> str:
    """A plan in a few words: its name and what decides it."""
    shown = {k: v for k, v in plan.metadata.items() if k not in ("path", "start_shift", "start_scale", "start")}
    words = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    return f"{plan.name}: {', '.join(words)}" if shown else plan.name
