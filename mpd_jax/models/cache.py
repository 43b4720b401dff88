"""The key-value cache of cached decoding: one pair of arrays a layer, rows are slots, filled from the left."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mpd_jax.types import Array

KEYS_LENGTH, VALUES_LENGTH = 3, 2  # the axis of a layer's array that runs over cache positions


class KVCache(NamedTuple):
    """For each layer keys [B, K, H, S] and values [B, K, S, H]; length_B: tokens held.

    Layers are separate arrays: a slice of one stacked array would be copied for every token. Keys lie so that scores
    and outputs are both plain batched products, without transposing what is held.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length_B: jax.Array


def cache_axes(layers: int) -> KVCache:
    """The logical axes of a cache, for sharding.tree_shardings."""
    k, v = ("slots", "kv_heads", "head", "length"), ("slots", "kv_heads", "length", "head")
    return KVCache((k,) * layers, (v,) * layers, ("slots",))  # type: ignore[arg-type]


def extend_every(held: jax.Array, new_BTKH: jax.Array, to_BT: jax.Array, window: int, length: int) -> tuple:
    """(its positions below `window`, the array with new ones at `to_BT`); `length`: the axis that runs over positions.

    A position outside the array is not written. Row by row under vmap: rows stay a batch of the scatter, which the
    partitioner splits without gathering the cache.
    """

    def put_keys(x_KHS: jax.Array, to_T: jax.Array, new_TKH: jax.Array) -> jax.Array:
        return x_KHS.at[:, :, to_T].set(new_TKH.transpose(1, 2, 0), mode="drop")

    def put_values(x_KSH: jax.Array, to_T: jax.Array, new_TKH: jax.Array) -> jax.Array:
        return x_KSH.at[:, to_T].set(new_TKH.swapaxes(0, 1), mode="drop")

    held = jax.vmap(put_keys if length == KEYS_LENGTH else put_values)(held, to_BT, new_BTKH)
    return lax.slice_in_dim(held, 0, window, axis=length), held


def extend_picked(
    held: jax.Array, new_RTKH: jax.Array, slots_R: Array, start_R: jax.Array, valid_R: Array, window: int, length: int
) -> tuple:
    """`extend_every` for the rows `slots_R` of an array on one device: from start_R[r] on, valid_R[r] tokens."""
    T, slots = new_RTKH.shape[1], held.shape[0]
    new = new_RTKH.transpose(0, 2, 3, 1) if length == KEYS_LENGTH else new_RTKH.transpose(0, 2, 1, 3)
    near = (slice(None),) * (length - 1) + (slice(0, window),)
    picked, rows = held[(slots_R, *near)], []
    for r in range(len(slots_R)):  # slices: a scatter runs token by token
        row = picked[r : r + 1]
        start = jnp.minimum(start_R[r], window - T)  # a row that counts starts there anyway
        counted = (jnp.arange(T) < valid_R[r]).reshape([T if axis == length else 1 for axis in range(held.ndim)])
        old = lax.dynamic_slice_in_dim(row, start, T, axis=length)
        part = jnp.where(counted, new[r : r + 1], old)
        rows.append(lax.dynamic_update_slice_in_dim(row, part, start, axis=length))
    rows = jnp.concatenate(rows)
    counted_R = jnp.where(valid_R > 0, slots_R, slots)  # beyond the last slot: dropped
    return rows, held.at[(counted_R, *near)].set(rows, mode="drop")
