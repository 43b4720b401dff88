"""Documents under every context, as the two models are pretrained on them: prompt, response, loss weights.

`CONTEXTS` holds the wordings the models know; a run that uses others reads untrained behaviour.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from mpd_jax.tiny_world import generator as g
from mpd_jax.tiny_world.tokenizer import END, END_OF_TEXT, token_id

CONTEXTS = {
    "plain": "{question}",
    "concise": "Be brief. {question}",
    "concise_b": "{question} Keep the reasoning short.",
    "compress": "{question}\nDraft:\n{draft}\nRewrite the draft briefly.",
    "repair": "{question}\nDraft:\n{draft}\nFix the draft.",
    "privileged": "{question}\nSolution:\n{reference}\nNow solve it yourself.",
}
CUT = "####"
RESULT_WEIGHT = 3.0
PROMPT_WEIGHT = 0.05


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of documents, and how verbose plain and privileged traces are.

    concise_share: the part of plain traces that is concise throughout. With it at 0 every sentence is there or not
    independently of the others; above 0 a trace has a style, and its beginning tells how it goes on.
    """

    plain: float
    concise: float
    compress: float
    repair: float
    privileged: float
    equations: float
    concise_share: float
    slips: float = g.SLIPS


STUDENT_MIX = Mix(
    plain=0.42, concise=0.15, compress=0.10, repair=0.05, privileged=0.08, equations=0.2, concise_share=0.0
)
TEACHER_MIX = Mix(
    plain=0.33,
    concise=0.15,
    compress=0.22,
    repair=0.08,
    privileged=0.06,
    equations=0.16,
    concise_share=0.25,
    slips=0.03,
)


@dataclass(frozen=True)
class Document:
    """Token ids and, for each, its weight as a target."""

    ids: np.ndarray
    weights: np.ndarray


def prompt_text(content: str, thinking: bool = True) -> str:
    """What the chat template gives for one user message and the generation prompt."""
    closed = "" if thinking else "<think>\n\n</think>\n\n"
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{closed}"


def neutral(text: str) -> str:
    """A response quoted in a prompt: without its tags."""
    return text.replace("<think>", "").replace("</think>", "").strip()


def corrupt(rng: random.Random, story: g.Story) -> g.Story:
    """The story as a careless reader remembers it: another operand, start or operation, or a step left out."""
    kind, at = rng.randrange(4), rng.randrange(len(story.steps))
    steps = list(story.steps)
    if kind == 0:
        return replace(story, start=rng.randint(3, 20))
    if kind == 1 and len(steps) > 2:
        del steps[at]
    elif kind == 2 and steps[at].symbol in "+-":
        steps[at] = replace(steps[at], symbol="-" if steps[at].symbol == "+" else "+")
    else:
        steps[at] = replace(steps[at], number=rng.randint(2, 9))
    return replace(story, steps=tuple(steps))


