"""Draws one token a row from logits: greedy, or temperature, then top-k, then top-p.

A draw inverts the cumulative distribution with two uniforms, first among blocks of the vocabulary, then inside the
block: a random number for every entry of the vocabulary would cost more than a small model's step. A row's token
depends on its own logits, key and position only, and truncation that keeps everything draws the same token as none.
"""

import jax
import jax.numpy as jnp

from mpd_jax.types import Array

BLOCK = 128  # tokens summed before the first draw


def first_argmax(x_BV: jax.Array) -> jax.Array:
    """The lowest index of the largest entry, as two plain reductions; the last index where a row holds nan."""
    top_B1 = x_BV.max(axis=-1, keepdims=True)
    return _first(x_BV == top_B1)


def _first(flag_BV: jax.Array) -> jax.Array:
    last = flag_BV.shape[-1] - 1
    return jnp.where(flag_BV, jnp.arange(last + 1)[None, :], last).min(axis=-1).astype(jnp.int32)


def kept_BV(scaled_BV: jax.Array, top_p: Array, top_k: Array) -> jax.Array:
    """Which entries survive: the `top_k` largest (0: all), then the fewest largest of these that reach `top_p`.

    Top-p weighs what top-k left, as transformers and vLLM do. The largest always survives; among equals the lower
    index.
    """
    V = scaled_BV.shape[-1]
    order_BV = jnp.argsort(scaled_BV, axis=-1, stable=True, descending=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    rank_V = jnp.arange(V)
    in_k_V = (rank_V < top_k) | (top_k <= 0)
    p_BV = jax.nn.softmax(jnp.where(in_k_V[None, :], sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    in_BV = in_k_V[None, :] & ((before_BV < top_p) | (top_p >= 1.0))
    # The survivors are the first ranks, so the last of them decides for every token without sorting back.
    last_B1 = jnp.maximum(in_BV.sum(axis=-1, keepdims=True) - 1, 0)
    edge_B1, edge_at_B1 = (jnp.take_along_axis(x, last_B1, axis=-1) for x in (sorted_BV, order_BV))
    return (scaled_BV > edge_B1) | ((scaled_BV == edge_B1) & (rank_V[None, :] <= edge_at_B1))


def uniforms_B2(key_B2: jax.Array, t_B: jax.Array) -> jax.Array:
    """The two random numbers of token t of each response, in [0, 1): a function of the row's key and t alone."""

    def row(key_2: jax.Array, t: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), t)
        return jax.random.uniform(key, (2,), jnp.float32)

    return jax.vmap(row)(key_B2, t_B)


def _pick(mass_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """An index with probability proportional to its mass; never one without mass, whatever rounding does."""
    has_BN = mass_BN > 0
    upto_BN = jnp.where(has_BN, jnp.cumsum(mass_BN, axis=-1), 0.0)
    return _first(upto_BN > uniform_B[:, None] * upto_BN.max(axis=-1, keepdims=True))


def draw(
    logits_BV: jax.Array,
    key_B2: jax.Array,
    t_B: jax.Array,
    *,
    temperature: Array,
    top_p: Array,
    top_k: Array,
    truncate: bool,
) -> jax.Array:
    """Token ids [B]. The settings are scalars in arrays; `truncate` compiles the sort that top-p and top-k need.

    logits_BV float32 with excluded columns at -inf; key_B2 uint32; t_B the index of the token inside its response.
    Temperature 0 takes the argmax and computes no random number.
    """

    def greedy(_: None) -> jax.Array:
        return first_argmax(logits_BV)

    def sampled(_: None) -> jax.Array:
        B, V = logits_BV.shape
        scaled_BV = logits_BV / temperature
        mass_BV = jnp.exp(scaled_BV - scaled_BV.max(axis=-1, keepdims=True))
        if truncate:
            mass_BV = jnp.where(kept_BV(scaled_BV, top_p, top_k), mass_BV, 0.0)
        mass_BNb = jnp.pad(mass_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
        uniform_B2 = uniforms_B2(key_B2, t_B)
        block_B = _pick(mass_BNb.sum(axis=-1), uniform_B2[:, 0])
        inside_Bb = jnp.take_along_axis(mass_BNb, block_B[:, None, None], axis=1)[:, 0]
        return block_B * BLOCK + _pick(inside_Bb, uniform_B2[:, 1])

    return jax.lax.cond(temperature == 0.0, greedy, sampled, None)
