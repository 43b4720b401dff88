"""Keep rules: which texts are trained on, and what takes the place of the others.

MPD (2605.08776) filters nothing; the rules are ours, off by default. A rule is a function of a `Case`; a new one is
written anywhere and named by its import path in recipe.rewrite.keep (README), or here in `RULES`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mpd_jax.data.chat import Chat
from mpd_jax.eval import grade
from mpd_jax.named import named
from mpd_jax.types import Problem, Trajectory, UserError

# Verdicts. Every trajectory of a rewriter carries one; without a rewriter only what a rule turned down.
KEPT = "kept"
TOO_LONG = "too_long"  # the rewriting prompt and the rewrite do not fit the rewriter's window
UNFINISHED = "unfinished"  # the rewrite was cut off, or nothing followed the rewriter's own thinking
MALFORMED = "malformed"  # no delimiter line, a cut inside a token, no reasoning, or special tokens in the text
NO_ANSWER = "no_answer"  # the rewrite marks no answer although the problem or the original has one
ORIGINAL_UNFINISHED = "original_unfinished"  # keep rule `finished`
LONGER = "longer"  # keep rule `shorter`: not fewer tokens than the original
ANSWER_CHANGED = "answer_changed"  # keep rule `same_answer`; also where the original has no answer
ORIGINAL_WRONG = "original_wrong"  # keep rule `original_correct`
WRONG = "wrong"  # keep rule `correct`, and no right step for earliest_correct_prefix to end at
VERDICTS = (KEPT, TOO_LONG, UNFINISHED, MALFORMED, NO_ANSWER, ORIGINAL_UNFINISHED, ORIGINAL_WRONG, LONGER)
VERDICTS += (ANSWER_CHANGED, WRONG)


@dataclass(frozen=True)
class Case:
    """What a rule looks at. rewrite: the text that would be trained on; without a rewriter the original itself.

    chat is the student's: its `split` and `answer_text` read the ids of both. correct: the recipe's grader.
    """

    problem: Problem
    original: Trajectory
    rewrite: Trajectory
    chat: Chat
    correct: Callable[[str, str], bool]

    @property
    def answers(self) -> tuple[str, str]:
        """The text after the reasoning, of the original and of the rewrite."""
        return self.chat.answer_text(self.original.response), self.chat.answer_text(self.rewrite.response)


Rule = Callable[[Case], bool]


def finished(case: Case) -> bool:
    """The original ended by itself, its reasoning closed. Asked before a rewrite is."""
    return has_finished(case.chat, case.original)


def original_correct(case: Case) -> bool:
    """The original gives the reference answer, by recipe.rewrite.grader (Compress-Distill). Asked before a rewrite."""
    return case.correct(case.answers[0], reference(case.problem))


def shorter(case: Case) -> bool:
    """Fewer tokens than the original."""
    return len(case.rewrite.response) < len(case.original.response)


def same_answer(case: Case) -> bool:
    """The original's answer, by plain rules."""
    return grade.same_answer(*case.answers)


def correct(case: Case) -> bool:
    """The reference answer, by recipe.rewrite.grader."""
    return case.correct(case.answers[1], reference(case.problem))


# By name: the rule, and the verdict on what it turns down.
RULES: dict[str, tuple[Rule, str]] = {
    "finished": (finished, ORIGINAL_UNFINISHED),
    "original_correct": (original_correct, ORIGINAL_WRONG),
    "shorter": (shorter, LONGER),
    "same_answer": (same_answer, ANSWER_CHANGED),
    "correct": (correct, WRONG),
}
BEFORE = ("finished", "original_correct")  # those that need no rewrite
GRADED = ("original_correct", "correct")  # those that need reference answers


def rule(name: str) -> tuple[Rule, str]:
    """The rule of that name or import path, and the verdict on what it turns down: not_NAME for one's own."""
    found = named("recipe.rewrite.keep", name, {each: holds for each, (holds, _) in RULES.items()})
    return (found, RULES[name][1]) if name in RULES else (found, f"not_{name.rpartition(':')[2]}")


def rules_correct(answer_text: str, reference: str) -> bool:
    return grade.grade(answer_text, reference).correct


def reference(problem: Problem) -> str:
    """The reference answer, for `GRADED` and earliest_correct_prefix; UserError where there is none."""
    if problem.answer is None:
        raise UserError(
            f"recipe.rewrite: problem {problem.id!r} has no reference answer, and the rules {' and '.join(GRADED)} and "
            "how=earliest_correct_prefix need one; name their column in problems.columns.answer, or do without them"
        )
    return problem.answer


def has_finished(chat: Chat, original: Trajectory) -> bool:
    return original.ended != "cut" and chat.split(original.response).closed


@dataclass(frozen=True)
class Judge:
    """The keep rules, applied to an original and what became of it. chat is the student's."""

    chat: Chat
    keep: Sequence[str]
    fallback: Literal["drop", "original"]
    correct: Callable[[str, str], bool] = rules_correct

    def before(self, problem: Problem, original: Trajectory) -> str | None:
        """The verdict that needs no rewrite, or None."""
        case = Case(problem, original, original, self.chat, self.correct)
        verdict = self.by_rules(case, [name for name in self.keep if name in BEFORE])
        return None if verdict == KEPT else verdict

    def after(self, problem: Problem, original: Trajectory, rewrite: Trajectory) -> str:
        """The verdict on a well-formed rewrite: of the first rule, in the order of the config, that turns it down."""
        case = Case(problem, original, rewrite, self.chat, self.correct)
        old, new = case.answers
        expected = problem.answer is not None or grade.extract_answer(old) is not None
        if expected and grade.extract_answer(new) is None:
            return NO_ANSWER
        return self.by_rules(case, [name for name in self.keep if name not in BEFORE])

    def by_rules(self, case: Case, names: Sequence[str]) -> str:
        """KEPT, or the verdict of the first rule that turns the case down."""
        for holds, verdict in map(rule, names):
            if not holds(case):
                return verdict
        return KEPT

    def settle(self, rewrite: Trajectory) -> Trajectory:
        """What a rewrite becomes by its verdict: itself, its original, or a dropped record."""
        if rewrite.verdict == KEPT:
            return rewrite
        if self.fallback == "drop":
            return replace(rewrite, dropped=True)
        assert rewrite.original is not None, "a rewrite without its original"
        return replace(rewrite.original, verdict=rewrite.verdict)
