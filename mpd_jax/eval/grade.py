"""Is an answer right? Two graders, each named in every result, because the grader alone moves scores by many points.

"rules" reads integers, decimals, simple fractions and units, and compares the rest as text; pure Python.
"math_verify" compares with math-verify in processes of its own: never in threads, where its parsing degrades silently.
Both judge the same answer: the last \\boxed{...}, else the last "Answer:" line. The caller passes the part after the
thinking span; an unclosed span leaves nothing to pass, and so no answer.
"""

import contextlib
import json
import re
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from pathlib import Path

from mpd_jax.types import UserError

GRADERS = ("rules", "math_verify")


@dataclass(frozen=True)
class Grade:
    """extracted: the answer found, None when there is none. failure: why no comparison took place; then not correct."""

    correct: bool
    extracted: str | None
    grader: str
    failure: str | None = None


_ANSWER_LINE = re.compile(r"answer(?: is)?\**\s*:\s*\**[ \t]*([^\n]+)", re.IGNORECASE)
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
_WORDS = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]+)*|[A-Za-z]+(?: [A-Za-z]+)+")
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
    if "\\boxed" in text:
        return extract_boxed(text)
    lines = _ANSWER_LINE.findall(text)
    return (_undecorated(lines[-1]) or None) if lines else None


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


def grade(response_text: str, reference: str) -> Grade:
    """The rules' grade of one answer text."""
    extracted = extract_answer(response_text)
    reference = extract_boxed(reference) or reference
    return Grade(extracted is not None and equal(extracted, reference), extracted, "rules")


def same_answer(text_a: str, text_b: str) -> bool:
    """Whether two texts mark answers that the rules call equal. A text without an answer agrees with nothing."""
    a, b = extract_answer(text_a), extract_answer(text_b)
    return a is not None and b is not None and equal(a, b)


class _Worker:
    """One comparing process and the item it has in hand. It ends with its standard input, so it outlives nobody."""

    def __init__(self, limit_s: float):
        # A plain process rather than multiprocessing's spawn: that one would import the caller's main script, and with
        # it jax, in every worker and in every replacement. -P keeps this folder's module names out of its path.
        command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("math_worker.py")), str(limit_s)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.ready = False
        self.item: int | None = None

    def send(self, item: int, question: dict) -> None:
        self.item = item
        with contextlib.suppress(BrokenPipeError):  # if it has died, `receive` will say so
            print(json.dumps(question), file=self.process.stdin, flush=True)

    def receive(self) -> dict | None:
        """Its next line, or None when it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> int:
        """Ends it; the exit status it had come to by itself, if it had."""
        self.process.kill()
        status = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # pyright: ignore[reportOptionalMemberAccess]
        return status


class GraderPool:
    """Grades many answers in order, whatever the number of workers. A context manager; the rules need no process.

    limit_s: processor seconds for one comparison. A comparison over it costs its worker, and counts as not correct.
    """

    def __init__(self, name: str, workers: int = 2, limit_s: float = 10.0):
        if name not in GRADERS:
            raise UserError(f"grader: {name!r} is not a grader; choose one of {', '.join(GRADERS)}")
        if workers < 1 or limit_s <= 0:
            raise UserError(f"grader: workers={workers} and limit_s={limit_s} must both be positive")
        self.name, self.workers, self.limit_s = name, workers, limit_s
        self.grader = name
        self._pool: list[_Worker] = []
        if name == "math_verify":
            try:
                self.grader = f"math_verify {metadata.version('math-verify')}"
            except metadata.PackageNotFoundError:
                raise UserError("grader: math_verify is not installed; pip install math-verify, or use rules") from None

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *exc: object) -> None:
        while self._pool:
            self._pool.pop().close()

    def grade_many(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Grades of (answer text, reference) pairs, in their order."""
        if self.name == "rules":
            return [grade(text, reference) for text, reference in pairs]
        grades: dict[int, Grade] = {}
        queue: deque[tuple[int, dict]] = deque()
        for i, (text, reference) in enumerate(pairs):
            extracted = extract_answer(text)
            reference = extract_boxed(reference) or reference
            if extracted is None and ("\\boxed" in text or not text.strip()):
                grades[i] = Grade(False, None, self.grader)
            elif extracted is not None and _WORDS.fullmatch(normalise(reference)):
                # As LaTeX a word is a product of its letters, equal to each of its anagrams.
                grades[i] = Grade(equal(extracted, reference), extracted, self.grader)
            else:
                answer = _BOLD.sub("", text) if extracted is None else _undecorated(extracted)
                question = {"reference": _undecorated(reference), "answer": answer, "marked": extracted is not None}
                queue.append((i, question))
        self._run(queue, grades)
        return [grades[i] for i in range(len(pairs))]

    def _run(self, queue: deque[tuple[int, dict]], grades: dict[int, Grade]) -> None:
        """Fills `grades` from the queue: one item in each worker's hands at a time."""
        questions = dict(queue)
        # A worker that died between two calls, idle, is replaced like one that never was.
        for worker in [w for w in self._pool if w.process.poll() is not None]:
            self._drop(worker)
        while queue or any(worker.item is not None for worker in self._pool):
            while len(self._pool) < min(self.workers, len(queue)):
                self._pool.append(_Worker(self.limit_s))
            for worker in self._pool:
                if queue and worker.ready and worker.item is None:
                    worker.send(*queue.popleft())
            for worker in self._waiting():
                reply = worker.receive()
                if reply is None:
                    status = self._drop(worker)
                    if not worker.ready:
                        raise RuntimeError(f"a math-verify process could not start (exit status {status})")
                    failure = {-signal.SIGPROF: "timeout", -signal.SIGALRM: "stalled"}.get(status, "crash")
                    reply = {"correct": False, "found": None, "failure": failure}
                worker.ready = True
                if worker.item is not None:
                    question = questions[worker.item]
                    found = question["answer"] if question["marked"] else reply["found"]
                    grades[worker.item] = Grade(reply["correct"], found, self.grader, reply["failure"])
                    worker.item = None

    def _drop(self, worker: _Worker) -> int:
        self._pool.remove(worker)
        return worker.close()

    def _waiting(self) -> list[_Worker]:
        """The workers that have something to say; waits until there is one."""
        with selectors.DefaultSelector() as selector:
            for worker in self._pool:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # pyright: ignore
            return [key.data for key, _ in selector.select()]
