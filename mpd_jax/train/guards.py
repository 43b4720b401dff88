"""Guards: bands on the figures of a step, and what leaving one means for the run.

What happens before step s is a function of the rows of steps up to s - 2, the last that are read without waiting for
the device, and of the state: a run that was stopped and goes on decides alike. Not here: how the loop carries it out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mpd_jax.types import UserError

Row = dict[str, Any]
Action = Literal["warn", "stop", "rollback"]
UNREAD = 2  # before step s the rows from step s - UNREAD + 1 on may be unread


class GuardStop(UserError):
    """A run that left a band and was told to stop."""


@dataclass(frozen=True)
class Band:
    """Where a figure has to stay, bounds included; null is no bound.

    action: "warn" says so once an excursion; "stop" ends the run; "rollback" goes back to the last checkpoint from
    before the excursion, or to the start, and goes on with other draws at a lower learning rate.
    """

    action: Action
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.low, self.high) if bound is not None]
        if not bounds or not all(map(math.isfinite, bounds)) or bounds != sorted(bounds):
            raise UserError(
                f"low = {self.low}, high = {self.high} is not allowed; give one bound or both, low at most high, finite"
            )

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        """Both bounds, in words."""
        bounds = (
            f"low = {self.low:g}" if self.low is not None else "",
            f"high = {self.high:g}" if self.high is not None else "",
        )
        return ", ".join(filter(None, bounds))


@dataclass(frozen=True)
class GuardsConfig:
    """The `guards` section: bands on figures of metrics.jsonl, absent unless given.

    entropy:    student_entropy, nats a token. tokens: written_tokens, the mean length of what was written.
    divergence: nats a token. finished: the share of written trajectories that ended by themselves.
    patience:   steps in a row outside before the action; a step without the figure is passed over. While a band that
                stops or rolls back is left no checkpoint is written, but of the last step.
    learning_rate_factor: of every rollback; it stays for the rest of the run.
    max_rollbacks: after so many a rollback becomes a stop.
    """

    entropy: Band | None = None
    tokens: Band | None = None
    divergence: Band | None = None
    finished: Band | None = None
    patience: int = 1
    learning_rate_factor: float = 0.5
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("patience", self.patience >= 1, "1 or more"),
            ("learning_rate_factor", 0 < self.learning_rate_factor <= 1, "above 0 and at most 1"),
            ("max_rollbacks", self.max_rollbacks >= 1, "1 or more; to stop at once use action=stop"),
        ):
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)} is not allowed; it must be {allowed}")

    @property
    def bands(self) -> dict[str, Band]:
        """Those that are given."""
        named = {
            "entropy": self.entropy,
            "tokens": self.tokens,
            "divergence": self.divergence,
            "finished": self.finished,
        }
        return {name: band for name, band in named.items() if band is not None}

    @property
    def strict(self) -> dict[str, Band]:
        """Those that do more than warn."""
        return {name: band for name, band in self.bands.items() if band.action != "warn"}


def _finished(row: Row) -> float | None:
    ended = row.get("ended") or {}
    return 1 - ended.get("cut", 0) / sum(ended.values()) if ended else None


WRITTEN = ("tokens", "finished")  # figures of the text, which may be of older weights; all others are of the step's own
FIGURES: dict[str, Callable[[Row], float | None]] = {
    "entropy": lambda row: row.get("student_entropy"),
    "tokens": lambda row: row.get("written_tokens"),
    "divergence": lambda row: row.get("divergence"),
    "finished": _finished,
}


class Excursion(NamedTuple):
    """A figure outside its band: from step `first` on, `value` at step `last`, for `steps` steps that have it.

    origin: the updates done when the weights were made that the figure of the first of these steps is of.
    """

    name: str
    action: str
    value: float
    first: int
    last: int
    steps: int
    origin: int


def excursion(name: str, band: Band, rows: Sequence[Row], until: int) -> Excursion | None:
    """The one that is open after step `until`, of rows in the order of their steps."""
    outside: list[tuple[Row, float]] = []
    for row in reversed(rows):
        value = FIGURES[name](row) if row["step"] <= until else None
        if value is None:
            continue
        if band.holds(value):
            break
        outside.append((row, value))
    if not outside:
        return None
    (first, _), (last, value) = outside[-1], outside[0]
    behind = first.get("made_staleness", 0) if name in WRITTEN else 0
    return Excursion(name, band.action, value, first["step"], last["step"], len(outside), first["step"] - behind)


def tripped(config: GuardsConfig, rows: Sequence[Row], step: int) -> list[Excursion]:
    """The excursions that are answered before `step`, warnings first and the one that decides last."""
    until, found = step - UNREAD, []
    for name, band in config.bands.items():
        open_one = excursion(name, band, rows, until)
        if open_one is None or open_one.steps < config.patience:
            continue
        # A warning is said once: at the step that makes the excursion long enough.
        if band.action != "warn" or (open_one.steps == config.patience and open_one.last == until):
            found.append(open_one)
    order = ("warn", "rollback", "stop")
    return sorted(found, key=lambda one: (order.index(one.action), -one.origin))


def words(config: GuardsConfig, one: Excursion) -> str:
    since = f" since step {one.first}" if one.first != one.last else ""
    return f"guards.{one.name}: {one.value:.4g} at step {one.last}, outside {config.bands[one.name]}{since}"


def suspect(config: GuardsConfig, rows: Sequence[Row], step: int) -> bool:
    """Whether the state after `step` updates may be one that is left: rows up to step - 1 are there."""
    for name, band in config.strict.items():
        before = excursion(name, band, rows, step - UNREAD)
        if excursion(name, band, rows, step - 1) or (before is not None and before.steps >= config.patience):
            return True
    return False


class Answer(NamedTuple):
    """What becomes of a run that has left a band. left: steps whose checkpoints are none any more.

    good: the step to go on from (0: the start of the run), with this in its memory; None is a stop.
    """

    said: str
    left: list[int]
    good: int | None = None
    memory: dict[str, int | float] | None = None


def answer(
    config: GuardsConfig, one: Excursion, memory: Mapping[str, int | float], saved: Sequence[int], every: int
) -> Answer:
    """To an excursion of a run that has checkpoints of the steps `saved`; those that are due come `every` steps."""
    said = words(config, one)
    since, count = [step for step in saved if step >= one.origin], int(memory["rollbacks"])
    if one.first == 0:
        return Answer(f"{said}: the weights that the run starts from are outside; widen guards.{one.name}", since)
    if one.action == "stop" or count >= config.max_rollbacks:
        why, remedy = "", "Lower"
        if one.action == "rollback":
            why = f" after guards.max_rollbacks = {config.max_rollbacks} rollbacks"
            why += f"; learning_rate_scale = {memory['learning_rate_scale']:g} stays"
            remedy = "Raise guards.max_rollbacks, lower"
        last = max((step for step in saved if step < one.origin), default=0)
        remedy += f" train.learning_rate, or widen guards.{one.name}, and run the same command again"
        return Answer(f"{said}: stopped{why}. {remedy}: it goes on from step {last}, from before that", since)
    # Only to one that a run that was never stopped has, too.
    good = max((step for step in saved if step < one.origin and step % every == 0), default=0)
    scale = memory["learning_rate_scale"] * config.learning_rate_factor
    said = f"{said}: rollback {count + 1} to step {good}, from where on the learning rate is multiplied by {scale:g}"
    left = [step for step in saved if step > good]
    return Answer(said, left, good, {"rollbacks": count + 1, "learning_rate_scale": scale})
