"""The fused losses against float64 formulas, the dense reference and the identities they must obey; one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

from mpd_jax.recipe import loss as loss_module
from mpd_jax.recipe.loss import LossConfig, dense_divergence, masked_mean
from mpd_jax.types import UserError

fused_divergence = jaxtyped(typechecker=beartype)(loss_module.fused_divergence)
fused_cross_entropy = jaxtyped(typechecker=beartype)(loss_module.fused_cross_entropy)

DIVERGENCES = [
    LossConfig("reverse_kl"),
    LossConfig("forward_kl"),
    LossConfig("jsd", teacher_weight=0.3),
    LossConfig("mix", reverse_weight=0.2),
]
KINDS = [loss.kind for loss in DIVERGENCES]
STABILISED = [
    LossConfig(kind=loss.kind, teacher_weight=0.3, reverse_weight=0.2, stabiliser=stabiliser, clip=clip)
    for loss in DIVERGENCES
    for stabiliser, clip in (("rescale", 0.3 if loss.kind == "jsd" else 1.5), ("per_entry", 0.05))
]
every_divergence = pytest.mark.parametrize("loss", DIVERGENCES, ids=KINDS)


def problem(R=13, V=29, U=None, D=8, E=12, dtype=jnp.float32, seed=0):
    """Hidden states and heads with logits of spread 1.5, uneven weights, one of them 0."""
    k = jax.random.split(jax.random.key(seed), 5)
    h, W = jax.random.normal(k[0], (R, D)), 1.5 * jax.random.normal(k[1], (V, D)) / D**0.5
    ht, Wt = jax.random.normal(k[2], (R, E)), 1.5 * jax.random.normal(k[3], (U or V, E)) / E**0.5
    weight = jax.random.uniform(k[4], (R,), minval=0.2).at[R // 2].set(0.0)
    return *(x.astype(dtype) for x in (h, W, ht, Wt)), weight / weight.sum()


@functools.cache
def compiled(form, loss, vocab_size):
    def objective(*arrays):
        return form(*arrays, loss=loss, vocab_size=vocab_size)

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))


def value_and_gradient(form, arrays, *, loss, vocab_size=None):
    (value, stats), gradient = jax.device_get(compiled(form, loss, vocab_size)(*arrays))
    return value, stats, gradient


def close(a, b, relative):
    """Within a share of the norm of the second."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= relative * np.linalg.norm(b), np.linalg.norm(a - b) / np.linalg.norm(b)


def log_softmax64(h, W, vocab_size):
    logits = np.asarray(h, np.float64) @ np.asarray(W, np.float64)[:vocab_size].T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def rows64(loss, lq, lp):
    q, p = np.exp(lq), np.exp(lp)
    reverse, forward = (q * (lq - lp)).sum(-1), (p * (lp - lq)).sum(-1)
    if loss.kind == "jsd":
        b = loss.teacher_weight
        m = b * p + (1 - b) * q
        return b * (p * np.log(p / m)).sum(-1) + (1 - b) * (q * np.log(q / m)).sum(-1)
    u = {"reverse_kl": 1.0, "forward_kl": 0.0, "mix": loss.reverse_weight}[loss.kind]
    return u * reverse + (1 - u) * forward


def differences64(value, x, step=1e-6):
    """Gradient of a float64 function by central differences."""
    x, gradient = np.array(x, np.float64), np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        kept = x[at]
        x[at] = kept + step
        above = value(x)
        x[at] = kept - step
        gradient[at] = (above - value(x)) / (2 * step)
        x[at] = kept
    return gradient


