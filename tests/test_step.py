"""One update: the same numbers however it is cut up, a target that is only read, and no step on what is not finite."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from mpd_jax.train.state import TrainConfig, Trained, init_opt_state, new_state, optimiser, trained_shardings
from mpd_jax.train.step import make_update, position_sums
from mpd_jax.types import Batch, UserError
from tests.compilations import compilations

VOCAB, ROWS, RESPONSE = 60, 8, 6
KINDS = ("reverse_kl", "forward_kl", "jsd", "mix")
MESHES = {"data": MeshConfig(8, 1, 1), "fsdp": MeshConfig(1, 8, 1), "tensor": MeshConfig(1, 1, 8)}
REVERSE = LossConfig()
# Its state is the gradient itself, to the last bit.
GRADIENT = optax.trace(decay=0.0)


def tiny_model(**changed) -> Model:
    fields = {
        "family": "qwen3",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 8,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": True,
        "tie_embeddings": True,
        "max_position_embeddings": 128,
    }
    return Model(ModelConfig(**{**fields, **changed}))


def make_batch(prompt=(4, 7), seed=0, rows=ROWS) -> Batch:
    """Rows of unequal length whose prompts differ between student and target by prompt[1] - prompt[0] tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, RESPONSE + 1, rows)
    response_BR = rng.integers(0, VOCAB, (rows, RESPONSE)).astype(np.int32)
    weight_BR = (np.arange(RESPONSE)[None] < lengths[:, None]).astype(np.float32)

    def side(length: int):
        tokens_BT = np.concatenate([rng.integers(0, VOCAB, (rows, length)), response_BR], axis=1)
        at_BR = np.broadcast_to(length - 1 + np.arange(RESPONSE), (rows, RESPONSE))
        segments_BT = np.arange(length + RESPONSE)[None] < length + lengths[:, None]
        return tokens_BT.astype(np.int32), segments_BT.astype(np.int32), at_BR.astype(np.int32)

    student, target = side(prompt[0]), side(prompt[1])
    index_BR = np.broadcast_to(np.arange(RESPONSE, dtype=np.int32), (rows, RESPONSE))
    return Batch(*student, *target, response_BR, index_BR, weight_BR / weight_BR.sum())


