"""Evaluation: which draws, which counts, which intervals, and that the file of samples holds all of it."""

import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mpd_jax.data.chat import Parts
from mpd_jax.eval.evaluate import Blocks, EvalConfig, count, evaluate, graded, read_rows, regrade
from mpd_jax.eval.figures import paired_difference, paired_p, parts, row_of, rows_of, truncation_row, under_budgets
from mpd_jax.eval.grade import VERSION, GraderPool
from mpd_jax.eval.samples import Sample, growing, read_samples, write_samples
from mpd_jax.eval.tables import against, attempts, budgets, by_part, formats, lengths, table
from mpd_jax.sampling.sampler import Response
from mpd_jax.types import Problem, UserError

EOS, CLOSE = 0, ord("|")
CONFIG = EvalConfig(problems=8, attempts=2, temperatures=(1.0, 0.0), max_tokens=40)
PROBLEMS = [Problem(id=f"p{i}", question=f"what is {i}?", answer=str(i)) for i in range(8)]


class CharacterChat:
    """One character a token; thinks up to the first |."""

    def prompt(self, context, problem, draft=None):
        return tuple(map(ord, f"{context}: {problem.question}"))

    def split(self, ids):
        ids = tuple(i for i in ids if i != EOS)
        if CLOSE not in ids:
            return Parts(ids, (), False)
        at = ids.index(CLOSE)
        return Parts(ids[:at], ids[at + 1 :], True)

    def decode(self, ids):
        return "".join(map(chr, ids)).replace(chr(EOS), "")


class ScriptedSampler:
    """Answers with text(prompt, key), ends each with EOS, and keeps what it was asked."""

    def __init__(self, text):
        self.text, self.calls = text, []

    def load(self, weights, version):
        pass

    def sample(self, requests, sampling, progress=None):
        self.calls.append((list(requests), sampling))
        responses = []
        for request in requests:
            ids = (*map(ord, self.text("".join(map(chr, request.prompt)), request.key)), EOS)
            cut = len(ids) > sampling.max_tokens
            ids = ids[: sampling.max_tokens]
            responses.append(Response(ids, (0.0,) * len(ids), "cut" if cut else "stopped"))
            if progress:
                progress(len(responses))
        return responses


def right_or_wrong(prompt, key):
    """Right for two keys of three, with a length that depends on the key."""
    number = prompt.split()[-1].rstrip("?")
    return "h" * (key[0] % 17) + f"m|\\boxed{{{number if key[1] % 3 else 'x'}}}"


def run(text=right_or_wrong, config=CONFIG, name="base", problems=PROBLEMS, **options):
    sampler = ScriptedSampler(text)
    return evaluate(name, sampler, CharacterChat(), problems, config, **{"seed": 3, **options}), sampler


def going_on(config=CONFIG, problems=PROBLEMS, text=right_or_wrong, **options):
    sampler = ScriptedSampler(text)
    return rows_of(graded("base", sampler, CharacterChat(), problems, config, seed=3, **options)), sampler


def sample(problem_id="p", tokens=10.0, correct=True, attempt=0, ended="stopped", **more):
    values = dict(
        name="base",
        context="plain",
        temperature=1.0,
        problem_id=str(problem_id),
        attempt=attempt,
        reference="1",
        response_ids=(1,),
        text="",
        answer="",
        tokens=tokens,
        reasoning_tokens=None,
        max_tokens=100,
        ended=ended,
        extracted="1",
        correct=correct,
        grader="rules",
        failure=None,
    )
    return Sample(**{**values, **more})


def row(correct, tokens=None, **more):
    tokens = tokens if tokens is not None else [10.0] * len(correct)
    return rows_of([sample(i, t, c, **more) for i, (c, t) in enumerate(zip(correct, tokens, strict=True))])[0]


# Which draws


def test_every_model_and_context_meets_the_same_draws():
    def keys(**options):
        return [[r.key for r in requests] for requests, _ in run(**options)[1].calls]

    base = keys()
    assert base == keys(name="trained", context="concise", text=lambda prompt, key: "x")
    assert base != keys(seed=4)
    flat = [key for call in base for key in call]
    assert len(set(flat)) == len(flat) == count(PROBLEMS, CONFIG) == 8 * 2 + 8