@every_divergence
def test_value_gradient_and_stats_are_the_formula_s_in_float64(loss):
    arrays, vocab = problem(R=5, V=13, U=17, D=4, E=6), 11
    h, W, ht, Wt, weight = arrays
    value, stats, gradient = value_and_gradient(fused_divergence, arrays, loss=loss, vocab_size=vocab)
    lq, lp = log_softmax64(h, W, vocab), log_softmax64(ht, Wt, vocab)

    def value64(h, W):
        return (np.asarray(weight, np.float64) * rows64(loss, log_softmax64(h, W, vocab), lp)).sum()

    assert value == pytest.approx(value64(h, W), rel=1e-6)
    close(gradient[0], differences64(lambda x: value64(x, W), h), 1e-5)
    close(gradient[1], differences64(lambda x: value64(h, x), W), 1e-5)
    used = np.asarray(weight) != 0
    close(stats["loss"], used * rows64(loss, lq, lp), 1e-5)
    close(stats["student_entropy"], -1.0 * used * (np.exp(lq) * lq).sum(-1), 1e-5)
    close(stats["target_entropy"], -1.0 * used * (np.exp(lp) * lp).sum(-1), 1e-5)


@pytest.mark.parametrize("loss", STABILISED, ids=lambda loss: f"{loss.kind}-{loss.stabiliser}")
def test_stabilised_value_and_gradient_are_autodiff_s_of_the_dense_form(loss):
    arrays = problem()
    dense = value_and_gradient(dense_divergence, arrays, loss=loss)
    fused = value_and_gradient(fused_divergence, arrays, loss=loss)
    assert abs(dense[0] - jnp.sum(arrays[4] * dense[1]["loss"])) > 0.02 * dense[0]
    assert fused[0] == pytest.approx(dense[0], rel=2e-6)
    for ours, theirs in zip(fused[2], dense[2], strict=True):
        close(ours, theirs, 1e-5)
    for name, rows in dense[1].items():
        close(fused[1][name], rows, 1e-5)


@pytest.mark.parametrize(
    ("kind", "p", "q", "none", "per_entry", "per_token_loss"),
    [
        ("forward_kl", (0.9, 0.1), (0.5, 0.5), (0.368, -0.400), (-0.111, 0.050), 0.050),
        ("reverse_kl", (0.9, 0.1), (0.5, 0.5), (0.511, -0.549), (-0.244, 0.103), 0.050),
        ("forward_kl", (0.52, 0.48), (0.45, 0.55), (0.010, -0.070), (-0.015, 0.216), 0.010),
        ("reverse_kl", (0.52, 0.48), (0.45, 0.55), (0.010, -0.069), (-0.015, 0.212), 0.010),
    ],
)
def test_per_entry_clip_can_point_the_wrong_way_and_rescale_cannot(kind, p, q, none, per_entry, per_token_loss):
    """Two-entry vocabularies: loss and slope of the first student logit, before and after either stabiliser."""

    def at(stabiliser):
        loss = LossConfig(kind, stabiliser=stabiliser, clip=0.05)
        eye, one = jnp.eye(2), jnp.ones(1)
        arrays = (jnp.log(jnp.array([q])), eye, jnp.log(jnp.array([p])), eye, one)
        value, _, (slope, _) = value_and_gradient(fused_divergence, arrays, loss=loss)
        assert slope[0, 1] == pytest.approx(-slope[0, 0], abs=1e-6)
        return float(value), float(slope[0, 0])

    assert at("none") == pytest.approx(none, abs=6e-4)
    assert at("per_entry") == pytest.approx(per_entry, abs=6e-4)
    value, slope = at("rescale")
    assert value == pytest.approx(per_token_loss, abs=6e-4)
    assert slope == pytest.approx(at("none")[1] * min(1, 0.05 / at("none")[0]), rel=1e-5)