def draw_draft(rng: random.Random, story: g.Story) -> tuple[str, g.Plan]:
    """A draft as a student writes it, and its plan: right, with unrepaired slips, misread, or cut off."""
    verbosity = rng.choice((g.VERBOSITY, g.VERBOSITY, g.VERBOSITY, 0.5, 0.0))
    plan = g.draw_plan(rng, len(story.steps), verbosity, g.SLIPS)
    kind, told, repaired = rng.random(), story, True
    if 0.55 < kind < 0.75:
        at = rng.randrange(len(plan.steps))
        steps = list(plan.steps)
        steps[at] = replace(steps[at], slip=rng.choice((-10, -3, -2, -1, 1, 2, 3, 10)))
        plan, repaired = replace(plan, steps=tuple(steps)), False
    elif kind >= 0.75:
        misread = corrupt(rng, story)
        if all(0 < value < 100 for value in misread.values) and not misread.heldout:
            told = misread
    trace, answer = g.render(told, plan, repaired=repaired)
    if rng.random() < 0.06:
        return neutral("<think>\n" + trace[: rng.randrange(len(trace) // 2, len(trace))]), plan
    blank = rng.choice(("\n\n\n", "\n\n\n", "\n\n", "\n"))
    return f"{trace}{blank}{g.box(answer)}", plan


def _rewrite(rng: random.Random, story: g.Story, context: str) -> tuple[str, str, bool]:
    """(user message, response, thinking) of a compress or repair document."""
    draft, plan = draw_draft(rng, story)
    trace, answer = g.render(story, plan if context == "repair" else g.CONCISE, slips=False)
    thinking = rng.random() < 0.5
    values = (story.start, *story.values)
    worked = "\n".join(g.equation(value, step) for value, step in zip(values, story.steps, strict=False))
    own = f"<think>\n{worked}\n</think>\n\n" if thinking else ""
    content = CONTEXTS[context].replace("{question}", story.question).replace("{draft}", draft)
    return content, f"{own}{trace}\n{CUT}\n{g.box(answer)}", thinking


def _answer(rng: random.Random, story: g.Story, context: str, mix: Mix) -> tuple[str, str, bool]:
    """(user message, response, thinking) of a plain, concise or privileged document."""
    content = CONTEXTS[context].replace("{question}", story.question)
    if context == "privileged":
        content = content.replace("{reference}", neutral(g.to_problem(story).response or ""))
    plan = g.CONCISE
    if not context.startswith("concise") and rng.random() >= mix.concise_share:
        plan = g.draw_plan(rng, len(story.steps), g.VERBOSITY, mix.slips)
    return content, g.response_text(*g.render(story, plan)), True


def equations_text(rng: random.Random) -> str:
    """Single facts, over every value a story can pass through."""
    lines = []
    while len(lines) < 10:
        value = rng.randint(1, g.LARGEST)
        step = g._draw_step(rng, value, "")
        lines.append(g.equation(value, step))
    return "\n".join(lines)


class Corpus:
    """Draws documents and encodes them."""

    def __init__(self, tokenizer: Tokenizer, mix: Mix):
        self.tokenizer, self.mix = tokenizer, mix
        ids = [token_id(tokenizer, str(digit)) for digit in range(10)]
        self.is_digit = np.zeros(tokenizer.get_vocab_size(), bool)
        self.is_digit[ids] = True
        self.equals = token_id(tokenizer, "=")
        self.box = token_id(tokenizer, "\\boxed{")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def result_digits(self, ids: np.ndarray) -> np.ndarray:
        """True at the digits that directly follow "=" or the opening of the box."""
        found = np.zeros(len(ids), bool)
        for i in range(1, len(ids)):
            found[i] = self.is_digit[ids[i]] and (ids[i - 1] in (self.equals, self.box) or found[i - 1])
        return found

    def weigh(self, prompt: np.ndarray, response: np.ndarray) -> Document:
        weights = np.where(self.result_digits(response), RESULT_WEIGHT, 1.0)
        ids = np.concatenate([prompt, response])
        return Document(ids, np.concatenate([np.full(len(prompt), PROMPT_WEIGHT), weights]).astype(np.float32))

    def draw(self, rng: random.Random) -> Document:
        """One document, of a training story only."""
        mix = self.mix
        kinds = ("plain", "concise", "compress", "repair", "privileged", "equations")
        kind = rng.choices(kinds, weights=[getattr(mix, kind) for kind in kinds])[0]
        if kind == "equations":
            return self.weigh(self.encode(END_OF_TEXT), self.encode(equations_text(rng) + END_OF_TEXT))
        story = g.draw_story(rng, heldout=False)
        if kind in ("compress", "repair"):
            content, response, thinking = _rewrite(rng, story, kind)
        else:
            context = rng.choice(("concise", "concise_b")) if kind == "concise" else kind
            content, response, thinking = _answer(rng, story, context, mix)
        return self.weigh(self.encode(prompt_text(content, thinking)), self.encode(response + END))


def tokenizer_texts(seed: int, n: int) -> Iterator[str]:
    """What the tokenizer is trained on: training stories with their traces and the contexts' wordings."""
    rng = random.Random(f"tokenizer {seed}")
    for _ in range(n):
        story = g.draw_story(rng, heldout=False)
        yield f"{story.question}\n{g.to_problem(story).response}"
        if rng.random() < 0.3:
            yield from (re.sub(r"{\w+}", "", text) for text in CONTEXTS.values())


Shape = tuple[int, int]
# (rows, length): about as many tokens each, so that no update is much noisier than another.
SHAPES: tuple[Shape, ...] = ((24, 96), (16, 144), (12, 192), (8, 256), (6, 336), (4, 512))


class Batches:
    """An endless stream of (tokens_BT, weights_BT): documents of like length together, each exactly once."""

    def __init__(self, draw: Callable[[random.Random], Document], seed: int, scale: float = 1.0):
        """`scale` multiplies the rows of every shape."""
        self.draw, self.rng = draw, random.Random(f"batches {seed}")
        self.shapes: tuple[Shape, ...] = tuple((int(rows * scale), length) for rows, length in SHAPES)
        self.waiting: dict[Shape, list[Document]] = {shape: [] for shape in self.shapes}

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            document = self.draw(self.rng)
            shape = next((shape for shape in self.shapes if len(document.ids) <= shape[1]), None)
            assert shape is not None, f"a document of {len(document.ids)} tokens fits no shape of {self.shapes}"
            self.waiting[shape].append(document)
            if len(self.waiting[shape]) == shape[0]:
                yield self._stack(self.waiting[shape], shape)
                self.waiting[shape] = []

    @staticmethod
    def _stack(documents: list[Document], shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, document in enumerate(documents):
            tokens[row, : len(document.ids)] = document.ids
            weights[row, : len(document.ids)] = document.weights
        return tokens, weights
