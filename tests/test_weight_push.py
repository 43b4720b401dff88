"""Claims about pushes: each way puts the weights there, and no server that lacks them, or fails, goes unnoticed."""

import itertools
import json
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

from mpd_jax import hosts
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import export, load_config, load_weights
from mpd_jax.models.lora import Adapted, LoraConfig
from mpd_jax.models.peft import load_adapter
from mpd_jax.sampling import probe, ways, weight_push
from mpd_jax.sampling.known import Known, forget_after
from mpd_jax.sampling.proof import TOLERANCE
from mpd_jax.sampling.servers import ServerConfig, ServerError, Servers, Unreachable
from mpd_jax.sampling.ways import PushConfig, choose
from mpd_jax.sampling.weight_push import StaleWeights, WeightPush
from mpd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from mpd_jax.types import UserError
from tests.fake_server import FakeServer

VOCAB = 64
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 3,
}
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
TOKENS = probe.probe_tokens([], VOCAB, 0)
SEEDS = itertools.count()


@dataclass(frozen=True)
class Student:
    directory: Path
    model: Model
    adapted: Adapted | None
    serve: tuple[str, ...]

    def start(self, mesh, seed):
        """What trains, before the first update."""
        return (
            jax.device_put(random_weights(self.adapted, 1), jax.devices()[0]) if self.adapted else base_of(self.model)
        )


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def random_weights(model: Model | Adapted, seed: int, scale: float = 0.2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: (scale * rng.normal(size=s.shape)).astype(np.float32), model.abstract())


def moved(weights, size: float, seed: int = 0):
    """Every weight a little up or down, as Adam's first steps are."""
    rng = np.random.default_rng(seed)
    steps = jax.tree.map(lambda w: size * rng.choice([-1.0, 1.0], w.shape).astype(np.float32), weights)
    return jax.tree.map(lambda w, step: jax.device_put(np.asarray(w) + step, w.sharding), weights, steps)


@lru_cache(maxsize=8)
def logprobs_of(model: Model):
    return jax.jit(lambda weights, tokens_BT: jax.nn.log_softmax(model.logits(weights, tokens_BT)))


def served(model: Model, weights, noise: float = 0.0):
    """What a server with these weights answers to the probe; noise: of each log-probability, and as much everywhere,
    another for every set of weights."""
    logprobs_BTV = np.asarray(logprobs_of(model)(weights, TOKENS), np.float64)
    if noise:
        logprobs_BTV += noise * (np.random.default_rng(next(SEEDS)).normal(size=logprobs_BTV.shape) - 1.0)
    known = {tuple(row): logprobs_TV for row, logprobs_TV in zip(TOKENS.tolist(), logprobs_BTV, strict=True)}
    return lambda ids: known[tuple(ids)]


@lru_cache(maxsize=1)
def base_of(model: Model):
    return jax.device_put(random_weights(model, 0), jax.devices()[0])


class Bench:
    """A student, its fake servers, and what pushes it to them."""

    def __init__(self, source, tmp_path, servers=1, lora=False, noise=0.0, key=None, experts=False, **push):
        self.model = Model(load_config(source))
        self.noise, self.said = noise, []
        self.base = base_of(self.model)
        adapted = Adapted(self.model, LoraConfig(rank=2, alpha=4)) if lora else None

        def read_adapter(path):
            assert adapted is not None
            return served(self.model, adapted.over(self.base, load_adapter(path, adapted, MESH)), noise)

        self.servers = [
            FakeServer(
                served(self.model, self.base, noise),
                vocab_size=VOCAB,
                key="secret" if key else None,
                read_weights=self.read,
                read_adapter=read_adapter,
            )
            for _ in range(servers)
        ]
        self.student = Student(source, self.model, adapted, tuple(server.url for server in self.servers))
        self.start = self.student.start(MESH, 0)
        self.distrusted = []

        self.make_push = lambda: WeightPush(
            self.student,
            (lambda trained: adapted.over(self.base, trained)) if adapted else (lambda trained: trained),
            MESH,
            tmp_path / "run",
            [],
            server=ServerConfig(patience_s=3.0),
            key=key,
            config=PushConfig(**push),
            seed=0,
            say=self.said.append,
            distrust=self.distrusted.append,
        )
        self.push = self.make_push()
        self.files = tmp_path / "run" / "served"

    def read(self, path):
        """What a server computes with that reads a directory, by its config there."""
        model = Model(load_config(path))
        return served(model, load_weights(path, model, MESH), self.noise)

    def asked(self, number=0) -> list[str]:
        """The administrative calls that a server got, in order."""
        free = ("/health", "/v1/models", "/version", "/v1/completions", "/weight_info")
        return [seen.path for seen in self.servers[number].seen if seen.method == "POST" and seen.path not in free]


