"""Intervals hold the truth as often as they say, estimators equal their closed forms, and the paired test is exact.

`python -m tests.test_statistics` prints the table of the README.
"""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpd_jax.eval.statistics import interval, majority, pass_at_k, ratio_interval, sign_flip_test

# Chances of being right: alike on easy problems, spread out, and AIME's kind (mostly all or nothing).
DIFFICULTIES = {"easy": (8.0, 0.5), "spread": (1.0, 1.0), "all or nothing": (0.3, 0.3), "hard": (0.5, 4.0)}
ATTEMPTS = (1, 4, 16)


def accuracies(rng: np.random.Generator, kind: str, problems: int, attempts: int, trials: int):
    """Accuracies by problem of each trial, and the true mean."""
    a, b = DIFFICULTIES[kind]
    chance_NP = rng.beta(a, b, size=(trials, problems))
    return rng.binomial(attempts, chance_NP) / attempts, a / (a + b)


def differences(rng: np.random.Generator, kind: str, problems: int, attempts: int, trials: int):
    """By problem, of two models, the second of which solves one problem in five anew, for better or worse."""
    a, b = DIFFICULTIES[kind]
    before_NP = rng.beta(a, b, size=(trials, problems))
    anew_NP = rng.beta(1.0, 1.0, size=(trials, problems))
    after_NP = np.where(rng.random((trials, problems)) < 0.2, anew_NP, before_NP)
    drawn = [rng.binomial(attempts, chance) / attempts for chance in (before_NP, after_NP)]
    return drawn[1] - drawn[0], 0.2 * (0.5 - a / (a + b))


def lengths(rng: np.random.Generator, kind: str, problems: int, attempts: int, trials: int):
    """Mean tokens of exponential lengths whose means differ by problem, cut at four times the mean of all."""
    means_NP = rng.gamma(4.0, 0.25, size=(trials, problems))
    drawn = np.minimum(rng.exponential(means_NP[..., None], size=(trials, problems, attempts)), 4.0)
    truth = np.minimum(rng.exponential(rng.gamma(4.0, 0.25, size=300_000)), 4.0).mean()
    return drawn.mean(-1), truth


def coverage(values_NP: np.ndarray, truth: float, low: float, high: float, prior: float = 1.0) -> tuple[float, float]:
    """The share of intervals that hold the truth, and their mean width."""
    bounds = np.array([interval(values, low, high, prior) for values in values_NP])
    return float(((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean()), float(np.ptp(bounds, axis=1).mean())


def percentile_coverage(values_NP: np.ndarray, truth: float) -> float:
    """Of the percentile bootstrap over problems, for comparison."""
    rng, (_, problems) = np.random.default_rng(0), values_NP.shape
    shares = rng.multinomial(problems, np.full(problems, 1 / problems), size=1000) / problems
    lower, upper = np.quantile(values_NP @ shares.T, [0.025, 0.975], axis=1)
    return float(((lower <= truth) & (truth <= upper)).mean())


@pytest.mark.parametrize("kind", DIFFICULTIES)
@pytest.mark.parametrize("attempts", ATTEMPTS)
def test_at_500_problems_accuracy_is_covered_as_it_says(kind, attempts):
    held, _ = coverage(*accuracies(np.random.default_rng(1), kind, 500, attempts, 2000), 0.0, 1.0)
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize("kind", DIFFICULTIES)
def test_at_500_problems_differences_and_lengths_are_covered_as_they_say(kind):
    held, _ = coverage(*differences(np.random.default_rng(2), kind, 500, 4, 1500), -1.0, 1.0)
    assert 0.93 <= held <= 0.97
    held, _ = coverage(*lengths(np.random.default_rng(3), kind, 500, 2, 1500), 0.0, 4.0, 0.0)
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize("kind", DIFFICULTIES)
def test_at_30_problems_no_interval_falls_far_short_as_a_percentile_bootstrap_does(kind):
    for attempts in ATTEMPTS:
        values_NP, truth = accuracies(np.random.default_rng(4), kind, 30, attempts, 2000)
        held, _ = coverage(values_NP, truth, 0.0, 1.0)
        assert 0.93 <= held <= 0.99, attempts
    assert percentile_coverage(*accuracies(np.random.default_rng(4), "easy", 30, 1, 2000)) < 0.91


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.floats(0, 1), st.sampled_from([0.0, 1.0]), st.data())
def test_no_interval_has_zero_width_or_leaves_its_bounds(n, value, prior, data):
    values_P = np.full(n, value)
    if data.draw(st.booleans()):
        values_P[0] = data.draw(st.floats(0, 1))
    low, high = interval(values_P, 0.0, 1.0, prior)
    assert 0 <= low <= values_P.mean() + 1e-9 and values_P.mean() - 1e-9 <= high <= 1
    assert low < high


def test_one_attempt_and_all_alike_get_wilsons_interval():
    n, z = 200, 1.9719565442517533  # of Student's t
    for p in (0.0, 0.25, 1.0):
        values = np.repeat([1.0, 0.0], [round(p * n), n - round(p * n)])
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert interval(values, 0.0, 1.0) == pytest.approx((centre - half, centre + half))


def test_an_interval_moves_with_its_scale():
    values = np.random.default_rng(5).random(40)
    assert interval(300 * values - 100, -100, 200) == pytest.approx(300 * np.array(interval(values, 0, 1)) - 100)


def test_a_ratio_of_equal_halves_is_known_and_one_of_noise_is_covered():
    assert ratio_interval(np.ones(9), np.full(9, 4.0)) == (0.25, 0.25, 0.25)
    rng, held = np.random.default_rng(6), 0
    for _ in range(1000):
        right, tokens = rng.random(60) < 0.7, rng.exponential(2.0, 60)
        _, low, high = ratio_interval(right.astype(float), tokens)
        held += low <= 0.35 <= high
    assert 0.92 <= held / 1000 <= 0.97


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_all_choices_of_k_attempts_with_a_right_one(n):
    for correct in range(n + 1):
        attempts = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            chosen = list(itertools.combinations(attempts, k))
            assert pass_at_k(n, correct, k) == pytest.approx(np.mean([any(c) for c in chosen]))
            product = 1.0 if n - correct < k else 1 - math.prod(1 - k / i for i in range(n - correct + 1, n + 1))
            assert pass_at_k(n, correct, k) == pytest.approx(product)  # the form of 2107.03374's code


def test_pass_at_k_is_unbiased():
    n, chance = 6, 0.3
    for k in (1, 2, 6):
        mean = sum(math.comb(n, c) * chance**c * (1 - chance) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - chance) ** k)


