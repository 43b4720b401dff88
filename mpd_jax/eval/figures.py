"""What graded samples come to: the figures of a row, of its parts, under a budget of tokens, and beside another row."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from mpd_jax.eval.grade import canonical
from mpd_jax.eval.samples import UNASKED, Sample
from mpd_jax.eval.statistics import Interval, interval, majority, pass_at_k, ratio_interval, sign_flip_test
from mpd_jax.types import UserError

BUDGETS = (0.125, 0.25, 0.5, 0.75)  # of max_tokens, at which accuracy is read off


class Tokens(NamedTuple):
    """Of a group of samples; None where it is empty."""

    mean: float | None
    median: float | None
    p90: float | None


@dataclass(frozen=True)
class EvalRow:
    """What the samples of one (problem set, name, context, temperature, grader) come to. n: problems. The shares are of
    all samples. top_p, top_k, seed: None if the samples do not say.

    unasked: problems whose prompt had no room; they count as wrong, and their tokens (NaN in problem_tokens) nowhere.
    mean_tokens_correct, mean_tokens_reasoning: None where nothing was right, or nothing thought in a span. tokens_*:
    more of the same. grader_failures: comparisons that timed out or crashed; they count as wrong.
    share_boxed, share_answer_line, share_unmarked: samples that mark their answer so, both or not at all;
    accuracy_boxed, accuracy_answer_line: accuracy if that mark alone counted. None if the samples do not say.
    pass_at_k: (k, estimate) for powers of two; maj_at_k: of all attempts together. right_per_1000_tokens: accuracy over
    mean tokens.
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
    problem_set: str
    top_p: float | None
    top_k: int | None
    seed: int | None
    unasked: int
    tokens_all: Tokens
    tokens_correct: Tokens
    tokens_reasoning: Tokens
    share_boxed: float | None
    share_answer_line: float | None
    share_unmarked: float | None
    accuracy_boxed: float | None
    accuracy_answer_line: float | None
    pass_at_k: tuple[tuple[int, Interval], ...]
    maj_at_k: Interval
    right_per_1000_tokens: Interval

    @property
    def problem_figures(self) -> dict[str, tuple[float, float]]:
        """Accuracy and tokens of each problem."""
        figures = zip(self.problem_accuracy, self.problem_tokens, strict=True)
        return dict(zip(self.problem_ids, figures, strict=True))

    def summary(self) -> dict[str, Any]:
        """The row for summary.json: everything but the figures of single problems."""
        values = {
            k: v for k, v in asdict(self).items() if k not in ("problem_ids", "problem_accuracy", "problem_tokens")
        }
        return {k: _plain(v) for k, v in values.items()}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def rows_of(samples: Iterable[Sample]) -> list[EvalRow]:
    """One row for each (problem set, name, context, temperature, grader), in the order of first appearance."""
    return [row_of(group) for group in groups_of(samples)]