@every_divergence
def test_chunks_order_and_padding_of_rows_do_not_matter(loss):
    arrays = problem(R=13)
    h, W, ht, Wt, weight = arrays
    value, stats, (dh, dW) = value_and_gradient(fused_divergence, arrays, loss=loss)
    order = np.random.default_rng(0).permutation(13)
    junk = jnp.full((4, 1), jnp.nan)
    variants = {
        "chunk 1": (arrays, LossConfig(**{**vars(loss), "chunk": 1}), np.arange(13)),
        "chunk 5": (arrays, LossConfig(**{**vars(loss), "chunk": 5}), np.arange(13)),
        "order": ((h[order], W, ht[order], Wt, weight[order]), loss, order),
        "padding": (
            (
                jnp.concatenate([h, jnp.broadcast_to(junk, (4, 8))]),
                W,
                jnp.concatenate([ht, jnp.broadcast_to(junk, (4, 12))]),
                Wt,
                jnp.concatenate([weight, jnp.zeros(4)]),
            ),
            loss,
            np.arange(13),
        ),
    }
    for name, (inputs, config, rows) in variants.items():
        value_2, stats_2, (dh_2, dW_2) = value_and_gradient(fused_divergence, inputs, loss=config)
        assert value_2 == pytest.approx(value, rel=1e-6), name
        close(dh_2[:13], dh[rows], 1e-5)
        close(dW_2, dW, 1e-5)
        close(stats_2["loss"][:13], stats["loss"][rows], 1e-5)


def test_micro_batches_of_globally_normalised_weights_add_up():
    h, W, ht, Wt, weight = arrays = problem(R=12)
    loss = LossConfig()
    value, _, (dh, dW) = value_and_gradient(fused_divergence, arrays, loss=loss)
    parts = [
        value_and_gradient(fused_divergence, (h[at], W, ht[at], Wt, weight[at]), loss=loss)
        for at in (slice(i, i + 4) for i in range(0, 12, 4))
    ]
    assert sum(part[0] for part in parts) == pytest.approx(value, rel=1e-6)
    close(np.concatenate([part[2][0] for part in parts]), dh, 1e-5)
    close(sum(part[2][1] for part in parts), dW, 1e-5)


@every_divergence
@pytest.mark.parametrize("stabiliser", ["none", "rescale", "per_entry"])
def test_a_student_that_is_its_target_has_neither_loss_nor_gradient(loss, stabiliser):
    h, W, _, _, weight = problem(R=40, V=211, D=16)
    h = 3 * h
    loss = LossConfig(**{**vars(loss), "stabiliser": stabiliser, "chunk": 8})
    value, stats, gradient = value_and_gradient(fused_divergence, (h, W, h, W, weight), loss=loss, vocab_size=203)
    assert abs(value) < 1e-7
    assert abs(stats["loss"]).max() < 1e-7
    assert max(abs(g).max() for g in gradient) < 1e-7


@every_divergence
def test_extreme_logits_stay_finite_and_no_row_is_negative(loss):
    k = jax.random.split(jax.random.key(1), 2)
    eye = jnp.eye(32)
    # Rows 0 to 7: both sides far apart, with entries that underflow on both; the others: nearly equal sides.
    s = jax.random.uniform(k[0], (16, 32), minval=-200.0, maxval=200.0)
    t = jnp.where(
        jnp.arange(16)[:, None] < 8, jax.random.uniform(k[1], (16, 32), minval=-200.0, maxval=200.0), s * (1 + 1e-6)
    )
    value, stats, gradient = value_and_gradient(fused_divergence, (s, eye, t, eye, jnp.ones(16)), loss=loss)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in gradient)
    assert (stats["loss"][:8] > 0.1).all()
    assert stats["loss"].min() > -1e-5


@every_divergence
def test_rows_of_weight_zero_have_no_influence_at_all(loss):
    h, W, ht, Wt, weight = problem()
    off = weight == 0
    assert off.sum() == 1
    clean = value_and_gradient(fused_divergence, (h, W, ht, Wt, weight), loss=loss)
    bad = (jnp.where(off[:, None], jnp.nan, h), W, jnp.where(off[:, None], jnp.inf, ht), Wt, weight)
    dirty = value_and_gradient(fused_divergence, bad, loss=loss)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert (clean[2][0][off] == 0).all()
    value, stats, gradient = value_and_gradient(fused_divergence, (*bad[:4], jnp.zeros_like(weight)), loss=loss)
    assert value == 0
    assert all((x == 0).all() for x in (*stats.values(), *gradient))