@pytest.mark.parametrize(
    ("answers", "correct", "point"),
    [
        (["7", "7", "8"], [True, True, False], 1.0),
        (["7", "8", "8"], [True, False, False], 0.0),
        (["7", "8"], [True, False], 0.5),
        ([None, None, "7"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
    ],
)
def test_the_majority_is_right_or_shares_the_point(answers, correct, point):
    assert majority(answers, correct) == point


def test_the_paired_test_is_mcnemars_exact_one_for_single_attempts():
    for better, worse in ((1, 0), (5, 0), (8, 2), (12, 9)):
        difference_P = np.repeat([1.0, -1.0, 0.0], [better, worse, 40])
        n = better + worse
        tail = sum(math.comb(n, i) for i in range(max(better, worse), n + 1)) / 2**n
        assert sign_flip_test(difference_P) == pytest.approx(min(1.0, 2 * tail), abs=0.02)
    assert sign_flip_test(np.zeros(9)) == 1.0


def test_the_paired_test_of_thousands_of_problems_fits_into_memory():
    tracemalloc.start()
    p = sign_flip_test(np.repeat([1.0, -1.0], [2600, 2400]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert p < 0.02 and peak < 200e6


def test_the_paired_test_rejects_no_difference_as_seldom_as_it_says():
    rng = np.random.default_rng(7)
    p = np.array([sign_flip_test(rng.integers(-4, 5, size=30) / 4) for _ in range(100)])
    assert 0.01 <= np.mean(p <= 0.05) <= 0.11


def show() -> None:
    """The README's table of coverage."""
    print("| problems | attempts | " + " | ".join(DIFFICULTIES) + " |\n" + "|---" * (2 + len(DIFFICULTIES)) + "|")
    for problems, attempts in itertools.product((30, 500), ATTEMPTS):
        cells = []
        for kind in DIFFICULTIES:
            values_NP, truth = accuracies(np.random.default_rng(8), kind, problems, attempts, 4000)
            held, width = coverage(values_NP, truth, 0.0, 1.0)
            cells.append(f"{100 * held:.1f} ({100 * width:.1f}), {100 * percentile_coverage(values_NP, truth):.1f}")
        print(f"| {problems} | {attempts} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    show()
