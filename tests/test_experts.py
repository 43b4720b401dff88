"""Claims about mixtures of experts: the groups, that no token is dropped, that meshes do not matter, and the memory."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpd_jax.models import experts
from mpd_jax.models.config import Experts, ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config, load_weights
from mpd_jax.sampling.jax_sampler import JaxSampler
from mpd_jax.sampling.sampler import Request, SamplingConfig
from mpd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from tests.parity import record
from tests.test_sharding import collectives

B, T, D, F, X = 8, 12, 16, 24, 16
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
MIXED_IN_CI = [pytest.param(mesh, marks=() if min(mesh) > 1 else pytest.mark.slow) for mesh in MESHES]


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def parameters(**changed):
    shapes = {"router": (D, X), "gate": (X, D, F), "up": (X, D, F), "down": (X, F, D)}
    return {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())} | changed


def token_by_token(of, x_TD, router, gate, up, down):
    """The same in float64, a token and an expert at a time."""
    out = np.zeros(x_TD.shape)
    for t, x in enumerate(x_TD.astype(np.float64)):
        p = np.exp(x @ router)
        p /= p.sum()
        chosen = np.argsort(-p)[: of.per_token]
        scale = p[chosen].sum() if of.normalised else 1.0
        for e in chosen:
            a = x @ gate[e]
            out[t] += p[e] / scale * ((a / (1 + np.exp(-a)) * (x @ up[e])) @ down[e])
    return out


def model(layers=2, **changed):
    fields = dict(
        family="qwen3_moe", vocab_size=32, hidden_size=D, intermediate_size=F, num_layers=layers, num_heads=8,
        num_kv_heads=8, head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qkv_bias=False, o_bias=False,
        mlp_bias=False, qk_norm=True, tie_embeddings=True, max_position_embeddings=64, experts=Experts(X, 3, True),
    )  # fmt: skip
    return Model(ModelConfig(**{**fields, **changed}))


def lively(of):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda w: random.normal(0.1, 0.3, w.shape).astype(np.float32), of.abstract())


def tokens(rows=B, length=T):
    return np.random.default_rng(1).integers(0, 32, (rows, length), dtype=np.int32)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_grouped_products_and_their_gradients_are_those_of_separate_products(dtype, tolerance):
    """Groups empty, full, across blocks of rows, and rows beyond the last group, which give zero."""

    @jax.jit
    def ours(x, w, g, sizes):
        y, back = jax.vjp(lambda x, w: experts._grouped((), x, w, sizes), x, w)
        return y, *back(g)

    x, w, g = (jnp.asarray(a, dtype) for a in (draw(61, 7), draw(5, 7, 9, seed=1), draw(61, 9, seed=2)))
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    for sizes in ((3, 0, 40, 1, 17), (0, 0, 0, 61, 0), (0, 0, 0, 0, 0), (9, 8, 16, 8, 7), (1, 2, 3, 4, 5)):
        y, dx, dw = np.zeros((61, 9)), np.zeros((61, 7)), np.zeros((5, 7, 9))
        for i, (size, end) in enumerate(zip(sizes, np.cumsum(sizes), strict=True)):
            part = slice(end - size, end)
            y[part], dx[part], dw[i] = x64[part] @ w64[i], g64[part] @ w64[i].T, x64[part].T @ g64[part]
        for found, expected in zip(ours(x, w, g, jnp.array(sizes)), (y, dx, dw), strict=True):
            assert found.dtype == dtype
            np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


@pytest.mark.parametrize("of", [Experts(X, 3, True), Experts(X, 3, False), Experts(X, X, True)], ids=str)
def test_a_mixture_is_what_each_token_s_experts_give(of):
    x = draw(B, T, D, seed=9)
    found = jax.jit(experts.mixture, static_argnums=0)(of, x, *parameters().values())
    expected = token_by_token(of, x.reshape(-1, D), **parameters())
    np.testing.assert_allclose(found.reshape(-1, D), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [None, (1, 1, 8), (2, 2, 2)], ids=str)
def test_no_token_is_dropped_when_all_choose_one_expert(sizes):
    """The most uneven load there can be: one device's expert has all the work."""
    x = np.abs(draw(B, T, D, seed=9))
    router = np.zeros((D, X), np.float32)
    router[:, 5] = 1.0
    of, held = Experts(X, 1, True), parameters(router=router)
    expected = token_by_token(of, x.reshape(-1, D), **held)
    assert (np.abs(expected).max(axis=1) > 1e-3).all()
    mixture = jax.jit(experts.mixture, static_argnums=0)
    if sizes is None:
        found = mixture(of, x, *held.values())
    else:
        with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
            found = mixture(of, x, *held.values())
    np.testing.assert_allclose(np.reshape(found, (-1, D)), expected, atol=1e-4)


