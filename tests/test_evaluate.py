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
from mpd_jax.eval import evaluate as module
from mpd_jax.eval.evaluate import (
    EvalConfig,
    Sample,
    count,
    evaluate,
    interval,
    paired_difference,
    read_rows,
    read_samples,
    regrade,
    rows_of,
    table,
    truncation_row,
    write_samples,
)
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
    assert not [key for key in summary if key.startswith("problem_")]


# Which file


def test_the_sample_file_gives_the_same_rows_again_and_under_the_same_grader_too(tmp_path):
    strange = "\u2028 \u0085 \n \r \x1c é \U0001f600 "
    rows, _ = run(lambda p, k: strange + right_or_wrong(p, k), out_path=tmp_path / "s.jsonl")
    assert read_rows(tmp_path / "s.jsonl") == rows
    assert regrade(tmp_path / "s.jsonl", "rules", tmp_path / "t.jsonl") == rows
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "t.jsonl").read_bytes()
    samples = read_samples(tmp_path / "s.jsonl")
    assert len(samples) == 24 and samples[0].text.startswith(strange)
    assert all(len(s.response_ids) == s.tokens and s.response_ids[-1] == EOS for s in samples if s.ended == "stopped")


def test_regrading_grades_the_stored_answers_afresh(tmp_path):
    samples = [sample(i, correct=False, answer="\\boxed{1.0}", extracted=None, grader="other") for i in range(4)]
    write_samples(tmp_path / "s.jsonl", samples)
    assert read_rows(tmp_path / "s.jsonl")[0].accuracy == 0
    again = regrade(tmp_path / "s.jsonl", "rules")[0]
    assert (again.accuracy, again.grader, again.share_unparseable) == (1.0, "rules", 0.0)


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
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read_rows(tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").write_text(good.replace('"ended"', '"finish"'))
    with pytest.raises(UserError, match=r"line 1.*ended.*finish"):
        read_rows(tmp_path / "s.jsonl")


# Which intervals


def test_the_bootstrap_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = {"accuracy": 0, "tokens": 0}
    trials, n, k = 400, 80, 4
    for _ in range(trials):
        # Problems differ in difficulty, so the k attempts of one are alike: intervals over samples would be too narrow.
        chance_P = rng.beta(2.0, 0.5, size=n)
        accuracy_P = rng.binomial(k, chance_P) / k
        low, high = interval(accuracy_P, 0.0, 1.0, resamples=1000)
        covered["accuracy"] += low <= 0.8 <= high
        low, high = interval(rng.exponential(50.0, size=n), 0.0, 1e4, resamples=1000)
        covered["tokens"] += low <= 50.0 <= high
    assert 0.91 <= covered["accuracy"] / trials <= 0.98
    assert 0.90 <= covered["tokens"] / trials <= 0.98


def test_attempts_of_one_problem_are_no_evidence_about_other_problems():
    correct = [True, False, True, True, False, True, True, True]
    once = rows_of([sample(i, correct=c) for i, c in enumerate(correct)])[0]
    often = rows_of([sample(i, correct=c, attempt=a) for i, c in enumerate(correct) for a in range(50)])[0]
    assert once.accuracy_ci == often.accuracy_ci


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.floats(0, 1), st.data())
def test_no_interval_has_zero_width_or_leaves_its_bounds(n, value, data):
    values_P = np.full(n, value)
    if data.draw(st.booleans()):
        values_P[0] = data.draw(st.floats(0, 1))
    low, high = interval(values_P, 0.0, 1.0, resamples=500)
    assert 0 <= low <= values_P.mean() + 1e-9 and values_P.mean() - 1e-9 <= high <= 1
    if np.ptp(values_P) == 0 or (np.ptp(values_P) > 1e-6 and n > 1):
        assert low < high


def test_all_right_and_all_wrong_get_wilsons_interval():
    n, z = 200, 1.959963984540054
    for p in (0.0, 1.0):
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert interval(np.full(n, p), 0.0, 1.0) == pytest.approx((centre - half, centre + half))


def test_the_same_samples_give_the_same_interval():
    values_P = np.random.default_rng(1).random(300)
    assert interval(values_P, 0.0, 1.0) == interval(values_P, 0.0, 1.0)


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
        ({"grader": "sympy"}, "eval.grader: 'sympy' .* rules or math_verify"),
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
    assert module.RESAMPLES == 10_000
