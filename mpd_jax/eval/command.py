"""`mpd-jax eval`: a run's student before and after, or another model, on its held-out problems or on sets by name.

Samples are appended to a file a set and name as they are graded; killed at any moment, the same command goes on, and no
sample is made or graded twice. A run's go to its own evaluations/, those of another model to --out, if given.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from mpd_jax import build, config, files, trees
from mpd_jax.config import RunConfig
from mpd_jax.eval import evaluate as evaluation
from mpd_jax.eval import figures, tables
from mpd_jax.eval.evaluate import Blocks
from mpd_jax.eval.figures import EvalRow
from mpd_jax.eval.grade import GraderPool
from mpd_jax.eval.samples import Growing, Sample, growing, read_samples
from mpd_jax.files import AnyPath
from mpd_jax.lock import locked
from mpd_jax.models.locate import fingerprint
from mpd_jax.roles import ModelFiles, make_sampler, open_model
from mpd_jax.run import BASE, CONCISE, EXAMPLES, TRAINED
from mpd_jax.sampling.sampler import Sampler
from mpd_jax.screen import Screen
from mpd_jax.serving import Secrets, Serving, unproved
from mpd_jax.train.checkpoint import Which
from mpd_jax.types import Problem, UserError
from mpd_jax.use import model_settings, refuse_choice

ROUNDS = 8  # of a sampler's slots in a block: what a kill costs at most, and how seldom slots stand empty at its end
REGRADED = "regraded_"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model under a context. weights: None for those of the one before it. step: of a run's student."""

    label: str
    context: str
    weights: Callable[[], Any] | None = None
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated: a model's files, where it is computed, and how it is asked."""

    settings: RunConfig
    model: ModelFiles
    mesh: Mesh
    asked: Sequence[Asked]
    served: bool = False


def run(
    source: str,
    config_path: str | None,
    overrides: Sequence[str],
    *,
    sets: Sequence[str] = (),
    regrade: Sequence[str] = (),
    against: str | None = None,
    out: str | None = None,
    which: Which | None = None,
    secrets: Secrets = lambda name: None,
) -> None:
    """Evaluates and prints tables; or grades what is stored anew. secrets: API keys by name."""
    run_dir = files.path(source)
    is_run = files.is_file(run_dir / "config.yaml")
    if regrade:
        if which is not None:
            raise UserError("--regrade: it grades every stored sample; leave --step and --best out")
        if sets or against:
            raise UserError("--regrade: it samples nothing; leave --set and --against out")
        _regrade(run_dir / "evaluations" if is_run else run_dir, source, regrade)
        return
    subject = (
        _of_a_run(source, config_path, overrides, which)
        if is_run
        else _of_a_model(source, config_path, overrides, which)
    )
    screen = Screen()
    problems = _problems(subject.settings, sets, overrides, screen)
    stored = _stored(against) if against else []
    baseline = figures.rows_of(stored)
    if baseline:  # what does not fit is told before anything is sampled
        _require_same_answers(problems, stored)
        grader = GraderPool(subject.settings.eval.grader).grader
        for name, found in problems.items():
            for temperature in subject.settings.eval.temperatures:
                _baseline_of(name, temperature, {problem.id for problem in found}, grader, baseline)
    home = files.path(out) if out is not None else run_dir / "evaluations" if is_run and sets else None
    with _alone(home):
        samples = _samples(subject, problems, home, source, screen, secrets)
    _show(samples, baseline)
    if home is None:
        screen.say("no sample was kept; with --out DIR they are, and a stopped evaluation goes on")


def _of_a_run(source: str, config_path: str | None, overrides: Sequence[str], which: Which | None) -> Subject:
    run_dir = files.path(source)
    if any(text.startswith("student.serve=") and text != "student.serve=jax" for text in overrides):
        raise UserError(
            f"student.serve: servers do not hold the student of {source}; `mpd-jax export` it, serve the export, and "
            "evaluate that"
        )
    settings = config.load(config_path or run_dir / "config.yaml", overrides)
    restored = build.restored_student(config.load(run_dir / "config.yaml"), run_dir, which)
    asked = [
        Asked(BASE, "plain", restored.before, 0),
        Asked(CONCISE, "concise", None, 0),
        Asked(f"{TRAINED}, step {restored.step}", "plain", restored.after, restored.step),
    ]
    return Subject(settings, restored.files, restored.mesh, asked)


