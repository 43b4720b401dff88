"""A step's trajectories on disk, before the update that uses them; a resumed run reads them back instead of sampling.

One JSON Lines file a step: a head line (step, seed, stage), then one trajectory a line. Round trips are exact: ids are
integers and Python writes floats so that they read back as the same bits. Files appear whole or not at all.
"""

import json
from collections.abc import Sequence
from typing import Any

from mpd_jax import files, hosts
from mpd_jax.files import AnyPath
from mpd_jax.types import Problem, Trajectory, UserError


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


def read_trajectories(path: AnyPath) -> tuple[dict[str, Any], list[Trajectory]]:
    """Head and trajectories of a file of `Records`, whatever the run; ValueError if it is damaged or absent."""
    try:
        first, *lines = (files.read(path) or b"").decode().splitlines()
        head, trajectories = json.loads(first), [from_json(line) for line in lines]
        whole = head["count"] == len(trajectories)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged") from error
    if not whole:
        raise ValueError(f"{path} is damaged: a part is lost")
    return head, trajectories


class Records:
    """Files `trajectories/step_000012.jsonl` of a run; what was written is kept until its rewrite is there.

    `settings` stands for whatever else the trajectories depend on; those made under other settings are made again.
    """

    def __init__(self, run_dir: AnyPath, seed: int, settings: str = ""):
        self.directory = run_dir / "trajectories"
        self._seed = seed
        self._settings = settings
        # Of final files, by step and problem; kept once the latest of a problem are asked for.
        self._lines_of: dict[int, dict[str, list[int]]] | None = None

    def path(self, step: int, stage: str = "final") -> AnyPath:
        suffix = "" if stage == "final" else f".{stage}"
        return self.directory / f"step_{step:06d}{suffix}.jsonl"

    def save(self, step: int, trajectories: Sequence[Trajectory], stage: str = "final", rollbacks: int = 0) -> None:
        made = {"step": step, "stage": stage, "seed": self._seed, "settings": self._settings, "rollbacks": rollbacks}
        head = json.dumps({**made, "count": len(trajectories)})
        files.write_atomically(self.path(step, stage), "\n".join([head, *map(to_json, trajectories)]) + "\n")
        if stage == "final":
            files.remove(self.path(step, "written"))
            if self._lines_of is not None:
                self._lines_of[step] = _by_problem(trajectories)

    def forget_after(self, step: int) -> None:
        """Removes the trajectories of later steps: they were sampled from weights that the run will not have."""
        for path in list(self.directory.glob("step_*.jsonl")) if hosts.is_main() else ():
            if int(path.name[len("step_") :].split(".")[0]) > step:
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
                lines = (files.read(self.path(earlier)) or b"").decode().splitlines()[1:]
                found += [lines[number] for problem in here for number in numbers[problem]]
                wanted = wanted - here
        return found

    def _whole(self, step: int, stage: str) -> tuple[dict[str, Any], list[str], list[Trajectory]] | None:
        """Head, lines and trajectories of a file; None if it is absent, damaged, or made under other settings."""
        data = files.read(self.path(step, stage))
        if data is None:
            return None
        try:
            first, *lines = data.decode().splitlines()
            head = json.loads(first)
            trajectories = [from_json(line) for line in lines]
        except (ValueError, LookupError, TypeError):  # damaged: they are made again
            return None
        if head["settings"] != self._settings or head["count"] != len(trajectories):
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


def _by_problem(trajectories: Sequence[Trajectory]) -> dict[str, list[int]]:
    """Which of them are whose."""
    found: dict[str, list[int]] = {}
    for number, trajectory in enumerate(trajectories):
        found.setdefault(trajectory.problem_id, []).append(number)
    return found
