"""The write axis: who writes the trajectory. A writer maps (problems, step) to trajectories.

The prompt of a trajectory is always the student's plain prompt, whoever wrote the response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mpd_jax.data.chat import CLOSE, OPEN, Chat
from mpd_jax.sampling.sampler import Request, Response, Sampler, SamplingConfig, request_key
from mpd_jax.types import Problem, Trajectory, UserError

Progress = Callable[[int], None]


@dataclass(frozen=True)
class WriteConfig:
    """by: who writes. attempts: responses a problem, each with its own random draws."""

    by: Literal["student", "teacher", "dataset"] = "student"
    attempts: int = 1


@dataclass(frozen=True)
class ModelWriter:
    """Student or teacher samples a response to the plain prompt.

    chat is the writer's own, chat_student the student's. A trajectory's version is that of the student's weights that
    sampled it, 0 for the teacher's.
    """

    role: Literal["student", "teacher"]
    sampler: Sampler
    chat: Chat
    chat_student: Chat
    sampling: SamplingConfig
    attempts: int
    seed: int

    def __call__(
        self, problems: Sequence[Problem], step: int, *, rollbacks: int = 0, progress: Progress | None = None
    ) -> list[Trajectory]:
        """attempts x problems trajectories, the attempts of a problem side by side."""
        asked = [(problem, attempt) for problem in problems for attempt in range(self.attempts)]
        requests = [
            Request(
                self.chat.prompt("plain", problem),
                request_key(self.seed, "write", step, problem.id, attempt, rollbacks),
            )
            for problem, attempt in asked
        ]
        responses = self.sampler.sample(requests, self.sampling, progress)
        # Ids go on as they are where both read the same prompt: else a thinking span may be open on one side alone.
        same_ids = self.chat.vocab_fingerprint() == self.chat_student.vocab_fingerprint() and all(
            self.chat.prompt("plain", p) == self.chat_student.prompt("plain", p) for p in problems[:1]
        )
        return [
            self._trajectory(problem, attempt, response, same_ids)
            for (problem, attempt), response in zip(asked, responses, strict=True)
        ]

    def _trajectory(self, problem: Problem, attempt: int, response: Response, same_ids: bool) -> Trajectory:
        ids, ended, logprobs = tuple(response.ids), response.ended, tuple(response.logprobs)
        if not same_ids:
            (ids, ended), logprobs = respelt(self.chat, self.chat_student, ids, ended), ()
        elif ended == "stopped":
            ids = self.chat_student.with_own_end(ids)
        return Trajectory(
            problem_id=problem.id,
            attempt=attempt,
            prompt=self.chat_student.prompt("plain", problem),
            response=ids,
            writer=self.role,
            version=self.sampler.version if self.role == "student" else 0,
            ended=ended,
            logprobs=logprobs,
        )


def respelt(source: Chat, student: Chat, response: Sequence[int], ended: str) -> tuple[tuple[int, ...], str]:
    """(response, ended) in the student's ids when the writer's vocabulary is another one: only its text travels."""
    parts = source.split(response)
    reasoning = student.encode_quoted(source.decode(parts.reasoning or ()))
    answer = student.encode_quoted(source.decode(parts.answer)) if parts.closed else None
    if ended == "stopped" and answer is not None:
        return student.assemble(reasoning, answer), "assembled"
    return student.assemble_cut(reasoning, answer), "cut"


def worked_response(problem: Problem) -> str:
    """The response that the dataset holds; UserError where it holds none."""
    if not (problem.response or "").strip():
        raise UserError(
            f"recipe.write.by=dataset: problem {problem.id!r} has no response; name the column of worked responses "
            "in problems.columns.response, or let a model write"
        )
    return problem.response or ""


@dataclass(frozen=True)
class DatasetWriter:
    """The problem's own worked response, as the student's template writes it.

    A response with <think> tags is taken apart there; one without is all answer, after an empty thinking span.
    """

    chat_student: Chat

    def __call__(
        self, problems: Sequence[Problem], step: int, *, rollbacks: int = 0, progress: Progress | None = None
    ) -> list[Trajectory]:
        return [self._trajectory(problem) for problem in problems]

    def _trajectory(self, problem: Problem) -> Trajectory:
        text = worked_response(problem)
        before, tag, after = text.partition(CLOSE)
        reasoning, answer = (before.replace(OPEN, "", 1), after) if tag else ("", text)
        chat = self.chat_student
        return Trajectory(
            problem_id=problem.id,
            attempt=0,
            prompt=chat.prompt("plain", problem),
            response=chat.assemble(chat.encode_quoted(reasoning.strip()), chat.encode_quoted(answer.strip())),
            writer="dataset",
            version=0,
            ended="dataset",
        )
