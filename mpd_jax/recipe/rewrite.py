"""The rewrite axis: who rewrites a trajectory, which rewrites are kept, and what takes the place of the others.

A rewriter maps (problems, written, step) to as many trajectories in the same order, each with a verdict; the ones it
gives up are flagged as dropped, never left out, so that verdicts can be counted. MPD (2605.08776) filters nothing; the
keep rules are ours, off by default, and only the well-formedness of a rewrite is always required.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mpd_jax.data.chat import Chat
from mpd_jax.eval import grade
from mpd_jax.recipe.write import Progress
from mpd_jax.sampling.sampler import Request, Response, Sampler, SamplingConfig, request_key
from mpd_jax.types import Problem, Trajectory, UserError

# Verdicts. Every trajectory of a rewriter but Nobody carries one.
KEPT = "kept"
TOO_LONG = "too_long"  # the rewriting prompt and the rewrite do not fit the rewriter's window
UNFINISHED = "unfinished"  # the rewrite was cut off, or nothing followed the rewriter's own thinking
MALFORMED = "malformed"  # no delimiter line, a cut inside a token, no reasoning, or special tokens in the text
NO_ANSWER = "no_answer"  # the rewrite marks no answer although the problem or the original has one
ORIGINAL_UNFINISHED = "original_unfinished"  # keep rule `finished`
LONGER = "longer"  # keep rule `shorter`: not fewer tokens than the original
ANSWER_CHANGED = "answer_changed"  # keep rule `same_answer`; also where the original has no answer
WRONG = "wrong"  # keep rule `correct`
VERDICTS = (KEPT, TOO_LONG, UNFINISHED, MALFORMED, NO_ANSWER, ORIGINAL_UNFINISHED, LONGER, ANSWER_CHANGED, WRONG)

Keep = Literal["finished", "shorter", "same_answer", "correct"]


@dataclass(frozen=True)
class RewriteConfig:
    """how: compress (by a model), truncate (mechanically) or nothing. by: the model that rewrites; "teacher" is
    whatever the `rewriter` section names.

    keep:           rules a rewrite must pass; none is MPD's own setting.
    grader:         who judges the rule `correct`.
    fallback:       what a rewrite that fails becomes: dropped, or its original.
    truncate_to:    reasoning tokens that truncate leaves.
    truncate_ratio: the same as a share of the original's reasoning tokens.
    """

    how: Literal["nobody", "compress", "truncate"] = "nobody"
    by: Literal["teacher", "student"] = "teacher"
    keep: tuple[Keep, ...] = ()
    grader: Literal["rules", "math_verify"] = "rules"
    fallback: Literal["drop", "original"] = "drop"
    truncate_to: int | None = None
    truncate_ratio: float | None = None


@dataclass(frozen=True)
class Nobody:
    """The identity."""

    def __call__(
        self,
        problems: Sequence[Problem],
        written: Sequence[Trajectory],
        step: int,
        *,
        rollbacks: int = 0,
        progress: Progress | None = None,
    ) -> list[Trajectory]:
        return list(written)


def rules_correct(answer_text: str, reference: str) -> bool:
    return grade.grade(answer_text, reference).correct


def reference(problem: Problem) -> str:
    """The reference answer that the keep rule `correct` needs; UserError where there is none."""
    if problem.answer is None:
        raise UserError(
            f"recipe.rewrite.keep: 'correct' needs reference answers, and problem {problem.id!r} has none; name "
            "their column in problems.columns.answer, or take 'correct' out of recipe.rewrite.keep"
        )
    return problem.answer


@dataclass(frozen=True)
class Judge:
    """The keep rules, applied to an original and its rewrite. chat is the student's."""

    chat: Chat
    keep: tuple[Keep, ...]
    fallback: Literal["drop", "original"]
    correct: Callable[[str, str], bool] = rules_correct

    def finished(self, original: Trajectory) -> bool:
        return original.ended != "cut" and self.chat.split(original.response).closed

    def before(self, original: Trajectory) -> str | None:
        """The verdict that needs no rewrite, or None."""
        return ORIGINAL_UNFINISHED if "finished" in self.keep and not self.finished(original) else None

    def after(self, problem: Problem, original: Trajectory, response: Sequence[int]) -> str:
        """The verdict on a well-formed rewrite."""
        old, new = self.chat.answer_text(original.response), self.chat.answer_text(response)
        expected = problem.answer is not None or grade.extract_answer(old) is not None
        if expected and grade.extract_answer(new) is None:
            return NO_ANSWER
        if "shorter" in self.keep and len(response) >= len(original.response):
            return LONGER
        if "same_answer" in self.keep and not grade.same_answer(old, new):
            return ANSWER_CHANGED
        if "correct" in self.keep and not self.correct(new, reference(problem)):
            return WRONG
        return KEPT

    def settle(self, rewrite: Trajectory) -> Trajectory:
        """What a rewrite becomes by its verdict: itself, its original, or a dropped record."""
        if rewrite.verdict == KEPT:
            return rewrite
        if self.fallback == "drop":
            return replace(rewrite, dropped=True)
        assert rewrite.original is not None, "a rewrite without its original"
        return replace(rewrite.original, verdict=rewrite.verdict)


