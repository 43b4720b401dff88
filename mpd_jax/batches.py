"""A step's trajectories as the arrays that this run trains on: the config, the models and the mesh decide their shapes.

The alignment itself is data/batching.py's.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jax.sharding import Mesh

from mpd_jax.config import RunConfig
from mpd_jax.data.batching import BatchReport, Reading, Reads, after, to_batch
from mpd_jax.data.chat import DELIMITER, Chat
from mpd_jax.models.kernels import takes_segments
from mpd_jax.recipe.rewrite import rewriting_prompt
from mpd_jax.roles import ModelFiles, Roles, rewriting_room
from mpd_jax.rollouts import share_right
from mpd_jax.types import Batch, Problem, Trajectory


def batch_to_train_on(
    config: RunConfig, mesh: Mesh, roles: Roles, problems: Sequence[Problem], trajectories: Sequence[Trajectory]
) -> Batch | None:
    """The kept trajectories, packed if all who read can; the target reads under its own context."""
    target = roles.target(config.recipe)
    reads = target_reads(config, roles, problems) if target else None
    scored = [as_scored(config, roles, t) for t in trajectories]
    batch, report = batch_of(config, mesh, roles.student, target, problems, scored, reads)
    return batch if report.trajectories else None


def target_reads(config: RunConfig, roles: Roles, problems: Sequence[Problem]) -> Reads:
    """What the target reads of a trajectory, under recipe.target.context; of one in the form of `as_scored`."""
    by_id, context = {p.id: p for p in problems}, config.recipe.target.context
    target = roles.target(config.recipe)
    assert target is not None, "no target"
    room = rewriting_room(config, roles) if context == "rewrite" else 0

    def reads(t: Trajectory) -> Reading | None:
        problem = by_id[t.problem_id]
        if context == "rewrite":
            return _as_rewritten(config, roles.student.chat, target.chat, problem, t, room)
        return after(target.chat.prompt(context, problem), t.response)

    return reads


def _as_rewritten(
    config: RunConfig, student: Chat, target: Chat, problem: Problem, t: Trajectory, room: int
) -> Reading | None:
    """A rewrite as its rewriter wrote it: what that read (TRD, 2606.08432), its own thinking closed, then reasoning,
    delimiter and answer. Its delimiter stands for the end of the student's thinking, see `exchanged`; what else joins
    reasoning and answer the target does not score."""
    assert t.original is not None, f"problem {t.problem_id}: no rewrite, and its target reads under `rewrite`"
    how, draft = config.recipe.rewrite, student.draft(t.original.response)
    found = rewriting_prompt(target, how.how, problem, draft, room, how.too_long)
    if found is None:
        return None
    parts = student.split((*student.opening, *t.response))
    reasoning, end = parts.reasoning or (), (*parts.answer, *student.end)
    assert t.response[: len(reasoning)] == reasoning and t.response[len(t.response) - len(end) :] == end, t.response
    seam = target.encode(f"{DELIMITER}\n" if target.text(reasoning[-1:]).endswith("\n") else f"\n{DELIMITER}\n")
    head = (*found[0], *target.no_thoughts)
    at = np.full(len(t.response), -1)
    at[: len(reasoning)] = len(head) - 1 + np.arange(len(reasoning))
    if student.closing is not None:
        at[t.response.index(student.closing)] = len(head) + len(reasoning) + seam.index(target.delimiter) - 1
    at[len(at) - len(end) :] = len(head) + len(reasoning) + len(seam) - 1 + np.arange(len(end))
    return Reading((*head, *reasoning, *seam, *end), at.tolist())


def exchanged(config: RunConfig, roles: Roles) -> tuple[int, int] | None:
    """Two ids that are read as each other in the target's distribution: where a rewriter ends its reasoning it writes a
    delimiter, and the student closes its thinking."""
    target = roles.target(config.recipe)
    if config.recipe.target.context != "rewrite" or target is None or roles.student.chat.closing is None:
        return None
    return target.chat.delimiter, roles.student.chat.closing


def as_scored(config: RunConfig, roles: Roles, t: Trajectory) -> Trajectory:
    """A trajectory with what no target scores counted to its prompt: under `rewrite` that is what opens the student's
    thinking span, for a rewriter opens none before it rewrites."""
    opening = roles.student.chat.opening if config.recipe.target.context == "rewrite" else ()
    if not opening or t.response[: len(opening)] != opening:
        return t
    length = len(opening)
    return replace(t, prompt=(*t.prompt, *opening), response=t.response[length:], logprobs=t.logprobs[length:])


def batch_of(
    config: RunConfig,
    mesh: Mesh,
    student: ModelFiles,
    target_files: ModelFiles | None,
    problems: Sequence[Problem],
    trajectories: Sequence[Trajectory],
    reads: Reads | None,
) -> tuple[Batch, BatchReport]:
    """The arrays of these trajectories as this run packs them; `reads`: what the target reads of one."""
    top_k, weights = config.recipe.target.top_k, config.recipe.loss.token_weight
    reading = (student, None if top_k else target_files)
    return to_batch(
        problems,
        trajectories,
        reads=reads,
        reduction=config.recipe.loss.reduction,
        max_length=config.train.max_length,
        eos_ids=student.eos_ids,
        row_length=config.train.row_length,
        multiple=mesh.shape["data"] * mesh.shape["fsdp"] * config.train.micro_batches,
        alone=not all(takes_segments(files.model.on(mesh).attention) for files in reading if files),
        top_k=top_k,
        pass_rates=None if weights == "none" else pass_rates(problems, trajectories, student.chat),
    )


def pass_rates(problems: Sequence[Problem], trajectories: Sequence[Trajectory], chat: Chat) -> dict[str, float]:
    """Problem id -> the share of its attempts, as they were written, whose answer is right by plain rules; 0.5 where
    there is no reference answer to tell by."""
    written: dict[str, list[Trajectory]] = {problem.id: [] for problem in problems}
    for t in trajectories:
        written[t.problem_id].append(t.original or t)
    shares = {problem.id: share_right([problem], written[problem.id], chat) for problem in problems}
    return {id: 0.5 if share is None else share for id, share in shares.items()}
