"""Top-k log-probabilities over HTTP: what a real server answers is read exactly, what it must not answer is refused."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from mpd_jax.sampling import asking
from mpd_jax.sampling.scorer import Scorer
from mpd_jax.sampling.servers import ServerConfig, ServerError, Servers
from mpd_jax.types import UserError
from tests.fake_server import FakeServer, bigram

V = 40
CONFIG = ServerConfig(patience_s=5.0)
MODEL = bigram(0, V)


@pytest.fixture
def server():
    with FakeServer(MODEL, vocab_size=V, window=64, max_logprobs=20) as server:
        yield server


def scorer(*servers, k=4, **config):
    return Scorer(Servers([server.url for server in servers], replace(CONFIG, **config)), k)


def texts(count=9, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, V, 3 + i).tolist(), rng.integers(0, V, 12 - i).tolist()) for i in range(count)]


def assert_right(found, asked, k):
    """The k largest of the model's own rows, which the token that stands there has no say in."""
    assert len(found) == len(asked)
    for (prompt, response), top in zip(asked, found, strict=True):
        rows_RV = MODEL([*prompt, *response])[len(prompt) - 1 : -1]
        want_RK = np.argsort(-rows_RV, axis=1)[:, :k]
        np.testing.assert_array_equal(top.ids_RK, want_RK)
        np.testing.assert_allclose(top.logprobs_RK, np.take_along_axis(rows_RV, want_RK, 1), rtol=1e-6)
        assert (top.ids_RK.dtype, top.logprobs_RK.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_the_most_likely_tokens_come_and_the_actual_one_counts_only_among_them(server, k):
    asked = texts()
    found = scorer(server, k=k).score(asked)
    assert_right(found, asked, k)
    inside = [
        token in row for (_, r), top in zip(asked, found, strict=True) for token, row in zip(r, top[0], strict=True)
    ]
    assert any(inside) and not all(inside)


def test_the_whole_vocabulary_comes_where_the_server_gives_it(server):
    server.max_logprobs = -1
    found = scorer(server, k=V).score(texts())
    assert_right(found, texts(), V)
    assert np.exp(found[0].logprobs_RK.astype(np.float64)).sum(1) == pytest.approx(1.0)


def test_every_field_is_said_and_nothing_of_a_generation_config_leaks_in(server):
    scorer(server).score([((1, 2), (3,))])
    (body,) = server.bodies()
    assert body == {
        "model": "tiny",
        "prompt": [1, 2, 3],
        "prompt_logprobs": 4,
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "return_token_ids": True,
    }


@pytest.mark.parametrize("limit", [40, 10])
def test_tokens_in_flight_are_bounded_at_each_server_and_a_long_text_goes_alone(limit):
    """Texts of 15 tokens: two at a time, or one where one is too many already."""
    lock, flying, most = threading.Lock(), [0, 0], [0, 0]

    def watched(at):
        def logprobs(ids):
            if len(ids) == 15:
                with lock:
                    flying[at] += 15
                    most[at] = max(most[at], flying[at])
                time.sleep(0.05)
                with lock:
                    flying[at] -= 15
            return MODEL(ids)

        return logprobs

    with FakeServer(watched(0), vocab_size=V) as one, FakeServer(watched(1), vocab_size=V) as two:
        assert_right(scorer(one, two, score_tokens=limit).score(texts()), texts(), 4)
    assert max(most) == (30 if limit == 40 else 15)


def test_a_server_that_fails_under_what_it_is_asked_at_once_is_asked_for_less(monkeypatch):
    monkeypatch.setattr(asking, "BACKOFF_S", (0.005, 0.05))
    monkeypatch.setattr(asking, "RETURN_S", 0.02)
    lock, flying, most, said = threading.Lock(), [0], [0], []

    def watched(ids):
        with lock:
            flying[0] += len(ids)
            most[0] = max(most[0], flying[0])
        time.sleep(0.02)
        with lock:
            flying[0] -= len(ids)
        return MODEL(ids)

    with FakeServer(watched, vocab_size=V) as server:
        server.fault = lambda number, body: 500 if number < 9 else None  # all that are in flight at first
        servers = Servers([server.url], replace(CONFIG, score_tokens=135), say=said.append)
        assert_right(Scorer(servers, 4).score(texts()), texts(), 4)
    assert most[0] <= 60
    assert "EngineCore encountered" in said[0] and "; 67 tokens are asked of it at once" in said[0]


def test_progress_is_told_and_what_it_raises_ends_the_round(server):
    seen = []
    scorer(server).score(texts(), seen.append)
    assert seen[-1] == 9 and seen == sorted(seen)

    def stop(done):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        scorer(server).score(texts(), stop)


def test_a_server_that_dies_is_replaced_by_the_other(server):
    with FakeServer(MODEL, vocab_size=V) as other:
        other.fault = lambda number, body: "die" if number == 2 else None
        assert_right(scorer(server, other, concurrency=1).score(texts()), texts(), 4)


def test_the_check_finds_what_would_end_the_run_later(server):
    scorer(server, k=20).check(63)
    with pytest.raises(
        ServerError, match=r"64 tokens \(train.max_length\) and one more exceed the 64.*--max-model-len"
    ):
        scorer(server).check(64)
    with pytest.raises(
        ServerError, match=r"prompt logprobs of 21, which is greater.*--max-logprobs, or lower recipe\.target\.top_k"
    ):
        scorer(server, k=21).check(63)


def test_settings_that_a_server_would_ignore_are_refused(server):
    servers = Servers([server.url], CONFIG)
    with pytest.raises(UserError, match=r"temperature = 0.7 .*they ignore it"):
        Scorer(servers, 4, temperature=0.7)
    with pytest.raises(UserError, match=r"recipe\.target\.top_k: 0 is not allowed"):
        Scorer(servers, 0)
    with pytest.raises(UserError, match=r"score_tokens = 0 is not allowed"):
        ServerConfig(score_tokens=0)


def entry(values):
    return {str(i): {"logprob": v, "rank": 1, "decoded_token": ""} for i, v in values.items()}


def cheaper(e):
    first = next(iter(e))
    return {**e, first: {**e[first], "logprob": 5.0}}


# What becomes of the entry of one position, which holds the 4 best and the actual token 7, the worst of all.
WRONG = {
    "nan": (lambda e: {**e, "7": {"logprob": float("nan")}}, r"a log-probability of nan at position 5"),
    "-inf": (lambda e: {**e, "7": {"logprob": float("-inf")}}, r"a log-probability of -inf at position 5"),
    "null": (lambda e: {**e, "7": {"logprob": None}}, r"at position 5; use a vLLM"),
    "above 0": (cheaper, r"a log-probability of 5.0 at position 5"),
    "missing": (lambda e: None, r"'None' at position 5"),
    "no id": (lambda e: {**e, "token_id:3": e["7"]}, r"at position 5; use a vLLM"),
    "an id twice": (lambda e: {**e, "07": e["7"]}, r"an id twice"),
    "below 0": (lambda e: {**e, "-1": e["7"]}, r"one below 0"),
    "too few": (lambda e: dict(list(e.items())[:3]), r"3 of the 4 most likely tokens at position 5.*--max-logprobs"),
    "too many": (lambda e: {**e, **entry({38: -9.0, 39: -9.0})}, r"6 of the 4 most likely tokens"),
    "another token": (lambda e: {k: v for k, v in e.items() if k != "7"}, r"nothing on token 7, which stands at .* 5"),
    "not the best": (lambda e: {**e, "7": {"logprob": -0.01}}, r"others than the 4 most likely tokens at position 5"),
    "above 1": (lambda e: {**entry({1: -0.5, 2: -0.5, 3: -0.6, 4: -0.7}), "7": e["7"]}, r"add up to 2.2"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_entry_is_refused_in_its_own_words(server, how):
    change, said = WRONG[how]
    right = server._prompt_logprobs

    def wrong(k, prompt, logprobs):
        entries = right(k, prompt, logprobs)
        best = entry({1: -0.5, 2: -1.5, 3: -2.5, 4: -3.5})
        entries[5] = change({"7": {"logprob": -12.0, "rank": 40, "decoded_token": ""}, **best})
        return entries

    server._prompt_logprobs = wrong
    with pytest.raises(ServerError, match=r"teacher\.serve: the server answers .*" + said):
        scorer(server).score([((1, 2), (3, 4, 5, 7, 8))])


def test_the_same_entry_unchanged_is_read(server):
    right = server._prompt_logprobs

    def shuffled(k, prompt, logprobs):
        entries = right(k, prompt, logprobs)
        entries[5] = entry({7: -12.0, 3: -2.5, 1: -0.5, 4: -3.5, 2: -1.5})
        return entries

    server._prompt_logprobs = shuffled
    (top,) = scorer(server).score([((1, 2), (3, 4, 5, 7, 8))])
    assert top.ids_RK[3].tolist() == [1, 2, 3, 4] and top.logprobs_RK[3].tolist() == [-0.5, -1.5, -2.5, -3.5]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: {**c, "prompt_logprobs": None}, r"no log-probabilities of the prompt"),
        (lambda c: {**c, "prompt_logprobs": c["prompt_logprobs"][1:]}, r"6 entries for a prompt of 7 tokens"),
        (lambda c: {**c, "prompt_logprobs": c["prompt_logprobs"][1:] * 2}, r"12 entries for a prompt of 7"),
        (lambda c: {**c, "prompt_token_ids": [9]}, r"other ids than were asked for"),
        (lambda c: {**c, "prompt_token_ids": None}, r"no ids of the prompt"),
        (lambda c: None, r"not one choice for one prompt"),
    ],
)
def test_a_wrong_answer_is_refused_in_its_own_words(server, change, said):
    right = server._completion

    def wrong(body):
        answer = right(body)
        (choice,) = answer["choices"]
        return {**answer, "choices": [c for c in [change(choice)] if c]}

    server._completion = wrong
    with pytest.raises(ServerError, match=said):
        scorer(server).score([((1, 2), (3, 4, 5, 7, 8))])
