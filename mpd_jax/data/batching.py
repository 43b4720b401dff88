"""Trajectories into one Batch: the file where prompt, response and target stay aligned.

Response token r is predicted by the hidden state just before it, in the student's array (plain prompt) and in the
target's (its own prompt) alike; every trajectory has the same row in both. Nothing is appended, cut or encoded here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpd_jax.types import Batch, Problem, Trajectory

Bucket = Callable[[int], int]
_SHORTEST = 32


@dataclass(frozen=True)
class BatchReport:
    """What became of a step's trajectories.

    rows, tokens: trajectories and response tokens that are trained on. too_long: trajectories left out because prompt
    and response exceed max_length on either side. padding: the share of the student's array that is padding.
    """

    rows: int
    tokens: int
    too_long: int
    padding: float


def two_bits(length: int) -> int:
    """The smallest number of the form 2^k or 3 * 2^(k-1), 32 or more, that holds `length`: two shapes an octave.

    Up to 32,768 tokens there are 21. At most a third of a row is padding beyond the longest trajectory.
    """
    power = max(_SHORTEST, 1 << max(length - 1, 0).bit_length())
    return power * 3 // 4 if power * 3 // 4 >= max(length, _SHORTEST) else power


def to_batch(
    problems: Sequence[Problem],
    trajectories: Sequence[Trajectory],
    *,
    target_prompts: Mapping[str, Sequence[int]] | None,
    rows: int,
    reduction: str,
    max_length: int,
    eos_ids: Collection[int],
    bucket: Bucket = two_bits,
) -> tuple[Batch, BatchReport]:
    """The trajectories that were not dropped, as arrays of `rows` rows, and a report.

    target_prompts: problem id -> the ids the target reads before the response; None where there is no target. A row
    is in the order of its problem and attempt. The result's shapes are functions of the buckets of the longest prompt
    and of the longest response, so that few of them are compiled. Rows that nothing fills have weight 0.
    """
    order = {problem.id: at for at, problem in enumerate(problems)}
    live = [t for t in trajectories if not t.dropped]
    live.sort(key=lambda t: (order[t.problem_id], t.attempt))
    targets = target_prompts or {}

    def longest(t: Trajectory) -> int:
        return max(len(t.prompt), len(targets.get(t.problem_id, ()))) + len(t.response)

    kept = [t for t in live if longest(t) <= max_length]
    assert len(kept) <= rows, f"{len(kept)} trajectories for {rows} rows"
    for t in kept:
        _check_end(t, eos_ids)
    responses = [t.response for t in kept]
    room = min(bucket(max(map(len, responses), default=1)), max_length)
    response_BR, live_BR = _padded(responses, rows, room)
    student_BT, student_at_BR = _side([t.prompt for t in kept], response_BR, live_BR, bucket, max_length)
    if target_prompts is None:
        target_BT, target_at_BR = np.zeros((rows, 1), np.int32), student_at_BR
    else:
        prompts = [target_prompts[t.problem_id] for t in kept]
        target_BT, target_at_BR = _side(prompts, response_BR, live_BR, bucket, max_length)
    tokens = int(live_BR.sum())
    weight = _weight(reduction, tokens)
    batch = Batch(
        student_BT, student_at_BR, target_BT, target_at_BR, response_BR, np.where(live_BR, weight, np.float32(0))
    )
    filled = sum(len(t.prompt) + len(t.response) for t in kept)
    return batch, BatchReport(len(kept), tokens, len(live) - len(kept), 1 - filled / student_BT.size)


def _weight(reduction: str, tokens: int) -> np.float32:
    weights = {"token_mean": 1 / max(tokens, 1), "sum": 1.0}
    assert reduction in weights, f"reduction {reduction!r}"
    return np.float32(weights[reduction])


def _check_end(t: Trajectory, eos_ids: Collection[int]) -> None:
    """EOS is a target exactly where the trajectory ended: an EOS after a cut would teach stopping early."""
    ends = bool(t.response) and t.response[-1] in eos_ids
    assert t.response and ends == (t.ended != "cut"), (
        f"problem {t.problem_id}, attempt {t.attempt}: {len(t.response)} tokens, ended {t.ended!r}, EOS last: {ends}"
    )


def _padded(sequences: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids (rows, width), zero where there are none, and where there are some."""
    lengths = np.zeros(rows, np.int64)
    lengths[: len(sequences)] = [len(s) for s in sequences]
    filled = np.arange(width)[None, :] < lengths[:, None]
    padded = np.zeros((rows, width), np.int32)
    if sequences:
        padded[filled] = np.concatenate([np.asarray(s, np.int32) for s in sequences])
    return padded, filled


def _side(
    prompts: Sequence[Sequence[int]], response_BR: np.ndarray, live_BR: np.ndarray, bucket: Bucket, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, T) of prompt then response, and for each response token the position just before it."""
    rows, room = response_BR.shape
    width = bucket(max(map(len, prompts), default=1))
    tokens_BT, _ = _padded(prompts, rows, min(width + room, max_length))
    starts = np.zeros(rows, np.int32)
    starts[: len(prompts)] = [len(p) for p in prompts]
    at_BR = starts[:, None] + np.arange(room, dtype=np.int32)[None, :]
    row, column = np.nonzero(live_BR)
    tokens_BT[row, at_BR[row, column]] = response_BR[row, column]
    return tokens_BT, np.where(live_BR, at_BR - 1, 0).astype(np.int32)
