"""What a run directory has to tell, read file by file: what is absent or damaged is said, never an end of the report.

Not here: what is drawn of it (figures.py), and the texts of single problems (examples.py).
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import yaml

from mpd_jax import config, files
from mpd_jax.config import RunConfig
from mpd_jax.eval.figures import EvalRow, rows_of
from mpd_jax.eval.samples import Sample, read_samples
from mpd_jax.files import AnyPath
from mpd_jax.run import BASE, CONCISE, EXAMPLES, TRAINED
from mpd_jax.types import UserError

Kind = Literal["base", "concise", "cut", "step", "trained", "other"]


class Where(NamedTuple):
    """What is compared with each other. problem_set: "" are the run's held-out problems."""

    problem_set: str
    temperature: float

    def __str__(self) -> str:
        how = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.problem_set}, {how}" if self.problem_set else how


@dataclass(frozen=True)
class Measured:
    """Figures of one name: those of an EvalRow, in a dict. step: updates before, where it is the
    student's own. row: with the figures of single problems, where the samples could be read."""

    kind: Kind
    step: int | None
    figures: dict[str, Any]
    row: EvalRow | None = None

    @property
    def where(self) -> Where:
        return Where(self.figures.get("problem_set", ""), self.figures["temperature"])


@dataclass
class RunFiles:
    """A run as its files tell it.

    samples: by file, without ids, of the untrained student, the trained one and the last checkpoint before it.
    sources: what was read, as (path in the run, what it is, how much).
    """

    path: AnyPath
    name: str = ""
    config_text: str = ""
    config: RunConfig | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    trajectories: list[AnyPath] = field(default_factory=list)
    sources: list[tuple[str, str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def headline(self) -> Where | None:
        """The held-out problems at the first of eval.temperatures, else whatever the student was evaluated on first."""
        there = [m.where for m in self.measured if m.kind in ("base", "step", "trained")]
        wanted = Where("", self.config.eval.temperatures[0]) if self.config else None
        return wanted if wanted in there or not there else there[0]

    def before(self, where: Where | None) -> Measured | None:
        return next((m for m in self.measured if m.kind == "base" and m.where == where), None)

    def after(self, where: Where | None) -> Measured | None:
        """The trained student, or where training goes on the last checkpoint that was evaluated."""
        there = [m for m in self.measured if m.kind in ("step", "trained") and m.where == where]
        return max(there, key=lambda m: (m.kind == "trained", m.step or 0), default=None)

    def samples_of(self, m: Measured | None) -> list[Sample]:
        """Those that its figures are of; none where they were not kept."""
        if m is None:
            return []
        name, where = m.figures["name"], m.where
        return [
            s
            for group in self.samples.values()
            for s in group
            if s.name == name and Where(s.problem_set, s.temperature) == where
        ]


def gather(source: str) -> RunFiles:
    """Everything of a run but its trajectories, whose files are only listed. UserError: it is no run directory."""
    path = files.path(source)
    run = RunFiles(path)
    _read_config(run)
    _read_steps(run)
    _read_evaluations(run)
    _read_summary(run)
    _list_trajectories(run)
    if not run.sources:
        raise UserError(f"report: {source} is no run directory: it holds none of a run's files; give what run.dir says")
    run.measured.sort(key=lambda m: (ORDER.index(m.kind), m.step or 0))
    for kind, what in (("base", "the untrained student"), ("trained", "the trained student")):
        if not any(m.kind == kind for m in run.measured):
            run.missing.append(
                f"evaluations/: {what} is not evaluated; `mpd-jax train` does it when it is run to its end"
            )
    return run


ORDER: tuple[Kind, ...] = ("base", "concise", "cut", "step", "trained", "other")


def name_runs(runs: Sequence[RunFiles]) -> None:
    """Short names that differ: the directory's, with as many of those above it as it takes."""
    parts = [[p for p in str(run.path).rstrip("/").split("/") if p not in ("", ".")] for run in runs]
    for run, own in zip(runs, parts, strict=True):
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        run.name = "/".join(own[-depth:]) or str(run.path)


def _text(run: RunFiles, name: str, what: str, if_absent: str) -> str | None:
    try:
        data, why = files.read(run.path / name), "absent"
    except (OSError, UserError) as error:
        data, why = None, f"unreadable ({error})"
    if data is None:
        run.missing.append(f"{name}: {why}; {if_absent}")
        return None
    run.sources.append((name, what, size(len(data))))
    return data.decode(errors="replace")


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{count:.3g} GB"


def _read_config(run: RunFiles) -> None:
    text = _text(run, "config.yaml", "the resolved config", "the settings of the run are not known")
    if text is None:
        return
    run.config_text = text
    try:
        run.config = config.load(run.path / "config.yaml")
    except (UserError, yaml.YAMLError) as error:
        run.missing.append(f"config.yaml: this version cannot read it ({error})")


def _read_steps(run: RunFiles) -> None:
    text = _text(run, "metrics.jsonl", "training curves, verdicts, seconds", "there are no training curves")
    if text is None:
        return
    lines = [line for line in text.split("\n") if line.strip()]
    damaged = []
    for number, line in enumerate(lines, start=1):
        try:
            run.steps.append(_step(line))
        except (ValueError, LookupError, TypeError, AttributeError):
            damaged.append(number)
    if damaged:
        run.missing.append(f"metrics.jsonl: {told(damaged, 'line')} damaged and left out")
    run.steps.sort(key=lambda row: row["step"])
    planned = run.config.train.steps if run.config else None
    if planned and len(run.steps) < planned:
        run.missing.append(f"metrics.jsonl: {len(run.steps)} of {planned} steps; the run is not finished")


def _step(line: str) -> dict[str, Any]:
    """A row of metrics.jsonl; some error where what is counted in it is no number."""
    row = json.loads(line)
    parts = row.get("divergence_by_position") or ()
    counts = [*(row.get("verdicts") or {}).values(), *(part["from"] for part in parts)]
    counts += [part["mean"] or 0 for part in parts] + [v or 0 for name, v in row.items() if name.endswith("_share")]
    if not all(map(_is_number, counts)):
        raise ValueError("no number")
    return {**row, "step": int(row["step"])}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def told(numbers: Sequence[int], noun: str) -> str:
    """`line 3 is`, `lines 3, 5 and 7 others are`."""
    shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} others" if len(numbers) > 5 else "")
    return f"{noun} {shown} is" if len(numbers) == 1 else f"{noun}s {shown} are"


def _read_evaluations(run: RunFiles) -> None:
    def order(path: AnyPath) -> tuple[int, str]:
        return _kind({"name": path.stem})[1] or 0, str(path)

    directory = run.path / "evaluations"
    # Of sets in directories of their own; what another grader made of samples is in `regraded_*`.
    found = [*directory.glob("*.jsonl"), *directory.glob("*/*.jsonl")]
    for path in sorted((p for p in found if not p.parent.name.startswith("regraded_")), key=order):
        inner = "" if path.parent.name == directory.name else f"{path.parent.name}/"
        where = f"evaluations/{inner}{path.name}"
        try:
            samples = _sound(read_samples(path))
            rows = [(row.summary(), row) for row in rows_of(samples)]
            _keep(run, inner, path.stem, samples)
            run.sources.append((where, "every sample: accuracy, tokens, answers", f"{len(samples):,} samples"))
            if not _stored_rows(path.with_suffix(".json")):
                left = "its figures are those of the samples that are there" if rows else "it holds no samples yet"
                run.missing.append(f"{where}: the evaluation is not over; {left}")
        except (OSError, UserError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            rows = [(figures, None) for figures in _stored_rows(path.with_suffix(".json"))]
            left = f"its figures are those of {path.stem}.json" if rows else "it is left out"
            run.missing.append(f"{where}: {error}; {left}")
        run.measured += [Measured(*_kind(f), f, row) for f, row in rows if not f["name"].startswith(EXAMPLES)]


def _sound(samples: list[Sample]) -> list[Sample]:
    """The same; ValueError where one has values that no evaluation writes."""
    for number, s in enumerate(samples, start=1):
        texts = (s.name, s.problem_id, s.reference, s.text, s.ended, s.grader, s.problem_set, s.level or "")
        numbers = (s.temperature, s.tokens, s.reasoning_tokens or 0, s.max_tokens)
        if not all(isinstance(text, str) for text in texts) or not all(map(_is_number, numbers)):
            raise ValueError(f"sample {number} is damaged")
    return samples


def _keep(run: RunFiles, inner: str, stem: str, samples: Sequence[Sample]) -> None:
    """Of a long run all samples would be many gigabytes: texts are kept where they are shown, and ids nowhere."""
    kind = _kind({"name": stem})[0]
    if kind == "step":
        run.samples = {name: kept for name, kept in run.samples.items() if not name.startswith(f"{inner}step ")}
    if kind in ("base", "step", "trained") or stem.startswith(EXAMPLES):
        run.samples[f"{inner}{stem}"] = [replace(s, response_ids=()) for s in samples]


def _stored_rows(path: AnyPath) -> list[dict[str, Any]]:
    """The rows that stand beside an evaluation's samples once it is over; none if they cannot be read."""
    try:
        return _usable(json.loads(files.read(path) or b"")["rows"])
    except (OSError, UserError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _usable(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have what a report needs of a row."""
    needed = ("temperature", "accuracy", "mean_tokens")
    return [row for row in rows if isinstance(row["name"], str) and all(_is_number(row[name]) for name in needed)]


def _kind(figures: dict[str, Any]) -> tuple[Kind, int | None]:
    name = figures["name"]
    number = re.search(r"\bstep (\d+)$", name)
    step = int(number[1]) if number else None
    if name == BASE:
        return "base", 0
    if name == CONCISE:
        return "concise", None
    if name.startswith(f"{BASE}, "):
        return "cut", None
    if step is not None and name.startswith(TRAINED):
        return "trained", step
    return ("step", step) if step is not None and name.startswith("step ") else ("other", None)


def _read_summary(run: RunFiles) -> None:
    text = _text(run, "summary.json", "cost, versions, the untrained student cut to length", "the run is not summed up")
    if text is None:
        return
    try:
        run.summary = dict(json.loads(text))
        run.summary["versions"] = dict(run.summary.get("versions") or {})
        # The control is in no file of its own: it is the base's samples, cut.
        rows = [row for row in _usable(run.summary.get("rows", ())) if _kind(row)[0] == "cut"]
        run.measured += [Measured("cut", None, row) for row in rows]
    except (ValueError, LookupError, TypeError, AttributeError):
        run.summary = {}
        run.missing.append("summary.json: damaged and left out; `mpd-jax train` writes it anew")


def _list_trajectories(run: RunFiles) -> None:
    # Where an earlier version left one and this version another, the latter counts: it is the last by name.
    paths = sorted((run.path / "trajectories").glob("step_*.jsonl*"), key=str)
    found = {_step_of(path): path for path in paths if _is_final(path)}
    run.trajectories = [found[step] for step in sorted(found)]
    if not found:
        run.missing.append("trajectories/: there are none, so no texts of training")
    else:
        first, last = run.trajectories[0].name, run.trajectories[-1].name
        name = first if len(found) == 1 else f"{first} to {last}"
        run.sources.append((f"trajectories/{name}", "what was written and rewritten", f"{len(found)} steps"))


def _is_final(path: AnyPath) -> bool:
    return re.fullmatch(r"step_\d+\.jsonl(\.gz)?", path.name) is not None


def _step_of(path: AnyPath) -> int:
    return int(path.name[len("step_") :].split(".")[0])
