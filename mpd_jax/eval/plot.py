"""The picture of a run: tokens of a response and accuracy over steps, as one PNG.

Drawn with matplotlib's objects and its Agg canvas: no global state, no display, no backend chosen for anyone else.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpd_jax.eval.figures import EvalRow
from mpd_jax.eval.tables import sampled_how
from mpd_jax.files import AnyPath, write_atomically

INK, MUTED, GRID = "#1f2328", "#6e7781", "#e6e8eb"
HELD_OUT, WRITTEN, TRAINED_ON = "#0b5cad", "#e08214", "#7a5195"
LENGTHS = (("written_tokens", "as written (training)", WRITTEN), ("response_tokens", "trained on", TRAINED_ON))


def plot_run(
    metrics_rows: Sequence[Mapping[str, Any]], eval_rows: Sequence[tuple[int, EvalRow]], path: AnyPath
) -> None:
    """Writes the PNG. metrics_rows: rows of metrics.jsonl; eval_rows: (step after which it was evaluated, row).

    Drawn is the temperature of the first evaluation. Rows read under the plain prompt form the curve of the student;
    any other context is a level to compare with.
    """
    eval_rows = [(step, row) for step, row in eval_rows if row.temperature == eval_rows[0][1].temperature]
    curve = sorted(((step, row) for step, row in eval_rows if row.context == "plain"), key=lambda pair: pair[0])
    assert len({step for step, _ in curve}) == len(curve), "two curves in one"
    levels = [row for _, row in eval_rows if row.context != "plain"]
    figure = Figure(figsize=(8, 6.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    tokens, accuracy = figure.subplots(2, 1, sharex=True)

    for key, label, colour in LENGTHS:
        points = [(row["step"], row[key]) for row in metrics_rows if row.get(key) is not None]
        if points:
            steps, values = np.array(points, dtype=np.float64).T
            _trend(tokens, steps, values, label, colour)
    _evaluations(tokens, curve, levels, "mean_tokens")
    _evaluations(accuracy, curve, levels, "accuracy")

    dress(tokens, "Tokens per response")
    tokens.set_ylim(bottom=0)
    if tokens.get_legend_handles_labels()[1]:
        tokens.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize=9, labelcolor=INK)
    dress(accuracy, "Accuracy on held-out problems" + (f"\n{_conditions(curve[-1][1])}" if curve else ""))
    # Never a narrower window: it would turn sampling noise into hills.
    low, high = accuracy.get_ylim()
    low, high = min(low, (low + high) / 2 - 0.15), max(high, (low + high) / 2 + 0.15)
    accuracy.set_ylim(max(0.0, low - max(0.0, high - 1.01)), min(1.01, high))
    accuracy.set_xlabel("step", color=MUTED)
    accuracy.xaxis.set_major_locator(MaxNLocator(integer=True))
    if curve:
        figure.suptitle(_title(curve[0][1], curve[-1][1]), x=0.01, ha="left", color=INK, fontsize=11, weight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _title(before: EvalRow, after: EvalRow) -> str:
    if before is after:
        return f"{after.mean_tokens:.0f} tokens, accuracy {after.accuracy:.3f}"
    return (
        f"{before.mean_tokens:.0f} → {after.mean_tokens:.0f} tokens, "
        f"accuracy {before.accuracy:.3f} → {after.accuracy:.3f}"
    )


def _conditions(row: EvalRow) -> str:
    how = f"temperature {row.temperature:g}" if row.temperature else "greedy"
    return f"{how}, {row.n} problems x {row.samples_per_problem}, {sampled_how(row)}, graded by {row.grader}"


def _trend(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    """Single steps faint, their running mean strong."""
    width = max(1, len(values) // 20)
    if width > 1:
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
    kernel = np.ones(width)
    # Divided by the number of steps under the window, so that both ends are true means.
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
    axes.plot(steps, smooth, color=colour, linewidth=1.6, label=label)


def _evaluations(axes: Axes, curve: Sequence[tuple[int, EvalRow]], levels: Sequence[EvalRow], of: str) -> None:
    if curve:
        steps = np.array([step for step, _ in curve])
        means = np.array([getattr(row, of) for _, row in curve])
        bounds = np.array([getattr(row, f"{of}_ci") for _, row in curve])
        errors = np.abs(bounds.T - means[None, :])
        style = {"color": HELD_OUT, "marker": "o", "markersize": 5, "linewidth": 1.8, "capsize": 3, "zorder": 3}
        axes.errorbar(steps, means, errors, label="held out, 95 % interval", **style)
    for row in levels:
        axes.axhline(getattr(row, of), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label=row.name)


def dress(axes: Axes, title: str) -> None:
    """How panels look: a title, faint lines, no frame."""
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
