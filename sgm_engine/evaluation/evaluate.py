"""Measure a set of samples against a reference set: what is kept of each set, and the table of figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from torch import Tensor

from sgm_engine.evaluation.classes import PARTS, ClassTally
from sgm_engine.evaluation.distances import mmd, sliced_wasserstein
from sgm_engine.evaluation.features import Extractor
from sgm_engine.evaluation.frechet import frechet
from sgm_engine.evaluation.likelihood import image_bits
from sgm_engine.evaluation.moments import GroupedMoments, check_affordable
from sgm_engine.evaluation.neighbours import nearest, neighbourhood
from sgm_engine.evaluation.report import Estimate, mean_estimate

FROM_LOGITS = ("score", "classes")
METRICS = ("frechet", *FROM_LOGITS, "sliced", "mmd", "precision", "recall", "density", "coverage")
KEPT_VECTORS, KEPT_IMAGES, MMD_VECTORS = 10_000, 1_000, 2_000
FEW = 8  # images of a set that need not have every figure


class Reservoir:
    """A uniform sample, without replacement, of at most ``size`` rows of a stream (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, seed: int = 0):
        self.size, self.seen, self._rng = size, 0, np.random.default_rng(seed)
        self._rows: list[np.ndarray] = []

    def update(self, rows: np.ndarray) -> None:
        for row in rows:
            self.seen += 1
            if len(self._rows) < self.size:
                self._rows.append(row.copy())
            elif (place := int(self._rng.integers(self.seen))) < self.size:
                self._rows[place] = row.copy()

    def rows(self, count: int | None = None) -> np.ndarray:
        """All that is kept, or ``count`` of it at random."""
        rows = np.stack(self._rows)
        if count is None or count >= len(rows):
            return rows
        return rows[np.random.default_rng(self.size).choice(len(rows), count, replace=False)]


class Summary:
    """What is kept of a stream of images: moments and class sums of all, and a reservoir of vectors and of images."""

    def __init__(self, extractor: Extractor, name: str = "samples", seed: int = 0):
        self.extractor, self.name, self.n = extractor, name, 0
        self.moments: GroupedMoments | None = None
        self.tally: ClassTally | None = None
        self.vectors, self.images = Reservoir(KEPT_VECTORS, seed), Reservoir(KEPT_IMAGES, seed + 1)

    def update(self, images: Tensor) -> None:
        """images: uint8 [b, C, H, W]."""
        vectors, logits = self.extractor(images)
        if self.moments is None:
            self.moments = GroupedMoments(vectors.shape[1])
            self.tally = None if logits is None else ClassTally(logits.shape[1])
        self.moments.update(vectors)
        if self.tally is not None:
            self.tally.update(logits)
        self.vectors.update(vectors)
        self.images.update(images.numpy())
        self.n += len(images)


def summarise(
    blocks: Iterable[Tensor], extractor: Extractor, name: str = "samples", seed: int = 0, total: int | None = None
) -> Summary:
    """The summary of blocks of uint8 [b, C, H, W], such as ``ImageSet.blocks()``.

    total: how many images there will be, if that is known: what has no room is then refused at the first block.
    """
    summary = Summary(extractor, name, seed)
    for block in blocks:
        summary.update(block)
        if total is not None:
            check_affordable(summary.moments.dim, total)
    if summary.n < 2:
        raise ValueError(f"{name}: at least 2 images are needed, got {summary.n}")
    return summary


@dataclass
class Row:
    """One figure, an Estimate with a name. floor: the same of as many training images: what a copyist would reach."""

    metric: str
    value: float
    low: float
    high: float
    p: float | None = None
    corrected: float | None = None
    floor: float | None = None


