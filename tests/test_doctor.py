"""Every verdict of `mpd-jax doctor` that is not ok is seen once, and a run in which all is well gets no other."""

import json
from functools import cache

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from mpd_jax import build, cli, config, run
from mpd_jax.doctor import command, machine, models
from mpd_jax.doctor.models import PROBE
from mpd_jax.doctor.servers import Asked, Inspected
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config, load_weights
from mpd_jax.plan.chips import GiB
from mpd_jax.roles import TINY, assign_roles, open_model, open_roles
from mpd_jax.screen import Screen
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.types import UserError
from tests.e2e.tiny import QUICKSTART, SMALL
from tests.fake_server import FakeServer
from tests.test_roles import copy_of

ROOM = 64  # tokens; the teacher behind the server reads as many each time
NOBODY = "http://127.0.0.1:9"


def started(on="cpu", at_once=64 * 512, model="/untied", modules=("q_proj",), seed=0):
    """What a server of 64 sequences of 512 tokens says of its start."""
    return {
        "model_config": {
            "dtype": "torch.float32",
            "max_model_len": 512,
            "max_logprobs": 20,
            "logprobs_mode": "raw_logprobs",
            "model": str(model),
            "seed": seed,
        },
        "scheduler_config": {
            "max_num_batched_tokens": at_once,
            "max_num_seqs": 64,
            "enable_chunked_prefill": True,
        },
        "device_config": {"device": on},
        "lora_config": {"max_loras": 2, "target_modules": modules and list(modules)},
    }


@cache
def chat():
    return open_model("teacher", settings().teacher, settings().recipe.contexts).chat  # type: ignore[arg-type]


def settings(*overrides, small=True):
    return config.load(QUICKSTART, [*(SMALL if small else ()), *overrides])


def tokenize(prompt):
    """As a server of the shipped teacher."""
    return list(chat().encode(prompt) if isinstance(prompt, str) else chat().prompt("plain", PROBE))


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    monkeypatch.setattr(build, "TINY_TRAINING", 64)
    monkeypatch.setattr(build, "TINY_HELDOUT", 32)


@pytest.fixture
def untied(tmp_path):
    """The shipped student's files, as if its head were one of its own."""
    directory = copy_of("student", tmp_path / "untied", [508])
    hf = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**hf, "tie_word_embeddings": False}))
    return directory


@pytest.fixture
def server():
    with FakeServer() as server:
        server.tokenize, server.info = tokenize, started()
        yield server


def rows_of(server, *overrides, name="teacher", length=200, top_k=8, whole=True):
    """By what they say, without the model's name before it."""
    urls = server if isinstance(server, list) else [server]
    at = json.dumps([one if isinstance(one, str) else one.url for one in urls])
    made = settings(f"{name}.serve={at}", *overrides)
    held = open_model(name, getattr(made, name), made.recipe.contexts)
    return {
        row.what.removeprefix(f"{name}: "): row
        for row in Inspected(made, Asked(held, length, top_k), None, whole=whole).rows()
    }