@pytest.fixture
def bench(directory, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ways, "LAG_S", 0.1)
    monkeypatch.setattr(ways, "POLL_S", 0.02)
    monkeypatch.setattr(weight_push, "POLL_S", 0.02)

    def make(**how) -> Bench:
        made.append(Bench(directory, tmp_path, **how))
        return made[-1]

    yield make
    for bench in made:
        for server in bench.servers:
            server.kill()


def test_the_probe_reads_the_weights_as_they_are_served(directory, tmp_path):
    """On a mesh that splits everything, against the written files read back: an adapter merged, rounded, untied."""
    model = Model(load_config(directory))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    adapted = Adapted(model, LoraConfig(rank=2, alpha=4))
    places = tree_shardings(mesh, model.logical_axes(), model.abstract(), "train")
    base = jax.device_put(random_weights(model, 0), places)
    weights = adapted.over(base, jax.device_put(random_weights(adapted, 1), adapted.shardings(mesh)))
    out = export(tmp_path / "out", directory, model, weights, dtype="bfloat16", untie=True)
    file = Model(load_config(out))
    logprobs_BTV = np.asarray(logprobs_of(file)(load_weights(out, file, MESH), TOKENS))
    wanted = np.take_along_axis(logprobs_BTV[:, :-1], TOKENS[:, 1:, None], -1).ravel()
    found = probe.Probe(model, mesh, TOKENS, "bfloat16", merge=True)
    np.testing.assert_allclose(found.here(weights), wanted, atol=2e-5)
    assert found.prompt.tolist() == sorted(np.arange(len(wanted)) // (probe.LENGTH - 1))


def test_the_positions_are_the_same_for_a_seed_and_begin_as_the_problems_do():
    tokens_BT = probe.probe_tokens([[5, 6, 7], range(60)], VOCAB, 0)
    assert tokens_BT[0].tolist() == [5, 6, 7, *TOKENS[0, 3:]] and tokens_BT[1].tolist() == list(range(probe.LENGTH))
    np.testing.assert_array_equal(tokens_BT[2:], TOKENS[2:])
    assert len(np.unique(TOKENS, axis=0)) == probe.PROMPTS and np.any(probe.probe_tokens([], VOCAB, 1) != TOKENS)


def test_a_reload_is_paused_emptied_stamped_and_proved(bench):
    b = bench()
    first = b.push.push(b.start, 0)
    assert (first.way, first.verdict, first.verified, first.again) == ("reload", "agrees", 0, ())
    report = b.push.push(moved(b.start, 1e-3), 1)
    assert (report.verdict, report.verified) == ("verified", 1) and report.seconds > 0
    assert report.weakest.slope == pytest.approx(1, abs=0.01) and report.weakest.error < 0.01
    assert report.weakest.mean < 1e-5 < report.weakest.before
    steps = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert b.asked() == 2 * steps and b.servers[0].paused is None
    body = b.servers[0].bodies("/collective_rpc")[-1]
    there = Path(body["kwargs"]["weights_path"])
    assert body["method"] == "reload_weights" and list(b.files.iterdir()) == [there]
    assert not load_config(there).tie_embeddings
    assert b.servers[0].weight_version == there.name and "-1-" in there.name
    assert b.push.model_name() == "tiny"
    b.push.admit(b.servers[0].url)
    assert b.asked() == 2 * steps, "it has them"


def test_an_adapter_has_a_new_name_each_time_and_the_old_one_is_unloaded(bench):
    b = bench(lora=True)
    for version in (0, 1):
        report = b.push.push(moved(b.start, 0.01 * version), version)
        assert (report.way, report.verdict) == ("adapter", ("agrees", "verified")[version])
        assert list(b.servers[0].adapters) == [b.push.model_name()]
        assert [path.name for path in b.files.iterdir()] == [b.push.model_name()]
    assert b.servers[0].logprobs is b.servers[0].initial, "the base stays as it is"
    loads = [body for body in b.servers[0].bodies("/v1/load_lora_adapter") if body]
    assert len({body["lora_name"] for body in loads}) == 2 and not any("load_inplace" in body for body in loads)


def test_an_adapter_is_merged_where_servers_load_none(bench):
    b = bench(lora=True, way="reload")
    assert b.push.push(b.start, 0).verdict == "agrees"
    assert b.push.push(moved(b.start, 0.01), 1).verdict == "verified"


def restarted(b: Bench, asked: Path | None):
    """Somebody, or a command that names the directory in a file, starts the server again."""
    b.push._all.config.__dict__["patience_s"] = 60.0  # it is compiled meanwhile

    def watch():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (asked.exists() if asked else any("again with" in s for s in b.said)):
            time.sleep(0.01)
        path = asked.read_text().strip() if asked else str(next(b.files.iterdir()))
        b.servers[0].kill()
        b.servers[0].initial = b.read(path)
        time.sleep(0.2)
        b.servers[0].start()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_restart_is_over_when_the_server_was_away_and_is_back(bench, tmp_path, by_hand):
    asked = tmp_path / "asked"
    b = bench(way="restart", restart=None if by_hand else f"echo {{directory}} > {asked}.new; mv {asked}.new {asked}")
    thread = restarted(b, None if by_hand else asked)
    report = b.push.push(moved(b.start, 1e-2), 4)
    thread.join()
    assert (report.way, report.verdict) == ("restart", "verified")
    assert any("vllm serve" in said for said in b.said) == by_hand


@pytest.mark.parametrize(
    ("command", "said"),
    [("echo no such pod; exit 3", "exit code 3 and said: no such pod"), ("true", "it has not gone away")],
)
def test_a_restart_that_fails_is_told(bench, command, said):
    b = bench(way="restart", restart=command)
    b.push._all.config.__dict__["patience_s"] = 0.3
    with pytest.raises(UserError, match=said):
        b.push.push(b.start, 0)


def test_where_the_route_is_there_and_no_reload_a_restart_does_it(bench, tmp_path):
    asked = tmp_path / "asked"
    b = bench(restart=f"echo {{directory}} > {asked}.new; mv {asked}.new {asked}")
    break_("tpu", b.servers[0])
    thread = restarted(b, asked)
    report = b.push.push(b.start, 0)
    thread.join()
    assert (report.way, report.verdict) == ("restart", "agrees") and b.servers[0].paused is None
    assert b.asked()[:3] == ["/pause", "/collective_rpc", "/resume"]
    assert any("cannot reload" in said and "by restart" in said for said in b.said)


def test_a_push_that_a_server_ignored_is_made_once_more(bench):
    b = bench()
    b.push.push(b.start, 0)
    b.servers[0].stale_pushes = 1
    report = b.push.push(moved(b.start, 1e-3), 1)
    assert (report.verdict, report.again) == ("verified", (b.servers[0].url,))
    assert any("stale" in said and "once more" in said for said in b.said)


@pytest.mark.parametrize("lora", [False, True])
def test_a_server_that_stays_stale_ends_the_run(bench, lora):
    b = bench(lora=lora)
    b.push.push(b.start, 0)
    b.servers[0].stale = True
    said = "version 1 twice" if lora else r"version 1 twice.*slope -?0\.0.*error"  # an adapter ignored leaves the base
    with pytest.raises(StaleWeights, match=said):
        b.push.push(moved(b.start, 1e-2 if lora else 1e-3), 1)
    assert b.distrusted == [0]


def test_a_server_of_other_weights_ends_the_run_at_its_first_push(bench):
    b = bench()
    b.servers[0].stale = True
    with pytest.raises(StaleWeights, match=r"computes in float32 \(sampling.push.dtype\)"):
        b.push.push(moved(b.start, 3e-2), 0)


def test_updates_too_small_to_see_add_up(bench):
    """In noise three times as loud as one update, what is compared with stays what was verified last."""
    b = bench(noise=0.02, dtype="bfloat16")
    b.push.push(b.start, 0)
    reports = [b.push.push(moved(b.start, size), version) for version, size in ((1, 2e-5), (2, 4e-5), (3, 4e-3))]
    assert [(r.verdict, r.verified) for r in reports] == [("undecided", 0), ("undecided", 0), ("verified", 3)]
    b.push.push(moved(b.start, 4.02e-3), 4)
    b.servers[0].stale = True
    with pytest.raises(StaleWeights):
        b.push.push(moved(b.start, 8e-3), 5)


def break_(what: str, server: FakeServer) -> None:
    match what:
        case "reload":
            server.reload_error = "size mismatch"
        case "unseen":
            server.reload_error = "No such file or directory"
        case "tpu":
            server.reload_error = "'TPUWorker' object has no attribute 'reload_weights'"
        case "reset":
            server.reset_fails = True
        case "stamp":
            server.stamped = "step-3"
        case "routes":
            server.dev = server.lora = False
        case "key":
            server.key = "another"
        case "temperature":
            server.off_temperature = 0.6
        case "garbage":
            server._prompt_logprobs = lambda *args: [None]
        case "choices":
            server._completion = lambda body: {"id": "cmpl-0"}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("reload", "size mismatch.*left paused"),
        ("unseen", "No such file.*sampling.push.seen_as"),
        ("tpu", "servers on TPUs cannot"),
        ("reset", "reset_prefix_cache.*{'success': False}"),
        ("stamp", "'step-3', just after it was given 'mpd-"),
        ("routes", "sampling.push.way: auto is not possible.*VLLM_SERVER_DEV_MODE=1"),
        ("key", "401.*VLLM_API_KEY"),
        ("temperature", "the model's log-probabilities at temperature 0.6; start the server with --logprobs-mode"),
        ("garbage", "prompt_logprobs of 48 ids"),
        ("choices", "cmpl-0.*holds no choices"),
    ],
)
def test_what_goes_wrong_has_its_own_message(bench, what, said):
    b = bench(key="secret")
    b.push.push(b.start, 0)
    break_(what, b.servers[0])
    if what in ("routes", "key"):  # found out at the start
        b.push._way = None
        b.push._all._facts = None
    with pytest.raises(ServerError if what != "routes" else UserError, match=said) as raised:
        b.push.push(moved(b.start, 1e-3), 1)
    assert "secret" not in str(raised.value)
    assert (b.servers[0].paused == "keep") == (what in ("reload", "unseen", "reset", "stamp"))


