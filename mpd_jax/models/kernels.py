"""Attention within a row, for training and scoring: which kernel, and each of them. Cached decoding is attention.py's.

A row holds trajectories side by side; a segment id says which one a token belongs to, 0 is padding, and a token sees
earlier tokens of its own segment. `choose` is the one place that picks a kernel. Shapes are one device's inside
`_on_mesh`: rows over data x fsdp, heads over tensor.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from mpd_jax.models.attention import attend, causal
from mpd_jax.sharding import AXES, check_divides, partition_spec
from mpd_jax.types import UserError

# (q_BTNH, k_BTKH, v_BTKH) -> [B, T, N, H]
Read = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

LANES = 128  # splash wants rows in multiples of this
BLOCK = 512  # and reads and writes this many tokens at a time where a row is as long


def choose(asked: str, dtype: str, platform: str) -> str:
    """The kernel, a key of KERNELS, for a model's `attention` and `dtype` on devices of a platform.

    auto: splash on TPU; cuDNN on GPU for bfloat16, the one of our types that it takes; else the reference. A kernel
    asked for by name where it cannot run is emulated: splash interpreted, cuDNN's contract by XLA. Both are slow.
    """
    if asked == "auto":
        asked = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "reference")
        return "reference" if (asked, dtype) == ("cudnn", "float32") else asked
    if asked == "cudnn" and platform == "gpu" and dtype == "float32":
        raise UserError("attention: cudnn takes no float32; set dtype: bfloat16 beside it, or attention: reference")
    native = {"splash": "tpu", "cudnn": "gpu"}.get(asked, platform)
    return asked if native == platform else f"{asked}_emulated"


def takes_segments(kernel: str) -> bool:
    """Whether rows may hold more than one trajectory."""
    return not kernel.startswith("cudnn")


def attention(kernel: str, segments_BT: jax.Array) -> Read:
    """Attention within these rows. What it returns at padding means nothing."""
    return KERNELS[kernel](segments_BT)


def reference(segments_BT: jax.Array) -> Read:
    """Every score at once, [B, N, T, T]: exact, on any device, and costly in long rows."""
    visible_BTS = causal(segments_BT)

    def read(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return attend(q_BTNH, k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3), visible_BTS)

    return read


def splash(segments_BT: jax.Array, interpret: bool = False) -> Read:
    """Pallas' splash attention: blocks of the causal triangle, no scores in memory."""
    T = segments_BT.shape[1]
    block = min(BLOCK, -(-T // LANES) * LANES)
    whole = -(-T // block) * block
    sizes = BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def local(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        N, H = q_BTNH.shape[2:]
        mask = MultiHeadMask([CausalMask((whole, whole))] * N)
        kernel = make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
        rows = partial(_padded, axis=1, size=whole)
        # Scores are taken unscaled by the kernel. A head size that is no multiple of the lanes is filled with zeros.
        q_BNTH, k_BKTH, v_BKTH = (
            _padded(rows(x), 3, -(-H // LANES) * LANES).swapaxes(1, 2)
            for x in ((q_BTNH / math.sqrt(H)).astype(q_BTNH.dtype), k_BTKH, v_BTKH)
        )
        segments_BT = rows(segments_BT)
        out_BNTH: Any = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, SegmentIds(segments_BT, segments_BT))
        return out_BNTH.swapaxes(1, 2)[:, :T, :, :H]

    return _on_mesh(local, segments_BT)


def cudnn(segments_BT: jax.Array, implementation: str = "cudnn") -> Read:
    """cuDNN's flash attention. It takes lengths and no segments: a row is one trajectory, padded on the right."""

    def local(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        # A row that nothing fills reads one token of padding: of none there would be nothing to divide by.
        length_B = jnp.maximum(jnp.sum(segments_BT != 0, axis=1, dtype=jnp.int32), 1)
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            is_causal=True,
            query_seq_lengths=length_B,
            key_value_seq_lengths=length_B,
            implementation=implementation,  # type: ignore[arg-type]
        )

    return _on_mesh(local, segments_BT)


KERNELS: dict[str, Callable[[jax.Array], Read]] = {
    "auto": reference,  # where nobody has chosen
    "reference": reference,
    "splash": splash,
    "splash_emulated": partial(splash, interpret=True),
    "cudnn": cudnn,
    "cudnn_emulated": partial(cudnn, implementation="xla"),
}


def _on_mesh(local: Callable[..., jax.Array], segments_BT: jax.Array) -> Read:
    """`local` on every device's own rows and heads where a mesh is set; as it is otherwise."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return lambda q, k, v: local(q, k, v, segments_BT)

    def read(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        names = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        queries, keys = (
            check_divides("of attention", x.shape, axes, mesh) for x, axes in zip((q_BTNH, k_BTKH), names, strict=True)
        )
        N, K = q_BTNH.shape[2], k_BTKH.shape[2]

        def shared(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
            """Every device has all key-value heads: each query head takes the one that it reads."""
            own = q_BTNH.shape[2]
            reads_N = (lax.axis_index("tensor") * own + jnp.arange(own)) // (N // K)
            return local(q_BTNH, k_BTKH[:, :, reads_N], v_BTKH[:, :, reads_N], segments_BT)

        split = keys[2] is not None
        q_spec, k_spec, rows = (partition_spec(axes) for axes in (queries, keys, ("batch", None)))
        return jax.shard_map(
            local if split else shared, in_specs=(q_spec, k_spec, k_spec, rows), out_specs=q_spec, check_vma=False
        )(q_BTNH, k_BTKH, v_BTKH, segments_BT)

    return read


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    return jnp.pad(x, [(0, size - s if at == axis else 0) for at, s in enumerate(x.shape)])
