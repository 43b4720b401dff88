"""Pushes to a real vLLM server on the CPU: it computes with what it was given, and where it does not that is found out.

`MPD_VLLM_PYTHON=.venv-vllm/bin/python pytest -m server -s tests/e2e/test_push_real.py` prints the figures.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from mpd_jax import build, config
from mpd_jax.models.hf_weights import export
from mpd_jax.models.lora import LoraConfig, StudentSpec
from mpd_jax.roles import open_model
from mpd_jax.sampling import weight_push
from mpd_jax.sampling.servers import ServerConfig
from mpd_jax.sampling.ways import PushConfig
from mpd_jax.sampling.weight_push import StaleWeights, WeightPush
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.train.state import optimiser
from tests.e2e.tiny import QUICKSTART
from tests.real_server import ADAPTERS, vllm_server

pytestmark = pytest.mark.server

SETTINGS = config.load(QUICKSTART)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
FILES = open_model("student", StudentSpec("tiny:student"), SETTINGS.recipe.contexts)


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    """Problems with their worked responses, as ids."""
    problems = build.read_problems(SETTINGS.problems, "heldout")[:64]
    return [[*FILES.chat.prompt("plain", p), *FILES.chat.encode(p.response or "")] for p in problems]


@pytest.fixture(scope="module")
def weights(samples) -> list:
    """The student, and after each of the quickstart's first updates, here towards the worked responses."""
    rows = np.array([(row + [0] * 128)[:128] for row in samples])

    # Padded rows and prompts count too: it is the optimiser's step that matters, not what is learnt.
    def loss(w):
        logits_BTV = FILES.model.logits(w, rows)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows[:, 1:]).mean()

    tx, found = optimiser(SETTINGS.train), [FILES.weights(MESH)]
    state, step = tx.init(found[0]), jax.jit(lambda w, s: tx.update(jax.grad(loss)(w), s, w))
    for _ in range(2):
        update, state = step(found[-1], state)
        found.append(optax.apply_updates(found[-1], update))
    return found


@pytest.fixture(scope="module")
def untied(tmp_path_factory, weights) -> Path:
    return written(tmp_path_factory.mktemp("untied") / "student", weights[0])


def written(out: Path, weights) -> Path:
    return export(out, FILES.directory, FILES.model, weights, dtype="float32", untie=True)


@pytest.fixture(scope="module")
def server(untied):
    with vllm_server(untied, *ADAPTERS, key="a-secret-key") as running:
        yield running


def pushing(server, tmp_path, samples, files=FILES, base=None, **push) -> WeightPush:
    return WeightPush(
        dataclasses.replace(files, serve=(server.url,)),
        lambda trained: files.trains.over(base, trained),
        MESH,
        tmp_path,
        samples,
        server=ServerConfig(),
        key="a-secret-key",
        config=PushConfig(**push),
        seed=0,
        say=print,
    )


def tell(report) -> None:
    for proof in report.proofs.values():
        print(f"{report.words}; mean {proof.mean:.1e}, before {proof.before or 0:.1e}")


def test_a_reload_is_exact_and_stale_weights_are_caught_at_once(server, tmp_path, samples, weights, monkeypatch):
    """The tied student, served untied: JAX and vLLM at most 1e-4 apart. Then a server that reads an old directory."""
    push = pushing(server, tmp_path, samples)
    print()
    for version in (0, 1):
        report = push.push(weights[version], version)
        tell(report)
        assert (report.way, report.verdict) == ("reload", ("agrees", "verified")[version])
        assert report.weakest.largest <= 1e-4
    old = written(tmp_path / "old", weights[1])
    put = push._way.put
    monkeypatch.setattr(push._way, "put", lambda server, name, directory: put(server, name, str(old)))
    with pytest.raises(StaleWeights, match="version 2 twice") as raised:
        push.push(weights[2], 2)
    print(raised.value)


def test_an_adapter_is_exact_under_each_of_its_names(server, tmp_path, samples, weights):
    adapted_files = open_model(
        "student",
        StudentSpec("tiny:student", lora=LoraConfig(rank=8, alpha=16)),
        SETTINGS.recipe.contexts,
    )
    assert adapted_files.adapted is not None
    again = pushing(server, tmp_path / "again", samples)
    assert again.push(weights[0], 0).verdict == "agrees"  # the base, as the adapter means it
    push = pushing(server, tmp_path, samples, adapted_files, weights[0])
    adapter = adapted_files.start(MESH, 0)
    print()
    for version in (0, 1, 2):
        rng = np.random.default_rng(version)
        report = push.push(adapter, version)
        tell(report)
        assert (report.way, report.verdict) == ("adapter", "verified" if version else "agrees")
        assert report.weakest.largest <= 1e-4
        adapter = jax.tree.map(lambda x, rng=rng: x + 2e-3 * rng.choice([-1.0, 1.0], x.shape).astype("f4"), adapter)


def test_a_server_that_was_killed_is_given_the_weights_again(server, untied, tmp_path, samples, weights):
    push = pushing(server, tmp_path, samples)
    push.push(weights[0], 0)
    push.push(weights[1], 1)
    server.kill()
    server.start(untied)
    push.admit(server.url)
    assert push._way is not None and push._way.holds(push._all, push._wanted.name)
    report = push.push(weights[2], 2)
    tell(report)
    assert report.verdict == "verified"


def test_a_server_of_the_tied_model_takes_untied_weights_and_a_restart(tmp_path, samples, weights, monkeypatch):
    """Known of vLLM on CPUs: given a tied model's file while it runs it answers 200 and keeps the old head."""
    print()
    with vllm_server(FILES.directory) as server:
        push = pushing(server, tmp_path, samples)
        for version in (0, 1):
            report = push.push(weights[version], version)
            tell(report)
            assert report.verdict == ("agrees", "verified")[version] and report.weakest.largest <= 1e-4
        with monkeypatch.context() as tied:
            tied.setattr(weight_push, "export", lambda *args, untie, **how: export(*args, **how))
            with pytest.raises(StaleWeights, match="version 2 twice") as raised:
                push.push(weights[2], 2)
        print(raised.value)
        push = pushing(server, tmp_path / "other", samples, way="restart", restart=server.restart)
        for version in (1, 2):
            report = push.push(weights[version], version)
            tell(report)
            assert (report.way, report.verdict) == ("restart", "verified")


def test_in_bfloat16_small_updates_add_up_until_they_are_seen(tmp_path, samples, weights):
    """At a rate of 5e-6 a push may be too small to see; it is never taken for verified where the server ignores it."""
    print()
    step = jax.tree.map(lambda w, v: 5e-6 * np.sign(np.asarray(v) - np.asarray(w)), weights[0], weights[1])
    out = written(tmp_path / "start", weights[0])
    with vllm_server(out, dtype="bfloat16") as server:
        push = pushing(server, tmp_path / "run", samples, dtype="bfloat16")
        tell(push.push(weights[0], 0))
        verdicts = []
        for version in (1, 2, 4, 8, 16, 32, 64, 128):
            now = jax.tree.map(lambda w, s, n=version: w + np.float32(n) * s, weights[0], step)
            report = push.push(now, version)
            tell(report)
            verdicts.append(report.verdict)
        assert set(verdicts) == {"undecided", "verified"} and verdicts[-1] == "verified"
