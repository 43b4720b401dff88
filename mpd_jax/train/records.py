"""A step's trajectories on disk, before the update that uses them; a resumed run reads them back instead of sampling.

One JSON Lines file a step, compressed by gzip: a head line (step, seed, stage), then one trajectory a line. Round trips
are exact: ids are integers and Python writes floats so that they read back as the same bits. Files appear whole or not
at all. Earlier versions left them uncompressed, and those are read too.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from typing import Any

from mpd_jax import files, hosts
from mpd_jax.files import AnyPath
from mpd_jax.types import Problem, Trajectory, UserError

SUFFIXES = (".jsonl.gz", ".jsonl")  # as they are written; as earlier versions did
GZIP = b"\x1f\x8b"
LEVEL = 1  # of ids and log-probabilities as text; level 9 saves a tenth more, in thirteen times the time
FIRST = 8  # steps that no cap removes: they tell what the student was like


def to_json(trajectory: Trajectory) -> str:
    return json.dumps(_fields(trajectory), separators=(",", ":"))


def _fields(trajectory: Trajectory) -> dict[str, Any]:
    original = trajectory.original
    fields = {name: value for name, value in vars(trajectory).items() if name != "target"}
    return {**fields, "original": _fields(original) if original else None}


def from_json(line: str) -> Trajectory:
    return _trajectory(json.loads(line))


def _trajectory(fields: dict[str, Any]) -> Trajectory:
    original = fields["original"]
    tuples = {name: tuple(fields[name]) for name in ("prompt", "response", "logprobs")}
    tuples["rewriting"] = tuple(fields.get("rewriting", (0, 0)))  # not in the records of earlier versions
    return Trajectory(**{**fields, **tuples, "original": _trajectory(original) if original else None})


def text_of(data: bytes) -> str:
    """The lines of a file of `Records`, compressed or not; ValueError if it is damaged."""
    try:
        return (gzip.decompress(data) if data.startswith(GZIP) else data).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged: {error}") from error


def read_trajectories(path: AnyPath) -> tuple[dict[str, Any], list[Trajectory]]:
    """Head and trajectories of a file of `Records`, whatever the run; ValueError if it is damaged or absent."""
    head, _, trajectories = _parts(files.read(path) or b"")
    return head, trajectories


def _parts(data: bytes) -> tuple[dict[str, Any], list[str], list[Trajectory]]:
    try:
        first, *lines = text_of(data).splitlines()
        head, trajectories = json.loads(first), [from_json(line) for line in lines]
        whole = head["count"] == len(trajectories)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"damaged: {error}") from error
    if not whole:
        raise ValueError("damaged: a part is lost")
    return head, lines, trajectories


class Records:
    """Files `trajectories/step_000012.jsonl.gz` of a run; what was written is kept until its rewrite is there.

    `settings` stands for whatever else the trajectories depend on; those made under other settings are made again.
    keep: of how many steps, the newest, they stay beside those of the first; None: of all.
    """

    def __init__(self, run_dir: AnyPath, seed: int, settings: str = "", keep: int | None = None):
        self.directory = run_dir / "trajectories"
        self._keep = keep
        self._seed = seed
        self._settings = settings
        # Of final files, by step and problem; kept once the latest of a problem are asked for.
        self._lines_of: dict[int, dict[str, list[int]]] | None = None
        self._removed: int | None = None  # until which step the cap was seen to, by this process

    def path(self, step: int, stage: str = "final") -> AnyPath:
        return self._paths(step, stage)[0]

    def _paths(self, step: int, stage: str) -> list[AnyPath]:
        """Where the trajectories are written, and where an earlier version may have left them."""
        name = f"step_{step:06d}" + ("" if stage == "final" else f".{stage}")
        return [self.directory / f"{name}{suffix}" for suffix in SUFFIXES]

    def _read(self, step: int, stage: str) -> bytes | None:
        found = (files.read(path) for path in self._paths(step, stage))
        return next((data for data in found if data is not None), None)

    def _remove(self, step: int, stage: str) -> None:
        for path in self._paths(step, stage):
            files.remove(path)

    def save(self, step: int, trajectories: Sequence[Trajectory], stage: str = "final", rollbacks: int = 0) -> None:
        made = {"step": step, "stage": stage, "seed": self._seed, "settings": self._settings, "rollbacks": rollbacks}
        head = json.dumps({**made, "count": len(trajectories)})
        text = "\n".join([head, *map(to_json, trajectories)]) + "\n"
        if hosts.is_main():
            files.write_atomically(self.path(step, stage), gzip.compress(text.encode(), LEVEL, mtime=0))
        if stage == "final":
            self._remove(step, "written")
            if self._keep is not None:
                self._remove_until(step - self._keep)
            if self._lines_of is not None:
                self._lines_of[step] = _by_problem(trajectories)

    def _remove_until(self, last: int) -> None:
        """Of the steps until `last` only the first stay. At first that means all that earlier starts have left."""
        if not hosts.is_main():
            return
        there = self._there() if self._removed is None else range(self._removed + 1, last + 1)
        for step in there:
            if FIRST <= step <= last:
                self._remove(step, "final")
        self._removed = last

    def _there(self) -> set[int]:
        """Steps that have a file."""
        return {_step_of(path) for path in self.directory.glob("step_*.jsonl*")}

    def forget_after(self, step: int) -> None:
        """Removes the trajectories of later steps: they were sampled from weights that the run will not have."""
        for path in list(self.directory.glob("step_*.jsonl*")) if hosts.is_main() else ():
            if _step_of(path) > step:
                files.remove(path)
        if self._lines_of is not None:
            self._lines_of = {number: lines for number, lines in self._lines_of.items() if number <= step}

    def load(
        self, step: int, problems: Sequence[Problem], stage: str = "final", rollbacks: int = 0
    ) -> list[Trajectory] | None:
        """The trajectories of a step, or None when it has none on disk that were made after as many rollbacks. Those of
        another run are refused.

        Process 0 reads them, and tells the others.
        """
        lines = hosts.from_main(lambda: self._lines(step, problems, stage, rollbacks))
        return None if lines is None else [from_json(line) for line in lines]

    def latest(self, step: int, problems: Sequence[Problem], within: int) -> list[Trajectory]:
        """Of each problem the trajectories of the last step that held it, among the `within` steps before this one.

        Process 0 reads them, and tells the others.
        """
        lines = hosts.from_main(lambda: self._latest(step, {problem.id for problem in problems}, within))
        return [from_json(line) for line in lines]

    def _latest(self, step: int, wanted: set[str], within: int) -> list[str]:
        found, first = [], max(step - within, 0)
        known = self._lines_of = {n: lines for n, lines in (self._lines_of or {}).items() if n >= first}
        for earlier in range(step - 1, first - 1, -1):
            if not wanted:
                break
            if earlier not in known and (whole := self._whole(earlier, "final")):
                known[earlier] = _by_problem(whole[2])
            numbers = known.get(earlier, {})
            here = wanted & numbers.keys()
            if here:
                lines = text_of(self._read(earlier, "final") or b"").splitlines()[1:]
                found += [lines[number] for problem in here for number in numbers[problem]]
                wanted = wanted - here
        return found

    def _whole(self, step: int, stage: str) -> tuple[dict[str, Any], list[str], list[Trajectory]] | None:
        """Head, lines and trajectories of a file; None if it is absent, damaged, or made under other settings."""
        data = self._read(step, stage)
        if data is None:
            return None
        try:
            head, lines, trajectories = _parts(data)
        except ValueError:  # damaged: they are made again
            return None
        if head["settings"] != self._settings:
            return None
        return head, lines, trajectories

    def _lines(self, step: int, problems: Sequence[Problem], stage: str, rollbacks: int) -> list[str] | None:
        path, whole = self.path(step, stage), self._whole(step, stage)
        if whole is None:
            return None
        head, lines, trajectories = whole
        if head.get("rollbacks", 0) != rollbacks:
            return None
        strangers = sorted({t.problem_id for t in trajectories} - {p.id for p in problems})
        if head["seed"] != self._seed or strangers:
            found = f"problem {strangers[0]!r}" if strangers else f"run.seed = {head['seed']}"
            raise UserError(
                f"run.dir: {path} was written by another run ({found} is not of this one, run.seed = "
                f"{self._seed}); choose another run.dir, or restore the run's own run.seed and problems"
            )
        return lines


def _step_of(path: AnyPath) -> int:
    return int(path.name[len("step_") :].split(".")[0])


def _by_problem(trajectories: Sequence[Trajectory]) -> dict[str, list[int]]:
    """Which of them are whose."""
    found: dict[str, list[int]] = {}
    for number, trajectory in enumerate(trajectories):
        found.setdefault(trajectory.problem_id, []).append(number)
    return found
