"""`mpd-jax eval`: sets by name, samples kept and gone on with, stored ones graded again and beside a baseline."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpd_jax.cli import app
from mpd_jax.eval import command
from mpd_jax.eval.figures import rows_of
from mpd_jax.eval.samples import UNASKED, Sample, read_samples, write_samples
from mpd_jax.roles import TINY
from mpd_jax.sampling.sampler import Response
from mpd_jax.types import UserError
from tests.fake_server import FakeServer

ROOT = Path(__file__).parent.parent
MATH500 = ROOT.parent / "shared" / "data" / "math500.jsonl"
NAMES = ("trained-by-me", "trained, step 12", "base", "trained, step 9")
FEW = ["eval.temperatures=[1.0]", "eval.max_tokens=16", "eval.concise_row=false"]


class Scripted:
    """In the place of the JAX sampler: a length that depends on the key, and no answer. Fails after so many calls."""

    slots, calls_left = 1, 99

    def load(self, weights, version):
        pass

    def sample(self, requests, sampling, progress=None):
        if Scripted.calls_left == 0:
            raise KeyboardInterrupt
        Scripted.calls_left -= 1
        Scripted.asked += [request.prompt for request in requests]
        return [Response((5,) * (1 + r.key[0] % 9), (), "stopped") for r in requests]


@pytest.fixture
def scripted(monkeypatch):
    Scripted.calls_left, Scripted.asked = 99, []
    monkeypatch.setattr(command, "make_sampler", lambda *_: Scripted())
    monkeypatch.setattr("mpd_jax.roles.ModelFiles.weights", lambda *_: None)
    return Scripted


@pytest.fixture
def sets(tmp_path):
    """Two files of problems, with levels; the last of the first has a question that no window holds."""
    for name, count in (("one", 20), ("two", 5)):
        rows = [
            {"id": f"{name}{i}", "question": f"What is {i}?", "answer": str(i), "level": str(i % 2)}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "one.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "question": "9 " * 3000, "answer": "1", "level": "1"}) + "\n")
    return [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]


def run(sets, out, *overrides, **options):
    command.run("tiny:student", None, [*FEW, *overrides], sets=sets, out=str(out), **options)
    return {path.parent.name: read_samples(path) for path in sorted(out.glob("*/*.jsonl"))}


def test_sets_are_sampled_whole_and_told_apart_and_a_problem_without_room_is_counted(scripted, sets, tmp_path, capsys):
    found = run(sets, tmp_path / "out", "eval.attempts=2")
    assert {name: len(samples) for name, samples in found.items()} == {"one": 42, "two": 10}
    assert {s.problem_set for s in found["two"]} == {"two"} and {s.level for s in found["two"]} == {"0", "1"}
    assert [s.problem_id for s in found["one"] if s.ended == UNASKED] == ["long", "long"]
    assert len(scripted.asked) == 50
    said = " ".join(capsys.readouterr().out.split())
    assert "one: 21 problems x 2, 1 without room for their prompts, counted as wrong, T = 1" in said
    assert "level 0" in said and "pass@2" in said and "seed 0" in said


def test_an_evaluation_that_was_stopped_goes_on_and_grades_every_sample_once(scripted, sets, tmp_path):
    whole = run(sets, tmp_path / "whole")
    asked, scripted.asked = scripted.asked, []
    for calls in (1, 2):
        scripted.calls_left = calls
        with pytest.raises(KeyboardInterrupt):
            run(sets, tmp_path / "out")
    scripted.calls_left = 99
    assert run(sets, tmp_path / "out") == whole
    assert sorted(scripted.asked) == sorted(asked)
    scripted.asked = []
    assert run(sets, tmp_path / "out") == whole and not scripted.asked
    with pytest.raises(UserError, match="seed = 4, and 0 there"):
        run(sets, tmp_path / "out", "run.seed=4")


def test_stored_samples_are_graded_by_every_grader_that_is_named(scripted, sets, tmp_path, capsys):
    run(sets, tmp_path / "out")
    capsys.readouterr()
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "out"), "--regrade", "rules", "--regrade", "answer_line"])
    assert result.exit_code == 0 and "answer_line 1" in result.stdout and "right by" in result.stdout
    again = tmp_path / "out" / "regraded_answer_line"
    assert sorted(str(p.relative_to(again)) for p in again.rglob("*.jsonl")) == [
        "one/tiny:student.jsonl",
        "two/tiny:student.jsonl",
    ]
    for _ in range(2):  # what was graded again is not graded again
        command.run(str(tmp_path / "out" / "one"), None, [], regrade=["rules"])
    assert [p.name for p in (tmp_path / "out" / "one" / "regraded_rules").iterdir()] == ["tiny:student.jsonl"]
    with pytest.raises(UserError, match="holds no samples"):
        command.run(str(tmp_path / "none"), None, [], regrade=["rules"])


def test_a_baseline_is_of_the_same_problems_and_the_same_grader(scripted, sets, tmp_path, capsys):
    run(sets, tmp_path / "base")
    run(sets[:1], tmp_path / "out", "run.seed=1", against=str(tmp_path / "base"))
    said = " ".join(capsys.readouterr().out.split())
    assert "Against the baseline, paired by problem" in said and "+0.0" in said and "1.0000" in said
    with pytest.raises(UserError, match="graded by rules 1, and this is by answer_line 1"):
        run(sets[:1], tmp_path / "other", "eval.grader=answer_line", against=str(tmp_path / "base"))
    scripted.calls_left = 0  # both are told before anything is sampled
    with pytest.raises(UserError, match="no samples of the same 3 problems of one at temperature 1"):
        run(sets[:1], tmp_path / "few", "eval.problems=3", against=str(tmp_path / "base"))


def test_the_samples_of_another_model_in_the_same_place_are_not_gone_on_with(scripted, sets, tmp_path):
    model = shutil.copytree(TINY / "student", tmp_path / "model")
    words = (str(model), None, [*FEW, "sampling.prompt_tokens=96"])
    command.run(*words, sets=sets[1:], out=str(tmp_path / "out"))
    command.run(*words, sets=sets[1:], out=str(tmp_path / "out"))
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"else")
    with pytest.raises(UserError, match=r"samples made with other settings \(files = "):
        command.run(*words, sets=sets[1:], out=str(tmp_path / "out"))


def test_no_set_is_stored_where_its_name_would_lead_elsewhere(scripted, sets, tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    shutil.copytree(tmp_path, inner, ignore=lambda *_: {"inner"})
    (inner / "one.jsonl").unlink()
    monkeypatch.chdir(inner)
    assert list(run(["."], tmp_path / "out")) == ["inner"]
    assert list(run([f"{inner}/../inner/two.jsonl"], tmp_path / "other")) == ["two"]
    (inner / "two.jsonl").rename(inner / "regraded_rules.jsonl")
    with pytest.raises(UserError, match=r"--set: regraded_rules\.jsonl would be stored as 'regraded_rules'"):
        run(["regraded_rules.jsonl"], tmp_path / "out")


def test_an_out_that_cannot_be_written_is_not_said_to_be_in_use(scripted, sets, tmp_path):
    (tmp_path / "out" / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--out: .*out could not be written: Is a directory.* another --out"):
        run(sets, tmp_path / "out")


def test_problems_that_were_trained_on_are_not_graded_again_as_held_out(tmp_path, capsys):
    for name in ("base", "training problems, step 8"):
        values = {"name": name, "context": "plain", "temperature": 1.0, "problem_id": "p", "attempt": 0}
        values |= {"reference": "1", "response_ids": (), "text": "", "answer": "1", "tokens": 1.0, "ended": "stopped"}
        values |= {"reasoning_tokens": None, "max_tokens": 9, "extracted": None, "correct": False, "grader": ""}
        write_samples(tmp_path / f"{name}.jsonl", [Sample(**values, failure=None)])
    command.run(str(tmp_path), None, [], regrade=["rules"])
    said = capsys.readouterr().out
    assert "base" in said and "training problems" not in said


def test_a_baseline_of_another_set_of_the_same_name_is_refused(scripted, sets, tmp_path):
    run(sets[1:], tmp_path / "base")
    path = Path(sets[1])
    path.write_text(path.read_text().replace('"answer": "3"', '"answer": "33"'))
    scripted.calls_left = 0
    with pytest.raises(UserError, match="--against: problem 'two3' has the answer '3' there and '33' here"):
        run(sets[1:], tmp_path / "out", against=str(tmp_path / "base"))


def test_a_baseline_may_be_called_like_a_trained_student(scripted, sets, tmp_path):
    run(sets[:1], tmp_path / "base")
    found = [
        dataclasses.replace(row, name=name)
        for row in rows_of(command._stored(str(tmp_path / "base")))
        for name in NAMES
    ]
    ids = set(found[0].problem_ids)
    assert command._baseline_of("one", 1.0, ids, "rules 1", found).name == "trained, step 12"


def test_several_names_may_follow_one_set_option(monkeypatch):
    seen = {}
    monkeypatch.setattr(command, "run", lambda *given, **options: seen.update(options, overrides=given[2]))
    words = ["eval", "tiny:student", "--set", "math500", "aime25", "eval.attempts=4", "--set", "amc23"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert sorted(seen["sets"]) == ["aime25", "amc23", "math500"] and seen["overrides"] == ["eval.attempts=4"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regrade": ["rules"], "sets": ["x"]}, "--regrade: it samples nothing"),
        ({"regrade": ["rules"], "which": 3}, "--regrade: .* leave --step"),
        ({"against": "/nowhere"}, "--against: /nowhere holds no samples"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        command.run("tiny:student", None, FEW, **options)


def test_a_model_on_a_server_is_evaluated_like_one_here(tmp_path, sets):
    with FakeServer(model="tiny", window=512) as server:
        served = f"student.serve={server.url}"
        found = run(sets[1:], tmp_path / "out", served)["two"]
        assert [s.problem_id for s in found] == [f"two{i}" for i in range(5)]
        assert all(s.tokens <= 16 and s.grader == "rules 1" for s in found)
        first = server.completions
        assert run(sets[1:], tmp_path / "out", served)["two"] == found and server.completions == first


@pytest.mark.slow
def test_math500_is_evaluated_to_the_end_though_killed_twice(tmp_path, capsys):
    """The tiny student knows nothing of it: near zero, and shown as such."""
    if not MATH500.exists():
        pytest.skip("needs ../shared/data/math500.jsonl")
    out = tmp_path / "out"
    words = [
        sys.executable,
        "-m",
        "mpd_jax",
        "eval",
        "tiny:student",
        "--set",
        str(MATH500),
        "--out",
        str(out),
        *FEW[::2],
    ]
    words += ["problems.heldout_columns={id: unique_id, question: problem}", "eval.grader=dual_path"]
    path, environment = out / "math500" / "tiny:student.jsonl", {**os.environ, "JAX_PLATFORMS": "cpu"}

    def lines():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for least in (60, 220):
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while lines() < least:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = lines()
    finished = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    print(finished.stdout)
    samples = read_samples(path)
    assert 220 <= killed_at < 500 and len(samples) == len({s.key for s in samples}) == 500
    assert all(s.grader.startswith("dual_path ") for s in samples)
    assert "math500: 500 problems x 1" in " ".join(finished.stdout.split())
