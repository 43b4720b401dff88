"""The plan: bytes of the run it plans, operations as the compiler counts them, loops multiplied, remedies named."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from mpd_jax import build, config
from mpd_jax.cli import app
from mpd_jax.models import decoder
from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.models.lora import Adapted, LoraConfig
from mpd_jax.plan import chips, command, flops
from mpd_jax.plan.chips import GiB, local_bytes
from mpd_jax.plan.collectives import sent_bytes
from mpd_jax.plan.measure import Measured
from mpd_jax.plan.phases import phases
from mpd_jax.plan.remedies import remedies
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.roles import assign_roles, open_roles
from mpd_jax.sampling.sampler import Request, SamplingConfig
from mpd_jax.sharding import make_mesh
from mpd_jax.train.state import TrainConfig, Trained, init_opt_state, optimiser
from mpd_jax.train.step import Update, make_update
from mpd_jax.types import Batch, UserError
from tests.e2e.tiny import QUICKSTART, ROOT, SMALL

MIXED = [*SMALL, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


def on_one_device(tree) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module", params=["whole", "adapter"])
def tiny(request):
    adapter = ["student.lora={rank: 8, alpha: 16}"] if request.param == "adapter" else []
    settings = config.load(QUICKSTART, [*MIXED, *adapter])
    mesh, roles = make_mesh(settings.mesh), open_roles(settings)
    return settings, mesh, roles, {phase.name: phase for phase in phases(settings, roles, mesh)}


def placed(tree) -> dict:
    """By name: shape, dtype and what each device holds of it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (x.shape, x.dtype, x.sharding.devices_indices_map(x.shape)) for path, x in leaves
    }


def test_a_plan_holds_and_lowers_what_the_run_it_plans_does(tiny, tmp_path, monkeypatch):
    settings, mesh, roles, planned = tiny
    run, state = build.build(settings, tmp_path, lambda row: None, lambda text: None, None)  # type: ignore[arg-type]
    run.load_student(state.weights, 0)
    sampler = run.student_sampler
    requests = [Request((1, 2), (0, at)) for at in range(settings.train.batch_size)]
    slots = sampler._batch(requests, SamplingConfig(max_tokens=4)).slots
    real = {
        "weights": (state.weights, roles.student.base(mesh)),
        "optimiser": state.opt_state,
        "teacher": run.parts.teacher_weights,
        "cache": slots.cache,
        "slots": slots._replace(cache=()),
    }
    resident = planned["rollout decode"].resident
    assert {name: local_bytes(resident[name]) for name in real} == {n: on_one_device(x) for n, x in real.items()}
    assert local_bytes(resident["decode copies"][0]) == on_one_device(sampler._weights)
    assert set(resident) == {*real, "decode copies"}, "something is resident that was not compared"
    lowered = []
    monkeypatch.setattr(Update, "lower", lambda self, *trees: lowered.append(trees))
    planned["train"].program.lower()
    trained, target, batch, base = lowered[0]
    given = Trained(state.weights, state.opt_state), run.parts.teacher_weights, roles.student.base(mesh)
    assert placed((trained, target, base)) == placed(given)
    host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    assert placed(batch) == placed(build.update_of(settings, roles, mesh).place(host))
    run.close()


def test_the_compiler_counts_the_same_argument_bytes(tiny):
    _, _, _, planned = tiny
    program = planned["rollout decode"].program
    given = sum(local_bytes(tree) for tree in program.arguments.values())
    counted = program.lower().compile().memory_analysis().argument_size_in_bytes
    assert given + 6 * 4 <= counted <= given + 64, "the rest are settings and limits, numbers all of them"


def unrolled(body, carry, xs, length=None):
    """jax.lax.scan as a Python loop, so that the compiler counts every trip."""
    out = []
    for at in range(len(jax.tree.leaves(xs)[0])):
        carry, y = body(carry, jax.tree.map(lambda x, at=at: x[at], xs))
        out.append(y)
    return carry, None if out[0] is None else jax.tree.map(lambda *ys: jnp.stack(ys), *out)


SHAPE = ModelConfig(
    family="qwen3", vocab_size=2048, hidden_size=128, intermediate_size=320, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=32, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qkv_bias=False, o_bias=False, mlp_bias=False,
    qk_norm=True, tie_embeddings=True, max_position_embeddings=4096,
)  # fmt: skip


