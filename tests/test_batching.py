"""Claims about alignment: the one place where prompt, response and target could come apart."""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax.data.batching import Reading, after, to_batch
from mpd_jax.recipe.loss import LossConfig, fused_divergence
from mpd_jax.types import Problem, Trajectory

EOS, VOCAB = 9, 17
PROBLEMS = tuple(Problem(f"p{i}", "?") for i in range(6))


def trajectory(problem: int, prompt, response, ended="stopped", attempt=0, dropped=False) -> Trajectory:
    return Trajectory(
        f"p{problem}", attempt, tuple(prompt), tuple(response), "student", 0, ended=ended, dropped=dropped
    )


@pytest.fixture
def step():
    """Prompts and responses of different lengths, ids 0 and EOS among them, one response cut."""
    rng = np.random.default_rng(0)
    ended = ["stopped", "cut", "dataset", "assembled", "stopped"]
    trajectories = []
    for at, how in enumerate(ended):
        prompt, body = rng.integers(0, VOCAB, 3 + 5 * at), rng.integers(0, VOCAB, 40 - 7 * at)
        last = [] if how == "cut" else [EOS]
        body[0], body[-1] = 0, 3
        trajectories.append(trajectory(at, prompt.tolist(), body.tolist() + last, how))
    targets = {f"p{at}": tuple(rng.integers(0, VOCAB, 30 - 4 * at).tolist()) for at in range(5)}
    return trajectories, targets


def batch_of(trajectories, targets, **changes):
    settings = {"reduction": "token_mean", "max_length": 4096, "eos_ids": {EOS}, "alone": True, **changes}
    reads = targets and (lambda t: after(targets[t.problem_id], t.response))
    return to_batch(PROBLEMS, trajectories, reads=reads, **settings)


def plain(trajectories):
    return {t.problem_id: t.prompt for t in trajectories}


def found(batch, trajectories):
    """Where each trajectory lies: (trajectory, row, its response slots, its tokens on both sides)."""
    sides = (
        (batch.student_tokens_BT, batch.student_segments_BT, batch.student_at_BR),
        (batch.target_tokens_BT, batch.target_segments_BT, batch.target_at_BR),
    )
    responses = {t.response: t for t in trajectories}
    assert len(responses) == len(trajectories)
    for b in range(batch.weight_BR.shape[0]):
        starts = [*np.flatnonzero((batch.weight_BR[b] > 0) & (batch.index_BR[b] == 0)), (batch.weight_BR[b] > 0).sum()]
        for segment, (start, end) in enumerate(itertools.pairwise(starts), start=1):
            slots = slice(start, end)
            np.testing.assert_array_equal(batch.index_BR[b, slots], np.arange(end - start))
            yield responses[tuple(batch.response_BR[b, slots])], b, slots, segment, sides


@pytest.mark.parametrize("packing", [{"alone": True}, {"row_length": 128, "max_length": 128}, {"multiple": 3}], ids=str)
def test_every_response_token_is_predicted_right_after_its_own_prefix(step, packing):
    trajectories, targets = step
    batch, _ = batch_of(trajectories, targets, **{"alone": False, **packing})
    places = list(found(batch, trajectories))
    assert sorted(t.problem_id for t, *_ in places) == sorted(t.problem_id for t in trajectories)
    assert any(segment > 1 for *_, segment, _ in places) != packing.get("alone", False)
    for t, b, slots, segment, sides in places:
        for (tokens_BT, segments_BT, at_BR), prompts in zip(sides, (plain(trajectories), targets), strict=True):
            own = segments_BT[b] == segment
            assert tuple(tokens_BT[b, own]) == (*prompts[t.problem_id], *t.response)
            first = np.flatnonzero(own)[0]
            for r, token in enumerate(t.response):
                at = at_BR[b, slots][r]
                assert tuple(tokens_BT[b, first : at + 1]) == (*prompts[t.problem_id], *t.response[:r])
                assert tokens_BT[b, at + 1] == token and segments_BT[b, at] == segment


def test_a_trajectory_s_pass_rate_stands_at_its_own_tokens_and_nowhere_else(step):
    trajectories, targets = step
    rates = {f"p{at}": (1 + at) / 8 for at in range(5)}
    batch, _ = batch_of(trajectories, targets, alone=False, pass_rates=rates)
    for t, b, slots, *_ in found(batch, trajectories):
        assert set(batch.pass_rate_BR[b, slots].tolist()) == {rates[t.problem_id]}
    assert not batch.pass_rate_BR[batch.weight_BR == 0].any()
    assert batch_of(trajectories, targets)[0].pass_rate_BR is None


