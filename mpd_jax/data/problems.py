"""The `problems` section: which sets are read, how, and which of their problems are left out.

Not here: the readers (sources.py), what columns mean (rows.py), the sets that have a name (catalog.py), the order of
training (order.py), the tiny world's problems (build.py asks its generator), how one becomes a prompt (chat.py).
"""

import math
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from mpd_jax import files
from mpd_jax.data import rows, sources
from mpd_jax.data.catalog import READY, of_ready, split_of
from mpd_jax.data.kept import Kept
from mpd_jax.data.rows import FIELDS
from mpd_jax.data.store import Problems, content_of, contents
from mpd_jax.files import AnyPath
from mpd_jax.types import Problem, UserError

Split = Literal["train", "heldout"]
Say = Callable[[str], None]
SAY_EVERY_S = 5.0
GIVEN_UP = "given up by a rewrite"
Found = Iterator[tuple[str, Problem | None]]  # with its place for messages; None is one that a rewrite gave up


@dataclass(frozen=True)
class Source:
    """One set that `problems.train` and `problems.heldout` can name.

    read:     a ready name (openmathinstruct2, math500, ...); a .jsonl, .parquet or .csv file or a directory of them,
              here or at gs://; hf:owner/name or hf:directory; tfds:name, tfds:name/config or tfds:name:1.0.0.
    split:    of a set that has several.
    subset:   of a hf: set that has several (its "config").
    revision: the commit of a hf: set.
    columns:  which column holds a field of a problem (see ProblemsConfig).
    repeats:  drop leaves out what asks the same as a row before it; keep is for sets with several solutions a question.
    content:  what the content hash has to be, as the run says it when it has read the set.
    part:     [from, to] of 0 to 1: those problems whose questions' hashes fall there. What is asked twice is in one
              part: [0, 0.8] to train on and [0.8, 1] to hold out share no question.
    weight:   its share of a step, against the others of a list.
    """

    read: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] | None = None
    repeats: Literal["keep", "drop"] | None = None
    content: str | None = None
    part: tuple[float, float] = (0.0, 1.0)
    weight: float = 1.0


@dataclass(frozen=True)
class ProblemsConfig:
    """The `problems` section.

    train, heldout:  "tiny" for the embedded generator, the name of one of `sources`, or what a source reads, such as a
                     ready name or a path. A list for train mixes them by weight.
    columns:         which column of the file holds id, question (text, or chat messages), answer (the reference),
                     response (a worked solution), level and subject; a field that is not named is read from the column
                     of its own name, if there is one, and a question from `messages` too.
    heldout_columns: the same for the held-out file, where it differs.
    sources:         sets that need more than a name.
    directory:       where files of ready names are looked for, each set in a directory of its name.
    tfds:            the data_dir of tensorflow-datasets, unless its own default.
    lengths:         [least, most] characters of a field, such as {question: [1, 4000]}; problems to train on beyond it
                     are left out.
    kept:            the index that `mpd-jax dedup` wrote; near-duplicates that it found are left out of train.
    """

    train: str | tuple[str, ...] = "tiny"
    heldout: str = "tiny"
    columns: Mapping[str, str] | None = None
    heldout_columns: Mapping[str, str] | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    directory: str = "data"
    tfds: str | None = None
    lengths: Mapping[str, tuple[int, int]] | None = None
    kept: str | None = None

    def __post_init__(self) -> None:
        mapped = {"columns": self.columns, "heldout_columns": self.heldout_columns, "lengths": self.lengths}
        mapped |= {f"sources.{name}.columns": source.columns for name, source in self.sources.items()}
        for key, named in mapped.items():
            for known in named or {}:
                if known not in FIELDS:
                    raise UserError(f"problems.{key}.{known}: no such field; name columns for {', '.join(FIELDS)}")
        for name, (least, most) in (self.lengths or {}).items():
            if not 0 <= least <= most:
                raise UserError(f"problems.lengths.{name}: [{least}, {most}] holds nothing; give [least, most]")
        if not self.train or (isinstance(self.train, tuple) and len(set(self.train)) < len(self.train)):
            raise UserError(f"problems.train: {self.train!r} is not allowed; give a set, or a list of different ones")
        for name in self.train if isinstance(self.train, tuple) else ():
            if name != "tiny" and name not in {*self.sources, *READY}:
                raise UserError(
                    f"problems.train: {name!r} in a list needs a name, for its problems' ids begin with it; write "
                    f"problems.sources.<name>.read={name} and list that name"
                )
        for name, source in self.sources.items():
            _check(source, f"problems.sources.{name}")

    def described(self, split: Split) -> list[Any]:
        """Whatever decides what the problems of a split are."""
        chosen = [asdict(self.sources[name]) for name in self.names(split) if name in self.sources]
        other = split == "heldout" and self.heldout_columns is not None
        return [getattr(self, split), self.heldout_columns if other else self.columns, *chosen]

    def names(self, split: Split) -> tuple[str, ...]:
        """The sets of a split."""
        chosen = getattr(self, split)
        return (chosen,) if isinstance(chosen, str) else chosen

    def source(self, name: str, split: Split) -> tuple[Source, str]:
        """What a name in `train` or `heldout` reads, and the setting that names its columns."""
        if name in self.sources:
            return self.sources[name], f"problems.sources.{name}.columns"
        other = split == "heldout" and self.heldout_columns is not None
        columns, key = (self.heldout_columns, "heldout_columns") if other else (self.columns, "columns")
        return Source(name, columns=None if name in READY else columns), f"problems.{key}"


