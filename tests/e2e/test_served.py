"""Whole runs whose teacher answers from a server learn what the same runs learn with the teacher on the mesh.

The server is the one of the tests, with the shipped teacher behind it, and is killed in the middle of what it is asked.
"""

import json
import threading
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from mpd_jax import config, run
from mpd_jax.doctor.servers import DRAWN
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config, load_weights
from mpd_jax.roles import TINY
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.train.metrics import read_rows
from mpd_jax.train.records import read_trajectories
from mpd_jax.types import Trajectory
from tests.e2e.tiny import QUICKSTART, SMALL
from tests.fake_server import FakeServer

WINDOW, END = 256, 508
OVERRIDES = [
    *SMALL,
    "train.batch_size=4",
    "sampling.prompt_tokens=80",
    "sampling.writer={temperature: 0.0, max_tokens: 32}",
    "sampling.rewriter={temperature: 0.0, max_tokens: 48}",
    "recipe.rewrite.fallback=original",
    "eval.problems=2",
    "eval.max_tokens=8",
    "eval.concise_row=false",
    "sampling.server.patience_s=60",
]
TEACHER_WRITES = ["recipe.write.by=teacher", "recipe.loss.kind=forward_kl"]


@pytest.fixture(scope="module")
def teacher():
    return model_in(str(TINY / "teacher"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return f"run.compile_cache={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(autouse=True, scope="module")
def compile_anew_afterwards():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def trained(directory: Path, *overrides: str) -> tuple[list[Trajectory], list[float], dict]:
    """(trajectories of all steps without their writers' log-probabilities, losses, summary) of a whole run."""
    run.train(config.load(QUICKSTART, [*OVERRIDES, f"run.dir={directory}", *overrides]))
    made = [t for path in sorted((directory / "trajectories").iterdir()) for t in read_trajectories(path)[1]]
    rows, summary = read_rows(directory / "metrics.jsonl"), json.loads((directory / "summary.json").read_text())
    return [plain(t) for t in made], [row["loss"] for row in rows], summary


@pytest.fixture(scope="module")
def here(tmp_path_factory, compiled):
    """The run whose models are all on the mesh."""
    return trained(tmp_path_factory.mktemp("here") / "run", compiled)


def plain(trajectory: Trajectory) -> Trajectory:
    original = trajectory.original
    return Trajectory(**{**vars(trajectory), "logprobs": (), "original": original and plain(original)})


def of_the_run(body: dict) -> bool:
    """Whether it is no trial of the server, which asks for fewer tokens."""
    return body["max_tokens"] > DRAWN


class Dying(threading.Thread):
    """Starts the server again whenever it is gone; it goes with its `at`-th request in flight, once."""

    def __init__(self, server: FakeServer, at: int):
        super().__init__(daemon=True)
        self.server, self.deaths, self.over = server, 0, threading.Event()
        asked = []

        def fault(number, body):
            if of_the_run(body):
                asked.append(number)
            return "die" if len(asked) == at and of_the_run(body) else None

        server.fault = fault
        self.start()

    def run(self):
        while not self.over.wait(0.05):
            if self.server._http is None:
                self.deaths += 1
                self.server.start()


@pytest.fixture
def server(teacher):
    with FakeServer(teacher, vocab_size=512, window=WINDOW, eos_id=END, model="teacher") as server:
        yield server


@pytest.mark.slow
def test_rewriting_on_a_server_that_dies_trains_the_same_student(tmp_path, server, here, compiled, capsys):
    dying = Dying(server, at=3)
    served = trained(tmp_path / "served", compiled, f"teacher.serve={server.url}")
    dying.over.set()
    assert dying.deaths == 1
    told = " ".join("".join(capsys.readouterr()).split())
    assert "teacher.path: over 3,008 positions server and JAX differ by" in told
    assert served[:2] == here[:2] and len(here[0]) == 8
    assert {t.verdict for t in here[0]} > {"kept"}
    assert served[2]["after"] == here[2]["after"]
    assert here[2]["reproducible"] and served[2]["reproducible"]
    asked = [body for body in server.bodies() if of_the_run(body)]
    assert {body["seed"] for body in asked} and len({json.dumps(body) for body in asked}) == 8
    assert not list((tmp_path / "served" / "trajectories").glob("unfinished*"))


def model_in(directory: str):
    """The logprobs of every position by the weights in a directory, as a server that reads it would answer them."""
    mesh, model = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), Model(load_config(directory))
    weights = load_weights(directory, model, mesh)
    all_BTV = jax.jit(lambda tokens_BT: jax.nn.log_softmax(model.logits(weights, tokens_BT)))

    @cache
    def all_TV(ids):
        tokens = np.zeros((1, -(-len(ids) // 64) * 64), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(all_BTV(tokens)[0, : len(ids)], np.float64)

    return lambda ids: all_TV(tuple(ids))


@pytest.mark.slow
def test_a_served_student_writes_with_the_weights_of_its_step_and_every_push_is_on_disk(tmp_path, here, compiled):
    start = model_in(str(TINY / "student"))
    with FakeServer(start, vocab_size=512, window=WINDOW, eos_id=END, read_weights=model_in) as server:
        served = trained(tmp_path / "served", compiled, f"student.serve={server.url}")
    assert served[:2] == here[:2] and served[2]["after"] == here[2]["after"]
    pushes = read_rows(tmp_path / "served" / "pushes.jsonl")
    assert [(push["version"], push["way"], push["verdict"]) for push in pushes] == [
        (0, "reload", "agrees"),
        (1, "reload", "verified"),
        (2, "reload", "verified"),
    ]
    assert {t.version for t in served[0]} == {0, 1}


@pytest.mark.slow
def test_looking_ahead_to_a_server_trains_the_same_student(tmp_path, server, compiled):
    here = trained(tmp_path / "here", compiled, *TEACHER_WRITES)
    dying = Dying(server, at=10)
    ahead = ["sampling.lookahead=1", "sampling.server.seed=none", f"teacher.serve=[{server.url}]"]
    served = trained(tmp_path / "served", compiled, *TEACHER_WRITES, *ahead)
    dying.over.set()
    assert dying.deaths == 1
    assert served[:2] == here[:2] and len(here[0]) == 8
    assert here[2]["reproducible"] and not served[2]["reproducible"]
