"""Which charts a report has, and of what: accuracy against tokens, lengths, and the curves of training."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from mpd_jax.report import charts
from mpd_jax.report.charts import Line, Mark
from mpd_jax.report.gather import Measured, RunFiles, Where
from mpd_jax.train.records import read_trajectories
from mpd_jax.types import Trajectory

SHAPES = {"base": "square", "concise": "diamond", "step": "circle", "trained": "circle"}
MEANINGS = (
    ("square", "untrained"),
    ("diamond", "untrained, asked for fewer words"),
    ("circle", "checkpoint"),
    ("full circle", "trained"),
)


def accuracy_against_tokens(runs: Sequence[RunFiles]) -> Markup:
    """One chart a set and temperature, the headline's first: every checkpoint of every run that was evaluated.

    Left out is the untrained student cut to length: mostly at 0, it would press all others together.
    """
    first = [run.headline for run in runs if run.headline is not None]
    places = list(dict.fromkeys([*first, *(m.where for run in runs for m in run.measured)]))
    return charts.join([_scatter(runs, where) for where in places])


def _scatter(runs: Sequence[RunFiles], where: Where) -> Markup | None:
    marks = [
        _marked(m, slot, run.name if len(runs) > 1 else "")
        for slot, run in enumerate(runs)
        for m in run.measured
        if m.where == where and m.kind in SHAPES and math.isfinite(m.figures["mean_tokens"])
    ]
    used = {f"full {mark.shape}" if mark.filled else mark.shape for mark in marks}
    shapes = [(shape, meaning) for shape, meaning in MEANINGS if shape in used]
    return charts.scatter(str(where), marks, "tokens per response", "accuracy, %", shapes) if marks else None


def _marked(m: Measured, slot: int, run: str) -> Mark:
    f = m.figures
    accuracy, tokens = 100 * f["accuracy"], f["mean_tokens"]
    low, high = (100 * v for v in f.get("accuracy_ci") or (f["accuracy"],) * 2)
    name = f"{run}: {f['name']}" if run else f["name"]
    words = f"{name}: {accuracy:.1f} % [{low:.1f}, {high:.1f}], {tokens:.1f} tokens"
    x_interval = tuple(f.get("mean_tokens_ci") or (tokens, tokens))
    trained, joined = m.kind == "trained", m.kind in ("base", "step", "trained")
    return Mark(words, tokens, accuracy, x_interval, (low, high), slot, SHAPES[m.kind], trained, joined)


def lengths(run: RunFiles) -> list[Markup | None]:
    """Responses before and after at the headline's place; and of training, as written and rewritten."""
    groups = [
        (m.figures["name"], [s.tokens for s in run.samples_of(m)], slot)
        for slot, m in enumerate((run.before(run.headline), run.after(run.headline)))
        if m is not None
    ]
    made = [charts.histogram(f"responses, {run.headline}", groups, "tokens per response")]
    for path in (run.trajectories[0], run.trajectories[-1]) if len(run.trajectories) > 1 else run.trajectories:
        try:
            head, trajectories = read_trajectories(path)
        except ValueError:
            run.missing.append(f"trajectories/{path.name}: damaged, and left out of the lengths")
            continue
        made.append(charts.histogram(f"training, step {head['step'] + 1}", _written(trajectories), "tokens"))
    return made


def _written(trajectories: Sequence[Trajectory]) -> list[tuple[str, Sequence[float], int]]:
    rewritten = [float(len(t.response)) for t in trajectories if t.original is not None and not t.dropped]
    written = [float(len((t.original or t).response)) for t in trajectories]
    return [("as written", written, 0), *([("rewritten", rewritten, 1)] if rewritten else [])]


