"""Seeded generator of arithmetic stories with two or three steps keyed by weekday, and the traces that solve them.

A story is its skeleton (start, then operations) in words. A stable hash of the skeleton alone decides whether it is a
training or a held-out problem, so no wording of a held-out chain of operations is ever trained on. A trace is a `Plan`
(which sentences to write) rendered over numbers: the same plan gives a draft with slips and its repaired twin.
"""

import hashlib
import random
from dataclasses import dataclass

from mpd_jax.types import Problem

DAYS = ("Mon", "Tue", "Wed")
NAMES = ("Leo", "Mia", "Sam", "Ana", "Tom", "Eva", "Ben", "Zoe", "Max", "Ivy", "Kim", "Noa")
ITEMS = ("coins", "books", "cards", "pens", "shells", "stamps", "eggs", "beads")
VERBS = {
    "+": ("finds {n} more", "buys {n} more", "gets {n} more"),
    "-": ("loses {n}", "sells {n}", "gives away {n}"),
    "*2": ("doubles the {items}",),
    "*3": ("triples the {items}",),
    "/2": ("gives away half",),
}
LARGEST = 50
HELDOUT_SHARE = 8

_INTROS = ("Okay, let me think step by step.", "Let me work through the days.", "Alright, I will take it slowly.")
_NOWS = ("So now {name} has {value} {items}.", "That makes {value} {items}.")
_ENDS = ("So the answer is {value}.", "So {name} has {value} {items} at the end.")


@dataclass(frozen=True)
class Step:
    """One operation on the running value: `symbol` is "+", "-", "*" or "/", `phrase` its words in the story."""

    symbol: str
    number: int
    phrase: str

    def apply(self, value: int) -> int:
        if self.symbol == "+":
            return value + self.number
        if self.symbol == "-":
            return value - self.number
        return value * self.number if self.symbol == "*" else value // self.number


@dataclass(frozen=True)
class Story:
    name: str
    items: str
    start: int
    steps: tuple[Step, ...]

    @property
    def skeleton(self) -> str:
        return str(self.start) + "".join(f" {step.symbol}{step.number}" for step in self.steps)

    @property
    def heldout(self) -> bool:
        return stable_hash(self.skeleton) % HELDOUT_SHARE == 0

    @property
    def question(self) -> str:
        days = " ".join(f"{day}: {self.name} {step.phrase}." for day, step in zip(DAYS, self.steps, strict=False))
        return f"{self.name} has {self.start} {self.items}. {days} How many {self.items} does {self.name} have now?"

    @property
    def values(self) -> tuple[int, ...]:
        """The running value after each step."""
        values, value = [], self.start
        for step in self.steps:
            value = step.apply(value)
            values.append(value)
        return tuple(values)

    @property
    def answer(self) -> int:
        return self.values[-1]


@dataclass(frozen=True)
class StepPlan:
    """Which optional sentences a step gets. `slip` is added to the first result written, 0 for none."""

    restate: bool
    check: bool
    now: int | None
    slip: int = 0


@dataclass(frozen=True)
class Plan:
    """Which optional sentences a trace gets: indices choose a wording, None leaves the sentence out."""

    intro: int | None
    begin: bool
    steps: tuple[StepPlan, ...]
    recap: bool
    end: int | None


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _draw_step(rng: random.Random, value: int, items: str) -> Step:
    while True:
        kind = rng.choices(tuple(VERBS), weights=(34, 32, 14, 8, 12))[0]
        number = rng.randint(2, 9) if kind in "+-" else int(kind[1])
        if kind == "/2" and value % 2:
            continue
        step = Step(kind[0], number, rng.choice(VERBS[kind]).format(n=number, items=items))
        if 1 <= step.apply(value) <= LARGEST:
            return step


def draw_story(rng: random.Random, heldout: bool) -> Story:
    """A story of the wanted split: others are drawn again."""
    while True:
        name, items, start = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(3, 20)
        value, steps = start, []
        for _ in range(rng.choices((2, 3), weights=(2, 3))[0]):
            steps.append(_draw_step(rng, value, items))
            value = steps[-1].apply(value)
        story = Story(name, items, start, tuple(steps))
        if story.heldout == heldout:
            return story


