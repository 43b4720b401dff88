"""Divergences against a target known by its most likely tokens and one tail bucket."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jaxtyping import jaxtyped

from mpd_jax.recipe import fused, loss
from mpd_jax.recipe.loss import LossConfig, fused_divergence
from mpd_jax.types import UserError

fused_bucket_divergence = jaxtyped(typechecker=beartype)(loss.fused_bucket_divergence)

DIVERGENCES = [
    LossConfig("reverse_kl"),
    LossConfig("forward_kl"),
    LossConfig("jsd", teacher_weight=0.3),
    LossConfig("mix", reverse_weight=0.2),
]
KINDS = [loss.kind for loss in DIVERGENCES]
every_divergence = pytest.mark.parametrize("loss", DIVERGENCES, ids=KINDS)
jsd_and_mix = pytest.mark.parametrize("loss", DIVERGENCES[2:], ids=KINDS[2:])  # the mix is of the two other ones


def best(lp_RV, k):
    """The k most likely ids of each row, shuffled, and their log-probabilities."""
    ids_RK = np.argsort(-np.asarray(lp_RV), axis=1, kind="stable")[:, :k]
    ids_RK = np.random.default_rng(k).permuted(ids_RK, axis=1)
    return ids_RK.astype(np.int32), np.take_along_axis(np.asarray(lp_RV), ids_RK, axis=1)


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def divergence64(loss, q, p):
    """Of two arrays of distributions, in float64, as a textbook writes it; 0 log 0 is 0."""

    def kl(a, b):
        return np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / np.where(b > 0, b, 1)), 0).sum(-1)

    if loss.kind == "jsd":
        b = loss.teacher_weight
        m = b * p + (1 - b) * q
        return b * kl(p, m) + (1 - b) * kl(q, m)
    u = {"reverse_kl": 1.0, "forward_kl": 0.0, "mix": loss.reverse_weight}[loss.kind]
    return u * kl(q, p) + (1 - u) * kl(p, q)


def outcomes64(x_RV, ids_RK):
    """Probabilities of the ids, and of all others together."""
    known = np.take_along_axis(x_RV, ids_RK, axis=1)
    rest = x_RV.copy()
    np.put_along_axis(rest, ids_RK, 0.0, axis=1)
    return np.concatenate([known, rest.sum(1, keepdims=True)], axis=1)


@functools.cache
def rows_in_float64(loss):
    def rows(s_RV, ids_RK, lp_RK):
        spec = fused.Spec(loss, None, None, 0, top=True)
        return fused.bucket_divergence(spec, loss, s_RV, ids_RK, lp_RK, jnp.arange(s_RV.shape[1]))[0]

    return jax.jit(jax.vmap(rows, (None, 0, 0)))


@every_divergence
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.01, 12.0), apart=st.floats(0.0, 12.0))
def test_it_is_never_above_the_whole_divergence_and_grows_with_k_until_it_is_equal(loss, seed, spread, apart):
    rng = np.random.default_rng(seed)
    common = spread * rng.normal(size=(4, 11))
    s, t = (common + apart * rng.normal(size=(4, 11)) for _ in range(2))
    lp = log_softmax64(np.clip(t, -6, 6))  # else 1 - the sum of the others rounds the rest, in float64 too
    whole = divergence64(loss, np.exp(log_softmax64(s)), np.exp(lp))
    ids, values = np.full((11, 4, 11), -1), np.full((11, 4, 11), np.nan)  # ids of -1 are no outcomes
    for k in range(1, 12):
        ids[k - 1, :, :k], values[k - 1, :, :k] = best(lp, k)
    with jax.enable_x64(True):
        at = np.asarray(rows_in_float64(loss)(s, ids, values))
    assert at.dtype == np.float64
    slack = 2e-9 * (1 + whole)
    for fewer, more in itertools.pairwise(at):
        assert (fewer <= more + slack).all()
    assert (at[0] >= -slack).all() and (at[-1] <= whole + slack).all()
    np.testing.assert_allclose(at[-1], whole, rtol=1e-9, atol=1e-12)


def problem(R=13, V=29, D=8, E=12, dtype=jnp.float32, seed=0):
    """Hidden states and heads with logits of spread 1.5, uneven weights, one of them 0."""
    k = jax.random.split(jax.random.key(seed), 5)
    h, W = jax.random.normal(k[0], (R, D)), 1.5 * jax.random.normal(k[1], (V, D)) / D**0.5
    ht, Wt = jax.random.normal(k[2], (R, E)), 1.5 * jax.random.normal(k[3], (V, E)) / E**0.5
    weight = jax.random.uniform(k[4], (R,), minval=0.2).at[R // 2].set(0.0)
    return *(x.astype(dtype) for x in (h, W, ht, Wt)), weight / weight.sum()


def target_of(ht, Wt, k, vocab_size=None):
    ids, lp = best(log_softmax64(np.asarray(ht, np.float64) @ np.asarray(Wt, np.float64)[:vocab_size].T), k)
    return jnp.asarray(ids), jnp.asarray(lp, jnp.float32)


def value_and_gradient(form, arrays, argnums=(0, 1), **how):
    def objective(*arrays):
        return form(*arrays, **how)

    (value, stats), gradient = jax.device_get(jax.jit(jax.value_and_grad(objective, argnums, has_aux=True))(*arrays))
    return value, stats, gradient


def close(a, b, relative):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= relative * np.linalg.norm(b), np.linalg.norm(a - b) / np.linalg.norm(b)


def dense_rows(loss, h, W, ids, lp, vocab_size):
    """The rows in plain jnp, differentiable by autodiff."""
    lq = jax.nn.log_softmax(h @ W[:vocab_size].T)
    known = jnp.zeros(lq.shape, bool).at[jnp.arange(len(lq))[:, None], ids].set(True)
    rest = jax.nn.logsumexp(jnp.where(known, -jnp.inf, lq), axis=1)
    lq = jnp.concatenate([jnp.take_along_axis(lq, ids, axis=1), rest[:, None]], axis=1)
    lp = jnp.concatenate([lp, jnp.log(-jnp.expm1(jax.nn.logsumexp(lp, axis=1)))[:, None]], axis=1)
    q, p = jnp.exp(lq), jnp.exp(lp)
    if loss.kind == "jsd":
        b = loss.teacher_weight
        lm = jnp.log(b * p + (1 - b) * q)
        return (b * p * (lp - lm) + (1 - b) * q * (lq - lm)).sum(1)
    u = {"reverse_kl": 1.0, "forward_kl": 0.0, "mix": loss.reverse_weight}[loss.kind]
    row = (u * q * (lq - lp) + (1 - u) * p * (lp - lq)).sum(1)
    return row * jax.lax.stop_gradient(jnp.minimum(1.0, loss.clip / row)) if loss.stabiliser == "rescale" else row


@pytest.mark.parametrize(
    ("loss", "k"),
    [(LossConfig(), 1), *((loss, 6) for loss in DIVERGENCES[1:]), (LossConfig(stabiliser="rescale", clip=0.4), 6)],
    ids=[*KINDS, "reverse_kl-rescale"],
)
def test_value_gradient_and_stats_are_those_of_the_outcomes_in_float64(loss, k):
    h, W, ht, Wt, weight = problem()
    vocab = 25
    ids, lp = target_of(ht, Wt, k, vocab)
    value, stats, gradient = value_and_gradient(
        fused_bucket_divergence, (h, W, ids, lp, weight), loss=loss, vocab_size=vocab
    )
    with jax.enable_x64(True):
        h64, W64, lp64, weight64 = (np.asarray(x, np.float64) for x in (h, W, lp, weight))

        def objective(h, W):
            return (weight64 * dense_rows(loss, h, W, ids, lp64, vocab)).sum()

        want, want_gradient = jax.device_get(jax.jit(jax.value_and_grad(objective, (0, 1)))(h64, W64))
    assert value == pytest.approx(want, rel=2e-6)
    for ours, theirs in zip(gradient, want_gradient, strict=True):
        close(ours, theirs, 2e-5)
    lq = log_softmax64(h64 @ W64[:vocab].T)
    lp = log_softmax64(np.asarray(ht, np.float64) @ np.asarray(Wt, np.float64)[:vocab].T)
    used, (q, p) = np.asarray(weight) != 0, (outcomes64(np.exp(x), np.asarray(ids)) for x in (lq, lp))
    close(stats["loss"], used * divergence64(loss, q, p), 1e-5)
    close(stats["tail_mass"], used * p[:, -1], 1e-5)
    close(stats["student_tail_mass"], used * q[:, -1], 1e-5)
    close(stats["student_entropy"], -1.0 * used * (np.exp(lq) * lq).sum(1), 1e-5)
    close(stats["target_entropy"], -1.0 * used * (p * np.log(p)).sum(1), 1e-5)


@jsd_and_mix
def test_with_the_whole_vocabulary_known_it_is_the_fused_divergence(loss):
    h, W, ht, Wt, weight = problem()
    ids, lp = target_of(ht, Wt, 23, 23)
    ours = value_and_gradient(fused_bucket_divergence, (h, W, ids, lp, weight), loss=loss, vocab_size=23)
    whole = value_and_gradient(fused_divergence, (h, W, ht, Wt, weight), loss=loss, vocab_size=23)
    assert ours[0] == pytest.approx(whole[0], rel=1e-6)
    for a, b in zip((*ours[2], *(ours[1][n] for n in whole[1])), (*whole[2], *whole[1].values()), strict=True):
        close(a, b, 1e-5)
    assert (ours[1]["tail_mass"] == 0).all() and (ours[1]["student_tail_mass"] == 0).all()


def test_a_student_that_is_its_target_has_neither_loss_nor_gradient():
    """Up to what fp32 log-probabilities leave unknown of the tail: they are the target's, and are not read again."""
    h, W, _, _, weight = problem(R=40, V=211, D=16)
    ids, lp = target_of(h, W, 16)
    value, stats, gradient = value_and_gradient(fused_bucket_divergence, (h, W, ids, lp, weight), loss=DIVERGENCES[3])
    assert abs(value) < 1e-7
    assert max(abs(g).max() for g in gradient) < 1e-6
    close(stats["tail_mass"], stats["student_tail_mass"], 1e-5)