@pytest.fixture(scope="module")
def teacher():
    """The shipped teacher's log-probabilities after any text of at most ROOM tokens."""
    mesh, model = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), Model(load_config(TINY / "teacher"))
    weights = load_weights(TINY / "teacher", model, mesh)
    all_BTV = jax.jit(lambda tokens_BT: jax.nn.log_softmax(model.logits(weights, tokens_BT)))

    def logprobs_TV(ids):
        tokens = np.zeros((1, ROOM), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(all_BTV(tokens)[0, : len(ids)]).astype(np.float64)

    logprobs_TV([0])  # compiled before a request waits for it
    return logprobs_TV


@pytest.mark.slow
def test_where_all_is_well_no_verdict_is_another_and_the_agreement_is_measured(tmp_path, teacher, untied):
    with FakeServer(teacher) as server:
        server.tokenize, server.info = tokenize, started(model=untied)
        at = [f"student.serve={server.url}", f"teacher.serve={server.url}", "recipe.target.top_k=8"]
        made = settings(*at, f"run.dir={tmp_path}/run", "problems.train=tiny")
        found = command.examine(made, lambda name: None, Screen(quiet=True), quick=False)
        others = [row for row in found if row.verdict != "ok"]
        # The teacher stands in for the student, as a server does that an earlier run has given other weights.
        assert [(row.what, row.verdict) for row in others] == [("student: log-probabilities", "skipped")]
        assert "the first push proves" in others[0].seen
        (row,) = (row for row in found if "teacher: log-probabilities" in row.what)
        figures = row.seen.split()
        assert float(figures[figures.index("most,") - 2]) < 1e-4, row.seen
        whats = " ".join(row.what for row in found)
        for checked in (
            "window",
            "seeds",
            "scores",
            "push",
            "tied head",
            "tokenizer of the server",
            "sampling.push.dir",
        ):
            assert checked in whats
        assert not (tmp_path / "run").exists()
        server.off_temperature = 1.2
        roles, mesh = open_roles(made), make_mesh(made.mesh)
        inspected = Inspected(made, Asked(roles.teacher, 200, 8), None, whole=True)
        (row,) = inspected.agreement(mesh, [], roles.teacher.weights(mesh))
        assert row.verdict == "FAIL" and "float32 allows 0.01" in row.seen
        assert row.seen.endswith("at temperature 1.2") and "--logprobs-mode raw_logprobs" in row.change


WRONG = [
    ("window", "FAIL", "exceed the 150", "--max-model-len", lambda s: setattr(s, "window", 150), []),
    ("responses", "FAIL", "after temperature", "raw_logprobs", lambda s: setattr(s, "processed", True), []),
    ("responses", "FAIL", "no token ids", "0.10.2", lambda s: setattr(s, "fault", lambda i, b: _no_ids(b)), []),
    ("server", "FAIL", "0.9.1 is too old", "newer", lambda s: setattr(s, "version", "0.9.1"), []),
    ("server", "FAIL", "nobody answers", "start the server", lambda s: s.kill(), []),
    ("scores", "FAIL", "max allowed: 4", "--max-logprobs", lambda s: setattr(s, "max_logprobs", 4), []),
    ("scores", "FAIL", "train.max_length", "--max-model-len", lambda s: None, ["train.max_length=600"]),
    ("vocabulary of the server", "FAIL", "out of vocab", "another vocab", lambda s: setattr(s, "vocab_size", 511), []),
    ("seeds", "warn", "other tokens the second time", "seed=none", lambda s: setattr(s, "fault", _no_seed), []),
    ("seeds", "ok", "not reproducible", "", lambda s: None, ["sampling.server.seed=none"]),
    ("noise", "warn", "draw alike", "--seed $RANDOM", lambda s: None, ["sampling.server.seed=none"]),
    ("noise", "ok", "--seed 7", "", lambda s: setattr(s, "info", started(seed=7)), ["sampling.server.seed=none"]),
    ("start flags", "warn", "does not tell", "a --seed of its own", lambda s: setattr(s, "info", None),
     ["sampling.server.seed=none"]),
    ("tokenizer of the server", "FAIL", "from token 0", "serve the", lambda s: setattr(s, "tokenize", _bytes), []),
    ("tokenizer of the server", "warn", ">>> ", "ids are sent", lambda s: setattr(s, "tokenize", _longer), []),
    ("tokenizer of the server", "skipped", "no route", "", lambda s: setattr(s, "tokenize", None), []),
    ("start flags", "warn", "does not tell", "--max-num-batched-tokens", lambda s: setattr(s, "info", None), []),
    ("seeded prompts", "FAIL", "parts of 2,048", "32768", lambda s: setattr(s, "info", started(at_once=2048)), []),
    ("seeded prompts", "ok", "no CPU", "", lambda s: setattr(s, "info", started("cuda", at_once=2048)), []),
    ("adapters", "FAIL", "end the server", "--lora-target", lambda s: setattr(s, "info", started(modules=None)), []),
    ("adapters", "warn", "end the server", "--lora-target",
     lambda s: setattr(s, "info", started("cuda", modules=["lm_head"])), []),
]  # fmt: skip


def _no_ids(body):
    return "no ids" if body.get("max_tokens") == 16 else None


def _no_seed(number, body):
    body.pop("seed", None)


def _bytes(prompt):
    return list(str(prompt).encode())


def _longer(prompt):
    return tokenize(prompt) if isinstance(prompt, str) else [*tokenize(prompt), 65]


@pytest.mark.parametrize(("what", "verdict", "seen", "change", "spoil", "overrides"), WRONG)
def test_what_is_wrong_at_a_server_is_told_with_a_remedy(server, what, verdict, seen, change, spoil, overrides):
    spoil(server)
    row = rows_of(server, *overrides)[what]
    assert row.verdict == verdict
    assert seen in row.seen and change in row.change


def test_a_server_that_a_request_may_end_is_asked_nothing(server):
    server.info = started(at_once=2048)
    rows_of(server)
    assert not server.bodies()


def test_the_student_is_told_how_it_gets_its_weights(server, untied):
    server.info = started(model=untied)
    ask = {"name": "student", "top_k": 0}
    assert rows_of(server, **ask)["push"].seen == "reload"
    assert rows_of(server, **ask)["tied head"].verdict == "ok"
    assert rows_of(server, "sampling.push.restart=again", "sampling.push.way=restart", **ask)["push"].verdict == "ok"
    by_hand = rows_of(server, "sampling.push.way=restart", **ask)["push"]
    assert by_hand.verdict == "warn" and "sampling.push.restart" in by_hand.change
    for directory, verdict in ((TINY / "student", "FAIL"), ("/elsewhere", "warn")):
        server.info = started(model=directory)
        tied = rows_of(server, **ask)["tied head"]
        assert tied.verdict == verdict and "--untie" in tied.change
    server.info, server.dev, server.lora = None, False, False
    rows = rows_of(server, **ask)
    assert rows["push"].verdict == "FAIL" and "VLLM_SERVER_DEV_MODE" in rows["push"].change
    assert "--untie" in rows["start flags"].change


def test_servers_of_one_list_share_the_rows_that_are_alike(server):
    with FakeServer() as other:
        other.tokenize, other.info, other.max_logprobs = tokenize, started(), 4
        rows = rows_of([server, other])
        assert rows["seeds"].verdict == "ok" and rows[f"scores, {server.url}"].verdict == "ok"
        assert rows[f"scores, {other.url}"].verdict == "FAIL"
        other.model = "another"
        assert "must hold the same model" in rows_of([server, other])["servers"].seen
    gone = rows_of([server, NOBODY])
    assert gone[f"server, {NOBODY}"].verdict == "warn" and gone[f"server, {server.url}"].verdict == "ok"


def verdicts(*overrides):
    made = settings(*overrides)
    return {row.what: row for row in models.rows(made, assign_roles(made, open_model))}


def test_models_that_do_not_fit_fail_by_name_and_their_prompts_show_where_they_part(tmp_path):
    assert {row.verdict for row in verdicts().values()} == {"ok"}
    row = verdicts("teacher.thinking=false")["teacher: ids and plain prompt are the student's"]
    assert row.verdict == "FAIL" and "thinking alike" in row.change
    assert r"assistant\n' >>> '<think>" in row.seen and r"assistant\n' >>> ''" in row.seen
    student = copy_of("student", tmp_path / "s", [506])
    found = verdicts(f"student.path={student}")
    assert found["teacher: the student knows its end"].verdict == "FAIL"
    assert found["student: ends"].verdict == "warn" and "add [508]" in found["student: ends"].change
    cut = ["recipe.rewrite={how: truncate, truncate_to: 8}", "student.thinking=false", "teacher.thinking=false"]
    assert verdicts(*cut)["student: has a thinking span to cut"].verdict == "FAIL"


def test_problems_that_exceed_what_they_may_are_told():
    made = settings("sampling.prompt_tokens=16")
    row = models.problems(made, open_roles(made), make_mesh(made.mesh))
    assert row.verdict == "FAIL" and "raise it or leave the problem out" in row.change


def machine_rows(*overrides):
    made = settings(*overrides)
    found = machine.rows(made, open_roles(made), make_mesh(made.mesh))
    return {row.what: row for row in found}


def test_a_mesh_that_divides_nothing_and_a_memory_or_disk_that_is_too_small_are_told(tmp_path, monkeypatch):
    at = ["mesh.data=1", "mesh.fsdp=-1", f"run.dir={tmp_path}/run", "sampling.slots=8", f"student.serve={NOBODY}"]
    assert {row.verdict for row in machine_rows(*at).values()} == {"ok"}
    assert "does not divide" in machine_rows(*at, "mesh.fsdp=1", "mesh.tensor=8")["mesh"].words
    rows = machine_rows(*at, "sampling.push={directory: 'gs://b/x', seen_as: /x}")
    assert rows["sampling.push.directory: room"].verdict == "skipped"
    state = build.abstract_state(settings(), open_roles(settings()).student, make_mesh(MeshConfig()))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.weights, state.opt_state)))
    for memory, free, verdict in ((0.01 * GiB, 4 * size - 1, "warn"), (1e6, size - 1, "FAIL")):
        monkeypatch.setattr(machine, "device_memory", lambda memory=memory: memory)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, free=free: type("Disk", (), {"free": free}))
        rows = machine_rows(*at, "train.keep=3")
        assert (rows["memory"].verdict, rows["run.dir: room"].verdict) == (verdict, verdict)
        assert "mpd-jax plan" in rows["memory"].change and "train.keep" in rows["run.dir: room"].change


