"""Problems in order, on disk: a million of them take tens of megabytes of memory, and each is made when asked for.

Not here: what is read into it (sources.py, rows.py).
"""

import hashlib
import heapq
import operator
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from mpd_jax.data.rows import FIELDS
from mpd_jax.types import Problem, UserError

NONE = 2**32 - 1  # a length that says: there is no such text
QUESTION = FIELDS.index("question")
ANSWER = FIELDS.index("answer")
BLOCK = 2**24  # bytes that are read at a time
TEXTS = operator.attrgetter(*FIELDS)


def content_of(question: str) -> int:
    """What a question is known by, whatever its spacing: 64 bits."""
    return int.from_bytes(hashlib.blake2b(" ".join(question.split()).encode(), digest_size=8).digest())


class Part(NamedTuple):
    name: str
    size: int
    weight: float
    content: str  # a hash of all questions and answers, whatever they were read from and are called


class Problems(Sequence[Problem]):
    """Problems in the order in which they were added. Their texts lie in a file without a name, which the system takes
    back when the process ends, however it ends.

    parts: how many there are of each source and with which weight, in order. report: what was read, and what was left
    out and why, a line a source.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.report: list[str] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the problems are used
        weakref.finalize(self, self._file.close)
        self._offsets, self._lengths, self._contents = array("q", [0]), array("I"), array("Q")
        self._answers = hashlib.blake2b(digest_size=8)

    def add(self, problem: Problem) -> None:
        stored = [None if text is None else text.encode() for text in TEXTS(problem)]
        self._lengths.extend([NONE if data is None else len(data) for data in stored])
        try:
            self._offsets.append(self._offsets[-1] + self._file.write(b"".join(filter(None, stored))))
        except OSError as error:
            raise _no_room(error) from error
        self._contents.append(content_of(problem.question))
        answer = stored[ANSWER]
        self._answers.update(b"\0" if answer is None else b"\1%d:" % len(answer) + answer)

    def end_part(self, name: str, weight: float) -> Part:
        """What was added since the last part ended is a part, and can be read."""
        try:
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from error
        first = sum(part.size for part in self.parts)
        self._answers.update(self.contents[first:].tobytes())
        self.parts.append(Part(name, len(self) - first, weight, self._answers.hexdigest()))
        self._answers = hashlib.blake2b(digest_size=8)
        return self.parts[-1]

    @property
    def digest(self) -> str:
        """A hash of the parts and of all that the problems hold."""
        found = hashlib.blake2b(repr(self.parts).encode() + self._lengths.tobytes(), digest_size=8)
        for start in range(0, self._offsets[-1], BLOCK):
            found.update(os.pread(self._file.fileno(), BLOCK, start))
        return found.hexdigest()

    @property
    def contents(self) -> np.ndarray:
        """`content_of` each question, in order."""
        return np.frombuffer(self._contents, np.uint64)

    def longest(self, count: int) -> list[Problem]:
        """Those with the longest questions, in bytes."""
        sizes = np.frombuffer(self._lengths, np.uint32).reshape(-1, len(FIELDS))[:, QUESTION]
        return [self[int(at)] for at in np.argsort(sizes, kind="stable")[::-1][:count]]

    def __len__(self) -> int:
        return len(self._contents)

    @overload
    def __getitem__(self, at: int) -> Problem: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Problem, ...]: ...
    def __getitem__(self, at: int | slice) -> Problem | tuple[Problem, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        first, last = self._offsets[at], self._offsets[at + 1]
        return self._made(os.pread(self._file.fileno(), last - first, first), at)

    def __iter__(self) -> Iterator[Problem]:
        block = 4096  # of problems, that are read at a time
        for first in range(0, len(self), block):
            last, start = min(first + block, len(self)), self._offsets[first]
            data = os.pread(self._file.fileno(), self._offsets[last] - start, start)
            for at in range(first, last):
                yield self._made(data[self._offsets[at] - start : self._offsets[at + 1] - start], at)

    def _made(self, data: bytes, at: int) -> Problem:
        texts, start = [], 0
        for length in self._lengths[at * len(FIELDS) : (at + 1) * len(FIELDS)]:
            size = 0 if length == NONE else length
            texts.append(None if length == NONE else data[start : start + size].decode())
            start += size
        return Problem(**dict(zip(FIELDS, texts, strict=True)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment] - as a list has none


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"problems: their texts could not be written to the temporary directory {tempfile.gettempdir()} "
        f"({error.strerror}); free space there, or name another by TMPDIR"
    )


def contents(problems: Sequence[Problem]) -> np.ndarray:
    """`content_of` each question, in order."""
    if isinstance(problems, Problems):
        return problems.contents
    return np.array([content_of(problem.question) for problem in problems], np.uint64)


def longest(problems: Sequence[Problem], count: int) -> Sequence[Problem]:
    """Those with the longest questions."""
    if isinstance(problems, Problems):
        return problems.longest(count)
    return heapq.nlargest(count, problems, key=lambda problem: len(problem.question))
