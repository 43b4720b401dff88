"""What the finished arms of a comparison come to: one row a method and temperature, as a table, Markdown, CSV and JSON.

First the untrained student, the same merely asked for fewer words, and the same cut at the length of the shortest
trained method: what any training has to beat.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mpd_jax.eval import intervals
from mpd_jax.eval.arms import Arm, Result, Spent, concise_wordings, unlike
from mpd_jax.eval.figures import EvalRow, truncation_row
from mpd_jax.eval.instructions import UNREAD, Readings
from mpd_jax.eval.intervals import Compared
from mpd_jax.eval.statistics import Interval
from mpd_jax.eval.tables import sampled_how

VANILLA = "vanilla"
WIDTH, MORE_WIDTH = 118, 22  # columns of the table on a screen


class Against(NamedTuple):
    """By what a row's accuracy differs from that of another method, over the seeds of both."""

    method: str
    difference: Interval


@dataclass(frozen=True)
class Line:
    """A row. kind: "vanilla", "concise", "cut" or "trained". seeds: how many it is the mean of.

    failed: seeds whose run failed. figures, spent: None where no seed is over; spent is the mean a seed, and of trained
    rows alone. readings: of a swept instruction by itself. against: None where no other method was asked for, where it
    is this one, or where no seed of both is over.
    """

    method: str
    temperature: float
    kind: str
    seeds: int
    failed: int
    figures: Compared | None
    spent: Spent | None = None
    readings: Readings = UNREAD
    against: Against | None = None


def lines(
    arms: Sequence[Arm], results: Sequence[Result], failed: Sequence[Arm] = (), against: Arm | None = None
) -> list[Line]:
    """The rows of every temperature, in the order of the config's temperatures and of the methods.

    against: an arm of the method that all rows are compared with, beside vanilla.
    """
    return [
        line
        for temperature in arms[0].settings.eval.temperatures
        for line in _at(temperature, arms, results, failed, against)
    ]


def _at(
    temperature: float, arms: Sequence[Arm], results: Sequence[Result], failed: Sequence[Arm], against: Arm | None
) -> list[Line]:
    base = {r.arm.seed: r for r in reversed(results)}  # the first of each seed: they are asked and graded alike
    vanilla = {seed: r.vanilla[temperature] for seed, r in base.items()}
    other = {r.arm.seed: r.trained[temperature] for r in results if against and r.arm.row == against.row}
    found: list[Line] = []

    def add(
        method: str, kind: str, rows: Mapping[int, EvalRow], own: Sequence[Result] = (), without: Sequence[Arm] = ()
    ) -> None:
        figures = _figures(rows, vanilla) if rows else None
        read = next((r.readings[temperature] for r in own if r.readings), UNREAD)
        spent = _mean([r.spent for r in own])
        both = {seed: row for seed, row in rows.items() if seed in other and row is not other[seed]}
        beside = Against(against.label, _figures(both, other).difference) if against and both else None
        found.append(Line(method, temperature, kind, len(rows), len(without), figures, spent, read, beside))

    add(VANILLA, "vanilla", vanilla)
    for wording, name in concise_wordings(arms).items():
        own = [r for r in results if r.concise and r.arm.settings.recipe.contexts.concise == wording]
        if own:
            add(name, "concise", {r.arm.seed: r.concise[temperature] for r in own})
    by_row = {arm.row: [r for r in results if r.arm.row == arm.row] for arm in arms}
    lengths = [np.mean([r.trained[temperature].mean_tokens for r in own]) for own in by_row.values() if own]
    if lengths:
        cut = {seed: truncation_row(r.base[temperature], float(min(lengths))) for seed, r in base.items()}
        tokens = float(np.mean([row.mean_tokens for row in cut.values()]))
        # Where no method is shorter than the student was, nothing is cut.
        if tokens < np.mean([row.mean_tokens for row in vanilla.values()]):
            add(f"{VANILLA}, cut to {tokens:.0f} tokens", "cut", cut)
    labels = {arm.row: arm.label for arm in arms}
    for row, own in by_row.items():
        trained = {r.arm.seed: r.trained[temperature] for r in own}
        add(labels[row], "trained", trained, own, [arm for arm in failed if arm.row == row])
    return found