def test_a_row_of_weight_that_is_not_finite_shows_in_the_loss():
    h, *rest = problem()
    assert np.isnan(fused_divergence(h.at[0].set(jnp.nan), *rest, loss=LossConfig())[0])


def test_gradients_answer_to_the_incoming_cotangent():
    h, W, *rest = problem()

    def objective(h, W):
        return fused_divergence(h, W, *rest, loss=LossConfig())[0]

    once = jax.jit(jax.grad(objective, (0, 1)))(h, W)
    thrice = jax.jit(jax.grad(lambda h, W: 3.0 * objective(h, W), (0, 1)))(h, W)
    jax.tree.map(lambda a, b: close(a, 3 * b, 1e-6), thrice, once)


def test_target_weights_and_stats_carry_no_gradient():
    arrays = problem()

    def objective(*arrays):
        value, stats = fused_divergence(*arrays, loss=LossConfig())
        return value + sum(x.sum() for x in stats.values())

    h, W, *frozen = jax.jit(jax.grad(objective, (0, 1, 2, 3, 4)))(*arrays)
    assert all((x == 0).all() for x in frozen)
    _, _, (dh, dW) = value_and_gradient(fused_divergence, arrays, loss=LossConfig())
    close(h, dh, 1e-6)
    close(W, dW, 1e-6)


def test_padded_columns_have_no_mass_and_no_gradient():
    h, W, ht, Wt, weight = problem(V=29, U=33)
    loss = LossConfig()
    sliced = (h, W[:23], ht, Wt[:23], weight)
    loud = (h, W.at[23:].set(100.0), ht, Wt.at[23:].set(-100.0), weight)
    value, stats, (dh, dW) = value_and_gradient(fused_divergence, loud, loss=loss, vocab_size=23)
    want, stats_want, (dh_want, dW_want) = value_and_gradient(fused_divergence, sliced, loss=loss)
    assert value == pytest.approx(want, rel=1e-6)
    close(dh, dh_want, 1e-5)
    close(dW[:23], dW_want, 1e-5)
    assert (dW[23:] == 0).all()
    close(stats["student_entropy"], stats_want["student_entropy"], 1e-6)


@every_divergence
def test_bfloat16_operands_keep_the_gradient_of_nearly_equal_distributions(loss):
    """Logits rounded to bfloat16 before the softmax put this gradient off by tens of per cent."""
    h, W, _, _, weight = problem(R=24, V=211, D=32, dtype=jnp.bfloat16)
    nudge = 0.02 * jax.random.normal(jax.random.key(9), W.shape)
    arrays = (4 * h, W, 4 * h, (W + nudge).astype(jnp.bfloat16), weight)
    exact = value_and_gradient(dense_divergence, (*(x.astype(jnp.float32) for x in arrays),), loss=loss)
    value, _, gradient = value_and_gradient(fused_divergence, arrays, loss=loss)
    assert value == pytest.approx(exact[0], rel=1e-4)
    for ours, theirs in zip(gradient, exact[2], strict=True):
        assert ours.dtype == jnp.bfloat16
        close(ours, theirs, 0.01)