@pytest.mark.parametrize(
    ("way", "adapts", "experts", "lacks", "found"),
    [
        ("auto", True, False, "", "adapter"),
        ("auto", True, False, "lora", "reload"),
        ("auto", False, False, "", "reload"),
        ("auto", False, True, "", "restart"),
        ("auto", False, True, "cpu", "reload"),
        ("adapter", True, False, "lora", "lacks the route /v1/load_lora_adapter"),
        ("adapter", False, False, "", "set student.lora"),
        ("reload", False, False, "dev", "lacks the route /collective_rpc"),
        ("reload", False, True, "", "reloads experts wrongly"),
        ("restart", False, False, "dev", "restart"),
    ],
)
def test_the_way_is_one_that_every_server_has(way, adapts, experts, lacks, found):
    with FakeServer() as one, FakeServer(dev=lacks != "dev", lora=lacks != "lora") as other:
        one.device = other.device = "cuda" if lacks == "cpu" else "cpu"
        servers = Servers([one.url, other.url], ServerConfig())
        try:
            assert choose(PushConfig(way), servers, adapts=adapts, experts=experts) == found
        except UserError as error:
            assert found in str(error)
        assert not [seen for seen in other.seen if seen.method == "POST"], "asking changes nothing"


def test_every_server_is_given_them_and_one_that_was_away_before_it_works(bench):
    b = bench(servers=3)
    urls = [server.url for server in b.servers]
    assert b.push.push(b.start, 0).proofs.keys() == set(urls)
    b.servers[1].kill()
    b.servers[2].stale_pushes = 1
    report = b.push.push(moved(b.start, 1e-3), 1)
    assert report.proofs.keys() == {urls[0], urls[2]} and report.again == (urls[2],)
    b.servers[1].start()
    b.push.admit(urls[1])
    assert b.servers[1].weight_version == b.servers[0].weight_version
    b.servers[0].kill()
    b.servers[0].start()  # with the weights of its start, and nobody was told
    b.push.admit(urls[0])
    assert b.servers[0].weight_version == b.servers[1].weight_version
    assert sum("is given them" in said for said in b.said) == 2
    b.servers[0].kill()
    b.servers[0].start()
    b.servers[0].stale = True
    with pytest.raises(StaleWeights):
        b.push.admit(urls[0])


