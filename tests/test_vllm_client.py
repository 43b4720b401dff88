"""The sampler on servers: what it sends, what it refuses to believe, and that nothing else decides its responses."""

import json
import threading
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from mpd_jax.sampling import asking, wire
from mpd_jax.sampling.sampler import Request, SamplingConfig, request_key
from mpd_jax.sampling.servers import ServerConfig, ServerError, Servers
from mpd_jax.sampling.vllm_client import VLLMSampler
from mpd_jax.types import UserError
from tests.fake_server import FakeServer, bigram
from tests.test_hosts import finish, start

VOCAB, EOS = 64, 48
SAMPLED = SamplingConfig(temperature=0.7, top_p=0.9, top_k=20, max_tokens=12)
REQUESTS = [Request((5, 6, 7 + i), request_key(0, "write", 0, f"p{i}", 0)) for i in range(24)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(asking, "BACKOFF_S", (0.005, 0.05))
    monkeypatch.setattr(asking, "RETURN_S", 0.02)
    monkeypatch.setattr(asking, "FIRST_S", 0.2)


def fake(**changes):
    return FakeServer(bigram(1, VOCAB, scale=1.5), **{"vocab_size": VOCAB, "eos_id": EOS, "window": 64, **changes})


def sampler(tmp_path, *servers, key=None, say=print, config=None, load=True, **changes):
    asked = Servers([s.url for s in servers], config or ServerConfig(patience_s=5.0, timeout_s=5.0), key=key, say=say)
    settings = {"eos_ids": {EOS}, "vocab_size": VOCAB, "max_length": 40, "spill": tmp_path / "spill.jsonl", **changes}
    made = VLLMSampler(asked, **settings)
    if load:
        made.load(None, 0)
    return made


def asked(server):
    """What the sampler asked for itself, without looks at the server."""
    return [body for body in server.bodies() if body["prompt"] != [0]]


def at_request(number, fault, times=1):
    """The fault, `times` times from the given one of the sampler's own requests on."""
    left, lock = [number, times], threading.Lock()

    def choose(_, body):
        with lock:
            if body["prompt"] == [0]:
                return None
            left[0] -= 1
            if left[0] >= 0 or left[1] == 0:
                return None
            left[1] -= 1
            return fault

    return choose


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    with fake() as server:
        return sampler(tmp_path_factory.mktemp("e"), server).sample(REQUESTS, SAMPLED)


def test_every_field_that_shapes_a_draw_is_sent(tmp_path):
    with fake() as server:
        made = sampler(tmp_path, server, eos_ids={9, EOS}, padding=2, vocab_size=VOCAB - 2)
        made.sample([Request((5, 6), (2**32 - 1, 7))], SAMPLED)
        made.sample([Request((5, 6), (1, 2))], SamplingConfig(temperature=0.0, max_tokens=3))
        first, second = asked(server)
    assert first == {
        "model": "tiny",
        "prompt": [5, 6],
        "max_tokens": 12,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "seed": (2**31 - 1) << 32 | 7,
        "stop_token_ids": [9, EOS],
        "ignore_eos": True,
        "stop": [],
        "min_tokens": 0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {"62": -100.0, "63": -100.0},
        "n": 1,
        "stream": False,
        "echo": False,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }
    changed = {"max_tokens": 3, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "seed": 1 << 32 | 2}
    assert second == {**first, **changed}


def test_responses_end_as_the_ids_say_and_carry_the_models_own_log_probabilities(expected):
    own = bigram(1, VOCAB, scale=1.5)
    assert {r.ended for r in expected} == {"stopped", "cut"}
    for request, response in zip(REQUESTS, expected, strict=True):
        assert (response.ids[-1] == EOS) == (response.ended == "stopped")
        assert EOS not in response.ids[:-1]
        assert len(response.ids) == 12 or response.ended == "stopped"
        rows = own([*request.prompt, *response.ids])[len(request.prompt) - 1 : -1]
        assert np.allclose(response.logprobs, rows[np.arange(len(rows)), response.ids], atol=1e-12)


def test_a_response_depends_on_its_own_key_and_nothing_else(tmp_path, expected):
    with fake() as one, fake() as other:
        for config, servers in (
            (ServerConfig(concurrency=1), [one]),
            (ServerConfig(concurrency=2), [one, other]),
            (ServerConfig(), [other, one]),
        ):
            assert sampler(tmp_path, *servers, config=config).sample(REQUESTS, SAMPLED) == expected
            (tmp_path / "spill.jsonl").unlink()
        assert sampler(tmp_path, one).sample(REQUESTS[::-1], SAMPLED)[::-1] == expected
        assert len(asked(one)) > 24 and asked(other)
        again = [Request(r.prompt, request_key(0, "write", 1, "p", i)) for i, r in enumerate(REQUESTS)]
        assert sampler(tmp_path, one).sample(again, SAMPLED) != expected


def test_no_seed_is_sent_where_servers_refuse_them(tmp_path):
    with fake() as server:
        sampler(tmp_path, server, config=ServerConfig(seed="none")).sample(REQUESTS[:2], SAMPLED)
        assert all(body["seed"] is None for body in server.bodies())


@pytest.mark.parametrize(
    "fault", ["drop", "half", "truncated", "html", "no completion", "abort", "slow", 500, 503, 429]
)
def test_what_time_heals_leaves_no_trace(tmp_path, expected, fault):
    with fake() as server:
        server.slow_s = 0.05
        server.fault = at_request(3, fault, times=2)
        assert sampler(tmp_path, server).sample(REQUESTS, SAMPLED) == expected
        again = 0 if fault == "slow" else 2
        assert len(asked(server)) >= len(REQUESTS) + again


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no ids", r"there are no token ids in it \(return_token_ids\); install vLLM 0.10.2"),
        ("wrong prompt", "it answers a prompt of 4 tokens, and not the one of 3 that was sent"),
        ("wrong ids", "id 71 is none of the tokenizer's 64; the server holds another model"),
        ("few logprobs", r"\d+ log-probabilities for \d+ ids"),
        ("nan", r"None is the log-probability of id \d+ at position \d+, .* computes no numbers"),
        ("no eos", r"it stopped at id 1, and this model's ends are \[48\]"),
    ],
)
def test_what_cannot_be_believed_ends_the_call_with_its_own_words(tmp_path, fault, said):
    with fake() as server:
        server.fault = at_request(3, fault)
        with pytest.raises(ServerError, match=f"^{server.url}/v1/completions: an answer cannot be used: {said}"):
            sampler(tmp_path, server).sample(REQUESTS, SAMPLED)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("half", "failed 3 times.*the connection ended before the answer did.*look into the server's log"),
        ("truncated", "failed 2 times.*no JSON, but .* at its end; look at what stands between"),
        ("html", "failed 2 times.*no JSON, but .*</html>"),
        (
            "no completion",
            r"failed 2 times.*no completion, but '\{\"choices\": \[null\]\}'; look at what stands between",
        ),
        ("hang", "failed 2 times.*no answer within 0.2 s; raise sampling.server.timeout_s"),
        (500, "failed 3 times.*answers 500: EngineCore encountered an issue.*look into the server's log"),
        (429, "answers 429: Too many requests.*, for 0.5 s; lower sampling.server.concurrency"),
        (503, "answers 503: The engine is currently busy"),
        (400, "answers 400"),
    ],
)
def test_what_time_does_not_heal_is_told_in_the_servers_words(tmp_path, monkeypatch, fault, said):
    monkeypatch.setattr(asking, "TRIES", {"failed": 3, "garbled": 2, "slow": 2, "lost": 3})
    with fake() as server:
        server.fault = at_request(0, fault, times=10_000)
        config = ServerConfig(timeout_s=0.2, patience_s=0.5 if fault in (429, 503) else 5.0)
        with pytest.raises(ServerError, match=said):
            sampler(tmp_path, server, config=config).sample(REQUESTS[:2], SAMPLED)


