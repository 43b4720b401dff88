"""Charts as SVG text. Colours are classes that the page's style sheet sets, light and dark; nothing is fetched.

Every function returns one <figure>: title, picture, legend. A picture is as wide as a phone, so that its letters stay
readable there; pages lay several side by side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 12, 42
COLOURS = 8
MOST_POINTS = 400  # of a curve or band: more than a picture has pixels for
DOTTED = 10  # of so many points that there may be, one is a dot of its own, with words


class Line(NamedTuple):
    """A curve. slot: its colour, from 0 on; every eighth has the same one, and other dashes."""

    label: str
    points: Sequence[tuple[float, float]]
    slot: int
    faint: Sequence[tuple[float, float]] = ()


class Mark(NamedTuple):
    """A point with its intervals (lower, upper). shape: circle, square or diamond. joined: marks of one slot
    that are joined are points of a curve, in their order."""

    label: str
    x: float
    y: float
    x_interval: tuple[float, float]
    y_interval: tuple[float, float]
    slot: int
    shape: str = "circle"
    filled: bool = True
    joined: bool = False


@dataclass(frozen=True)
class Frame:
    """Where figures lie on the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        span = self.x_high - self.x_low or 1.0
        return round(LEFT + (value - self.x_low) / span * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        span = self.y_high - self.y_low or 1.0
        return round(HEIGHT - BOTTOM - (value - self.y_low) / span * (HEIGHT - TOP - BOTTOM), 1)


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers from low to high; integers if whole."""
    if not high > low:
        return [low]
    raw = max((high - low) / count, 1.0 if whole else 0.0)
    scale = 10.0 ** math.floor(math.log10(raw))
    round_ones = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(scale * m for m in round_ones if scale * m >= raw * 0.999)
    return [round(step * i, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def lines(
    title: str, curves: Sequence[Line], x_label: str, y_label: str, *, from_zero: bool = True, most: int = MOST_POINTS
) -> Markup | None:
    """Curves over one x axis; None where there is nothing to draw. most: points that a curve may have; those of one
    that has few are told apart."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in (*curve.points, *curve.faint)]
    frame = _framed(xs, ys, from_zero)
    drawn = []
    for curve in curves:
        if curve.faint:
            drawn.append(
                Markup('<path class="line faint {}" d="{}"/>').format(_slot(curve.slot), _path(frame, curve.faint))
            )
        drawn.append(Markup('<path class="line {}" d="{}"/>').format(_slot(curve.slot), _path(frame, curve.points)))
        if len(curve.points) <= most // DOTTED and not curve.faint:
            drawn += [
                _dot(frame, x, y, curve.slot, f"{curve.label}: {_plain(y)} at {_plain(x)}") for x, y in curve.points
            ]
    named = [(curve.label, curve.slot, "") for curve in curves]
    return _figure(title, frame, x_label, y_label, drawn, named)


def scatter(title: str, marks: Sequence[Mark], x_label: str, y_label: str, shapes: Sequence[tuple[str, str]]) -> Markup:
    """Points with crosses of their intervals. shapes: (shape, what it means) for the legend."""
    xs = [v for m in marks for v in (m.x, *m.x_interval)]
    ys = [v for m in marks for v in (m.y, *m.y_interval)]
    frame = _framed(xs, ys, False)
    drawn = []
    for slot in dict.fromkeys(m.slot for m in marks):
        curve = [(m.x, m.y) for m in marks if m.slot == slot and m.joined]
        if len(curve) > 1:
            drawn.append(Markup('<path class="line thin {}" d="{}"/>').format(_slot(slot), _path(frame, curve)))
    for m in marks:
        cross = f"M{frame.x(m.x_interval[0])} {frame.y(m.y)}H{frame.x(m.x_interval[1])}"
        cross += f"M{frame.x(m.x)} {frame.y(m.y_interval[0])}V{frame.y(m.y_interval[1])}"
        drawn.append(Markup('<path class="cross {}" d="{}"/>').format(_slot(m.slot), cross))
    drawn += [_mark(frame.x(m.x), frame.y(m.y), m) for m in marks]
    return _figure(title, frame, x_label, y_label, drawn, [(meaning, -1, shape) for shape, meaning in shapes])


def histogram(title: str, groups: Sequence[tuple[str, Sequence[float], int]], x_label: str) -> Markup | None:
    """Shares of several sets of numbers in common bins, as steps over each other. groups: (label, numbers, slot)."""
    groups = [group for group in groups if len(group[1])]
    if not groups:
        return None
    every = np.concatenate([np.asarray(values, dtype=np.float64) for _, values, _ in groups])
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1, min(24, max(6, round(len(every) ** 0.5))) + 1)
    shares = [100 * np.histogram(values, edges)[0] / len(values) for _, values, _ in groups]
    frame = Frame(float(edges[0]), float(edges[-1]), 0.0, float(max(s.max() for s in shares)) * 1.08)
    drawn = []
    for (label, values, slot), share in zip(groups, shares, strict=True):
        steps = [(float(edges[0]), 0.0)]
        for left, right, height in zip(edges[:-1], edges[1:], share, strict=True):
            steps += [(float(left), float(height)), (float(right), float(height))]
        steps.append((float(edges[-1]), 0.0))
        path, middle = _path(frame, steps), float(np.mean(values))
        drawn.append(Markup('<path class="area {}" d="{}Z"/>').format(_slot(slot), path))
        said = f"{label}: mean {middle:.1f}, median {float(np.median(values)):.1f}, {len(values):,} responses"
        drawn.append(Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(_slot(slot), path, said))
        at = frame.x(middle)
        drawn.append(
            Markup('<path class="mean {}" d="M{} {}V{}"/>').format(_slot(slot), at, frame.y(0), frame.y(frame.y_high))
        )
    named = [(f"{label}, mean {np.mean(values):,.0f}", slot, "") for label, values, slot in groups]
    return _figure(title, frame, x_label, "% of responses", drawn, named)


