"""The arms of a comparison: which runs it is made of, which of them are over, and what one that is over has to say.

An arm is a config, a choice of swept values and a seed: a run directory like any other. Not here: starting them
(compare.py), and what the table makes of them (comparison.py).
"""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mpd_jax import config, files, trees
from mpd_jax.config import RunConfig, RunSection
from mpd_jax.eval import evaluate as evaluation
from mpd_jax.eval.figures import EvalRow, rows_of
from mpd_jax.eval.instructions import Readings, is_measured, read_readings, readers
from mpd_jax.eval.samples import Sample, read_samples
from mpd_jax.files import write_atomically
from mpd_jax.run import BASE, CONCISE, TRAINED, is_evaluated, samples_path
from mpd_jax.train.metrics import read_rows
from mpd_jax.types import UserError

LABEL = 40  # characters of a swept value that a table or a directory's name shows
# What methods that are to be compared are mostly trained with alike; a comparison tells where they are not.
ALIKE = (
    "train.steps",
    "train.batch_size",
    "train.learning_rate",
    "problems.train",
    "teacher.path",
    "recipe.write.attempts",
)
Values = tuple[tuple[str, Any], ...]  # swept keys and what they are in an arm


@dataclass(frozen=True)
class Arm:
    """One run of a comparison. values: the swept keys with what they are here."""

    method: str
    values: Values
    settings: RunConfig

    @property
    def seed(self) -> int:
        return self.settings.run.seed

    @property
    def directory(self) -> Path:
        return Path(self.settings.run.dir)

    @property
    def label(self) -> str:
        """What a table calls it, the seed left out."""
        return ", ".join([self.method, *(f"{key.split('.')[-1]}={shown(value)}" for key, value in self.values)])

    @property
    def row(self) -> tuple[str, str]:
        """What it has in common with the other seeds of its row, and with nothing else."""
        return self.method, repr(self.values)

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}"

    @property
    def swept(self) -> tuple[str, ...]:
        return tuple(key for key, _ in self.values)


def shown(value: Any) -> str:
    """A swept value on one line, shortened; values that lose by it are told apart by a hash."""
    text = str(value)
    line = " ".join(text.split())
    short = line if len(line) <= LABEL else f"{line[: LABEL - 8]}…"
    return short if short == text else f"{short} {_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def read_sweep(text: str) -> tuple[str, tuple[Any, ...]]:
    """Key and values of `KEY=[v1,v2]`."""
    key, equals, listed = text.partition("=")
    try:
        values = yaml.safe_load(listed)
    except (yaml.YAMLError, ValueError, RecursionError):
        values = None
    if not equals or not key.strip() or not isinstance(values, list) or not values:
        raise UserError(f"--sweep: {text!r} is not allowed; write KEY=[v1,v2], such as recipe.target.every=[1,10]")
    if len({str(value) for value in values}) < len(values):
        raise UserError(f"--sweep: {text!r} names a value twice; name each once")
    return key.strip(), tuple(values)


def plan(
    configs: Sequence[str], overrides: Sequence[str], sweeps: Sequence[str], seeds: int, out: Path
) -> tuple[Arm, ...]:
    """Every arm, those of a seed together, so that an unfinished comparison compares all methods."""
    stems = [Path(name).stem for name in configs]
    twice = {stem for stem in stems if stems.count(stem) > 1}
    if twice:
        raise UserError(f"compare: two configs are called {twice.pop()!r}, which names run directories; rename one")
    if seeds < 1:
        raise UserError(f"--seeds: {seeds} is not allowed; it must be 1 or more")
    read = [read_sweep(text) for text in sweeps]
    keys = [key for key, _ in read]
    _refuse_ours("--with", [text.partition("=")[0].strip() for text in overrides])
    _refuse_ours("--sweep", keys)
    if len(set(keys)) < len(keys):
        raise UserError(f"--sweep: {keys[0]} stands twice; give all its values in one list")
    chosen = [tuple(zip(keys, values, strict=True)) for values in itertools.product(*(values for _, values in read))]
    arms = [
        _arm(path, stem, values, overrides, seed, out)
        for seed in range(seeds)
        for path, stem in zip(configs, stems, strict=True)
        for values in chosen
    ]
    refuse_unequal(arms)
    return tuple(arms)


def _refuse_ours(option: str, keys: Sequence[str]) -> None:
    for key in keys:
        if trees.under(key, ("run",)):
            raise UserError(
                f"{option}: {key} is not allowed; each run has a directory under --out, one of --seeds seeds from 0, "
                "and what all of them compiled; take it out"
            )


