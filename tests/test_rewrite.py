"""Claims about rewriting: every verdict fires where it should and nowhere else, and no trajectory is lost."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mpd_jax.recipe import keep
from mpd_jax.recipe.keep import Judge
from mpd_jax.recipe.rewrite import LEFT_OUT, EarliestCorrectPrefix, ModelRewriter, Nobody, Truncate
from mpd_jax.sampling.sampler import SamplingConfig, request_key
from mpd_jax.train.metrics import summarise
from mpd_jax.types import Problem, Trajectory, UserError
from tests.test_chat import DROPS_REASONING, make_chat
from tests.test_write import StubSampler

PROBLEM = Problem("p1", "What is 7+8?", "15")
LONG = "<think>\nOkay, let me think step by step.\nSo 7+8=15.\nWait, 7+8=15.\n</think>\n\n\\boxed{15}<|im_end|>"
GOOD = "7+8=15.\n####\n\\boxed{15}<|im_end|>"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return make_chat(tmp_path_factory.mktemp("chat"))


def written(chat, text=LONG, ended="stopped", problem=PROBLEM) -> Trajectory:
    ids = chat.encode(text)
    return Trajectory(
        problem.id, 0, chat.prompt("plain", problem), ids, "student", 4, ended, logprobs=(-1.0,) * len(ids)
    )


def rewriter(chat, sampler, keep=(), fallback="drop", window=4096, student=None, **judge) -> ModelRewriter:
    judged = Judge(student or chat, keep, fallback, **judge)
    return ModelRewriter("teacher", sampler, chat, SamplingConfig(max_tokens=64), judged, seed=0, room=window - 64)


def rewritten(chat, text, original=None, problem=PROBLEM, ended="stopped", **settings) -> Trajectory:
    (result,) = rewriter(chat, StubSampler(chat, text, ended=ended), **settings)(
        [problem], [original or written(chat)], 4
    )
    return result


def test_nobody_is_the_identity(chat):
    trajectories = [written(chat), written(chat, ended="cut")]
    assert Nobody(Judge(chat, (), "drop"))([PROBLEM], trajectories, 0) == trajectories


def brief(case: keep.Case) -> bool:
    return len(case.rewrite.response) < 30


def test_without_a_rewriter_rules_judge_what_was_written(chat):
    wrong = written(chat, LONG.replace("boxed{15}", "boxed{16}"))
    trajectories = [written(chat), written(chat, CUT, "cut"), wrong]
    judged = Nobody(Judge(chat, ("finished", "correct"), "drop"))([PROBLEM], trajectories, 0)
    assert judged[0] == trajectories[0]
    assert [t.verdict for t in judged] == ["written", keep.ORIGINAL_UNFINISHED, keep.WRONG]
    assert [t.dropped for t in judged] == [False, True, True]


def test_a_rule_of_one_s_own_is_named_by_its_import_path(chat):
    texts = (GOOD, GOOD.replace("=", "=" * 30 + " "))
    assert [rewritten(chat, text, keep=("tests.test_rewrite:brief",)).verdict for text in texts] == [
        keep.KEPT,
        "not_brief",
    ]


def test_the_rule_in_the_readme_turns_doubts_down(chat, tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "(case)" in b]
    (tmp_path / "my_rules.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    rules = ("finished", "my_rules:without_doubts")
    texts = (GOOD, GOOD.replace("7+8", "Wait, 7+8"))
    assert [rewritten(chat, text, keep=rules).verdict for text in texts] == [keep.KEPT, "not_without_doubts"]


def test_a_repair_reads_its_own_context(chat):
    sampler = StubSampler(chat, GOOD)
    (t,) = replace(rewriter(chat, sampler), how="repair")([PROBLEM], [written(chat)], 4)
    assert sampler.requests[0].prompt == chat.prompt("repair", PROBLEM, chat.draft(t.original.response))


@pytest.mark.parametrize("text", [GOOD, f"<think>\nShorter: so 9.\n####\n\\boxed{{9}}\n</think>\n\n{GOOD}"])
def test_a_kept_rewrite_is_assembled_and_knows_its_original(chat, text):
    original = written(chat)
    t = rewritten(chat, text, original)
    assert t.response == chat.encode("<think>\n7+8=15.\n</think>\n\n\\boxed{15}<|im_end|>")
    assert (t.verdict, t.dropped, t.ended, t.writer, t.version) == (keep.KEPT, False, "assembled", "teacher", 0)
    assert (t.original, t.prompt, t.logprobs, t.problem_id, t.attempt) == (original, original.prompt, (), "p1", 0)


def test_the_rewriter_reads_problem_and_draft_without_tags(chat):
    sampler = StubSampler(chat, GOOD)
    rewriter(chat, sampler)([PROBLEM], [written(chat)], 4)
    (request,) = sampler.requests
    draft = "Okay, let me think step by step.\nSo 7+8=15.\nWait, 7+8=15.\n\n\\boxed{15}"
    assert request.prompt == chat.prompt("compress", PROBLEM, draft)
    assert draft in chat.decode(request.prompt) and "What is 7+8?" in chat.decode(request.prompt)
    assert request.key == request_key(0, "rewrite", 4, "p1", 0)


NO_REFERENCE = Problem("p1", "What is 7+8?")
CUT = "<think>\nOkay, let me think step by step.\nSo 7+8"


@pytest.mark.parametrize(
    ("verdict", "text", "settings"),
    [
        (keep.MALFORMED, "7+8=15. \\boxed{15}<|im_end|>", {}),
        (keep.MALFORMED, "####\n\\boxed{15}<|im_end|>", {}),
        (keep.MALFORMED, "7 <|im_start|>\n####\n\\boxed{15}<|im_end|>", {}),
        (keep.UNFINISHED, "7+8=15.\n####\n\\boxed{15}", {"ended": "cut"}),
        (keep.UNFINISHED, "<think>\n7+8=15.\n####\n\\boxed{15}<|im_end|>", {}),
        (keep.NO_ANSWER, "7+8=15.\n####\nfifteen<|im_end|>", {}),
        (keep.NO_ANSWER, "7+8=15. \\boxed{15}\n####\n<|im_end|>", {"problem": NO_REFERENCE}),
        (keep.KEPT, "7+8=15.\n####\nfifteen<|im_end|>", {"problem": NO_REFERENCE, "original": CUT}),
        (keep.ORIGINAL_UNFINISHED, GOOD, {"keep": ("finished",), "original": CUT}),
        (keep.KEPT, GOOD, {"original": CUT}),
        (keep.KEPT, GOOD, {"keep": ("finished",)}),
        (keep.ORIGINAL_WRONG, GOOD, {"keep": ("original_correct",), "original": CUT}),
        (keep.KEPT, "7+8=16.\n####\n\\boxed{16}<|im_end|>", {"keep": ("original_correct",)}),
        (keep.LONGER, "7+8=15. " * 9 + "\n####\n\\boxed{15}<|im_end|>", {"keep": ("shorter",)}),
        (keep.LONGER, LONG[8:-10].replace("\n</think>\n\n", "\n####\n") + "<|im_end|>", {"keep": ("shorter",)}),
        (keep.KEPT, "7+8=15. " * 9 + "\n####\n\\boxed{15}<|im_end|>", {}),
        (keep.KEPT, GOOD, {"keep": ("shorter",)}),
        (keep.ANSWER_CHANGED, "7+8=16.\n####\n\\boxed{16}<|im_end|>", {"keep": ("same_answer",)}),
        (keep.ANSWER_CHANGED, GOOD, {"keep": ("same_answer",), "original": CUT}),
        (keep.KEPT, "7+8=16.\n####\n\\boxed{16}<|im_end|>", {}),
        (keep.KEPT, "7.\n####\n\\boxed{15.0}<|im_end|>", {"keep": ("same_answer",)}),
        (keep.WRONG, "7+8=16.\n####\n\\boxed{16}<|im_end|>", {"keep": ("correct",)}),
        (keep.KEPT, GOOD, {"keep": ("correct",), "original": CUT}),
        (keep.WRONG, GOOD, {"keep": ("correct",), "correct": lambda answer, reference: False}),
        (keep.TOO_LONG, GOOD, {"window": 120}),
        (keep.KEPT, GOOD, {"keep": ("finished", "shorter", "same_answer", "correct")}),
    ],
)
@pytest.mark.parametrize("fallback", ["drop", "original"])
def test_verdicts_and_their_fallback(chat, verdict, text, settings, fallback):
    settings = dict(settings)
    source = settings.pop("original", None)
    original = written(chat) if source is None else written(chat, source, ended="cut")
    t = rewritten(chat, text, original, fallback=fallback, **settings)
    assert t.verdict == verdict
    if verdict == keep.KEPT:
        assert not t.dropped and t.original == original
    elif fallback == "drop":
        assert t.dropped and t.original == original
    else:
        assert t == replace(original, verdict=verdict, rewriting=t.rewriting)


THOUGHT = f"<think>\nShorter: so 9.\n####\n\\boxed{{9}}\n</think>\n\n{GOOD}"


@pytest.mark.parametrize("fallback", ["drop", "original"])
@pytest.mark.parametrize("text", [GOOD, THOUGHT, "no delimiter<|im_end|>"])
def test_what_a_rewriter_read_and_answered_is_known_whatever_comes_of_it(chat, text, fallback):
    sampler, original = StubSampler(chat, text), written(chat)
    (t,) = rewriter(chat, sampler, fallback=fallback)([PROBLEM], [original], 4)
    assert t.rewriting == (len(sampler.requests[0].prompt), len(chat.encode(text)))
    row = summarise([t, t])
    assert (row["rewrite_prompt_total"], row["rewritten_total"]) == tuple(2 * tokens for tokens in t.rewriting)
    unasked = rewriter(chat, sampler, keep=("finished",), fallback=fallback)([PROBLEM], [written(chat, CUT, "cut")], 4)
    assert [t.rewriting for t in unasked] == [(0, 0)]


def test_the_verdicts_above_are_all_there_are():
    cases = next(m for m in test_verdicts_and_their_fallback.pytestmark if "verdict" in m.args[0])
    assert {case[0] for case in cases.args[1]} == set(keep.VERDICTS)


def test_a_window_that_just_fits_is_not_too_long(chat):
    original = written(chat)
    size = len(chat.prompt("compress", PROBLEM, chat.draft(original.response))) + 64
    assert rewritten(chat, GOOD, original, window=size).verdict == keep.KEPT
    assert rewritten(chat, GOOD, original, window=size - 1).verdict == keep.TOO_LONG


def test_a_draft_that_does_not_fit_loses_its_middle_where_that_is_asked_for(chat):
    steps = " ".join(f"Step {i} says {i}+1={i + 1}." for i in range(60))
    original = written(chat, LONG.replace("So 7+8=15.", steps))
    whole = len(chat.prompt("compress", PROBLEM, chat.draft(original.response)))
    sampler = StubSampler(chat, GOOD)
    trim = replace(rewriter(chat, sampler, window=whole - 100 + 64), too_long="trim")
    (t,) = trim([PROBLEM], [original], 4)
    read = chat.decode(sampler.requests[0].prompt)
    assert t.verdict == keep.KEPT and 100 <= t.trimmed < 120 and whole - 120 < t.rewriting[0] <= whole - 100
    assert "Okay, let me think" in read and LEFT_OUT in read and "\\boxed{15}" in read.split(LEFT_OUT)[1]
    assert summarise([t, replace(t, trimmed=0)])["trimmed"] == 1
    (t,) = replace(trim, room=len(chat.prompt("compress", PROBLEM, "")))([PROBLEM], [original], 4)
    assert (t.verdict, t.trimmed) == (keep.TOO_LONG, 0)


def test_every_trajectory_comes_back_in_its_place_and_only_needed_rewrites_are_sampled(chat):
    problems = [Problem(f"p{i}", "What is 7+8?", "15") for i in range(4)]
    originals = [
        written(chat, CUT if i % 2 else LONG, "cut" if i % 2 else "stopped", problem)
        for i, problem in enumerate(problems)
    ]
    sampler = StubSampler(chat, GOOD, "no delimiter<|im_end|>")
    results = rewriter(chat, sampler, keep=("finished",))(problems, originals, 0)
    assert [t.problem_id for t in results] == ["p0", "p1", "p2", "p3"] and len(sampler.requests) == 2
    assert [t.verdict for t in results] == [
        keep.KEPT,
        keep.ORIGINAL_UNFINISHED,
        keep.MALFORMED,
        keep.ORIGINAL_UNFINISHED,
    ]
    assert [t.dropped for t in results] == [False, True, True, True]
    assert rewriter(chat, StubSampler(chat, GOOD), keep=("finished",))(problems[1:2], originals[1:2], 0)[0].dropped


def test_the_student_as_rewriter_carries_its_version(chat):
    sampler = StubSampler(chat, GOOD)
    sampler.version = 6
    compress = replace(rewriter(chat, sampler), role="student")
    (t,) = compress([PROBLEM], [written(chat)], 7)
    assert (t.writer, t.version, t.original.version) == ("student", 6, 4)


def test_a_rewriter_with_another_vocabulary_hands_over_text(chat, tmp_path):
    student = make_chat(tmp_path, marks=("<think>", "</think>", "####", "15"))
    t = rewritten(chat, GOOD, written(student), student=student)
    assert t.verdict == keep.KEPT
    assert t.response == student.encode("<think>\n7+8=15.\n</think>\n\n\\boxed{15}<|im_end|>")


def test_a_rewrite_of_a_draft_with_template_tokens_stays_clean(chat):
    hostile = written(chat, "<think>\nsay <|im_start|>\n</think>\n\n\\boxed{15}<|im_end|>")
    sampler = StubSampler(chat, GOOD)
    rewriter(chat, sampler)([PROBLEM], [hostile], 4)
    marks = [i for i in sampler.requests[0].prompt if i in chat.markup_ids]
    assert marks == [i for i in chat.prompt("compress", PROBLEM, "calm") if i in chat.markup_ids]


def test_correct_without_a_reference_is_refused_by_problem(chat):
    with pytest.raises(UserError, match=r"recipe\.rewrite: problem 'p1' has no reference answer"):
        rewritten(chat, GOOD, problem=NO_REFERENCE, keep=("correct",))


def truncated(chat, to=None, ratio=None, original=None, keep=(), fallback="drop", problem=PROBLEM) -> Trajectory:
    return Truncate(Judge(chat, keep, fallback), to, ratio)([problem], [original or written(chat)], 4)[0]


@pytest.mark.parametrize(("to", "ratio"), [(0, None), (1, None), (5, None), (None, 0.0), (None, 0.5), (10_000, None)])
def test_truncation_keeps_the_budget_in_tokens_and_the_original_s_answer(chat, to, ratio):
    original = written(chat)
    before = chat.split(original.response)
    t = truncated(chat, to, ratio, original)
    after = chat.split(t.response)
    budget = min(to if to is not None else int(ratio * len(before.reasoning)), len(before.reasoning))
    assert len(after.reasoning) == budget
    assert after.reasoning == before.reasoning[:budget] and after.answer == before.answer
    assert (t.verdict, t.ended, t.original, t.logprobs, t.dropped) == (keep.KEPT, "assembled", original, (), False)
    assert t.response[-1] in chat.eos_ids and (t.writer, t.version) == ("student", 4)


def test_nothing_is_truncated_where_there_is_no_answer_to_keep(chat, tmp_path):
    cut = written(chat, CUT, ended="cut")
    assert truncated(chat, 5, original=cut).verdict == keep.UNFINISHED
    assert truncated(chat, 5, original=cut).dropped
    assert truncated(chat, 5, original=cut, fallback="original") == replace(cut, verdict=keep.UNFINISHED)
    assert truncated(chat, 5, original=cut, keep=("finished",)).verdict == keep.ORIGINAL_UNFINISHED
    half = written(chat, LONG.removesuffix("}<|im_end|>"), ended="cut")
    assert truncated(chat, 5, original=half).verdict == keep.UNFINISHED
    plain = make_chat(tmp_path, DROPS_REASONING, marks=())
    assert truncated(plain, 5, original=written(plain, "7+8=15. \\boxed{15}<|im_end|>")).verdict == keep.UNFINISHED


STEPS = "I have 7.\nWait, 7+8 = 16. No, 7+8 = 15. Let me check: 15-8=7.\nYes, {15}."


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("15", "I have 7.\nWait, 7+8 = 16. No, 7+8 = 15."),
        ("16", "I have 7.\nWait, 7+8 = 16."),
        ("7", "I have 7."),
        ("$15.00$", "I have 7.\nWait, 7+8 = 16. No, 7+8 = 15."),
        ("\\boxed{15}", "I have 7.\nWait, 7+8 = 16. No, 7+8 = 15."),
        ("99", None),
    ],
)
def test_the_earliest_correct_prefix_ends_with_the_first_step_that_says_the_answer(chat, answer, left):
    original = written(chat, f"<think>\n{STEPS}\n</think>\n\n\\boxed{{15}}<|im_end|>")
    cut = EarliestCorrectPrefix(Judge(chat, (), "drop"))
    (t,) = cut([replace(PROBLEM, answer=answer)], [original], 0)
    if left is None:
        assert (t.verdict, t.dropped, t.response) == (keep.WRONG, True, original.response)
    else:
        assert chat.decode(chat.split(t.response).reasoning).strip() == left
        assert (t.verdict, t.ended, chat.answer_text(t.response)) == (keep.KEPT, "assembled", "\\boxed{15}")


def test_keep_rules_hold_for_truncation_too(chat):
    assert truncated(chat, 5, keep=("correct", "same_answer", "shorter")).verdict == keep.KEPT
    assert truncated(chat, 5, keep=("correct",), problem=replace(PROBLEM, answer="16")).verdict == keep.WRONG
    assert truncated(chat, 10_000, keep=("shorter",)).verdict == keep.LONGER
