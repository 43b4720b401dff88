"""Servers that hold a frozen model are believed when their log-probabilities are its own; what differs has its name."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config
from mpd_jax.roles import TINY
from mpd_jax.sampling import agreement
from mpd_jax.sampling.agreement import Agreement, temperature_of
from mpd_jax.sampling.probe import LENGTH, PROMPTS, Probe, probe_tokens
from mpd_jax.sampling.servers import ServerConfig, ServerError
from mpd_jax.sharding import MeshConfig, make_mesh
from tests.fake_server import FakeServer, bigram

V = 512
TOKENS_BT = probe_tokens([], V, 0)
RIGHT, OTHERS = bigram(0, V), bigram(1, V)
NOISE = np.random.default_rng(0).normal(size=PROMPTS * (LENGTH - 1))


def own(model, temperature=1.0):
    """A table model's log-probabilities at every position of the probe, at a temperature [N]."""
    found = []
    for row in TOKENS_BT:
        logits_TV = model(row[:-1]) / temperature
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        found.append(logprobs_TV[np.arange(LENGTH - 1), row[1:]])
    return np.concatenate(found)


@pytest.mark.parametrize("temperature", [0.3, 0.98, 1.02, 4.0])
@pytest.mark.parametrize("noise", [1e-5, 0.003])
def test_a_temperature_is_found_to_within_the_noise(temperature, noise):
    found = temperature_of(own(RIGHT, temperature) + noise * NOISE, lambda t: own(RIGHT, t), 0.01)
    assert found == pytest.approx(temperature, rel=2e-3)


@pytest.mark.parametrize(
    ("there", "limit"),
    [
        (lambda: own(OTHERS), 0.3),
        (lambda: own(lambda ids: RIGHT(ids) + 0.5 * OTHERS(ids)), 0.3),
        (lambda: own(RIGHT) + 0.35 * NOISE, 0.36),  # a coarse dtype: next to nothing of it is a temperature
    ],
)
def test_other_weights_and_noise_are_no_temperature(there, limit):
    assert temperature_of(there(), lambda t: own(RIGHT, t), limit) is None


class OfATable(Probe):
    def here(self, weights):
        return own(weights["model"], 1 / weights["final_norm"]["scale"])


@pytest.fixture
def agree(monkeypatch):
    """An agreement of the servers, what it says, and the weights that it is given."""
    monkeypatch.setattr(agreement, "Probe", OfATable)
    mesh, model = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), Model(load_config(TINY / "student"))

    def make(*servers):
        held = SimpleNamespace(
            key="teacher", directory=Path("/models/right"), model=model, serve=tuple(server.url for server in servers)
        )
        said: list[str] = []
        made = Agreement(held, mesh, [], server=ServerConfig(patience_s=5.0), key=None, seed=0, say=said.append)
        return made, said

    return make


WEIGHTS = {"model": RIGHT, "final_norm": {"scale": 1.0}}


def test_the_right_weights_are_believed_at_every_server_and_asked_for_again_when_one_was_away(agree):
    with FakeServer(RIGHT) as one, FakeServer(RIGHT) as other:
        made, said = agree(one, other)
        made.admit(one.url)  # nothing is here to compare with
        assert not one.bodies()
        other.kill()
        made.push(WEIGHTS, 0)
        assert [text.split(":")[0] for text in said] == ["teacher"]
        assert f"{one.url} computes with teacher.path: over 3,008 positions" in said[0]
        other.start()
        made.admit(other.url)
        (body,) = other.bodies()
        assert [len(ids) for ids in body["prompt"]] == 8 * [LENGTH]
        other.logprobs = OTHERS
        with pytest.raises(ServerError, match=r"teacher\.serve: .* computes with other weights than at first"):
            made.admit(other.url)


def test_other_weights_end_the_run_before_its_first_step(agree):
    with FakeServer(OTHERS) as server:
        said = (
            rf"teacher\.serve: {server.url} does not hold teacher\.path: over 3,008 .*; serve the weights of /models/"
        )
        with pytest.raises(ServerError, match=said):
            agree(server)[0].push(WEIGHTS, 0)


def test_a_temperature_has_its_own_words(agree):
    with FakeServer(RIGHT) as server:
        server.off_temperature = 1.3
        with pytest.raises(
            ServerError, match=r"at temperature 1\.3; start the server with --logprobs-mode raw_logprobs"
        ):
            agree(server)[0].push(WEIGHTS, 0)


def test_a_coarser_dtype_is_a_warning(agree):
    table_VV = RIGHT(np.arange(V)) + 0.05 * np.random.default_rng(3).normal(size=(V, V))
    with FakeServer(lambda ids: table_VV[np.asarray(ids)]) as server:
        made, said = agree(server)
        made.push(WEIGHTS, 0)
        assert said[0].startswith("warning: ") and said[0].endswith("--dtype float32, or set teacher.dtype=bfloat16")
        made.admit(server.url)
