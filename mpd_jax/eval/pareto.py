"""The picture of a comparison: accuracy against tokens, one panel a temperature, as one PNG."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpd_jax.eval.comparison import Line, heading
from mpd_jax.eval.plot import HELD_OUT, INK, MUTED, TRAINED_ON, WRITTEN, dress
from mpd_jax.files import AnyPath, write_atomically

MARKS = {"vanilla": (INK, "s"), "concise": (WRITTEN, "D"), "trained": (HELD_OUT, "o")}
RADII, ANGLES = (10, 18, 28, 40, 54, 70, 90, 115, 145), 16  # points from a mark at which its label is tried


def plot(lines: Sequence[Line], path: AnyPath) -> None:
    """Writes the PNG. The frontier joins what nothing beats in both figures.

    Left out are rows without figures, and the cut student: mostly at 0, it would press all others together.
    """
    shown = [line for line in lines if line.figures is not None and line.kind in MARKS]
    temperatures = list(dict.fromkeys(line.temperature for line in shown))
    figure = Figure(figsize=(7.5, 5.2 * len(temperatures)), dpi=150, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(temperatures), 1, squeeze=False)[:, 0]
    for axes, temperature in zip(panels, temperatures, strict=True):
        _points(axes, [line for line in shown if line.temperature == temperature])
        dress(axes, f"Accuracy on held-out problems, {heading(temperature).lower()}, 95 % intervals")
        axes.set_xlabel("tokens per response", color=MUTED)
        axes.margins(0.16, 0.12)
    canvas.draw()  # the layout is settled: from here on places on the picture are what they will be
    figure.set_layout_engine("none")
    for axes, temperature in zip(panels, temperatures, strict=True):
        _label(axes, [line for line in shown if line.temperature == temperature], canvas.get_renderer())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _at(line: Line) -> tuple[float, float]:
    assert line.figures is not None
    return line.figures.tokens.mean, line.figures.accuracy.mean


def _points(axes: Axes, lines: Sequence[Line]) -> None:
    for line in lines:
        assert line.figures is not None
        (x, *xs), (y, *ys) = line.figures.tokens, line.figures.accuracy
        colour, mark = MARKS[line.kind]
        errors: dict[str, Any] = {"xerr": _reach(x, xs), "yerr": _reach(y, ys), "ecolor": colour, "elinewidth": 0.9}
        axes.errorbar([x], [y], fmt=mark, color=colour, markersize=6, capsize=2, alpha=0.85, zorder=3, **errors)
    frontier, best = [], -math.inf
    for x, y in sorted(map(_at, lines), key=lambda at: (at[0], -at[1])):
        if y > best:
            frontier.append((x, y))
            best = y
    axes.plot(*np.array(frontier).T, color=TRAINED_ON, linewidth=1, linestyle=(0, (4, 3)), zorder=1)


def _reach(mean: float, bounds: Sequence[float]) -> np.ndarray:
    return np.abs(np.array(bounds)[:, None] - mean)


def _label(axes: Axes, lines: Sequence[Line], renderer: Any) -> np.ndarray:
    """Each name at the nearest place to its mark where it covers no mark, no interval's cross and no other name.

    Returns the boxes of the names on the picture, (names, 4): left, bottom, right, top.
    """
    marks = [axes.transData.transform(_at(line)) for line in lines]
    taken = [np.array([x - 9, y - 9, x + 9, y + 9]) for x, y in marks]
    taken += [box for line in lines for box in _cross(axes, line)]
    drawn = len(taken)
    inside, pixels = np.array([axes.get_window_extent(renderer).extents]), renderer.points_to_pixels(1)
    # The crowded first: they have the fewest places to choose from.
    order = sorted(range(len(lines)), key=lambda i: sum(math.dist(marks[i], other) for other in marks))
    for i in order:
        text = axes.text(0, 0, lines[i].method, fontsize=8, color=MARKS[lines[i].kind][0], transform=None, zorder=4)
        size = text.get_window_extent(renderer)
        boxes = _around(marks[i], pixels, size.width, size.height)
        whole = size.width * size.height
        covered = _shared(boxes, np.array(taken)).sum(axis=1) + whole - _shared(boxes, inside)[:, 0]
        box = boxes[np.argmin(covered.round(3))]  # the first, and so the nearest, of the best
        text.set_position((box[0], box[1] - size.y0))
        taken.append(box)
        nearest = np.clip(marks[i], box[:2], box[2:])
        if math.dist(nearest, marks[i]) > 14 * pixels:
            line = axes.transData.inverted().transform(np.array([marks[i], nearest]))
            axes.plot(*line.T, color=MUTED, linewidth=0.6, zorder=2)
    return np.array(taken[drawn:])


def _cross(axes: Axes, line: Line) -> list[np.ndarray]:
    """The boxes of the two arms of a mark's intervals."""
    assert line.figures is not None
    (x, left, right), (y, low, high) = line.figures.tokens, line.figures.accuracy
    ends = axes.transData.transform([(left, y), (right, y), (x, low), (x, high)])
    return [np.concatenate([a - 2, b + 2]) for a, b in (ends[:2], ends[2:])]


def _around(mark: np.ndarray, pixels: float, width: float, height: float) -> np.ndarray:
    """Boxes for a label, the nearest first; the side towards the mark is at one of `RADII` from it."""
    radius = np.repeat(RADII, ANGLES)[:, None] * pixels
    angle = np.tile(np.arange(ANGLES) * 2 * math.pi / ANGLES, len(RADII))
    way, size = np.stack([np.cos(angle), np.sin(angle)], axis=1), np.array([[width, height]])
    corner = mark[None, :] + radius * way + size / 2 * (way - 1)
    return np.concatenate([corner, corner + size], axis=1)


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Square pixels that each of N boxes has in common with each of M others: (N, M)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.prod(np.clip(high - low, 0, None), axis=2)