def test_draws_of_a_problem_do_not_depend_on_its_neighbours():
    _, all_of_them = run()
    _, few = run(problems=PROBLEMS[5:3:-1])
    assert {r.prompt: r.key for r in few.calls[1][0]}.items() <= {
        r.prompt: r.key for r in all_of_them.calls[1][0]
    }.items()


def test_each_temperature_is_a_row_and_greedy_takes_one_attempt():
    rows, sampler = run()
    assert [(r.temperature, r.samples_per_problem, r.n) for r in rows] == [(1.0, 2, 8), (0.0, 1, 8)]
    assert [s.temperature for _, s in sampler.calls] == [1.0, 0.0]
    assert [s.max_tokens for _, s in sampler.calls] == [40, 40]


def test_only_as_many_problems_as_configured_are_used_and_progress_reaches_their_count():
    config, told = dataclasses.replace(CONFIG, problems=5), []
    rows, _ = run(config=config, progress=told.append)
    assert rows[0].problem_ids == ("p0", "p1", "p2", "p3", "p4")
    assert told == list(range(1, count(PROBLEMS, config) + 1))


# Which counts


def test_tokens_are_the_sampled_ids_with_eos_over_right_wrong_and_cut_samples():
    texts = {"0": "ab|\\boxed{0}", "1": "abcd|\\boxed{9}", "2": "z" * 50}
    rows, _ = run(lambda prompt, key: texts[prompt.split()[-1][0]], problems=PROBLEMS[:3])
    lengths = [2 + 1 + 9 + 1, 4 + 1 + 9 + 1, 40]
    assert rows[0].mean_tokens == np.mean(lengths) and rows[0].median_tokens == lengths[1]
    assert rows[0].mean_tokens_correct == lengths[0]
    assert rows[0].mean_tokens_reasoning == np.mean([2, 4, 40])
    assert rows[0].accuracy == pytest.approx(1 / 3)
    shares = (rows[0].share_finished, rows[0].share_truncated, rows[0].share_unparseable)
    assert shares == pytest.approx((2 / 3, 1 / 3, 1 / 3))


def test_an_answer_inside_an_unclosed_thinking_span_does_not_count(tmp_path):
    rows, _ = run(lambda prompt, key: "so \\boxed{0} it is", problems=PROBLEMS[:1], out_path=tmp_path / "s.jsonl")
    assert rows[0].accuracy == 0 and rows[0].share_unparseable == 1 and rows[0].share_finished == 1
    assert rows[0].mean_tokens_correct is None
    assert {(s.extracted, s.answer) for s in read_samples(tmp_path / "s.jsonl")} == {(None, "")}


def test_accuracy_is_the_mean_over_problems_of_the_mean_over_attempts():
    samples = [sample(0, attempt=k, correct=k == 0) for k in range(4)] + [sample(1, attempt=k) for k in range(4)]
    assert rows_of(samples)[0].problem_accuracy == (0.25, 1.0)
    assert rows_of(samples)[0].accuracy == 0.625


def test_a_summary_holds_the_named_figures_and_is_json():
    summary = run()[0][0].summary()
    named = "accuracy accuracy_ci mean_tokens mean_tokens_ci n samples_per_problem temperature grader"
    assert set(named.split()) <= set(summary)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert not {"problem_ids", "problem_accuracy", "problem_tokens"} & set(summary)


# Which file


def test_the_sample_file_gives_the_same_rows_again_and_under_the_same_grader_too(tmp_path):
    strange = "\u2028 \u0085 \n \r \x1c é \U0001f600 "
    rows, _ = run(lambda p, k: strange + right_or_wrong(p, k), out_path=tmp_path / "s.jsonl")
    assert read_rows(tmp_path / "s.jsonl") == rows
    assert regrade(tmp_path / "s.jsonl", GraderPool("rules"), tmp_path / "t.jsonl") == rows
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "t.jsonl").read_bytes()
    samples = read_samples(tmp_path / "s.jsonl")
    assert len(samples) == 24 and samples[0].text.startswith(strange)
    assert all(len(s.response_ids) == s.tokens and s.response_ids[-1] == EOS for s in samples if s.ended == "stopped")


