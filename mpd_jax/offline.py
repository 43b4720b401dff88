"""`mpd-jax rewrite`: the responses of a file rewritten once, before any training, as TRD (2606.08432) makes its set.

Blocks of results are appended as they come, so that a start after a kill makes only what is missing. Not here: what a
rewrite is and which of them are kept (recipe/).
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mpd_jax import build, files, trees
from mpd_jax.config import RunConfig
from mpd_jax.data.chat import CLOSE, OPEN, Chat
from mpd_jax.data.problems import read_file
from mpd_jax.data.rows import FIELDS
from mpd_jax.eval.grade import GraderPool
from mpd_jax.recipe.write import DatasetWriter, WriteConfig
from mpd_jax.roles import Roles, open_roles
from mpd_jax.rollouts import make_rewriter
from mpd_jax.samplers import rewriting_sampler
from mpd_jax.sampling.jax_sampler import JaxSampler
from mpd_jax.sampling.sampler import Sampler
from mpd_jax.screen import Screen
from mpd_jax.serving import Secrets, Serving, unproved
from mpd_jax.sharding import make_mesh
from mpd_jax.train.records import GZIP, read_trajectories
from mpd_jax.types import Problem, Trajectory, UserError

ROUNDS = 4  # a block is so many times as many responses as are made side by side; between blocks places stay empty
Line = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """What is one line of the output. id: the problem's, and the attempt if it is not the first. text: the original."""

    id: str
    problem: Problem
    original: Trajectory
    text: str


def rewrite(source: Path, out: Path, settings: RunConfig, secrets: Secrets = lambda name: None) -> dict[str, Any]:
    """Rewrites what `source` holds and `out` does not yet; returns the summary of all of `out`."""
    if settings.recipe.rewrite.how == "nobody":
        raise UserError("recipe.rewrite.how: nobody rewrites nothing; set compress, repair or another")
    # Drafts come of a file, so that no writer's longest response bounds them.
    recipe = settings.recipe
    settings = dataclasses.replace(settings, recipe=dataclasses.replace(recipe, write=WriteConfig(by="dataset")))
    screen, roles = Screen(), open_roles(settings)
    items, columns = read_items(source, settings, roles.student.chat), dict(settings.problems.columns or {})
    build.require_what_is_read(recipe, [item.problem for item in items])
    named = {field: columns.get(field, field) for field in FIELDS}
    made_with = _made_with(source, settings, roles)
    with _opened(out, made_with) as file:
        lines = _lines(out, file)
        done = {str(line[named["id"]]) for line in lines}
        todo = [item for item in items if item.id not in done]
        if lines:
            screen.say(f"{out}: {len(lines):,} of {len(items):,} are there already")
        spilled = files.path(f"{out}.unfinished")
        with GraderPool(settings.recipe.rewrite.grader, workers=1) as graders:
            if todo:
                sampler = answering(settings, roles, spilled, json.dumps(made_with), screen, secrets)
                rewriter = make_rewriter(settings, roles, sampler, graders)
                with screen.bar("rewriting", len(items)) as advance:
                    for block in blocks(todo, settings, roles):
                        first = len(lines)
                        originals = [item.original for item in block]
                        problems = [item.problem for item in block]
                        rewrites = rewriter(problems, originals, 0, progress=lambda n, first=first: advance(first + n))
                        lines += _append(file, block, rewrites, roles.student.chat, graders, named)
                        advance(len(lines))
            summary = summarise(lines, graders.grader)
    shutil.rmtree(spilled, ignore_errors=True)
    return summary


def answering(
    settings: RunConfig, roles: Roles, spilled: files.AnyPath, made_with: str, screen: Screen, secrets: Secrets
) -> Sampler | None:
    """The sampler of the model that rewrites, if one does, with its weights. spilled: where answers of servers wait,
    to be used under the same `made_with` alone."""
    held = roles.rewriter
    if held is None:
        return None
    mesh = make_mesh(settings.mesh)
    serving = Serving(settings, spilled, made_with, secrets=secrets, say=screen.say, progress=screen.bar)
    sampler = rewriting_sampler(settings, roles, mesh, serving.sampler)
    if not isinstance(sampler, JaxSampler):
        screen.say(unproved(held))
        sampler.load(None, 0)
        return sampler
    screen.say(f"{held.key}: loading {held.directory}")
    sampler.load(held.trains.over(held.base(mesh), held.start(mesh, settings.run.seed)), 0)
    return sampler