def test_the_head_s_gradient_has_the_head_s_dtype():
    """A head stored in fp32 under bfloat16 hidden states gets the fp32 sum, not one rounded to bfloat16."""
    h, W, ht, Wt, weight = problem(R=24, dtype=jnp.bfloat16)
    arrays = (h, W.astype(jnp.float32), ht, Wt, weight)
    _, _, (_, dW) = value_and_gradient(fused_divergence, arrays, loss=LossConfig(chunk=4))
    assert dW.dtype == jnp.float32
    assert (dW != dW.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("chunk", [0, 4])
def test_cross_entropy_value_and_gradient_are_the_formula_s_in_float64(chunk):
    h, W, _, _, weight = problem(R=7, V=13, D=4)
    label, vocab = jnp.array([0, 10, 3, -100, 3, 2, 9]), 11
    assert weight[3] == 0

    def objective(h, W):
        return fused_cross_entropy(h, W, label, weight, vocab_size=vocab, chunk=chunk)

    def value64(h, W):
        lq = log_softmax64(h, W, vocab)
        return -(np.asarray(weight, np.float64) * lq[np.arange(7), np.asarray(label).clip(0)]).sum()

    (value, stats), gradient = jax.device_get(jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(h, W))
    assert value == pytest.approx(value64(h, W), rel=1e-6)
    close(gradient[0], differences64(lambda x: value64(x, W), h), 1e-5)
    close(gradient[1], differences64(lambda x: value64(h, x), W), 1e-5)
    lq = log_softmax64(h, W, vocab)
    close(stats["student_entropy"], -1.0 * (np.asarray(weight) != 0) * (np.exp(lq) * lq).sum(-1), 1e-5)
    outside = fused_cross_entropy(h, W, label.at[0].set(vocab), weight, vocab_size=vocab)[0]
    assert np.isnan(outside)


def sizes(text):
    """Elements of every array that a compiled program names."""
    return [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)]


def test_no_array_of_all_positions_by_all_vocabulary_exists():
    arrays = problem(R=96, V=101, D=16, E=16)
    step = jax.value_and_grad(lambda *a: fused_divergence(*a, loss=LossConfig(chunk=8))[0], (0, 1))
    assert max(sizes(jax.jit(step).lower(*arrays).compile().as_text())) < 96 * 101 // 2


def test_no_gradient_work_without_a_gradient():
    arrays = problem()

    def products(step):
        return str(jax.make_jaxpr(step)(*arrays)).count(" dot_general[")

    def value(*arrays):
        return fused_divergence(*arrays, loss=LossConfig())[0]

    assert products(value) == 2
    assert products(jax.grad(value, (0, 1))) == 4


def test_masked_mean_ignores_what_is_masked():
    x, mask = jnp.array([1.0, jnp.nan, 4.0]), jnp.array([1, 0, 1])
    assert masked_mean(x, mask) == 2.5
    np.testing.assert_array_equal(jax.grad(masked_mean)(x, mask), [0.5, 0.0, 0.5])
    assert masked_mean(x, jnp.zeros(3)) == 0
    assert masked_mean(jnp.full(3, 2, jnp.bfloat16), jnp.ones(3, bool)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"kind": "kl"}, "kind"),
        ({"stabiliser": "per_token"}, "stabiliser"),
        ({"reduction": "mean"}, "reduction"),
        ({"kind": "jsd", "teacher_weight": 1.0}, "teacher_weight"),
        ({"reverse_weight": -0.1}, "reverse_weight"),
        ({"clip": 0.0}, "clip"),
        ({"chunk": -1}, "chunk"),
        ({"kind": "cross_entropy", "stabiliser": "rescale"}, "stabiliser"),
    ],
)
def test_impossible_settings_are_refused_by_key_and_value(fields, key):
    with pytest.raises(UserError, match=rf"recipe\.loss\.{key}={re.escape(repr(fields[key]))}"):
        LossConfig(**fields)


def test_impossible_arguments_are_refused():
    h, W, ht, Wt, weight = problem(V=29, U=33)
    with pytest.raises(UserError, match="29 and 33 rows"):
        fused_divergence(h, W, ht, Wt, weight, loss=LossConfig())
    with pytest.raises(UserError, match="vocab_size=30"):
        fused_divergence(h, W, ht, Wt, weight, loss=LossConfig(), vocab_size=30)
    with pytest.raises(UserError, match="fused_cross_entropy"):
        fused_divergence(h, W, ht, Wt, weight, loss=LossConfig("cross_entropy"), vocab_size=29)
    with pytest.raises(UserError, match="flatten"):
        loss_module.fused_divergence(h[None], W, ht, Wt, weight, loss=LossConfig(), vocab_size=29)
