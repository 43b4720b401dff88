"""One table places everything: what it splits, what it refuses, and what the compiled programs move between devices."""

import logging
import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mpd_jax import sharding
from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.sharding import MeshConfig, batch_sharding, check_divides, make_mesh, partition_spec, tree_shardings
from mpd_jax.types import UserError

TOKENS = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)


def model(kv_heads: int = 8, **changed) -> Model:
    fields = dict(
        family="qwen3", vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=8,
        num_kv_heads=kv_heads, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qkv_bias=False,
        o_bias=False, mlp_bias=False, qk_norm=True, tie_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    return Model(ModelConfig(**{**fields, **changed}))


def random_weights(of: Model):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda w: random.normal(0.3, 0.2, w.shape).astype(np.float32), of.abstract())


def place(of: Model, weights, mesh):
    return jax.device_put(weights, tree_shardings(mesh, of.logical_axes(), of.abstract(), "train"))


def place_for_decode(of: Model, weights, mesh):
    weights = of.by_layer(weights)
    return jax.device_put(weights, tree_shardings(mesh, of.by_layer_axes(), weights, "decode"))


def collectives(hlo: str) -> list[tuple[str, int]]:
    """(kind, elements of the result) of every collective in a compiled program."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", hlo)
    return [
        (kind, sum(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shape)))
        for shape, kind in found
    ]


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("config", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)], ids=str)
def test_decoding_on_8_devices_is_that_on_1_and_never_gathers_weights_or_cache(config, chunk):
    of, mesh = model(), make_mesh(config)
    weights = random_weights(of)
    expected = jax.jit(of.hidden)(weights, TOKENS[:, :chunk])
    cache = jax.jit(of.init_cache, static_argnums=(0, 1, 2))(8, 16, "float32")
    placed = jax.device_put(cache, tree_shardings(mesh, of.cache_axes(), cache, "decode"))
    with jax.set_mesh(mesh):
        inputs = place_for_decode(of, weights, mesh), TOKENS[:, :chunk], placed, None, np.full(8, chunk, np.int32)
        step = jax.jit(of.decode).lower(*inputs).compile()
        found, after = step(*inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(placed), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
    activations = 8 * 32 * chunk
    assert all(kind == "all-reduce" and size <= activations for kind, size in collectives(step.as_text()))


def test_training_gathers_each_weight_over_fsdp_and_moves_no_activation():
    of, mesh = model(), make_mesh(MeshConfig(1, 8, 1))
    with jax.set_mesh(mesh):
        weights = place(of, random_weights(of), mesh)
        forward = jax.jit(of.hidden).lower(weights, jax.device_put(TOKENS, batch_sharding(mesh))).compile()
    sizes = {np.prod(w.shape[1:]) for w in jax.tree.leaves(weights["blocks"])} | {64 * 32}
    assert collectives(forward.as_text()), "the weights were not split"
    assert all(kind == "all-gather" and size in sizes for kind, size in collectives(forward.as_text()))


@pytest.mark.parametrize(("length", "own"), [(24, 3), (12, 12)])
def test_what_the_backward_pass_keeps_of_every_layer_is_split_over_tensor(length, own):
    """Positions that do not divide are kept whole by every device."""
    of, mesh = replace(model(), remat="full"), make_mesh(MeshConfig(1, 1, 8))
    tokens, layers = jnp.asarray(np.resize(TOKENS, (8, length))), of.config.num_layers
    loss = jax.value_and_grad(lambda weights: jnp.sum(of.hidden(weights, tokens) ** 2))
    alone = jax.jit(loss)(random_weights(of))
    with jax.set_mesh(mesh):
        step = jax.jit(loss).lower(place(of, random_weights(of), mesh)).compile()
        split = step(place(of, random_weights(of), mesh))
    kept = set(re.findall(rf"f32\[{layers},8,(\d+),{of.config.hidden_size}\]", step.as_text()))
    assert str(own) in kept and (own == length or str(length) not in kept)
    for found, expected in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max()))


def test_key_value_heads_that_do_not_divide_are_replicated_and_logged_once(caplog):
    sharding._say_replicated.cache_clear()
    of, mesh = model(kv_heads=2), make_mesh(MeshConfig(1, 1, 8))
    with caplog.at_level(logging.WARNING):
        shardings = tree_shardings(mesh, of.logical_axes(), of.abstract())
    assert [r.getMessage() for r in caplog.records] == [
        "mesh.tensor = 8 does not divide 2 key-value heads; they are replicated"
    ]
    assert shardings["blocks"]["attention"]["k"].spec == P(None, "fsdp", None, None)
    assert shardings["blocks"]["attention"]["q"].spec == P(None, "fsdp", "tensor", None)
    weights = random_weights(of)
    with jax.set_mesh(mesh):
        found = jax.jit(of.hidden)(jax.device_put(weights, shardings), TOKENS)
    np.testing.assert_allclose(found, jax.jit(of.hidden)(weights, TOKENS), atol=1e-5)


def test_training_splits_weights_over_fsdp_and_decoding_does_not():
    assert partition_spec(("vocab", "embed"), "train") == P("tensor", "fsdp")
    assert partition_spec(("vocab", "embed"), "decode") == P("tensor", None)
    assert batch_sharding(make_mesh(MeshConfig(2, 4, 1))).spec == P(("data", "fsdp"))


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(AssertionError, match=r"vocab.*mlp.*\['tensor'\]"):
        partition_spec(("vocab", "mlp"))
    with pytest.raises(AssertionError, match="fsdp"):
        partition_spec(("batch", "embed"), "train")
    assert partition_spec(("batch", "embed"), "decode") == P(("data", "fsdp"), None)


def test_a_size_that_does_not_divide_names_tensor_axis_size_and_mesh_size():
    mesh = make_mesh(MeshConfig(1, 2, 4))
    with pytest.raises(UserError, match=r"mesh\.tensor = 4: tensor mlp\.up has 6 along 'mlp'"):
        check_divides("mlp.up", (2, 32, 6), ("layers", "embed", "mlp"), mesh)
    with pytest.raises(UserError, match=r"blocks\.mlp\.down has 66 along 'mlp'"):
        of = model(intermediate_size=66)
        tree_shardings(mesh, of.logical_axes(), of.abstract())
    with pytest.raises(UserError, match=r"mesh\.data x mesh\.fsdp = 2: .* has 3 along 'batch'"), jax.set_mesh(mesh):
        jax.eval_shape(model().hidden, model().abstract(), TOKENS[:3])


def test_one_mesh_size_may_be_left_open():
    assert dict(make_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, -1, 1), (16, -1, 1), (2, 2, 1)], ids=str)
def test_mesh_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match=r"mesh: .* x .* does not make 8 devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((-1, -1, 1), "at most one of them -1"), ((0, -1, 1), r"mesh\.data = 0"), ((1, -2, 1), r"mesh\.fsdp = -2")],
    ids=str,
)
def test_mesh_sizes_that_fit_no_devices_are_refused_when_they_are_read(sizes, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(*sizes)


@dataclass(frozen=True)
class Chip:
    platform: str
    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "TPU"


def test_between_slices_only_data_may_run():
    """Four chips that claim to be two slices, handed over in mixed order."""
    chips = [Chip("tpu", i, i % 2) for i in range(4)]
    with pytest.raises(UserError, match=r"mesh.data = 1: the devices are 2 slices"):
        make_mesh(MeshConfig(1, 4, 1), chips)
    mesh = make_mesh(MeshConfig(2, -1, 1), chips)
    assert [[chip.slice_index for chip in row] for row in mesh.devices[:, :, 0]] == [[0, 0], [1, 1]]