def blocks(items: Sequence[Item], settings: RunConfig, roles: Roles) -> Iterator[Sequence[Item]]:
    served = roles.rewriter is not None and roles.rewriter.serve
    size = ROUNDS * (settings.sampling.server.concurrency if served else settings.sampling.slots)
    return (items[at : at + size] for at in range(0, len(items), size))


# What is read


def read_items(source: Path, settings: RunConfig, chat: Chat) -> list[Item]:
    """The problems of a file with their responses, or the trajectories of a step of a run. chat is the student's."""
    data = files.read(source) or b""
    if data.startswith(GZIP) or (
        (head := _json(data.partition(b"\n")[0])) and {"step", "stage", "count"} <= head.keys()
    ):
        return _of_a_run(source, settings, chat)
    problems = read_file(source, settings.problems.columns)
    for problem in problems:
        if not (problem.response or "").strip():
            raise UserError(
                f"{source}: problem {problem.id!r} has no response to rewrite; name the column of responses in "
                "problems.columns.response, or leave the problem out"
            )
    originals = DatasetWriter(chat)(problems, 0)
    return [Item(p.id, p, t, p.response or "") for p, t in zip(problems, originals, strict=True)]


def _of_a_run(source: Path, settings: RunConfig, chat: Chat) -> list[Item]:
    try:
        _, trajectories = read_trajectories(source)
    except ValueError:
        raise UserError(f"{source}: the trajectories of a run, damaged; choose another step") from None
    problems = {problem.id: problem for problem in build.read_problems(settings.problems, "train")}
    items = []
    for original in (t.original or t for t in trajectories):
        problem, attempt = problems.get(original.problem_id), original.attempt
        if problem is None or original.prompt != chat.prompt("plain", problem):
            raise UserError(
                f"{source}: problem {original.problem_id!r} of a run with other problems, another student or another "
                "wording; give the config of that run"
            )
        name = f"{problem.id}:{attempt}" if attempt else problem.id
        items.append(Item(name, problem, original, text_of(chat, original)))
    return items


def _json(line: bytes) -> Line | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


# What is written


def text_of(chat: Chat, trajectory: Trajectory) -> str:
    """A response as text, its reasoning in <think> tags; where it was cut the second tag is missing."""
    parts = chat.split(trajectory.response)
    if parts.reasoning is None:
        return chat.decode(parts.answer)
    reasoning = f"{OPEN}\n{chat.decode(parts.reasoning)}\n"
    return f"{reasoning}{CLOSE}\n\n{chat.decode(parts.answer)}" if parts.closed else reasoning


@contextmanager
def _opened(out: Path, made_with: Line) -> Iterator[BinaryIO]:
    """`out` to be appended to, by this process alone. UserError if it was made with other settings than these."""
    head = out.with_name(f"{out.name}.meta.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing it; wait for it, or choose another file") from None
        if file.tell() == 0:
            files.write_atomically(head, json.dumps(made_with, indent=2) + "\n")
        there = _json(files.read(head) or b"")
        if there is None:
            raise UserError(f"{out}: it exists, and {head.name} beside it does not say how it was made; choose another")
        if changed := trees.apart(made_with, there):
            raise UserError(
                f"{out}: it was made with other settings ({changed}); choose another file, or restore "
                "these values to go on"
            )
        yield file


def _made_with(source: Path, settings: RunConfig, roles: Roles) -> Line:
    """Whatever the lines depend on."""
    models = {"student", *([roles.rewriter.key] if roles.rewriter else [])}
    decides = (
        *models,
        "recipe.rewrite",
        f"recipe.contexts.{settings.recipe.rewrite.how}",
        "sampling.rewriter",
        "train.max_length",
        "sampling.prompt_tokens",
        "sampling.server.seed",
        "problems.columns",
        "run.seed",
    )
    free = [f"{model}.{how}" for model in models for how in ("remat", "attention", "serve")]
    flat = trees.flat(dataclasses.asdict(settings))
    found = {key: value for key, value in flat.items() if trees.under(key, decides) and not trees.under(key, free)}
    digest = hashlib.blake2b(files.read(source) or b"", digest_size=8).hexdigest()
    return {"input": digest, **json.loads(json.dumps(found))}


