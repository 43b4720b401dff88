"""A recipe's writer and rewriter as the loop calls them: on the run's samplers, with progress that a stop cuts short.

The only place that matches on recipe values.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from mpd_jax import hosts
from mpd_jax.config import RunConfig
from mpd_jax.data.chat import Chat
from mpd_jax.eval.grade import GraderPool, grade
from mpd_jax.recipe import keep, rewrite, write
from mpd_jax.roles import Roles, rewriting_room
from mpd_jax.samplers import Samplers
from mpd_jax.sampling.sampler import Sampler
from mpd_jax.train.curriculum import cap
from mpd_jax.train.state import Memory
from mpd_jax.types import Problem, Trajectory

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
Rewriter = Callable[..., list[Trajectory]]  # (problems, written, step, rollbacks=, progress=)


@dataclass(frozen=True)
class RecipeParts:
    write: Callable[[Sequence[Problem], int, Memory], list[Trajectory]]
    rewrite: Callable[[Sequence[Problem], Sequence[Trajectory], int, Memory], list[Trajectory]]


def stopping(advance: Callable[..., None]) -> Callable[[int], None]:
    """A sampler's progress that also looks whether the run was asked to stop: sampling can take many minutes."""

    def progress(done: int) -> None:
        advance(done)
        hosts.check()

    return progress


def _correct(graders: GraderPool, answer: str, reference: str) -> bool:
    """By process 0 alone: a grader that runs out of time on one host may not split the run."""
    return hosts.from_main(lambda: graders.grade_many([(answer, reference)])[0].correct)


def make_rewriter(config: RunConfig, roles: Roles, sampler: Sampler | None, graders: GraderPool) -> Rewriter:
    """What rewrites, see recipe/rewrite.py. sampler: answers for the model that does, if one does."""
    recipe = config.recipe
    judge = keep.Judge(roles.student.chat, recipe.rewrite.keep, recipe.rewrite.fallback, partial(_correct, graders))
    match recipe.rewrite.how:
        case "nobody":
            return rewrite.Nobody(judge)
        case "earliest_correct_prefix":
            return rewrite.EarliestCorrectPrefix(judge)
        case "truncate":
            return rewrite.Truncate(judge, recipe.rewrite.truncate_to, recipe.rewrite.truncate_ratio)
        case "compress" | "repair" as how:
            assert sampler is not None and roles.rewriter is not None
            room, too_long = rewriting_room(config, roles), recipe.rewrite.too_long
            by, chat = recipe.rewrite.by, roles.rewriter.chat
            return rewrite.ModelRewriter(
                by, sampler, chat, config.sampling.rewriter, judge, config.run.seed, room, how, too_long
            )


def recipe_parts(
    config: RunConfig, roles: Roles, samplers: Samplers, graders: GraderPool, progress: Progress
) -> RecipeParts:
    """The recipe's callables. A state's rollback count is folded into every key, and its rung caps the student."""
    recipe, sampling, seed = config.recipe, config.sampling, config.run.seed
    student = roles.student.chat
    match recipe.write.by:
        case "dataset":
            writer = write.DatasetWriter(student)
        case role:
            files = roles.student if role == "student" else roles.teacher
            assert samplers.writer is not None and files is not None
            writer = write.ModelWriter(
                role, samplers.writer, files.chat, student, sampling.writer, recipe.write.attempts, seed
            )
    rewriter = make_rewriter(config, roles, samplers.rewriter, graders)

    def write_step(problems: Sequence[Problem], step: int, memory: Memory) -> list[Trajectory]:
        by = writer
        if sampling.curriculum is not None:
            assert isinstance(writer, write.ModelWriter), "a curriculum for a writer that is not the student"
            by = replace(writer, sampling=replace(sampling.writer, max_tokens=cap(sampling.curriculum, memory)))
        with progress(f"step {step + 1}: writing", len(problems) * recipe.write.attempts) as advance:
            return by(problems, step, rollbacks=int(memory["rollbacks"]), progress=stopping(advance))

    def rewrite_step(
        problems: Sequence[Problem], written: Sequence[Trajectory], step: int, memory: Memory
    ) -> list[Trajectory]:
        with progress(f"step {step + 1}: rewriting", len(written)) as advance:
            return rewriter(problems, written, step, rollbacks=int(memory["rollbacks"]), progress=stopping(advance))

    return RecipeParts(write_step, rewrite_step)


def share_right(problems: Sequence[Problem], trajectories: Sequence[Trajectory], chat: Chat) -> float | None:
    """The share of trajectories whose answer is right by plain rules; None if no problem has a reference."""
    references = {problem.id: problem.answer for problem in problems}
    graded = [
        grade(chat.answer_text(t.response), reference).correct
        for t in trajectories
        if (reference := references[t.problem_id]) is not None
    ]
    return sum(graded) / len(graded) if graded else None