@dataclass
class Report:
    """samples, reference, features: what was compared, in which features; rows: the figures; notes: everything else;
    details: what only the JSON has."""

    samples: str
    n: int
    reference: str
    reference_n: int
    features: str
    rows: list[Row]
    notes: dict[str, object] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        content = asdict(self)
        for row in content["rows"]:  # JSON has no NaN
            row |= {name: None for name, value in row.items() if isinstance(value, float) and np.isnan(value)}
        return json.dumps(content, indent=2, ensure_ascii=False)

    def table(self) -> str:
        """Text: a line a figure."""
        lines = [
            f"{self.n} images ({self.samples}) against {self.reference_n} ({self.reference})",
            f"features: {self.features}",
            f"{'':>22} {'value':>9} {'corrected':>9}  {'95% interval':<20} {'floor':>9}",
        ]
        for row in self.rows:
            floor, corrected = ("" if v is None else f"{v:.4g}" for v in (row.floor, row.corrected))
            p = "" if row.p is None else f"  p = {row.p:.3g}"
            interval = "none" if np.isnan(row.low) else f"{row.low:.4g} … {row.high:.4g}"
            lines.append(f"{row.metric:>22} {row.value:9.4g} {corrected:>9}  {interval:<20} {floor:>9}{p}".rstrip())
        return "\n".join([*lines, *(f"{name}: {_words(value)}" for name, value in self.notes.items())])


def evaluate(
    samples: Summary,
    reference: Summary,
    metrics: Sequence[str] | None = None,
    floor: Summary | None = None,
    k: int = 5,
    replicates: int = 200,
    seed: int = 0,
) -> Report:
    """The figures of ``samples`` against ``reference``, both in the same features.

    metrics: of METRICS, each of which must be had; None takes those that the extractor allows, and of at most FEW
    images says which cannot be had, and why. floor: as many training images (or any others that are as good as can be),
    measured the same way. k: neighbours. replicates: of every bootstrap.
    """
    chosen = metrics is not None
    if metrics is None:
        metrics = [m for m in METRICS if reference.tally is not None or m not in FROM_LOGITS]
    if unknown := [m for m in metrics if m not in METRICS]:
        raise ValueError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(unknown)}")
    if reference.tally is None and (asked := [m for m in metrics if m in FROM_LOGITS]):
        raise ValueError(f"metrics {', '.join(asked)} need features with classes, {reference.extractor.name} have none")
    names = _names(samples.extractor)
    found, lost = _measure(samples, reference, metrics, k, replicates, seed)
    if lost and chosen:
        raise ValueError(next(iter(lost.values())))
    base, _ = _measure(floor, reference, metrics, k, 2, seed) if floor else ({}, {})
    rows = [Row(names.get(m, m), *found[m], floor=base[m].value if m in base else None) for m in metrics if m in found]
    notes: dict[str, object] = {f"{names.get(m, m)} cannot be had": reason for m, reason in lost.items()}
    if samples.tally is not None:
        if "score" in found and samples.n >= PARTS:
            mean, deviation = samples.tally.parts()
            notes[f"{names['score']} of ten parts"] = f"{mean:.4g} ± {deviation:.3g}"
        notes["class shares"] = [round(float(s), 4) for s in samples.tally.shares()]
        notes["class shares of the reference"] = [round(float(s), 4) for s in reference.tally.shares()]
    return Report(samples.name, samples.n, reference.name, reference.n, samples.extractor.name, rows, notes)


