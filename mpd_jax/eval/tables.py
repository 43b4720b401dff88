"""Evaluations as tables: accuracy and tokens, and what else the samples say. Each names how it was made."""

from collections.abc import Iterable, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mpd_jax.eval.figures import EvalRow, Interval, Tokens, paired_difference, paired_p, parts, row_of, under_budgets
from mpd_jax.eval.samples import Sample

SHOWN_K = 4  # columns of pass@k that fit


def made_how(rows: Sequence[EvalRow]) -> str:
    """Problems, attempts, sampling, budget and grader of the rows, in one sentence."""
    return "; ".join(sorted({_made_how(row) for row in rows}))


def _made_how(row: EvalRow) -> str:
    seed = f", seed {row.seed}" if row.seed is not None else ""
    unasked = f", {row.unasked} without room for their prompts, counted as wrong" if row.unasked else ""
    failed = f" ({row.grader_failures} comparisons failed, counted as wrong)" if row.grader_failures else ""
    return (
        f"{row.problem_set or 'held out'}: {row.n} problems x {row.samples_per_problem}{unasked}, "
        f"{_temperature(row)}, {sampled_how(row)}{seed}, graded by {row.grader}{failed}"
    )


def sampled_how(row: EvalRow) -> str:
    """Truncation and budget."""
    cut = f"top-p {row.top_p:g}, top-k {row.top_k or 'off'}, " if row.top_p is not None else ""
    return f"{cut}at most {row.max_tokens:,} tokens"


def _temperature(row: EvalRow) -> str:
    return f"T = {row.temperature:g}" if row.temperature else "greedy"


def _label(row: EvalRow, rows: Sequence[EvalRow]) -> str:
    """Name, temperature and what else the rows differ in."""
    several = [x for x in ("problem_set", "grader") if len({getattr(r, x) for r in rows}) > 1]
    return escape(f"{row.name}\n" + ", ".join([_temperature(row), *(str(getattr(row, x)) for x in several)]))


def _new(title: str, rows: Sequence[EvalRow], columns: Sequence[str]) -> Table:
    result = Table(title=title, caption=escape(made_how(rows)), box=SIMPLE_HEAD, pad_edge=False)
    result.add_column("model")
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    return result


def _percent(value: float | Interval | None, sign: str = "") -> str:
    if value is None:
        return ""
    if isinstance(value, Interval):
        return "{:{s}.1f}\n[{:{s}.1f}, {:{s}.1f}]".format(*(100 * x for x in value), s=sign)
    return f"{100 * value:.1f}"


def table(rows: Sequence[EvalRow]) -> Table:
    """Differences are against the first row of the same problem set and temperature, paired."""
    heads = ("accuracy, %", "vs first", "tokens", "done/cut/\nno answer")
    result = _new("Accuracy and tokens, 95 % intervals", rows, heads)
    firsts: dict[tuple, EvalRow] = {}
    for row in rows:
        first = firsts.setdefault((row.problem_set, row.temperature), row)
        paired = row is not first and set(row.problem_ids) == set(first.problem_ids)
        less = f" ({row.mean_tokens / first.mean_tokens - 1:+.0%})" if row is not first and first.mean_tokens else ""
        result.add_row(
            _label(row, rows),
            _percent(Interval(row.accuracy, *row.accuracy_ci)),
            _percent(Interval(*paired_difference(first, row)), "+") if paired else "",
            f"{row.mean_tokens:.1f}{less}\n" + "[{:.1f}, {:.1f}]".format(*row.mean_tokens_ci),
            "/".join(f"{100 * x:.0f}" for x in (row.share_finished, row.share_truncated, row.share_unparseable)) + "%",
        )
    return result


def formats(rows: Sequence[EvalRow]) -> Table:
    """How answers are marked, and accuracy if one mark alone counted: training may move the format, not the skill."""
    heads = ("boxed, %", "right by\nthe box", "Answer:\nline, %", "right by\nthe line", "neither", "accuracy")
    result = _new("Marks of the answers, in % of all samples", rows, heads)
    for row in rows:
        shares = (row.share_boxed, row.accuracy_boxed, row.share_answer_line, row.accuracy_answer_line)
        result.add_row(_label(row, rows), *map(_percent, (*shares, row.share_unmarked, row.accuracy)))
    return result