@pytest.fixture(scope="module")
def one_device():
    of, ids = model(), tokens()
    weights = lively(of)
    step = jax.value_and_grad(lambda w: jnp.mean(jnp.sin(of.hidden(w, ids) @ of.head(w).T)))
    with jax.default_matmul_precision("highest"):
        return of, weights, ids, step, jax.jit(step)(weights)


@pytest.mark.parametrize("sizes", MIXED_IN_CI, ids=str)
def test_eight_devices_compute_what_one_does(sizes, one_device):
    """Loss to 1e-6, every gradient to 2e-5 of its norm; each device holds and computes its own experts."""
    of, weights, _, step, (expected, gradients) = one_device
    mesh = make_mesh(MeshConfig(*sizes))
    placed = jax.device_put(weights, tree_shardings(mesh, of.logical_axes(), of.abstract()))
    assert placed["blocks"]["mlp"]["expert_up"].addressable_shards[0].data.shape == (
        2, X // sizes[2], D // sizes[1], F,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        value, split = jax.jit(lambda w: step(w))(placed)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for one, many in zip(jax.tree.leaves(gradients), jax.tree.leaves(split), strict=True):
        assert np.linalg.norm(one) > 0 and np.linalg.norm(one - many) <= 2e-5 * np.linalg.norm(one)


@pytest.mark.parametrize("sizes, rows", [((1, 1, 8), 8), ((2, 2, 2), 8), ((2, 2, 2), 3)], ids=str)
def test_decoding_never_gathers_experts_and_rows_need_not_divide(sizes, rows, one_device):
    of, weights, ids, *_ = one_device
    ids, mesh = ids[:rows, :4], make_mesh(MeshConfig(*sizes))
    expected = jax.jit(of.hidden)(weights, ids)
    layers, cache = of.by_layer(weights), of.init_cache(rows, 8, "float32")
    placed = jax.device_put(layers, tree_shardings(mesh, of.by_layer_axes(), layers, "decode"))
    if rows == 8:
        cache = jax.device_put(cache, tree_shardings(mesh, of.cache_axes(), cache, "decode"))
    with jax.set_mesh(mesh):
        inputs = placed, ids, cache, None, np.full(rows, 4, np.int32)
        step = jax.jit(of.decode).lower(*inputs).compile()
        found, _ = step(*inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if rows == 8:
        moved = collectives(step.as_text())
        assert {kind for kind, _ in moved} == {"all-reduce"} and max(size for _, size in moved) <= rows * 4 * D, moved


def test_the_sampler_s_greedy_tokens_are_those_transformers_computed(tmp_path):
    """The recorded base model, its experts split over two devices."""
    held = np.load(record.RECORDED / "qwen3_moe.npz")
    (tmp_path / "config.json").write_text(str(held["base.config"]))
    shapes = json.loads(str(held["base.shapes"]))
    save_file({name: record.draw(name, shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    of, mesh = Model(load_config(tmp_path)), make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    sizes = {"slots": 2, "prompt_length": record.PROMPT, "max_length": record.PROMPT + record.NEW}
    sampler = JaxSampler(
        of, mesh, frozenset(), **sizes, prefill_chunk=5, prefill_rows=2, vocab_size=64, dtype=jnp.float32
    )
    sampler.load(load_weights(tmp_path, of, mesh), 0)
    prompts = record.tokens()[:, : record.PROMPT].tolist()
    requests = [Request(tuple(prompt), (0, row)) for row, prompt in enumerate(prompts)]
    responses = sampler.sample(requests, SamplingConfig(temperature=0.0, max_tokens=record.NEW))
    np.testing.assert_array_equal([response.ids for response in responses], held["base.greedy"])


def arrays(text):
    """Elements of every array in a compiled program."""
    return [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)]


@pytest.mark.parametrize("sizes", [None, (1, 2, 4)], ids=str)
def test_nothing_of_size_tokens_by_experts_by_width_is_ever_made(sizes):
    """Forward and backward, the largest array is the rows of the choices, or the experts themselves."""
    x = jax.ShapeDtypeStruct((B, 64, D), np.float32)
    of, held = Experts(X, 2, True), parameters()

    def loss(x, *held):
        return jnp.sum(jnp.sin(experts.mixture(of, x, *held)))

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
    if sizes is None:
        text = step.lower(x, *held.values()).compile().as_text()
    else:
        with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
            text = step.lower(x, *held.values()).compile().as_text()
    assert 2 * F * 64 <= max(arrays(text)) <= max(2 * B * 64 * F, X * D * F) < B * 64 * X * F / 4
