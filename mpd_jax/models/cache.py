"""The key-value cache of cached decoding: one pair of arrays a layer, rows are slots, filled from the left."""

from typing import NamedTuple

import jax


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