SLOW = [("none", None), ("dots", None), ("full", LoraConfig(rank=16, alpha=32))]


@pytest.mark.parametrize(("remat", "lora"), [("full", None), *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)])
def test_operations_agree_with_the_compilers_count_of_unrolled_layers(remat, lora, monkeypatch):
    B, T, R = 2, 192, 128
    model, target = Model(SHAPE, remat=remat), Model(SHAPE)
    student, base = (Adapted(model, lora), model.abstract()) if lora else (model, None)
    tx = optimiser(TrainConfig())
    update = make_update(student, target, LossConfig(chunk=B * R), tx, None, vocab_size=2048)
    monkeypatch.setattr(decoder.jax.lax, "scan", unrolled)
    weights, read = student.abstract(), target.abstract()
    trained = Trained(weights, jax.eval_shape(lambda w: init_opt_state(tx, w), weights))
    ids, at = (np.zeros(shape, np.int32) for shape in ((B, T), (B, R)))
    batch = Batch(ids, ids, at, ids, ids, at, at, at, np.ones((B, R), np.float32))
    counted = update.lower(trained, read, batch, base).compile().cost_analysis()["flops"]
    ours = flops.train_step(student, target, rows=B, student_length=T, target_length=T, response=R).done
    # What is left are the element-wise operations.
    assert 0.94 * counted < ours < counted


def test_a_token_weight_costs_all_that_is_forward_once_more():
    student, target, R = Model(SHAPE), Model(SHAPE), 2 * 128
    sizes = {"rows": 2, "student_length": 192, "target_length": 256, "response": 128}
    plain, weighed = (flops.train_step(student, target, **sizes, weighed=how) for how in (False, True))
    forward = flops.forward(student, 2 * 192, 192).done + flops.forward(target, 2 * 256, 256).done
    assert weighed.done - plain.done == pytest.approx(forward + 2 * 2 * R * 128 * 2048)
    assert weighed.useful == plain.useful


def test_a_causal_row_needs_half_of_its_scores():
    model = Model(SHAPE, remat="none")
    once = flops.forward(model, 100, 100)
    scores = 4 * 2 * 4 * 32 * 100 * 100  # products with keys and with values, layers, heads, head size, T x T
    assert once.done - once.useful == scores / 2


def test_a_token_of_a_mixture_goes_through_its_own_experts_alone():
    shape = ModelConfig.from_hf(command.known_shapes()["Qwen/Qwen3-30B-A3B"]["config"])
    head_and_embedding = 2 * 151_936 * 2048
    active = 48 * flops.layer_weights(shape) + head_and_embedding
    assert active / 1e9 == pytest.approx(3.35, abs=0.01), "3.3 billion, as published"


HLO = """
HloModule made_by_hand

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %gathered = f32[32,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %inner = (s32[], f32[8,16]{1,0}) while(%p), condition=%short, body=%inner_body
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %x)
}

%inner_body (q: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %q = (s32[], f32[8,16]{1,0}) parameter(0)
  %y = bf16[8,16]{1,0} get-tuple-element(%q), index=1
  ROOT %sum = bf16[8,16]{1,0} all-reduce(%y), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%short (r: (s32[], f32[8,16])) -> pred[] {
  %r = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%r), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.2, %three), direction=LT
}

%begin (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %early = f32[2,16]{1,0} reduce-scatter(%a), channel_id=7, replica_groups=mesh['d'=2,'f'=4] {'f'}, dimensions={0}
}

%finish (b: f32[8,16]) -> f32[8,16] {
  %b = f32[8,16]{1,0} parameter(0)
  ROOT %late = f32[2,16]{1,0} reduce-scatter(%b), channel_id=7, replica_groups=mesh['d'=2,'f'=4] {'f'}, dimensions={0}
}

%all-reduce-scatter.2 (c: f32[8,16]) -> f32[4,16] {
  %c = f32[8,16]{1,0} parameter(0)
  %whole = f32[8,16]{1,0} all-reduce(%c), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %own = f32[4,16]{1,0} dynamic-slice(%whole, %at, %zero), dynamic_slice_sizes={4,16}
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x0 = f32[8,16]{1,0} parameter(0)
  %layers = (s32[], f32[8,16]{1,0}) while(%t0), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %f = f32[2,16]{1,0} fusion(%x0), kind=kLoop, calls=%begin
  %g = f32[2,16]{1,0} fusion(%x0), kind=kLoop, calls=%finish
  %h = f32[4,16]{1,0} fusion(%x0), kind=kCustom, calls=%all-reduce-scatter.2
  ROOT %out = f32[8,16]{1,0} collective-permute(%x0), channel_id=9, source_target_pairs={{0,1}}
}
"""


