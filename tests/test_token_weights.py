"""Token weights: statistics of the whole batch, no padding in them, no gradient through them."""

import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax import batches
from mpd_jax.data.batching import after, to_batch
from mpd_jax.recipe.loss import LossConfig, dense_divergence
from mpd_jax.recipe.weights import TokenStats, entropy_guided, token_weight
from mpd_jax.train import step
from mpd_jax.types import Problem, Trajectory, UserError
from tests.test_step import VOCAB, make_batch
from tests.toy import toy_start, toy_step, toy_update, toy_weights


def of_all(stats: TokenStats) -> jax.Array:
    """A weight that reads every statistic, and the whole batch."""
    highest = jnp.max(stats.divergence, where=stats.counts, initial=0.0)
    own = stats.student_entropy + 2 * stats.target_entropy + stats.index / 4 + stats.pass_rate
    return stats.divergence / highest + own + jnp.sum(stats.counts) / 100


@pytest.fixture(autouse=True)
def own_functions(monkeypatch):
    """Functions of the user's own, which the config names by their import paths."""
    module = ModuleType("own_weights")
    module.__dict__.update(
        even=partial(entropy_guided, gamma=0.0),
        of_all=of_all,
        first=lambda stats: (stats.index == 0) * 1.0,
        scalar=lambda stats: jnp.float32(1),
        squares=lambda stats: stats.divergence + stats.target_entropy,
    )
    monkeypatch.setitem(sys.modules, "own_weights", module)


def numbers(batch):
    """TokenStats in numpy, from the whole distributions; padding holds what no token may be touched by."""
    rows = [
        (weights["embedding_VD"][np.take_along_axis(tokens_BT, at_BR, 1)].reshape(-1, 8), weights["head_VD"])
        for weights, tokens_BT, at_BR in (
            (toy_weights(0), batch.student_tokens_BT, batch.student_at_BR),
            (toy_weights(1), batch.target_tokens_BT, batch.target_at_BR),
        )
    ]
    _, stats = dense_divergence(*rows[0], *rows[1], jnp.ones(batch.weight_BR.size), loss=LossConfig())
    counts_BR = batch.weight_BR > 0
    three = (np.asarray(stats[name]) for name in ("loss", "student_entropy", "target_entropy"))
    rate_BR = np.zeros_like(batch.weight_BR) if batch.pass_rate_BR is None else batch.pass_rate_BR
    return TokenStats(
        *(np.where(counts_BR, x.reshape(counts_BR.shape), 1e9) for x in three), counts_BR, batch.index_BR, rate_BR
    )


def close(ours, theirs, rtol=2e-5):
    np.testing.assert_allclose(ours[0]["loss"], theirs[0]["loss"], rtol=rtol)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


def test_entropy_guided_is_the_paper_s_formula_and_sees_no_padding():
    rng = np.random.default_rng(0)
    counts_BR = rng.random((3, 5)) < 0.6
    for scale, floor in ((3.0, None), (0.5, 1.0)):
        H_BR = scale * rng.random((3, 5))
        stats = TokenStats(*[jnp.where(counts_BR, x, jnp.inf) for x in [H_BR] * 3], counts_BR, H_BR, H_BR)
        wanted = np.clip(1 - 0.9 * H_BR / (floor or H_BR[counts_BR].max()), 0.1, 1)
        np.testing.assert_allclose(entropy_guided(stats, gamma=0.9)[counts_BR], wanted[counts_BR], rtol=1e-6)
    assert entropy_guided(stats)[counts_BR].min() >= 0.9, "gamma 0.2 and entropies of at most half a nat"


def test_a_gamma_of_zero_changes_no_bit_of_the_update():
    plain, even = (toy_step(make_batch(), LossConfig(token_weight=name)) for name in ("none", "own_weights:even"))
    jax.tree.map(np.testing.assert_array_equal, even[1], plain[1])
    assert even[0]["loss"] == plain[0]["loss"] and even[0]["token_weight"] == even[0]["tokens"]
    assert "token_weight" not in plain[0]


def test_an_update_is_that_of_a_batch_whose_weights_were_multiplied_by_hand():
    """By weights from float32 distributions that no gradient ever sees, also with micro-batches."""
    batch, loss = make_batch(), LossConfig(token_weight="own_weights:of_all")
    factor_BR = np.asarray(of_all(numbers(batch)))
    by_hand = toy_step(
        batch._replace(weight_BR=np.where(batch.weight_BR > 0, batch.weight_BR * factor_BR, 0)), LossConfig()
    )
    whole, parts = (toy_step(batch, loss, micro_batches=pieces) for pieces in (1, 4))
    close(whole, by_hand)
    close(parts, by_hand)
    for out, _ in (whole, parts):
        np.testing.assert_allclose(out["token_weight"], factor_BR[batch.weight_BR > 0].sum(), rtol=1e-5)
        np.testing.assert_allclose(out["divergence"], by_hand[0]["divergence"], rtol=1e-5)