def changed(choice_of):
    """A server whose every answer but those to looks is changed by `choice_of(choice)`."""

    class Changed(FakeServer):
        def _choice(self, body, prompt, index, fault):
            choice = super()._choice(body, prompt, index, fault)
            return choice if prompt == [0] else {**choice, **choice_of(choice)}

    return Changed(bigram(1, VOCAB, scale=1.5), vocab_size=VOCAB, eos_id=EOS, window=64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: {"token_ids": [EOS, *c["token_ids"][1:]]}, "goes on after id 48 at position 0"),
        (lambda c: {"finish_reason": "repetition"}, "finish_reason 'repetition'"),
        (lambda c: {"logprobs": None}, "no log-probabilities for"),
        (lambda c: {"logprobs": {"token_logprobs": [0.5 for _ in c["token_ids"]]}}, "0.5 is the log-probability of"),
        (lambda c: {"logprobs": {"token_logprobs": [float("-inf") for _ in c["token_ids"]]}}, "-inf is the log-prob"),
        (lambda c: {"token_ids": [True, *c["token_ids"][1:]]}, "id True is none"),
        (lambda c: {"token_ids": [-1, *c["token_ids"][1:]]}, "id -1 is none"),
    ],
)
def test_other_answers_that_are_wrong_are_told_too(tmp_path, change, said):
    with changed(change) as server, pytest.raises(ServerError, match=said):
        sampler(tmp_path, server).sample(REQUESTS, SAMPLED)