def _arm(path: str, stem: str, values: Values, overrides: Sequence[str], seed: int, out: Path) -> Arm:
    settings = config.load(path, [*overrides, *(f"{key}={_yaml(value)}" for key, value in values), f"run.seed={seed}"])
    name = "-".join([stem, *(_slug(f"{key.split('.')[-1]}={value}") for key, value in values), f"seed{seed}"])
    run = RunSection(str(out / name), seed, str(out / "compiled"))
    return Arm(stem, values, dataclasses.replace(settings, run=run))


def _yaml(value: Any) -> str:
    """A value as an override spells it."""
    listed = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=math.inf)  # type: ignore[arg-type]
    return listed.strip()[1:-1]


def _slug(text: str) -> str:
    """The text as part of a directory's name: texts that lose by it are told apart by a hash."""
    slug = re.sub(r"[^A-Za-z0-9._=]+", "_", text)[:LABEL]
    return slug if slug == text else f"{slug}.{_digest(text)}"


def graded(c: RunConfig) -> dict[str, Any]:
    """What decides how an arm is graded, by config key: the problems, how they are asked and answered, the student."""
    tree = dataclasses.asdict(dataclasses.replace(c.eval, every=0, concise_row=True))
    heldout, *read_by = c.problems.described("heldout")
    return trees.flat(
        {
            "eval": tree,
            # Not how it trains and computes. An adapter that it starts from makes it another student.
            "student": {key: getattr(c.student, key) for key in ("path", "revision", "thinking", "adapter")},
            "problems": {"heldout": heldout, "heldout_columns": repr(read_by)},
            "recipe": {"contexts": {"plain": c.recipe.contexts.plain}},
        }
    )


def refuse_unequal(arms: Sequence[Arm]) -> None:
    """UserError where two arms would not be graded alike, with the keys by which they differ."""
    first, ours = arms[0], graded(arms[0].settings)
    for arm in arms:
        if apart := trees.apart(graded(arm.settings), ours, f"in {first.label}"):
            raise UserError(
                f"compare: {arm.label} and {first.label} would not be graded alike: {apart}; set these keys "
                "alike with --with, for example --with eval.problems=512"
            )


def unlike(arms: Sequence[Arm]) -> str:
    """In which of `ALIKE` the methods differ, with who has which value; nothing where they do not.

    Swept keys stand in the labels, and a method without a teacher has none that differs.
    """
    told = []
    for key in ALIKE:
        methods: dict[str, dict[str, None]] = {}
        for arm in arms:
            value = trees.flat(dataclasses.asdict(arm.settings)).get(key)
            if value is not None and key not in arm.swept:
                methods.setdefault(shown(value), {})[arm.method] = None
        if len(methods) > 1:
            told.append(f"{key} is " + ", ".join(f"{value} ({', '.join(of)})" for value, of in methods.items()))
    return "; ".join(told)


def named(arms: Sequence[Arm], name: str) -> Arm:
    """An arm of the one row that goes by this name: its label, or its config's name."""
    found = {arm.row: arm for arm in arms if name in (arm.label, arm.method)}
    if len(found) != 1:
        labels = dict.fromkeys(arm.label for arm in found.values() or arms)
        what = "names several methods" if found else "is no method of this comparison"
        raise UserError(f"--against: {name!r} {what}; give one of: {'; '.join(labels)}")
    return next(iter(found.values()))


def wanted(arm: Arm) -> tuple[str, ...]:
    """The evaluations that an arm ends with."""
    concise = (CONCISE,) if arm.settings.eval.concise_row else ()
    return (BASE, *concise, f"{TRAINED}, step {arm.settings.train.steps}")


def is_finished(arm: Arm) -> bool:
    """Whether its run is over, and a swept instruction measured."""
    return is_trained(arm) and (not wants_reading(arm) or is_measured(arm.directory, arm.settings))


def wants_reading(arm: Arm) -> bool:
    """Whether what its instruction is worth by itself is measured beside it: with one seed of each."""
    return arm.seed == 0 and bool(readers(arm.settings, arm.swept))


def is_trained(arm: Arm) -> bool:
    """Whether its run, with this config, is over and summed up."""
    there = arm.directory / "config.yaml"
    if not (there.is_file() and (arm.directory / "summary.json").is_file()):
        return False
    same = dataclasses.replace(config.load(there), run=arm.settings.run) == arm.settings
    return same and all(is_evaluated(arm.directory, name, arm.settings) for name in wanted(arm))