def test_collectives_are_counted_times_the_trips_of_their_loops():
    row = 8 * 16 * 4
    assert sent_bytes(HLO) == {
        "all-gather": 5 * 3 * row,  # 5 trips, 3 parts of 4
        "all-reduce": 5 * 3 * 2 * (row / 2) / 2,  # 5 x 3 trips, bfloat16, twice half of it in groups of 2
        # One channel, seen where it starts and where it ends, counts once; and the one that libtpu writes otherwise.
        "reduce-scatter": row * 3 / 4 + row / 2,
        "collective-permute": row,
    }


@pytest.mark.slow
def test_a_layer_loop_of_a_real_program_is_multiplied(tiny):
    """Gathers over fsdp in the train step: every layer's weights, forward and backward, of both models."""
    _, mesh, roles, planned = tiny
    program = planned["train"].program.lower().compile()
    gathered = sent_bytes(program.as_text())["all-gather"]
    layers = sum(local_bytes(build.abstract_weights(f, mesh)["blocks"]) for f in (roles.student, roles.teacher))
    assert gathered > layers, "each device lacks half of every layer, and gathers it at least once"
    once = sent_bytes(program.as_text().replace("known_trip_count", "unknown").replace("direction=LT", ""))
    assert gathered > 2 * once["all-gather"]


def plan(*arguments: str) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def test_a_plan_on_gpus_is_arithmetic_and_says_so():
    code, result = plan(str(ROOT / "configs/mpd_full.yaml"), "--topology", "h200:8", "student.remat=full")
    assert result["estimate"] and result["chips"] == 8
    assert "its shape comes with the package" in " ".join(result["said"])
    by_name = {phase["name"]: phase for phase in result["phases"]}
    student, teacher = 1_720_574_976, 8_190_735_360  # parameters, as published
    parts = by_name["rollout decode"]["parts"]
    assert parts["weights"] == pytest.approx(4 * student / 8, rel=1e-3)
    assert parts["optimiser"] == pytest.approx(8 * student / 8, rel=1e-3)
    assert parts["teacher"] == pytest.approx(2 * teacher / 8, rel=1e-3)
    assert parts["decode copies"] == pytest.approx(2 * (student + teacher), rel=1e-3)
    assert parts["cache"] == pytest.approx(28 * 8 * 128 * 2 * 2 * 28024, rel=1e-2)  # one slot a GPU
    assert code == (0 if result["fits"] else 1)


def test_on_gpus_as_many_prompts_enter_at_once_as_there_are_slots():
    _, result = plan(
        str(ROOT / "configs/mpd_full.yaml"), "--topology", "h200:8", "sampling.slots=64", "train.batch_size=64"
    )
    phase = next(phase for phase in result["phases"] if phase["name"] == "rewrite prefill")
    room = 27_000 + 1_024  # at the least, beside the instruction
    assert phase["sizes"]["slots"] == 64 and room / phase["sizes"]["chunk"] <= phase["times"] < 300


def test_a_plan_that_does_not_fit_exits_1_and_names_what_to_change():
    scores = ["student.attention=reference", "teacher.attention=reference"]
    code, result = plan(str(ROOT / "configs/mpd_full.yaml"), "--topology", "a100:8", "student.remat=none", *scores)
    assert code == 1 and not result["fits"]
    assert any("set student.remat=full" in line for line in result["remedies"])
    code, result = plan(str(ROOT / "configs/mpd_full.yaml"), "--topology", "a100:8", "sampling.slots=256")
    assert any("set sampling.slots=128" in line for line in result["remedies"])


def test_a_target_that_reads_rewrites_is_planned_without_a_tokenizer():
    _, result = plan(str(ROOT / "configs/trd.yaml"), "--topology", "h200:8")
    assert {"rewrite decode", "train"} <= {phase["name"] for phase in result["phases"]}