def test_a_response_that_the_servers_window_cuts_short_is_refused(tmp_path):
    with fake(window=10) as server:
        made = sampler(tmp_path, server, eos_ids={VOCAB - 1})
        with pytest.raises(ServerError, match=r"cut after 7 tokens of max_tokens = 12; raise .* --max-model-len"):
            made.sample(REQUESTS[:1], SAMPLED)


def test_an_end_in_the_last_token_is_one_whatever_the_server_calls_it(tmp_path):
    with changed(lambda c: {"token_ids": [*c["token_ids"][:-1], EOS], "finish_reason": "length"}) as server:
        (response,) = sampler(tmp_path, server).sample(REQUESTS[:1], SAMPLED)
        assert response.ended == "stopped"


def test_a_request_beyond_the_length_asked_for_is_refused_before_it_is_sent(tmp_path):
    with fake() as server:
        with pytest.raises(UserError, match="a prompt of 30 tokens and max_tokens = 12 exceed the 40 tokens"):
            sampler(tmp_path, server).sample([Request((1,) * 30, (0, 0))], SAMPLED)
        assert not server.seen


@pytest.mark.parametrize("model", [bigram(1, VOCAB, scale=1.5), bigram(1, VOCAB, scale=0.01)])
def test_log_probabilities_after_temperature_are_found_out_before_anything_is_asked(tmp_path, model):
    with FakeServer(model, vocab_size=VOCAB, eos_id=EOS) as server:
        sampler(tmp_path, server).sample(REQUESTS, SAMPLED)
        (tmp_path / "spill.jsonl").unlink()
        count = len(asked(server))
        server.processed = True
        with pytest.raises(
            ServerError, match=r"those after temperature and truncation, .* --logprobs-mode raw_logprobs"
        ):
            sampler(tmp_path, server).sample(REQUESTS, SAMPLED)
        assert len(asked(server)) == count


def test_a_server_that_comes_back_otherwise_is_found_out(tmp_path):
    with fake() as server:
        server.fault = at_request(8, "die")

        def restarted(message):
            server.processed = True
            server.start()

        with pytest.raises(ServerError, match="raw_logprobs"):
            sampler(tmp_path, server, say=restarted, config=ServerConfig(concurrency=4)).sample(REQUESTS, SAMPLED)


def test_a_dead_servers_work_is_taken_over(tmp_path, expected):
    with fake() as one, fake() as other:
        one.fault = at_request(4, "die")
        assert sampler(tmp_path, one, other, config=ServerConfig(concurrency=4)).sample(REQUESTS, SAMPLED) == expected