def _check(source: Source, key: str) -> None:
    """What would have no effect is refused."""
    hub, several = source.read.startswith(sources.HUB), source.read.startswith((sources.HUB, sources.TFDS))
    for name, allowed, where in (
        ("subset", hub, "a hf: set"),
        ("revision", hub, "a hf: set; what has a ready name is pinned already"),
        ("split", several or source.read in READY, "a hf: or tfds: set, or one with a ready name"),
        ("columns", source.read not in READY, "what has no ready name"),
    ):
        if getattr(source, name) is not None and not allowed:
            raise UserError(f"{key}.{name}: {getattr(source, name)!r} is for {where}, and not for {source.read}")
    if not 0 <= source.part[0] < source.part[1] <= 1:
        raise UserError(f"{key}.part: {list(source.part)} is not allowed; give [from, to] within 0 and 1")
    if not (source.weight > 0 and math.isfinite(source.weight)):
        raise UserError(f"{key}.weight: {source.weight} is not allowed; give more than 0, or leave the source out")


def read(config: ProblemsConfig, split: Split, tiny: Callable[[], Sequence[Problem]], say: Say) -> Problems:
    """The problems of a split; `report` tells what was left out. tiny: makes those of the tiny world."""
    into, names = Problems(), config.names(split)
    for name in names:
        source, key = config.source(name, split)

        def found(source: Source = source, key: str = key) -> Found:
            if source.read == "tiny":
                return ((problem.id, problem) for problem in tiny())
            return _read_rows(source, key, split, config)

        prefix = f"{name}:" if len(names) > 1 else ""  # ids of one source may be those of another
        title = f"problems.{split}: {source.read}"
        told = _add(into, found, _leaving_out(config, source, split), title, prefix, say)
        part = into.end_part(name, source.weight)
        if part.size == 0:
            raise UserError(f"problems: {source.read}: it holds no problems{told}")
        if source.content not in (None, part.content):
            raise UserError(
                f"problems.sources.{name}.content: it is {part.content} and not {source.content}: other questions or "
                f"answers than were pinned; read the ones you had, or set content={part.content}"
            )
        into.report.append(f"{title}: {part.size:,} problems, content {part.content}{told}")
    return into


def read_file(path: str | AnyPath, columns: Mapping[str, str] | None = None) -> Problems:
    """The problems of a file, all of them. UserError names file, line and column of what cannot be read."""
    return read(ProblemsConfig(train=str(path), columns=columns), "train", tuple, lambda message: None)