def test_the_way_is_that_of_the_servers_there_are_and_asked_of_the_others_when_they_come(bench):
    b = bench(servers=2)
    b.servers[0].kill()
    report = b.push.push(b.start, 0)
    assert (report.way, list(report.proofs)) == ("reload", [b.servers[1].url])
    b.servers[0].start()
    b.servers[0].dev = False
    with pytest.raises(UserError, match=f"reload is not possible, for {b.servers[0].url} lacks the route"):
        b.push.admit(b.servers[0].url)
    b.servers[0].dev = True
    b.push.admit(b.servers[0].url)
    assert b.servers[0].weight_version == b.servers[1].weight_version


def dies_at(server: FakeServer, path: str) -> None:
    """Once, with the weights of its start when it is back."""
    answer, left = server.answer, [1]

    def once(method, there, query, body):
        if there == path and left and not (path == "/collective_rpc" and method == "GET"):
            left.clear()
            server.kill()
            server.start()
        return answer(method, there, query, body)

    server.answer = once


@pytest.mark.parametrize(
    ("path", "way"),
    [
        ("/collective_rpc", "reload"),
        ("/reset_prefix_cache", "reload"),
        ("/weight_info", "reload"),
        ("/v1/completions", "reload"),
        ("/v1/load_lora_adapter", "adapter"),
        ("/v1/completions", "adapter"),
    ],
)
def test_the_only_server_may_die_inside_a_push(bench, path, way):
    b = bench(lora=way == "adapter")
    b.push.push(b.start, 0)
    dies_at(b.servers[0], path)
    report = b.push.push(moved(b.start, 1e-2), 1)
    assert (report.way, report.verdict, report.verified) == (way, "verified", 1)
    assert any("once more when it is back" in said for said in b.said) and b.servers[0].paused is None
    died = ("nobody answers", "the connection ended", "started again")
    assert all(any(words in said for words in died) for said in b.said), b.said


