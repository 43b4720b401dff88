"""One decoder for the Qwen3, Qwen3-MoE, Qwen2 and Llama families, as Flax NNX modules over stacked layers.

Modules hold parameters and their logical axes; everyone else sees a `Model` (no weights, hashable, static under jit)
and a plain nested dict of arrays. Training scans the stacked layers; cached decoding unrolls the same ones.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mpd_jax.models.attention import attend, restarting, rotary, rotate
from mpd_jax.models.cache import KEYS_LENGTH, VALUES_LENGTH, KVCache, cache_axes, extend_every, extend_picked
from mpd_jax.models.config import ModelConfig
from mpd_jax.models.experts import mixture
from mpd_jax.models.kernels import Read, attention, choose
from mpd_jax.sharding import constrain
from mpd_jax.types import Array

Weights = Any
Rotation = tuple[jax.Array, jax.Array]
INIT_SCALE = 0.02
BETWEEN = ("batch", "between", None)  # activations that wait for the next layer, or for the backward pass


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], *logical: str) -> nnx.Param:
    return nnx.Param(INIT_SCALE * jax.random.normal(rngs.params(), shape), logical=logical)


def _plus(y: jax.Array, x: jax.Array, adapter: Weights | None, name: str) -> jax.Array:
    """y + (x A) B where an adapter (models/lora.py) has this projection: the product A B is never formed."""
    if adapter is None or name not in adapter:
        return y
    a, b = (adapter[name][part].astype(x.dtype) for part in ("a", "b"))
    return y + jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)


def _zeros(shape: tuple[int, ...], *logical: str) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape), logical=logical)


class Norm(nnx.Module):
    """RMSNorm over the last axis, in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)), logical=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = config
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.q = _normal(rngs, (D, N, H), "embed", "heads", "head")
        self.k = _normal(rngs, (D, K, H), "embed", "kv_heads", "head")
        self.v = _normal(rngs, (D, K, H), "embed", "kv_heads", "head")
        self.o = _normal(rngs, (N, H, D), "heads", "head", "embed")
        if c.qkv_bias:
            self.q_bias = _zeros((N, H), "heads", "head")
            self.k_bias = _zeros((K, H), "kv_heads", "head")
            self.v_bias = _zeros((K, H), "kv_heads", "head")
        if c.o_bias:
            self.o_bias = _zeros((D,), "norm")
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(H, c.rms_norm_eps), Norm(H, c.rms_norm_eps)
        self.config = c

    def project(
        self, x_BTD: jax.Array, rotation: Rotation, adapter: Weights | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries, rotated keys, values: [B, T, N or K, H]."""
        q, k, v = (jnp.einsum("btd,dnh->btnh", x_BTD, w[...].astype(x_BTD.dtype)) for w in (self.q, self.k, self.v))
        q, k, v = (_plus(y, x_BTD, adapter, name) for y, name in ((q, "q"), (k, "k"), (v, "v")))
        if self.config.qkv_bias:
            q, k, v = (
                x + bias[...].astype(x.dtype)[None, None]
                for x, bias in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotation), rotate(k, rotation), v

    def out(self, x_BTNH: jax.Array, adapter: Weights | None = None) -> jax.Array:
        y_BTD = jnp.einsum("btnh,nhd->btd", x_BTNH, self.o[...].astype(x_BTNH.dtype))
        y_BTD = _plus(y_BTD, x_BTNH, adapter, "o")
        return y_BTD + self.o_bias[...].astype(y_BTD.dtype)[None, None] if self.config.o_bias else y_BTD


class FeedForward(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate = _normal(rngs, (D, F), "embed", "mlp")
        self.up = _normal(rngs, (D, F), "embed", "mlp")
        self.down = _normal(rngs, (F, D), "mlp", "embed")
        if config.mlp_bias:
            self.gate_bias, self.up_bias = _zeros((F,), "mlp"), _zeros((F,), "mlp")
            self.down_bias = _zeros((D,), "norm")
        self.bias = config.mlp_bias

    def __call__(self, x_BTD: jax.Array, adapter: Weights | None = None) -> jax.Array:
        gate, up = x_BTD @ self.gate[...].astype(x_BTD.dtype), x_BTD @ self.up[...].astype(x_BTD.dtype)
        gate, up = _plus(gate, x_BTD, adapter, "gate"), _plus(up, x_BTD, adapter, "up")
        if self.bias:
            gate = gate + self.gate_bias[...].astype(gate.dtype)[None, None]
            up = up + self.up_bias[...].astype(up.dtype)[None, None]
        inner_BTF = jax.nn.silu(gate) * up
        y_BTD = _plus(inner_BTF @ self.down[...].astype(x_BTD.dtype), inner_BTF, adapter, "down")
        return y_BTD + self.down_bias[...].astype(y_BTD.dtype)[None, None] if self.bias else y_BTD


class MixtureOfExperts(nnx.Module):
    """SwiGLU experts, of which a router chooses a few for every token."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.experts is not None
        X, D, F = config.experts.count, config.hidden_size, config.intermediate_size
        self.router = _normal(rngs, (D, X), "embed", "routes")
        self.expert_gate = _normal(rngs, (X, D, F), "experts", "embed", "expert_mlp")
        self.expert_up = _normal(rngs, (X, D, F), "experts", "embed", "expert_mlp")
        self.expert_down = _normal(rngs, (X, F, D), "experts", "expert_mlp", "embed")
        self.chosen = config.experts

    def __call__(self, x_BTD: jax.Array, adapter: None = None) -> jax.Array:
        """adapter: experts have none."""
        parameters = self.router, self.expert_gate, self.expert_up, self.expert_down
        return mixture(self.chosen, x_BTD, *(w[...].astype(x_BTD.dtype) for w in parameters))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, rngs) if config.experts is None else MixtureOfExperts(config, rngs)

    def __call__(self, x_BTD: jax.Array, rotation: Rotation, read: Read, adapter: Weights | None = None) -> jax.Array:
        """adapter: this layer's, by module and projection (models/lora.py)."""
        of = (adapter or {}).get
        q, k, v = self.attention.project(self.attention_norm(x_BTD), rotation, of("attention"))
        x_BTD = constrain(x_BTD + self.attention.out(read(q, k, v), of("attention")), BETWEEN)
        return constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD), of("mlp")), BETWEEN)

    def step(
        self, x_BTD: jax.Array, rotation: Rotation, visible_BTS: jax.Array, remember: Callable
    ) -> tuple[jax.Array, Any]:
        """`remember(k_BTKH, v_BTKH) -> (k_BKHS, v_BKSH, kept)`: what attention reads, and what the caller keeps."""
        q, k, v = self.attention.project(self.attention_norm(x_BTD), rotation)
        keys, values, kept = remember(k, v)
        x_BTD = x_BTD + self.attention.out(attend(q, keys, values, visible_BTS))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), kept


