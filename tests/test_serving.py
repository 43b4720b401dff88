"""From `serve` in a config to samplers: who is waited for, what is refused before anything is sampled, whose key."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from mpd_jax import config
from mpd_jax.roles import Roles, open_model
from mpd_jax.samplers import load_frozen, make_samplers
from mpd_jax.sampling.sampler import Request, SamplingConfig
from mpd_jax.sampling.servers import ServerConfig, Servers
from mpd_jax.sampling.vllm_client import VLLMSampler
from mpd_jax.serving import Serving
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.types import UserError
from tests.e2e.tiny import QUICKSTART, SMALL
from tests.fake_server import FakeServer

END = 508
SHORT = SamplingConfig(max_tokens=4)


class Told:
    """What a person was told, and how far what was waited for was."""

    def __init__(self):
        self.said, self.bars = [], []

    @contextmanager
    def progress(self, title, total):
        yield lambda done, text="": self.bars.append((title, done, total))


def serving(tmp_path, *overrides, told=None, secrets=lambda name: None, push=None):
    settings, told = config.load(QUICKSTART, [*SMALL, *overrides]), told or Told()
    made = Serving(
        settings, tmp_path, "s", secrets=secrets, say=told.said.append, progress=told.progress, push=push or Pushed
    )
    return settings, made


def role(key, settings):
    return open_model(key, getattr(settings, key), settings.recipe.contexts)


@pytest.fixture
def server():
    with FakeServer(eos_id=END, model="held") as server:
        yield server


def test_the_samplers_of_a_served_model_share_its_servers_and_keep_their_responses_apart(tmp_path, server):
    told = Told()
    settings, made = serving(tmp_path, f"teacher.serve={server.url}/v1/", told=told)
    teacher = role("teacher", settings)
    writer, rewriter = made.sampler(teacher, "writer", 200), made.sampler(teacher, "rewriter", 300)
    assert writer.servers is rewriter.servers and (writer.max_length, rewriter.max_length) == (200, 300)
    assert told.bars[-1] == ("waiting for teacher.serve", 1, 1)
    (said,) = told.said
    assert said == f"teacher: served by {server.url} ('held', prompts and responses of 512 tokens, vLLM 0.32.0)"
    for sampler in (writer, rewriter):
        sampler.load(None, 0)
        sampler.sample([Request((1, 2), (3, 4))], SHORT)
    asked = [body for body in server.bodies() if body["prompt"] == [1, 2]]
    assert [(body["model"], body["stop_token_ids"]) for body in asked] == [("held", sorted(teacher.eos_ids))] * 2
    names = sorted(path.name for path in (tmp_path / "trajectories").iterdir())
    assert names == ["unfinished.rewriter.jsonl", "unfinished.writer.jsonl"]
    made.forget()
    assert not list((tmp_path / "trajectories").iterdir())


def test_columns_of_the_head_that_no_token_has_are_not_drawn(tmp_path, server):
    settings, made = serving(tmp_path, f"teacher.serve={server.url}")
    teacher = role("teacher", settings)
    wider = replace(teacher, model=replace(teacher.model, config=replace(teacher.model.config, vocab_size=520)))
    sampler = made.sampler(wider, "writer", 200)
    assert (sampler.vocab_size, sampler.padding) == (512, 8)


def test_a_server_whose_window_is_too_small_is_refused_with_both_numbers(tmp_path, server):
    settings, made = serving(tmp_path, f"teacher.serve={server.url}")
    with pytest.raises(UserError, match=rf"teacher.serve: .* 513 tokens together exceed the 512 that {server.url}"):
        made.sampler(role("teacher", settings), "rewriter", 513)


def test_servers_are_waited_for_and_the_wait_is_shown(tmp_path, server):
    told = Told()
    settings, made = serving(tmp_path, f"teacher.serve={server.url}", told=told)
    server.kill()
    told.said = Starting(server)
    made._say = told.said.append
    made.sampler(role("teacher", settings), "writer", 200)
    assert (
        told.said[0].startswith("waiting 900 s at most (sampling.server.patience_s): ") and "served by" in told.said[-1]
    )
    assert ("waiting for teacher.serve", 0, 1) in told.bars


class Starting(list):
    """What is said; the server is started once it says that it waits."""

    def __init__(self, server):
        super().__init__()
        self.server = server

    def append(self, message):
        if not self:
            self.server.start()
        super().append(message)


def test_a_paused_server_is_told_unless_a_push_will_resume_it(tmp_path, server):
    server.paused = "keep"
    at = [f"student.serve={server.url}", f"teacher.serve={server.url}", "sampling.server.timeout_s=0.1"]
    settings, made = serving(tmp_path, *at, push=Pushed)
    made.sampler(role("student", settings), "student", 200)
    with pytest.raises(UserError, match=f"{server.url}: it is paused"):
        made.sampler(role("teacher", settings), "writer", 200)
    assert not server.bodies(), "it would answer none"


def test_a_server_that_is_being_admitted_holds_up_nobody(tmp_path, server):
    over, late = threading.Event(), []
    with FakeServer(model="held") as other:
        servers = Servers([server.url, other.url], ServerConfig())

        def admit(url):
            if url == other.url:
                over.wait(5)
                late.append(url)

        servers.admit = admit
        answers = []
        servers.ask("/v1/completions", [{"prompt": [1], "max_tokens": 1}] * 3, lambda i, answer: answers.append(i))
        assert len(answers) == 3 and not late
        over.set()


def test_a_wait_without_end_ends_with_patience(tmp_path, server):
    server.kill()
    settings, made = serving(tmp_path, f"teacher.serve={server.url}", "sampling.server.patience_s=0.2")
    with pytest.raises(UserError, match=f"{server.url}: nobody answers there"):
        made.sampler(role("teacher", settings), "writer", 200)


def test_the_key_is_looked_up_by_its_name(tmp_path):
    with FakeServer(eos_id=END, key="sesame") as server:
        at = [f"teacher.serve={server.url}", "sampling.server.key=MINE"]
        settings, made = serving(tmp_path, *at, secrets={"MINE": "sesame", "VLLM_API_KEY": "other"}.get)
        made.sampler(role("teacher", settings), "writer", 200)
        for secrets, said in (({}.get, "MINE to the key"), ({"MINE": "x y"}.get, "spaces, line ends or letters")):
            settings, made = serving(tmp_path, *at, secrets=secrets)
            with pytest.raises(UserError, match=said) as caught:
                made.sampler(role("teacher", settings), "writer", 200)
            assert "x y" not in str(caught.value)


class Pushed:
    """What was pushed of a model."""

    def __init__(self, held, key):
        self.held, self.key, self.pushed, self.admitted = held, key, [], []

    def model_name(self):
        return "held"

    def push(self, trained, version):
        self.pushed.append((trained, version))

    def admit(self, url):
        self.admitted.append(url)


def test_what_trains_is_pushed_once_a_version_and_frozen_models_are_not(tmp_path, server):
    """The student writes and rewrites: two samplers, one push. A teacher on the same server gets nothing."""
    pushes = []

    def make(held, key):
        pushes.append(Pushed(held, key))
        return pushes[-1]

    at = [f"student.serve={server.url}", f"teacher.serve={server.url}", "recipe.rewrite.by=student"]
    settings, made = serving(tmp_path, *at, push=make, secrets=lambda name: "sesame")
    student, teacher = role("student", settings), role("teacher", settings)
    roles, mesh = Roles(student, teacher, student), make_mesh(MeshConfig())
    samplers = make_samplers(settings, roles, mesh, lambda trained: ["whole", trained], made.sampler)
    load_frozen(samplers, roles, mesh, None)
    assert samplers.writer is samplers.student and samplers.follows
    assert isinstance(samplers.student, VLLMSampler) and isinstance(samplers.rewriter, VLLMSampler)
    samplers.load_student("adapter", 3)
    samplers.load_student("adapter", 3)
    assert samplers.student.version == samplers.rewriter.version == 3
    made.sampler(teacher, "writer", 200).load(None, 0)
    push, frozen = pushes
    assert push.pushed == [("adapter", 3)] and push.held is student and push.key == "sesame"
    assert frozen.pushed == [] and frozen.held is teacher
    samplers.rewriter.sample([Request((1, 2), (3, 4))], SHORT)
    assert push.admitted == [server.url]


@pytest.mark.parametrize(
    ("overrides", "holds"),
    [
        ([], True),
        (["teacher.serve=http://a:1"], True),
        (["sampling.server.seed=none"], True),
        (["sampling.server.seed=none", "teacher.serve=http://a:1"], False),
        (["sampling.server.seed=none", "student.serve=http://a:1", "recipe.write.by=teacher"], False),
        (["sampling.server.seed=none", "teacher.serve=http://a:1", "recipe.rewrite.how=nobody"], True),
        (["sampling.server.seed=none", "teacher.serve=http://a:1", "rewriter={path: 'tiny:teacher'}"], True),
        (["sampling.server.seed=none", "rewriter={path: 'tiny:teacher', serve: 'http://a:1'}"], False),
        (["student.serve=http://a:1", "teacher.serve=http://b:1"], True),
        (["student.serve=http://a:1", "teacher.serve=http://b:1", "sampling.lookahead=1"], False),
        (["recipe.write.by=teacher", "teacher.serve=http://b:1", "sampling.lookahead=1"], True),
    ],
)
def test_a_run_is_reproducible_unless_a_server_gets_no_seed_or_the_student_looks_ahead(overrides, holds):
    assert config.load(QUICKSTART, overrides).reproducible is holds


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.server.concurrency=0", "sampling.server: concurrency = 0 is not allowed; it must be 1 or more"),
        ("sampling.server.seed=maybe", "sampling.server.seed: 'maybe' is not allowed; it must be request or none"),
        ("sampling.server.kye=X", "did you mean sampling.server.key"),
        ("sampling.server.key=sk-123", "sampling.server: key = this text is not allowed"),
    ],
)
def test_bad_settings_of_servers_are_refused_by_name(override, said):
    with pytest.raises(UserError) as caught:
        config.load(QUICKSTART, [override])
    assert said in str(caught.value) and "sk-123" not in str(caught.value)
