"""Single problems with all that was answered to them: the original, its rewrite, the trained student's answer.

Problems that were trained on have the original and the rewrite from a run's trajectories, and the trained student's
answer from the evaluation that the run makes of its first ones. Held-out problems are never rewritten: of them there is
the untrained student's answer and the trained one's.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Literal

from mpd_jax import build
from mpd_jax.data.chat import Chat
from mpd_jax.eval.grade import GraderPool
from mpd_jax.eval.samples import Sample
from mpd_jax.report.gather import RunFiles
from mpd_jax.roles import open_model
from mpd_jax.run import EXAMPLES
from mpd_jax.train.records import read_trajectories
from mpd_jax.types import Problem, Trajectory, UserError

TRAINING, HELD_OUT = "trained on", "held out"
CANDIDATES = 240  # of each kind; a report shows as many as fit
LONGEST = 24_000  # characters of one text
EXACT = 1_000  # words up to which a difference is the smallest there is; above it common words are passed over
UNKNOWN = "not known"

Pieces = tuple[tuple[bool, str], ...]  # a text cut up: (whether the piece is in this text alone, text)


@dataclass(frozen=True)
class Answer:
    """One response as text. pieces: the text, with what the other has not; left_out: characters that are not shown."""

    title: str
    text: str
    tokens: int
    ended: str
    correct: bool | None
    pieces: Pieces = ()
    left_out: int = 0


@dataclass(frozen=True)
class Example:
    """A row of the browser. Any of the answers may be missing."""

    source: str
    problem_id: str
    problem: str
    reference: str
    level: str
    verdict: str
    original: Answer | None
    rewrite: Answer | None
    trained: Answer | None

    @property
    def change(self) -> str:
        """Of correctness, from the original to the trained student's answer."""
        before, after = (a.correct if a else None for a in (self.original, self.trained))
        if before is None or after is None:
            return UNKNOWN
        return f"{_word(before)} → {_word(after)}" if before != after else f"{_word(before)} before and after"

    @property
    def answers(self) -> list[Answer]:
        return [answer for answer in (self.original, self.rewrite, self.trained) if answer is not None]


def _word(correct: bool) -> str:
    return "right" if correct else "wrong"


def examples_of(run: RunFiles, advance: Callable[[int], None] = lambda done: None) -> list[Example]:
    """Every candidate, those first that should be seen first. Says in `run.missing` what texts there are not."""
    held_out, (chat, trajectories) = _held_out_pairs(run), _trajectories(run)
    problems = _problems(run, "heldout", {s.problem_id for s, _ in held_out})
    problems |= _problems(run, "train", {t.problem_id for t in trajectories})
    training = _training(run, chat, trajectories, problems) if chat else []
    made = _alternating([*training, *(_held_out(pair, problems) for pair in held_out)])
    compared = []
    for number, example in enumerate(made, start=1):
        compared.append(_compared(example))
        advance(number)
    return compared


# Held-out problems


def _held_out_pairs(run: RunFiles) -> list[tuple[Sample, Sample | None]]:
    """The untrained student's samples at the headline's place, each with the trained one's of the same draw."""
    before, after = (
        {(s.problem_id, s.attempt): s for s in run.samples_of(m)}
        for m in (run.before(run.headline), run.after(run.headline))
    )
    return [(sample, after.get(key)) for key, sample in list(before.items())[:CANDIDATES]]


def _held_out(pair: tuple[Sample, Sample | None], problems: Mapping[str, Problem]) -> Example:
    before, after = pair
    problem = problems.get(before.problem_id)
    return Example(
        source=HELD_OUT,
        problem_id=before.problem_id,
        problem=problem.question if problem else "",
        reference=before.reference,
        level=before.level or (problem.level if problem else None) or "",
        verdict="",
        original=_answered("original by the untrained student", before),
        rewrite=None,
        trained=_trained(after),
    )


def _trained(s: Sample | None) -> Answer | None:
    return _answered(f"trained student, step {s.name.rpartition('step ')[2]}" if s else "", s)


def _answered(title: str, s: Sample | None) -> Answer | None:
    return None if s is None else Answer(title, s.text, int(s.tokens), s.ended, s.correct if s.grader else None)


# Problems that were trained on


def _trajectories(run: RunFiles) -> tuple[Chat | None, list[Trajectory]]:
    """Of the first steps: there the student that writes is the untrained one, or nearly. And what reads their ids."""
    if not run.trajectories or run.config is None:
        return None, []
    try:
        chat = open_model("student", run.config.student, run.config.recipe.contexts, weights=False).chat
    except (UserError, OSError) as error:
        run.missing.append(f"trajectories/: ids without text, for the student's tokenizer cannot be read ({error})")
        return None, []
    made: dict[tuple[str, int], Trajectory] = {}
    known = range(chat.vocab_size)
    for path in run.trajectories:
        try:
            for t in read_trajectories(path)[1]:
                if not all(i in known for part in (t, t.original or t) for i in (*part.prompt, *part.response)):
                    raise ValueError("ids that the student's tokenizer has not")
                made.setdefault((t.problem_id, t.attempt), t)
        except ValueError as error:
            run.missing.append(f"trajectories/{path.name}: left out of the examples: {error}")
        if len(made) >= CANDIDATES:
            break
    return chat, list(made.values())[:CANDIDATES]


