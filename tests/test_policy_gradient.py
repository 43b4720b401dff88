"""The sampled-token loss: its gradient is that of the formula, and in expectation that of the reverse KL."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax.recipe.loss import LossConfig, dense_divergence, fused_divergence
from mpd_jax.types import UserError
from tests.test_loss import close, differences64, log_softmax64, problem, rows64
from tests.test_step import make_batch
from tests.toy import toy_step, toy_weights

LOSS = LossConfig("policy_gradient")
V, VOCAB = 13, 11
ARRAYS = problem(R=5, V=V, U=17, D=4, E=6)
LABELS = jnp.array([0, 10, -100, 3, 7])  # the third row has no weight


@functools.cache
def compiled(form, loss):
    def objective(h, W, ht, Wt, weight, label):
        return form(h, W, ht, Wt, weight, loss=loss, label_R=label, vocab_size=VOCAB)

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))


def value_and_gradient(form, *arrays, loss=LOSS):
    (value, stats), gradient = jax.device_get(compiled(form, loss)(*arrays))
    return value, stats, gradient


def test_value_and_gradient_are_the_formula_s_in_float64():
    h, W, ht, Wt, weight = ARRAYS
    lp, lq = log_softmax64(ht, Wt, VOCAB), log_softmax64(h, W, VOCAB)
    at, label = np.arange(5), np.asarray(LABELS).clip(0)
    advantage = (lp - lq)[at, label] + rows64(LossConfig(), lq, lp)

    def value64(h, W):
        return -(np.asarray(weight, np.float64) * advantage * log_softmax64(h, W, VOCAB)[at, label]).sum()

    value, stats, gradient = value_and_gradient(fused_divergence, *ARRAYS, LABELS)
    assert value == pytest.approx(value64(h, W), rel=1e-5)
    close(gradient[0], differences64(lambda x: value64(x, W), h), 1e-5)
    close(gradient[1], differences64(lambda x: value64(h, x), W), 1e-5)
    close(stats["loss"], (np.asarray(weight) != 0) * rows64(LossConfig(), lq, lp), 1e-5)
    assert set(stats) == {"loss", "student_entropy", "target_entropy"}


def test_they_are_autodiff_s_of_the_dense_form():
    labels = LABELS.clip(0)
    ours, theirs = (value_and_gradient(form, *ARRAYS, labels) for form in (fused_divergence, dense_divergence))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for a, b in zip(ours[2], theirs[2], strict=True):
        close(a, b, 1e-5)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), ours[1], theirs[1])


def test_in_expectation_over_the_student_s_tokens_the_gradient_is_that_of_the_reverse_kl():
    h, W, ht, Wt, weight = ARRAYS
    q_RV = np.exp(log_softmax64(h, W, VOCAB))
    parts = [
        value_and_gradient(
            fused_divergence, *ARRAYS[:4], weight * q_RV[:, token].astype(np.float32), jnp.full(5, token)
        )
        for token in range(VOCAB)
    ]
    _, gradient = jax.value_and_grad(
        lambda h, W: fused_divergence(h, W, ht, Wt, weight, loss=LossConfig(), vocab_size=VOCAB)[0], (0, 1)
    )(h, W)
    for at in (0, 1):
        mean = sum(np.asarray(part[2][at], np.float64) for part in parts)
        close(mean, gradient[at], 1e-6)
        assert np.linalg.norm(parts[0][2][at]) > 0.05 * np.linalg.norm(mean), "a single token's is another"


def test_a_token_outside_the_vocabulary_shows_unless_its_weight_is_zero():
    value, _, gradient = value_and_gradient(fused_divergence, *ARRAYS, LABELS)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient)
    assert np.isnan(value_and_gradient(fused_divergence, *ARRAYS, LABELS.at[0].set(VOCAB))[0])


def test_tokens_are_asked_for_by_this_loss_alone():
    with pytest.raises(UserError, match=r"kind='policy_gradient' .* where label_R is given, and only there"):
        fused_divergence(*ARRAYS, loss=LOSS, vocab_size=VOCAB)
    with pytest.raises(UserError, match=r"kind='reverse_kl' .* where label_R is given, and only there"):
        fused_divergence(*ARRAYS, loss=LossConfig(), label_R=LABELS, vocab_size=VOCAB)
    with pytest.raises(UserError, match=r"stabiliser='rescale' .* none beside kind=policy_gradient, which is no div"):
        LossConfig("policy_gradient", stabiliser="rescale")


def test_an_update_reads_the_response_ids_merges_stops_and_reports_the_divergence():
    batch = make_batch()
    out, _ = toy_step(batch, LossConfig("policy_gradient", merge_stops=True), stop_ids=(5, 40))
    (h, W), (ht, Wt) = (
        (weights["embedding_VD"][np.take_along_axis(tokens_BT, at_BR, 1)].reshape(-1, 8), weights["head_VD"])
        for weights, tokens_BT, at_BR in (
            (toy_weights(0), batch.student_tokens_BT, batch.student_at_BR),
            (toy_weights(1), batch.target_tokens_BT, batch.target_at_BR),
        )
    )
    how = {"loss": LossConfig("policy_gradient"), "label_R": jnp.asarray(batch.response_BR.reshape(-1))}
    value, stats = dense_divergence(h, W, ht, Wt, jnp.asarray(batch.weight_BR.reshape(-1)), **how, merged=(5, 40))
    assert out["loss"] == pytest.approx(float(value), rel=1e-4)
    assert out["divergence"] == pytest.approx(float(stats["loss"].sum()), rel=1e-4)
    apart = dense_divergence(h, W, ht, Wt, jnp.asarray(batch.weight_BR.reshape(-1)), **how)[1]["loss"].sum()
    assert apart > 1.001 * out["divergence"]