def _of_a_model(source: str, config_path: str | None, overrides: Sequence[str], which: Which | None) -> Subject:
    refuse_choice(source, which)
    settings = model_settings(source, config_path, overrides)
    model, mesh = open_model("student", settings.student, settings.recipe.contexts), build.make_mesh(settings.mesh)
    asked = [Asked(source, "plain", lambda: model.weights(mesh)), Asked(f"{source}, {CONCISE}", "concise")]
    return Subject(settings, model, mesh, asked, served=bool(model.serve))


def _problems(
    settings: RunConfig, sets: Sequence[str], overrides: Sequence[str], screen: Screen
) -> dict[str, Sequence[Problem]]:
    """By name of the set; that of the held-out problems is empty. Sets are whole unless eval.problems is given."""
    if not sets:
        return {"": build.read_problems(settings.problems, "heldout", screen.say)[: settings.eval.problems]}
    found: dict[str, Sequence[Problem]] = {}
    whole = not any(text.startswith("eval.problems=") for text in overrides)
    for each in sets:
        name = _called(each)
        if name.startswith(REGRADED) or not name.strip("."):
            raise UserError(f"--set: {each} would be stored as {name!r}, which is kept for other things; rename it")
        if name in found:
            raise UserError(f"--set: two sets are called {name!r}; rename one of the files")
        one = dataclasses.replace(settings.problems, heldout=each)
        problems = build.read_problems(one, "heldout", screen.say)
        found[name] = problems if whole else problems[: settings.eval.problems]
    return found


def _called(each: str) -> str:
    """What a set is called in tables, and its directory: by the last part of a path."""
    if not re.search(r"[/.]", each):
        return each.replace(":", "_")
    return Path(each if files.remote(each) or ":" in each else os.path.abspath(each)).stem


@contextmanager
def _alone(home: AnyPath | None) -> Iterator[None]:
    """UserError where another evaluation writes there, or nobody can."""
    with ExitStack() as stack:
        if isinstance(home, Path):
            try:
                home.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out: {home} cannot be made ({error.strerror}); choose another directory") from None
        if home is not None:
            try:
                stack.enter_context(locked(home))
            except UserError as error:
                if error.__cause__ is not None:  # nobody holds it: it cannot be written
                    raise UserError(str(error).replace("run.dir", "--out")) from error
                raise UserError(
                    f"--out: {home} is being filled by another `mpd-jax eval`; wait for it, or choose another"
                ) from None
        yield


# Sampling


def _samples(
    subject: Subject,
    problems: Mapping[str, Sequence[Problem]],
    home: AnyPath | None,
    source: str,
    screen: Screen,
    secrets: Secrets,
) -> list[Sample]:
    settings, chat = subject.settings, subject.model.chat
    contexts = ["plain", *(["concise"] if settings.eval.concise_row else [])]
    lengths = [len(chat.prompt(c, problem)) for c in contexts for found in problems.values() for problem in found]
    samples: list[Sample] = []
    with ExitStack() as stack:
        sampler, room, size = _sampler(subject, lengths, home, screen, secrets, stack)
        for asked in subject.asked:
            if asked.weights is not None:
                sampler.load(None if subject.served else asked.weights(), 0)
            if asked.context not in contexts:
                continue
            for name, found in problems.items():
                with _kept(home, name, asked.label, _made_with(subject, asked, source, found)) as kept:
                    samples += _of_set(subject, asked, sampler, name, found, room, size, kept, screen)
    return samples


