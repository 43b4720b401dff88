"""Held-out accuracy and token counts of a model, with intervals, and every sample on disk so that it can be regraded.

Two evaluations with one seed use the same random draws for the same problem and attempt, whatever the weights and the
context: differences are then paired. Tokens are counted on the sampled ids, EOS included, over all samples, right or
wrong, finished or cut. Accuracy is mean@k: the mean over problems of the mean over attempts.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mpd_jax import files, hosts
from mpd_jax.eval.grade import GRADERS, GraderPool
from mpd_jax.files import AnyPath, write_atomically
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

RESAMPLES = 10_000
Z95 = 1.959963984540054


@dataclass(frozen=True)
class EvalConfig:
    """The `eval` section.

    problems:     held-out problems to use, all there are if fewer.
    attempts:     samples a problem (k of mean@k); a greedy evaluation takes one, for all would be equal.
    temperatures: one row each; the first is the headline, 0 is greedy.
    grader:       "rules" or "math_verify".
    every:        steps between evaluations while training; 0 evaluates before and after only.
    concise_row:  also evaluate the base model when its prompt merely asks for fewer words.
    """

    problems: int = 256
    attempts: int = 1
    temperatures: tuple[float, ...] = (1.0, 0.6, 0.0)
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    grader: Literal["rules", "math_verify"] = "rules"
    every: int = 0
    concise_row: bool = True

    def __post_init__(self) -> None:
        for name in ("problems", "attempts", "max_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("every", "top_k"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("grader", self.grader in GRADERS, " or ".join(GRADERS))
        each = self.temperatures
        usable = each and all(map(usable_temperature, each)) and len(set(each)) == len(each)
        allowed = f"one or more different numbers, each 0 (greedy), or {COLDEST:g} or more"
        self._require("temperatures", bool(usable), allowed)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(f"eval.{name}: {getattr(self, name)!r} is not allowed; it must be {allowed}")


@dataclass(frozen=True)
class Sample:
    """One graded response; a line of the per-sample file. `answer` is the text after the thinking span, "" if it never
    closed. reasoning_tokens is None where the model does not think in a span of its own."""

    name: str
    context: str
    temperature: float
    problem_id: str
    attempt: int
    reference: str
    response_ids: tuple[int, ...]
    text: str
    answer: str
    tokens: float
    reasoning_tokens: float | None
    max_tokens: int
    ended: str
    extracted: str | None
    correct: bool
    grader: str
    failure: str | None


@dataclass(frozen=True)
class EvalRow:
    """What the samples of one (name, context, temperature) come to. n: problems. The shares are of all samples.

    mean_tokens_correct, mean_tokens_reasoning: None where nothing was right, or nothing thought in a span.
    grader_failures: comparisons that timed out or crashed; they count as wrong.
    """

    name: str
    context: str
    temperature: float
    grader: str
    n: int
    samples_per_problem: int
    max_tokens: int
    accuracy: float
    accuracy_ci: tuple[float, float]
    mean_tokens: float
    mean_tokens_ci: tuple[float, float]
    median_tokens: float
    mean_tokens_correct: float | None
    mean_tokens_reasoning: float | None
    share_finished: float
    share_truncated: float
    share_unparseable: float
    grader_failures: int
    problem_ids: tuple[str, ...]
    problem_accuracy: tuple[float, ...]
    problem_tokens: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """The row for summary.json: everything but the figures of single problems."""
        values = {k: v for k, v in asdict(self).items() if not k.startswith("problem_")}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def evaluate(
    name: str,
    sampler: Sampler,
    chat: "Chat",
    problems: Sequence[Problem],
    config: EvalConfig,
    *,
    seed: int,
    context: str = "plain",
    out_path: AnyPath | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[EvalRow]:
    """One row a temperature, in the config's order. The sampler answers with the weights it has loaded.

    Of several processes all sample, and process 0 grades, writes and has the rows.

    out_path: JSONL of all samples, written whole at the end. progress: told the responses finished so far, of
    `count(problems, config)`.
    """
    problems = problems[: config.problems]
    _check(problems)
    prompts = [chat.prompt(context, problem) for problem in problems]
    samples: list[Sample] = []
    with GraderPool(config.grader) as pool:
        for temperature in config.temperatures:
            attempts = config.attempts if temperature > 0 else 1
            asked = [
                (problem, prompt, k) for problem, prompt in zip(problems, prompts, strict=True) for k in range(attempts)
            ]
            # The step is no part of the key: base and trained student meet the same draws.
            stream = f"eval/{temperature:g}"
            requests = [Request(prompt, request_key(seed, stream, 0, problem.id, k)) for problem, prompt, k in asked]
            sampling = SamplingConfig(temperature, config.top_p, config.top_k, config.max_tokens)
            done = len(samples)
            tell = (lambda finished, done=done: progress(done + finished)) if progress else None
            responses = sampler.sample(requests, sampling, tell)
            drawn = [
                _sample(name, context, temperature, problem, k, response, chat, config.max_tokens)
                for (problem, _, k), response in zip(asked, responses, strict=True)
            ]
            samples += _graded(drawn, pool) if hosts.is_main() else drawn
    if out_path is not None:
        write_samples(out_path, samples)
    return rows_of(samples) if hosts.is_main() else []


def count(problems: Sequence[Problem], config: EvalConfig) -> int:
    """The responses that `evaluate` will sample: the total of its progress."""
    each = sum(config.attempts if temperature > 0 else 1 for temperature in config.temperatures)
    return min(len(problems), config.problems) * each


def _check(problems: Sequence[Problem]) -> None:
    ids = [problem.id for problem in problems]
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    missing = [problem.id for problem in problems if not (problem.answer or "").strip()]
    if not problems:
        raise UserError("problems.heldout: no problems to evaluate on; name a file or set with at least one")
    if twice:
        raise UserError(f"problems.heldout: id {twice[0]!r} stands twice; ids must differ, they seed the sampling")
    if missing:
        raise UserError(
            f"problems.heldout: problem {missing[0]!r} has no answer to grade against; add it or leave it out"
        )


def _sample(
    name: str,
    context: str,
    temperature: float,
    problem: Problem,
    attempt: int,
    response: Response,
    chat: "Chat",
    max_tokens: int,
) -> Sample:
    parts = chat.split(response.ids)
    return Sample(
        name=name,
        context=context,
        temperature=temperature,
        problem_id=problem.id,
        attempt=attempt,
        reference=problem.answer or "",
        response_ids=tuple(int(i) for i in response.ids),
        text=chat.decode(response.ids),
        answer=chat.decode(parts.answer) if parts.closed else "",
        tokens=len(response.ids),
        reasoning_tokens=None if parts.reasoning is None else len(parts.reasoning),
        max_tokens=max_tokens,
        ended=response.ended,
        extracted=None,
        correct=False,
        grader="",
        failure=None,
    )


def _graded(samples: Sequence[Sample], pool: GraderPool) -> list[Sample]:
    grades = pool.grade_many([(s.answer, s.reference) for s in samples])
    return [replace(s, **asdict(grade)) for s, grade in zip(samples, grades, strict=True)]


def write_samples(path: AnyPath, samples: Iterable[Sample]) -> None:
    """One sample a line; the file appears whole or not at all."""
    lines = (json.dumps(asdict(s), separators=(",", ":"), ensure_ascii=False) for s in samples)
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def read_samples(path: AnyPath) -> list[Sample]:
    """The samples of a per-sample file."""
    data = files.read(path)
    if data is None:
        raise UserError(f"samples {path}: no such file; give a per-sample file that an evaluation wrote")
    names = {f.name for f in fields(Sample)}
    samples = []
    # Split at line feeds only: a response may hold other characters that Python counts as line ends.
    for number, line in enumerate(data.decode().split("\n"), start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
            wrong = names ^ set(values)
        except (ValueError, TypeError):
            raise UserError(
                f"samples {path}: line {number} is not a JSON object; remove the file to evaluate again"
            ) from None
        if wrong:
            raise UserError(f"samples {path}: line {number}: fields {sorted(wrong)} are missing or unknown")
        samples.append(Sample(**{**values, "response_ids": tuple(values["response_ids"])}))
    return samples


def read_rows(path: AnyPath) -> list[EvalRow]:
    """The rows of a per-sample file, as it was graded."""
    return rows_of(read_samples(path))


def regrade(path: AnyPath, grader: str, out_path: AnyPath | None = None) -> list[EvalRow]:
    """The rows that another grader makes of a per-sample file; out_path keeps the new grades too."""
    samples = read_samples(path)
    with GraderPool(grader) as pool:
        samples = _graded(samples, pool)
    if out_path is not None:
        write_samples(out_path, samples)
    return rows_of(samples)


def rows_of(samples: Sequence[Sample]) -> list[EvalRow]:
    """One row for each (name, context, temperature, grader), in the order of first appearance."""
    groups: dict[tuple, list[Sample]] = {}
    for s in samples:
        groups.setdefault((s.name, s.context, s.temperature, s.grader), []).append(s)
    return [_row(group) for group in groups.values()]


def _row(samples: Sequence[Sample]) -> EvalRow:
    first = samples[0]
    by_problem: dict[str, list[Sample]] = {}
    for s in samples:
        by_problem.setdefault(s.problem_id, []).append(s)
    accuracy_P = np.array([np.mean([s.correct for s in group]) for group in by_problem.values()])
    tokens_P = np.array([np.mean([s.tokens for s in group]) for group in by_problem.values()])

    def mean(values: Sequence[float]) -> float | None:
        return float(np.mean(values)) if values else None

    return EvalRow(
        name=first.name,
        context=first.context,
        temperature=first.temperature,
        grader=first.grader,
        n=len(by_problem),
        samples_per_problem=max(len(group) for group in by_problem.values()),
        max_tokens=first.max_tokens,
        accuracy=float(accuracy_P.mean()),
        accuracy_ci=interval(accuracy_P, 0.0, 1.0),
        mean_tokens=float(tokens_P.mean()),
        mean_tokens_ci=interval(tokens_P, 0.0, float(first.max_tokens)),
        median_tokens=float(np.median([s.tokens for s in samples])),
        mean_tokens_correct=mean([s.tokens for s in samples if s.correct]),
        mean_tokens_reasoning=mean([s.reasoning_tokens for s in samples if s.reasoning_tokens is not None]),
        share_finished=float(np.mean([s.ended == "stopped" for s in samples])),
        share_truncated=float(np.mean([s.ended == "cut" for s in samples])),
        share_unparseable=float(np.mean([s.extracted is None for s in samples])),
        grader_failures=sum(s.failure is not None for s in samples),
        problem_ids=tuple(by_problem),
        problem_accuracy=tuple(accuracy_P.tolist()),
        problem_tokens=tuple(tokens_P.tolist()),
    )


def interval(values_P: np.ndarray, low: float, high: float, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the mean over problems: percentile bootstrap, resampling problems with their attempts.

    Where all values are equal the bootstrap knows nothing. Then up to z²/(n+z²) of the problems may be of a kind not
    seen, at either bound of the quantity; for all right or all wrong this is Wilson's interval.
    """
    n, mean = len(values_P), float(np.mean(values_P))
    if np.ptp(values_P) <= 1e-9 * (high - low):
        unseen = Z95**2 / (n + Z95**2)
        return mean - unseen * (mean - low), mean + unseen * (high - mean)
    # A fixed seed: the same samples always give the same interval.
    rng = np.random.default_rng(0)
    rows = max(1, 2_000_000 // n)
    means = [
        values_P[rng.integers(n, size=(min(rows, resamples - at), n), dtype=np.int32)].mean(axis=1)
        for at in range(0, resamples, rows)
    ]
    lower, upper = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(lower), float(upper)


def paired_difference(
    before: EvalRow, after: EvalRow, of: Literal["accuracy", "tokens"] = "accuracy"
) -> tuple[float, float, float]:
    """(mean, lower, upper) of after minus before on the same problems; 95 %, bootstrap over problems."""
    if set(before.problem_ids) != set(after.problem_ids):
        odd = sorted(set(before.problem_ids) ^ set(after.problem_ids))
        raise UserError(
            f"comparing {before.name!r} with {after.name!r}: problem {odd[0]!r} (of {len(odd)}) is in one only; "
            "evaluate both on the same held-out problems"
        )
    first = dict(zip(before.problem_ids, getattr(before, f"problem_{of}"), strict=True))
    second = dict(zip(after.problem_ids, getattr(after, f"problem_{of}"), strict=True))
    difference_P = np.array([second[i] - first[i] for i in before.problem_ids])
    bound = 1.0 if of == "accuracy" else float(max(before.max_tokens, after.max_tokens))
    return (float(difference_P.mean()), *interval(difference_P, -bound, bound))


def truncation_row(samples: Sequence[Sample], mean_tokens: float) -> EvalRow:
    """What shortness alone would give: the samples cut to the one budget at which their mean length is `mean_tokens`.

    A sample longer than the budget has come to no answer, and is wrong. The samples are of one name and temperature;
    where they are shorter than `mean_tokens` already, nothing is cut.
    """
    if mean_tokens <= 0 or len(rows_of(samples)) != 1:
        raise ValueError(f"needs samples of one row and a positive length, not {len(rows_of(samples))}, {mean_tokens}")
    tokens_N = np.sort([s.tokens for s in samples]).astype(np.float64)
    n = len(tokens_N)
    # If the j shortest stay whole, the others' common length follows; the first j whose next sample exceeds it is it.
    whole_N = np.concatenate([[0.0], np.cumsum(tokens_N)[:-1]])
    budget_N = (mean_tokens * n - whole_N) / (n - np.arange(n))
    fits = np.flatnonzero(budget_N < tokens_N)
    budget = float(budget_N[fits[0]]) if len(fits) else math.inf
    name = f"{samples[0].name}, cut at {budget:.0f}" if len(fits) else f"{samples[0].name}, uncut"
    return replace(_row([_cut(s, budget) if s.tokens > budget else s for s in samples]), name=name)


def _cut(s: Sample, budget: float) -> Sample:
    reasoning = None if s.reasoning_tokens is None else min(s.reasoning_tokens, budget)
    change = {
        "tokens": budget,
        "reasoning_tokens": reasoning,
        "ended": "cut",
        "extracted": None,
        "correct": False,
        "failure": None,
    }
    return replace(s, **change)


def table(rows: Sequence[EvalRow]) -> Table:
    """A table of 80 columns. Differences are against the first row of the same temperature, paired."""
    said = {f"{row.n} problems x {row.samples_per_problem}, graded by {row.grader}" for row in rows}
    result = Table(
        title="Held-out problems, 95 % intervals", caption="; ".join(sorted(said)), box=SIMPLE_HEAD, pad_edge=False
    )
    result.add_column("model")
    for column in ("accuracy, %", "vs first", "tokens", "done/cut/\nno answer"):
        result.add_column(column, justify="right", no_wrap=True)
    firsts: dict[float, EvalRow] = {}
    for row in rows:
        first = firsts.setdefault(row.temperature, row)
        paired = row is not first and set(row.problem_ids) == set(first.problem_ids)
        accuracy = 100 * np.array([row.accuracy, *row.accuracy_ci])
        change = 100 * np.array(paired_difference(first, row)) if paired else ()
        less = f" ({row.mean_tokens / first.mean_tokens - 1:+.0%})" if row is not first else ""
        how = f"T = {row.temperature:g}" if row.temperature else "greedy"
        result.add_row(
            f"{row.name}\n{how}" + (f", {row.grader}" if len({r.grader for r in rows}) > 1 else ""),
            "{:.1f}\n[{:.1f}, {:.1f}]".format(*accuracy),
            "{:+.1f}\n[{:+.1f}, {:+.1f}]".format(*change) if paired else "",
            f"{row.mean_tokens:.1f}{less}\n" + "[{:.1f}, {:.1f}]".format(*row.mean_tokens_ci),
            "/".join(f"{100 * x:.0f}" for x in (row.share_finished, row.share_truncated, row.share_unparseable)) + "%",
        )
    return result