def test_equal_contexts_give_equal_arrays(step):
    trajectories, _ = step
    batch, _ = batch_of(trajectories, plain(trajectories))
    np.testing.assert_array_equal(batch.student_tokens_BT, batch.target_tokens_BT)
    np.testing.assert_array_equal(batch.student_at_BR, batch.target_at_BR)


@functools.cache
def toy():
    embedding, head = jax.random.split(jax.random.key(0))
    return {
        "embedding_VD": jax.random.normal(embedding, (VOCAB, 8)),
        "head_VD": jax.random.normal(head, (VOCAB, 8)),
    }


def hidden(weights, tokens_BT, segments_BT, at_BR):
    """A causal model that mixes the whole prefix of a token's own segment, order included."""

    def mix(carried, inputs):
        (state_BD, before_B), (token_B, segment_B) = carried, inputs
        state_BD = jnp.where((segment_B == before_B)[:, None], state_BD, 0.0)
        state_BD = jnp.tanh(0.7 * state_BD + weights["embedding_VD"][token_B])
        return (state_BD, segment_B), state_BD

    start = jnp.zeros((tokens_BT.shape[0], 8)), jnp.zeros(tokens_BT.shape[0], jnp.int32)
    _, h_TBD = jax.lax.scan(mix, start, (jnp.asarray(tokens_BT).T, jnp.asarray(segments_BT).T))
    return jnp.take_along_axis(jnp.swapaxes(h_TBD, 0, 1), jnp.asarray(at_BR)[:, :, None], axis=1).reshape(-1, 8)


@functools.partial(jax.jit, static_argnames="kind")
def toy_loss(weights, frozen, batch, kind):
    def loss(weights):
        total, _ = fused_divergence(
            hidden(weights, batch.student_tokens_BT, batch.student_segments_BT, batch.student_at_BR),
            weights["head_VD"],
            jax.lax.stop_gradient(hidden(frozen, batch.target_tokens_BT, batch.target_segments_BT, batch.target_at_BR)),
            frozen["head_VD"],
            jnp.asarray(batch.weight_BR).reshape(-1),
            loss=LossConfig(kind=kind),
        )
        return total

    return jax.value_and_grad(loss)(weights)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "mix"])
def test_a_self_target_under_equal_contexts_gives_no_loss_and_no_gradient(step, kind):
    """Any misalignment of the two arrays shows here."""
    trajectories, targets = step
    loss, gradient = toy_loss(toy(), toy(), batch_of(trajectories, plain(trajectories))[0], kind)
    assert abs(loss) < 1e-7 and all(jnp.abs(g).max() < 1e-7 for g in jax.tree.leaves(gradient))
    other, _ = toy_loss(toy(), toy(), batch_of(trajectories, targets)[0], kind)
    assert other > 1e-3


def test_neither_packing_nor_rows_nor_order_change_the_loss(step):
    trajectories, targets = step
    reference, gradient = toy_loss(toy(), toy(), batch_of(trajectories, targets)[0], "reverse_kl")
    shuffled = trajectories[::-1]
    for changes in ({"max_length": 100}, {"multiple": 11}, {"alone": False}, {"alone": False, "row_length": 5000}):
        loss, other = toy_loss(toy(), toy(), batch_of(shuffled, targets, **changes)[0], "reverse_kl")
        np.testing.assert_allclose(loss, reference, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-7)


def test_eos_is_a_target_exactly_where_the_trajectory_ended(step):
    trajectories, targets = step
    batch, _ = batch_of(trajectories, targets)
    for b, t in enumerate(trajectories):
        trained = batch.response_BR[b][batch.weight_BR[b] > 0]
        assert trained.tolist() == list(t.response)
        assert (trained[-1] == EOS) == (t.ended != "cut")


@pytest.mark.parametrize(
    ("response", "ended"),
    [([4, EOS], "cut"), ([4], "stopped"), ([4], "assembled"), ([4], "dataset"), ([], "stopped")],
)
def test_an_end_that_contradicts_the_ids_is_never_trained_on(response, ended):
    with pytest.raises(AssertionError, match=f"ended '{ended}'"):
        batch_of([trajectory(0, [1], response, ended)], None)


def test_neither_id_0_nor_an_eos_used_as_padding_is_masked():
    response = [0, EOS, 0, 0, EOS]
    batch, report = batch_of([trajectory(0, [0, 0], response)], None)
    assert (batch.weight_BR[0] > 0).sum() == len(response) == report.tokens
    np.testing.assert_array_equal(batch.response_BR[0, :5], response)


