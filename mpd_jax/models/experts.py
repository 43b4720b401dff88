"""Mixture of experts: every token goes through the experts that its router chose, and none is ever dropped.

Choices are sorted by expert and multiplied in groups of exact sizes. On a mesh this happens in shard_map, rows over
data x fsdp and experts over tensor: a device computes only its own experts for its rows, and one sum over tensor adds
them up. Names as in types.py; X experts, C choices (tokens x experts a token), A and B the sides of any matrix.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mpd_jax.models.config import Experts
from mpd_jax.sharding import AXES, mesh_size, partition_spec

BLOCK = 8, 256  # fewest and most rows of one product where groups are multiplied block by block


def mixture(
    experts: Experts,
    x_BTD: jax.Array,
    router_DX: jax.Array,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
) -> jax.Array:
    """Every token's SwiGLU experts, weighted by its router and added up [B, T, D].

    Where rows do not divide over data x fsdp, each of those devices computes them all.
    """
    arrays = x_BTD, router_DX, gate_XDF, up_XDF, down_XFD
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return _local(experts, None, *arrays)
    row_axes, own = partition_spec(("batch",))[0], partition_spec(("experts",))
    if x_BTD.shape[0] % mesh_size(mesh, row_axes):
        row_axes = ()
    rows = P(row_axes or None)
    local = partial(_local, experts, row_axes)
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), own, own, own), out_specs=rows)(*arrays)


def route(experts: Experts, x_TD: jax.Array, router_DX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights [T, k] in the dtype of x and numbers [T, k] of the k likeliest experts; probabilities in float32."""
    logits_TX = jnp.dot(x_TD, router_DX, preferred_element_type=jnp.float32)
    weight_Tk, expert_Tk = lax.top_k(jax.nn.softmax(logits_TX, axis=-1), experts.per_token)
    if experts.normalised:
        weight_Tk = weight_Tk / jnp.sum(weight_Tk, axis=-1, keepdims=True)
    return weight_Tk.astype(x_TD.dtype), expert_Tk


def _local(experts: Experts, row_axes: tuple[str, ...] | None, x_BTD, router_DX, gate_XDF, up_XDF, down_XFD):
    """One device's experts for its rows, summed over tensor. row_axes: of the rows' parts; None outside shard_map."""
    X, (T, D) = gate_XDF.shape[0], (x_BTD.shape[0] * x_BTD.shape[1], x_BTD.shape[2])
    x_TD = x_BTD.reshape(T, D)
    weight_Tk, expert_Tk = route(experts, x_TD, router_DX)
    first, axes = 0, ()
    if row_axes is not None:
        # Every device goes on with values of its own; the way back sums over the devices what they share.
        first, axes = X * lax.axis_index("tensor"), (*row_axes, "tensor")
        x_TD, weight_Tk, expert_Tk = (_own(a, ("tensor",)) for a in (x_TD, weight_Tk, expert_Tk))
        gate_XDF, up_XDF, down_XFD = (_own(w, row_axes) for w in (gate_XDF, up_XDF, down_XFD))
    expert_C = expert_Tk.reshape(-1) - first
    expert_C = jnp.where((expert_C >= 0) & (expert_C < X), expert_C, X)  # those of other devices come last
    order_C = jnp.argsort(expert_C, stable=True)
    place_C = jnp.argsort(order_C)  # where each choice went
    sizes_X = jnp.sum(expert_C[:, None] == jnp.arange(X)[None, :], axis=0, dtype=jnp.int32)

    times = partial(_grouped, axes)
    x_CD = _sorted(x_TD, order_C, place_C)
    hidden_CF = jax.nn.silu(times(x_CD, gate_XDF, sizes_X)) * times(x_CD, up_XDF, sizes_X)
    y_TkD = _unsorted(times(hidden_CF, down_XFD, sizes_X), order_C, place_C).reshape(T, -1, D)
    y_TD = jnp.einsum("tk,tkd->td", weight_Tk, y_TkD)
    return (lax.psum(y_TD, "tensor") if axes else y_TD).reshape(x_BTD.shape)


