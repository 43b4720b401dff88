"""Is an answer right? Several graders, each named in every result with its version: the grader alone moves scores.

An answer can be marked by the last \\boxed{...} and by the last "Answer:" line; both marks are judged, and the grader
says which of them counts. The caller passes the part after the thinking span; an unclosed span leaves nothing to pass,
and so no answer. Rules are pure Python; math-verify and a user's function run in processes of their own (workers.py),
never in threads, where math-verify's parsing degrades silently.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import metadata
from typing import Literal, NamedTuple

from mpd_jax import named
from mpd_jax.eval.workers import Workers
from mpd_jax.types import UserError

VERSION = 1  # of what this file and grade_worker.py decide; raise it with every change that moves a verdict


class _Grader(NamedTuple):
    """by: how answers are compared. counts: which mark does; "box_or_line" is the box, and the line if there is no box;
    "found" goes on to what math-verify finds without a mark; "either" is right if one of both is."""

    by: Literal["rules", "math_verify", "letter", "function"]
    counts: Literal["box_or_line", "found", "box", "line", "either"]


GRADERS = {
    "rules": _Grader("rules", "box_or_line"),
    "math_verify": _Grader("math_verify", "found"),
    "answer_line": _Grader("rules", "line"),
    "boxed": _Grader("math_verify", "box"),
    "dual_path": _Grader("math_verify", "either"),
    "choice": _Grader("letter", "box_or_line"),
}


@dataclass(frozen=True)
class Grade:
    """extracted: the answer found, None when there is none. failure: why no comparison took place; then not correct.

    marks: by the mark that is there, "boxed" or "answer_line", whether what it holds is right.
    """

    correct: bool
    extracted: str | None
    grader: str
    failure: str | None = None
    marks: Mapping[str, bool] = field(default_factory=dict)


_ANSWER_LINE = re.compile(r"answer(?: is)?\**\s*:\s*\**[ \t]*(?=[^\n])", re.IGNORECASE)
_BOLD = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])")
_INVISIBLE = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[!,;:]")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*[£€¥]?(?:"
    r"(?:(?P<whole>\d+)\s*)?\\frac\s*(?:\{\s*(?P<latex_top>[+-]?\d+)\s*\}|(?P<top_digit>\d))"
    r"\s*(?:\{\s*(?P<latex_bottom>\d+)\s*\}|(?P<bottom_digit>\d))"
    r"|(?:(?P<mixed>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    r"|(?P<plain>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
    r")(?P<unit>\s*%|\s*(?:°|\^\s*\{?\\circ\}?)|\s+(?!pi\b)[A-Za-z][A-Za-z ]+|\s+[mgshlL])?\s*",
    re.ASCII,
)
# Words after a number that change its value or add another answer ("3 million", "5 and x", "2 x y"): no unit.
_NO_UNIT = re.compile(
    r"\b(?:or|and|times|plus|minus|over|(?:dozen|hundred|thousand|million|billion|trillion)s?)\b|\w [A-Za-z]$",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"^[A-Za-z]\w*\s*=\s*")
_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:](?:\s.*)?)?", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]+)*|[A-Za-z]+(?: [A-Za-z]+)+")
# A sequence that goes on, of which math-verify would compare nothing but the last of what stands before the dots.
_GOES_ON = re.compile(r",\s*(?:\\[lc]?dots|\.{3})|(?:\\[lc]?dots|\.{3})\s*,")
_UPRIGHT = re.compile(r"\\mathrm\s*\{\s*([a-z])\s*\}")  # e and i; math-verify takes them for other symbols
# Longer than any number a dataset holds; reading a hostile one would cost quadratic time.
_LONGEST_NUMBER = 300


def extract_boxed(text: str) -> str | None:
    """What the last \\boxed holds, as `\\boxed{...}` or `\\boxed 5`; None where it is absent, empty or unclosed."""
    at = text.rfind("\\boxed")
    if at < 0:
        return None
    rest = text[at + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        words = rest.split(maxsplit=1)
        return (words[0].split("$")[0].rstrip(".,;") or None) if words else None
    depth, escaped = 0, False
    for i, char in enumerate(rest):
        if escaped or char == "\\":
            escaped = not escaped
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if depth == 0:
                return rest[1:i].strip() or None
    return None


def extract_answer(text: str) -> str | None:
    """The answer a text marks: its last box, else what follows its last "Answer:"; None when it marks none."""
    return extract_boxed(text) if "\\boxed" in text else extract_line(text)


def extract_line(text: str) -> str | None:
    """What follows the last "Answer:" on its line, without a box around it; None where that is nothing."""
    starts = [match.end() for match in _ANSWER_LINE.finditer(text)]
    if not starts:
        return None
    line = text[starts[-1] :].partition("\n")[0].rstrip().rstrip(".")
    for opens, closes in (("\\[", "\\]"), ("\\(", "\\)"), ("$", "$")):
        if line.endswith(closes) and line.count(opens) == (opens == closes):  # it was opened before "Answer:"
            line = line.removesuffix(closes)
    return extract_boxed(line) if "\\boxed" in line else _undecorated(line) or None


def _undecorated(text: str) -> str:
    """Without the marks around an answer that are no part of it: bold, dollar signs, a full stop, surrounding space."""
    text = _BOLD.sub("", text).strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(left) and text.rstrip(".").endswith(right) and len(text) > len(left) + len(right):
            text = text.rstrip(".")[len(left) : -len(right)].strip()
    return text.rstrip(".").strip() if not text.endswith("..") else text


def normalise(text: str) -> str:
    """An answer in the form the rules compare: LaTeX spacing, text wrappers and typographic variants removed."""
    text = _undecorated(text.replace("−", "-").replace("\u00a0", " "))
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "%").replace("{,}", ",").replace("\\ ", " ")
    text = _TEXT.sub(r" \1 ", _INVISIBLE.sub("", text)).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = " ".join(text.split()).rstrip(".").strip()
    return text[1:-1] if re.fullmatch(r"\([A-Za-z]\)", text) else text


def number(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a normalised answer that is one plain number, else None. The unit may be empty."""
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    unit = (match["unit"] or "").strip().casefold() if match else ""
    if match is None or _NO_UNIT.search(unit):
        return None
    if match["plain"]:
        value = Fraction(match["plain"].replace(",", ""))
    else:
        top = int(match["latex_top"] or match["top_digit"] or match["top"])
        bottom = int(match["latex_bottom"] or match["bottom_digit"] or match["bottom"])
        if bottom == 0:
            return None
        value = int(match["whole"] or match["mixed"] or 0) + Fraction(top, bottom)
    return (-value if match["sign"] == "-" else value), ("°" if "circ" in unit else unit)