def test_a_server_that_dies_of_every_push_ends_the_run(bench, monkeypatch):
    b = bench()
    server = b.servers[0]
    b.push.push(b.start, 0)

    def die(body):
        server.kill()
        server.start()

    monkeypatch.setattr(server, "_rpc", die)
    with pytest.raises(Unreachable):
        b.push.push(moved(b.start, 1e-2), 1)
    assert sum("once more when it is back" in said for said in b.said) == weight_push.TRIES - 1


def test_a_push_that_is_stopped_leaves_no_server_paused(bench, monkeypatch):
    b = bench()
    stopped, read = threading.Event(), b.servers[0].read_weights

    def check():
        stopped.set()
        raise hosts.Stopped

    def slowly(path):
        monkeypatch.setattr(hosts, "check", check)
        stopped.wait(5)
        return read(path)

    b.servers[0].read_weights = slowly
    with pytest.raises(hosts.Stopped):
        b.push.push(b.start, 0)
    assert b.asked()[0] == "/pause" and b.servers[0].paused is None


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_that_goes_on_does_not_take_the_weights_of_its_start_for_its_own(bench, recorded):
    """In bfloat16 the update is within what two implementations may differ by. The record may be of an older version,
    or lost."""
    b = bench(noise=0.002, dtype="bfloat16")
    weights = moved(b.start, 2e-3)
    b.push.push(b.start, 0)
    assert b.push.push(weights, 7).verdict == "verified"
    record = b.push._record
    if not recorded:
        record.unlink()
    b.push = b.make_push()
    report = b.push.push(weights, 7)
    assert (report.verdict, report.verified) == ("verified", 7)
    record.unlink(missing_ok=not recorded)
    b.push = b.make_push()
    b.servers[0].kill()
    b.servers[0].start()
    b.servers[0].stale = True
    with pytest.raises(StaleWeights) as raised:
        b.push.push(weights, 7)
    assert float(str(raised.value).split("differ by ")[1].split()[0]) < TOLERANCE["bfloat16"]


