"""What a sample of problems says of all problems: intervals, estimators and a test. Pure numpy; P runs over problems.

Attempts at one problem are no evidence about others, so every interval is over problems: each has its own mean first.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

FLIPS = 10_000  # of the paired test
BLOCK = 2**23  # signs that are flipped at a time


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    lower: float
    upper: float


def interval(values_P: np.ndarray, low: float, high: float, prior: float = 1.0) -> tuple[float, float]:
    """95 % interval of the mean over problems of a quantity between `low` and `high`. Never of zero width.

    Wilson's score interval with as many yes-or-no problems as would tell as much: n m (1 - m) / variance, where m is
    the mean as a share of the range; that is n itself for one attempt a problem. The customary method for proportions
    in clustered samples (Franco et al., J. Surv. Stat. Methodol. 7, 2019), with quantiles of Student's t, because the
    variance is estimated. Where all values are equal, up to z² / (n + z²) of the problems may be of a kind not seen, at
    either bound; for all right or all wrong this is Wilson's interval too.

    prior: problems as unlike as yes and no that are added to the variance alone, against too little spread by chance:
    1 for what is right or wrong, 0 for lengths, whose range is far wider than they spread. Coverage: README, and
    tests/test_statistics.py.
    """
    n, size, z = len(values_P), high - low, float(stdtrit(max(len(values_P) - 1, 1), 0.975))
    mean = min(max((float(np.mean(values_P)) - low) / size, 0.0), 1.0)
    spread, variance = mean * (1 - mean), float(np.var(values_P)) / size**2
    if np.ptp(values_P) <= 1e-9 * size:
        unseen = z**2 / (n + z**2)
        lower, upper = mean - unseen * mean, mean + unseen * (1 - mean)
    else:
        lower, upper = _wilson(mean, n * (n + prior) * spread / (n * variance + prior * spread), z)
    return low + size * lower, low + size * upper


def _wilson(mean: float, n: float, z: float) -> tuple[float, float]:
    centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def ratio_interval(top_P: np.ndarray, bottom_P: np.ndarray) -> tuple[float, float, float]:
    """(mean of `top` over mean of `bottom`, lower, upper), 95 %, by the ratio's linear form (the delta method)."""
    n, ratio = len(top_P), float(np.mean(top_P) / np.mean(bottom_P))
    residual_P = (top_P - ratio * bottom_P) / np.mean(bottom_P)
    half = float(stdtrit(max(n - 1, 1), 0.975) * np.std(residual_P, ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return ratio, ratio - half, ratio + half


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k attempts is right, from n of which `correct` are (2107.03374):
    1 - C(n - correct, k) / C(n, k)."""
    assert 1 <= k <= n and 0 <= correct <= n, (n, correct, k)
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is right: maj@k of one problem (2203.11171). None is no vote; answers with
    equally many votes share the point, and without a vote it is 0."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    first = [answer for answer, count in votes.items() if count == most]
    right = [np.mean([c for a, c in zip(answers, correct, strict=True) if a == answer]) for answer in first]
    return float(np.mean(right))


def sign_flip_test(difference_P: np.ndarray) -> float:
    """The two-sided p-value of "which of the two it was makes no difference", by flipping the signs of the problems'
    differences at random; for one attempt a problem McNemar's exact test. A fixed seed: the same data, the same p."""
    unequal = difference_P[np.abs(difference_P) > 1e-12]
    if not len(unequal):
        return 1.0
    rng = np.random.default_rng(0)
    as_far, rows = 0, max(1, BLOCK // len(unequal))
    for first in range(0, FLIPS, rows):  # all at once would be gigabytes for some ten thousand problems
        size = (min(rows, FLIPS - first), len(unequal))
        signs = rng.integers(0, 2, size=size, dtype=np.int8) * 2.0 - 1.0
        as_far += int(np.sum(np.abs(signs @ unequal) >= abs(unequal.sum()) - 1e-9))
    return (1 + as_far) / (1 + FLIPS)
