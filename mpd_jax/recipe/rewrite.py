"""The rewrite axis: who rewrites a trajectory, and how. Which rewrites are kept is keep.py's.

A rewriter maps (problems, written, step) to as many trajectories in the same order, each with a verdict; the ones it
gives up are flagged as dropped, never left out, so that verdicts can be counted. Only the well-formedness of a rewrite
is always required.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mpd_jax.data.chat import Chat
from mpd_jax.eval import grade
from mpd_jax.recipe import keep
from mpd_jax.recipe.keep import Case, Judge
from mpd_jax.recipe.write import Progress
from mpd_jax.sampling.sampler import Request, Response, Sampler, SamplingConfig, request_key
from mpd_jax.types import Problem, Trajectory

How = Literal["nobody", "compress", "repair", "truncate", "earliest_correct_prefix"]
TooLong = Literal["drop", "trim"]
LEFT_OUT = "\n[...]\n"  # stands where the middle of a draft was left out


@dataclass(frozen=True)
class RewriteConfig:
    """how: by a model, which reads problem and draft and is asked to compress or to repair it (contexts.compress,
    contexts.repair); by a mechanical cut, truncate or earliest_correct_prefix; or nothing.

    by:             the model that rewrites; "teacher" is whatever the `rewriter` section names.
    keep:           rules a text must pass, by name (keep.py) or import path; none is MPD's own setting. With
                    how=nobody they judge what was written.
    grader:         who judges the rule `correct`.
    fallback:       what a rewrite that fails becomes: dropped, or its original.
    truncate_to:    reasoning tokens that truncate leaves; 0 leaves the answer alone.
    truncate_ratio: the same as a share of the original's reasoning tokens.
    window:         tokens of problem, draft and rewrite together (MPD: 30,000); the model's own window unless given.
    too_long:       a draft that does not fit: drop the trajectory, or trim the draft's middle, which is counted.
    max_age:        a problem that comes up again within so many updates is not written and rewritten anew: unless any
                    of its trajectories was dropped, they are used again, until what the student wrote of them is older
                    than that. 0 reuses nothing; TRD makes its whole set once.
    """

    how: How = "nobody"
    by: Literal["teacher", "student"] = "teacher"
    keep: tuple[str, ...] = ()
    grader: Literal["rules", "math_verify"] = "rules"
    fallback: Literal["drop", "original"] = "drop"
    truncate_to: int | None = None
    truncate_ratio: float | None = None
    window: int | None = None
    too_long: TooLong = "drop"
    max_age: int = 0

    @property
    def by_model(self) -> bool:
        return self.how in ("compress", "repair")


@dataclass(frozen=True)
class Nobody:
    """Nothing is rewritten. Without keep rules it is the identity; with them, what they turn down is dropped."""

    judge: Judge

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
        return [self._judged(by_id[t.problem_id], t) for t in written] if self.judge.keep else list(written)

    def _judged(self, problem: Problem, t: Trajectory) -> Trajectory:
        verdict = self.judge.by_rules(Case(problem, t, t, self.judge.chat, self.judge.correct), self.judge.keep)
        return t if verdict == keep.KEPT else replace(t, verdict=verdict, dropped=True)


def rewriting_prompt(
    chat: Chat, how: str, problem: Problem, draft: str, room: int, too_long: TooLong
) -> tuple[tuple[int, ...], int] | None:
    """What is read to rewrite a draft, at most `room` tokens, and how many of the draft's tokens were left out of its
    middle for that; None where it does not fit."""
    prompt = chat.prompt(how, problem, draft)
    if len(prompt) <= room:
        return prompt, 0
    ids, over = chat.encode_quoted(draft), len(prompt) - room
    left = len(ids) - over - len(chat.encode(LEFT_OUT))
    while too_long == "trim" and left > 1:
        head, tail = ids[: (left + 1) // 2], ids[len(ids) - left // 2 :]
        prompt = chat.prompt(how, problem, chat.text(head) + LEFT_OUT + chat.text(tail))
        if len(prompt) <= room:
            return prompt, len(ids) - left
        left -= len(prompt) - room  # where the cut made other tokens
    return None


@dataclass(frozen=True)
class ModelRewriter:
    """A model reads problem and draft under the context `how` and writes the reasoning anew.

    chat is the rewriter's, judge.chat the student's. room: the longest prompt that leaves room for the rewrite.
    Its own thinking is cut away; reasoning and answer are put together in the student's form with an end of ours.
    """

    role: Literal["teacher", "student"]
    sampler: Sampler
    chat: Chat
    sampling: SamplingConfig
    judge: Judge
    seed: int
    room: int
    how: Literal["compress", "repair"] = "compress"
    too_long: TooLong = "drop"

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
        trimmed: dict[int, int] = {}
        for at, original in enumerate(written):
            problem, prompt = by_id[original.problem_id], None
            verdict = self.judge.before(problem, original)
            if verdict is None:
                draft = self.judge.chat.draft(original.response)
                prompt = rewriting_prompt(self.chat, self.how, problem, draft, self.room, self.too_long)
            if prompt is None:
                verdict = verdict or keep.TOO_LONG
                settled[at] = self.judge.settle(replace(original, verdict=verdict, original=original))
            else:
                key = request_key(self.seed, "rewrite", step, original.problem_id, original.attempt, rollbacks)
                requests[at], trimmed[at] = Request(prompt[0], key), prompt[1]
        responses = self.sampler.sample(list(requests.values()), self.sampling, progress) if requests else []
        for (at, request), response in zip(requests.items(), responses, strict=True):
            rewrite = self.judge.settle(self._judged(by_id, written[at], response))
            settled[at] = replace(rewrite, rewriting=(len(request.prompt), len(response.ids)), trimmed=trimmed[at])
        return [settled[at] for at in range(len(written))]

    def _judged(self, by_id: Mapping[str, Problem], original: Trajectory, response: Response) -> Trajectory:
        """The rewrite with its verdict. One that is not well-formed keeps the ids as sampled, for the records."""
        ids, ended, student, verdict = tuple(response.ids), response.ended, self.judge.chat, keep.KEPT
        if ended == "cut" or self.chat.own_thinking_is_open(ids):
            verdict = keep.UNFINISHED
        elif (parts := self.chat.split_rewrite(ids)) is None:
            verdict = keep.MALFORMED
        else:
            reasoning, answer = parts
            if self.chat.vocab_fingerprint() != student.vocab_fingerprint():
                reasoning = student.encode_quoted(self.chat.decode(reasoning))
                answer = student.encode_quoted(self.chat.decode(answer))
            ids, ended = student.assemble(reasoning, answer), "assembled"
        rewrite = Trajectory(
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
        if verdict != keep.KEPT:
            return rewrite
        return replace(rewrite, verdict=self.judge.after(by_id[original.problem_id], original, rewrite))


@dataclass(frozen=True)
class Cut(ABC):
    """A mechanical cut of the reasoning, before the original's own answer; `kept` says where."""

    judge: Judge

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

    @abstractmethod
    def kept(self, problem: Problem, reasoning: Sequence[int]) -> int | None:
        """How many tokens of the reasoning are left; None where there is no place to cut."""

    def _cut(self, problem: Problem, original: Trajectory) -> Trajectory:
        chat = self.judge.chat
        parts = chat.split(original.response)
        early = self.judge.before(problem, original)
        if early is not None or not keep.has_finished(chat, original) or parts.reasoning is None:
            return replace(original, verdict=early or keep.UNFINISHED, original=original)
        left = self.kept(problem, parts.reasoning)
        if left is None:
            return replace(original, verdict=keep.WRONG, original=original)
        response = chat.assemble(parts.reasoning[:left], parts.answer)
        rewrite = replace(original, response=response, ended="assembled", original=original, logprobs=())
        return replace(rewrite, verdict=self.judge.after(problem, original, rewrite))