def weights_of(model: Model, seed: int, mesh=None):
    """Random weights large enough that the distributions are far from uniform."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape) -> np.ndarray:
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (centre + 0.2 * rng.standard_normal(shape.shape)).astype(np.float32)

    weights = jax.tree_util.tree_map_with_path(leaf, model.abstract())
    if mesh is None:
        return jax.tree.map(jnp.asarray, weights)
    return jax.device_put(weights, tree_shardings(mesh, model.logical_axes(), model.abstract(), "train"))


def pair() -> tuple[Model, Model]:
    """A student, and a teacher that differs in width, head and padded vocabulary."""
    return tiny_model(), tiny_model(hidden_size=48, tie_embeddings=False, vocab_size=72)


def gradient_step(batch: Batch, *, mesh=None, micro_batches=1, loss=REVERSE, target=True):
    """Out and gradient, on the host, of one update."""
    student, teacher = pair() if target else (tiny_model(), None)
    update = make_update(student, teacher, loss, GRADIENT, mesh, vocab_size=VOCAB, micro_batches=micro_batches)
    weights = weights_of(student, 0, mesh)
    trained = Trained(weights, init_opt_state(GRADIENT, weights))
    with jax.default_matmul_precision("highest"):
        trained, out = update(trained, weights_of(teacher, 1, mesh) if teacher else None, batch)
    return jax.device_get(out), jax.device_get(trained.opt_state.trace)


def assert_same(a, b, loss_rel: float, gradient_rel: float) -> None:
    np.testing.assert_allclose(a[0]["loss"], b[0]["loss"], rtol=loss_rel)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a[1]), jax.tree.leaves(b[1]), strict=True):
        gap = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert gap < gradient_rel, f"{jax.tree_util.keystr(path)} is off by {gap:.1e} of its norm"


@pytest.fixture(scope="module")
def whole():
    return gradient_step(make_batch())


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_of_unequal_token_counts_add_up_to_the_whole_batch(whole, micro_batches):
    split = gradient_step(make_batch(), micro_batches=micro_batches)
    assert_same(split, whole, 1e-6, 1e-5)
    for name in ("tokens", "divergence", "student_entropy", "target_entropy", "divergence_at", "tokens_at"):
        np.testing.assert_allclose(split[0][name], whole[0][name], rtol=3e-6, err_msg=name)


def test_the_loss_is_the_divergence_at_the_positions_that_predict_the_response(whole):
    """Token by token from whole logits, each model after its own prompt."""
    batch, (student, teacher) = make_batch(), pair()
    with jax.default_matmul_precision("highest"):
        logits = (
            np.asarray(student.logits(weights_of(student, 0), batch.student_tokens_BT), np.float64),
            np.asarray(teacher.logits(weights_of(teacher, 1), batch.target_tokens_BT), np.float64),
        )
    total = 0.0
    for row in range(ROWS):
        for r in range(RESPONSE):
            q, p = (x[row, prompt + r - 1, :VOCAB] for x, prompt in zip(logits, (4, 7), strict=True))
            lq, lp = (x - np.logaddexp.reduce(x) for x in (q, p))
            total += batch.weight_BR[row, r] * float(np.sum(np.exp(lq) * (lq - lp)))
    np.testing.assert_allclose(whole[0]["loss"], total, rtol=1e-5)


@pytest.mark.parametrize("axis", MESHES)
def test_eight_devices_give_the_loss_and_gradient_of_one(whole, axis):
    assert_same(gradient_step(make_batch(), mesh=make_mesh(MESHES[axis])), whole, 1e-6, 1e-5)


def test_a_mixed_mesh_with_micro_batches_gives_the_loss_and_gradient_of_one_device(whole):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert_same(gradient_step(make_batch(), mesh=mesh, micro_batches=2), whole, 1e-6, 1e-5)


def test_cross_entropy_needs_no_target_and_adds_up_too():
    loss = LossConfig(kind="cross_entropy")
    one = gradient_step(make_batch(), loss=loss, target=False)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert_same(gradient_step(make_batch(), loss=loss, target=False, mesh=mesh, micro_batches=2), one, 1e-6, 1e-5)
    assert "target_entropy" not in one[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_student_under_the_same_context_gives_no_loss_and_no_gradient(kind):
    student = tiny_model()
    update = make_update(student, student, LossConfig(kind=kind), GRADIENT, None, vocab_size=VOCAB)
    weights = weights_of(student, 0)
    batch = make_batch()
    sides = ("tokens_BT", "segments_BT", "at_BR")
    batch = batch._replace(**{f"target_{name}": getattr(batch, f"student_{name}") for name in sides})
    copy = jax.tree.map(jnp.copy, weights)
    trained, out = update(Trained(weights, init_opt_state(GRADIENT, weights)), copy, batch)
    assert abs(out["loss"]) < 1e-7
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(trained.opt_state)) < 1e-7
    assert out["student_entropy"] / out["tokens"] > 1


@pytest.fixture(scope="module")
def adam():
    """An update that really moves the weights, and a maker of what it needs."""
    student, tx = tiny_model(), optimiser(TrainConfig(learning_rate=0.1, weight_decay=0.1))

    def start(mesh=None):
        state = new_state(student, tx, mesh, weights_of(student, 0, mesh), seed=0)
        return Trained(state.weights, state.opt_state), weights_of(student, 1, mesh)

    def build(mesh=None):
        return make_update(student, student, REVERSE, tx, mesh, vocab_size=VOCAB)

    return build(), start, build


def test_what_is_not_finite_leaves_the_state_as_it_was_and_lowers_the_flag(adam):
    update, start, _ = adam
    trained, target = start()
    before = jax.tree.map(np.copy, jax.device_get(trained))
    broken = make_batch()
    broken.weight_BR[0, 0] = np.inf
    trained, out = update(trained, target, broken)
    assert not out["finite"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(trained), before)
    trained, out = update(trained, target, make_batch())
    assert out["finite"]
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), jax.device_get(trained.weights), before.weights)
    assert all(jax.tree.leaves(moved))


def test_the_target_has_no_gradient_and_outlives_the_donated_student(adam):
    update, start, _ = adam
    trained, target = start()
    frozen = jax.tree.map(jnp.copy, trained.weights)
    before, first = (jax.tree.map(np.copy, jax.device_get(tree)) for tree in (target, frozen))
    used = trained
    for _ in range(2):
        trained, _ = update(trained, target, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(used))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(target), before)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), first)
    assert update(trained, frozen, make_batch())[1]["finite"]


def test_there_is_one_compilation_a_batch_shape(adam):
    """From the state as it is built to the state as an update leaves it: a trace does not see a sharding."""
    _, start, build = adam
    mesh = make_mesh(MeshConfig(2, 2, 2))
    update, (trained, target) = build(mesh), start(mesh)
    with compilations() as compiled:
        for seed in range(3):
            trained, _ = update(trained, target, make_batch(seed=seed))
    assert compiled["jit(traced)"] == update.traces == 1
    with compilations() as compiled:
        update(trained, target, make_batch(prompt=(5, 7)))
    assert compiled["jit(traced)"] == 1 and update.traces == 2


def test_a_scale_of_the_learning_rate_scales_what_the_optimiser_adds_and_compiles_nothing(adam):
    """Weight decay with it, as a schedule would; the moments are the same."""
    update, start, _ = adam
    before = jax.tree.map(np.copy, jax.device_get(start()[0].weights))
    moved = {}
    update(*start(), make_batch())
    with compilations() as compiled:
        for scale in (1.0, 0.5, 0.0):
            moved[scale] = jax.device_get(update(*start(), make_batch(), scale=scale)[0])
    assert compiled["jit(traced)"] == 0
    jax.tree.map(np.testing.assert_array_equal, moved[0.0].weights, before)
    jax.tree.map(
        lambda x, half, whole: np.testing.assert_allclose(half - x, (whole - x) / 2, atol=1e-6),
        before,
        moved[0.5].weights,
        moved[1.0].weights,
    )
    jax.tree.map(np.testing.assert_array_equal, moved[0.5].opt_state, moved[1.0].opt_state)


def dots(jaxpr, kernel=False):
    """(inside a Pallas kernel, equation) of every product in a program."""
    for eqn in jaxpr.eqns:
        inside = kernel or eqn.primitive.name == "pallas_call"
        if eqn.primitive.name == "dot_general":
            yield inside, eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from dots(inner, inside)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_float32_is_multiplied_in_full_forwards_and_backwards(remat):
    """Devices that multiply float32 in fewer bits by default are asked not to, inside the attention kernel too."""
    student = replace(tiny_model(), attention="splash_emulated", remat=remat)
    update = make_update(student, student, REVERSE, GRADIENT, None, vocab_size=VOCAB)
    weights = student.abstract()
    trained = Trained(weights, jax.eval_shape(lambda w: init_opt_state(GRADIENT, w), weights))
    found = list(dots(update._jitted.trace(trained, weights, make_batch(), None, 1.0).jaxpr.jaxpr))
    low = [eqn for _, eqn in found if set(eqn.params["precision"] or ()) != {jax.lax.Precision.HIGHEST}]
    assert sum(inside for inside, _ in found) >= 9, "two of the kernel forwards, seven backwards"
    assert not low


@pytest.mark.slow
def test_the_state_keeps_its_places_on_the_mesh(adam):
    _, start, build = adam
    mesh = make_mesh(MeshConfig(1, 4, 2))
    update, (trained, target) = build(mesh), start(mesh)
    for seed in range(2):
        trained, _ = update(trained, target, make_batch(seed=seed))
    assert update.traces == 1

    def check(leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    jax.tree.map(check, trained, trained_shardings(tiny_model(), optimiser(TrainConfig()), mesh))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(trained.opt_state))


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers(adam):
    _, start, build = adam
    mesh = make_mesh(MeshConfig(2, 4, 1))
    with pytest.raises(UserError, match=r"6 rows.*= 8 devices.*multiple of 8"):
        build(mesh)(*start(mesh), make_batch(rows=6))


def test_divergence_is_counted_in_the_bucket_of_its_position():
    index_R = jnp.tile(jnp.arange(20), 2)
    sums = position_sums(jnp.ones(40), index_R < 17, index_R)
    np.testing.assert_array_equal(sums, [8, 24, 2, 0, 0, 0, 0, 0])


@pytest.mark.slow
def test_bfloat16_weights_move_by_whole_rounding_steps_or_not_at_all():
    """Adam's first update is the rate, up or down: what it does to a weight can be told from the moments alone."""
    rate, eps = 1e-3, 1e-8
    tx = optimiser(TrainConfig(learning_rate=rate, max_grad_norm=0.0, eps=eps))
    student, teacher = pair()
    start = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights_of(student, 0))
    before = jax.device_get(start)
    update = make_update(student, teacher, REVERSE, tx, None, vocab_size=VOCAB)
    trained, out = update(Trained(start, init_opt_state(tx, start)), weights_of(teacher, 1), make_batch())
    mu = optax.tree_utils.tree_get(trained.opt_state, "mu")
    assert bool(out["finite"]) and {str(m.dtype) for m in jax.tree.leaves(mu)} == {"float32"}
    for old, new, m in zip(*map(jax.tree.leaves, (before, trained.weights, mu)), strict=True):
        assert new.dtype == jnp.bfloat16
        old, new, gradient = np.float32(old), np.float32(new), np.asarray(m, np.float64) / 0.1
        wanted = old - rate * gradient / (np.abs(gradient) + eps)
        gap = np.maximum(np.abs(old), np.abs(new)) * 2.0**-8  # half a rounding step at most
        assert np.all(np.abs(new - wanted) <= gap + 1e-9)
        np.testing.assert_array_equal(new[np.abs(old) > 513 * rate], old[np.abs(old) > 513 * rate])
        small = (np.abs(old) < 100 * rate) & (np.abs(gradient) > 1e-5)
        assert np.all(new[small] != old[small])
