"""Claims about rows: every trajectory in one, both sides fit, little padding, few shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpd_jax.data.packing import pack, three_bits, two_bits


def lengths(seed: int, median: float = 2500.0, count: int = 32) -> np.ndarray:
    """Lognormal, sigma 0.8, at most 10,000."""
    drawn = np.exp(np.log(median) + 0.8 * np.random.default_rng(seed).standard_normal(count))
    return np.clip(drawn, 8, 10_000).astype(int)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)), max_size=40),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
)
def test_every_trajectory_has_one_row_and_every_row_holds_what_is_in_it(made, multiple, alone):
    prompts, targets, responses = np.array(made, int).reshape(-1, 3).T
    packing = pack(prompts + responses, targets + responses, responses, row_length=120, multiple=multiple, alone=alone)
    assert sorted(i for row in packing.members for i in row) == list(range(len(made)))
    assert packing.rows % multiple == 0 and packing.rows >= max(1, len(packing.members))
    for row in map(list, packing.members):
        assert (prompts + responses)[row].sum() <= packing.student <= 120
        assert (targets + responses)[row].sum() <= packing.target <= 120
        assert responses[row].sum() <= packing.responses <= 120
    if alone:
        assert packing.members == tuple((i,) for i in range(len(made)))


def test_padding_of_lognormal_lengths_in_rows_of_16384():
    """The mean over draws; padded to its longest sequence, a draw is two thirds padding."""
    packed, unpacked = [], []
    for seed in range(50):
        drawn = lengths(seed)
        packing = pack(drawn, drawn, drawn, row_length=16_384, multiple=1)
        packed.append(1 - drawn.sum() / (packing.rows * packing.student))
        unpacked.append(1 - drawn.mean() / drawn.max())
    assert np.mean(packed) <= 0.08 and np.mean(unpacked) >= 0.6


@pytest.mark.parametrize(("multiple", "most"), [(1, 36), (8, 10), (32, 6)])
def test_a_run_whose_responses_grow_five_times_shorter_compiles_few_updates(multiple, most):
    shapes = set()
    for step in range(200):
        drawn = lengths(step, 2500 * (1 - 0.8 * step / 200))
        packing = pack(drawn + 200, drawn + 300, drawn, row_length=16_384, multiple=multiple)
        shapes.add((packing.rows, packing.student, packing.target, packing.responses))
    assert len(shapes) <= most


def test_one_device_and_eight_hold_the_same_in_as_many_tokens_where_rows_divide():
    """What is appended for the devices' sake is empty rows, unless other rows waste less."""
    drawn = np.full(64, 1000)
    one, eight = (pack(drawn, drawn, drawn, row_length=8192, multiple=m) for m in (1, 8))
    assert one == eight


def test_two_bits_gives_few_lengths_that_hold_what_they_must():
    held = [two_bits(n) for n in range(1, 32769)]
    assert all(length >= n for n, length in enumerate(held, start=1))
    assert len(set(held)) == 21 and held[0] == 32
    assert max(1 - n / two_bits(n) for n in range(32, 32769)) <= 1 / 3


def test_three_bits_counts_exactly_to_eight_and_by_a_quarter_of_an_octave_beyond():
    held = [three_bits(n) for n in range(1, 65)]
    assert held[:8] == list(range(1, 9)) and sorted(set(held[8:])) == [10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    assert all(count >= n for n, count in enumerate(held, start=1)) and three_bits(0) == 1
