"""The process in which math-verify, or a user's function, compares answers: one JSON line in, one out.

Run as a script, never imported. It imports nothing of this package, so
that it starts fast, touches no accelerator, and works beside any main script.
Limits are the operating system's: one item over its processor time ends the process, and the pool starts another.
Departures from math-verify's defaults: no alarms of its own; anchored patterns only, where no answer was marked;
numbers must agree in relative terms too, because rounding to six decimals makes all tiny numbers equal.
"""

import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable

MEMORY_BYTES = 4 << 30
RELATIVE = 1e-5


def close(gold, answer) -> bool:
    """Whether two nonzero constants of any size agree to five digits; a percentage stands for its hundredth too."""
    ratio = gold / answer
    return any(abs(complex((factor * ratio).evalf()) - 1) <= RELATIVE for factor in (1, 100, 0.01))


def compare(reference: str, answer: str, marked: bool) -> tuple[bool, str | None]:
    """(correct, the answer found). marked: `answer` is the answer itself, not a text in which to look for one."""
    import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def read(text: str, anywhere: bool) -> list:
        latex = LatexExtractionConfig(try_extract_without_anchor=anywhere, boxed_match_priority=0)
        plain = ExprExtractionConfig(try_extract_without_anchor=anywhere)
        return parse(text, [latex, plain], parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    gold = read(f"\\boxed{{{reference}}}", True)
    found = read(f"\\boxed{{{answer}}}" if marked else answer, marked)
    if not found or not gold:
        return marked and reference == answer, answer if marked else None
    # The order matters: an interval answers an inequality, an inequality does not answer an interval.
    correct = verify(gold, found, timeout_seconds=None)
    constants = [x for x in (gold[0], found[0]) if isinstance(x, sympy.Expr) and x.is_number and x.is_finite]
    if correct and len(constants) == 2 and not constants[0].equals(constants[1]):
        correct = not any(x.is_zero for x in constants) and close(*constants)
    return correct, answer if marked else str(found[-1])


def users(name: str) -> Callable[[str, str, bool], tuple[bool, str | None]]:
    """A user's function of (answer text, reference) in place of `compare`."""
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)

    def judge(reference: str, answer: str, marked: bool) -> tuple[bool, str | None]:
        verdict = function(answer, reference)
        if verdict not in (True, False):  # a pair, a text or a share would count as right
            raise TypeError(f"{name} gave {verdict!r}, not True or False")
        return bool(verdict), None

    return judge


def main() -> None:
    settings = json.loads(sys.argv[1])
    seconds = settings["seconds"]
    # A library that prints must not write into the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    judge = compare
    if settings["function"]:
        sys.path[:] = settings["path"]
        judge = users(settings["function"])
    else:
        compare("1", "1", True)  # imports what it needs
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        item = json.loads(line)
        # No handlers: the default action ends the process even inside one long call into C. Processor time, so that a
        # busy machine changes no verdict; the clock is only a backstop.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(settings["clock_s"])
        try:
            correct, found = judge(item["reference"], item["answer"], item["marked"])
            reply = {"correct": bool(correct), "found": found, "failure": None}
        except (Exception, MemoryError, RecursionError) as error:
            reply = {"correct": False, "found": None, "failure": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
