"""The three values that flow through a run: Problem, Trajectory, Batch. Frozen, without behaviour.

Shape legend, used in every array name (`x_BTD`): B batch rows, T sequence, R response tokens, V vocabulary, D model
width (E: the target's width), N query heads, K key-value heads, H head size, F feed-forward, L layers, S cache slots.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class UserError(ValueError):
    """A mistake of the user's: the message names key, value, what is allowed and what to change."""


@dataclass(frozen=True)
class Problem:
    """A dataset item. `answer` is the reference answer, `response` a full worked response (reasoning and answer);
    `level` and `subject` are what results are told apart by."""

    id: str
    question: str
    answer: str | None = None
    response: str | None = None
    level: str | None = None
    subject: str | None = None


class TopK(NamedTuple):
    """What a target says before each response token: its K most likely ids, the best first, and their
    log-probabilities at temperature 1 over its whole vocabulary (int32, float32)."""

    ids_RK: np.ndarray
    logprobs_RK: np.ndarray


@dataclass(frozen=True)
class Trajectory:
    """A response with its provenance. Ids are what a model sampled; they are never encoded a second time.

    ended:   "stopped" (the model wrote EOS), "cut" (length limit), "dataset" or "assembled" (we put the EOS there).
    verdict: why a rewrite was kept, replaced by its original or dropped; "written" where nobody rewrote.
    dropped: True keeps the trajectory in the records and out of the batch.
    logprobs: the writer's own log-probability of each response token at temperature 1, or empty.
    rewriting: tokens that a rewriter read and answered for it, its own thinking among them, whatever the verdict.
    trimmed: tokens of the original that the rewriter was not shown, for want of room.
    reused: it was made in an earlier step, and is used again.
    target: what a target on servers says of the response. It is not in the records: a target that never changes says it
    again, and it is a hundred times as long as the ids.
    """

    problem_id: str
    attempt: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    writer: str
    version: int
    ended: str
    verdict: str = "written"
    dropped: bool = False
    original: "Trajectory | None" = None
    logprobs: tuple[float, ...] = ()
    rewriting: tuple[int, int] = (0, 0)
    trimmed: int = 0
    reused: bool = False
    target: TopK | None = field(default=None, compare=False, repr=False)


class Batch(NamedTuple):
    """Trajectories as fixed-shape arrays, one or more a row. Row b of every array holds the same trajectories.

    student_tokens_BT    int32, plain prompt then response, trajectory after trajectory, padded on the right.
    student_segments_BT  int32, which trajectory of the row a token belongs to, from 1 on; 0 is padding.
    student_at_BR        int32, the position in that row whose hidden state predicts response token r.
    target_tokens_BT, target_segments_BT, target_at_BR   the same responses after the target's own prompts (its T may
                         differ); (B, 1) arrays of zeros and the student's positions when the recipe has no target.
    response_BR          int32, the response ids.
    index_BR             int32, the number of that token in its own response, from 0 on.
    weight_BR            float32, 0 at padding; the reduction is inside it (1 / global token count for a token mean).
    top_ids_BRK, top_logprobs_BRK   what a target on servers says before each response token, ids of -1 at padding; None
                         if it is read on the mesh. Where they are, the target's other arrays are as with none.
    pass_rate_BR         float32, the share of right attempts of the token's problem; None if no token weight is set.
    """

    student_tokens_BT: Array
    student_segments_BT: Array
    student_at_BR: Array
    target_tokens_BT: Array
    target_segments_BT: Array
    target_at_BR: Array
    response_BR: Array
    index_BR: Array
    weight_BR: Array
    top_ids_BRK: Array | None = None
    top_logprobs_BRK: Array | None = None
    pass_rate_BR: Array | None = None