def attempts(rows: Sequence[EvalRow]) -> Table:
    """Of several attempts a problem: one of them right, or the majority."""
    ks = sorted({k for row in rows for k, _ in row.pass_at_k})
    if len(ks) > SHOWN_K:
        ks = [ks[round(i * (len(ks) - 1) / (SHOWN_K - 1))] for i in range(SHOWN_K)]
    result = _new("Of several attempts, %", rows, [*(f"pass@{k}" for k in ks), "majority"])
    for row in rows:
        at = dict(row.pass_at_k)
        result.add_row(_label(row, rows), *(_percent(at.get(k)) for k in ks), _percent(row.maj_at_k))
    return result


def lengths(rows: Sequence[EvalRow]) -> Table:
    """Tokens as mean, median and 90th percentile, and what a thousand of them are worth."""
    heads = ("all", "right alone", "reasoning", "right per\n1,000 tokens")
    result = _new("Tokens: mean, median, 90th percentile", rows, heads)
    for row in rows:
        worth = "{:.3f}\n[{:.3f}, {:.3f}]".format(*row.right_per_1000_tokens)
        spreads = map(_spread, (row.tokens_all, row.tokens_correct, row.tokens_reasoning))
        result.add_row(_label(row, rows), *spreads, worth)
    return result


def _spread(tokens: Tokens) -> str:
    return "" if tokens.mean is None else "\n".join(f"{x:.1f}" for x in tokens)


def budgets(samples: Iterable[Sequence[Sample]]) -> Table:
    """Accuracy if samples, those of one row at a time, had been stopped at fewer tokens."""
    found = [under_budgets(of_one) for of_one in samples]
    rows = [row for of_one in found for _, row in of_one]
    at = sorted({budget for of_one in found for budget, _ in of_one})
    result = _new("Accuracy under a budget of tokens, %", rows, [f"{b:,}" for b in at])
    for of_one in found:
        cells = {budget: _percent(Interval(row.accuracy, *row.accuracy_ci)) for budget, row in of_one}
        result.add_row(_label(of_one[0][1], rows), *(cells.get(b, "") for b in at))
    return result


def by_part(samples: Sequence[Sample]) -> Table | None:
    """Accuracy and tokens by level and by subject of the samples of one row; None where the problems have neither."""
    found = {f"{of} {v}": row for of in ("level", "subject") for v, row in parts(samples, of).items()}
    if not found:
        return None
    whole = row_of(samples)
    result = _new(escape(f"{whole.name}, by level and subject"), [whole], ("problems", "accuracy, %", "tokens"))
    result.columns[0].header = "part"
    for part, row in found.items():
        accuracy = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (row.accuracy, *row.accuracy_ci)))
        tokens = "{:.1f} [{:.1f}, {:.1f}]".format(row.mean_tokens, *row.mean_tokens_ci)
        result.add_row(escape(part), str(row.n), accuracy, tokens)
    return result


def against(pairs: Sequence[tuple[EvalRow, EvalRow]]) -> Table:
    """Rows beside those of a baseline on the same problems, (baseline, row): differences by problem, with p-values."""
    rows = [row for pair in pairs for row in pair]
    heads = ("accuracy, %", "difference", "p", "tokens")
    result = _new("Against the baseline, paired by problem", rows, heads)
    for before, after in pairs:
        tokens = np.array(paired_difference(before, after, "tokens"))
        result.add_row(
            f"{_label(after, rows)}\nvs {escape(before.name)}",
            f"{_percent(before.accuracy)} to\n{_percent(after.accuracy)}",
            _percent(Interval(*paired_difference(before, after)), "+"),
            f"{paired_p(before, after):.4f}",
            "{:+.1f}\n[{:+.1f}, {:+.1f}]".format(*tokens),
        )
    return result