ALONG_ONE = pytest.param(DIVERGENCES[2], (1, 1, 8), marks=pytest.mark.slow)


@pytest.mark.parametrize(("loss", "shape"), [(DIVERGENCES[3], (2, 2, 2)), ALONG_ONE], ids=str)
def test_eight_devices_compute_what_one_does(loss, shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))
    h, W, ht, Wt, weight = problem(R=23, V=43, D=16)
    arrays = (h, W, *target_of(ht, Wt, 5, 37), weight)
    one = value_and_gradient(fused_bucket_divergence, arrays, loss=loss, vocab_size=37)
    loss = LossConfig(**{**vars(loss), "chunk": 2})
    ours = value_and_gradient(fused_bucket_divergence, arrays, loss=loss, vocab_size=37, mesh=mesh)
    assert ours[0] == pytest.approx(one[0], rel=1e-6)
    for a, b in zip((*ours[2], *ours[1].values()), (*one[2], *one[1].values()), strict=True):
        close(a, b, 1e-5)
    assert (ours[2][1][37:] == 0).all()


@jsd_and_mix
def test_peaked_targets_and_extreme_logits_stay_finite_and_no_row_is_negative(loss):
    """The target's rest rounds to nothing, or to less; the student's is far below what exp can hold."""
    eye, R = jnp.eye(32), 16
    s = jax.random.uniform(jax.random.key(1), (R, 32), minval=-200.0, maxval=200.0)
    ids = jnp.argsort(-s, axis=1)[:, :4]
    lp = jnp.array([[2e-7, -30.0, -40.0, -9999.0], [-0.5, -1.0, -3.0, -20.0]] * (R // 2))
    value, stats, gradient = value_and_gradient(
        fused_bucket_divergence, (s, eye, ids, lp, jnp.ones(R)), loss=loss, vocab_size=32
    )
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in (*stats.values(), *gradient))
    assert stats["loss"].min() > -1e-5
    assert stats["tail_mass"][::2] == pytest.approx(9.5e-7, rel=0.1)


def test_the_slope_of_a_tail_of_tiny_mass_is_exact():
    """Mass of 1e-12, far below the rounding of 1 - the sum of the others."""
    s = jnp.array([[0.0, 1.0, -28.0, -29.0, -30.0]])
    ids, lp = jnp.array([[1, 0]]), jnp.log(jnp.array([[0.5, 0.25]]))
    eye, one, loss = jnp.eye(5), jnp.ones(1), DIVERGENCES[3]
    _, stats, (slope, _) = value_and_gradient(fused_bucket_divergence, (s, eye, ids, lp, one), loss=loss)
    with jax.enable_x64(True):
        s64, lp64 = np.asarray(s, np.float64), np.asarray(lp, np.float64)
        want = jax.jit(jax.grad(lambda s: dense_rows(loss, s, np.eye(5), ids, lp64, None).sum()))(s64)
    np.testing.assert_allclose(slope, want, rtol=1e-4)
    q = np.exp(log_softmax64(s))
    assert stats["student_tail_mass"][0] == pytest.approx(q[0, 2:].sum(), rel=1e-5)


def test_ids_outside_the_vocabulary_are_the_tail_s():
    h, W, ht, Wt, weight = problem()
    ids, lp = target_of(ht, Wt, 5)
    loss = LossConfig()
    short = value_and_gradient(fused_bucket_divergence, (h, W, ids[:, :3], lp[:, :3], weight), loss=loss)
    for stranger in (-1, 29, 1000):
        more = (h, W, ids.at[:, 3:].set(stranger), lp, weight)
        ours = value_and_gradient(fused_bucket_divergence, more, loss=loss)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, short)


