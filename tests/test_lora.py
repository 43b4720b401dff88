"""Adapters: they alone have gradients and moments, the base is never touched, and merged they are the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpd_jax import config
from mpd_jax.models.config import Experts
from mpd_jax.models.lora import TARGETS, Adapted, LoraConfig
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from mpd_jax.train.state import TrainConfig, Trained, init_opt_state, new_state, optimiser, trained_shardings
from mpd_jax.train.step import make_update
from mpd_jax.types import UserError
from tests.e2e.tiny import QUICKSTART
from tests.test_step import GRADIENT, VOCAB, assert_same, make_batch, tiny_model, weights_of

MODEL = tiny_model()
ADAPTED = Adapted(MODEL, LoraConfig(rank=4, alpha=8))
LOGITS = jax.jit(MODEL.logits)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 12))


def adapter_of(adapted: Adapted, seed: int, mesh=None):
    """Random values: B is not zero."""
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda s: (0.1 * rng.standard_normal(s.shape)).astype(np.float32), adapted.abstract())
    return jax.device_put(tree, adapted.shardings(mesh)) if mesh is not None else jax.tree.map(jnp.asarray, tree)


def placed(tree, places):
    """Shapes of a tree where its arrays will lie."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def bytes_of(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def buffers(tree) -> list[int]:
    return [part.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for part in leaf.addressable_shards]


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_a_new_adapter_changes_no_bit_and_starts_as_peft_s_does():
    base, adapter = weights_of(MODEL, 0), jax.jit(ADAPTED.init)(jax.random.key(0))
    np.testing.assert_array_equal(LOGITS(ADAPTED.over(base, adapter), TOKENS), LOGITS(base, TOKENS), strict=True)
    for module, name in TARGETS.values():
        a, b = adapter[module][name]["a"], adapter[module][name]["b"]
        fan_in = a.size / a.shape[0] / a.shape[-1]
        spread = np.abs(a).max() * np.sqrt(fan_in)
        assert 0.9 < spread <= 1, f"{name}: uniform up to 1 / sqrt({fan_in})"
        assert not np.any(b)
    assert len({float(x["a"].ravel()[0]) for arrays in adapter.values() for x in arrays.values()}) == 7


THREE = ("v_proj", "o_proj", "down_proj")


@pytest.mark.parametrize(
    "dtype, tolerance, targets",
    [("float32", 1e-5, tuple(TARGETS)), ("float32", 1e-5, THREE), ("bfloat16", 0.25, THREE)],
)
def test_merged_equals_unmerged(dtype, tolerance, targets):
    model = tiny_model(qkv_bias=True, o_bias=True, mlp_bias=True, num_kv_heads=4, head_dim=6)
    model = dataclasses.replace(model, dtype=dtype)
    adapted, logits = Adapted(model, LoraConfig(3, 5, targets)), jax.jit(model.logits)
    weights = adapted.over(weights_of(model, 0), adapter_of(adapted, 1))
    unmerged, merged = logits(weights, TOKENS), jax.jit(model.merged)(weights)
    assert jax.tree.structure(merged) == jax.tree.structure(model.abstract())
    assert np.abs(unmerged - logits(weights_of(model, 0), TOKENS)).max() > 1
    np.testing.assert_allclose(logits(merged, TOKENS), unmerged, rtol=0, atol=tolerance)
    by_layer = jax.jit(model.by_layer)(weights)["blocks"]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_layer)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), stacked, merged["blocks"])


def test_the_gradient_is_the_merged_model_s_by_the_chain_rule_and_by_finite_differences():
    base, adapter = weights_of(MODEL, 0), adapter_of(ADAPTED, 1)
    slope = jnp.asarray(np.random.default_rng(2).standard_normal((*TOKENS.shape, 64)), jnp.float32)

    def value(adapter):
        return jnp.vdot(LOGITS(ADAPTED.over(base, adapter), TOKENS), slope)

    gradient = jax.jit(jax.grad(value))(adapter)
    by_weight = jax.jit(jax.grad(lambda weights: jnp.vdot(LOGITS(weights, TOKENS), slope)))
    dW = by_weight(MODEL.merged(ADAPTED.over(base, adapter)))["blocks"]
    for module, name in TARGETS.values():
        x, got = adapter[module][name], gradient[module][name]
        L, rank = x["b"].shape[:2]
        A = np.asarray(x["a"], np.float64).reshape(L, -1, rank)
        B = np.asarray(x["b"], np.float64).reshape(L, rank, -1)
        dW_LIO = np.asarray(dW[module][name], np.float64).reshape(L, A.shape[1], B.shape[2])
        for part, wanted in (("a", 2.0 * dW_LIO @ B.swapaxes(1, 2)), ("b", 2.0 * A.swapaxes(1, 2) @ dW_LIO)):
            gap = np.linalg.norm(np.asarray(got[part]).ravel() - wanted.ravel()) / np.linalg.norm(wanted)
            assert gap < 1e-5, f"{name}.{part} is off by {gap:.1e}"
    along = adapter_of(ADAPTED, 3)
    move = lambda t: jax.tree.map(lambda x, d: x + t * d, adapter, along)  # noqa: E731
    slope_seen = (value(move(1e-2)) - value(move(-1e-2))) / 2e-2
    np.testing.assert_allclose(slope_seen, optax.tree.vdot(gradient, along), rtol=2e-3)


