"""A step's trajectories: from disk where a run that was killed had come that far, else written, rewritten and scored.

Whatever is made is on disk before anyone uses it.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mpd_jax.train.records import Records
from mpd_jax.train.state import Memory
from mpd_jax.types import Problem, Trajectory

Begin = Callable[[int, str], None]  # told the step and the phase that begins
Score = Callable[[Sequence[Problem], Sequence[Trajectory], int], Sequence[Trajectory]]


@dataclass(frozen=True)
class Making:
    """Who makes them, and how old what they use may be: fields as those of the loop's `Parts`."""

    write: Callable[[Sequence[Problem], int, Memory], Sequence[Trajectory]]
    rewrite: Callable[[Sequence[Problem], Sequence[Trajectory], int, Memory], Sequence[Trajectory]]
    score: Score | None
    records: Records
    lookahead: int
    max_age: int

    def made(self, step: int, problems: Sequence[Problem], memory: Memory, begin: Begin) -> Sequence[Trajectory]:
        """A step's trajectories; they are on disk before anyone uses them."""
        rollbacks = int(memory["rollbacks"])
        begin(step, "write")
        again = self.again(step, problems)
        new = [problem for problem in problems if problem.id not in again]
        written = self.stored(step, problems, "written", memory)
        if written is None or {t.problem_id for t in written} != {problem.id for problem in new}:
            written = self.write(new, step, memory) if new else []
            self.records.save(step, written, stage="written", rollbacks=rollbacks)
        begin(step, "rewrite")
        final = joined(problems, again, self.rewrite(new, written, step, memory) if new else [])
        self.records.save(step, final, rollbacks=rollbacks)
        return self.scored(step, problems, final, begin)

    def scored(
        self,
        step: int,
        problems: Sequence[Problem],
        trajectories: Sequence[Trajectory],
        begin: Begin,
    ) -> Sequence[Trajectory]:
        if self.score is None:
            return trajectories
        begin(step, "score")
        return self.score(problems, trajectories, step)

    def stored(self, step: int, problems: Sequence[Problem], stage: str, memory: Memory) -> Sequence[Trajectory] | None:
        """From disk, unless weights older than the look-ahead allows wrote them, or than max_age what is used again, or
        before a rollback."""
        found = self.records.load(step, problems, stage=stage, rollbacks=int(memory["rollbacks"]))
        allowed = ((t, self.max_age if t.reused else self.lookahead) for t in found or ())
        return None if any(staleness(step, [t]) > age for t, age in allowed) else found

    def again(self, step: int, problems: Sequence[Problem]) -> dict[str, list[Trajectory]]:
        """By problem what an earlier step left of it, where it may be used again. Only what is on disk of the steps
        before this one decides, so that a resumed run finds the same."""
        max_age, found = self.max_age, defaultdict[str, list[Trajectory]](list)
        for t in self.records.latest(step, problems, max_age) if max_age else ():
            found[t.problem_id].append(replace(t, reused=True))
        return {
            problem: each
            for problem, each in found.items()
            if staleness(step, each) <= max_age and not any(t.dropped for t in each)
        }


def joined(
    problems: Sequence[Problem], again: Mapping[str, Sequence[Trajectory]], made: Sequence[Trajectory]
) -> Sequence[Trajectory]:
    """Those that are used again and those that were made, in the order of the problems."""
    if not again:
        return made
    of = {problem: list(each) for problem, each in again.items()}
    for t in made:
        of.setdefault(t.problem_id, []).append(t)
    return [t for problem in problems for t in of[problem.id]]


def staleness(step: int, trajectories: Sequence[Trajectory]) -> int:
    """By how many updates the oldest weights that the student wrote or rewrote with lie behind the step's."""
    voices = [voice for t in trajectories for voice in (t, t.original) if voice is not None]
    return max((step - voice.version for voice in voices if voice.writer == "student"), default=0)
