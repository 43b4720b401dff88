"""Claims about rewriting a file: one line a problem whenever it is killed, and what is kept can be trained on."""

import json
import re
from dataclasses import replace

import pytest

from mpd_jax import config, offline
from mpd_jax.data.problems import read_file
from mpd_jax.eval.grade import VERSION
from mpd_jax.recipe.write import DatasetWriter
from mpd_jax.roles import open_roles
from mpd_jax.sampling.sampler import Response
from mpd_jax.train.records import Records
from mpd_jax.types import Problem, UserError
from tests.e2e.tiny import QUICKSTART, SMALL
from tests.fake_server import FakeServer

COUNT, BLOCK = 10, 4
COLUMNS = {"question": "problem", "answer": "answer", "response": "solution"}
OVERRIDES = ["sampling.slots=1", f"problems.columns={json.dumps(COLUMNS)}"]  # blocks of 4 x 1


class Killed(BaseException):
    """Nothing in the package catches it."""


class Stub:
    """A rewriter whose answer depends on the request alone: right, but malformed for every fourth problem."""

    version = 0

    def __init__(self, chat, kill_at=None):
        self.chat, self.kill_at, self.calls, self.requests = chat, kill_at, 0, []

    def sample(self, requests, sampling, progress=None):
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        self.requests += requests
        numbers = [int(re.findall(r"What is (\d+)\+1", self.chat.text(r.prompt))[0]) for r in requests]
        texts = [f"{n}+1={n + 1}.\n{'' if n % 4 == 3 else '####'}\n\\boxed{{{n + 1}}}<|im_end|>" for n in numbers]
        return [Response(ids, (), "stopped") for ids in map(self.chat.encode, texts)]


@pytest.fixture(scope="module")
def settings():
    return config.load(QUICKSTART, OVERRIDES)


