"""The train step's benchmark on shapes that take no time: what it counts and runs, not what it times."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from mpd_jax import build, config
from mpd_jax.bench import train
from mpd_jax.cli import app
from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.plan import chips, command, flops
from mpd_jax.roles import assign_roles
from mpd_jax.screen import Screen
from mpd_jax.sharding import make_mesh
from mpd_jax.train.state import Trained
from mpd_jax.train.step import Update
from mpd_jax.types import UserError
from tests.compilations import compilations
from tests.e2e.tiny import ROOT

MPD = str(ROOT / "configs" / "mpd_full.yaml")
ROWS, PROMPT = 8, 8
SMALL = [
    "student.path=nobody/student",
    "teacher.path=nobody/teacher",
    f"train.batch_size={ROWS}",
    f"sampling.prompt_tokens={PROMPT}",
]
EXACT = ["student.dtype=float32", "teacher.dtype=float32", "student.remat=none"]


def shape(width: int) -> dict:
    """A config.json of two layers."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "vocab_size": 264}
    qwen3 = command.known_shapes()["Qwen/Qwen3-1.7B"]["config"]
    return {"tokenizer": 260, "config": {**qwen3, **sizes}}


SHAPES = {"nobody/student": shape(32), "nobody/teacher": shape(48)}


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    monkeypatch.setattr(command, "known_shapes", lambda: SHAPES)


@pytest.fixture
def one_device(monkeypatch):
    """What compiles for one device compiles in a fraction of the time."""
    monkeypatch.setattr(train, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


ADAPTER = ["student.lora={rank: 4, alpha: 8}", "train.micro_batches=2"]
MIXED = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("devices", "lengths", "changes"),
    [(1, (32,), []), pytest.param(1, (32,), ADAPTER, marks=SLOW), pytest.param(8, (32, 48), MIXED, marks=SLOW)],
    ids=["one", "adapter", "mixed"],
)
def test_both_forms_are_the_same_step_and_its_operations_are_the_plan_s(
    devices, lengths, changes, monkeypatch, capsys, request
):
    if devices == 1:
        request.getfixturevalue("one_device")
    monkeypatch.setattr(chips, "BY_KIND", {"cpu": chips.CHIPS["h200"]})
    settings = config.load(MPD, [*SMALL, *EXACT, *changes])
    result = train.run(settings, json=True, lengths=lengths, steps=1)
    assert capsys.readouterr().out == "" and json.loads(json.dumps(result)) == result
    found = {(case["form"], case["length"]): case for case in result["cases"]}
    assert set(found) == {(form, length) for form in ("fused", "dense") for length in lengths}
    student, teacher = (Model(ModelConfig.from_hf(SHAPES[f"nobody/{n}"]["config"])) for n in ("student", "teacher"))
    for length in lengths:
        fused, dense = found["fused", length], found["dense", length]
        assert fused["loss"] == pytest.approx(dense["loss"], rel=1e-5) and fused["loss"] > 0
        sizes = {"student_length": length, "target_length": length, "response": length - PROMPT}
        whole = flops.train_step(student, teacher, rows=ROWS, **sizes).useful
        assert fused["flops"] == dense["flops"] and (fused["flops"] == whole or changes is ADAPTER)
        for case in (fused, dense):
            assert case["fits"] and case["tokens_per_second"] == ROWS * length / case["seconds"]
            assert case["mfu"] == case["flops"] / case["seconds"] / devices / 989e12
            assert case["compiled_bytes"] > 0 and case["peak_bytes"] is None, "a CPU counts no bytes"
    ratios = {ratio["length"]: ratio for ratio in result["ratios"]}
    for length in lengths:
        fused, dense = found["fused", length], found["dense", length]
        assert ratios[length]["time"] == fused["seconds"] / dense["seconds"]
        assert ratios[length]["memory"] == fused["compiled_bytes"] / dense["compiled_bytes"]
        assert fused["compiled_bytes"] < dense["compiled_bytes"] or changes is MIXED, "shards of so small a vocabulary"


def too_large(trained, target_weights, batch, base, scale):
    """An update that sorts 64 TiB."""
    much = jnp.sort(jnp.broadcast_to(scale + jnp.arange(2.0**24), (2**20, 2**24)), axis=0)
    return trained, {"loss": jnp.sum(much), "finite": jnp.array(True)}


def nothing(trained, target_weights, batch, base, scale):
    return trained, {"loss": scale, "finite": jnp.array(True)}


def test_a_step_that_does_not_fit_is_told_and_those_after_it_run(one_device, monkeypatch, capsys):
    bodies = {train.FORMS["fused"]: too_large, train.FORMS["dense"]: nothing}
    monkeypatch.setattr(build, "update_of", lambda c, r, mesh, divergence: Update(bodies[divergence], mesh, 1, None))
    peaks = iter([10, 10, 10, 30, 30, 30])  # before each case, and after those that fit
    monkeypatch.setattr(train.Bench, "_peak", lambda self: next(peaks))
    with compilations() as seen:
        result = train.run(config.load(MPD, [*SMALL, *EXACT]), lengths=(48, 32, 48), steps=3)
    assert seen["jit(traced)"] == 4, "one a length and form"
    *large, one, two = result["cases"]
    assert [case["length"] for case in result["cases"]] == [32, 48, 32, 48]
    for case in large:
        assert not case["fits"] and "out of memory" in case["said"].lower()
        assert case["seconds"] is case["mfu"] is None and case["compiled_bytes"] > 2**46
    for case in (one, two):
        assert case["fits"] and case["seconds"] > 0 and case["mfu"] is None, "the peak of a CPU is not known"
    assert one["peak_bytes"] == 30 and two["peak_bytes"] is None, "not told where it was as high before"
    for ratio in result["ratios"]:
        assert ratio["time"] is None and ratio["memory"] > 1
    printed = capsys.readouterr().out
    assert "does not fit" in printed and "their peak unknown" in printed and "- of the time" in printed


def test_random_weights_are_made_where_and_as_the_run_s_own_lie():
    settings = config.load(MPD, [*SMALL, "mesh.fsdp=4", "mesh.tensor=2"])
    mesh = make_mesh(settings.mesh)
    roles = assign_roles(settings, command.opener(lambda text: None, "cpu"))
    trained = train.Bench(settings, roles, mesh, Screen(quiet=True)).start(jax.random.key(0))
    state = build.abstract_state(settings, roles.student, mesh)
    made, like = (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
        for tree in (trained, Trained(state.weights, state.opt_state))
    )
    assert made == like
    blocks = jax.device_get(trained.weights["blocks"])
    spread = {name: np.std(x) for name, x in blocks["mlp"].items()}
    assert all(abs(value - train.SPREAD) < 0.002 for value in spread.values()), spread
    assert not any(np.array_equal(x[0], x[1]) for x in jax.tree.leaves(blocks)), "layers are alike"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--length", "8"], r"--length \[8\]: must be above sampling.prompt_tokens = 8"),
        (["--length", "32", "--length", "65"], r"--length \[65\]: .* at most 64"),
        (["recipe.target.weights=self_frozen"], "recipe.target.weights=teacher"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said):
    result = CliRunner().invoke(app, ["bench", "train", MPD, *SMALL, *arguments])
    assert isinstance(result.exception, UserError) and re.search(said, str(result.exception))
