"""Prompts from problems, and responses taken apart and put together: all that a tokenizer and its template decide.

Sampled ids are never decoded and encoded again. Only two seams are written anew: the tags and line breaks between
reasoning, answer and end, which come from the model's own chat template, and the one token on each side of a seam,
because BPE merges punctuation with the line break that follows it. Text that is quoted inside a prompt cannot produce
a special token. Not here: which rewrite is kept (recipe/rewrite.py).
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mpd_jax.data.contexts import PLACEHOLDER, Contexts
from mpd_jax.types import Problem, UserError

Ids = tuple[int, ...]

DELIMITER = "####"
MARK = " >>> "  # where two prompts part
OPEN, CLOSE = "<think>", "</think>"
_DELIMITER_LINE = re.compile(rf"^[ \t]*({re.escape(DELIMITER)})[ \t]*\r?$", re.MULTILINE)
_BLANKS = " \t\r\n"
# Llama templates print today's date unless given one; a prompt must not depend on the day it is built.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Parts:
    """A response without its tags and end. reasoning is None where the model does not think in a span of its own;
    closed is False where a span was due and never ended, and then there is no answer."""

    reasoning: Ids | None
    answer: Ids
    closed: bool


@dataclass(frozen=True)
class _Seams:
    """The text before the reasoning, between reasoning and answer, and the ids after the answer, EOS last."""

    before: str
    middle: str
    end: Ids


class Chat:
    """One model's tokenizer and chat template.

    directory holds the tokenizer; eos_ids are the ids that end a response; thinking is the template's enable_thinking.
    """

    def __init__(self, directory: str | Path, eos_ids: Iterable[int], thinking: bool, contexts: Contexts):
        self._directory = directory
        self._tokenizer = _load_tokenizer(directory)
        self._fast = self._tokenizer.backend_tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.contexts = contexts
        self.thinking = thinking
        markup = {
            i: token.content
            for i, token in self._fast.get_added_tokens_decoder().items()
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))
        }
        self.markup_ids = frozenset(markup) | self.eos_ids
        longest_first = sorted(markup.values(), key=len, reverse=True)
        self._markup = re.compile("|".join(map(re.escape, longest_first))) if markup else None
        self._open_id, self._close_id = self._single_id(OPEN), self._single_id(CLOSE)
        prompt = self.encode(self._render([user("Q")]))
        # The template itself may open the span (thinking-only models) or close it (enable_thinking=False). One that
        # does neither ignores `thinking`, which then says what the model was made to do.
        self._prompt_opens = self._last(prompt, self._open_id) > self._last(prompt, self._close_id)
        closes = self._last(prompt, self._close_id) > self._last(prompt, self._open_id)
        tagged = self._open_id is not None and self._close_id is not None
        self.thinks = tagged and (self._prompt_opens or (thinking and not closes))
        self._seams = self._find_seams()

    # Text and ids

    def encode(self, text: str) -> Ids:
        """Ids of a text as it stands: special tokens spelt out in it become special tokens."""
        return tuple(self._fast.encode(text, add_special_tokens=False).ids)

    def encode_quoted(self, text: str) -> Ids:
        """Ids of a text from elsewhere, which cannot hold a special token."""
        return self.encode(self.neutralise(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, tags included, the final EOS left out."""
        return self.text(self._without_end(ids))

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, every one of them."""
        return self._fast.decode(list(ids), skip_special_tokens=False)

    def neutralise(self, text: str) -> str:
        """The text with a space put into whatever would be encoded as a special token or tag."""
        while self._markup is not None and self._markup.search(text):
            text = self._markup.sub(lambda match: f"{match[0][0]} {match[0][1:]}" if match[0][1:] else " ", text)
        return text

    def vocab_fingerprint(self) -> str:
        """Equal for two tokenizers exactly when every id means the same token in both."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return hashlib.blake2b(repr(sorted(self.tokens().items())).encode(), digest_size=16).hexdigest()

    def tokens(self) -> dict[int, str]:
        """The token of every id, as the tokenizer writes it."""
        return {i: token for token, i in self._fast.get_vocab(with_added_tokens=True).items()}

    @property
    def vocab_size(self) -> int:
        """The number of ids that stand for a token; a model's head may hold more rows, padding."""
        return max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end(self) -> Ids:
        """What this model's template writes after an answer, EOS last."""
        return self._seams.end

    @property
    def opening(self) -> Ids:
        """What an assembled response begins with, before its reasoning."""
        return self.encode(self._seams.before)

    @property
    def no_thoughts(self) -> Ids:
        """What an assembled response without any reasoning begins with, before its answer."""
        return self.encode(self._seams.before + self._seams.middle) if self.thinks else ()

    @property
    def closing(self) -> int | None:
        """The id that ends a thinking span, where there is one."""
        return self._close_id if self.thinks else None

    @property
    def delimiter(self) -> int:
        """The id that the line between a rewrite's reasoning and its answer begins with."""
        return next(i for i in self.encode(f"\n{DELIMITER}\n") if DELIMITER[0] in self.text((i,)))

    # Prompts

    def prompt(self, context: str, problem: Problem, draft: str | None = None) -> Ids:
        """The ids a model reads before it answers `problem` under `context`, generation prefix included."""
        return self.encode(self._render([user(self.message(context, problem, draft))]))

    def message(self, context: str, problem: Problem, draft: str | None = None) -> str:
        """What the user says in that prompt.

        Question, draft and reference are quoted: whatever they spell, no special token comes of it.
        """
        quoted = {"question": problem.question, "draft": draft, "reference": self._reference(problem)}

        def fill(match: re.Match[str]) -> str:
            text = quoted[match[1]]
            if text is None:
                raise UserError(
                    f"recipe.contexts.{context}: problem {problem.id!r} has no {match[1]} to fill in; "
                    f"use problems that have one, or leave {{{match[1]}}} out of the context"
                )
            return self.neutralise(text)

        return PLACEHOLDER.sub(fill, self.contexts.wording(context))

    def _reference(self, problem: Problem) -> str | None:
        if problem.response is None:
            return problem.answer
        return problem.response.replace(OPEN, "").replace(CLOSE, "").strip()

    def draft(self, response: Sequence[int]) -> str:
        """A response as text to be quoted: reasoning, a blank line, answer; without tags and end."""
        parts = self.split(response)
        pieces = (self.decode(ids).strip("\n") for ids in (parts.reasoning or (), parts.answer))
        return "\n\n".join(piece for piece in pieces if piece.strip())

    # Responses

    def split(self, response: Sequence[int]) -> Parts:
        """Reasoning and answer of a response. Their own ids, less the tags, the end and line breaks at the seams."""
        ids = self._without_end(response)
        if not self.thinks:
            return Parts(None, self._without_blanks(ids), True)
        if ids and not self._prompt_opens and self._open_id in ids:
            at = ids.index(self._open_id)
            if not self.decode(ids[:at]).strip():
                ids = ids[at + 1 :]
        if self._close_id not in ids:
            return Parts(self._without_blanks(ids), (), False)
        at = ids.index(self._close_id)
        return Parts(self._without_blanks(ids[:at]), self._without_blanks(ids[at + 1 :]), True)

    def answer_text(self, response: Sequence[int]) -> str:
        """The text after the reasoning: what a grader reads. Empty where the reasoning never ended."""
        return self.decode(self.split(response).answer)

    def assemble(self, reasoning: Sequence[int], answer: Sequence[int]) -> Ids:
        """A whole response, EOS last, as the model's chat template writes an assistant turn of these two parts."""
        return self.assemble_cut(reasoning, answer) + self.end

    def assemble_cut(self, reasoning: Sequence[int], answer: Sequence[int] | None) -> Ids:
        """The same without its end; with answer None, a response that was cut inside the reasoning."""
        seams, reasoning = self._seams, self._strip(reasoning)
        if answer is None:
            return self.encode(seams.before) + reasoning
        head = self.encode(seams.before) + self._join(reasoning, seams.middle) if reasoning else self.no_thoughts
        return head + self._strip(self._without_end(answer))

    def with_own_end(self, response: Ids) -> Ids:
        """A stopped response of another model with the same vocabulary, ended as this model ends its own."""
        return response if response[-1] in self.eos_ids else (*response[:-1], *self.end)

    # Rewrites: the model's own thinking, reasoning, a line that holds only ####, answer

    def own_thinking_is_open(self, response: Sequence[int]) -> bool:
        """Whether the response ends inside the model's own thinking, so that no rewrite has begun."""
        opened = self._last(tuple(response), self._open_id)
        closed = self._last(tuple(response), self._close_id)
        return self.thinks and closed < 0 and (self._prompt_opens or opened >= 0)

    def split_rewrite(self, response: Sequence[int]) -> tuple[Ids, Ids] | None:
        """(reasoning, answer) of a rewrite, or None where it is malformed.

        Malformed: not exactly one delimiter line, a token that holds delimiter and text together, special tokens or
        tags inside, or no reasoning. Everything up to the last </think> was the rewriter's own thinking.
        """
        if self.own_thinking_is_open(response):
            return None
        ids = self._without_end(response)
        ids = ids[self._last(ids, self._close_id) + 1 :]
        if self.markup_ids.intersection(ids):
            return None
        text = self.decode(ids)
        lines = list(_DELIMITER_LINE.finditer(text))
        if len(lines) != 1:
            return None
        start, end = lines[0].span(1)
        cut, after = self._tokens_before(ids, start), self.tokens_through(ids, end)
        if text[len(self.decode(ids[:cut])) : start].strip() or text[end : len(self.decode(ids[:after]))].strip():
            return None
        reasoning, answer = self._without_blanks(ids[:cut], _BLANKS), self._without_blanks(ids[after:], _BLANKS)
        return (reasoning, answer) if self.decode(reasoning).strip() else None

    def _tokens_before(self, ids: Sequence[int], chars: int) -> int:
        """How many whole tokens lie in the first `chars` characters of the text."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self.decode(ids[:middle])) <= chars else (low, middle - 1)
        return low

    def tokens_through(self, ids: Sequence[int], chars: int) -> int:
        """How many tokens it takes to cover the first `chars` characters of the text."""
        count = self._tokens_before(ids, chars)
        return count if len(self.decode(ids[:count])) == chars else count + 1

    # Seams

    def _find_seams(self) -> _Seams:
        """From the template, by rendering a turn whose parts can be found again; else in Qwen3's form."""
        reasoning, answer = "Reasoning qzr.", "Answer qza."
        before, middle = ("" if self._prompt_opens else f"{OPEN}\n", f"\n{CLOSE}\n\n") if self.thinks else ("", "\n\n")
        turns = [{"role": "assistant", "content": answer}]
        if self.thinks:
            turns.insert(0, {"role": "assistant", "content": f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{answer}"})
            turns.insert(0, {"role": "assistant", "content": answer, "reasoning_content": reasoning})
        prefix, after = self._render([user("Q")]), ""
        for turn in turns:
            whole = self._render([user("Q"), turn], generate=False)
            if answer not in whole:
                continue
            after = after or whole.partition(answer)[2]
            rest = whole.removeprefix(prefix)
            if rest == whole or reasoning not in rest or CLOSE not in rest:
                continue
            before, _, rest = rest.partition(reasoning)
            middle, _, after = rest.partition(answer)
            break
        return _Seams(before, middle, self._end(after))

    def _end(self, after: str) -> Ids:
        """What the template writes after an answer, up to the EOS; the bare EOS where it writes none we stop at."""
        ids = self.encode(after)
        for count, token in enumerate(ids, start=1):
            if token in self.eos_ids:
                return ids[:count]
        own = self._tokenizer.eos_token_id
        return (own if own in self.eos_ids else min(self.eos_ids),)

    def _join(self, ids: Ids, seam: str) -> Ids:
        """ids followed by a seam, the last token of ids merged with it as the tokenizer itself would."""
        text = self.decode(ids[-1:])
        joined = self.encode(text + seam)
        clean = "\ufffd" not in text and self.decode(joined) == text + seam
        return ids[:-1] + joined if clean else ids + self.encode(seam)

    def _strip(self, ids: Sequence[int]) -> Ids:
        """ids without line breaks at either end, also those that share a token with text."""
        ids = self._without_blanks(ids)
        if ids and (text := self.decode(ids[-1:])).endswith("\n"):
            ids = ids[:-1] + self.encode(text.rstrip("\n"))
        if ids and (text := self.decode(ids[:1])).startswith("\n"):
            ids = self.encode(text.lstrip("\n")) + ids[1:]
        return ids

    def _without_blanks(self, ids: Sequence[int], blanks: str = "\n") -> Ids:
        """ids without the tokens at either end that hold nothing but `blanks`."""
        first, last = 0, len(ids)
        while first < last and not self.decode(ids[first : first + 1]).strip(blanks):
            first += 1
        while first < last and not self.decode(ids[last - 1 : last]).strip(blanks):
            last -= 1
        return tuple(ids[first:last])

    def _without_end(self, ids: Sequence[int]) -> Ids:
        return tuple(ids[:-1] if len(ids) and ids[-1] in self.eos_ids else ids)

    def _single_id(self, tag: str) -> int | None:
        ids = self.encode(tag)
        return ids[0] if len(ids) == 1 else None

    @property
    def template(self) -> dict[str, Any]:
        """What the chat template is told."""
        return {"enable_thinking": self.thinking, "date_string": _DATE}

    @staticmethod
    def _last(ids: Ids, token: int | None) -> int:
        """Where `token` stands last in ids; -1 where it does not."""
        return max((at for at, i in enumerate(ids) if i == token), default=-1)

    def _render(self, messages: list[dict[str, str]], generate: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generate,
                **self.template,
            )
        except Exception as error:  # a template is a program of the model's: it may raise anything
            raise UserError(
                f"path {self._directory}: its chat template fails ({type(error).__name__}: {error}); mend it in "
                "chat_template.jinja or tokenizer_config.json, or use a model whose template takes one user message"
            ) from error


def require_same_vocabulary(student: Chat, other: Chat, key: str) -> None:
    """Refuses a model (`key` names its config section) whose ids mean other tokens than the student's."""
    if student.vocab_fingerprint() != other.vocab_fingerprint():
        ours, theirs = student.tokens(), other.tokens()
        apart = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        first = f"first id {apart[0]}: {theirs.get(apart[0])!r}, and {ours.get(apart[0])!r} there"
        raise UserError(
            f"{key}.path: its tokenizer maps ids to other tokens than the student's ({other.vocab_size} against "
            f"{student.vocab_size} tokens, {len(apart)} ids differ, {first}); choose two models of one family, or "
            "recipe.target.weights=none, where only text travels"
        )


def require_same_prompts(student: Chat, other: Chat, key: str) -> None:
    """Refuses a model (`key` names its config section) whose ids or plain prompt differ from the student's.

    A divergence compares distributions token by token: the same ids must mean the same, after the same prompt.
    """
    require_same_vocabulary(student, other, key)
    probe = Problem("probe", "What is 1+1?")
    ours, theirs = student.prompt("plain", probe), other.prompt("plain", probe)
    if ours != theirs:
        at = parting(ours, theirs)
        raise UserError(
            f"{key}.path: its chat template renders the plain prompt as {marked(other, theirs, at)}, the student's as "
            f"{marked(student, ours, at)} (they part at {MARK.strip()}); set student.thinking and {key}.thinking "
            "alike, or use models with one template"
        )


def parting(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many ids two sequences share before they part."""
    return next(
        (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
    )


def marked(chat: Chat, ids: Sequence[int], at: int) -> str:
    """The text of ids as a literal, with MARK before the one at `at`."""
    return f"{chat.text(ids[:at])!r}{MARK}{chat.text(ids[at:])!r}"


def user(content: str) -> dict[str, str]:
    """A message of the user, as chat templates take it."""
    return {"role": "user", "content": content}


def _load_tokenizer(directory: str | Path):
    if not (Path(directory) / "tokenizer.json").is_file():
        raise UserError(f"path {directory}: it holds no tokenizer.json; give a Hugging Face model directory with one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(
            f"path {directory}: its tokenizer cannot be read ({type(error).__name__}: {error}); fetch tokenizer.json "
            "and tokenizer_config.json anew from where the model came from"
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"path {directory}: its tokenizer has no chat template, so no prompt can be built; use an "
            "instruction-tuned model, or add a chat_template to tokenizer_config.json"
        )
    return tokenizer