@dataclass(frozen=True)
class ModelRewriter:
    """A model reads problem and draft under the compress context and writes the reasoning anew.

    chat is the rewriter's, judge.chat the student's. window: the longest prompt and response the rewriter can hold.
    Its own thinking is cut away; reasoning and answer are put together in the student's form with an end of ours.
    """

    role: Literal["teacher", "student"]
    sampler: Sampler
    chat: Chat
    sampling: SamplingConfig
    judge: Judge
    seed: int
    window: int

    def __call__(
        self,
        problems: Sequence[Problem],
        written: Sequence[Trajectory],
        step: int,
        *,
        rollbacks: int = 0,
        progress: Progress | None = None,
    ) -> list[Trajectory]:
        by_id = {problem.id: problem for problem in problems}
        settled: dict[int, Trajectory] = {}
        requests: dict[int, Request] = {}
        for at, original in enumerate(written):
            prompt, verdict = self._prompt(by_id, original)
            if verdict is None:
                key = request_key(self.seed, "rewrite", step, original.problem_id, original.attempt, rollbacks)
                requests[at] = Request(prompt, key)
            else:
                settled[at] = self.judge.settle(replace(original, verdict=verdict, original=original))
        responses = self.sampler.sample(list(requests.values()), self.sampling, progress) if requests else []
        for (at, request), response in zip(requests.items(), responses, strict=True):
            rewrite = self.judge.settle(self._judged(by_id, written[at], response))
            settled[at] = replace(rewrite, rewriting=(len(request.prompt), len(response.ids)))
        return [settled[at] for at in range(len(written))]

    def _prompt(self, by_id: Mapping[str, Problem], original: Trajectory) -> tuple[tuple[int, ...], str | None]:
        verdict = self.judge.before(original)
        if verdict is not None:
            return (), verdict
        draft = self.judge.chat.draft(original.response)
        prompt = self.chat.prompt("compress", by_id[original.problem_id], draft)
        fits = len(prompt) + self.sampling.max_tokens <= self.window
        return prompt, None if fits else TOO_LONG

    def _judged(self, by_id: Mapping[str, Problem], original: Trajectory, response: Response) -> Trajectory:
        """The rewrite with its verdict. One that is not well-formed keeps the ids as sampled, for the records."""
        ids, ended, student = tuple(response.ids), response.ended, self.judge.chat
        if ended == "cut" or self.chat.own_thinking_is_open(ids):
            verdict = UNFINISHED
        elif (parts := self.chat.split_rewrite(ids)) is None:
            verdict = MALFORMED
        else:
            reasoning, answer = parts
            if self.chat.vocab_fingerprint() != student.vocab_fingerprint():
                reasoning = student.encode_quoted(self.chat.decode(reasoning))
                answer = student.encode_quoted(self.chat.decode(answer))
            ids, ended = student.assemble(reasoning, answer), "assembled"
            verdict = self.judge.after(by_id[original.problem_id], original, ids)
        return Trajectory(
            problem_id=original.problem_id,
            attempt=original.attempt,
            prompt=original.prompt,
            response=ids,
            writer=self.role,
            version=self.sampler.version if self.role == "student" else 0,
            ended=ended,
            verdict=verdict,
            original=original,
        )


@dataclass(frozen=True)
class Truncate:
    """A mechanical cut of the reasoning to a token budget, before the original's own answer: the control."""

    judge: Judge
    to: int | None
    ratio: float | None

    def __call__(
        self,
        problems: Sequence[Problem],
        written: Sequence[Trajectory],
        step: int,
        *,
        rollbacks: int = 0,
        progress: Progress | None = None,
    ) -> list[Trajectory]:
        by_id = {problem.id: problem for problem in problems}
        return [self.judge.settle(self._cut(by_id[original.problem_id], original)) for original in written]

    def _cut(self, problem: Problem, original: Trajectory) -> Trajectory:
        chat = self.judge.chat
        parts = chat.split(original.response)
        early = self.judge.before(original)
        if early is not None or not self.judge.finished(original) or parts.reasoning is None:
            return replace(original, verdict=early or UNFINISHED, original=original)
        budget = self.to if self.to is not None else int((self.ratio or 0) * len(parts.reasoning))
        response = chat.assemble(parts.reasoning[:budget], parts.answer)
        verdict = self.judge.after(problem, original, response)
        return replace(original, response=response, ended="assembled", verdict=verdict, original=original, logprobs=())