def test_training_runs_the_quick_part_and_says_only_what_is_wrong(tmp_path, server, monkeypatch):
    def never(*arguments, **named):
        raise AssertionError("built")

    monkeypatch.setattr(build, "build", never)
    at = [f"run.dir={tmp_path}/run", f"teacher.serve={server.url}"]
    made, said = settings(*at), []
    command.before_training(made, open_roles(made), lambda name: None, said.append)
    assert said == [] and not any("server_info" in seen.path for seen in server.seen)
    server.fault = _no_seed
    command.before_training(made, open_roles(made), lambda name: None, said.append)
    assert len(said) == 1 and said[0].startswith("warning: teacher: seeds: one seed drew other tokens")
    server.window = 150
    with pytest.raises(UserError, match="exceed the 150 that"):
        run.train(made)
    server.kill()
    command.before_training(made, open_roles(made), lambda name: None, said.append)  # it is waited for later
    assert len(said) == 1


def test_the_command_ends_with_1_if_anything_fails():
    def ran(*words):
        return CliRunner().invoke(cli.app, ["doctor", str(QUICKSTART), *SMALL, *words])

    fine = ran()
    assert fine.exit_code == 0 and "rewriter (teacher): prompt, compress" in fine.output
    wrong = ran("mesh.tensor=3", "--json")
    assert wrong.exit_code == 1
    said = json.loads(wrong.stdout)
    assert not said["ok"] and [row["verdict"] for row in said["rows"]] == ["FAIL", "skipped"]
    assert said["rows"][0]["what"] == "mesh" and "mesh.tensor" in said["rows"][0]["change"]
    assert ran("teacher.path=/nowhere").exit_code == 1
    last = json.loads(ran("sampling.prompt_tokens=16", f"teacher.serve={NOBODY}", "--json").stdout)["rows"][-1]
    assert (last["what"], last["verdict"]) == ("log-probabilities of servers", "skipped")