@pytest.mark.parametrize("how", ["vanish", "freeze"])
def test_the_work_of_a_host_that_is_gone_without_a_word_is_taken_over(tmp_path, monkeypatch, expected, how):
    monkeypatch.setattr(wire, "CONNECT_S", 0.1)
    monkeypatch.setattr(wire, "LOOK_S", 0.2)
    monkeypatch.setattr(asking, "WATCH_S", 0.05)
    said = []
    with fake() as one, fake() as other:
        one.fault = at_request(4, how)
        config = ServerConfig(concurrency=4, timeout_s=30.0)  # a request that is not taken over is late, not lost
        assert sampler(tmp_path, one, other, config=config, say=said.append).sample(REQUESTS, SAMPLED) == expected
    # A look that had its connection when the host went away waits for an answer.
    told = [
        f"{one.url}/health: no answer within {wire.LOOK_S:g} s; ",
        f"{one.url}: nobody answers there (no connection",
    ]
    told = tuple(told[: 2 if how == "vanish" else 1])
    assert [text.startswith(told) and "that were in flight there are asked again" in text for text in said] == [True]


def test_what_goes_wrong_in_a_flight_ends_the_call(tmp_path, monkeypatch):
    def broken(self, url, path, status, text):
        raise LookupError("unforeseen")

    monkeypatch.setattr(wire.Wire, "refusal", broken)
    with fake() as server:
        server.fault = at_request(3, 400)
        with pytest.raises(LookupError, match="unforeseen"):
            sampler(tmp_path, server).sample(REQUESTS, SAMPLED)


def test_a_server_may_be_busy_any_number_of_times():
    assert [asking._backoff(times) for times in (1, 2, 5000)] == [0.01, 0.02, 0.05]


def test_the_key_is_sent_and_never_told(tmp_path, expected):
    said = []
    with fake(key="sesame") as server:
        assert sampler(tmp_path, server, key="sesame").sample(REQUESTS, SAMPLED) == expected
        (tmp_path / "spill.jsonl").unlink()
        for key in ("secret-of-mine", None):
            made = sampler(tmp_path, server, key=key, say=said.append)
            with pytest.raises(ServerError, match=r"401.*VLLM_API_KEY") as caught:
                made.sample(REQUESTS, SAMPLED)
            said += [str(caught.value), repr(vars(made)), repr(made.servers), (tmp_path / "spill.jsonl").read_text()]
    assert not any("secret-of-mine" in text for text in said)


class Killed(BaseException):
    pass


def killed_after(count):
    def progress(done):
        if done >= count:
            raise Killed

    return progress


class Told:
    def __init__(self):
        self.told = []

    def push(self, trained, version):
        self.told.append(("push", version))

    def forget_after(self, version):
        self.told.append(("forget after", version))

    def model_name(self):
        return "tiny"

    def admit(self, url): ...


def test_after_a_rollback_a_version_s_number_stands_for_other_weights_and_answers(tmp_path):
    with fake() as server:
        push = Told()
        made = sampler(tmp_path, server, push=push, load=False)
        for _ in range(2):
            made.load("weights", 6)
            made.sample(REQUESTS[:2], SAMPLED)
            assert (tmp_path / "spill.jsonl").read_text()
            made.forget_after(4)
            assert not (tmp_path / "spill.jsonl").exists()
        assert len(asked(server)) == 4
    assert push.told == [("push", 6), ("forget after", 4)] * 2


def test_a_killed_call_asks_only_for_what_it_lacks(tmp_path, expected):
    with fake() as server:
        with pytest.raises(Killed):
            sampler(tmp_path, server, config=ServerConfig(concurrency=1)).sample(REQUESTS, SAMPLED, killed_after(10))
        server.seen.clear()
        done = []
        assert sampler(tmp_path, server).sample(REQUESTS, SAMPLED, done.append) == expected
        assert len(asked(server)) == len(REQUESTS) - 10
        assert done[0] == 10 and done[-1] == len(REQUESTS) and done == sorted(done)
        done.clear()
        server.kill()  # what is whole on disk needs no server
        assert sampler(tmp_path, server).sample(REQUESTS, SAMPLED, done.append) == expected
        assert done == [len(REQUESTS)]


@pytest.mark.parametrize("damage", [b'["0a', b"\xff\xfe\n", b'{"a": 1}\n', b"[1, 2, 3]\n"])
def test_a_line_that_cannot_be_read_costs_its_own_response_only(tmp_path, expected, damage):
    path = tmp_path / "spill.jsonl"
    with fake() as server:
        sampler(tmp_path, server).sample(REQUESTS, SAMPLED)
        whole = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(whole[:-1]) + damage)
        server.seen.clear()
        assert sampler(tmp_path, server).sample(REQUESTS, SAMPLED) == expected
        assert len(asked(server)) == 1
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == len(REQUESTS)