def equal(a: str, b: str) -> bool:
    """The rules: numbers by exact value, a unit missing on one side being forgiven; anything else as text."""
    a, b = normalise(a), normalise(b)
    if ("=" in a) != ("=" in b):
        a, b = _ASSIGNED.sub("", a, count=1), _ASSIGNED.sub("", b, count=1)
    x, y = number(a), number(b)
    if x and y:
        return x[0] == y[0] and (x[1] == y[1] or not (x[1] and y[1]))
    a, b = "".join(a.split()), "".join(b.split())
    # A single letter may be a variable, whose case counts.
    folded = len(a) > 1 and a.isalpha() and b.isalpha() and a.casefold() == b.casefold()
    return bool(a) and (a == b or folded)


def letter(text: str) -> str | None:
    """The letter of a choice: `B`, `(b)`, `\\text{B}`, or with what it stands for, `B) 5 m`. None for anything else."""
    match = _LETTER.fullmatch(normalise(text))
    return match[1].upper() if match else None


def canonical(answer: str) -> Fraction | str:
    """What answers that are alike by the rules have in common, so that they can be counted; units are left out."""
    text = _ASSIGNED.sub("", normalise(answer), count=1)
    value = number(text)
    return value[0] if value else "".join(text.split())


def grade(response_text: str, reference: str) -> Grade:
    """The rules' grade of one answer text."""
    return GraderPool("rules").grade_many([(response_text, reference)])[0]


def same_answer(text_a: str, text_b: str) -> bool:
    """Whether two texts mark answers that the rules call equal. A text without an answer agrees with nothing."""
    a, b = extract_answer(text_a), extract_answer(text_b)
    return a is not None and b is not None and equal(a, b)


class _Question(NamedTuple):
    """One comparison. marked: `answer` is the answer itself, not a text in which to look for one."""

    reference: str
    answer: str
    marked: bool = True


class _Verdict(NamedTuple):
    correct: bool
    found: str | None
    failure: str | None = None