def stacked(
    title: str,
    steps: Sequence[float],
    parts: Sequence[tuple[str, Sequence[float]]],
    y_label: str,
    *,
    most: int = MOST_POINTS,
) -> Markup | None:
    """Shares (0 to 1) over steps, one on the other; of more steps than `most` the means of so many at a time."""
    parts = [(label, values) for label, values in parts if any(values)]
    if not steps or not parts:
        return None
    every = -(-len(steps) // most)
    starts = np.arange(0, len(steps), every)
    ends = np.append(starts[1:], len(steps))
    means = [np.add.reduceat(np.asarray(v, dtype=np.float64), starts) / (ends - starts) for _, v in parts]
    top = max(1.0, float(np.sum(means, axis=0).max()))
    rights = [steps[end - 1] for end in ends]
    lefts = [steps[0] - 1, *rights[:-1]]  # what a step took lies before its end
    frame = Frame(lefts[0], rights[-1], 0.0, 100 * top)
    base, drawn = np.zeros(len(rights)), []
    for slot, ((label, values), mean_of_block) in enumerate(zip(parts, means, strict=True)):
        upper = base + 100 * mean_of_block
        over = [p for left, right, y in zip(lefts, rights, upper, strict=True) for p in ((left, y), (right, y))]
        under = [p for left, right, y in zip(lefts, rights, base, strict=True) for p in ((left, y), (right, y))]
        path = _path(frame, [*over, *reversed(under)])
        mean = float(np.mean(values))
        drawn.append(
            Markup('<path class="band {}" d="{}Z"><title>{}</title></path>').format(
                _slot(slot), path, f"{label}: {mean:.1%} on average"
            )
        )
        base = upper
    named = [(f"{label}, {np.mean(values):.0%}", slot, "") for slot, (label, values) in enumerate(parts)]
    return _figure(title, frame, "step", y_label, drawn, named)


def _framed(xs: Sequence[float], ys: Sequence[float], from_zero: bool) -> Frame:
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    if from_zero and y_low >= 0:
        y_low = 0.0
    pad_x = 0.0 if from_zero else 0.05 * (x_high - x_low)
    pad = 0.08 * ((y_high - y_low) or abs(y_high) or 1.0)
    if x_high == x_low:
        pad_x = 0.5
    return Frame(x_low - pad_x, x_high + pad_x, y_low if from_zero and y_low == 0 else y_low - pad, y_high + pad)


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)


def _slot(slot: int) -> str:
    return f"s{slot % COLOURS}" + (" dashed" if slot >= COLOURS else "")


def _dot(frame: Frame, x: float, y: float, slot: int, said: str) -> Markup:
    made = Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.6"><title>{}</title></circle>')
    return made.format(_slot(slot), frame.x(x), frame.y(y), said)


def _mark(x: float, y: float, m: Mark) -> Markup:
    made = Markup('<path class="mark {} {}" d="{}"><title>{}</title></path>')
    return made.format(_slot(m.slot), "full" if m.filled else "hollow", _shape(m.shape, x, y), m.label)


def _shape(shape: str, x: float, y: float, r: float = 5) -> str:
    """A closed path around a point."""
    if shape == "circle":
        return f"M{x - r:.1f} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"
    corners = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "diamond": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    }[shape]
    return "M" + "L".join(f"{x + r * a:.1f} {y + r * b:.1f}" for a, b in corners) + "Z"


def _plain(value: float) -> str:
    """Four digits, and no exponent where people would not write one."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _figure(
    title: str, frame: Frame, x_label: str, y_label: str, drawn: Sequence[Markup], named: Sequence[tuple[str, int, str]]
) -> Markup:
    """named: (label, slot, shape) of the legend; a shape stands for a slot of -1."""
    svg = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)]
    for value in ticks(frame.y_low, frame.y_high, 4):
        y = frame.y(value)
        svg.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        svg.append(Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(LEFT - 6, y + 4, _plain(value)))
    for value in ticks(frame.x_low, frame.x_high, 6, whole=x_label == "step"):
        svg.append(
            Markup('<text class="tick middle" x="{}" y="{}">{}</text>').format(
                frame.x(value), HEIGHT - BOTTOM + 18, _plain(value)
            )
        )
    svg.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT))
    middle = (LEFT + WIDTH - RIGHT) / 2
    svg.append(Markup('<text class="label middle" x="{}" y="{}">{}</text>').format(middle, HEIGHT - 5, x_label))
    svg += [*drawn, Markup("</svg>")]
    legend = [
        Markup('<li><svg viewBox="0 0 14 14" class="key"><path class="mark ink {}" d="{}"/></svg>{}</li>').format(
            "full" if shape.startswith("full ") else "hollow", _shape(shape.split()[-1], 7, 7), label
        )
        if slot < 0
        else Markup('<li><i class="swatch {}"></i>{}</li>').format(_slot(slot), label)
        for label, slot, shape in named
    ]
    head = Markup("<figcaption>{} <small>{}</small></figcaption>").format(title, y_label)
    foot = Markup('<ul class="legend">{}</ul>').format(Markup("").join(legend)) if legend else Markup("")
    return Markup("<figure>{}{}{}</figure>").format(head, Markup("").join(svg), foot)


def join(figures: Sequence[Markup | None]) -> Markup:
    """Figures side by side, as many as fit."""
    shown = [figure for figure in figures if figure is not None]
    return Markup('<div class="charts">{}</div>').format(Markup("").join(shown)) if shown else escape("")