def _problems(run: RunFiles, split: Literal["train", "heldout"], ids: Set[str]) -> dict[str, Problem]:
    """Of the run's problems those with these ids."""
    if not ids or run.config is None:
        return {}
    try:
        return {problem.id: problem for problem in build.read_problems(run.config.problems, split) if problem.id in ids}
    except (UserError, OSError) as error:
        run.missing.append(f"problems.{split}: questions are left out or shown as prompts, for {error}")
        return {}


def _training(
    run: RunFiles, chat: Chat, trajectories: Sequence[Trajectory], problems: Mapping[str, Problem]
) -> list[Example]:
    trained = {s.problem_id: s for group in run.samples.values() for s in group if s.name.startswith(EXAMPLES)}
    if not trained:
        run.missing.append(
            "evaluations/: the trained student's answers to problems that were trained on are not there; "
            "`mpd-jax train` asks for them when it is run to its end"
        )
    references = {t.problem_id: _reference(problems.get(t.problem_id), trained.get(t.problem_id)) for t in trajectories}
    right = _graded(run, chat, [(t, references[t.problem_id]) for t in trajectories if references[t.problem_id]])
    return [
        _example(
            t, chat, trained.get(t.problem_id), problems.get(t.problem_id), references[t.problem_id], right.get(id(t))
        )
        for t in trajectories
    ]


def _graded(run: RunFiles, chat: Chat, known: Sequence[tuple[Trajectory, str]]) -> dict[int, tuple[bool, bool]]:
    """Whether original and rewrite are right, by id of the trajectory. known: with their references."""
    grader = run.config.eval.grader if run.config else "rules"
    originals = [(chat.answer_text((t.original or t).response), reference) for t, reference in known]
    rewrites = [(chat.answer_text(t.response), reference) for t, reference in known]
    try:
        with GraderPool(grader) as pool:
            grades = zip(known, pool.grade_many(originals), pool.grade_many(rewrites), strict=True)
            return {id(t): (a.correct, b.correct) for (t, _), a, b in grades}
    except UserError as error:
        run.missing.append(f"eval.grader: what is right among texts of training is not known, for {error}")
        return {}


def _reference(problem: Problem | None, sample: Sample | None) -> str:
    return sample.reference if sample else (problem.answer or "") if problem else ""


def _example(
    t: Trajectory,
    chat: Chat,
    trained: Sample | None,
    problem: Problem | None,
    reference: str,
    right: tuple[bool, bool] | None,
) -> Example:
    first = t.original or t
    original_right, rewrite_right = right or (None, None)
    by = "the untrained student" if (first.writer, first.version) == ("student", 0) else f"the {first.writer}"
    by += f", after {first.version} updates" if first.writer == "student" and first.version else ""
    rewrite = None
    if t.original is not None:
        rewrite = Answer(f"rewrite by the {t.writer}", chat.decode(t.response), len(t.response), t.ended, rewrite_right)
    return Example(
        source=TRAINING,
        problem_id=t.problem_id,
        problem=problem.question if problem else chat.text(t.prompt),
        reference=reference,
        level=(problem.level if problem else None) or (trained.level if trained else None) or "",
        verdict=t.verdict,
        original=Answer(
            f"original by {by}", chat.decode(first.response), len(first.response), first.ended, original_right
        ),
        rewrite=rewrite,
        trained=_trained(trained),
    )


# What is seen first, and what differs


def _alternating(examples: Iterable[Example]) -> list[Example]:
    """One of each kind in turn, so that a filter finds some of all there are; first those with the most answers."""
    groups: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.source, example.verdict, example.change, example.level), []).append(example)
    in_order = sorted(groups.values(), key=lambda group: -max(len(example.answers) for example in group))
    return [example for turn in zip_longest(*in_order) for example in turn if example is not None]


def _compared(example: Example) -> Example:
    """Marked are: in the original what the next answer has not, in the others what the original has not."""
    original = example.original
    if original is None:
        return example
    made: dict[str, Answer] = {}
    for name in ("rewrite", "trained"):
        other: Answer | None = getattr(example, name)
        if other is not None:
            ours, theirs = difference(original.text[:LONGEST], other.text[:LONGEST])
            made[name] = _cut(other, theirs)
            made.setdefault("original", _cut(original, ours))
    whole = ((False, original.text[:LONGEST]),)
    return replace(example, **{"original": _cut(original, whole), **made})


def _cut(answer: Answer, pieces: Pieces) -> Answer:
    return replace(answer, pieces=pieces, left_out=max(0, len(answer.text) - LONGEST))


def difference(a: str, b: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, word by word: (True, text) is what the other one has not at that place."""
    words_a, words_b = (re.findall(r"\s*\S+|\s+$", text) for text in (a, b))
    long = max(len(words_a), len(words_b)) > EXACT
    matcher = SequenceMatcher(None, *([w.strip() for w in words] for words in (words_a, words_b)), autojunk=long)
    ours, theirs = [], []
    for kind, a_from, a_to, b_from, b_to in matcher.get_opcodes():
        ours.append((kind != "equal", "".join(words_a[a_from:a_to])))
        theirs.append((kind != "equal", "".join(words_b[b_from:b_to])))
    return tuple(filter(_text_of, ours)), tuple(filter(_text_of, theirs))


def _text_of(piece: tuple[bool, str]) -> str:
    return piece[1]