def _figures(rows: Mapping[int, EvalRow], others: Mapping[int, EvalRow]) -> Compared:
    """Of `rows` by seed beside those of the same seeds in `others`."""
    ids = next(iter(others.values())).problem_ids

    def array_SP(of: Mapping[int, EvalRow], field: str) -> np.ndarray:
        by_id = [dict(zip(of[s].problem_ids, getattr(of[s], f"problem_{field}"), strict=True)) for s in sorted(rows)]
        return np.array([[values[i] for i in ids] for values in by_id])

    arrays = [array_SP(of, field) for of in (rows, others) for field in ("accuracy", "tokens")]
    return intervals.compared(*arrays, max_tokens=float(max(row.max_tokens for row in rows.values())))


def _mean(spent: Sequence[Spent]) -> Spent | None:
    if not spent:
        return None

    def mean(name: str) -> float | None:
        values = [value for s in spent if (value := getattr(s, name)) is not None]
        return float(np.mean(values)) if values else None

    tokens = [round(mean(f"{role}_tokens") or 0) for role in ("writer", "rewriter", "trainer")]
    return Spent(mean("student_entropy"), mean("seconds"), *tokens)


def flat(line: Line) -> dict[str, Any]:
    """A row as plain values, for CSV and JSON."""
    values: dict[str, Any] = {
        "temperature": line.temperature,
        "method": line.method,
        "kind": line.kind,
        "seeds": line.seeds,
        "failed": line.failed,
    }
    for name in Compared._fields:
        found = getattr(line.figures, name) if line.figures else (None, None, None)
        values |= dict(zip((name, f"{name}_lower", f"{name}_upper"), found, strict=True))
    method, difference = line.against or (None, (None, None, None))
    columns = ("against_difference", "against_difference_lower", "against_difference_upper")
    values |= {"against": method, **dict(zip(columns, difference, strict=True))}
    for name in Spent.__dataclass_fields__:
        values[name] = getattr(line.spent, name) if line.spent else None
    for name in Readings.__dataclass_fields__:
        accuracy, tokens = getattr(line.readings, name) or ((None, None, None), None)
        columns = (f"{name}_accuracy", f"{name}_accuracy_lower", f"{name}_accuracy_upper", f"{name}_tokens")
        values |= dict(zip(columns, (*accuracy, tokens), strict=True))
    return values


def as_csv(found: Sequence[Line]) -> str:
    rows = [flat(line) for line in found]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


HEADS = (
    "method",
    "accuracy, %",
    "vs vanilla",
    "tokens",
    "fewer, %",
    "entropy",
    "seconds",
    "tokens of writer / rewriter / trainer",
)
TALL = {HEADS[-1]: "tokens: writer /\nrewriter /\ntrainer"}  # on a screen
READ = "instruction alone, %"


def heads(found: Sequence[Line]) -> tuple[str, ...]:
    """`HEADS`, and more where all rows are compared with a method, or instructions were measured by themselves."""
    against = dict.fromkeys(f"vs {line.against.method}" for line in found if line.against)
    read = (READ,) if any(line.readings != UNREAD for line in found) else ()
    return (*HEADS[:3], *against, *HEADS[3:], *read)


