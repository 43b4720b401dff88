"""Near-duplicates: training questions that hold an evaluation question, or nearly all of it.

A question is taken as words, numbers and signs of calculation, without regard to case, spacing, punctuation and the
marks of LaTeX; runs of `size` of them are its shingles. What is measured is the share of an evaluation question's
shingles that stand in the training question too, exactly, for the evaluation sets are small. An evaluation question of
fewer than `size` tokens is one shingle, and found only where nothing else is asked.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mpd_jax.types import Problem

TOKEN = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|[-+*/^=<>]")
MARKS = re.compile(r"\\(?:left|right|d?frac|text|mathrm|[,;!: ])|[${}]")
Shingle = tuple[str, ...]


class Near(NamedTuple):
    """The evaluation problem that a training problem is nearest to, and the share of it that stands there."""

    set: str
    id: str
    share: float


class Index:
    """The shingles of evaluation sets. sets: name -> problems."""

    def __init__(self, sets: Mapping[str, Sequence[Problem]], size: int):
        self._size = size
        self._problems: list[tuple[str, str, int]] = []  # set, id, how many shingles
        self._holders: dict[Shingle, list[int]] = {}
        for name, problems in sets.items():
            for problem in problems:
                found = shingles(problem.question, size)
                for shingle in found:
                    self._holders.setdefault(shingle, []).append(len(self._problems))
                self._problems.append((name, problem.id, len(found)))

    def nearest(self, question: str) -> Near | None:
        """None if no evaluation problem shares a shingle with the question."""
        counts: Counter[int] = Counter()
        for shingle in shingles(question, self._size):
            counts.update(self._holders.get(shingle, ()))
        shares = {at: count / self._problems[at][2] for at, count in counts.items()}
        if not shares:
            return None
        best = min(shares, key=lambda at: (-shares[at], at))
        return Near(*self._problems[best][:2], shares[best])


def shingles(text: str, size: int) -> set[Shingle]:
    tokens = TOKEN.findall(MARKS.sub(" ", text).lower())
    return {tuple(tokens[at : at + size]) for at in range(max(len(tokens) - size, 0) + 1)}
