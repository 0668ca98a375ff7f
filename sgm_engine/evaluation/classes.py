"""What a classifier says of a set of images, summed as they stream by: Inception-style score and class balance."""

from __future__ import annotations

import numpy as np

from sgm_engine.evaluation.report import Estimate, shifted_estimate

GROUPS, PARTS = 64, 10


class ClassTally:
    """Sums over a stream of logits [b, K], kept apart for 64 groups as in GroupedMoments.

    The score is exp(mean over images of KL(p(y|x) ‖ p(y))) (arXiv 1606.03498), over the whole set at once; ``parts``
    has it as it is published, of ten parts. Only in Inception-v3's logits is it the Inception score.
    """

    def __init__(self, classes: int):
        self.n = np.zeros(GROUPS, np.int64)
        self.probability = np.zeros((GROUPS, classes))  # Σ p
        self.negentropy = np.zeros(GROUPS)  # Σ_images Σ_classes p·log p
        self.counts = np.zeros((GROUPS, classes), np.int64)  # most probable class
        self._tenths = np.zeros((PARTS, classes + 2))  # Σ p, Σ p·log p, how many
        self._seen = 0

    def update(self, logits: np.ndarray) -> None:
        logits = np.asarray(logits, np.float64)
        if logits.ndim != 2 or logits.shape[1] != self.counts.shape[1]:
            raise ValueError(f"logits must be [b, {self.counts.shape[1]}], got {list(logits.shape)}")
        if not np.isfinite(logits).all():
            raise ValueError("logits hold NaN or infinity")
        shifted = logits - logits.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        p = np.exp(log_p)
        group = (self._seen + np.arange(len(p))) % GROUPS
        np.add.at(self.n, group, 1)
        np.add.at(self.probability, group, p)
        np.add.at(self.negentropy, group, (p * log_p).sum(1))
        np.add.at(self.counts, (group, logits.argmax(1)), 1)
        place = self._seen + np.arange(len(p))
        blocks = {b: np.random.default_rng(b).permutation(PARTS) for b in np.unique(place // PARTS).tolist()}
        tenth = np.array([blocks[b][i] for b, i in zip(*divmod(place, PARTS), strict=True)], np.int64)
        np.add.at(self._tenths, tenth, np.column_stack([p, (p * log_p).sum(1), np.ones(len(p))]))
        self._seen += len(p)

    def score(self, replicates: int = 200, seed: int = 0) -> Estimate:
        """Between 1 and K. The interval is a bootstrap over groups."""
        value = self._score(np.ones(GROUPS))
        drawn = np.array([self._score(w) for w in self._weights(replicates, seed)])
        return shifted_estimate(value, drawn, 1.0)

    def parts(self) -> tuple[float, float]:
        """Mean and standard deviation of the scores of ten parts; ValueError of fewer images.

        Of every ten images in a row each part has one, by a fixed shuffle: sets may be sorted by class, or have them in
        turn. A part's own p(y) is nearer to its images than the whole set's: the mean is lower than ``score``.
        """
        if self._seen < PARTS:
            raise ValueError(f"a score of {PARTS} parts needs as many images, got {self._seen}")
        scores = []
        for *total, negentropy, n in self._tenths:
            marginal = np.array(total) / n
            entropy = -(marginal * np.log(np.where(marginal > 0, marginal, 1))).sum()
            scores.append(np.exp(negentropy / n + entropy))
        return float(np.mean(scores)), float(np.std(scores))

    def shares(self) -> np.ndarray:
        """[K]: the share of images whose most probable class is k."""
        return self.counts.sum(0) / max(1, self._seen)

    def imbalance(self, reference: ClassTally, replicates: int = 200, seed: int = 0) -> Estimate:
        """Total variation ½·Σ|share − share of the reference|: 0 is the reference's balance, 1 no class in common."""

        def distance(mine: np.ndarray, other: np.ndarray) -> float:
            a, b = mine @ self.counts, other @ reference.counts
            return float(np.abs(a / a.sum() - b / b.sum()).sum() / 2)

        value = distance(np.ones(GROUPS), np.ones(GROUPS))
        pairs = zip(self._weights(replicates, seed), reference._weights(replicates, seed + 1), strict=True)
        return shifted_estimate(value, np.array([distance(*pair) for pair in pairs]), 0.0)

    def _score(self, weights: np.ndarray) -> float:
        n = weights @ self.n
        marginal = weights @ self.probability / n
        entropy = -(marginal * np.log(np.where(marginal > 0, marginal, 1))).sum()
        return float(np.exp(weights @ self.negentropy / n + entropy))

    def _weights(self, replicates: int, seed: int) -> np.ndarray:
        filled = self.n > 0
        if not filled.any():
            raise ValueError("no image has been tallied")
        weights = np.zeros((replicates, GROUPS))
        k = int(filled.sum())
        weights[:, filled] = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), replicates)
        return weights