class GraderPool:
    """Grades many answers in order, whatever the number of workers. A context manager; rules need no process.

    name: one of `GRADERS`, or the import path of a user's function (answer text, reference) -> bool, which is given all
    of the text after the thinking span. grader: the name with its version, "+1" being that of our own part; of a user's
    function the digest of its file. workers: one a processor and at most 16, unless given. limit_s: processor
    seconds for one comparison; one that takes longer costs its worker, and counts as not correct.
    """

    def __init__(self, name: str, workers: int | None = None, limit_s: float = 10.0):
        workers = min(16, os.cpu_count() or 1) if workers is None else workers
        if workers < 1 or limit_s <= 0:
            raise UserError(f"grader: workers={workers} and limit_s={limit_s} must both be positive")
        self._grader = grader_of(name)
        self.grader = _versioned(name, self._grader.by)
        self._workers = Workers(workers, limit_s, name if self._grader.by == "function" else None)

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self._workers.close()

    def grade_many(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grades of (answer text, reference) pairs, in their order."""
        read = [_Marks.of(text, reference) for text, reference in pairs]
        # Equal comparisons are made once: many attempts at a problem end alike.
        asked = dict.fromkeys(q for marks in read for q in self._questions(marks))
        verdicts = self._verdicts(list(asked))
        return [self._grade(marks, verdicts) for marks in read]

    def _questions(self, marks: "_Marks") -> list[_Question]:
        found = [q for q in (marks.box, marks.line) if q is not None]
        searched = self._grader.counts == "found" and not found and marks.searched
        return [*found, marks.whole] if searched or self._grader.by == "function" else found

    def _verdicts(self, questions: Sequence[_Question]) -> dict[_Question, _Verdict]:
        verdicts, far = {}, {}
        for q in questions:
            if self._grader.by == "letter":
                found = letter(q.answer)
                verdicts[q] = _Verdict(found is not None and found == letter(q.reference), found)
            elif self._grader.by == "function" and not q.marked:
                far[q] = q._asdict()
            elif self._grader.by != "math_verify" or (q.marked and _is_text(q.reference)):
                verdicts[q] = _Verdict(equal(q.answer, q.reference), q.answer)
            else:
                answer = _undecorated(q.answer) if q.marked else _BOLD.sub("", q.answer)
                answer, reference = (_UPRIGHT.sub(r"\1", x) for x in (answer, _undecorated(q.reference)))
                far[q] = {"reference": reference, "answer": answer, "marked": q.marked}
        for q, reply in self._workers.ask(far).items():
            found = q.answer if q.marked else reply["found"]
            verdicts[q] = _Verdict(reply["correct"], found, reply["failure"])
        return verdicts

    def _grade(self, marks: "_Marks", verdicts: dict[_Question, _Verdict]) -> Grade:
        box, line, whole = (None if q is None else verdicts.get(q) for q in (marks.box, marks.line, marks.whole))
        match self._grader.counts:
            case "box":
                chosen = box
            case "line":
                chosen = line
            case "either":
                tried = [verdict for verdict in (box, line) if verdict]
                chosen = max(tried, key=lambda v: (v.correct, v.failure is not None), default=None)
            case _:
                chosen = box or (line or whole if marks.searched else None)
        if self._grader.by == "function":
            assert whole is not None, "the function was not asked"
            chosen = whole._replace(found=extract_answer(marks.whole.answer))
        split = {mark: v.correct for mark, v in (("boxed", box), ("answer_line", line)) if v}
        correct, found, failure = chosen or _Verdict(False, None)
        return Grade(correct, found, self.grader, failure, split)


class _Marks(NamedTuple):
    """Where a text marks its answer, as the comparisons that asks for. searched: no box says that it is elsewhere."""

    box: _Question | None
    line: _Question | None
    whole: _Question
    searched: bool

    @classmethod
    def of(cls, text: str, reference: str) -> "_Marks":
        expected = extract_boxed(reference) or reference
        box, line = (None if x is None else _Question(expected, x) for x in (extract_boxed(text), extract_line(text)))
        searched = "\\boxed" not in text and bool(text.strip())
        return cls(box, line, _Question(expected, text, False), searched)


def grader_of(name: str, key: str = "grader") -> _Grader:
    """What a grader's name stands for. key: the config's, for the UserError of one that is not known."""
    if name in GRADERS:
        return GRADERS[name]
    named.named(key, name, dict.fromkeys(GRADERS, lambda: None))
    return _Grader("function", "box_or_line")


def _is_text(reference: str) -> bool:
    """Whether math-verify would misread it: as LaTeX a word is a product of its letters, equal to its anagrams."""
    return bool(_WORDS.fullmatch(normalise(reference)) or _GOES_ON.search(reference))


def _versioned(name: str, by: str) -> str:
    if by == "function":
        return f"{name} {hashlib.blake2b(named.source(name), digest_size=4).hexdigest()}"
    if by != "math_verify":
        return f"{name} {VERSION}"
    try:
        return f"{name} {metadata.version('math-verify')}+{VERSION}"
    except metadata.PackageNotFoundError:
        raise UserError(f"grader: {name} needs math-verify; pip install math-verify, or use rules") from None
