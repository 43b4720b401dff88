import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax.sampling.draw import draw

V, ROWS = 12, 4000
LOGITS_V = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)


@jax.jit
def keys(seed):
    return jax.random.bits(jax.random.key(seed), (ROWS, 2), jnp.uint32)


def drawn(logits_V, temperature=1.0, top_p=1.0, top_k=0, truncate=True, seed=0, t=0):
    settings = {"temperature": np.float32(temperature), "top_p": np.float32(top_p), "top_k": np.int32(top_k)}
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V)[None], (ROWS, len(logits_V)))
    draw_jit = jax.jit(draw, static_argnames="truncate")
    return np.asarray(draw_jit(logits_BV, keys(seed), jnp.full(ROWS, t), **settings, truncate=truncate))


def reference(logits_V, temperature=1.0, top_p=1.0, top_k=0):
    """Probabilities after temperature, top-k, then top-p over what top-k left."""
    scaled = logits_V.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or None]
    p = np.exp(scaled[kept] - scaled.max())
    p /= p.sum()
    size = int(np.sum(np.cumsum(p) - p < top_p))
    out = np.zeros(len(scaled))
    out[kept[:size]] = p[:size] / p[:size].sum()
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.8, "top_k": 4, "temperature": 1.5},
    ],
    ids=str,
)
def test_draws_follow_the_truncated_softmax(settings):
    counts = np.bincount(drawn(LOGITS_V, **settings), minlength=V)
    expected = ROWS * reference(LOGITS_V, **settings)
    assert np.all(counts[expected == 0] == 0), "a token outside the kept set was drawn"
    seen = expected > 0
    chi2 = np.sum((counts[seen] - expected[seen]) ** 2 / expected[seen])
    freedom = seen.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4, (chi2, counts, expected)


def test_truncation_that_keeps_everything_draws_the_same_tokens_as_none():
    np.testing.assert_array_equal(drawn(LOGITS_V, truncate=True), drawn(LOGITS_V, truncate=False))


def test_top_k_of_one_and_a_tiny_top_p_are_greedy_even_among_equal_logits():
    logits_V = np.array([0.0, 2.0, 2.0, 1.0], np.float32)
    assert set(drawn(logits_V, top_k=1)) == {1}
    assert set(drawn(logits_V, top_p=1e-6)) == {1}
    assert set(drawn(logits_V, temperature=0.0)) == {1}


def test_draws_follow_the_softmax_across_blocks_of_a_large_vocabulary():
    logits_V = np.random.default_rng(1).normal(0, 2.0, 1000).astype(np.float32)
    groups = np.arange(1000) % 37  # enough draws a cell for the chi-square
    counts = np.bincount(groups[drawn(logits_V, truncate=False)], minlength=37)
    expected = ROWS * np.bincount(groups, weights=reference(logits_V))
    assert np.sum((counts - expected) ** 2 / expected) < 36 + 4 * np.sqrt(72)


def test_a_token_without_mass_is_never_drawn_between_tokens_with_mass():
    logits_V = np.where(np.arange(400) % 3 == 1, 0.0, -np.inf).astype(np.float32)
    assert set(drawn(logits_V, truncate=False) % 3) == {1}


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert set(drawn(np.zeros(6, np.float32), top_k=2)) == {0, 1}


def test_excluded_columns_are_never_drawn_and_do_not_shift_the_others():
    padded_V = np.concatenate([LOGITS_V, np.full(5, -np.inf, np.float32)])
    for truncate in (False, True):
        np.testing.assert_array_equal(drawn(padded_V, truncate=truncate), drawn(LOGITS_V, truncate=truncate))


def test_key_and_position_change_the_draw():
    base = drawn(LOGITS_V, truncate=False)
    assert np.mean(base != drawn(LOGITS_V, truncate=False, seed=1)) > 0.5
    assert np.mean(base != drawn(LOGITS_V, truncate=False, t=1)) > 0.5


def test_greedy_ignores_the_key():
    np.testing.assert_array_equal(drawn(LOGITS_V, temperature=0.0), drawn(LOGITS_V, temperature=0.0, seed=1))