def test_lengths_that_cannot_work_are_told_by_the_plan_too():
    with pytest.raises(UserError, match=r"train.max_length: 96 tokens .* leave no room"):
        command.run(config.load(QUICKSTART, ["train.max_length=96"]), "h100:8", json=True)


def asked(part: str, mesh: list[str], overrides: list[str], kind: str = "train", **of: float) -> str:
    """The remedy for a part that is too large, of MPD's full training on 8 chips."""
    settings = config.load(ROOT / "configs/mpd_full.yaml", [*overrides, *mesh])
    roles = assign_roles(settings, command.opener(lambda text: None, "gpu"))
    sizes = {"rows": 8, "response": 10_000, "student_length": 11_024, "target_length": 11_024}
    parts = {"optimiser": 10.0 * GiB, "temporaries": 40.0 * GiB, part: 60.0 * GiB} | of
    phase = Measured("phase", kind, parts, 16.0 * GiB, sizes=sizes)
    lines = remedies([phase], settings, roles, make_mesh(settings.mesh))
    return next(line for line in lines if f" of {part}: " in line)


def test_a_remedy_names_sizes_that_make_the_mesh():
    found = asked("decode copies", ["mesh.fsdp=4", "mesh.tensor=2"], [])
    assert "set mesh.tensor=4 mesh.fsdp=2 " in found
    assert "every chip is in it" in asked("decode copies", ["mesh.fsdp=1", "mesh.tensor=8"], [])
    assert "set mesh.data=1 mesh.fsdp=8" in asked("decode copies", ["mesh.data=8", "mesh.fsdp=1"], [])


def test_a_remedy_for_the_step_is_one_that_helps():
    one, full = ["train.micro_batches=1"], ["student.remat=full"]
    eight = ["mesh.fsdp=8"]
    assert "more chips" in asked("temporaries", eight, [*one, *full], optimiser=100.0 * GiB)
    assert "set train.micro_batches=8" in asked("temporaries", ["mesh.fsdp=1", "mesh.tensor=8"], [*one, *full])
    split = ["mesh.fsdp=2", "mesh.tensor=4"]
    last = asked("temporaries", ["mesh.fsdp=1", "mesh.tensor=8"], ["train.micro_batches=8", *full])
    assert "set train.max_length=5512 " in last, "half of what is trained on, not of what might be"
    assert "mesh.tensor=8 mesh.fsdp=1" in asked("temporaries", split, ["train.micro_batches=4", *full])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("v9:4", "not known; give a chip of v5e"),
        ("v5e:8", "v5e takes 2 sizes"),
        ("v5p:4x4", "v5p takes 3 sizes"),
        ("h100:0", "at least 1"),
        ("h100", "not known"),
        ("h100:100000000", "1024 at most"),
    ],
)
def test_topologies_that_there_are_not_are_told(text, told):
    with pytest.raises(UserError, match=told):
        chips.parse(text)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2.5-7B-Instruct", 7.616),
        ("Qwen3-0.6B", 0.596),
        ("Qwen3-1.7B", 1.721),
        ("Qwen3-4B", 4.022),
        ("Qwen3-8B", 8.191),
        ("Qwen3-14B", 14.768),
        ("Qwen3-32B", 32.762),
        ("Qwen3-30B-A3B", 30.532),
    ],
)
def test_shipped_shapes_have_the_published_number_of_parameters(name, billions):
    shape = ModelConfig.from_hf(command.known_shapes()[f"Qwen/{name}"]["config"])
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(Model(shape).abstract())) / 1e9 == pytest.approx(
        billions, abs=6e-4
    )


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_the_smallest_plan_compiles_for_a_tpu():
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    models = ["student.dtype=bfloat16", "teacher.dtype=bfloat16", "recipe.rewrite.how=nobody"]
    small = [*SMALL[:-2], "mesh.fsdp=2", "mesh.tensor=2", *models]
    ran = subprocess.run(
        [sys.executable, "-m", "mpd_jax", "plan", str(QUICKSTART), "--topology", "v5e:2x2", "--json", *small],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert not result["estimate"] and result["memory"] == 15.75 * GiB
    train = next(phase for phase in result["phases"] if phase["name"] == "train")
    assert train["parts"]["temporaries"] > 0 and train["sent"]["all-gather"] > 0
    assert all(phase["seconds"] > 0 for phase in result["phases"] if phase["times"])