def share_evaluations(arm: Arm, arms: Sequence[Arm]) -> None:
    """Gives an arm the evaluations of the untrained student that another arm of its seed has made alike."""
    for name in (BASE, CONCISE):
        made = [other for other in (arm, *arms) if is_evaluated(other.directory, name, arm.settings)]
        if made and made[0] is not arm:
            source, target = (samples_path(a.directory, name) for a in (made[0], arm))
            # The settings come last: without them there is no evaluation.
            for suffix in (".jsonl", ".json"):
                write_atomically(target.with_suffix(suffix), files.read(source.with_suffix(suffix)) or b"")


def untold(arm: Arm, arms: Sequence[Arm]) -> bool:
    """Whether nobody has evaluated the untrained student for it."""
    return not any(is_evaluated(other.directory, BASE, arm.settings) for other in arms)


@dataclass(frozen=True)
class Spent:
    """What training took, evaluation left out: seconds of the steps, tokens sampled or read in all.

    student_entropy: nats, mean over the last tenth of the steps; None where no step measured it.
    seconds: what the steps had taken with everything compiled, the mean of those that compiled nothing times the number
    of all; None where every step compiled.
    writer_tokens: sampled; text of a data set cost none. rewriter_tokens: prompts and answers. trainer_tokens: read by
    student and target, prompts among them.
    """

    student_entropy: float | None
    seconds: float | None
    writer_tokens: int
    rewriter_tokens: int
    trainer_tokens: int


@dataclass(frozen=True)
class Result:
    """What a finished arm says, rows by temperature. base: samples of the untrained student."""

    arm: Arm
    base: dict[float, list[Sample]]
    vanilla: dict[float, EvalRow]
    concise: dict[float, EvalRow]
    trained: dict[float, EvalRow]
    readings: dict[float, Readings]
    spent: Spent


def read_result(arm: Arm) -> Result:
    """The result of a finished arm."""
    names = wanted(arm)
    samples = read_samples(samples_path(arm.directory, BASE))
    rows = {name: evaluation.read_rows(samples_path(arm.directory, name)) for name in names[1:]}
    by_temperature = {name: {row.temperature: row for row in found} for name, found in rows.items()}
    return Result(
        arm,
        {t: [s for s in samples if s.temperature == t] for t in arm.settings.eval.temperatures},
        {row.temperature: row for row in rows_of(samples)},
        by_temperature.get(CONCISE, {}),
        by_temperature[names[-1]],
        {t: read_readings(arm.directory, t) for t in arm.settings.eval.temperatures if wants_reading(arm)},
        spent_on(arm.settings, read_rows(arm.directory / "metrics.jsonl")),
    )


def spent_on(c: RunConfig, steps: Sequence[dict[str, Any]]) -> Spent:
    """Of the rows of a run's metrics."""

    def total(*names: str) -> int:
        return sum(row.get(name) or 0 for row in steps for name in names)

    last = steps[-max(1, len(steps) // 10) :]
    entropies = [row["student_entropy"] for row in last if row.get("student_entropy") is not None]
    compiled = [_wall(row) for row in steps if not row["compilations"]]
    updates = [row for row in steps if not row.get("skipped")]
    read = sum(row["rows"] * row["row_length"] * (1 - row["padding"]) + row["scored_total"] for row in updates)
    return Spent(
        float(np.mean(entropies)) if entropies else None,
        float(np.mean(compiled)) * len(steps) if compiled else None,
        0 if c.recipe.write.by == "dataset" else total("written_total"),
        total("rewrite_prompt_total", "rewritten_total"),
        round(read),
    )


def _wall(row: dict[str, Any]) -> float:
    """Seconds of a step. Phases beside each other may come to more; each says which share of the step it was."""
    shares = {key.removesuffix("_share"): value for key, value in row.items() if key.endswith("_share") and value}
    longest = max(shares, key=lambda name: shares[name], default=None)
    return row[f"{longest}_seconds"] / shares[longest] if longest else 0.0


def concise_wordings(arms: Sequence[Arm]) -> dict[str, str]:
    """The names of the prompt-only rows by wording: there are several where the wording is swept."""
    wordings = dict.fromkeys(arm.settings.recipe.contexts.concise for arm in arms)
    return {text: CONCISE if len(wordings) == 1 else f"{CONCISE}: {shown(text)}" for text in wordings}