def _add(
    into: Problems,
    found: Callable[[], Found],
    why_not: Callable[[Problem], str | None],
    title: str,
    prefix: str,
    say: Say,
) -> str:
    """Adds what is found and not left out. Returns what was, to be told."""
    left: dict[str, list[Any]] = {}  # why, how many, and the first of them
    ids, said = array("q"), time.monotonic()
    for count, (place, problem) in enumerate(found(), start=1):
        why = GIVEN_UP if problem is None else why_not(problem)
        if problem is None or why is not None:
            left.setdefault(why or "", [0, problem.id if problem else place])[0] += 1
        else:
            ids.append(hash(problem.id))
            into.add(replace(problem, id=prefix + problem.id) if prefix else problem)
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            say(f"{title}: {count:,} rows read")
    if len(np.unique(np.frombuffer(ids, np.int64))) < len(ids):
        _refuse_equal_ids(found())
    return "".join(f"; left out {n:,} {why} (the first: {first})" for why, (n, first) in left.items())


def _refuse_equal_ids(found: Found) -> None:
    """Tells where: they are looked for again, for the places of a million problems would fill the memory."""
    places: dict[str, str] = {}
    for place, problem in found:
        if problem is not None and places.setdefault(problem.id, place) != place:
            raise UserError(f"{place}: id {problem.id!r} stands in {places[problem.id].rsplit(', ', 1)[-1]} too")


def _leaving_out(config: ProblemsConfig, source: Source, split: Split) -> Callable[[Problem], str | None]:
    """Says of a problem why it is left out, if it is. What is held out has no filters, for the results of a benchmark
    are over all its problems."""
    lengths = dict(config.lengths or {}) if split == "train" else {}
    kept = Kept.read(config.kept) if config.kept and split == "train" else None
    drops = (source.repeats or (READY[source.read].repeats if source.read in READY else "keep")) == "drop"
    first, last = (int(bound * 2**64) for bound in source.part)
    whole, seen = source.part == (0, 1), set[int]()

    def why(problem: Problem) -> str | None:
        for name, (least, most) in lengths.items():
            text = getattr(problem, name)
            if text is not None and not least <= len(text) <= most:
                return f"with {name} {'under' if len(text) < least else 'over'} the {least} to {most} characters"
        if whole and not drops and kept is None:
            return None
        content = content_of(problem.question)
        if not first <= content < last:
            return "of the other part"
        if drops:
            if content in seen:
                return "asking the same as one before"
            seen.add(content)
        return kept.why_not(content, problem.id) if kept else None

    return why


def _read_rows(source: Source, key: str, split: Split, config: ProblemsConfig) -> Found:
    what, named = source.read, dict(source.columns or {})
    if what in READY:
        part = split_of(what, source.split, split)
        name = f"{what}_{part}" if len(READY[what].splits) > 1 else what
        found = of_ready(what, part, config.directory)
    elif what.startswith(sources.HUB):
        name = what.removeprefix(sources.HUB)
        found = sources.of_hub(name, source.subset, source.revision, source.split, named)
        name = name.rstrip("/").rsplit("/", 1)[-1]
    elif what.startswith(sources.TFDS):
        name = what.removeprefix(sources.TFDS)
        found = sources.of_tfds(name, source.split, config.tfds)
        name = name.split("/")[0].split(":")[0]
    else:
        paths, name = sources.listed(what), files.path(what).stem
        if not paths:
            raise UserError(
                f"problems: {what}: no such file; give the path of a file or a directory of .jsonl, .parquet or .csv, "
                f"hf:owner/name, tfds:name, tiny, or one of {', '.join(READY)}"
            )
        found = sources.of_files(paths, named)
    for number, place, row in found:
        given_up = row.get(rows.DROPPED) is True
        yield place, None if given_up else rows.problem(row, named, place, f"{name}:{number}", key)


def refuse_overlap(train: Sequence[Problem], heldout: Sequence[Problem]) -> None:
    """Refuses held-out problems that are trained on; questions are compared without regard to spacing."""
    shared = np.flatnonzero(np.isin(contents(heldout), contents(train)))
    if len(shared):
        first = heldout[int(shared[0])]
        twin = train[int(np.flatnonzero(contents(train) == contents(heldout)[shared[0]])[0])]
        raise UserError(
            f"problems.heldout: {len(shared)} problems are in problems.train too (the first: {first.id!r}, there "
            f"{twin.id!r}); remove them from one of the files, or let `mpd-jax dedup` find them"
        )