def test_weights_hold_the_reduction(step):
    trajectories, targets = step
    count = sum(len(t.response) for t in trajectories)
    mean, _ = batch_of(trajectories, targets)
    total, report = batch_of(trajectories, targets, reduction="sum")
    assert mean.weight_BR.sum() == pytest.approx(1, rel=1e-5) and mean.weight_BR.max() == np.float32(1 / count)
    assert total.weight_BR.sum() == count == report.tokens and set(np.unique(total.weight_BR)) == {0, 1}


def test_without_a_target_its_array_is_empty(step):
    trajectories, _ = step
    batch, _ = batch_of(trajectories, None)
    assert batch.target_tokens_BT.shape == batch.target_segments_BT.shape == (5, 1)
    assert not batch.target_tokens_BT.any()
    np.testing.assert_array_equal(batch.target_at_BR, batch.student_at_BR)


def test_rows_follow_problem_and_attempt_whatever_the_order_of_trajectories():
    made = [trajectory(p, [p], [a, EOS], attempt=a) for p in (0, 1, 2) for a in (0, 1)]
    batch, _ = batch_of([made[i] for i in (5, 0, 3, 2, 4, 1)], None)
    assert batch.student_tokens_BT[:6, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.response_BR[:6, 0].tolist() == [0, 1, 0, 1, 0, 1]


def test_what_is_too_long_on_either_side_is_dropped_and_counted_never_cut():
    short, long = trajectory(0, [1] * 10, [2] * 9 + [EOS]), trajectory(1, [1] * 10, [2] * 29 + [EOS])
    _, report = batch_of([short, long], None, max_length=39)
    assert (report.trajectories, report.too_long, report.tokens) == (1, 1, 10)
    targets = {"p0": (3,) * 30, "p1": (3,)}
    batch, report = batch_of([short, long], targets, max_length=40)
    assert (report.trajectories, report.too_long) == (2, 0) and batch.student_tokens_BT.shape[1] == 40
    batch, report = batch_of([short, long], {**targets, "p0": (3,) * 31}, max_length=40)
    assert (report.trajectories, report.too_long) == (1, 1)
    assert batch.response_BR[0].tolist()[:30] == list(long.response)


def test_dropped_trajectories_stay_out_and_an_empty_step_has_no_weight():
    gone = trajectory(0, [1], [2, EOS], dropped=True)
    batch, report = batch_of([gone], {"p0": (1,)})
    assert not batch.weight_BR.any() and batch.student_at_BR.min() >= 0
    assert (report.trajectories, report.tokens, report.too_long) == (0, 0, 0)
    _, report = batch_of([gone, trajectory(1, [1], [2, EOS])], None)
    assert report.trajectories == 1


@pytest.mark.parametrize("alone", [True, False])
def test_a_target_may_read_another_seam_where_no_token_is_scored(alone):
    """Response 7 8 6 EOS; the target reads 7 8 behind its prompt, and EOS behind a seam in place of 6."""
    made = [trajectory(i, [1, 2], [7, 8, 6, EOS]) for i in range(2)]
    reading = Reading((5, 5, 7, 8, 4, 4, EOS), (1, 2, -1, 5))
    batch, report = to_batch(
        PROBLEMS, made, reads=lambda t: reading, reduction="token_mean", max_length=64, eos_ids={EOS}, alone=alone
    )
    assert report.tokens == 6 and np.count_nonzero(batch.weight_BR) == 6
    assert batch.weight_BR.max() == np.float32(1 / 6)
    for b, r in np.argwhere(batch.weight_BR > 0):
        assert batch.target_tokens_BT[b, batch.target_at_BR[b, r] + 1] == batch.response_BR[b, r]
        assert batch.student_tokens_BT[b, batch.student_at_BR[b, r] + 1] == batch.response_BR[b, r]
    assert not np.any(batch.response_BR[batch.weight_BR > 0] == 6)
    short, _ = to_batch(
        PROBLEMS, made, reads=lambda t: reading, reduction="sum", max_length=6, eos_ids={EOS}, alone=alone
    )
    assert not short.weight_BR.any(), "what the target reads is too long"


def test_a_pod_sized_step_is_packed_in_seconds():
    rng = np.random.default_rng(0)
    problems = [Problem(f"p{i}", "?") for i in range(120)]
    made = [trajectory(i, range(100), [*rng.integers(10, 99, 9_998).tolist(), EOS]) for i in range(120)]
    start = time.process_time()
    batch, _ = to_batch(
        problems,
        made,
        reads=lambda t: after(t.prompt, t.response),
        reduction="sum",
        max_length=16384,
        row_length=32768,
        multiple=4,
        eos_ids={EOS},
    )
    assert batch.student_tokens_BT.shape[0] == 40
    assert batch.weight_BR.sum() == 120 * 9_999 and time.process_time() - start < 5