def test_regrading_grades_the_stored_answers_afresh(tmp_path):
    samples = [sample(i, correct=False, answer="\\boxed{1.0}", extracted=None, grader="other") for i in range(4)]
    write_samples(tmp_path / "s.jsonl", samples)
    assert read_rows(tmp_path / "s.jsonl")[0].accuracy == 0
    again = regrade(tmp_path / "s.jsonl", GraderPool("rules"))[0]
    assert (again.accuracy, again.grader, again.share_unparseable) == (1.0, f"rules {VERSION}", 0.0)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_samples(tmp_path / "s.jsonl", [sample()])
    old = (tmp_path / "s.jsonl").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_samples(tmp_path / "s.jsonl", [sample(), sample("q")])
    assert (tmp_path / "s.jsonl").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_a_broken_sample_file_is_refused_with_the_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "absent.jsonl")
    write_samples(tmp_path / "s.jsonl", [sample()])
    good = (tmp_path / "s.jsonl").read_text()
    (tmp_path / "s.jsonl").write_text(good + good[: len(good) // 2])
    with pytest.raises(UserError, match="line 2 is not a JSON object; wait for the evaluation that writes it"):
        read_rows(tmp_path / "s.jsonl")
    for damaged in (b"\xff" + good.encode(), b"[1]\n", good.replace("[1]", "null").encode()):
        (tmp_path / "s.jsonl").write_bytes(damaged + good.encode())
        with pytest.raises(UserError, match=r"line 1(:| is not a JSON object; remove the file)"):
            read_rows(tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").write_text(good.replace('"ended"', '"finish"'))
    with pytest.raises(UserError, match=r"line 1.*ended.*finish"):
        read_rows(tmp_path / "s.jsonl")


def test_a_file_of_before_is_read_and_says_nothing_of_marks(tmp_path):
    old = dataclasses.asdict(sample(marks={"boxed": True}, level="3"))
    for name in ("marks", "problem_set", "level", "subject", "top_p", "top_k", "seed"):
        del old[name]
    (tmp_path / "s.jsonl").write_text(json.dumps(old) + "\n")
    (found,) = read_rows(tmp_path / "s.jsonl")
    assert found.share_boxed is None and found.accuracy_answer_line is None and found.top_p is None
    assert regrade(tmp_path / "s.jsonl", GraderPool("rules"))[0].share_boxed == 0.0


# Going on after a kill


class Killed(Exception):
    pass


def test_an_evaluation_killed_at_any_block_is_finished_with_every_sample_graded_once(tmp_path):
    whole, _ = run(out_path=tmp_path / "whole.jsonl")
    path, sampled = tmp_path / "s.jsonl", []
    for blocks_until_killed in (2, 0, 1, 99):
        with growing(path, {"seed": 3}) as file:
            left = [blocks_until_killed]

            def keep(samples, file=file, left=left):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                file.add(samples)

            try:
                rows, sampler = going_on(blocks=Blocks(file.samples, keep, 5))
            except Killed:
                continue
            sampled.append(sum(len(requests) for requests, _ in sampler.calls))
    assert rows == whole and sampled == [24 - 15]
    read = read_samples(path)
    assert sorted(s.key for s in read) == sorted(s.key for s in read_samples(tmp_path / "whole.jsonl"))
    assert len({s.key for s in read}) == len(read) == 24


def test_a_line_that_a_kill_cut_short_is_made_again(tmp_path):
    path = tmp_path / "s.jsonl"
    with growing(path, {"seed": 3}) as file:
        file.add([sample("p"), sample("q")])
    path.write_bytes(path.read_bytes()[:-7])
    with growing(path, {"seed": 3}) as file:
        assert [s.problem_id for s in file.samples] == ["p"]
        file.add([sample("q")])
    assert [s.problem_id for s in read_samples(path)] == ["p", "q"]


def test_samples_made_with_other_settings_are_not_gone_on_with(tmp_path):
    with growing(tmp_path / "s.jsonl", {"seed": 3, "model": "a"}) as file:
        file.add([sample()])
    with (
        pytest.raises(UserError, match="seed = 4, and 3 there"),
        growing(tmp_path / "s.jsonl", {"seed": 4, "model": "a"}),
    ):
        pass
    for damaged in ("", "{", "[]", '{"settings": [1]}'):
        (tmp_path / "s.json").write_text(damaged)
        with pytest.raises(UserError, match="seed = 3, and None there"), growing(tmp_path / "s.jsonl", {"seed": 3}):
            pass
    with growing(tmp_path / "t.jsonl", {"seed": 3}):
        pass
    with growing(tmp_path / "t.jsonl", {"seed": 4}) as file:  # nothing was made yet
        assert file.samples == []


def test_more_attempts_go_on_from_fewer():
    kept = []
    going_on(blocks=Blocks(keep=kept.extend))
    more = dataclasses.replace(CONFIG, attempts=3)
    rows, sampler = going_on(more, blocks=Blocks(kept))
    assert rows == run(config=more)[0] and sum(len(requests) for requests, _ in sampler.calls) == 8


# Problems without room


def test_a_prompt_without_room_is_counted_as_wrong_and_shown_and_not_asked():
    problems = [*PROBLEMS[:3], Problem("long", "what is " + "9" * 40 + "?", "9" * 40)]
    rows, sampler = going_on(
        text=lambda prompt, key: f"m|\\boxed{{{prompt.split()[-1][:-1]}}}", problems=problems, room=40
    )
    assert max(len(r.prompt) for requests, _ in sampler.calls for r in requests) <= 40
    assert (rows[0].n, rows[0].unasked, rows[0].accuracy) == (4, 1, 0.75)
    assert rows[0].mean_tokens == rows[0].tokens_all.mean == 12 and rows[0].share_finished == 0.75
    assert "1 without room for their prompts" in shown(table(rows))
    mean, low, high = paired_difference(rows[0], rows[0], "tokens")
    assert mean == 0 and low < 0 < high


# What else the samples say


def test_attempts_are_counted_by_pass_and_by_majority():
    right = {"0": [1, 0, 0, 0], "1": [1, 1, 1, 0]}
    samples = [
        sample(i, attempt=k, correct=bool(c), extracted="1" if c else f"{k + 5}")
        for i in right
        for k, c in enumerate(right[i])
    ]
    found = rows_of(samples)[0]
    at = {k: estimate.mean for k, estimate in found.pass_at_k}
    assert at == {1: 0.5, 2: pytest.approx((0.5 + 1.0) / 2), 4: 1.0} and at[1] == found.accuracy
    assert found.maj_at_k.mean == pytest.approx((0.25 + 1.0) / 2)


def test_votes_are_for_answers_not_for_spellings():
    spellings = ["1/2", "0.5", "\\frac{1}{2}", "7", "7"]
    samples = [sample(attempt=k, extracted=x, correct=k < 3) for k, x in enumerate(spellings)]
    assert rows_of(samples)[0].maj_at_k.mean == 1.0


@pytest.mark.parametrize("correct", [False, True])
def test_right_answers_per_thousand_tokens_have_an_interval_where_all_are_alike(correct):
    worth = row([correct] * 10).right_per_1000_tokens
    assert worth.mean == (100 if correct else 0) and 20 < worth.upper - worth.lower < 50
    assert worth.lower <= worth.mean <= worth.upper
    one = row([correct]).right_per_1000_tokens
    assert one.upper - one.lower > 90


def test_comparisons_that_failed_are_told_beside_every_figure():
    rows = rows_of([sample(i, correct=False, failure="TypeError" if i < 3 else None) for i in range(5)])
    assert "graded by rules (3 comparisons failed, counted as wrong)" in " ".join(shown(table(rows)).split())


def test_tokens_are_told_as_mean_median_and_90th_percentile():
    samples = [sample(i, tokens=float(i), correct=i <= 10, reasoning_tokens=i / 2) for i in range(1, 102)]
    found = rows_of(samples)[0]
    assert found.tokens_all == (51, 51, 91) and found.tokens_correct[:2] == (5.5, 5.5)
    assert found.tokens_reasoning == (25.5, 25.5, 45.5)
    assert found.right_per_1000_tokens.mean == pytest.approx(1000 * (10 / 101) / 51)
    assert rows_of([sample(correct=False)])[0].tokens_correct == (None, None, None)


def test_a_budget_is_read_off_the_stored_samples():
    samples = [sample(i, tokens=float(10 * i), correct=i % 2 == 0) for i in range(1, 11)]
    found = {budget: (row.accuracy, row.mean_tokens) for budget, row in under_budgets(samples, (0.5, 1.0))}
    assert found == {50: (0.2, 40.0), 100: (0.5, 55.0)}


def test_levels_and_subjects_have_rows_of_their_own():
    samples = [sample(i, level=str(i % 2), subject="algebra", correct=i % 2 == 0) for i in range(6)]
    assert {v: (r.n, r.accuracy) for v, r in parts(samples, "level").items()} == {"0": (3, 1.0), "1": (3, 0.0)}
    assert [r.n for r in parts(samples, "subject").values()] == [6]
    assert parts([sample()], "level") == {} and by_part([sample()]) is None


def test_marks_show_when_the_format_moved_and_not_the_skill():
    before = [sample(i, marks={"boxed": True}) for i in range(3)] + [sample(3, marks={}, correct=False)]
    after = [dataclasses.replace(s, marks={"answer_line": True} if s.marks else {}) for s in before]
    one, other = row_of(before), row_of(after)
    assert (one.share_boxed, one.accuracy_boxed, one.share_answer_line, one.accuracy_answer_line) == (0.75, 0.75, 0, 0)
    assert (other.share_boxed, other.accuracy_boxed, other.accuracy_answer_line) == (0, 0, 0.75)
    assert one.share_unmarked == other.share_unmarked == 0.25


def test_the_paired_test_is_of_the_problems_differences():
    before, after = [False] * 12, [True] * 9 + [False] * 3
    assert paired_p(row(before), row(after)) == pytest.approx(2 / 2**9, abs=0.003)
    assert paired_p(row(before), row(before)) == 1.0


# Which intervals


def test_attempts_of_one_problem_are_no_evidence_about_other_problems():
    correct = [True, False, True, True, False, True, True, True]
    once = rows_of([sample(i, correct=c) for i, c in enumerate(correct)])[0]
    often = rows_of([sample(i, correct=c, attempt=a) for i, c in enumerate(correct) for a in range(50)])[0]
    assert once.accuracy_ci == often.accuracy_ci


def test_a_paired_difference_is_narrower_than_an_unpaired_one_and_changes_sign_with_its_order():
    rng = np.random.default_rng(2)
    before = rng.random(300) < 0.7
    after = before ^ (rng.random(300) < 0.03)
    a, b = row(before.tolist()), row(after.tolist())
    mean, low, high = paired_difference(a, b)
    assert mean == pytest.approx(after.mean() - before.mean()) and low < mean < high
    assert high - low < 0.5 * (a.accuracy_ci[1] - a.accuracy_ci[0])
    assert paired_difference(b, a) == pytest.approx((-mean, -high, -low), abs=0.004)


def test_pairing_is_by_problem_not_by_position():
    samples = [sample(i, tokens=float(i + 1), correct=i % 3 == 0) for i in range(30)]
    straight, turned = rows_of(samples)[0], rows_of(samples[::-1])[0]
    for of in ("accuracy", "tokens"):
        mean, low, high = paired_difference(straight, turned, of)
        assert mean == 0 and low < 0 < high
        assert (mean, low, high) == paired_difference(straight, straight, of)
    assert (
        paired_difference(
            straight, rows_of([dataclasses.replace(s, tokens=s.tokens + 5) for s in samples])[0], "tokens"
        )[0]
        == 5
    )


def test_a_pair_of_different_problems_is_refused():
    with pytest.raises(UserError, match=r"problem '4' .* same held-out problems"):
        paired_difference(row([True] * 4, name="a"), row([True] * 5, name="b"))


# The truncation control


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=1, max_size=30), st.floats(0.1, 120))
def test_the_truncation_control_has_the_asked_mean_length_and_only_loses_answers(drawn, mean_tokens):
    samples = [sample(i, tokens=t, correct=c) for i, (t, c) in enumerate(drawn)]
    whole, cut = rows_of(samples)[0], truncation_row(samples, mean_tokens)
    assert cut.mean_tokens == pytest.approx(min(mean_tokens, whole.mean_tokens))
    budget = max(cut.problem_tokens) if cut.share_truncated else np.inf
    expected = [c and t <= budget + 1e-9 for t, c in drawn]
    assert cut.accuracy == pytest.approx(np.mean(expected))
    assert cut.share_truncated == cut.share_unparseable == pytest.approx(np.mean([t > budget + 1e-9 for t, _ in drawn]))


def test_a_looser_budget_never_costs_accuracy():
    rng = np.random.default_rng(3)
    samples = [sample(i, tokens=int(t), correct=bool(t % 3)) for i, t in enumerate(rng.integers(1, 100, size=200))]
    accuracies = [truncation_row(samples, m).accuracy for m in range(5, 60, 5)]
    assert accuracies == sorted(accuracies) and accuracies[0] < accuracies[-1]


def test_the_truncation_control_takes_one_row_of_samples():
    with pytest.raises(ValueError, match="not 2"):
        truncation_row([sample(), sample(temperature=0.0)], 5.0)


# What the user meets


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"problems": 0}, "eval.problems: 0 .* at least 1"),
        ({"temperatures": ()}, "eval.temperatures: .* one or more"),
        ({"temperatures": (1.0, 1.0)}, "eval.temperatures"),
        ({"temperatures": (-0.1,)}, "eval.temperatures"),
        ({"top_p": 0.0}, "eval.top_p: 0.0"),
        ({"grader": "sympy"}, "eval.grader: 'sympy' is not known; .* math_verify, rules"),
    ],
)
def test_an_impossible_eval_section_is_refused_by_key(values, message):
    with pytest.raises(UserError, match=message):
        EvalConfig(**values)


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ([], "no problems to evaluate on"),
        ([PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]], "'p0' stands twice"),
        ([Problem("a", "q", " ")], "'a' has no answer"),
    ],
)
def test_problems_that_cannot_be_graded_are_refused_before_sampling(problems, message):
    sampler = ScriptedSampler(right_or_wrong)
    with pytest.raises(UserError, match=message):
        evaluate("base", sampler, CharacterChat(), problems, CONFIG, seed=0)
    assert not sampler.calls


