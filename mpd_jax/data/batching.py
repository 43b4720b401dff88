"""Trajectories into one Batch: the file where prompt, response and target stay aligned.

Response token r is predicted by the hidden state just before it, in the student's array (plain prompt) and in the
target's (its own prompt) alike; a trajectory has the same row in both, alone or packed beside others (data/packing.py).
Nothing is appended, cut or encoded here.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mpd_jax.data.packing import pack
from mpd_jax.types import Batch, Problem, Trajectory


class Reading(NamedTuple):
    """What a target reads of a trajectory. at: for each response token the position in `tokens` whose hidden state
    predicts it; -1 where the target reads something else there, and the token is no part of the loss."""

    tokens: Sequence[int]
    at: Sequence[int]


def after(prompt: Sequence[int], response: Sequence[int]) -> Reading:
    """The response after another prompt, every token of it."""
    return Reading((*prompt, *response), range(len(prompt) - 1, len(prompt) + len(response) - 1))


# Of a trajectory; None where that fits nowhere.
Reads = Callable[[Trajectory], Reading | None]
Members = Sequence[Sequence[int]]  # the trajectories of each row, by number


@dataclass(frozen=True)
class BatchReport:
    """What became of a step's trajectories.

    trajectories, tokens: how many trajectories and response tokens are trained on. too_long: trajectories left out
    because prompt and response exceed max_length on either side.
    """

    trajectories: int
    tokens: int
    too_long: int


def to_batch(
    problems: Sequence[Problem],
    trajectories: Sequence[Trajectory],
    *,
    reads: Reads | None,
    reduction: str,
    max_length: int,
    eos_ids: Collection[int],
    row_length: int | None = None,
    multiple: int = 1,
    alone: bool = False,
    top_k: int = 0,
    pass_rates: Mapping[str, float] | None = None,
) -> tuple[Batch, BatchReport]:
    """The trajectories that were not dropped, as arrays, and a report.

    reads: what the target reads of a trajectory; None where there is no target.
    top_k: above 0 the target has read them elsewhere, and its say is in the trajectories.
    pass_rates: problem id -> the share of its attempts that are right, where a token weight is told it.
    row_length, multiple, alone: as `pack` takes them; rows of max_length unless told. Rows that nothing fills have
    weight 0. Unpacked, rows are in the order of problem and attempt.
    """
    order = {problem.id: at for at, problem in enumerate(problems)}
    live = [t for t in trajectories if not t.dropped]
    live.sort(key=lambda t: (order[t.problem_id], t.attempt))
    read = {id(t): reads(t) for t in live} if reads else {}
    kept = fitting(live, reads and (lambda t: read[id(t)]), max_length)
    for t in kept:
        _check_ends(t, eos_ids)
    responses = [t.response for t in kept]
    students = [after(t.prompt, t.response) for t in kept]
    targets = [found for t in kept if (found := read.get(id(t)))]
    read_here = reads is not None and not top_k
    student, target = ([len(one.tokens) for one in side] for side in (students, targets if read_here else students))
    packing = pack(
        student, target, list(map(len, responses)), row_length=row_length or max_length, multiple=multiple, alone=alone
    )
    slots = packing.rows, packing.responses
    student_arrays = _side(packing.members, students, (packing.rows, packing.student), slots)
    if not read_here:
        empty = np.zeros((packing.rows, 1), np.int32)
        target_arrays = empty, empty, student_arrays[2]
    else:
        target_arrays = _side(packing.members, targets, (packing.rows, packing.target), slots)
    response_BR, index_BR, live_BR = _slots(packing.members, responses, slots)
    if reads is not None:
        live_BR &= _spread(packing.members, responses, slots, [np.asarray(one.at) >= 0 for one in targets]) > 0
    weight = _weight(reduction, int(live_BR.sum()))
    batch = Batch(*student_arrays, *target_arrays, response_BR, index_BR, np.where(live_BR, weight, np.float32(0)))
    if top_k:
        batch = batch._replace(**_tops(packing.members, kept, slots, top_k))
    if pass_rates is not None:
        rates = [pass_rates[t.problem_id] for t in kept]
        batch = batch._replace(pass_rate_BR=_spread(packing.members, responses, slots, rates))
    return batch, BatchReport(len(kept), int(live_BR.sum()), len(live) - len(kept))


def fitting(trajectories: Sequence[Trajectory], reads: Reads | None, max_length: int) -> list[Trajectory]:
    """Those that are trained on: not dropped, and no longer than max_length for whoever reads them."""

    def fits(t: Trajectory) -> bool:
        own = len(t.prompt) + len(t.response)
        if reads is None:
            return own <= max_length
        target = reads(t)
        return target is not None and max(own, len(target.tokens)) <= max_length

    return [t for t in trajectories if not t.dropped and fits(t)]


def _weight(reduction: str, tokens: int) -> np.float32:
    weights = {"token_mean": 1 / max(tokens, 1), "sum": 1.0}
    assert reduction in weights, f"reduction {reduction!r}"
    return np.float32(weights[reduction])


def _check_ends(t: Trajectory, eos_ids: Collection[int]) -> None:
    """EOS is a target exactly where the trajectory ended: an EOS after a cut would teach stopping early."""
    ends = bool(t.response) and t.response[-1] in eos_ids
    assert t.prompt and t.response and ends == (t.ended != "cut"), (
        f"problem {t.problem_id}, attempt {t.attempt}: {len(t.prompt)} and {len(t.response)} tokens, "
        f"ended {t.ended!r}, EOS last: {ends}"
    )


def _placed(members: Members, lengths: Sequence[int]) -> Iterator[tuple[int, int, int, slice]]:
    """(trajectory, row, its number in the row, where it lies there) when each takes its length."""
    for row, inside in enumerate(members):
        start = 0
        for number, at in enumerate(inside):
            yield at, row, number, slice(start, start + lengths[at])
            start += lengths[at]


def _side(
    members: Members, readings: Sequence[Reading], shape: tuple[int, int], slots: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and segments (B, T), and for each response token (B, R) the position whose hidden state predicts it."""
    tokens_BT, segments_BT, at_BR = (np.zeros(size, np.int32) for size in (shape, shape, slots))
    whole, own = (_placed(members, [len(one[part]) for one in readings]) for part in (0, 1))
    for (at, row, number, span), (*_, slot) in zip(whole, own, strict=True):
        tokens_BT[row, span] = readings[at].tokens
        segments_BT[row, span] = number + 1
        at_BR[row, slot] = span.start + np.maximum(readings[at].at, 0)
    return tokens_BT, segments_BT, at_BR


