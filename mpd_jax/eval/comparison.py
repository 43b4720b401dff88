"""What the finished arms of a comparison come to: one row a method and temperature, as a table, Markdown, CSV and JSON.

First the untrained student, the same merely asked for fewer words, and the same cut at the length of the shortest
trained method: what any training has to beat.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mpd_jax.eval import intervals
from mpd_jax.eval.arms import Arm, Result, Spent, concise_wordings
from mpd_jax.eval.evaluate import EvalRow, truncation_row
from mpd_jax.eval.instructions import UNREAD, Readings
from mpd_jax.eval.intervals import Compared, Interval

VANILLA = "vanilla"
WIDTH, READ_WIDTH = 118, 22  # columns of the table on a screen


@dataclass(frozen=True)
class Line:
    """A row. kind: "vanilla", "concise", "cut" or "trained". seeds: how many it is the mean of.

    failed: seeds whose run failed. figures, spent: None where no seed is over; spent is the mean a seed, and of trained
    rows alone. readings: of a swept instruction by itself.
    """

    method: str
    temperature: float
    kind: str
    seeds: int
    failed: int
    figures: Compared | None
    spent: Spent | None = None
    readings: Readings = UNREAD


def lines(arms: Sequence[Arm], results: Sequence[Result], failed: Sequence[Arm] = ()) -> list[Line]:
    """The rows of every temperature, in the order of the config's temperatures and of the methods."""
    return [
        line for temperature in arms[0].settings.eval.temperatures for line in _at(temperature, arms, results, failed)
    ]


def _at(temperature: float, arms: Sequence[Arm], results: Sequence[Result], failed: Sequence[Arm]) -> list[Line]:
    base = {r.arm.seed: r for r in reversed(results)}  # the first of each seed: they are alike
    vanilla = {seed: r.vanilla[temperature] for seed, r in base.items()}
    found: list[Line] = []

    def add(
        method: str, kind: str, rows: Mapping[int, EvalRow], own: Sequence[Result] = (), without: Sequence[Arm] = ()
    ) -> None:
        figures = _figures(rows, vanilla) if rows else None
        read = next((r.readings[temperature] for r in own if r.readings), UNREAD)
        spent = _mean([r.spent for r in own])
        found.append(Line(method, temperature, kind, len(rows), len(without), figures, spent, read))

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


def _figures(rows: Mapping[int, EvalRow], vanilla: Mapping[int, EvalRow]) -> Compared:
    ids = next(iter(vanilla.values())).problem_ids

    def array_SP(of: Mapping[int, EvalRow], field: str) -> np.ndarray:
        by_id = [dict(zip(of[s].problem_ids, getattr(of[s], f"problem_{field}"), strict=True)) for s in sorted(rows)]
        return np.array([[values[i] for i in ids] for values in by_id])

    arrays = [array_SP(of, field) for of in (rows, vanilla) for field in ("accuracy", "tokens")]
    return intervals.compared(*arrays, max_tokens=float(max(row.max_tokens for row in rows.values())))


def _mean(spent: Sequence[Spent]) -> Spent | None:
    if not spent:
        return None
    entropies = [s.student_entropy for s in spent if s.student_entropy is not None]
    tokens = [
        round(float(np.mean([getattr(s, f"{role}_tokens") for s in spent])))
        for role in ("writer", "rewriter", "trainer")
    ]
    entropy = float(np.mean(entropies)) if entropies else None
    return Spent(entropy, float(np.mean([s.seconds for s in spent])), *tokens)


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
READ = "instruction alone, %"


def heads(found: Sequence[Line]) -> tuple[str, ...]:
    """`HEADS`, and one more where instructions were measured by themselves."""
    return (*HEADS, READ) if any(line.readings != UNREAD for line in found) else HEADS


def cells(line: Line, between: str) -> list[str]:
    """The cells under `HEADS` and `READ`; `between` stands between a mean and its interval."""
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
        return [name, *[""] * len(HEADS)]
    same = line.kind == "vanilla"
    return [
        name,
        interval(figures.accuracy, ".1f", 100),
        "" if same else interval(figures.difference, "+.1f", 100),
        interval(figures.tokens, ".1f"),
        "" if same else interval(figures.reduction, ".1f", 100),
        "" if spent is None or spent.student_entropy is None else f"{spent.student_entropy:.3f}",
        "" if spent is None else f"{spent.seconds:.0f}",
        f" /{between}".join([" / ".join(roles[:2]), *roles[2:]]),
        (between if between == "\n" else "; ").join(read),
    ]


def _short(count: int) -> str:
    """Three digits of a number of tokens."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{sign}"
    return str(count)


def heading(temperature: float) -> str:
    return f"Temperature {temperature:g}" if temperature else "Greedy"


def said(results: Sequence[Result]) -> str:
    """What was measured how, in one sentence."""
    row = next(iter(results[0].trained.values()))
    seeds = len({r.arm.seed for r in results})
    return (
        f"{row.n} held-out problems x {row.samples_per_problem}, {seeds} seed{'s' * (seeds != 1)}, graded by "
        f"{row.grader}; 95 % intervals over seeds and problems, differences paired with vanilla of the same seed and "
        "problem; seconds and tokens are means a seed, of training alone"
    )


def as_markdown(found: Sequence[Line], results: Sequence[Result]) -> str:
    parts, columns = [said(results) + ".\n"], heads(found)
    for temperature in dict.fromkeys(line.temperature for line in found):
        rows = [cells(line, " ")[: len(columns)] for line in found if line.temperature == temperature]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        table = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        parts.append(f"## {heading(temperature)}\n")
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in table) + "\n")
    return "\n".join(parts)


def table(found: Sequence[Line], results: Sequence[Result]) -> Table:
    """All temperatures in one table of `WIDTH` columns, and `READ_WIDTH` more where instructions were measured."""
    more = heads(found)[len(HEADS) :]
    result = Table(
        caption=said(results),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        width=WIDTH + (READ_WIDTH if more else 0),
    )
    result.add_column(HEADS[0], overflow="fold")
    for head in (*HEADS[1:-1], "tokens: writer /\nrewriter /\ntrainer", *more):
        result.add_column(head, justify="right", no_wrap=True)
    for temperature in dict.fromkeys(line.temperature for line in found):
        result.add_row(f"[bold]{heading(temperature)}[/bold]")
        for line in found:
            if line.temperature == temperature:
                result.add_row(*map(escape, cells(line, "\n")[: len(HEADS) + len(more)]))
    return result