def test_responses_of_other_weights_settings_or_draws_are_not_taken(tmp_path):
    with fake() as server:
        sampler(tmp_path, server).sample(REQUESTS[:4], SAMPLED)
        for change, requests, sampling in (
            ({"settings": "other"}, REQUESTS[:4], SAMPLED),
            ({"version": 1}, REQUESTS[:4], SAMPLED),
            ({}, [Request(r.prompt, (9, 9)) for r in REQUESTS[:4]], SAMPLED),
            ({}, REQUESTS[:4], SamplingConfig(max_tokens=12)),
        ):
            server.seen.clear()
            made = sampler(tmp_path, server, load=False, settings=change.get("settings", ""))
            made.load(None, change.get("version", 0))
            made.sample(requests, sampling)
            assert len(asked(server)) == 4
            assert len((tmp_path / "spill.jsonl").read_text().splitlines()) == 4, "the call before is forgotten"


class Pushed:
    """Adapters by version, as a push would load them."""

    def __init__(self, server):
        self.server, self.name, self.admitted = server, "", []

    def model_name(self):
        return self.name

    def push(self, trained, version):
        self.name = f"version-{version}"
        self.server.adapters = {self.name: trained}

    def admit(self, url):
        self.admitted.append(url)


def test_weights_are_pushed_before_they_are_sampled_from_and_their_name_is_asked_for(tmp_path, expected):
    with fake() as server:
        push = Pushed(server)
        made = sampler(tmp_path, server, push=push, load=False)
        made.load(bigram(2, VOCAB, scale=1.5), 3)
        other = made.sample(REQUESTS, SAMPLED)
        assert made.version == 3 and other != expected and push.admitted == [server.url]
        assert {body["model"] for body in asked(server)} == {"version-3"}
        made.load(bigram(1, VOCAB, scale=1.5), 4)
        assert made.sample(REQUESTS, SAMPLED) == expected
        made.load(None, 5)  # what another sampler of the same servers has pushed
        assert made.version == 5 and push.name == "version-4"


@contextmanager
def several(count):
    with ExitStack() as stack:
        yield [stack.enter_context(fake()) for _ in range(count)]


def test_a_stop_ends_the_call_and_what_is_there_stays(tmp_path, expected):
    with several(3) as servers:
        for server in servers:
            server.token_s = 0.002
        with pytest.raises(Killed):
            sampler(tmp_path, *servers).sample(REQUESTS, SAMPLED, killed_after(5))
        kept = len((tmp_path / "spill.jsonl").read_text().splitlines())
        assert kept >= 5
        for server in servers:
            server.seen.clear()
        assert sampler(tmp_path, *servers).sample(REQUESTS, SAMPLED) == expected
        assert sum(len(asked(server)) for server in servers) == len(REQUESTS) - kept


def test_process_0_asks_and_the_others_hear_in_the_thread_that_looks_ahead_too(tmp_path, expected):
    body = """
import threading
from pathlib import Path
from tests.test_vllm_client import REQUESTS, SAMPLED, sampler
class At:
    url = "{url}"
made = sampler(Path("{spill}"), At)
def answer():
    say(made.sample(REQUESTS, SAMPLED))
ahead = threading.Thread(target=answer, name="look-ahead")
ahead.start()
hosts.check()
ahead.join()
At.url += "/nowhere"
sampler(Path("{spill}"), At, settings="other").sample(REQUESTS, SAMPLED)
"""
    with fake() as server:
        processes = start(body.replace("{url}", server.url).replace("{spill}", str(tmp_path)))
        ended = finish(processes)
        assert len(asked(server)) == len(REQUESTS)
    assert [code for code, _, _ in ended] == [2, 2]
    for _, said, _ in ended:
        first, second = said.splitlines()
        assert first == repr(expected)
        assert second.startswith(f"refused {server.url}/nowhere: this is no vLLM server")