def shown(table):
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_every_table_fits_eighty_columns_and_says_how_its_figures_were_made():
    rng = np.random.default_rng(4)
    samples = [
        sample(
            i,
            float(t),
            bool(c),
            attempt=k,
            name=name,
            grader=grader,
            marks={"boxed": bool(c)},
            level=str(i % 3),
            subject="Counting & Probability",
            problem_set="math500",
            top_p=0.95,
            top_k=20,
            seed=7,
            max_tokens=32768,
            reasoning_tokens=float(t) - 5,
        )
        for name, grader in (("base", "rules 1"), ("student [x]", "dual_path 0.9.0+1"))
        for i in range(64)
        for k, (t, c) in enumerate(zip(rng.integers(50, 30000, 4), rng.random(4) < 0.7, strict=True))
    ]
    rows, by_row = rows_of(samples), [samples[:256], samples[256:]]
    for made in (
        table(rows),
        formats(rows),
        attempts(rows),
        lengths(rows),
        budgets(by_row),
        by_part(by_row[0]),
        against([(rows[0], rows[1])]),
    ):
        text = shown(made)
        assert "…" not in text and max(map(len, text.splitlines())) <= 80
        told = " ".join(text.split())
        for said in ("math500", "64 problems x 4", "T = 1", "top-p 0.95", "top-k 20", "32,768 tokens", "seed 7"):
            assert said in told, (made.title, said)


def test_the_table_fits_eighty_columns_and_names_every_grader():
    rng = np.random.default_rng(4)
    rows = [
        row(
            (rng.random(256) < 0.9).tolist(),
            rng.integers(50, 99, 256).tolist(),
            name=name,
            temperature=t,
            grader=grader,
        )
        for name, grader in (("base", "rules"), ("base, concise prompt", "rules"), ("student", "math_verify 0.9.0"))
        for t in (1.0, 0.0)
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(table(rows))
    text = console.file.getvalue()
    assert "…" not in text
    for word in ("base", "student", "greedy", "T = 1", "rules", "math_verify", "256"):
        assert word in text
    assert f"{100 * rows[-1].accuracy:.1f}" in text and f"{rows[-1].mean_tokens:.1f}" in text
