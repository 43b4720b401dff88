"""Grading: what counts as the answer, when two answers are equal, and that no answer can stop a run."""

import ast
from fractions import Fraction
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mpd_jax.eval import grade as grade_module
from mpd_jax.eval.grade import Grade, GraderPool, equal, extract_answer, extract_boxed, grade, normalise, same_answer
from mpd_jax.types import UserError

SLOW = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def pool():
    with GraderPool("math_verify", workers=2, limit_s=3.0) as pool:
        yield pool


# What counts as the answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}", "12"),
        (r"first \boxed{3}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"$\boxed 5$ apples", "5"),
        (r"it is \boxed 5. Done", "5"),
        (r"\boxed{12", None),
        (r"\boxed{3} or rather \boxed{12", None),
        (r"\boxed{ }", None),
        ("Answer: 3, or rather \\boxed{1", None),
        (r"\boxed", None),
        ("Answer: 3\nAnswer: 12.", "12"),
        ("**Answer:** $12$", "12"),
        ("Answer: **12**", "12"),
        ("The final answer is: 12", "12"),
        (r"\boxed{12} Answer: 3", "12"),
        ("we get 12", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_box_else_the_last_answer_line(text, answer):
    assert extract_answer(text) == answer


balanced = st.recursive(
    st.text(st.characters(blacklist_characters="{}\\", blacklist_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=8,
)


@settings(deadline=None)
@given(balanced, st.text(st.characters(blacklist_characters="\\")), balanced)
def test_a_box_returns_whatever_balanced_text_it_holds(held, before, after):
    assert extract_boxed(f"{before}\\boxed{{{held}}}{after}") == (held.strip() or None)


@settings(deadline=None)
@given(st.text(), st.text())
def test_no_text_makes_the_rules_fail(text, reference):
    assert isinstance(grade(text, reference), Grade)
    assert isinstance(grade(f"\\boxed{{{text}}}", reference), Grade)


# When two answers are equal by the rules


def spellings(value: Fraction) -> list[str]:
    p, q = value.numerator, value.denominator
    forms = [f"{p}/{q}", f"{7 * p}/{7 * q}", rf"\frac{{{p}}}{{{q}}}", rf"$\dfrac{{{p}}}{{{q}}}$", rf"x = {p}/{q}"]
    if q == 1:
        forms += [str(p), f"{p}.0", f"{p:,}", f"{p}.", rf"{p} \text{{ apples}}", f"**{p}**", f"${p}$"]
    if q in (2, 4, 5):
        forms += [f"{float(value):.4f}"]
    return forms


rationals = st.builds(Fraction, st.integers(-3000, 3000), st.integers(1, 12))


@settings(deadline=None)
@given(rationals, st.data())
def test_every_spelling_of_a_number_is_equal(value, data):
    a, b = (data.draw(st.sampled_from(spellings(value))) for _ in range(2))
    assert equal(a, b)


@settings(deadline=None)
@given(rationals, rationals, st.data())
def test_no_spelling_of_another_number_is_equal(x, y, data):
    assume(x != y)
    assert not equal(data.draw(st.sampled_from(spellings(x))), data.draw(st.sampled_from(spellings(y))))


@settings(deadline=None)
@given(st.text(), st.text())
def test_equality_is_symmetric_and_reflexive(a, b):
    assert equal(a, b) == equal(b, a)
    assert equal(a, a) == bool("".join(normalise(a).split()))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("12 apples", "12", True),
        ("12 m", "12 km", False),
        (r"50\%", "50", True),
        (r"90^\circ", "90°", True),
        ("2 1/2", "5/2", True),
        (r"-1\frac{1}{2}", "-1.5", True),
        ("1,234", "1234", True),
        ("1,23", "123", False),
        ("2 pi", "2", False),
        ("2x", "2", False),
        ("5 cm", "5", True),
        ("12 coins", "12", True),
        ("3 square feet", "3", True),
        (r"7 \text{ oranges}", "7", True),
        (r"6 \text{ motor scooters}", "6", True),
        (r"10 \text{ or } x", "10", False),
        (r"10 \text{ or more}", "10", False),
        (r"5 \text{ and } x", "5", False),
        ("5 and ten", "5", False),
        ("5 x y", "5", False),
        ("5 plus ten", "5", False),
        ("5 minus ten", "5", False),
        ("5 times ten", "5", False),
        ("5 over ten", "5", False),
        ("5 sin x", "5", False),
        ("3 times as many", "3", False),
        (r"3 \text{ million}", "3", False),
        ("3 Million", "3", False),
        (r"\frac{1}{2} \text{ million dollars}", "0.5", False),
        ("2 dozen", "2", False),
        ("2 hundreds", "2", False),
        ("2 thousand", "2", False),
        ("2 billion", "2", False),
        ("2 trillion", "2", False),
        (r"3 \text{ million}", "3 million", True),
        ("x", "X", False),
        ("(B)", r"\text{B}", True),
        ("Monday", r"\text{monday}", True),
        ("Evelyn", "Evenly", False),
        ("1, 2", "1,2", True),
        ("1,2", "2,1", False),
        ("1/0", "1/0", True),
        ("1/0", "2/0", False),
        ("9" * 5000, "9" * 5000, True),
        ("−3", "-3", True),
        ("", "", False),
    ],
)
def test_units_words_and_text_are_equal_as_listed(a, b, same):
    assert equal(a, b) == same


def test_a_text_without_an_answer_agrees_with_nothing():
    assert same_answer(r"so \boxed{6/2}", "Answer: 3")
    assert not same_answer("", "") and not same_answer("3", "3") and not same_answer(r"\boxed{}", r"\boxed{}")


@pytest.mark.parametrize(
    ("text", "reference"),
    [(r"\boxed{10 \text{ or } x}", "10"), (r"\boxed{5 \text{ and } x}", "5"), (r"\boxed{3 \text{ million}}", "3")],
)
def test_words_that_change_a_number_are_no_unit_of_it(text, reference):
    assert not grade(text, reference).correct and not same_answer(text, f"\\boxed{{{reference}}}")
    assert grade(text, text).correct


def test_a_reference_may_be_a_worked_solution():
    assert grade(r"\boxed{4}", r"2 + 2 is \boxed{4}").correct


# math-verify

LISTED = [
    ("\\boxed{0.5}", "\\frac{1}{2}", True),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", True),
    # An interval answers an inequality, never the reverse: this pins the order of the arguments.
    ("\\boxed{(1,2)}", "1<x<2", True),
    ("\\boxed{1<x<2}", "(1,2)", False),
    # Bold markers.
    ("Answer: **73**", "73", True),
    ("The final answer is **73**", "73", True),
    ("\\boxed{**73**}", "73", True),
    # One of several required answers, in any order but complete.
    ("\\boxed{1728}", "1331 and 1728", False),
    ("\\boxed{1728, 1331}", "1331 and 1728", True),
    ("\\boxed{x=1}", "x=1, x=2", False),
    ("\\boxed{2021}", "\\pm 2021", False),
    ("\\boxed{n=1,2,3}", "n=2, 3, 4", False),
    # Tiny numbers.
    ("\\boxed{0.0000002}", "0.0000001", False),
    ("\\boxed{10^{-7}}", "0.0000001", True),
    ("\\boxed{0.0000001}", "0", False),
    ("\\boxed{\\frac{1}{2^{98}}}", "\\frac{1}{2^{99}}", False),
    ("\\boxed{\\frac{1}{2006!}}", "\\frac{1}{2004!}", False),
    ("\\boxed{\\frac{1}{3 \\cdot 2^{2006}}}", "\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}", False),
    ("\\boxed{0.333333}", "1/3", True),
    ("\\boxed{50\\%}", "0.5", True),
    # Words and clock times are no products or quotients.
    ("\\boxed{Evenly}", "Evelyn", False),
    ("\\boxed{\\text{Evelyn}}", "Evelyn", True),
    ("\\boxed{1:00}", "12:00", False),
    ("\\boxed{12:00}", "12:00", True),
    ("\\boxed{3x + 4y + 14=0}", "3x-1y+13=0", False),
    ("\\boxed{7.}", "7", True),
    ("so the final answer is $\\frac12$.", "0.5", True),
    # No marked answer: a number somewhere in the text is not one.
    ("then 3 * 4 = 12", "12", False),
    ("then $3 \\cdot 4 = 12$ apples", "12", False),
    ("\\boxed{5", "5", False),
    ("", "5", False),
]


def test_known_problem_cases_of_math_verify_are_graded_as_listed(pool):
    grades = pool.grade_many([(text, reference) for text, reference, _ in LISTED])
    wrong = [case for case, g in zip(LISTED, grades, strict=True) if g.correct != case[2] or g.failure]
    assert not wrong
    assert [g.extracted is None for g in grades[-4:]] == [True] * 4


def test_the_grader_is_named_with_its_version(pool):
    version = metadata.version("math-verify")
    assert {g.grader for g in pool.grade_many([("", "1"), ("\\boxed{1}", "1")])} == {f"math_verify {version}"}
    assert grade("", "1").grader == "rules"


def test_a_pathological_answer_costs_itself_only(pool):
    before = pool.grade_many([("\\boxed{1+1}", "2")])
    pairs = [(SLOW, "5"), ("\\boxed{2}", "2"), ("\\boxed{10^{10^{10}}}", "7"), ("\\boxed{3}", "2"), ("\\boxed{4}", "4")]
    grades = pool.grade_many(pairs)
    assert [g.correct for g in grades] == [False, True, False, False, True]
    assert [g.failure for g in grades] == ["timeout", None, "timeout", None, None]
    assert grades[0].extracted == "9^{9^{9^{9}}}"
    assert pool.grade_many([("\\boxed{1+1}", "2")]) == before


def test_a_worker_that_dies_while_idle_is_replaced(pool):
    pool.grade_many([("\\boxed{1}", "1")] * 4)
    for worker in pool._pool:
        worker.process.kill()
        worker.process.wait()
    assert [g.failure for g in pool.grade_many([("\\boxed{1}", "1")] * 2)] == [None, None]


def test_the_number_of_workers_changes_no_grade():
    pairs = [(text, reference) for text, reference, _ in LISTED[:16]]
    with GraderPool("math_verify", workers=1) as one, GraderPool("math_verify", workers=4) as four:
        assert one.grade_many(pairs) == four.grade_many(pairs)


def test_a_worker_ends_with_its_standard_input():
    worker = grade_module._Worker(1.0)
    assert worker.receive() == {"ready": True}
    worker.process.stdin.close()
    assert worker.process.wait(timeout=20) == 0
    worker.process.stdout.close()


def test_the_worker_loads_nothing_of_this_package():
    tree = ast.parse(Path(grade_module.__file__).with_name("math_worker.py").read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.split(".")[0] in ("mpd_jax", "jax", "numpy")]


def test_an_unknown_grader_is_refused_by_name():
    with pytest.raises(UserError, match=r"'sympy' is not a grader; choose one of rules, math_verify"):
        GraderPool("sympy")