def _own(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.pcast(x, axes, to="varying") if axes else x


# Both move rows by a permutation, so that the way back reads rows as well: nothing is scattered, no sum has an order.


@jax.custom_vjp
def _sorted(x_TD, order_C, place_C):
    """The token of every choice [C, D], choices in sorted order."""
    return x_TD[order_C // (len(order_C) // len(x_TD))]


@jax.custom_vjp
def _unsorted(y_CD, order_C, place_C):
    """The rows of sorted choices [C, D], a token's side by side."""
    return y_CD[place_C]


def _sum_of_choices(of_x, g_CD):
    place_C, tokens = of_x
    return jnp.sum(g_CD[place_C].reshape(tokens, -1, g_CD.shape[1]), axis=1), None, None


_sorted.defvjp(lambda x_TD, order_C, place_C: (_sorted(x_TD, order_C, place_C), (place_C, len(x_TD))), _sum_of_choices)
_unsorted.defvjp(
    lambda y_CD, order_C, place_C: (_unsorted(y_CD, order_C, place_C), order_C),
    lambda order_C, g_CD: (g_CD[order_C], None, None),
)


# Grouped products: rows lie group after group, each group has a matrix of its own, and rows beyond the groups give
# zero. XLA has them for TPU alone, and not for the matrices' gradients: elsewhere its ragged_dot makes a copy of all
# rows for every matrix.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(axes: tuple[str, ...], x_CA, w_XAB, sizes_X):
    """[C, B]: the rows of each group times its matrix."""
    return lax.platform_dependent(x_CA, w_XAB, sizes_X, tpu=_ragged, default=partial(_in_blocks, axes))


def _grouped_forward(axes, x_CA, w_XAB, sizes_X):
    return _grouped(axes, x_CA, w_XAB, sizes_X), (x_CA, w_XAB, sizes_X)


def _grouped_backward(axes, held, g_CB):
    x_CA, w_XAB, sizes_X = held
    dx_CA = _grouped(axes, g_CB, w_XAB.swapaxes(1, 2), sizes_X)
    dw_XAB = _outer_in_blocks(axes, x_CA, g_CB, sizes_X)
    return dx_CA, dw_XAB.astype(w_XAB.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _precision(x: jax.Array) -> lax.Precision | None:
    """Said aloud, for the way back is traced where no default is set."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _ragged(x_CA, w_XAB, sizes_X):
    y_CB = lax.ragged_dot(x_CA, w_XAB, sizes_X, precision=_precision(x_CA))
    return jnp.where((jnp.arange(len(y_CB)) < jnp.sum(sizes_X))[:, None], y_CB, 0)


def _in_blocks(axes, x_CA, w_XAB, sizes_X):
    def step(index, y_CB):
        group, at, mine_c1 = block(index)
        x_cA = lax.dynamic_slice_in_dim(x_CA, at, rows)
        y_cB = lax.dot(x_cA, w_XAB[group], precision=_precision(x_CA), preferred_element_type=jnp.float32)
        y_cB = jnp.where(mine_c1, y_cB.astype(y_CB.dtype), lax.dynamic_slice_in_dim(y_CB, at, rows))
        return lax.dynamic_update_slice_in_dim(y_CB, y_cB, at, 0)

    rows, blocks, block = _blocks(len(x_CA), sizes_X)
    zero_CB = _own(jnp.zeros((len(x_CA), w_XAB.shape[2]), x_CA.dtype), axes)
    return lax.fori_loop(0, blocks, step, zero_CB)


def _outer_in_blocks(axes, x_CA, g_CB, sizes_X):
    def step(index, dw_XAB):
        group, at, mine_c1 = block(index)
        x_cA, g_cB = (lax.dynamic_slice_in_dim(a, at, rows) for a in (x_CA, g_CB))
        dims = (((0,), (0,)), ((), ()))
        return dw_XAB.at[group].add(
            lax.dot_general(
                jnp.where(mine_c1, x_cA, 0), g_cB, dims, _precision(x_CA), preferred_element_type=jnp.float32
            )
        )

    rows, blocks, block = _blocks(len(x_CA), sizes_X)
    zero_XAB = _own(jnp.zeros((len(sizes_X), x_CA.shape[1], g_CB.shape[1]), jnp.float32), axes)
    return lax.fori_loop(0, blocks, step, zero_XAB)


def _blocks(choices: int, sizes_X):
    """Rows a block, how many blocks the groups fill, and block(i) -> (group, first row, which rows count [c, 1])."""
    rows = min(choices, max(BLOCK[0], min(BLOCK[1], 1 << (choices // len(sizes_X)).bit_length())))
    blocks_X = -(-sizes_X // rows)
    last_X, end_X = jnp.cumsum(blocks_X), jnp.cumsum(sizes_X)

    def block(index):
        group = jnp.sum(last_X <= index)
        start = end_X[group] - sizes_X[group] + (index - last_X[group] + blocks_X[group]) * rows
        at = jnp.minimum(start, choices - rows)  # a slice beyond the last row would be moved
        row_c = at + jnp.arange(rows)
        return group, at, ((row_c >= start) & (row_c < end_X[group]))[:, None]

    return rows, last_X[-1], block