def draw_plan(rng: random.Random, steps: int, verbosity: float, slips: float = 0.0) -> Plan:
    """Each sentence is there with a probability of its own, scaled by `verbosity` (0 gives the concise style)."""

    def maybe(share: float, wordings: int = 1) -> int | None:
        return rng.randrange(wordings) if rng.random() < share * verbosity else None

    def step_plan() -> StepPlan:
        slip = rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < slips * verbosity else 0
        return StepPlan(maybe(1.0) is not None, maybe(0.6) is not None, maybe(0.75, len(_NOWS)), slip)

    return Plan(
        intro=maybe(1.0, len(_INTROS)),
        begin=maybe(1.0) is not None,
        steps=tuple(step_plan() for _ in range(steps)),
        recap=maybe(0.6) is not None,
        end=maybe(1.0, len(_ENDS)),
    )


CONCISE = Plan(None, False, tuple(StepPlan(False, False, None) for _ in DAYS), False, None)


def equation(value: int, step: Step, result: int | None = None) -> str:
    return f"{value}{step.symbol}{step.number}={step.apply(value) if result is None else result}"


def render(story: Story, plan: Plan, *, repaired: bool = True, slips: bool = True) -> tuple[str, int]:
    """(trace, its answer). A slip is noticed and put right at once, or with `repaired` False carried to the end.

    `slips` False writes the same sentences with right numbers throughout.
    """
    lines, value, seen = [], story.start, [story.start]
    words = {"name": story.name, "items": story.items}
    if plan.intro is not None:
        lines.append(_INTROS[plan.intro])
    if plan.begin:
        lines.append(f"{story.name} starts with {story.start} {story.items}.")
    for day, step, part in zip(DAYS, story.steps, plan.steps, strict=False):
        right = step.apply(value)
        wrong = right + part.slip
        slipped = slips and part.slip != 0 and 0 < wrong < 100
        result = wrong if slipped else right
        restated = f"{story.name} {step.phrase}, so " if part.restate else ""
        lines.append(f"{day}: {restated}{equation(value, step, result)}")
        if slipped and repaired:
            lines.append(f"Check: {equation(value, step)}, so {wrong} was wrong.")
            result = right
        elif part.check:
            lines.append(f"Check: {equation(value, step, result)}, yes.")
        if part.now is not None:
            lines.append(_NOWS[part.now].format(value=result, **words))
        value = result
        seen.append(value)
    if plan.recap:
        lines.append(f"Let me go over it: {', '.join(map(str, seen))}.")
    if plan.end is not None:
        lines.append(_ENDS[plan.end].format(value=value, **words))
    return "\n".join(lines), value


def box(value: int) -> str:
    return f"\\boxed{{{value}}}"


def response_text(trace: str, answer: int) -> str:
    """A response as the chat template writes an assistant turn, without the end token."""
    return f"<think>\n{trace}\n</think>\n\n{box(answer)}"


VERBOSITY = 0.85
SLIPS = 0.08


def to_problem(story: Story) -> Problem:
    """The worked response is verbose, and a function of the question alone."""
    code = stable_hash(story.question)
    plan = draw_plan(random.Random(code), len(story.steps), VERBOSITY, SLIPS)
    return Problem(f"tiny-{code:016x}", story.question, str(story.answer), response_text(*render(story, plan)))


def _problems(n: int, seed: int, heldout: bool) -> list[Problem]:
    rng = random.Random(f"{'heldout' if heldout else 'train'} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = to_problem(draw_story(rng, heldout))
        found.setdefault(problem.question, problem)
    return list(found.values())


def train_problems(n: int, seed: int) -> list[Problem]:
    """n different training problems, a function of (n, seed); the first m of n are those of (m, seed)."""
    return _problems(n, seed, heldout=False)


def heldout_problems(n: int, seed: int) -> list[Problem]:
    """n different held-out problems; their chains of operations occur in no training problem."""
    return _problems(n, seed, heldout=True)