def test_packing_does_not_change_the_weights():
    rng = np.random.default_rng(0)
    problems = [Problem(f"p{i}", "?") for i in range(6)]
    written = [
        Trajectory(p.id, 0, (3, i), (*rng.integers(10, VOCAB, 2 + i).tolist(), 1), "student", 0, "stopped")
        for i, p in enumerate(problems)
    ]
    rates = {p.id: i / 5 for i, p in enumerate(problems)}
    how = {
        "reads": lambda t: after((4, 5, 6), t.response),
        "reduction": "token_mean",
        "max_length": 32,
        "eos_ids": {1},
        "pass_rates": rates,
    }
    alone, packed = (to_batch(problems, written, **how, alone=alone)[0] for alone in (True, False))
    assert alone.response_BR.shape[0] == 6 > packed.response_BR.shape[0]
    loss = LossConfig(token_weight="own_weights:of_all")
    close(toy_step(packed, loss), toy_step(alone, loss))


def test_tokens_that_are_left_out_of_the_loss_are_reported():
    batch = make_batch()
    out, _ = toy_step(batch, LossConfig(token_weight="own_weights:first"))
    stats = numbers(batch)
    first = stats.counts & (batch.index_BR == 0)
    assert out["tokens"] == stats.counts.sum() > first.sum() == out["token_weight"]
    np.testing.assert_allclose(out["divergence"], stats.divergence[stats.counts].sum(), rtol=1e-5)
    np.testing.assert_allclose(out["loss"], stats.divergence[first].sum() / stats.counts.sum(), rtol=1e-5)


def test_cross_entropy_s_divergence_is_the_likelihood_and_there_is_no_target_s_entropy():
    batch = make_batch()
    loss = LossConfig("cross_entropy", token_weight="own_weights:squares")
    out, _ = toy_step(batch, loss, target=False)
    logits = toy_weights(0)["embedding_VD"][batch.student_tokens_BT] @ toy_weights(0)["head_VD"].T
    lq_BTV = jax.nn.log_softmax(logits)
    at = np.arange(len(batch.response_BR))[:, None], batch.student_at_BR, batch.response_BR
    np.testing.assert_allclose(out["loss"], (batch.weight_BR * np.asarray(lq_BTV)[at] ** 2).sum(), rtol=1e-5)


def test_without_a_token_weight_there_is_no_pass_more(monkeypatch):
    def called(*_):
        raise RuntimeError("a pass of its own")

    monkeypatch.setattr(step, "of_every_row", called)
    toy_update.__wrapped__(LossConfig()).lower(toy_start(), toy_weights(1), make_batch())
    with pytest.raises(RuntimeError):
        toy_update.__wrapped__(LossConfig(token_weight="entropy_guided")).lower(
            toy_start(), toy_weights(1), make_batch()
        )


def test_a_weight_that_is_none_for_each_token_is_refused():
    with pytest.raises(UserError, match=r"token_weight: .* an array of shape \(\); .* of the shape \(8, 6\)"):
        toy_step(make_batch(), LossConfig(token_weight="own_weights:scalar"))


@pytest.fixture(scope="module")
def readme():
    """The functions of the README's example."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "def important" in b]
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_readme_s_importance_keeps_the_share_of_tokens_with_the_highest_score(readme):
    stats = numbers(make_batch())
    counts = stats.counts
    h, d = ((x[counts] - x[counts].min()) / np.ptp(x[counts]) for x in (stats.student_entropy, stats.divergence))
    score, kept = h + d - h * d, -(-counts.sum() // 4)
    wanted = 4.0 * (score >= np.sort(score)[-kept])
    assert wanted.sum() == 4 * kept
    weight = jax.jit(partial(readme["important"], share=0.25))(stats)
    np.testing.assert_array_equal(weight[counts], wanted)


def test_the_readme_s_problem_weight_is_none_where_nothing_is_learnt(readme):
    rates = np.array([[0.0, 0.25], [0.5, 1.0]])
    stats = numbers(make_batch())._replace(pass_rate=rates)
    np.testing.assert_array_equal(readme["neither_solved_nor_hopeless"](stats), [[0, 3 / 16], [1 / 4, 0]])


def test_none_is_no_function():
    assert token_weight("none") is None and token_weight("entropy_guided") is entropy_guided


def test_pass_rates_are_those_of_the_written_attempts_by_plain_rules():
    class Chat:
        def answer_text(self, response):
            return f"\\boxed{{{response[0]}}}"

    problems = [Problem("a", "?", "7"), Problem("b", "?", "8"), Problem("c", "?"), Problem("d", "?", "9")]
    made = [("a", 7), ("a", 1), ("a", 7), ("a", 2), ("b", 8), ("c", 5)]
    written = [Trajectory(id, n, (0,), (answer,), "student", 0, "stopped") for n, (id, answer) in enumerate(made)]
    rewritten = Trajectory("a", 0, (0,), (3,), "teacher", 0, "assembled", dropped=True, original=written[0])
    rates = batches.pass_rates(problems, [rewritten, *written[1:]], Chat())
    assert rates == {"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.5}