def _measure(samples, reference, metrics, k, replicates, seed) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Figures by metric, and of those that such sets do not have the reason."""

    def vectors(count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        return samples.vectors.rows(count), reference.vectors.rows(count)

    def neighbours() -> dict[str, Estimate]:
        size = min(len(rows) for rows in vectors())
        return neighbourhood(*vectors(size), k, replicates, seed)._asdict()

    four = ("precision", "recall", "density", "coverage")
    ways: dict[tuple[str, ...], Callable[[], dict[str, Estimate]]] = {
        ("frechet",): lambda: {"frechet": frechet(samples.moments, reference.moments, interval=replicates > 2)},
        ("score",): lambda: {"score": samples.tally.score(replicates, seed)},
        ("classes",): lambda: {"classes": samples.tally.imbalance(reference.tally, replicates, seed)},
        ("sliced",): lambda: {"sliced": sliced_wasserstein(*vectors(), replicates=replicates, seed=seed)},
        ("mmd",): lambda: {"mmd": mmd(*vectors(MMD_VECTORS), replicates=replicates, seed=seed)},
        four: neighbours,
    }
    found: dict[str, Estimate] = {}
    lost: dict[str, str] = {}
    for names, measure in ways.items():
        wanted = [m for m in names if m in metrics]
        if not wanted:
            continue
        try:
            found |= measure()
        except ValueError as error:
            if min(samples.n, reference.n) > FEW:
                raise
            lost |= dict.fromkeys(wanted, str(error))
    return found, lost


def copies(samples: Summary, reference: Summary, training: Iterable[Tensor]) -> dict[str, object]:
    """Are samples copies? Distances in pixels ([0, 1], Euclidean) to the nearest training image, of at most 1,000
    samples and of as many reference images, which were not trained on and so cannot be copies.

    training: blocks of uint8 [b, C, H, W], read once. closer: the share of samples nearer to a training image than
    99% of the reference images are; 1% is what no copying looks like. nearest, distance: of each sample, in the order
    of ``samples.images.rows(min(samples.n, reference.n))``, the number of its nearest training image and how far it is.
    """
    x, y = (s.images.rows(min(samples.n, reference.n)) for s in (samples, reference))
    both = np.concatenate([x, y]).reshape(len(x) + len(y), -1) / 255
    distance, index = nearest(both, (block.flatten(1).numpy() / 255 for block in training))
    mine, theirs = distance[: len(x)], distance[len(x) :]
    return {
        "samples": _quantiles(mine),
        "reference": _quantiles(theirs),
        "closer": round(float((mine < np.quantile(theirs, 0.01)).mean()), 4),
        "nearest": index[: len(x)].tolist(),
        "distance": np.round(mine, 4).tolist(),
    }


def pairs(samples: Summary, reference: Summary, training: Iterable[Tensor], found: dict, count: int = 16) -> np.ndarray:
    """The ``count`` samples that lie nearest to training images, then those images in the same order.

    found: of ``copies`` of the same sets. uint8 [2·count, H, W, C], the nearest first; count falls to what there is.
    """
    rows = samples.images.rows(min(samples.n, reference.n))
    order = np.argsort(found["distance"], kind="stable")[:count]
    wanted = [found["nearest"][i] for i in order]
    images, start = {}, 0
    for block in training:
        images |= {i: block[i - start].numpy() for i in wanted if start <= i < start + len(block)}
        start += len(block)
    return np.stack([*rows[order], *(images[i] for i in wanted)]).transpose(0, 2, 3, 1)


def bits_per_dimension(
    log_prob: Callable[[Tensor], Tensor], images: Iterable[Tensor], replicates: int = 1000, seed: int = 0
) -> Estimate:
    """Mean bits per dimension of images under ``log_prob``, a density of x in [0, 1] (likelihood.image_bits).

    images: blocks [b, C, H, W] of uint8; they are dequantised by noise of ``seed``.
    """
    return mean_estimate(
        image_bits(log_prob, np.concatenate([block.numpy() for block in images]), seed=seed).numpy(), replicates
    )


def _names(extractor: Extractor) -> dict[str, str]:
    if extractor.inception:
        special = {"frechet": "FID", "score": "Inception score"}
    else:
        special = {"frechet": "Fréchet distance", "score": "classifier score"}
    return special | {"classes": "class imbalance", "sliced": "sliced W1"}


def _quantiles(x: np.ndarray) -> dict[str, float]:
    return {name: round(float(np.quantile(x, q)), 4) for name, q in (("min", 0), ("1%", 0.01), ("median", 0.5))}


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    return " ".join(f"{v:g}" for v in value) if isinstance(value, list) else str(value)