def _of_set(
    subject: Subject,
    asked: Asked,
    sampler: Sampler,
    name: str,
    problems: Sequence[Problem],
    room: int,
    size: int,
    kept: Growing | None,
    screen: Screen,
) -> list[Sample]:
    """The samples of one model on one set. room, size: see `_sampler`."""
    rules = dataclasses.replace(subject.settings.eval, problems=len(problems))
    title = f"evaluating {asked.label}" + (f" on {name}" if name else "")
    with screen.bar(title, evaluation.count(problems, rules)) as advance:
        samples = evaluation.graded(
            asked.label,
            sampler,
            subject.model.chat,
            problems,
            rules,
            seed=subject.settings.run.seed,
            context=asked.context,
            problem_set=name,
            progress=advance,
            room=room,
            blocks=Blocks(kept.samples, kept.add, size) if kept else Blocks(size=size),
        )
    if kept:
        kept.sum_up([row.summary() for row in figures.rows_of(samples)])
    return samples


def _sampler(
    subject: Subject, lengths: Sequence[int], home: AnyPath | None, screen: Screen, secrets: Secrets, stack: ExitStack
) -> tuple[Sampler, int, int]:
    """Who answers, with the tokens of the longest prompt that is asked, and responses of a block."""
    settings, model = subject.settings, subject.model
    window, most = model.model.config.max_position_embeddings, settings.eval.max_tokens
    fitting = [length for length in lengths if length + most <= window]
    if not fitting:
        raise UserError(
            f"eval.max_tokens: {most} leaves no room for any of the prompts ({min(lengths)} tokens and more) in the "
            f"model's window of {window}; lower it"
        )
    longest = max(fitting)
    if not subject.served:
        sampler = make_sampler(model, settings, subject.mesh, longest, most)
        return sampler, longest, ROUNDS * sampler.slots
    spilled = home / ".unfinished" if home is not None else Path(stack.enter_context(TemporaryDirectory()))
    made_with = json.dumps(dataclasses.asdict(settings.student))
    serving = Serving(settings, spilled, made_with, secrets=secrets, say=screen.say, progress=screen.bar)
    stack.callback(serving.forget)
    screen.say(unproved(model))
    return serving.sampler(model, "eval", longest + most), longest, ROUNDS * settings.sampling.server.concurrency