def groups_of(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of each row."""
    groups: dict[tuple, list[Sample]] = {}
    for s in samples:
        groups.setdefault((s.problem_set, s.name, s.context, s.temperature, s.grader), []).append(s)
    return list(groups.values())


def row_of(samples: Sequence[Sample]) -> EvalRow:
    """The row of samples that are all of one."""
    first, asked = samples[0], [s for s in samples if s.ended != UNASKED]
    by_problem: dict[str, list[Sample]] = {}
    for s in samples:
        by_problem.setdefault(s.problem_id, []).append(s)
    groups = list(by_problem.values())
    accuracy_P = np.array([np.mean([s.correct for s in group]) for group in groups])
    tokens_P = np.array([_mean([s.tokens for s in group if s.ended != UNASKED]) for group in groups])
    there_P = ~np.isnan(tokens_P)
    mean_tokens = float(tokens_P[there_P].mean()) if there_P.any() else 0.0
    bounds = interval(tokens_P[there_P], 0.0, float(first.max_tokens), prior=0) if there_P.any() else (0.0, 0.0)
    correct = _tokens([s.tokens for s in asked if s.correct])
    reasoning = _tokens([s.reasoning_tokens for s in asked if s.reasoning_tokens is not None])
    attempts = [len(group) for group in groups]

    def share(holds: Callable[[Sample], bool]) -> float:
        return float(np.mean([holds(s) for s in samples]))

    def marked(holds: Callable[[Any], bool]) -> float | None:
        return None if any(s.marks is None for s in samples) else share(lambda s: holds(s.marks))

    def bounded(values_P: np.ndarray) -> Interval:
        return Interval(float(values_P.mean()), *interval(values_P, 0.0, 1.0))

    return EvalRow(
        name=first.name,
        context=first.context,
        temperature=first.temperature,
        grader=first.grader,
        n=len(groups),
        samples_per_problem=max(attempts),
        max_tokens=first.max_tokens,
        accuracy=float(accuracy_P.mean()),
        accuracy_ci=interval(accuracy_P, 0.0, 1.0),
        mean_tokens=mean_tokens,
        mean_tokens_ci=bounds,
        median_tokens=float(np.median([s.tokens for s in asked])) if asked else 0.0,
        mean_tokens_correct=correct.mean,
        mean_tokens_reasoning=reasoning.mean,
        share_finished=share(lambda s: s.ended == "stopped"),
        share_truncated=share(lambda s: s.ended == "cut"),
        share_unparseable=share(lambda s: s.extracted is None),
        grader_failures=sum(s.failure is not None for s in samples),
        problem_ids=tuple(by_problem),
        problem_accuracy=tuple(accuracy_P.tolist()),
        problem_tokens=tuple(tokens_P.tolist()),
        problem_set=first.problem_set,
        top_p=first.top_p,
        top_k=first.top_k,
        seed=first.seed,
        unasked=int((~there_P).sum()),
        tokens_all=_tokens([s.tokens for s in asked]),
        tokens_correct=correct,
        tokens_reasoning=reasoning,
        share_boxed=marked(lambda marks: "boxed" in marks),
        share_answer_line=marked(lambda marks: "answer_line" in marks),
        share_unmarked=marked(lambda marks: not marks),
        accuracy_boxed=marked(lambda marks: marks.get("boxed", False)),
        accuracy_answer_line=marked(lambda marks: marks.get("answer_line", False)),
        pass_at_k=tuple(
            (k, bounded(np.array([pass_at_k(len(g), sum(s.correct for s in g), k) for g in groups])))
            for k in _powers(min(attempts))
        ),
        maj_at_k=bounded(np.array([majority([_vote(s) for s in g], [s.correct for s in g]) for g in groups])),
        right_per_1000_tokens=_scaled(1000, accuracy_P[there_P], tokens_P[there_P]),
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _tokens(values: Sequence[float]) -> Tokens:
    if not values:
        return Tokens(None, None, None)
    return Tokens(float(np.mean(values)), float(np.median(values)), float(np.quantile(values, 0.9)))


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def _vote(sample: Sample) -> Any:
    return None if sample.extracted is None else canonical(sample.extracted)


def _scaled(scale: float, top_P: np.ndarray, bottom_P: np.ndarray) -> Interval:
    if not len(bottom_P) or not bottom_P.mean():
        return Interval(0.0, 0.0, 0.0)
    mean, lower, upper = ratio_interval(top_P, bottom_P)
    if np.ptp(top_P) == 0:  # the linear form knows of no spread there, as little as a bootstrap would
        low, high = (x / float(bottom_P.mean()) for x in interval(top_P, 0.0, 1.0))
        lower, upper = (min(lower, low), max(upper, high)) if len(top_P) > 1 else (low, high)
    return Interval(scale * mean, scale * max(0.0, lower), scale * upper)


def parts(samples: Iterable[Sample], of: Literal["level", "subject"]) -> dict[str, EvalRow]:
    """A row for each level or subject, sorted; nothing where the problems have none."""
    groups: dict[str, list[Sample]] = {}
    for s in samples:
        value = getattr(s, of)
        if value is not None:
            groups.setdefault(value, []).append(s)
    return {value: row_of(groups[value]) for value in sorted(groups)}


def under_budgets(samples: Sequence[Sample], shares: Sequence[float] = BUDGETS) -> list[tuple[int, EvalRow]]:
    """(tokens, the row of the samples cut there) for shares of max_tokens: a sample that is longer has come to no
    answer, and is wrong. The samples are of one row."""
    budgets = [max(1, round(share * samples[0].max_tokens)) for share in shares]
    return [(b, row_of([_cut(s, b) if s.tokens > b else s for s in samples])) for b in dict.fromkeys(budgets)]


def paired_difference(
    before: EvalRow, after: EvalRow, of: Literal["accuracy", "tokens"] = "accuracy"
) -> tuple[float, float, float]:
    """(mean, lower, upper) of after minus before on the same problems; 95 %, over problems (`statistics.interval`)."""
    if set(before.problem_ids) != set(after.problem_ids):
        odd = sorted(set(before.problem_ids) ^ set(after.problem_ids))
        raise UserError(
            f"comparing {before.name!r} with {after.name!r}: problem {odd[0]!r} (of {len(odd)}) is in one only; "
            "evaluate both on the same held-out problems"
        )
    difference_P = _differences(before, after)[of]
    if of == "accuracy":
        return float(difference_P.mean()), *interval(difference_P, -1.0, 1.0)
    bound = float(max(before.max_tokens, after.max_tokens))
    return float(difference_P.mean()), *interval(difference_P, -bound, bound, prior=0)


def paired_p(before: EvalRow, after: EvalRow) -> float:
    """The two-sided p-value of no difference in accuracy between two rows of the same problems."""
    return sign_flip_test(_differences(before, after)["accuracy"])


def _differences(before: EvalRow, after: EvalRow) -> dict[str, np.ndarray]:
    """After minus before by problem; tokens of those that both were asked."""
    first, second = before.problem_figures, after.problem_figures
    both_P2 = np.array([np.subtract(second[i], first[i]) for i in before.problem_ids])
    return {"accuracy": both_P2[:, 0], "tokens": both_P2[~np.isnan(both_P2[:, 1]), 1]}


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
    return replace(row_of([_cut(s, budget) if s.tokens > budget else s for s in samples]), name=name)


def _cut(s: Sample, budget: float) -> Sample:
    reasoning = None if s.reasoning_tokens is None else min(s.reasoning_tokens, budget)
    change = {
        "tokens": budget,
        "reasoning_tokens": reasoning,
        "ended": "cut",
        "extracted": None,
        "correct": False,
        "failure": None,
        "marks": None if s.marks is None else {},
    }
    return replace(s, **change)
