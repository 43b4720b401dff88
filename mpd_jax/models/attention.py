"""Positions, and attention as the plain reference: grouped queries, causal, softmax in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mpd_jax.models.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequency of each pair of dimensions [H / 2], float64; llama3 scaling stretches the slow ones.

    Scaling follows Llama 3.1's published rule: wavelengths above original / low_freq_factor are divided by `factor`,
    those below original / high_freq_factor are kept, and between the two the frequency is interpolated.
    """
    half = np.arange(0, config.head_dim, 2) / config.head_dim
    frequency = config.rope_theta**-half
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def rotary(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles [B, T, 1, H / 2], in float32: bfloat16 cannot hold large positions."""
    frequency = jnp.asarray(rope_frequencies(config), jnp.float32)
    angle_BTH = positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    return jnp.cos(angle_BTH)[:, :, None, :], jnp.sin(angle_BTH)[:, :, None, :]


def rotate(x_BTNH: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding of half-split pairs, computed in float32."""
    cos, sin = rotation
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def attend(q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention where `visible_BTS` is True. Query head n reads key-value head n // (N / K)."""
    B, T, N, H = q_BTNH.shape
    K, S = v_BKSH.shape[1:3]
    # The queries of one key-value head side by side: two plain batched products, and nothing of size S is transposed.
    q_BKQH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores_BKQS = jnp.einsum("bkqh,bkhs->bkqs", q_BKQH, k_BKHS, preferred_element_type=jnp.float32) / math.sqrt(H)
    scores_BKGTS = scores_BKQS.reshape(B, K, N // K, T, S)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKQS = jax.nn.softmax(scores_BKGTS, axis=-1).reshape(B, K, -1, S).astype(v_BKSH.dtype)
    out_BKQH = jnp.einsum("bkqs,bksh->bkqh", weights_BKQS, v_BKSH)
    return out_BKQH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def causal(segments_BT: jax.Array) -> jax.Array:
    """Which keys each query sees, [B, T, T]: earlier in the row, and of its own segment."""
    row = jnp.arange(segments_BT.shape[1])
    earlier = row[None, :] <= row[:, None]
    return earlier[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])


def restarting(segments_BT: jax.Array) -> jax.Array:
    """Positions [B, T] that start at 0 with every segment of a row."""
    row = jnp.broadcast_to(jnp.arange(segments_BT.shape[1])[None, :], segments_BT.shape)
    before = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return row - jax.lax.cummax(jnp.where(segments_BT != before, row, 0), axis=1)