def _slots(
    members: Members, responses: Sequence[Sequence[int]], slots: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Response ids (B, R), their numbers in their own responses, and where there are any."""
    response_BR, index_BR, live_BR = np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.zeros(slots, bool)
    for at, row, _, slot in _placed(members, list(map(len, responses))):
        response_BR[row, slot] = responses[at]
        index_BR[row, slot] = np.arange(len(responses[at]))
        live_BR[row, slot] = True
    return response_BR, index_BR, live_BR


def _spread(
    members: Members, responses: Sequence[Sequence[int]], slots: tuple[int, int], values: Sequence[Any]
) -> np.ndarray:
    """A number of each trajectory, or one of each of its response tokens, at these tokens: (B, R)."""
    value_BR = np.zeros(slots, np.float32)
    for at, row, _, slot in _placed(members, list(map(len, responses))):
        value_BR[row, slot] = values[at]
    return value_BR


def _tops(members: Members, kept: Sequence[Trajectory], slots: tuple[int, int], k: int) -> dict[str, np.ndarray]:
    """What the target says before each response token, (B, R, K)."""
    ids_BRK, logprobs_BRK = np.full((*slots, k), -1, np.int32), np.zeros((*slots, k), np.float32)
    for at, row, _, slot in _placed(members, [len(t.response) for t in kept]):
        top, wanted = kept[at].target, (len(kept[at].response), k)
        assert top is not None and top.ids_RK.shape == top.logprobs_RK.shape == wanted, (kept[at].problem_id, wanted)
        ids_BRK[row, slot], logprobs_BRK[row, slot] = top
    return {"top_ids_BRK": ids_BRK, "top_logprobs_BRK": logprobs_BRK}
