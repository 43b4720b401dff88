"""Which problems a step takes: a pure function of (seed, step), of one source or of several by weight."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpd_jax.data.store import Part
from mpd_jax.types import Problem, UserError

LONGEST_CYCLE, CLOSE = 32, 0.01  # steps in which the shares of a mixture are whole; how near they are to the weights


@dataclass(frozen=True)
class Order:
    """A fresh permutation of `size` places an epoch, `batch_size` of them a step."""

    size: int
    seed: int
    batch_size: int

    def at(self, step: int) -> list[int]:
        """The places of a step, all different. Every place comes up once an epoch, whatever the batch size."""
        first = step * self.batch_size
        chosen: list[int] = []
        while len(chosen) < self.batch_size:
            epoch, start = divmod(first + len(chosen), self.size)
            chosen.extend(self._order(epoch)[start : start + self.batch_size - len(chosen)].tolist())
        return chosen

    @functools.lru_cache(maxsize=4)  # noqa: B019 - of a value; a permutation of ten millions takes seconds
    def _order(self, epoch: int) -> np.ndarray:
        """An epoch's permutation; if it begins inside a step, that step's problems of the last epoch come later."""
        # Only the first batch_size places are rearranged, so an epoch of two steps or more has its tail untouched, and
        # the epoch before it need not be worked out; a shorter one is followed from an epoch that began with a step.
        short = self.size < 2 * self.batch_size
        first = epoch - 1 if self._shared(epoch) else epoch
        while short and self._shared(first):
            first -= 1
        order = self._shuffled(max(first, 0))
        for following in range(max(first, 0) + 1, epoch + 1):
            order = self._without(self._shuffled(following), order[-self._shared(following) :])
        return order

    def _shared(self, epoch: int) -> int:
        """How many problems of the epoch before stand in the step in which this one begins."""
        return epoch * self.size % self.batch_size

    def _without(self, order: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """`order` with those of its first batch_size places that are in `taken` moved behind the others of them."""
        head, rest = order[: self.batch_size], order[self.batch_size :]
        again = np.isin(head, taken)
        return np.concatenate([head[~again], head[again], rest])

    def _shuffled(self, epoch: int) -> np.ndarray:
        # Raw Philox words are the same in every numpy; the shuffling methods of its generators are not promised to be.
        words = np.random.Philox(key=[self.seed & (2**64 - 1), epoch]).random_raw(self.size)
        return np.argsort(words, kind="stable").astype(np.uint32)


@dataclass(frozen=True)
class ProblemSet:
    """Problems in the order of training: a fresh permutation of each source an epoch, `batch_size` problems a step.

    Of several sources each gives its share of every step. Shares are whole numbers of a cycle of some steps: the
    shortest whose shares are within 1 % of the weights.
    """

    problems: Sequence[Problem]
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.problems):
            raise UserError(
                f"train.batch_size: {self.batch_size} problems a step, but the problem set holds {len(self.problems)}; "
                "a step takes different problems, so lower train.batch_size or give more problems"
            )
        _ = self._dealt  # a mixture that no step can hold is told now

    def at(self, step: int) -> tuple[Problem, ...]:
        """The problems of a step, all different. Every problem of a source comes up once in an epoch of that source."""
        cycle, orders, turns = self._dealt
        start = step % cycle * self.batch_size
        now, before = turns[start : start + self.batch_size], np.bincount(turns[:start], minlength=len(orders))
        taken = [iter(order.at(step // cycle)[skip:]) for (_, order), skip in zip(orders, before, strict=True)]
        return tuple(self.problems[orders[source][0] + next(taken[source])] for source in now)

    @property
    def shares(self) -> dict[str, float]:
        """What part of a step each source has, if there are several."""
        cycle, orders, _ = self._dealt
        parts = getattr(self.problems, "parts", [])
        return {p.name: o.batch_size / (cycle * self.batch_size) for p, (_, o) in zip(parts, orders, strict=False)}

    @functools.cached_property
    def _dealt(self) -> tuple[int, list[tuple[int, Order]], np.ndarray]:
        """Steps of a cycle; each source's first place and order; and whose turn it is, place by place in a cycle."""
        parts = getattr(self.problems, "parts", None) or [Part("", len(self.problems), 1.0, "")]
        cycle, shares = _shares(parts, self.batch_size)
        firsts = np.cumsum([0, *(part.size for part in parts)]).tolist()
        # The first source is dealt as if it were alone; those after it by seeds that no run is likely to have.
        seeds = [self.seed + number * 0x9E3779B97F4A7C15 for number in range(len(parts))]
        orders = [(a, Order(p.size, s, n)) for a, p, s, n in zip(firsts, parts, seeds, shares, strict=False)]
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in shares])
        source = np.repeat(np.arange(len(parts)), shares)
        return cycle, orders, source[np.argsort(due, kind="stable")]


def _shares(parts: Sequence[Part], batch_size: int) -> tuple[int, list[int]]:
    """Steps of a cycle, and how many problems of each source it takes."""
    weights = np.array([part.weight for part in parts]) / sum(part.weight for part in parts)
    best: tuple[float, int, list[int]] | None = None
    for cycle in range(1, LONGEST_CYCLE + 1):
        wanted = weights * cycle * batch_size
        shares = np.floor(wanted).astype(int)
        shares[np.argsort(shares - wanted, kind="stable")[: cycle * batch_size - shares.sum()]] += 1
        off = float(np.max(np.abs(shares / wanted - 1)))
        if all(1 <= n <= part.size for n, part in zip(shares, parts, strict=True)):
            if best is None or off < best[0]:
                best = off, cycle, shares.tolist()
            if off <= CLOSE:
                break
    if best is None:
        told = ", ".join(
            f"{p.name} {w:.2%} of the weight and {p.size} problems" for p, w in zip(parts, weights, strict=True)
        )
        raise UserError(
            f"problems.train: {told}: no steps of {batch_size} different problems (train.batch_size) hold such shares; "
            "change the weights (problems.sources.<name>.weight), leave a source out, or raise or lower the batch"
        )
    return best[1], best[2]