@dataclass(frozen=True)
class Truncate(Cut):
    """To a token budget: the control of Compress-Distill (2606.05988)."""

    to: int | None
    ratio: float | None

    def kept(self, problem: Problem, reasoning: Sequence[int]) -> int:
        return self.to if self.to is not None else int((self.ratio or 0) * len(reasoning))


_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|$")
_CONCLUSION = re.compile(r"\\boxed\{.*\}|[+-]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")


@dataclass(frozen=True)
class EarliestCorrectPrefix(Cut):
    """After the first sentence that concludes with the reference answer (STOP, 2605.13165).

    STOP finds typed nodes by a model; here a step is a sentence or line, and its conclusion the last number or box in
    it, so that an intermediate result that happens to equal the answer ends the prefix early.
    """

    def kept(self, problem: Problem, reasoning: Sequence[int]) -> int | None:
        chat, answer = self.judge.chat, keep.reference(problem)
        answer = grade.extract_boxed(answer) or answer
        text, start = chat.text(reasoning), 0
        for end in (match.end() for match in _SENTENCE_END.finditer(text)):
            found = _CONCLUSION.findall(text[start:end])
            if found and grade.equal(grade.extract_boxed(found[-1]) or found[-1], answer):
                return chat.tokens_through(reasoning, end)
            start = end
        return None
