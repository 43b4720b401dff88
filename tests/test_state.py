"""The optimiser of a config, and where each array of a run lives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.train.state import TrainConfig, decayed, init_opt_state, learning_rate, new_state, optimiser
from mpd_jax.types import UserError
from tests.test_step import tiny_model, weights_of


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero_at_the_last_step():
    rate = learning_rate(TrainConfig(steps=100, warmup_steps=9, learning_rate=1.0, schedule="linear"))
    np.testing.assert_allclose([rate(0), rate(8), rate(9), rate(100)], [0.1, 0.9, 1.0, 0.0], atol=1e-6)
    cosine = learning_rate(TrainConfig(steps=100, learning_rate=1.0, schedule="cosine"))
    np.testing.assert_allclose([cosine(0), cosine(50), cosine(100)], [1.0, 0.5, 0.0], atol=1e-6)
    assert learning_rate(TrainConfig(learning_rate=0.25))(77) == 0.25


def test_norms_and_biases_are_not_decayed_and_everything_else_is():
    weights = jax.tree.map(
        jnp.ones_like, weights_of(tiny_model(qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=False), 0)
    )
    tx = optimiser(TrainConfig(learning_rate=1.0, weight_decay=0.5))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), init_opt_state(tx, weights), weights)
    flags, names = jax.tree.leaves(decayed(weights)), jax.tree_util.tree_leaves_with_path(updates)
    for flag, (path, update) in zip(flags, names, strict=True):
        np.testing.assert_array_equal(update, -0.5 if flag else 0.0, err_msg=jax.tree_util.keystr(path))
    matrices = sum(flags)
    # Embedding, head, four attention and three feed-forward matrices; layers are stacked.
    assert matrices == 9 and len(flags) > matrices


def test_the_gradient_is_clipped_by_its_global_norm_unless_that_is_off():
    weights = {"a": jnp.ones(4), "b": jnp.ones(4)}
    gradient = jax.tree.map(lambda w: 100.0 * w, weights)
    clip, adam = optimiser(TrainConfig(max_grad_norm=1.0)), optimiser(TrainConfig(max_grad_norm=0.0))
    small = jax.tree.map(lambda g: g / optax.tree.norm(gradient), gradient)
    clipped = clip.update(gradient, init_opt_state(clip, weights), weights)[1]
    direct = adam.update(small, init_opt_state(adam, weights), weights)[1]
    for x, y in zip(jax.tree.leaves(clipped), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_moments_are_float32_for_bfloat16_weights_and_stay_so():
    weights = {"a": jnp.ones(4, jnp.bfloat16)}
    tx = optimiser(TrainConfig(weight_decay=0.1))
    state = init_opt_state(tx, weights)
    updates, after = tx.update({"a": jnp.ones(4)}, state, weights)
    assert optax.apply_updates(weights, updates)["a"].dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)


def test_moments_live_beside_their_weights():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    model = tiny_model()
    state = new_state(model, optimiser(TrainConfig()), mesh, weights_of(model, 0, mesh), seed=0)
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    jax.tree.map(lambda w, m: _assert_beside(w, m), state.weights, moments)
    assert any(not w.sharding.is_fully_replicated for w in jax.tree.leaves(state.weights))


def _assert_beside(weight, moment):
    assert moment.sharding.is_equivalent_to(weight.sharding, weight.ndim)


@pytest.mark.parametrize(
    "key, value",
    [("steps", 0), ("learning_rate", 0.0), ("beta2", 1.0), ("schedule", "step"), ("warmup_steps", 100), ("keep", 0)],
)
def test_a_value_that_cannot_be_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=rf"train\.{key} = .*{value}"):
        TrainConfig(**{key: value})