def test_what_a_server_may_hold_instead_outlives_the_process(tmp_path):
    path, (start, one, two) = tmp_path / "proof.npz", np.arange(3.0)[:, None] * np.ones(4)
    known = Known(path, "a")
    assert known.olds(start, 0) == () and known.version == -1
    known.start = start
    known.verified(start, 0)
    assert [old[0] for old in known.olds(one, 1)] == [0]
    known.verified(one, 1)
    again = Known(path, "a")
    assert again.version == 1 and [old[0] for old in again.olds(two, 2)] == [1, 0]
    assert [old[0] for old in again.olds(one + 1e-6, 1)] == [0], "it was verified before"
    assert [old[0] for old in again.olds(two, 1)] == [1, 0], "another course of the run"
    assert [old[0] for old in again.olds(start, 0)] == [1]
    other = Known(path, "b")
    assert other.version == 1 and other.start is None and other.last is None
    forget_after(path, 5)
    assert Known(path, "a").version == 1
    forget_after(path, 0)  # the run went back to its start, and servers hold what it came to before
    back = Known(path, "a")
    assert back.version == 0 and [old[0] for old in back.olds(two, 1)] == [1, 0]
    path.write_bytes(path.read_bytes()[:-40])
    assert Known(path, "a").version == -1
    forget_after(path, 0)


def test_without_stamps_a_server_that_came_back_is_known_by_what_it_answers(bench, monkeypatch):
    b = bench()
    b.push.push(b.start, 0)
    b.push.push(moved(b.start, 1e-3), 1)
    monkeypatch.setattr(ways._Whole, "holds", lambda *args: None)
    calls = len(b.asked())
    b.push.admit(b.servers[0].url)
    assert len(b.asked()) == calls
    b.servers[0].kill()
    b.servers[0].start()
    b.push.admit(b.servers[0].url)
    assert len(b.asked()) == calls + 5


def test_admitting_before_the_first_push_asks_nothing(bench):
    b = bench()
    b.push.admit(b.servers[0].url)
    assert not b.servers[0].seen and b.push.model_name() == "tiny"


def test_no_server_at_all_is_told_after_its_patience(bench):
    b = bench()
    b.push.push(b.start, 0)
    b.servers[0].kill()
    for one in b.push._one.values():
        one.config.__dict__["patience_s"] = 0.2
    with pytest.raises(Unreachable):
        b.push.push(b.start, 1)


def test_servers_see_the_directory_under_their_own_name(bench, tmp_path):
    mount = tmp_path / "mount"
    mount.symlink_to(tmp_path / "shared")
    b = bench(directory=str(tmp_path / "shared"), seen_as=str(mount))
    b.push.push(b.start, 0)
    assert b.servers[0].bodies("/collective_rpc")[-1]["kwargs"]["weights_path"].startswith(f"{mount}/mpd-")


def test_a_bucket_serves_where_no_disk_is_shared(bench, tmp_path, monkeypatch):
    bucket = tmp_path / "bucket"
    there = lambda path: epath.Path(str(path).replace("gs://pushes", str(bucket)))  # noqa: E731
    monkeypatch.setattr(weight_push, "epath", SimpleNamespace(Path=there))
    b = bench(directory="gs://pushes", seen_as=str(bucket))
    for version in (0, 1):
        b.push.push(moved(b.start, 1e-3 * version), version)
    assert [path.name for path in bucket.iterdir()] == [b.servers[0].weight_version]


def test_only_this_run_s_earlier_directories_and_adapters_are_removed(bench):
    b = bench(lora=True)
    mine, other = f"{b.push._run}7-abcdef", "mpd-000000-7-abcdef"
    for name in (mine, f".{mine}.x1", other):
        (b.files / name).mkdir(parents=True)
    b.servers[0].adapters = {mine: b.servers[0].logprobs, other: b.servers[0].logprobs}
    b.push.push(b.start, 0)
    assert {path.name for path in b.files.iterdir()} == {other, b.push.model_name()} == set(b.servers[0].adapters)


def test_a_place_that_cannot_be_written_is_told(bench):
    b = bench(directory="/proc/nowhere")
    with pytest.raises(UserError, match="/proc/nowhere"):
        b.push.push(b.start, 0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"restart": "x", "way": "reload"}, "restart"),
        ({"directory": "gs://bucket/x"}, "sampling.push.seen_as"),
        ({"directory": " "}, "directory"),
    ],
)
def test_settings_that_cannot_be_are_refused(keys, said):
    with pytest.raises(UserError, match=said):
        PushConfig(**keys)