class Decoder(nnx.Module):
    """Everything outside the blocks."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        table = (config.vocab_size, config.hidden_size)
        self.embed = _normal(rngs, table, "vocab", "embed")
        self.final_norm = Norm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_embeddings:
            self.head = _normal(rngs, table, "vocab", "embed")


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


@lru_cache(maxsize=64)
def _split(kind: type, config: ModelConfig) -> tuple[Any, Any, dict]:
    """(graph, structure of its state, logical axes) of a module class, without making an array."""
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))
    axes = nnx.to_pure_dict(jax.tree.map(lambda p: p.replace(p.get_metadata()["logical"]), state, is_leaf=_is_param))
    return graph, jax.tree.structure(state), axes


def _module(kind: type, config: ModelConfig, weights: Weights) -> Any:
    graph, structure, _ = _split(kind, config)
    return nnx.merge(graph, jax.tree.unflatten(structure, jax.tree.leaves(weights)))


def _pure(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.split(module)[1])


def _rest(weights: Weights) -> Weights:
    return {k: v for k, v in weights.items() if k not in ("blocks", "adapter")}


def _merged(block: Weights, adapter: Weights | None) -> Weights:
    """One layer's weights with the adapter's products added, in float32 where there are any."""

    def sums(held: Weights, added: Weights) -> Weights:
        products = {name: jnp.tensordot(x["a"], x["b"], 1, precision="highest") for name, x in added.items()}
        return {**held, **{name: held[name].astype(jnp.float32) + ab for name, ab in products.items()}}

    return {**block, **{module: sums(block[module], added) for module, added in (adapter or {}).items()}}


@dataclass(frozen=True)
class Model:
    """A decoder without its weights. dtype: of the computation; remat: see ModelSpec; attention: see `on`.

    Weights that `hidden`, `by_layer` and `merged` are given may hold an "adapter" beside the rest (models/lora.py).
    """

    config: ModelConfig
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    def on(self, mesh: Mesh | None) -> "Model":
        """The same decoder with the attention kernel that suits the mesh's devices."""
        if mesh is None:
            return self
        return replace(self, attention=choose(self.attention, self.dtype, mesh.devices.flat[0].platform))

    def init(self, key: jax.Array) -> Weights:
        """Random float32 weights, blocks stacked along a leading layer axis."""
        outer, inner = jax.random.split(key)
        blocks = jax.vmap(lambda k: _pure(Block(self.config, nnx.Rngs(params=k))))(
            jax.random.split(inner, self.config.num_layers)
        )
        return {**_pure(Decoder(self.config, nnx.Rngs(params=outer))), "blocks": blocks}

    def abstract(self) -> Weights:
        """Shapes and dtypes of `init`."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> Weights:
        """The tree of `init` with a tuple of logical axis names for every array."""
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        blocks = jax.tree.map(lambda a: ("layers", *a), _split(Block, self.config)[2], is_leaf=is_axes)
        return {**_split(Decoder, self.config)[2], "blocks": blocks}

    def over(self, base: None, trained: Weights) -> Weights:
        """The weights to read with, of what is frozen and what trains: here everything trains. See lora.Adapted."""
        return trained

    def merged(self, weights: Weights) -> Weights:
        """The weights without an adapter, its products added to them."""
        return {**_rest(weights), "blocks": jax.vmap(_merged)(weights["blocks"], weights.get("adapter"))}

    def by_layer(self, weights: Weights) -> Weights:
        """The weights as `decode` takes them, a tree a layer: slices of stacked ones would be copied every token.

        An adapter is merged into them.
        """
        layers, stacked = range(self.config.num_layers), (weights["blocks"], weights.get("adapter"))
        blocks = tuple(_merged(*jax.tree.map(lambda w, i=layer: w[i], stacked)) for layer in layers)
        return {**_rest(weights), "blocks": blocks}

    def by_layer_axes(self) -> Weights:
        """The tree of `by_layer` with a tuple of logical axis names for every array."""
        return {**_split(Decoder, self.config)[2], "blocks": (_split(Block, self.config)[2],) * self.config.num_layers}

    def hidden(
        self,
        weights: Weights,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm [B, T, D], causal; padding on the right needs no mask.

        segments_BT: tokens see only their own segment; 0 is padding. Positions restart with it unless given.
        """
        if segments_BT is None:
            segments_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        if positions_BT is None:
            positions_BT = restarting(segments_BT)
        read, rotation = attention(self.attention, segments_BT), rotary(positions_BT, self.config)

        def body(x_BTD: jax.Array, layer: tuple[Weights, Weights | None]) -> tuple[jax.Array, None]:
            block, adapter = layer
            return _module(Block, self.config, block)(x_BTD, rotation, read, adapter), None

        x_BTD = constrain(self._embed(weights, tokens_BT), BETWEEN)
        with self.precision():
            layers = weights["blocks"], weights.get("adapter")
            x_BTD, _ = jax.lax.scan(_rematerialised(body, self.remat), x_BTD, layers)
        h_BTD = _module(Decoder, self.config, _rest(weights)).final_norm(x_BTD)
        return constrain(h_BTD, ("batch", None, None))  # positions are picked from it

    def head(self, weights: Weights) -> jax.Array:
        """The projection onto the vocabulary [V, D], as stored."""
        return weights["embed"] if self.config.tie_embeddings else weights["head"]

    def project(self, weights: Weights, h: jax.Array) -> jax.Array:
        """float32 logits [..., V] of hidden states [..., D]."""
        with self.precision():
            head_VD = self.head(weights).astype(h.dtype)
            return jnp.einsum("...d,vd->...v", h, head_VD, preferred_element_type=jnp.float32)

    def logits(self, weights: Weights, tokens_BT: jax.Array, **rows: jax.Array | None) -> jax.Array:
        """float32 logits [B, T, V], whole: for tests and small tools."""
        return self.project(weights, self.hidden(weights, tokens_BT, **rows))

    def init_cache(self, slots: int, length: int, dtype: Any) -> KVCache:
        """An empty cache of `slots` rows for `length` tokens each."""
        c = self.config
        k = tuple(jnp.zeros((slots, c.num_kv_heads, c.head_dim, length), dtype) for _ in range(c.num_layers))
        v = tuple(jnp.zeros((slots, c.num_kv_heads, length, c.head_dim), dtype) for _ in range(c.num_layers))
        return KVCache(k, v, jnp.zeros((slots,), jnp.int32))

    def cache_axes(self) -> KVCache:
        """The tree of `init_cache` with a tuple of logical axis names for every array."""
        return cache_axes(self.config.num_layers)

    def decode(
        self,
        weights: Weights,
        tokens_RT: Array,
        cache: KVCache,
        slots_R: Array | None,
        valid_R: Array,
        window: int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states [R, T, D] of tokens that continue cached rows, and the cache that holds them.

        The weights are those of `by_layer`. Row r continues slot slots_R[r] (None: slot r) with its first valid_R[r]
        tokens; those beyond are not kept. Rows with a valid token have distinct slots; a row without any may name any
        slot, and changes nothing. window: no row with a valid token reaches beyond so many positions, padding
        included, and attention reads no further.
        """
        whole = cache.v[0].shape[VALUES_LENGTH]
        S = window or whole
        start_R = cache.length_B if slots_R is None else cache.length_B[slots_R]
        offset_T = jnp.arange(tokens_RT.shape[1])
        at_RT = start_R[:, None] + offset_T[None, :]
        # A token that does not count is written nowhere: its index is out of range.
        to_RT = jnp.where(offset_T[None, :] < valid_R[:, None], at_RT, whole)
        visible, rotation = jnp.arange(S)[None, None, :] <= at_RT[:, :, None], rotary(at_RT, self.config)

        def extend(held: jax.Array, new_RTKH: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
            new_RTKH = new_RTKH.astype(held.dtype)
            if slots_R is None:
                return extend_every(held, new_RTKH, to_RT, S, length)
            return extend_picked(held, new_RTKH, slots_R, start_R, valid_R, S, length)

        def remember(layer: int, k_RTKH: jax.Array, v_RTKH: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
            k_RKHS, keys = extend(cache.k[layer], k_RTKH, KEYS_LENGTH)
            v_RKSH, values = extend(cache.v[layer], v_RTKH, VALUES_LENGTH)
            return k_RKHS.astype(k_RTKH.dtype), v_RKSH.astype(v_RTKH.dtype), (keys, values)

        x_RTD, held = self._embed(weights, tokens_RT), []
        for layer in range(self.config.num_layers):
            block = _module(Block, self.config, weights["blocks"][layer])
            with self.precision():
                x_RTD, pair = block.step(x_RTD, rotation, visible, partial(remember, layer))
            held.append(pair)
        h_RTD = _module(Decoder, self.config, _rest(weights)).final_norm(x_RTD)
        length_B = cache.length_B + valid_R if slots_R is None else cache.length_B.at[slots_R].add(valid_R)
        return h_RTD, KVCache(tuple(k for k, _ in held), tuple(v for _, v in held), length_B)

    def precision(self) -> AbstractContextManager:
        """float32 means float32 on every device: by default TPUs and GPUs multiply it in fewer bits. Whoever
        differentiates does so inside it: a kernel's way back is traced after `hidden` has returned."""
        return jax.default_matmul_precision("highest") if self.dtype == "float32" else nullcontext()

    def _embed(self, weights: Weights, tokens_BT: Array) -> jax.Array:
        # Gathered over fsdp first: looked up in parts, every device would hold the rows of all devices for a moment.
        return constrain(weights["embed"], ("vocab", None))[tokens_BT].astype(self.dtype)


def _rematerialised(body: Callable, policy: str) -> Callable:
    match policy:
        case "none":
            return body
        case "full":
            return jax.checkpoint(body)
        case "dots":
            return jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise AssertionError(f"remat {policy!r}")
