"""Tokens that are one outcome of the loss: the numbers of the merged distributions, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax.recipe.loss import LossConfig, dense_divergence, fused_cross_entropy, fused_divergence
from mpd_jax.types import UserError
from tests.test_loss import DIVERGENCES, close, differences64, log_softmax64, problem, rows64

V, VOCAB, MERGED = 13, 11, (9, 2, 10)
ARRAYS = problem(R=5, V=V, U=17, D=4, E=6)
LABELS = jnp.array([0, 10, -100, 3, 2])  # the third row has no weight
LOSSES = [*DIVERGENCES, LossConfig("policy_gradient"), LossConfig("cross_entropy")]


def objective(loss, merged, form=fused_divergence):
    def value(h, W, ht, Wt, weight, label):
        if loss.kind == "cross_entropy":
            return fused_cross_entropy(h, W, label, weight, merged=merged, vocab_size=VOCAB)
        labels = {"label_R": label} if loss.kind == "policy_gradient" else {}
        return form(h, W, ht, Wt, weight, loss=loss, **labels, merged=merged, vocab_size=VOCAB)

    return value


def value_and_gradient(*what, labels=LABELS):
    step = jax.jit(jax.value_and_grad(objective(*what), (0, 1), has_aux=True))
    return jax.device_get(step(*ARRAYS, labels))


def outcomes64(h, W):
    """Log-probabilities of the other tokens, then of the merged ones together."""
    lx = log_softmax64(h, W, VOCAB)
    whole = np.log(np.exp(lx[:, list(MERGED)]).sum(1, keepdims=True))
    return np.concatenate([np.delete(lx, MERGED, axis=1), whole], axis=1)


def labels64():
    """The labels as numbers of outcomes."""
    alone = [token for token in range(VOCAB) if token not in MERGED]
    return np.array([len(alone) if token in MERGED else alone.index(max(token, 0)) for token in LABELS.tolist()])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_value_gradient_and_stats_are_those_of_the_merged_distributions_in_float64(loss):
    h, W, ht, Wt, weight = ARRAYS
    lq, lp, at = outcomes64(h, W), outcomes64(ht, Wt), (np.arange(5), labels64())
    advantage = (lp - lq)[at] + rows64(LossConfig(), lq, lp)

    def rows(lq):
        if loss.kind == "cross_entropy":
            return -lq[at]
        return -advantage * lq[at] if loss.kind == "policy_gradient" else rows64(loss, lq, lp)

    def value64(h, W):
        return (np.asarray(weight, np.float64) * rows(outcomes64(h, W))).sum()

    (value, stats), gradient = value_and_gradient(loss, MERGED)
    assert value == pytest.approx(value64(h, W), rel=1e-5)
    close(gradient[0], differences64(lambda x: value64(x, W), h), 1e-5)
    close(gradient[1], differences64(lambda x: value64(h, x), W), 1e-5)
    used = np.asarray(weight) != 0
    said = rows64(LossConfig(), lq, lp) if loss.kind == "policy_gradient" else rows(lq)
    close(stats["loss"], used * said, 1e-5)
    close(stats["student_entropy"], -1.0 * used * (np.exp(lq) * lq).sum(-1), 1e-5)


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig("policy_gradient")], ids=lambda loss: loss.kind)
def test_the_dense_form_merges_alike(loss):
    labels = LABELS.clip(0)
    ours = value_and_gradient(loss, MERGED, labels=labels)
    theirs = value_and_gradient(loss, MERGED, dense_divergence, labels=labels)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), ours, theirs)


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig("cross_entropy")], ids=lambda loss: loss.kind)
def test_one_id_alone_changes_nothing(loss):
    jax.tree.map(lambda a, b: close(a, b, 1e-6), value_and_gradient(loss, (9,)), value_and_gradient(loss, ()))


def test_another_of_the_merged_tokens_is_no_divergence():
    """A student that ends by one id and a target that ends by another agree."""
    eye, ones = jnp.eye(4), jnp.ones(1)
    s, t = jnp.log(jnp.array([[0.7, 0.1, 0.15, 0.05]])), jnp.log(jnp.array([[0.1, 0.7, 0.15, 0.05]]))
    apart, together = (fused_divergence(s, eye, t, eye, ones, loss=LossConfig(), merged=m)[0] for m in ((), (0, 1)))
    assert apart > 1 and abs(together) < 1e-6


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"merged: \[11\] stand outside the vocabulary of 11"):
        fused_divergence(*ARRAYS, loss=LossConfig(), merged=(3, 11), vocab_size=VOCAB)
