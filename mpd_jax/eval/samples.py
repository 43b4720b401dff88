"""Graded samples: a line of a per-sample file each, read, written whole, or appended while an evaluation goes on.

A file of before lacks the fields that have defaults here; what they would say is unknown then.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from mpd_jax import files, trees
from mpd_jax.files import AnyPath, write_atomically
from mpd_jax.types import UserError

UNASKED = "unasked"  # `ended` of a problem whose prompt has no room in the model's window; it counts as wrong
Key = tuple[float, str, int]  # temperature, problem id, attempt: one sample of an evaluation


@dataclass(frozen=True)
class Sample:
    """One graded response; a line of the per-sample file. `answer` is the text after the thinking span, "" if it never
    closed. reasoning_tokens is None where the model does not think in a span of its own.

    marks: by the mark of an answer that is there, "boxed" or "answer_line", whether what it holds is right.
    """

    name: str
    context: str
    temperature: float
    problem_id: str
    attempt: int
    reference: str
    response_ids: tuple[int, ...]
    text: str
    answer: str
    tokens: float
    reasoning_tokens: float | None
    max_tokens: int
    ended: str
    extracted: str | None
    correct: bool
    grader: str
    failure: str | None
    marks: Mapping[str, bool] | None = None
    problem_set: str = ""
    level: str | None = None
    subject: str | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    @property
    def key(self) -> Key:
        return self.temperature, self.problem_id, self.attempt


REQUIRED = {f.name for f in fields(Sample) if f.default is MISSING}
KNOWN = {f.name for f in fields(Sample)}


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample), separators=(",", ":"), ensure_ascii=False)


def write_samples(path: AnyPath, samples: Iterable[Sample]) -> None:
    """One sample a line; the file appears whole or not at all."""
    write_atomically(path, "".join(f"{_line(s)}\n" for s in samples))


def read_samples(path: AnyPath) -> list[Sample]:
    """The samples of a per-sample file."""
    data = files.read(path)
    if data is None:
        raise UserError(f"samples {path}: no such file; give a per-sample file that an evaluation wrote")
    return _parsed(path, data)


def _parsed(path: AnyPath, data: bytes) -> list[Sample]:
    samples, lines = [], data.split(b"\n")
    # Split at line feeds only: a response may hold other characters that Python counts as line ends.
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = dict(json.loads(line))
            wrong = (REQUIRED - set(values)) | (set(values) - KNOWN)
            if not wrong:
                samples.append(Sample(**{**values, "response_ids": tuple(values["response_ids"])}))
        except (ValueError, TypeError):
            remedy = "remove the file to evaluate again"
            if number == len(lines):  # it has no end
                remedy = "wait for the evaluation that writes it, or go on with it"
            raise UserError(f"samples {path}: line {number} is not a JSON object; {remedy}") from None
        if wrong:
            raise UserError(f"samples {path}: line {number}: fields {sorted(wrong)} are missing or unknown")
    return samples


class Growing:
    """A per-sample file that an evaluation adds to. samples: those that were there, each of them whole."""

    def __init__(self, path: AnyPath, samples: list[Sample], lines: files.Lines, made_with: Mapping[str, Any]):
        self.samples = samples
        self._path, self._lines, self._made_with = path, lines, made_with

    def add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._lines.add(_line(sample))
        self._lines.flush()

    def sum_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes beside it what its samples come to."""
        content = {"settings": self._made_with, "rows": rows}
        write_atomically(self._path.with_suffix(".json"), json.dumps(content, indent=2) + "\n")


@contextmanager
def growing(path: AnyPath, made_with: Mapping[str, Any]) -> Iterator[Growing]:
    """The file at `path`, to go on with: a line that a kill cut short is taken off it.

    made_with: whatever the samples depend on, as plain values. It is kept beside the file, with the suffix .json, as
    `settings`; UserError where the samples that are there were made with others.
    """
    head, made_with = path.with_suffix(".json"), json.loads(json.dumps(made_with))
    data = files.read(path) or b""
    whole = data[: data.rfind(b"\n") + 1]
    samples = _parsed(path, whole)
    changed = trees.apart(made_with, settings_of(path))
    if samples and changed:
        raise UserError(
            f"--out: {path} holds samples made with other settings ({changed}); choose another directory, "
            "or restore these values to go on"
        )
    if changed:
        write_atomically(head, json.dumps({"settings": made_with}, indent=2) + "\n")
    if len(whole) < len(data) and isinstance(path, pathlib.Path):  # in a bucket an object is whole
        os.truncate(path, len(whole))
    with closing(files.Lines(path)) as lines:
        yield Growing(path, samples, lines, made_with)


def settings_of(path: AnyPath) -> dict[str, Any]:
    """What the samples of a file were made with, as far as the file beside it says; nothing if it is damaged."""
    try:
        head = json.loads(files.read(path.with_suffix(".json")) or b"")
    except ValueError:
        return {}
    settings = head.get("settings") if isinstance(head, dict) else None
    return settings if isinstance(settings, dict) else {}
