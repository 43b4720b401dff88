"""Problem sets: read from JSON Lines, and dealt out step by step as a pure function of (seed, step).

Not here: the tiny world's problems (build.py asks its generator), and how a problem becomes a prompt (chat.py).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpd_jax.types import Problem, UserError

FIELDS = ("id", "question", "answer", "response")


@dataclass(frozen=True)
class ProblemsConfig:
    """The `problems` section.

    train, heldout:  "tiny" for the embedded generator, or the path of a JSON Lines file.
    columns:         which column of the file holds id, question, answer (the reference) and response (a worked
                     solution); a field that is not named is read from the column of its own name, if there is one.
    heldout_columns: the same for the held-out file, where it differs.
    """

    train: str = "tiny"
    heldout: str = "tiny"
    columns: Mapping[str, str] | None = None
    heldout_columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for key in ("columns", "heldout_columns"):
            for field in getattr(self, key) or {}:
                if field not in FIELDS:
                    raise UserError(f"problems.{key}.{field}: no such field; name columns for {', '.join(FIELDS)}")


@dataclass(frozen=True)
class ProblemSet:
    """Problems in the order of training: a fresh permutation an epoch, `batch_size` of them a step."""

    problems: tuple[Problem, ...]
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.problems):
            raise UserError(
                f"train.batch_size: {self.batch_size} problems a step, but the problem set holds {len(self.problems)}; "
                "a step takes different problems, so lower train.batch_size or give more problems"
            )

    def at(self, step: int) -> tuple[Problem, ...]:
        """The problems of a step, all different. Every problem comes up once an epoch, whatever the batch size."""
        size, first = len(self.problems), step * self.batch_size
        chosen: list[int] = []
        while len(chosen) < self.batch_size:
            epoch, start = divmod(first + len(chosen), size)
            chosen.extend(self._order(epoch)[start : start + self.batch_size - len(chosen)].tolist())
        return tuple(self.problems[i] for i in chosen)

    def _order(self, epoch: int) -> np.ndarray:
        """An epoch's permutation; if it begins inside a step, that step's problems of the last epoch come later."""
        # Only the first batch_size places are rearranged, so an epoch of two steps or more has its tail untouched, and
        # the epoch before it need not be worked out; a shorter one is followed from an epoch that began with a step.
        short = len(self.problems) < 2 * self.batch_size
        first = epoch - 1 if self._shared(epoch) else epoch
        while short and self._shared(first):
            first -= 1
        order = self._shuffled(max(first, 0))
        for following in range(max(first, 0) + 1, epoch + 1):
            order = self._without(self._shuffled(following), order[-self._shared(following) :])
        return order

    def _shared(self, epoch: int) -> int:
        """How many problems of the epoch before stand in the step in which this one begins."""
        return epoch * len(self.problems) % self.batch_size

    def _without(self, order: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """`order` with those of its first batch_size places that are in `taken` moved behind the others of them."""
        head, rest = order[: self.batch_size], order[self.batch_size :]
        again = np.isin(head, taken)
        return np.concatenate([head[~again], head[again], rest])

    def _shuffled(self, epoch: int) -> np.ndarray:
        # Raw Philox words are the same in every numpy; the shuffling methods of its generators are not promised to be.
        words = np.random.Philox(key=[self.seed & (2**64 - 1), epoch]).random_raw(len(self.problems))
        return np.argsort(words, kind="stable")


def read(config: ProblemsConfig, split: Literal["train", "heldout"]) -> tuple[Problem, ...]:
    """The problems of a split that is a file."""
    if split == "train" or config.heldout_columns is None:
        return read_jsonl(getattr(config, split), config.columns)
    return read_jsonl(config.heldout, config.heldout_columns, "heldout_columns")


def read_jsonl(path: str | Path, columns: Mapping[str, str] | None = None, key: str = "columns") -> tuple[Problem, ...]:
    """The problems of a JSON Lines file. UserError names file, line and column of what cannot be read.

    key: the setting under `problems` that names the columns. A line with "dropped": true is left out: its rewrite was
    given up (`mpd-jax rewrite`).
    """
    path, named = Path(path), dict(columns or {})
    if not path.is_file():
        raise UserError(f"problems: {path}: no such file; give the path of a JSON Lines file, or tiny")
    problems: dict[str, Problem] = {}
    lines: dict[str, int] = {}
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"problems: {path}: not UTF-8 at byte {error.start}; store the file as UTF-8") from None
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        where = f"problems: {path}, line {number}"
        row = _row(text, where)
        if row.get("dropped") is True:
            continue
        problem = _problem(row, named, where, f"{path.stem}:{number}", key)
        if problem.id in problems:
            column = named.get("id", "id")
            raise UserError(f"{where}, column {column!r}: {problem.id!r} stands in line {lines[problem.id]} too")
        problems[problem.id], lines[problem.id] = problem, number
    if not problems:
        raise UserError(f"problems: {path}: the file holds no problems; write one JSON object a line")
    return tuple(problems.values())


def _row(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, character {error.colno}: not JSON ({error.msg}); write one object a line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({error}); write one plain object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__}, not an object; write one object a line")
    return row


def _problem(row: dict[str, Any], named: Mapping[str, str], where: str, default_id: str, key: str) -> Problem:
    found: dict[str, str] = {}
    for field in FIELDS:
        column = named.get(field, field)
        if column not in row:
            if field in named or field == "question":
                raise UserError(
                    f"{where}: no column {column!r}; it has {', '.join(map(repr, row))}: set problems.{key}.{field}"
                )
            continue
        value = row[column]
        if value is None and field != "question":
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            kind = type(value).__name__
            raise UserError(
                f"{where}, column {column!r}: {kind}, not text; set problems.{key}.{field} to a text column"
            )
        found[field] = str(value)
        if re.search("[\ud800-\udfff]", found[field]):
            raise UserError(f"{where}, column {column!r}: half a surrogate pair is no text; take it out")
    if not found["question"].strip():
        raise UserError(f"{where}, column {named.get('question', 'question')!r}: empty; every problem needs a question")
    return Problem(**{"id": default_id, **found})


def refuse_overlap(train: Iterable[Problem], heldout: Iterable[Problem]) -> None:
    """Refuses held-out problems that are trained on; questions are compared without regard to spacing."""
    questions = {" ".join(problem.question.split()): problem.id for problem in train}
    shared = [(p.id, questions[q]) for p in heldout if (q := " ".join(p.question.split())) in questions]
    if shared:
        heldout_id, train_id = shared[0]
        raise UserError(
            f"problems.heldout: {len(shared)} problems are in problems.train too (the first: {heldout_id!r}, there "
            f"{train_id!r}); remove them from one of the files"
        )