def _made_with(subject: Subject, asked: Asked, source: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """What the samples depend on. Temperatures and attempts are not among it: with more of them, what is there stays
    and the rest is made."""
    settings, model = subject.settings, subject.model
    content = hashlib.blake2b(digest_size=8)
    for problem in problems:
        content.update(f"{problem.id}\0{problem.question}\0{problem.answer}\0".encode())
    student = {
        k: v for k, v in dataclasses.asdict(settings.student).items() if k not in ("serve", "remat", "attention")
    }
    return trees.flat(
        {
            "model": source,
            "step": asked.step,
            "student": student,
            "context": getattr(settings.recipe.contexts, asked.context),
            "eval": {key: getattr(settings.eval, key) for key in ("top_p", "top_k", "max_tokens")},
            "grader": GraderPool(settings.eval.grader).grader,
            "seed": settings.run.seed,
            "problems": f"{len(problems)}, {content.hexdigest()}",
            # Of another export in the same place half of the samples would be the one's and half the other's.
            "files": [fingerprint(each, not subject.served) for each in (model.directory, model.adapter) if each],
        }
    )


@contextmanager
def _kept(home: AnyPath | None, name: str, label: str, made_with: Mapping[str, Any]) -> Iterator[Growing | None]:
    """The file of the samples that are there, to put more into; None where none are kept."""
    if home is None:
        yield None
        return
    path = (home / name if name else home) / f"{label.replace('/', '_')}.jsonl"
    with growing(path, made_with) as file:
        yield file


# What is stored


def _files(directory: AnyPath) -> list[tuple[AnyPath, str]]:
    """Per-sample files, by path and by path within the directory; those that --regrade wrote are left out, and those
    of problems that a run was trained on."""
    found = [(p, p.name) for p in sorted(directory.glob("*.jsonl")) if not p.name.startswith(EXAMPLES)]
    inner = [(p, f"{p.parent.name}/{p.name}") for p in sorted(directory.glob("*/*.jsonl"))]
    return found + [(p, name) for p, name in inner if not name.startswith(REGRADED)]


def _regrade(directory: AnyPath, source: str, graders: Sequence[str]) -> None:
    """Every grader's rows of all stored samples, and their grades beside them."""
    stored, screen = _files(directory), Screen()
    if not stored:
        raise UserError(f"--regrade: {directory} holds no samples; run `mpd-jax eval {source}` with --out first")
    rows: list[EvalRow] = []
    for grader in graders:
        out = directory / f"{REGRADED}{re.sub(r'[^A-Za-z0-9._]+', '_', grader)}"
        with GraderPool(grader) as pool, screen.bar(f"grading by {grader}, files", len(stored)) as advance:
            for done, (path, name) in enumerate(stored, start=1):
                rows += evaluation.regrade(path, pool, out / name)
                advance(done)
    console = Console()
    for name in dict.fromkeys(row.problem_set for row in rows):
        of_set = [row for row in rows if row.problem_set == name]
        console.print(tables.table(of_set))
        console.print(tables.formats(of_set))


def _stored(against: str) -> list[Sample]:
    """The samples of a baseline: of a run directory, or of a directory that --out named."""
    directory = files.path(against)
    if files.is_file(directory / "config.yaml"):
        directory = directory / "evaluations"
    samples = [sample for path, _ in _files(directory) for sample in read_samples(path)]
    if not samples:
        raise UserError(f"--against: {against} holds no samples; give a run, or a directory that --out named")
    return samples


def _require_same_answers(problems: Mapping[str, Sequence[Problem]], stored: Sequence[Sample]) -> None:
    """UserError where the baseline is of another set of the same name: where ids are numbers, they are the same too."""
    answers = {(name, problem.id): problem.answer or "" for name, found in problems.items() for problem in found}
    for sample in stored:
        answer = answers.get((sample.problem_set, sample.problem_id), sample.reference)
        if answer != sample.reference:
            raise UserError(
                f"--against: problem {sample.problem_id!r} has the answer {sample.reference!r} there and {answer!r} "
                "here: it is another set of that name; evaluate both on the same problems"
            )


def _baseline_of(name: str, temperature: float, problem_ids: Set[str], grader: str, rows: Sequence[EvalRow]) -> EvalRow:
    """The baseline's row for one of these: that of its trained student, if it has one."""
    asked = (name, temperature, "plain")
    alike = [
        r for r in rows if (r.problem_set, r.temperature, r.context) == asked and set(r.problem_ids) == problem_ids
    ]
    if not alike:
        raise UserError(
            f"--against: it holds no samples of the same {len(problem_ids)} problems of {name or 'the held-out set'} "
            f"at temperature {temperature:g}; it has {tables.made_how(rows)}"
        )
    best = max(
        alike, key=lambda row: int(step[1]) if (step := re.fullmatch(rf"{TRAINED}, step (\d+)", row.name)) else -1
    )
    if best.grader != grader:
        raise UserError(
            f"--against: it was graded by {best.grader}, and this is by {grader}; set eval.grader alike, for the "
            "grader alone moves scores"
        )
    return best


def _show(samples: Sequence[Sample], baseline: Sequence[EvalRow]) -> None:
    """All tables, set by set; levels and subjects are those of the last model."""
    console, groups = Console(), figures.groups_of(samples)
    for name in dict.fromkeys(group[0].problem_set for group in groups):
        of_set = [group for group in groups if group[0].problem_set == name]
        rows = [figures.row_of(group) for group in of_set]
        shown = [tables.table(rows), tables.formats(rows), tables.lengths(rows), tables.budgets(of_set)]
        if any(row.samples_per_problem > 1 for row in rows):
            shown.append(tables.attempts(rows))
        if (parts := tables.by_part(of_set[-1])) is not None:
            shown.append(parts)
        if baseline:
            own = [row for row in rows if row.context == "plain" and row.name != BASE]
            theirs = [_baseline_of(name, r.temperature, set(r.problem_ids), r.grader, baseline) for r in own]
            shown.append(tables.against(list(zip(theirs, own, strict=True))))
        for each in shown:
            console.print(each)