def cells(line: Line, between: str) -> dict[str, str]:
    """The cells under their heads, empty ones left out; `between` stands between a mean and its interval."""
    figures, spent = line.figures, line.spent
    read = [
        f"{name}: {100 * r.accuracy.mean:.1f}{between}[{100 * r.accuracy.lower:.1f}, {100 * r.accuracy.upper:.1f}]"
        f"{between}{r.tokens:.1f} tokens"
        for name in Readings.__dataclass_fields__
        if (r := getattr(line.readings, name))
    ]

    def interval(value: Interval, form: str, scale: float = 1.0) -> str:
        mean, lower, upper = (f"{scale * x:{form}}" for x in value)
        return f"{mean}{between}[{lower}, {upper}]"

    told = [f"n = {line.seeds}"] if line.kind == "trained" else []
    told += [f"{line.failed} failed"] if line.failed else []
    name = line.method + (f"{between}({', '.join(told)})" if told else "")
    roles = [_short(n) for n in (spent.writer_tokens, spent.rewriter_tokens, spent.trainer_tokens)] if spent else []
    if figures is None:
        return {HEADS[0]: name}
    same = line.kind == "vanilla"
    own = (
        name,
        interval(figures.accuracy, ".1f", 100),
        "" if same else interval(figures.difference, "+.1f", 100),
        interval(figures.tokens, ".1f"),
        "" if same else interval(figures.reduction, ".1f", 100),
        "" if spent is None or spent.student_entropy is None else f"{spent.student_entropy:.3f}",
        "" if spent is None or spent.seconds is None else f"{spent.seconds:.0f}",
        f" /{between}".join([" / ".join(roles[:2]), *roles[2:]]),
    )
    found = dict(zip(HEADS, own, strict=True)) | {READ: (between if between == "\n" else "; ").join(read)}
    if line.against:
        found[f"vs {line.against.method}"] = interval(line.against.difference, "+.1f", 100)
    return found


def _short(count: int) -> str:
    """Three digits of a number of tokens."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{sign}"
    return str(count)


def heading(temperature: float) -> str:
    return f"Temperature {temperature:g}" if temperature else "Greedy"


def said(results: Sequence[Result]) -> str:
    """What was measured how, in one sentence; and in another how the methods were not trained alike."""
    row = next(iter(results[0].trained.values()))
    seeds = len({r.arm.seed for r in results})
    apart = unlike([r.arm for r in results])
    return (
        f"{row.n} held-out problems x {row.samples_per_problem}, {sampled_how(row)}, {seeds} "
        f"seed{'s' * (seeds != 1)}, graded by {row.grader}; 95 % intervals over seeds and problems, "
        "differences paired by seed and problem; entropy is the student's over the text that each method trained on; "
        "seconds and tokens are means a seed, of training alone: seconds the mean of the steps that compiled "
        "nothing times the number of all, the trainer's tokens those that student and target read"
        + (f". Not trained alike: {apart}" if apart else "")
    )


def as_markdown(found: Sequence[Line], results: Sequence[Result]) -> str:
    parts, columns = [said(results) + ".\n"], heads(found)
    for temperature in dict.fromkeys(line.temperature for line in found):
        filled = [cells(line, " ") for line in found if line.temperature == temperature]
        rows = [columns, *([row.get(head, "") for head in columns] for row in filled)]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        rows.insert(1, ["---", *["---:"] * (len(columns) - 1)])
        parts.append(f"## {heading(temperature)}\n")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")
    return "\n".join(parts)


def table(found: Sequence[Line], results: Sequence[Result]) -> Table:
    """All temperatures in one table of `WIDTH` columns, and as many more as `MORE_WIDTH` has for each further head."""
    columns = heads(found)
    result = Table(
        caption=said(results),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        width=WIDTH + MORE_WIDTH * (len(columns) - len(HEADS)),
    )
    result.add_column(HEADS[0], overflow="fold")
    for head in columns[1:]:
        if head in HEADS:
            result.add_column(TALL.get(head, head), justify="right", no_wrap=True)
        else:
            result.add_column(head, justify="right", overflow="fold", min_width=MORE_WIDTH - 2)
    for temperature in dict.fromkeys(line.temperature for line in found):
        result.add_row(f"[bold]{heading(temperature)}[/bold]")
        for line in found:
            if line.temperature == temperature:
                filled = cells(line, "\n")
                result.add_row(*(escape(filled.get(head, "")) for head in columns))
    return result
