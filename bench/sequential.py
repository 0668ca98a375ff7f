"""Is the median of a stream of ratios above a bound? Bounds that hold whenever one stops looking.

Whether a ratio lies above m is a coin. While the median is at most m, its odds are at most even, whatever came before,
so a bet on "above" at even odds never grows on average: that it ever multiplies by 1/α has a probability of at most α
(Ville 1939). Nothing is assumed about the noise. Where fresh processes and a random order make the two trees
interchangeable, an unchanged program's coin at m = 1 is even, however the machine's speed drifts. A burst moves the
coins that it meets, however large it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence


def evidence(above: int, pairs: int) -> float:
    """What a stake of 1 on "above" has become after that many of ``pairs`` coins fell so, at even odds.

    The stake is spread evenly over the coins p in (1/2, 1):
    2ⁿ⁺¹·∫ pᵏ(1 − p)ⁿ⁻ᵏ dp = Σ_{j ≤ k} C(n + 1, j) / ((n + 1)·C(n, k)), all in whole numbers.
    """
    return sum(math.comb(pairs + 1, j) for j in range(above + 1)) / ((pairs + 1) * math.comb(pairs, above))


@functools.cache
def needed(pairs: int, alpha: float) -> int:
    """The fewest coins above, of ``pairs``, that multiply the stake by 1/alpha; pairs + 1 if all are too few."""
    return next((k for k in range(pairs // 2, pairs + 1) if evidence(k, pairs) >= 1 / alpha), pairs + 1)


def bounds(ratios: Sequence[float], alpha: float) -> tuple[float, float]:
    """Below and above the median, each ever wrong with probability alpha at most; (0, ∞) while nothing is known."""
    k, ordered = needed(len(ratios), alpha), sorted(ratios)
    return (0.0, math.inf) if k > len(ordered) else (ordered[-k], ordered[k - 1])
