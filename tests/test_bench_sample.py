"""The sampler's benchmark, on the shipped student and a few tokens: what it counts, not what it times."""

import json
import sys
from dataclasses import replace

import pytest

from mpd_jax.bench import sample
from mpd_jax.bench.sample import WITHOUT_TORCH, compare, differing_share, refill_steps, shape_divergence
from mpd_jax.sampling.sampler import Response, SamplingConfig

SLOTS, REQUESTS, TOKENS = 4, 12, 48
TRANSFORMERS = ("transformers_tokens_per_second", "speedup", "equal_responses")


def answer(*ids: int) -> Response:
    return Response(ids, (0.0,) * len(ids), "stopped")


@pytest.fixture(scope="module")
def subject():
    """One id in sixteen ends a response, so that a few tokens make lengths uneven."""
    opened = sample.open_subject("tiny:student", REQUESTS, TOKENS)
    return replace(opened, files=replace(opened.files, eos_ids=frozenset(range(0, 512, 16))))


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ([], [], 0),
        ([answer(1, 2, 3)], [answer(1, 2, 3)], 0),
        ([answer(1, 2, 3)], [answer(1, 9, 3)], 1 / 3),
        ([answer(1, 2, 3)], [answer(1, 2, 3, 4, 5)], 2 / 5),
        ([answer(1, 2, 3, 4)], [answer(2, 3, 4)], 1),
        ([answer(1), answer(1, 2, 3)], [answer(2), answer(1, 2, 3)], 1 / 4),
    ],
)
def test_the_share_is_of_positions_over_the_longer_response(one, other, share):
    assert differing_share(one, other) == differing_share(other, one) == share


@pytest.mark.parametrize(
    ("ids", "kept"), [([5, 1, 5, 2], (5, 1)), ([2, 1, 5], (2,)), ([5, 6], (5, 6)), ([5, 1], (5, 1)), ([], ())]
)
def test_a_response_ends_with_its_first_eos(ids, kept):
    assert sample._until_eos(ids, frozenset({1, 2})) == kept


def test_refilled_slots_stay_within_the_ideal_and_below_static_batches(subject):
    result = refill_steps(subject, SLOTS)
    responses = subject.sampler(SLOTS).sample(subject.requests, SamplingConfig(max_tokens=TOKENS))
    lengths = [len(r.ids) for r in responses]
    total, longest = sum(lengths), max(lengths)
    assert longest > 1.5 * total / REQUESTS, "the test wants uneven lengths"
    assert (result["slots"], result["responses"], result["longest"]) == (SLOTS, REQUESTS, longest)
    assert result["mean_length"] == total / REQUESTS
    assert max(longest, total / SLOTS) <= result["decode_steps"] <= total / SLOTS + longest
    assert result["ratio"] == pytest.approx(result["decode_steps"] / (total / SLOTS + longest))
    static = max(lengths[:4]) + max(lengths[4:8]) + max(lengths[8:])
    assert result["static_ratio"] == pytest.approx(static / (total / SLOTS + longest))
    assert result["ratio"] < result["static_ratio"]


def test_few_tokens_change_with_the_shape(subject):
    result = shape_divergence(subject, (SLOTS, 6), count=8)
    assert (result["slots"], result["responses"]) == ([SLOTS, 6], 8)
    assert 0 <= result["share"] < 0.05


def test_the_other_answers_in_batches_and_equal_responses_are_counted(subject):
    sampler, sizes = subject.sampler(SLOTS), []

    def generate(requests, max_tokens):
        sizes.append(len(requests))
        responses = sampler.sample(requests, SamplingConfig(temperature=0.0, max_tokens=max_tokens))
        return [(0,) if q is subject.requests[5] else r.ids for q, r in zip(requests, responses, strict=True)]

    result = compare(subject, generate, SLOTS, count=10, repeats=2)
    assert sizes == [4] + [4, 4, 2] * 2
    assert result["responses"] == 10 and result["equal_responses"] == 9 / 10
    assert result["speedup"] == result["tokens_per_second"] / result["transformers_tokens_per_second"]


def test_without_torch_only_the_comparison_is_missing(subject, monkeypatch, capsys):
    original = sample.transformers_generate

    def without_torch(*given):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch", None)  # importing it fails
            return original(*given)

    monkeypatch.setattr(sample, "transformers_generate", without_torch)
    monkeypatch.setattr(sample, "open_subject", lambda path, count, max_tokens: subject)
    result = sample.run(json=True, batches=(SLOTS,), rounds=REQUESTS // SLOTS, repeats=1, max_tokens=TOKENS)
    assert capsys.readouterr().out == "" and json.loads(json.dumps(result)) == result
    (row,) = result["batches"]
    assert [row[name] for name in TRANSFORMERS] == [None] * 3
    assert row["responses"] == REQUESTS and 0 < row["tokens"] <= REQUESTS * TOKENS and row["tokens_per_second"] > 0
    assert result["steps"]["responses"] == result["shape_divergence"]["responses"] == REQUESTS
    sample.show(result)
    assert WITHOUT_TORCH in capsys.readouterr().out.splitlines()
