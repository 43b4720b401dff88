"""Claims about the decoder: the recorded logits of transformers, causality, and that no way of running it matters."""

import json
import re
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpd_jax.models.config import Experts, ModelConfig, RopeScaling
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config, load_weights
from mpd_jax.sharding import MeshConfig, make_mesh, partition_spec, tree_shardings
from tests.parity import record

SCALING = RopeScaling(8.0, 1.0, 4.0, 64)
TINY = ModelConfig("llama", 32, 16, 24, 2, 8, 4, 4, 1e-5, 1e3, SCALING, True, True, True, True, False, 64)
MIXED = ModelConfig(
    "qwen3_moe", 32, 16, 24, 2, 8, 4, 4, 1e-5, 1e3, None, False, False, False, True, False, 64, Experts(6, 2, True)
)
PLAIN = ModelConfig("qwen3", 32, 16, 24, 2, 4, 1, 8, 1e-6, 1e4, None, False, False, False, False, True, 64)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def lively(model):
    """Weights in which every bias, every norm and every position counts."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(random.normal(mean, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.abstract())


def tokens(rows, length):
    return np.random.default_rng(1).integers(0, 32, (rows, length), dtype=np.int32)


@lru_cache
def recorded(family):
    return dict(np.load(record.RECORDED / f"{family}.npz"))


@pytest.mark.parametrize("family, moved", record.CASES, ids=lambda x: x)
def test_logits_and_greedy_tokens_are_those_transformers_computed(family, moved, tmp_path):
    config, shapes, expected, greedy = (
        recorded(family)[f"{moved}.{name}"] for name in ("config", "shapes", "logits", "greedy")
    )
    (tmp_path / "config.json").write_text(str(config))
    tensors = {name: record.draw(name, shape) for name, shape in json.loads(str(shapes)).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = Model(load_config(tmp_path))
    weights = load_weights(tmp_path, model, make_mesh(MeshConfig(), jax.devices()[:1]))
    logits, ids, start = jax.jit(model.logits), record.tokens(), record.PROMPT
    assert np.ptp(expected) > 2, "logits this flat would agree by accident"
    np.testing.assert_allclose(logits(weights, ids)[:, record.POSITIONS], expected, rtol=0, atol=1e-4)
    for at in range(start, start + record.NEW):
        ids[:, at] = np.asarray(logits(weights, ids))[:, at - 1].argmax(-1)
    np.testing.assert_array_equal(ids[:, start : at + 1], greedy)


@pytest.mark.parametrize("family, moved", [case for case in record.CASES if case[1] != "base"], ids=lambda x: x)
def test_every_moved_field_moves_the_recorded_logits(family, moved):
    """Else the comparison above would pass with the field ignored."""
    base, logits = (recorded(family)[f"{name}.logits"] for name in ("base", moved))
    assert base.shape != logits.shape or np.abs(base - logits).max() > 1e-2


@pytest.mark.parametrize("config", [TINY, PLAIN, MIXED], ids=["tiny", "plain", "mixed"])
def test_shapes_and_axes_are_one_tree(config):
    model = Model(config)
    shapes, axes = model.abstract(), model.logical_axes()
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_axes)
    for array, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_axes), strict=True):
        assert len(array.shape) == len(names) and array.dtype == jnp.float32
        for column in ("train", "decode"):
            partition_spec(names, column)
    assert all(names[0] == "layers" for names in jax.tree.leaves(axes["blocks"], is_leaf=is_axes))
    assert ("head" in shapes) != config.tie_embeddings
    assert model.head(shapes) is shapes["embed" if config.tie_embeddings else "head"]


def test_random_layers_start_apart():
    q = jax.jit(lambda key: Model(TINY).init(key)["blocks"]["attention"]["q"])(jax.random.key(0))
    assert np.abs(q[0] - q[1]).max() > 0.01 and 0.015 < np.std(q) < 0.025


def test_a_model_is_a_static_argument():
    compiled = []

    def count(model, x):
        compiled.append(model)
        return x + model.config.num_layers

    f = jax.jit(count, static_argnums=0)
    assert f(Model(TINY), 1) == f(Model(ModelConfig(**vars(TINY))), 1) and len(compiled) == 1
    f(Model(TINY, remat="full"), 1)
    assert len(compiled) == 2


def test_no_gradient_reaches_a_later_token():
    model, weights = Model(TINY), lively(Model(TINY))
    ids = np.random.default_rng(0).permutation(32)[None, :8].astype(np.int32)
    here = jax.jit(jax.grad(lambda w, at: jnp.sum(model.hidden(w, ids)[0, at] ** 2)))
    for at in (0, 4, 7):
        reach = np.abs(here(weights, at)["embed"]).max(axis=-1)[ids[0]]
        assert (reach[: at + 1] > 1e-6).all() and (reach[at + 1 :] == 0).all()


def test_positions_count_only_by_their_distance():
    model, weights, ids = Model(TINY), lively(Model(TINY)), tokens(1, 9)
    hidden, at = jax.jit(model.hidden), np.arange(9, dtype=np.int32)[None]
    base = hidden(weights, ids, at)
    np.testing.assert_allclose(hidden(weights, ids, at + 11), base, atol=1e-4)
    assert np.abs(hidden(weights, ids, at * 2) - base).max() > 1e-2


def test_packed_rows_equal_separate_rows():
    model, weights = Model(TINY), lively(Model(TINY))
    a, b = tokens(2, 6)[0], tokens(2, 6)[1, :4]
    packed = np.concatenate([a, b, np.zeros(2, np.int32)])[None]
    segments = np.array([[1] * 6 + [2] * 4 + [0] * 2], np.int32)
    hidden = jax.jit(model.hidden)
    h = hidden(weights, packed, segments_BT=segments)
    np.testing.assert_allclose(h[:, :6], hidden(weights, a[None]), atol=1e-5)
    np.testing.assert_allclose(h[:, 6:10], hidden(weights, b[None]), atol=1e-5)


def test_padding_on_the_right_changes_nothing():
    model, weights, ids = Model(TINY), lively(Model(TINY)), tokens(2, 12)
    other = ids.copy()
    other[:, 7:] = 0
    h = jax.jit(model.hidden)
    np.testing.assert_array_equal(h(weights, ids)[:, :7], h(weights, other)[:, :7])


@pytest.mark.parametrize("config", [TINY, PLAIN, MIXED], ids=["tiny", "plain", "mixed"])
def test_cached_chunks_equal_the_whole_forward_pass(config):
    """Prompts of unequal length in chunks of four, beside rows that do not count, then token by token."""
    model, weights, ids = Model(config), lively(Model(config)), tokens(3, 12)
    whole = np.asarray(jax.jit(model.hidden)(weights, ids))
    step = jax.jit(model.decode)
    slot_of, prompt = {0: 3, 1: 0, 2: 2}, {0: 7, 1: 4, 2: 9}
    cache, done, garbage = model.init_cache(4, 12, "float32"), dict.fromkeys(slot_of, 0), 31
    while any(done[row] < prompt[row] for row in done):
        slots, chunk, valid = np.full(4, 1, np.int32), np.full((4, 4), garbage, np.int32), np.zeros(4, np.int32)
        for row, slot in slot_of.items():
            count = min(4, prompt[row] - done[row])
            slots[row], valid[row] = slot, count
            chunk[row, :count] = ids[row, done[row] : done[row] + count]
        h, cache = step(model.by_layer(weights), chunk, cache, slots, valid)
        for row in slot_of:
            at = done[row]
            np.testing.assert_allclose(h[row, : valid[row]], whole[row, at : at + valid[row]], atol=2e-5)
            done[row] += valid[row]
    np.testing.assert_array_equal(cache.length_B, [4, 0, 9, 7])
    for _ in range(3):
        row_of = {slot: row for row, slot in slot_of.items()}
        column = np.array([[ids[row_of[b], done[row_of[b]]] if b in row_of else garbage] for b in range(4)], np.int32)
        h, cache = step(model.by_layer(weights), column, cache, None, np.array([1, 0, 1, 1], np.int32))
        for row, slot in slot_of.items():
            np.testing.assert_allclose(h[slot, 0], whole[row, done[row]], atol=2e-5)
            done[row] += 1
    np.testing.assert_array_equal(cache.length_B, [7, 0, 12, 10])


def test_a_row_that_does_not_count_may_share_a_slot():
    model, weights, ids = Model(PLAIN), lively(Model(PLAIN)), tokens(1, 6)
    whole, step = jax.jit(model.hidden)(weights, ids), jax.jit(model.decode)
    cache = model.init_cache(2, 6, "float32")
    for first, second in ((ids[0, :3], ids[0, 3:]), (ids[0, 3:], None)):
        rows = np.stack([first, np.full(3, 9, np.int32)])
        h, cache = step(model.by_layer(weights), rows, cache, np.array([1, 1], np.int32), np.array([3, 0], np.int32))
        np.testing.assert_allclose(h[0], whole[0, :3] if second is not None else whole[0, 3:], atol=2e-5)
    np.testing.assert_array_equal(cache.length_B, [0, 6])


@pytest.mark.parametrize("config", [TINY, pytest.param(MIXED, marks=pytest.mark.slow)], ids=["tiny", "mixed"])
def test_rematerialisation_changes_no_gradient(config):
    weights, ids = lively(Model(config)), tokens(2, 8)
    base = None
    for remat in ("none", "full", "dots"):
        model = Model(config, remat=remat)
        loss = lambda w, m=model: jnp.sum(jnp.sin(m.hidden(w, ids)))  # noqa: E731
        grads = jax.jit(jax.grad(loss))(weights)
        base = grads if base is None else base
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, base)
        if remat != "none":
            assert "remat" in str(jax.make_jaxpr(jax.grad(loss))(weights)), "nothing is computed again"


def test_bfloat16_stays_near_float32():
    ids, weights = tokens(2, 12), lively(Model(TINY))
    exact = np.asarray(jax.jit(Model(TINY).logits)(weights, ids))
    model = Model(TINY, dtype="bfloat16")
    assert jax.eval_shape(model.hidden, weights, ids).dtype == jnp.bfloat16
    logits = jax.jit(model.logits)(weights, ids)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.std(exact)


def test_large_positions_keep_their_precision_in_bfloat16():
    model, weights, ids = Model(PLAIN, dtype="bfloat16"), lively(Model(PLAIN)), tokens(1, 6)
    at, hidden = np.arange(6, dtype=np.int32)[None], jax.jit(model.hidden)
    near, far = (np.asarray(hidden(weights, ids, at + start), np.float32) for start in (0, 30_000))
    assert np.abs(near - far).max() < 0.3 * np.std(near)


@pytest.fixture(scope="module")
def one_device():
    """(model, weights, tokens, loss, what one device computes)."""
    model = Model(ModelConfig(**{**vars(TINY), "num_kv_heads": 8}))
    weights, ids = lively(model), tokens(8, 12)

    def loss(w, ids):
        h = model.hidden(w, ids)
        logits = jnp.einsum("btd,vd->btv", h, model.head(w))
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)), h

    loss_and_gradient = jax.value_and_grad(loss, has_aux=True)
    with jax.default_matmul_precision("highest"):
        return model, weights, ids, loss_and_gradient, jax.jit(loss_and_gradient)(weights, ids)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_eight_devices_compute_what_one_does(sizes, one_device):
    """Loss to 1e-6 relative, every gradient to 1e-5 of its norm; the activations are really split."""
    model, weights, ids, loss_and_gradient, ((expected, h), grads) = one_device
    mesh = make_mesh(MeshConfig(*sizes))
    placed = jax.device_put(weights, tree_shardings(mesh, model.logical_axes(), model.abstract()))
    with jax.set_mesh(mesh):
        (value, h_split), split = jax.jit(loss_and_gradient)(placed, ids)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(h_split, h, atol=1e-5)
    assert h_split.sharding.shard_shape(h.shape)[0] == 8 // (sizes[0] * sizes[1])
    for one, many in zip(jax.tree.leaves(grads), jax.tree.leaves(split), strict=True):
        assert np.linalg.norm(one - many) <= 1e-5 * np.linalg.norm(one)


@pytest.mark.parametrize("config", [TINY, MIXED], ids=["tiny", "mixed"])
def test_float32_is_multiplied_in_full_and_bfloat16_as_the_device_likes(config):
    """On a CPU there is no difference to see, so the program is read."""
    weights, ids = lively(Model(config)), tokens(1, 4)
    for dtype, wanted in (("float32", True), ("bfloat16", False)):
        model = Model(config, dtype=dtype)
        cache = model.init_cache(1, 8, dtype)
        with jax.default_matmul_precision("default"):
            backward = jax.make_jaxpr(jax.grad(lambda w, m=model: jnp.sum(m.logits(w, ids))))(weights)
            step = jax.make_jaxpr(model.decode)(model.by_layer(weights), ids, cache, None, np.ones(1, np.int32))
        for program in (str(backward), str(step)):
            products = re.findall(r"precision=(.*)", program)
            assert len(products) > 8
            assert all(("HIGHEST" in product) == wanted for product in products), products
