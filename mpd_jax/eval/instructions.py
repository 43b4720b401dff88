"""What a swept instruction is worth by itself, before anything is trained: how its reader fares on held-out problems.

The model that reads as the target answers them under the context it reads (target); the rewriter rewrites the untrained
student's stored responses, by the code that rewrites in training (rewrites). Models on servers are not asked.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from mpd_jax import build
from mpd_jax.config import RunConfig
from mpd_jax.eval import evaluate as evaluation
from mpd_jax.eval.grade import GraderPool
from mpd_jax.eval.statistics import Interval, interval
from mpd_jax.files import AnyPath, path, read, write_atomically
from mpd_jax.recipe.keep import KEPT
from mpd_jax.roles import ModelFiles, Roles, make_sampler, open_roles
from mpd_jax.rollouts import make_rewriter
from mpd_jax.run import BASE, evaluated_with, keep_compiled, samples_path
from mpd_jax.samplers import rewriting_sampler
from mpd_jax.sampling.sampler import Sampler
from mpd_jax.screen import Screen
from mpd_jax.types import Trajectory

NAME = "instruction.json"


class Reading(NamedTuple):
    """Of the target's answers, or of rewrites: accuracy (a rewrite that is not kept is wrong), and mean tokens."""

    accuracy: Interval
    tokens: float


@dataclass(frozen=True)
class Readings:
    """At one temperature of the evaluation; for rewrites it is the drafts'. None: it was not swept."""

    target: Reading | None = None
    rewrites: Reading | None = None


UNREAD = Readings()


def readers(c: RunConfig, swept: Sequence[str]) -> tuple[str, ...]:
    """Who reads an instruction that is swept: target, rewrites, or nobody.

    A target that reads what a rewriter reads is told by its rewrites.
    """
    context, how = c.recipe.target.context, c.recipe.rewrite.how
    read = {"recipe.contexts", "recipe.target.context", f"recipe.contexts.{context}"}
    rewritten = {"recipe.contexts", f"recipe.contexts.{how}"}
    if context == "rewrite":
        read, rewritten = set(), rewritten | {"recipe.target.context"}
    target = ("target",) if read & set(swept) and c.recipe.target.weights != "none" else ()
    return (*target, "rewrites") if rewritten & set(swept) and c.recipe.rewrite.by_model else target


def measure(c: RunConfig, swept: Sequence[str]) -> None:
    """Writes `NAME` into the run's directory; the untrained student has been evaluated there."""
    screen, run_dir = Screen(), path(c.run.dir)
    if c.run.compile_cache:
        keep_compiled(c.run.compile_cache)
    roles, mesh = open_roles(c), build.make_mesh(c.mesh)
    found: dict[str, dict[str, Any]] = {}
    for reader in readers(c, swept):
        asked = roles.target(c.recipe) if reader == "target" else roles.rewriter
        if asked is None or asked.serve:
            screen.say(f"{reader}: it is on servers, and not asked")
            continue
        found[reader] = (_target if reader == "target" else _rewrites)(c, roles, mesh, screen)
    content = {"settings": evaluated_with(c), "readings": found}
    write_atomically(run_dir / NAME, json.dumps(content, indent=2) + "\n")


def is_measured(run_dir: AnyPath, c: RunConfig) -> bool:
    """Whether `measure` has written there, with the evaluation's settings of now."""
    return json.loads(read(run_dir / NAME) or b"{}").get("settings") == evaluated_with(c)


def read_readings(run_dir: AnyPath, temperature: float) -> Readings:
    """What `measure` found at a temperature; nothing where it did not measure."""
    found = json.loads(read(run_dir / NAME) or b"{}").get("readings", {})
    at = {reader: rows[f"{temperature:g}"] for reader, rows in found.items()}
    return Readings(**{reader: Reading(Interval(*accuracy), tokens) for reader, (accuracy, tokens) in at.items()})


def _target(c: RunConfig, roles: Roles, mesh: Mesh, screen: Screen) -> dict[str, Any]:
    files = roles.target(c.recipe)
    assert files is not None
    heldout = build.read_problems(c.problems, "heldout")[: c.eval.problems]
    # A context may quote more than a problem.
    longest = max(len(files.chat.prompt(c.recipe.target.context, problem)) for problem in heldout)
    sampler = make_sampler(files, c, mesh, max(longest, c.sampling.prompt_tokens), c.eval.max_tokens)
    _load(sampler, files, mesh, c)
    with screen.bar("the target's own answers", evaluation.count(heldout, c.eval)) as advance:
        rows = evaluation.evaluate(
            files.key,
            sampler,
            files.chat,
            heldout,
            c.eval,
            seed=c.run.seed,
            context=c.recipe.target.context,
            progress=advance,
        )
    return {f"{r.temperature:g}": Reading(Interval(r.accuracy, *r.accuracy_ci), r.mean_tokens) for r in rows}


def _load(sampler: Sampler, files: ModelFiles, mesh: Mesh, c: RunConfig) -> None:
    """The weights that nothing has trained yet."""
    sampler.load(files.trains.over(files.base(mesh), files.start(mesh, c.run.seed)), 0)


def _rewrites(c: RunConfig, roles: Roles, mesh: Mesh, screen: Screen) -> dict[str, Any]:
    student, held = roles.student, roles.rewriter
    assert held is not None

    def on_servers(*model: Any) -> Any:
        raise AssertionError(f"asked for servers of {model}")

    sampler = rewriting_sampler(c, roles, mesh, on_servers)
    _load(sampler, held, mesh, c)
    problems = {problem.id: problem for problem in build.read_problems(c.problems, "heldout")}
    samples = evaluation.read_samples(samples_path(path(c.run.dir), BASE))
    found = {}
    with GraderPool(c.recipe.rewrite.grader, workers=1) as keeping, GraderPool(c.eval.grader) as pool:
        rewrite = make_rewriter(c, roles, sampler, keeping)
        for temperature in c.eval.temperatures:
            drafts = [
                Trajectory(
                    problem_id=s.problem_id,
                    attempt=s.attempt,
                    prompt=student.chat.prompt("plain", problems[s.problem_id]),
                    response=s.response_ids,
                    writer="student",
                    version=0,
                    ended=s.ended,
                )
                for s in samples
                if s.temperature == temperature
            ]
            asked = [problems[i] for i in dict.fromkeys(draft.problem_id for draft in drafts)]
            with screen.bar("rewriting the untrained student's answers", len(drafts)) as advance:
                rewrites = rewrite(asked, drafts, 0, progress=advance)
            found[f"{temperature:g}"] = _judged(rewrites, problems, student.chat, pool)
    return found


def _judged(rewrites: Sequence[Trajectory], problems: Any, chat: Any, pool: GraderPool) -> Reading:
    answers = [chat.answer_text(t.response) if t.verdict == KEPT else "" for t in rewrites]
    grades = pool.grade_many([(a, problems[t.problem_id].answer) for a, t in zip(answers, rewrites, strict=True)])
    right: dict[str, list[bool]] = {}
    for grade, t in zip(grades, rewrites, strict=True):
        right.setdefault(t.problem_id, []).append(grade.correct)
    accuracy_P = np.array([np.mean(values) for values in right.values()])
    lengths = [len(t.response) for t in rewrites if t.verdict == KEPT]
    return Reading(
        Interval(float(accuracy_P.mean()), *interval(accuracy_P, 0.0, 1.0)),
        float(np.mean(lengths)) if lengths else 0.0,
    )