def _lines(out: Path, file: BinaryIO) -> list[Line]:
    """The lines that are there. One that a kill cut short is taken off the file."""
    data = files.read(out) or b""
    whole = data[: data.rfind(b"\n") + 1]
    os.ftruncate(file.fileno(), len(whole))
    lines = [_json(line) for line in whole.split(b"\n")[:-1]]
    for number, line in enumerate(lines, start=1):
        if line is None:
            raise UserError(f"{out}, line {number}: no JSON object; take the line out, and what it held is made again")
    return [line for line in lines if line is not None]


def _append(
    file: BinaryIO,
    block: Sequence[Item],
    rewrites: Sequence[Trajectory],
    chat: Chat,
    graders: GraderPool,
    named: Mapping[str, str],
) -> list[Line]:
    """Adds a block to the file, on the disk before it returns."""
    answered = [(item, t) for item, t in zip(block, rewrites, strict=True) if item.problem.answer is not None]
    pairs = [(chat.answer_text(x.response), i.problem.answer or "") for i, t in answered for x in (i.original, t)]
    right = [grade.correct for grade in graders.grade_many(pairs)]
    graded = {item.id: right[2 * at : 2 * at + 2] for at, (item, _) in enumerate(answered)}
    lines = [line_of(i, t, chat, graded.get(i.id), named) for i, t in zip(block, rewrites, strict=True)]
    file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())
    return lines


def line_of(item: Item, t: Trajectory, chat: Chat, right: Sequence[bool] | None, named: Mapping[str, str]) -> Line:
    """A line of the output: a problem under the names of its columns, `response` the rewrite unless it was given up,
    and what became of the original. A fallback to an original that was cut is given up, for a text cannot say so."""
    problem, original = item.problem, item.original
    dropped = t.dropped or not chat.split(t.response).closed or t.ended == "cut"
    before, after = len(original.response), len(t.response)
    found = {"original": item.text, "verdict": t.verdict, "dropped": dropped or None, "tokens_before": before}
    if not dropped:
        found |= {"tokens_after": after, "ratio": after / before if before else None}
    found["trimmed"] = t.trimmed or None
    found["student_step"] = original.version if original.writer == "student" else None
    if right is not None:
        found |= {"right_before": right[0], "right_after": None if dropped else right[1]}
    fields = {"id": item.id, "question": problem.question, "answer": problem.answer}
    fields |= {} if dropped else {"response": text_of(chat, t)}
    line = {named[field]: value for field, value in fields.items()}
    return line | {name: value for name, value in found.items() if value is not None}


def summarise(lines: Sequence[Line], grader: str) -> dict[str, Any]:
    """Of all lines. Shares that are right are of those with a reference answer; *_kept: of those that were not given
    up alone."""
    kept = [line for line in lines if not line.get("dropped")]
    before, after = (sum(line[f"tokens_{when}"] for line in kept) for when in ("before", "after"))
    return {
        "problems": len(lines),
        "kept": len(kept),
        "verdicts": dict(sorted(Counter(line["verdict"] for line in lines).items())),
        "trimmed": sum("trimmed" in line for line in lines),
        "mean_tokens_before": _mean([line["tokens_before"] for line in lines]),
        "mean_tokens_before_kept": _mean([line["tokens_before"] for line in kept]),
        "mean_tokens_after": _mean([line["tokens_after"] for line in kept]),
        "compression_ratio": after / before if before else None,
        "right_before": _mean([line["right_before"] for line in lines if "right_before" in line]),
        "right_before_kept": _mean([line["right_before"] for line in kept if "right_before" in line]),
        "right_after": _mean([line["right_after"] for line in kept if "right_after" in line]),
        "grader": grader,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