def most_points(runs: Sequence[RunFiles]) -> int:
    """Of a curve or band: the more runs, the fewer, so that a report of many stays small."""
    return max(20, min(charts.MOST_POINTS, 4 * charts.MOST_POINTS // len(runs)))


def training(runs: Sequence[RunFiles]) -> Markup:
    """Curves of all runs over each other: loss, lengths, divergence, entropy and accuracy of what was written."""
    several, most = len(runs) > 1, most_points(runs)

    def curves(*keys: tuple[str, str]) -> list[Line]:
        # One run: a colour a figure. Several: a colour a run, and the figure's name beside its own.
        made = []
        for number, run in enumerate(runs):
            for at, (key, label) in enumerate(keys):
                points = values(run.steps, lambda row, key=key: row.get(key))
                name = f"{run.name}, {label}" if several and len(keys) > 1 else run.name if several else label
                made.append(smoothed(name, points, number if several else at, most))
        return made

    single: list[tuple[str, str, tuple[tuple[str, str], ...]]] = [
        ("loss", "", (("loss", "loss"),)),
        ("divergence from the target", "nats a token", (("divergence", "divergence"),)),
        ("accuracy of what was written", "share", (("rollout_accuracy", "accuracy"),)),
        ("compression ratio", "rewritten over written", (("compression_ratio", "ratio"),)),
        ("gradient norm", "", (("grad_norm", "norm"),)),
    ]
    tokens = (("written_tokens", "as written"), ("response_tokens", "trained on"))
    entropy = (("student_entropy", "student"), ("target_entropy", "target"))
    for title, unit, keys in (("tokens per response", "", tokens), ("entropy", "nats a token", entropy)):
        if several:
            single += [(f"{title}, {label}", unit, ((key, label),)) for key, label in keys]
        else:
            single.insert(1, (title, unit, keys))
    return charts.join([charts.lines(title, curves(*keys), "step", unit, most=most) for title, unit, keys in single])


def of_one_run(run: RunFiles, most: int) -> Markup:
    """What cannot lie over another run's: divergence by position, verdicts, and where the time went. most: points of a
    curve or band."""
    return charts.join([_by_position(run, most), _verdicts(run, most), _seconds(run, most)])


def values(steps: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], Any]) -> list[tuple[float, float]]:
    """(updates after the step, figure) where there is one."""
    found = [(row["step"] + 1, of(row)) for row in steps]
    return [(float(step), float(y)) for step, y in found if isinstance(y, int | float) and math.isfinite(y)]


def smoothed(label: str, points: Sequence[tuple[float, float]], slot: int, most: int) -> Line:
    """Single steps faint and their running mean strong, where there are many."""
    width = max(1, len(points) // 20)
    if width == 1:
        return Line(label, points, slot)
    x, y = np.array(points).T
    kernel = np.ones(width)
    mean = np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")
    every = -(-len(points) // most)
    strong = list(zip(x[::every].tolist(), mean[::every].tolist(), strict=True))
    return Line(label, strong, slot, list(zip(x[::every].tolist(), y[::every].tolist(), strict=True)))


def _by_position(run: RunFiles, most: int) -> Markup | None:
    def at(row: Mapping[str, Any], start: int) -> Any:
        return next((b["mean"] for b in row.get("divergence_by_position") or () if b["from"] == start), None)

    starts = sorted({b["from"] for row in run.steps for b in row.get("divergence_by_position") or ()})
    made = [
        smoothed(f"from token {start}", values(run.steps, lambda row, start=start: at(row, start)), slot, most)
        for slot, start in enumerate(starts)
    ]
    return charts.lines("divergence by position", made, "step", "nats a token", most=most)


def _verdicts(run: RunFiles, most: int) -> Markup | None:
    rows = [row for row in run.steps if row.get("verdicts")]
    names = sorted({name for row in rows for name in row["verdicts"]}, key=lambda name: (name != "kept", name))
    totals = [sum(row["verdicts"].values()) or 1 for row in rows]
    parts = [(n, [r["verdicts"].get(n, 0) / t for r, t in zip(rows, totals, strict=True)]) for n in names]
    return charts.stacked("verdicts", [float(r["step"] + 1) for r in rows], parts, "% of trajectories", most=most)


def _seconds(run: RunFiles, most: int) -> Markup | None:
    rows = [row for row in run.steps if "train_share" in row]
    ends = "_share"
    names = list(dict.fromkeys(key for row in rows for key in row if key.endswith(ends)))
    parts = [(name.removesuffix(ends), [row.get(name) or 0.0 for row in rows]) for name in names]
    return charts.stacked("wall time by phase", [float(r["step"] + 1) for r in rows], parts, "% of a step", most=most)