def adapter_step(*, mesh=None, micro_batches=1):
    """Out and the adapter's gradient, on the host, of one update; the base after it must be the base before it."""
    update = make_update(ADAPTED, MODEL, LossConfig(), GRADIENT, mesh, vocab_size=VOCAB, micro_batches=micro_batches)
    base, adapter = weights_of(MODEL, 0, mesh), adapter_of(ADAPTED, 1, mesh)
    before = bytes_of(base)
    trained = Trained(adapter, init_opt_state(GRADIENT, adapter))
    with jax.default_matmul_precision("highest"):
        trained, out = update(trained, weights_of(MODEL, 2, mesh), make_batch(), base)
    assert bytes_of(base) == before
    return jax.device_get(out), jax.device_get(trained.opt_state.trace)


@pytest.mark.slow
def test_a_mixed_mesh_with_micro_batches_gives_the_loss_and_gradient_of_one_device():
    one, mesh = adapter_step(), make_mesh(MeshConfig(2, 2, 2))
    assert_same(adapter_step(mesh=mesh, micro_batches=2), one, 1e-6, 1e-5)


@pytest.mark.slow
def test_an_update_moves_the_adapter_and_leaves_the_base_which_is_a_bfloat16_one_here():
    mesh, tx = make_mesh(MeshConfig(1, 8, 1)), optimiser(TrainConfig(learning_rate=0.1, weight_decay=0.1))
    base = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights_of(MODEL, 0, mesh))
    own, before = buffers(base), bytes_of(base)
    state = new_state(ADAPTED, tx, mesh, adapter_of(ADAPTED, 1, mesh), seed=0)
    start = jax.device_get(state.weights)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert size(moments) == 2 * size(ADAPTED.abstract()) and {str(m.dtype) for m in moments} == {"float32"}
    update = make_update(ADAPTED, MODEL, LossConfig(), tx, mesh, vocab_size=VOCAB)
    target = weights_of(MODEL, 2, mesh)
    trained = Trained(state.weights, state.opt_state)
    for _ in range(2):
        trained, out = update(trained, target, make_batch(), base)
    assert bool(out["finite"]) and update.traces == 1
    assert bytes_of(base) == before
    assert buffers(base) == own
    moved = jax.tree.map(lambda x, y: bool(np.all(np.asarray(x) != y)), trained.weights, start)
    assert all(jax.tree.leaves(moved)), moved
    places = jax.tree.map(
        lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), trained.weights, ADAPTED.shardings(mesh)
    )
    assert all(jax.tree.leaves(places))


def test_the_gradient_of_the_frozen_head_is_not_computed():
    """It would be [D, V] in the kernel's loop: 48 by 4096 over the two devices of `tensor`."""
    wide = tiny_model(vocab_size=4096, hidden_size=48)
    adapted, mesh = Adapted(wide, ADAPTED.lora), make_mesh(MeshConfig(2, 2, 2))
    weights = placed(wide.abstract(), tree_shardings(mesh, wide.logical_axes(), wide.abstract()))
    update = make_update(adapted, wide, LossConfig(), GRADIENT, mesh, vocab_size=4096)
    trained = jax.eval_shape(lambda w: Trained(w, init_opt_state(GRADIENT, w)), adapted.abstract())
    trained = placed(trained, trained_shardings(adapted, GRADIENT, mesh))
    compiled = update.lower(trained, weights, update.place(make_batch()), weights).compile()
    assert "f32[48,2048]" not in compiled.as_text()


def test_switched_off_the_adapter_costs_no_memory_and_is_the_base():
    base = weights_of(MODEL, 0)
    off, on = ADAPTED.over(base, None), ADAPTED.over(base, adapter_of(ADAPTED, 1))
    for leaf, own, beside in zip(*map(jax.tree.leaves, (base, off, {k: on[k] for k in base})), strict=True):
        assert own is leaf and beside is leaf


def test_experts_take_no_adapter_and_the_attention_beside_them_does():
    model = tiny_model(experts=Experts(count=4, per_token=2, normalised=True))
    with pytest.raises(UserError, match=r"target_modules = \['gate_proj', 'down_proj'\] is not allowed for this model"):
        Adapted(model, LoraConfig(4, 8, ("q_proj", "gate_proj", "down_proj")))
    adapted, logits = Adapted(model, LoraConfig(4, 8, ("q_proj", "o_proj"))), jax.jit(model.logits)
    weights = adapted.over(weights_of(model, 0), adapter_of(adapted, 1))
    np.testing.assert_allclose(logits(model.merged(weights), TOKENS), logits(weights, TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.lora={rank: 0, alpha: 8}", "student.lora.rank = 0 is not allowed"),
        ("student.lora={rank: 4, alpha: -1}", "student.lora.alpha = -1"),
        ("student.lora={rank: 4}", "student.lora.alpha: required and missing"),
        ("student.lora={rank: 4, alpha: 8, target_modules: [q_proj, lm_head]}", "target_modules = ['lm_head'] is not"),
        ("student.lora={rank: 4, alpha: 8, target_modules: [q_proj, q_proj]}", "each once"),
        ("student.lora={rank: 4, alpha: 8, target_modules: []}", "target_modules = [] is not"),
        ("student.lora={rank: 4, alpha: 8, dropout: 0.1}", "unknown key student.lora.dropout"),
        ("student.adapter=some/where", "student.adapter: some/where is where an adapter starts, and none trains"),
        ("teacher.lora={rank: 4, alpha: 8}", "unknown key teacher.lora"),
    ],
)
def test_what_no_adapter_can_be_is_refused_by_name(override, said):
    with pytest.raises(UserError) as caught:
        config.load(QUICKSTART, [override])
    assert said in str(caught.value)