@pytest.fixture(scope="module")
def chat(settings):
    return open_roles(settings).student.chat


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [
        {
            "id": n,
            "problem": f"What is {n}+1?",
            "answer": str(n + 1) if n else None,
            "solution": f"<think>I add 1 to {n}, slowly and with care.</think>\\boxed{{{n + n % 2}}}",
        }
        for n in range(COUNT)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def answering(monkeypatch, chat):
    """Lets a stub answer; called with the number of the call in which it is killed."""

    def install(kill_at=None):
        stub = Stub(chat, kill_at)
        monkeypatch.setattr(offline, "answering", lambda *_: stub)
        return stub

    return install


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_problem_tells_what_became_of_it_and_the_kept_can_be_trained_on(
    tmp_path, settings, chat, source, answering
):
    stub, out = answering(), tmp_path / "new" / "out.jsonl"
    summary = offline.rewrite(source, out, settings)
    lines = rows(out)
    assert [line["id"] for line in lines] == [str(n) for n in range(COUNT)] and len(stub.requests) == COUNT
    assert [line["verdict"] for line in lines] == ["malformed" if n % 4 == 3 else "kept" for n in range(COUNT)]
    assert lines[3].keys() == {"id", "problem", "answer", "original"} | {"verdict", "dropped", "tokens_before"} | {
        "right_before"
    }
    assert lines[1]["solution"] == "<think>\n1+1=2.\n</think>\n\n\\boxed{2}"
    assert lines[1]["original"] == rows(source)[1]["solution"] and "student_step" not in lines[1]
    assert lines[1]["ratio"] == lines[1]["tokens_after"] / lines[1]["tokens_before"] < 1
    assert (lines[2]["right_before"], lines[2]["right_after"]) == (False, True)
    assert "right_before" not in lines[0]  # it has no reference answer
    kept = [line for line in lines if "solution" in line]
    problems = read_file(out, COLUMNS)
    assert [problem.id for problem in problems] == [line["id"] for line in kept]
    written = DatasetWriter(chat)(problems, 0)
    assert [len(t.response) for t in written] == [line["tokens_after"] for line in kept]
    assert summary["verdicts"] == {"kept": 8, "malformed": 2} and summary["grader"] == f"rules {VERSION}"
    assert summary["compression_ratio"] == sum(x["tokens_after"] for x in kept) / sum(x["tokens_before"] for x in kept)
    right = (summary["right_before"], summary["right_before_kept"], summary["right_after"])
    assert right == (5 / 9, 3 / 7, 1.0)


@pytest.mark.parametrize("left", [1, -1, 0], ids=["of the next line a byte", "of the last line all but one", "whole"])
def test_what_a_kill_left_is_gone_on_from_and_ends_as_one_never_stopped(tmp_path, settings, source, answering, left):
    answering()
    straight, out = tmp_path / "straight.jsonl", tmp_path / "out.jsonl"
    summary = offline.rewrite(source, straight, settings)
    first = answering(kill_at=3)
    with pytest.raises(Killed):
        offline.rewrite(source, out, settings)
    there = out.read_bytes()
    assert there == b"".join(straight.read_bytes().splitlines(keepends=True)[: 2 * BLOCK])
    out.write_bytes(straight.read_bytes()[: len(there) + left])
    second = answering()
    assert offline.rewrite(source, out, settings) == summary
    assert out.read_bytes() == straight.read_bytes()
    assert len(first.requests) == 2 * BLOCK and len(second.requests) == COUNT - 2 * BLOCK + (left < 0)
    third = answering()
    assert offline.rewrite(source, out, settings) == summary and not third.calls


def test_another_config_another_input_and_a_strange_file_are_refused(tmp_path, settings, source, answering):
    answering(kill_at=2)
    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        offline.rewrite(source, out, settings)
    there = out.read_bytes()
    other = config.load(QUICKSTART, [*OVERRIDES, "recipe.rewrite.keep=[shorter]", "train.steps=30", "sampling.slots=2"])
    with pytest.raises(UserError, match=r"out.jsonl: .*recipe.rewrite.keep = \['shorter'\], and \[\] there\); choose"):
        offline.rewrite(source, out, other)
    changed = tmp_path / "changed.jsonl"
    changed.write_bytes(
        source.read_bytes() + source.read_bytes().replace(b"0,", b"77,", 1).splitlines(keepends=True)[0]
    )
    with pytest.raises(UserError, match=r"out.jsonl: .*input = "):
        offline.rewrite(changed, out, settings)
    with pytest.raises(UserError, match=r"in.jsonl: it exists, and in.jsonl.meta.json"):
        offline.rewrite(source, source, settings)
    with pytest.raises(UserError, match=r"recipe.rewrite.how: nobody"):
        offline.rewrite(source, out, config.load(QUICKSTART, ["recipe.rewrite.how=nobody"]))
    assert out.read_bytes() == there


def test_trajectories_of_a_run_are_rewritten_and_know_the_step_that_wrote_them(tmp_path, settings, chat, answering):
    answering()
    train, row = tmp_path / "train.jsonl", {"answer": None, "solution": None}
    texts = [json.dumps({"id": f"p{n}", **row, "problem": f"What is {n}+1?"}) + "\n" for n in range(2)]
    train.write_text("".join(texts))
    (example,) = DatasetWriter(chat)([Problem("p0", "What is 0+1?", response="<think>Slowly, 1.</think>1")], 0)
    written = [
        replace(example, problem_id=f"p{n}", attempt=a, prompt=chat.prompt("plain", Problem("", f"What is {n}+1?")))
        for n in range(2)
        for a in range(2)
    ]
    written = [replace(t, writer="student", version=5, ended="stopped") for t in written]
    written[3] = replace(written[3], ended="cut", response=chat.encode("<think>\nSlowly"))
    records = Records(tmp_path, seed=0)
    records.save(6, [replace(t, writer="teacher", version=0, original=t) for t in written])
    kept = config.load(QUICKSTART, [*OVERRIDES, f"problems.train={train}", "recipe.rewrite.keep=[finished]"])
    offline.rewrite(records.path(6), tmp_path / "out.jsonl", kept)
    lines = rows(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == ["p0", "p0:1", "p1", "p1:1"]
    assert {line["student_step"] for line in lines} == {5}
    assert lines[0]["original"] == "<think>\nSlowly, 1.\n</think>\n\n1"
    assert (lines[3]["original"], lines[3]["verdict"]) == ("<think>\nSlowly\n", "original_unfinished")
    asked_otherwise = replace(kept.recipe, contexts=replace(kept.recipe.contexts, plain="Hm. {question}"))
    with pytest.raises(UserError, match=r"problem 'p0' of a run with .*another wording"):
        offline.rewrite(records.path(6), tmp_path / "other.jsonl", replace(kept, recipe=asked_otherwise))
    train.write_text(train.read_text().splitlines()[1])
    with pytest.raises(UserError, match=r"step_000006.jsonl.gz: problem 'p0' of a run with other problems"):
        offline.rewrite(records.path(6), tmp_path / "other.jsonl", kept)
    train.write_text("".join(texts))
    records.path(6).write_bytes(records.path(6).read_bytes()[:-9])
    with pytest.raises(UserError, match=r"step_000006.jsonl.gz: the trajectories of a run, damaged"):
        offline.rewrite(records.path(6), tmp_path / "other.jsonl", kept)


def test_a_fallback_to_an_original_that_was_cut_is_given_up(chat, settings):
    problem = Problem("p", "?", "1")
    (t,) = DatasetWriter(chat)([replace(problem, response="<think>a</think>1")], 0)
    for response, ended, dropped in ((t.response, "stopped", None), (t.response[:-1], "cut", True)):
        original = replace(t, response=response, ended=ended)
        item = offline.Item("p", problem, original, "")
        named = {name: name for name in ("id", "question", "answer", "response")}
        assert offline.line_of(item, replace(original, verdict="longer"), chat, None, named).get("dropped") is dropped


def test_servers_answer_for_a_rewriter_that_they_hold(tmp_path, source, chat):
    with FakeServer(eos_id=chat.end[-1], model="held") as server:
        settings = config.load(QUICKSTART, [*SMALL, *OVERRIDES, f"teacher.serve={server.url}"])
        summary = offline.rewrite(source, tmp_path / "out.jsonl", settings)
        drafts = [chat.text(body["prompt"]) for body in server.bodies() if len(body["prompt"]) > 40]
    assert summary["problems"] == len(rows(tmp_path / "out.jsonl")) == COUNT
    assert sum("slowly and with care" in draft for draft in drafts) == COUNT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.meta.json"]
