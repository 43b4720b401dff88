"""Samples a model's answers to problems and grades them; every sample is kept, so that it can be graded again.

Two evaluations with one seed use the same random draws for the same problem and attempt, whatever the weights and the
context: differences are then paired. Tokens are counted on the sampled ids, EOS included, over all samples, right or
wrong, finished or cut. Accuracy is mean@k: the mean over problems of the mean over attempts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mpd_jax import hosts
from mpd_jax.eval.figures import EvalRow, rows_of
from mpd_jax.eval.grade import GraderPool, grader_of
from mpd_jax.eval.samples import UNASKED, Key, Sample, read_samples, write_samples
from mpd_jax.files import AnyPath
from mpd_jax.sampling.sampler import (
    COLDEST,
    Request,
    Response,
    Sampler,
    SamplingConfig,
    request_key,
    usable_temperature,
)
from mpd_jax.types import Problem, UserError

if TYPE_CHECKING:
    from mpd_jax.data.chat import Chat


@dataclass(frozen=True)
class EvalConfig:
    """The `eval` section.

    problems:     held-out problems to use, all there are if fewer.
    attempts:     samples a problem (k of mean@k); a greedy evaluation takes one, for all would be equal.
    temperatures: one row each; the first is the headline, 0 is greedy.
    grader:       one of `grade.GRADERS`, or the import path of a function (answer text, reference) -> bool.
    every:        steps between evaluations while training; 0 evaluates before and after only.
    concise_row:  also evaluate the base model when its prompt merely asks for fewer words.
    """

    problems: int = 256
    attempts: int = 1
    temperatures: tuple[float, ...] = (1.0, 0.6, 0.0)
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    grader: str = "rules"
    every: int = 0
    concise_row: bool = True

    def __post_init__(self) -> None:
        for name in ("problems", "attempts", "max_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("every", "top_k"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        grader_of(self.grader, "eval.grader")
        each = self.temperatures
        usable = each and all(map(usable_temperature, each)) and len(set(each)) == len(each)
        allowed = f"one or more different numbers, each 0 (greedy), or {COLDEST:g} or more"
        self._require("temperatures", bool(usable), allowed)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(f"eval.{name}: {getattr(self, name)!r} is not allowed; it must be {allowed}")


@dataclass(frozen=True)
class Blocks:
    """How an evaluation that may be killed goes on. stored: its samples that are there, and are not made again. keep:
    given the samples of each `size` responses as soon as they are graded; 0 makes one block of a temperature."""

    stored: Sequence[Sample] = ()
    keep: Callable[[Sequence[Sample]], None] = lambda samples: None
    size: int = 0


def evaluate(
    name: str,
    sampler: Sampler,
    chat: "Chat",
    problems: Sequence[Problem],
    config: EvalConfig,
    *,
    seed: int,
    context: str = "plain",
    problem_set: str = "",
    out_path: AnyPath | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[EvalRow]:
    """One row a temperature, in the config's order. The sampler answers with the weights it has loaded.

    Of several processes all sample, and process 0 grades, writes and has the rows.

    out_path: JSONL of all samples, written whole at the end. progress: told the responses finished so far, of
    `count(problems, config)`.
    """
    samples = graded(
        name, sampler, chat, problems, config, seed=seed, context=context, problem_set=problem_set, progress=progress
    )
    if out_path is not None:
        write_samples(out_path, samples)
    return rows_of(samples) if hosts.is_main() else []


def graded(
    name: str,
    sampler: Sampler,
    chat: "Chat",
    problems: Sequence[Problem],
    config: EvalConfig,
    *,
    seed: int,
    context: str = "plain",
    problem_set: str = "",
    progress: Callable[[int], None] | None = None,
    room: int | None = None,
    blocks: Blocks | None = None,
) -> list[Sample]:
    """The samples of `evaluate`, by temperature, problem and attempt; graded by process 0.

    room: tokens of the longest prompt that is asked; a longer one is `UNASKED`, and wrong.
    """
    problems, blocks = problems[: config.problems], blocks or Blocks()
    _check(problems, problem_set or "problems.heldout")
    prompts = {problem.id: chat.prompt(context, problem) for problem in problems}
    about = {"name": name, "context": context, "problem_set": problem_set, "seed": seed}
    about |= {"top_p": config.top_p, "top_k": config.top_k, "max_tokens": config.max_tokens}
    wanted = {(t, problem.id, k): problem for t, problem, k in _wanted(problems, config)}
    samples = {s.key: s for s in blocks.stored if s.key in wanted}
    todo = [key for key in wanted if key not in samples]
    long = {key for key in todo if room is not None and len(prompts[key[1]]) > room}
    with GraderPool(config.grader) as pool:

        def add(keys: Sequence[Key], responses: Sequence[Response | None]) -> None:
            drawn = [_sample(k, wanted[k], r, chat, about) for k, r in zip(keys, responses, strict=True)]
            drawn = _graded(drawn, pool) if hosts.is_main() else drawn
            samples.update((s.key, s) for s in drawn)
            blocks.keep(drawn)

        if long:
            add([*long], [None] * len(long))
        for keys in _blocks([key for key in todo if key not in long], blocks.size):
            temperature, done = keys[0][0], len(samples)
            sampling = SamplingConfig(temperature, config.top_p, config.top_k, config.max_tokens)
            # The step is no part of the key: base and trained student meet the same draws.
            stream = f"eval/{temperature:g}"
            requests = [Request(prompts[i], request_key(seed, stream, 0, i, k)) for _, i, k in keys]
            tell = (lambda finished, done=done: progress(done + finished)) if progress else None
            add(keys, sampler.sample(requests, sampling, tell))
    return [samples[key] for key in wanted]


def _wanted(problems: Sequence[Problem], config: EvalConfig) -> list[tuple[float, Problem, int]]:
    """Temperature, problem and attempt of every sample. A greedy one is sampled once, for all would be equal."""
    return [
        (temperature, problem, k)
        for temperature in config.temperatures
        for problem in problems
        for k in range(config.attempts if temperature > 0 else 1)
    ]


def _blocks(keys: Sequence[Key], size: int) -> Iterator[Sequence[Key]]:
    """Of one temperature each."""
    for _, of_one in groupby(keys, key=lambda key: key[0]):
        found = list(of_one)
        yield from (found[at : at + (size or len(found))] for at in range(0, len(found), size or len(found)))


def count(problems: Sequence[Problem], config: EvalConfig) -> int:
    """The responses that `evaluate` will sample: the total of its progress."""
    return len(_wanted(problems[: config.problems], config))


def _check(problems: Sequence[Problem], source: str) -> None:
    ids = [problem.id for problem in problems]
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    missing = [problem.id for problem in problems if not (problem.answer or "").strip()]
    if not problems:
        raise UserError(f"{source}: no problems to evaluate on; name a file or set with at least one")
    if twice:
        raise UserError(f"{source}: id {twice[0]!r} stands twice; ids must differ, they seed the sampling")
    if missing:
        raise UserError(f"{source}: problem {missing[0]!r} has no answer to grade against; add it or leave it out")


def _sample(key: Key, problem: Problem, response: Response | None, chat: "Chat", about: dict[str, Any]) -> Sample:
    temperature, _, attempt = key
    ids, ended = (response.ids, response.ended) if response else ((), UNASKED)
    parts = chat.split(ids)
    return Sample(
        temperature=temperature,
        problem_id=problem.id,
        attempt=attempt,
        reference=problem.answer or "",
        response_ids=tuple(int(i) for i in ids),
        text=chat.decode(ids),
        answer=chat.decode(parts.answer) if parts.closed else "",
        tokens=len(ids),
        reasoning_tokens=None if parts.reasoning is None or not response else len(parts.reasoning),
        ended=ended,
        extracted=None,
        correct=False,
        grader="",
        failure=None,
        level=problem.level,
        subject=problem.subject,
        **about,
    )


def _graded(samples: Sequence[Sample], pool: GraderPool) -> list[Sample]:
    grades = pool.grade_many([(s.answer, s.reference) for s in samples])
    return [
        replace(s, correct=g.correct, extracted=g.extracted, grader=g.grader, failure=g.failure, marks=g.marks)
        for s, g in zip(samples, grades, strict=True)
    ]


def read_rows(path: AnyPath) -> list[EvalRow]:
    """The rows of a per-sample file, as it was graded."""
    return rows_of(read_samples(path))


def regrade(path: AnyPath, pool: GraderPool, out_path: AnyPath | None = None) -> list[EvalRow]:
    """The rows that another grader makes of a per-sample file; out_path keeps the new grades too."""
    samples = _graded(read_samples(path), pool)
    if out_path is not None:
        write_samples(out_path, samples)
    return rows_of(samples)
