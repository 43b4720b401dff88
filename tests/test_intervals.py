"""Intervals over seeds and problems: the closed form of the bootstrap's variance, coverage, and what pairing gains."""

import numpy as np
import pytest
from scipy.special import stdtrit

from mpd_jax.eval import statistics
from mpd_jax.eval.intervals import compared, resampled_means


def test_the_variance_of_the_resampled_means_is_that_of_the_closed_form():
    """Means over S drawn rows and P drawn columns: (all + (P - 1) rows + (S - 1) columns) / SP, each a variance."""
    rng = np.random.default_rng(0)
    x_SP = rng.normal(size=(3, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(3, 40))
    rows, columns = x_SP.mean(1).var(), x_SP.mean(0).var()
    wanted = (x_SP.var() + 39 * rows + 2 * columns) / 120
    means_N = resampled_means(x_SP[None], 40_000)[0]
    assert means_N.mean() == pytest.approx(x_SP.mean(), abs=4 * np.sqrt(wanted / 40_000))
    assert means_N.var() == pytest.approx(wanted, rel=0.04)


@pytest.mark.parametrize(("of_seeds", "least", "most"), [(0.0, 0.92, 1.0), (0.02, 0.91, 1.0), (0.2, 0.6, 0.85)])
def test_intervals_of_three_seeds_hold_the_truth_as_often_as_their_docstring_says(of_seeds, least, most):
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        effects = of_seeds * rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(1, 200))
        x_SP = 0.5 + effects + 0.3 * rng.normal(size=(3, 200))
        zero = np.zeros_like(x_SP)
        found = compared(x_SP, 1 + zero, zero, 1 + zero, 2.0, resamples=1000).accuracy
        held += found.lower <= 0.5 <= found.upper
    assert least <= held / 200 <= most


def test_one_seed_has_the_interval_of_a_single_evaluation():
    rng = np.random.default_rng(2)
    right_SP, tokens_SP = rng.random((1, 300)) < 0.8, rng.integers(20, 90, (1, 300))
    found = compared(right_SP, tokens_SP, ~right_SP, tokens_SP, 100.0)
    assert found.accuracy[1:] == pytest.approx(statistics.interval(right_SP[0].astype(float), 0, 1), abs=0.005)
    assert found.tokens[1:] == pytest.approx(statistics.interval(tokens_SP[0].astype(float), 0, 100, prior=0), abs=0.5)


def test_differences_are_paired_and_reductions_are_of_the_means():
    rng = np.random.default_rng(3)
    vanilla_SP = rng.random((3, 200)) * rng.random((1, 200))
    tokens_SP = rng.integers(50, 200, (3, 200))
    better_SP = vanilla_SP + 0.125 + 1e-4 * rng.normal(size=(3, 200))
    found = compared(better_SP, tokens_SP / 4, vanilla_SP, tokens_SP, 200.0)
    assert found.accuracy.upper - found.accuracy.lower > 0.04
    assert found.difference.mean == pytest.approx(0.125, abs=1e-4)
    assert found.difference.upper - found.difference.lower < 1e-4
    assert found.reduction == pytest.approx((0.75, 0.75, 0.75))
    unlike = compared(tokens_SP / 400, 30 + 0 * tokens_SP, vanilla_SP, tokens_SP, 200.0).reduction
    assert unlike.mean == pytest.approx(1 - 30 / tokens_SP.mean()) and unlike.lower < unlike.mean < unlike.upper


def test_where_all_is_right_the_interval_is_wilsons():
    ones, z2 = np.ones((3, 50)), stdtrit(49, 0.975) ** 2
    found = compared(ones, ones, ones, ones, 10.0)
    assert found.accuracy == (1.0, pytest.approx(1 - z2 / (50 + z2)), 1.0)
    assert found.difference.lower == pytest.approx(-found.difference.upper) and found.difference.upper > 0.05
