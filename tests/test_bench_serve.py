"""The server's benchmark, on the server of the tests: what it sends and counts, not what it times."""

import json
import stat
import sys

import pytest

from mpd_jax.bench import serve
from mpd_jax.bench.sample import WITHOUT_TORCH, open_subject
from mpd_jax.bench.serve import WITHOUT_VLLM, feed
from mpd_jax.types import UserError
from tests.fake_server import FakeServer, bigram

COUNT, TOKENS = 6, 5
SIZES = {"path": "tiny:student", "count": COUNT, "tokens": TOKENS, "pairs": 2, "repeats": 1, "max_tokens": 8}

# Stands for `vllm bench serve`: writes down how it was called, and a result.
PROGRAM = """#!{python}
import json, pathlib, sys
here = pathlib.Path("{here}")
given = dict(word[2:].split("=", 1) for word in sys.argv[3:] if "=" in word)
given["prompts"] = [json.loads(line)["prompt"] for line in open(given["dataset-path"])]
calls = here / "calls.jsonl"
with calls.open("a") as file:
    file.write(json.dumps([sys.argv[1:3], given]) + "\\n")
made = {made}
result = {{"total_output_tokens": made, "duration": 0.5}}
if made is None:
    sys.exit("no such option")
(pathlib.Path(given["result-dir"]) / given["result-filename"]).write_text(json.dumps(result))
"""


def program(directory, made):
    path = directory / "vllm"
    path.write_text(PROGRAM.format(python=sys.executable, here=directory, made=made))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    monkeypatch.setattr(serve, "transformers_generate", lambda *given: None)


@pytest.fixture
def server():
    with FakeServer(bigram(1), window=512) as server:
        yield server


def test_the_load_is_the_clients_own_and_both_are_counted_alike(tmp_path, server, capsys):
    result = serve.run(server.url, json=True, vllm=program(tmp_path, COUNT * TOKENS), concurrency=3, **SIZES)
    assert capsys.readouterr().out == "" and json.loads(json.dumps(result)) == result
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [words for words, _ in calls] == [["bench", "serve"]] * 3  # one to warm up, two that count
    given = calls[0][1]
    asked = [body for body in server.bodies() if body["max_tokens"] == TOKENS and body["prompt"] != [0]]
    assert len(asked) == 3 * COUNT and len({body["seed"] for body in asked}) == 3 * COUNT
    assert sorted(given["prompts"] * 3) == sorted(body["prompt"] for body in asked)
    sent = {**asked[0], "seed": 0}
    left_out = {name: sent.pop(name) for name in ("model", "prompt", "stream")}
    assert json.loads(given["extra-body"]) == sent and sent["stop_token_ids"] == [] and sent["ignore_eos"]
    assert given["base-url"] == server.url and given["model"] == left_out["model"] == "tiny"
    assert given["max-concurrency"] == "3" and given["num-prompts"] == str(COUNT)
    feeding = result["feeding"]
    assert feeding["load"] == {
        "median": COUNT * TOKENS / 0.5,
        "low": COUNT * TOKENS / 0.5,
        "high": COUNT * TOKENS / 0.5,
    }
    assert feeding["share"]["low"] <= feeding["share"]["median"] <= feeding["share"]["high"]
    serve.show(result)
    assert "client over vllm bench serve" in capsys.readouterr().out


def test_pairs_are_measured_in_turn_and_the_first_warms_up():
    ours, theirs, order = iter([1.0, 50.0, 30.0, 10.0]), iter([1.0, 100.0, 30.0, 40.0]), []

    def client(number):
        order.append(("client", number))
        return next(ours)

    def load(number):
        order.append(("load", number))
        return next(theirs)

    measured = feed(client, load, 3)
    assert order == [(name, number) for number in range(4) for name in ("client", "load")]
    assert measured["client"] == {"median": 30.0, "low": 10.0, "high": 50.0}
    assert measured["load"] == {"median": 40.0, "low": 30.0, "high": 100.0}
    assert measured["share"] == {"median": 0.5, "low": 0.25, "high": 1.0}


@pytest.mark.parametrize(("made", "said"), [(COUNT * TOKENS - 1, "made 29 tokens of 30"), (None, "no such option")])
def test_a_load_that_did_something_else_is_told(tmp_path, server, made, said):
    with pytest.raises(UserError, match=f"vllm bench serve .*{said}"):
        serve.run(server.url, json=True, vllm=program(tmp_path, made), **SIZES)


def test_all_answer_the_same_problems_up_to_their_ends_and_equal_responses_are_counted(tmp_path, server, monkeypatch):
    """The server stands on the student itself, but for one problem."""
    subject = open_subject("tiny:student", COUNT, 8)
    answers = {r.prompt: a.ids for r, a in zip(subject.requests, greedy(subject), strict=True)}
    odd = subject.requests[2].prompt

    class Student(FakeServer):
        def _sample(self, body, prompt, index, logprobs):
            ids = answers.get(tuple(prompt))
            if ids is None or body["max_tokens"] != 8:
                return super()._sample(body, prompt, index, logprobs)
            ids = [1] * 8 if tuple(prompt) == odd else list(ids)
            return ids, [-1.0] * len(ids), "stop" if ids[-1] == self.eos_id else "length", None

    generated = []

    def generate(requests, limit):
        generated.append((len(requests), limit))
        return [answers[r.prompt] for r in requests]

    monkeypatch.setattr(serve, "transformers_generate", lambda *given: generate)
    monkeypatch.setattr(serve, "BATCH", 4)
    with Student(bigram(1)) as there:
        servers = serve.Servers([there.url], serve.ServerConfig())
        rows = serve.side_by_side(subject, servers, tmp_path, repeats=2)
        asked = [body for body in there.bodies() if body["max_tokens"] == 8 and body["prompt"] != [0]]
    assert len(asked) == 2 * COUNT, "nothing is read back from disk"
    assert [(row["who"], row["equal_responses"]) for row in rows] == [
        ("JAX sampler", 1.0),
        ("vLLM server", 5 / 6),
        ("transformers generate", 1.0),
    ]
    assert all(row["responses"] == COUNT for row in rows)
    assert rows[0]["tokens"] == sum(map(len, answers.values()))
    assert generated == [(4, 2), (4, 8), (2, 8), (4, 8), (2, 8)]


def greedy(subject):
    return subject.sampler(4).sample(subject.requests, serve.SamplingConfig(temperature=0.0, max_tokens=8))


def test_without_torch_and_without_vllm_the_rest_is_measured(server, monkeypatch, capsys):
    monkeypatch.setattr(serve.shutil, "which", lambda name: None)
    result = serve.run(server.url, **SIZES)
    assert result["feeding"]["load"] is result["feeding"]["share"] is None
    assert [row["who"] for row in result["answering"]] == ["JAX sampler", "vLLM server"]
    said = capsys.readouterr().out
    assert WITHOUT_VLLM in said and WITHOUT_TORCH in said
    with pytest.raises(UserError, match="--vllm: nothing is no program"):
        serve.run(server.url, vllm="nothing", **SIZES)