def test_chunks_weights_of_zero_and_cotangents_are_as_in_the_whole_divergence():
    h, W, ht, Wt, weight = problem()
    ids, lp = target_of(ht, Wt, 5)
    value, stats, gradient = value_and_gradient(
        fused_bucket_divergence, (h, W, ids, lp, weight), loss=LossConfig(chunk=13)
    )
    off = weight == 0
    bad = (
        jnp.where(off[:, None], jnp.nan, h),
        W,
        jnp.where(off[:, None], 7, ids),
        lp + jnp.where(off, jnp.nan, 0)[:, None],
    )

    def thrice(*arrays, loss):
        value, stats = fused_bucket_divergence(*arrays, loss=loss)
        return 3.0 * value + sum(x.sum() for x in stats.values()), stats

    _, dirty, (*three, frozen) = value_and_gradient(thrice, (*bad, weight), (0, 1, 3), loss=LossConfig(chunk=4))
    for a, b in zip(three, gradient, strict=True):
        close(a, 3 * b, 1e-5)
    for name, rows in stats.items():
        close(dirty[name], rows, 1e-5)
    assert (stats["tail_mass"][off] == 0).all() and value > 0
    assert (frozen == 0).all()


def test_no_array_of_all_positions_by_all_vocabulary_exists():
    h, W, ht, Wt, weight = problem(R=96, V=101, D=16)
    arrays = (h, W, *target_of(ht, Wt, 4), weight)
    step = jax.value_and_grad(lambda *a: fused_bucket_divergence(*a, loss=LossConfig(chunk=8))[0], (0, 1))
    text = jax.jit(step).lower(*arrays).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)]
    assert max(sizes) < 96 * 101 // 2


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (LossConfig("cross_entropy"), r"recipe\.loss\.kind='cross_entropy'.*divergence"),
        (LossConfig(stabiliser="per_entry"), r"recipe\.loss\.stabiliser='per_entry'.*rescale.*bucket is none"),
    ],
)
def test_what_a_bucket_makes_no_sense_for_is_refused(loss, said):
    h, W, ht, Wt, weight = problem()
    with pytest.raises(UserError, match=said):
        fused_bucket_divergence(h, W, *target_of(ht, Wt, 5), weight, loss=loss)
