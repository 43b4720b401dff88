"""Intervals over seeds and problems: what a comparison of methods may say of them. Pure numpy.

Seeds and problems are crossed: every seed answers the same held-out problems. So both are resampled, each on its own
(two-level bootstrap; the pigeonhole bootstrap of arXiv 0712.1111), and a method stays beside the untrained student of
the same seed and problem in every draw.
"""

import functools
from typing import NamedTuple

import numpy as np

from mpd_jax.eval import statistics
from mpd_jax.eval.statistics import Interval

RESAMPLES = 10_000


class Compared(NamedTuple):
    """A method beside the untrained student: accuracy, by what it differs, tokens, and the share of tokens saved."""

    accuracy: Interval
    difference: Interval
    tokens: Interval
    reduction: Interval


@functools.lru_cache(maxsize=8)
def _shares(resamples: int, size: int, stream: int) -> np.ndarray:
    """How often each of `size` is drawn, as a share of the draw: (resamples, size). The same at every call."""
    rng = np.random.default_rng([stream, size])
    return (rng.multinomial(size, np.full(size, 1 / size), size=resamples) / size).astype(np.float32)


def resampled_means(values_KSP: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """The means of K quantities over S seeds and P problems in each draw: (K, resamples). All K share the draws."""
    _, seeds, problems = values_KSP.shape
    of_seeds_NS, of_problems_NP = _shares(resamples, seeds, 0), _shares(resamples, problems, 1)
    return np.einsum("ns,ksn->kn", of_seeds_NS.astype(np.float64), values_KSP @ of_problems_NP.T)


def compared(
    accuracy_SP: np.ndarray,
    tokens_SP: np.ndarray,
    vanilla_accuracy_SP: np.ndarray,
    vanilla_tokens_SP: np.ndarray,
    max_tokens: float,
    resamples: int = RESAMPLES,
) -> Compared:
    """Means over S seeds and P problems with 95 % intervals (percentiles of the bootstrap).

    What three seeds can tell: in simulations of 200 problems these intervals hold the truth in 95 to 96 % of the cases
    while seeds move the mean no more than the choice of problems does, in 92 % where they move it 2.4 times as much,
    and in 74 % at ten times, for a bootstrap of three numbers is too narrow. One seed says nothing of others: its
    interval is that of the one trained model. Where all values are equal the bootstrap knows nothing, and
    `statistics.interval` answers.
    """
    values_KSP = np.stack([accuracy_SP, tokens_SP, vanilla_accuracy_SP, vanilla_tokens_SP]).astype(np.float64)
    accuracy, tokens, vanilla_accuracy, vanilla_tokens = values_KSP.mean(axis=(1, 2))
    accuracy_N, tokens_N, vanilla_accuracy_N, vanilla_tokens_N = resampled_means(values_KSP, resamples)
    difference_SP = values_KSP[0] - values_KSP[2]
    return Compared(
        _interval(accuracy, accuracy_N, values_KSP[0], 0.0, 1.0),
        _interval(accuracy - vanilla_accuracy, accuracy_N - vanilla_accuracy_N, difference_SP, -1.0, 1.0),
        _interval(tokens, tokens_N, values_KSP[1], 0.0, max_tokens),
        Interval(float(1 - tokens / vanilla_tokens), *_percentiles(1 - tokens_N / vanilla_tokens_N)),
    )


def _interval(mean: float, means_N: np.ndarray, values_SP: np.ndarray, low: float, high: float) -> Interval:
    if np.ptp(values_SP) <= 1e-9 * (high - low):
        return Interval(float(mean), *statistics.interval(values_SP[0], low, high))
    return Interval(float(mean), *_percentiles(means_N))


def _percentiles(means_N: np.ndarray) -> tuple[float, float]:
    lower, upper = np.quantile(means_N, [0.025, 0.975])
    return float(lower), float(upper)
