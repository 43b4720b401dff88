"""The chunked kernel under recipe.loss: vocabulary head, softmax, divergence and gradients, a few rows at a time.

One scan walks over chunks of rows. A chunk's [c, V] arrays are all that ever exists of the logits, so the gradients of
the student's hidden states and head are taken while they are there; backward only multiplies them by the incoming
cotangent. On a mesh the scan runs inside shard_map, rows over data x fsdp, vocabulary over tensor: heads are gathered
before it, single numbers a row are summed over tensor in it, gradients are summed after it. Names as in types.py, sizes
being one device's; c is a chunk's rows.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from mpd_jax.recipe.loss import LossConfig

# Stands for -inf in the logits of padded columns: exp gives 0, and differences of two of them stay finite.
ABSENT = -1e30


@dataclass(frozen=True)
class Spec:
    """What is static about one call. loss None is cross-entropy; vocab_size None means that no column is padding.

    top: the target is known by its most likely ids, not by hidden states and a head.
    merged: ids that are one outcome.
    """

    loss: "LossConfig | None"
    mesh: Mesh | None
    vocab_size: int | None
    chunk: int
    top: bool = False
    merged: tuple[int, ...] = ()

    def axis_size(self, name: str) -> int:
        return self.mesh.shape.get(name, 1) if self.mesh is not None else 1

    @property
    def row_axes(self) -> tuple[str, ...]:
        return tuple(name for name in ("data", "fsdp") if self.axis_size(name) > 1)

    @property
    def row_shards(self) -> int:
        return self.axis_size("data") * self.axis_size("fsdp")

    @property
    def vocab_axis(self) -> str | None:
        return "tensor" if self.axis_size("tensor") > 1 else None

    def head_spec(self, width: int) -> P:
        """How a head [V, width] lies on the mesh: vocabulary over tensor, width over fsdp where it divides."""
        shards = self.axis_size("fsdp")
        return P(self.vocab_axis, "fsdp" if shards > 1 and width % shards == 0 else None)

    @property
    def labelled(self) -> bool:
        return self.loss is None or self.loss.kind == "policy_gradient"

    @property
    def by_row(self) -> int:
        """How many of the arrays that stand for the target have a row for each of the student's, the first ones."""
        return 2 if self.top or (self.loss is not None and self.labelled) else 1

    def placement(self, h_RD, other) -> tuple:
        """How the arguments of `fused_loss` lie on the mesh."""
        rows = P(self.row_axes or None)
        heads = (self.head_spec(other[0].shape[1]),) if len(other) > self.by_row else ()
        return rows, self.head_spec(h_RD.shape[1]), (rows,) * self.by_row + heads, rows


def _plain(spec: Spec, h_RD, W_VD, other, weight_R) -> tuple[jax.Array, dict[str, jax.Array]]:
    value, stats, _ = _run(spec, False, h_RD, W_VD, other, weight_R)
    return value, stats


def _forward(spec, h_RD, W_VD, other, weight_R):
    value, stats, gradients = _run(spec, True, h_RD, W_VD, other, weight_R)
    return (value, stats), gradients


def _backward(spec, gradients, cotangents):
    scale = cotangents[0]
    dh_RD, dW_VD = ((g.astype(jnp.float32) * scale).astype(g.dtype) for g in gradients)
    return dh_RD, dW_VD, None, None


# (spec, h_RD, W_VD, other, weight_R) -> weighted sum, per-row stats. `other` is (h_target_RE, W_target_VE), or for a
# policy gradient (h_target_RE, label_R, W_target_VE), or (top_ids_RK, top_logprobs_RK), or (label_R,) for
# cross-entropy. R divides over the mesh's rows, V over tensor. Differentiable in h_RD and W_VD alone.
fused_loss = jax.custom_vjp(_plain, nondiff_argnums=(0,))
fused_loss.defvjp(_forward, _backward)


def _run(spec: Spec, with_gradient: bool, h_RD, W_VD, other, weight_R):
    local = partial(_local, spec, with_gradient)
    if spec.mesh is None:
        return local(h_RD, W_VD, other, weight_R)
    placement = spec.placement(h_RD, other)
    gradients = placement[:2] if with_gradient else None
    sharded = jax.shard_map(
        local, mesh=spec.mesh, in_specs=placement, out_specs=(P(), placement[0], gradients), check_vma=False
    )
    return sharded(h_RD, W_VD, other, weight_R)


def _local(spec: Spec, with_gradient: bool, h_RD, W_VD, other, weight_R):
    """One device's share: its rows against its slice of the vocabulary."""
    R, D = h_RD.shape
    V = W_VD.shape[0]
    W_dtype = W_VD.dtype
    W_VD = _whole_width(spec, W_VD, D, h_RD.dtype)
    if len(other) > spec.by_row:
        K_VE = _whole_width(spec, other[-1], other[0].shape[1], other[0].dtype)
    column_V = jnp.arange(V, dtype=jnp.int32)
    if spec.vocab_axis:
        column_V = column_V + V * lax.axis_index(spec.vocab_axis)

    def chunk_step(dW_DV, packed):
        h_cD, hT_Dc, rows_c, weight_c = packed
        used = weight_c != 0
        h_cD = _unpack(jnp.where(used[:, None], h_cD, 0), h_RD)
        s_cV = _logits(spec, h_cD, W_VD, column_V)
        if spec.top:
            assert spec.loss is not None
            ids_cK, logprobs_cK = rows_c
            logprobs_cK = jnp.where(used[:, None], logprobs_cK, 0)
            loss_c, stats, slope_cV = bucket_divergence(spec, spec.loss, s_cV, ids_cK, logprobs_cK, column_V)
        else:
            t_cV = None
            if spec.loss is not None:
                k_cE = _unpack(jnp.where(used[:, None], rows_c[0], 0), other[0])
                t_cV = _logits(spec, k_cE, K_VE, column_V)
            label_c = jnp.where(used, rows_c[-1], 0) if spec.labelled else None
            loss_c, stats, slope_cV = _of_outcomes(spec, s_cV, t_cV, label_c, column_V)
        stats = {name: jnp.where(used, x, 0.0) for name, x in stats.items()}
        out = (jnp.where(used, weight_c * loss_c, 0.0), stats)
        if not with_gradient:
            return dW_DV, (*out, None)
        g_cV = (weight_c[:, None] * slope_cV).astype(h_cD.dtype)
        dh_cD = _product(g_cV, W_VD, 1, 0)
        if not spec.vocab_axis:
            dh_cD = _pack(dh_cD.astype(h_cD.dtype))
        hT_Dc = _unpack(jnp.where(used[None, :], hT_Dc, 0), h_RD)
        return dW_DV + _product(hT_Dc, g_cV, 1, 0), (*out, dh_cD)

    chunk = chunk_rows(R, V, D, spec.chunk)
    by_chunk = partial(_by_chunk, chunk=chunk)
    h_ncD = by_chunk(_pack(h_RD))
    # The head's gradient is built transposed: [D, c] x [c, V] needs no transpose of the large operand.
    hT_nDc = h_ncD.swapaxes(1, 2) if with_gradient else None
    rows = tuple(by_chunk(_pack(x)) for x in other[: spec.by_row])
    xs = (h_ncD, hT_nDc, rows, by_chunk(weight_R))
    dW_DV = jnp.zeros((D, V), jnp.float32) if with_gradient else None
    dW_DV, (weighted, stats, dh) = lax.scan(chunk_step, dW_DV, xs)

    def flat(x):
        return x.reshape((-1, *x.shape[2:]))[:R]

    value = jnp.sum(weighted)
    if spec.row_axes:
        value = lax.psum(value, spec.row_axes)
    stats = jax.tree.map(flat, stats)
    if not with_gradient:
        return value, stats, None
    dh_RD = flat(dh)
    dh_RD = lax.psum(dh_RD, spec.vocab_axis).astype(h_RD.dtype) if spec.vocab_axis else _unpack(dh_RD, h_RD)
    return value, stats, (dh_RD, _summed_over_rows(spec, dW_DV, D).T.astype(W_dtype))


def chunk_rows(rows: int, vocab: int, width: int, asked: int) -> int:
    """Rows a chunk. Unasked, the four or so [c, V] arrays alive at once take the room of the head's fp32 gradient."""
    limit = asked or max(width // 4, 2**22 // vocab, 8)
    even = -(-rows // max(1, -(-rows // limit)))
    return max(1, min(limit, even if asked else -(-even // 8) * 8))


def _by_chunk(x, chunk: int):
    rows = x.shape[0]
    x = jnp.pad(x, [(0, -rows % chunk)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape((-1, chunk, *x.shape[1:]))


def _pack(x):
    """16-bit floats as integers: XLA:CPU widens whole arrays of them to fp32 when a loop slices them."""
    return lax.bitcast_convert_type(x, jnp.uint16) if jnp.issubdtype(x.dtype, jnp.floating) and _short(x) else x


def _unpack(x, like):
    return lax.bitcast_convert_type(x, like.dtype) if jnp.issubdtype(like.dtype, jnp.floating) and _short(like) else x


def _short(x) -> bool:
    return x.dtype.itemsize == 2


def _whole_width(spec: Spec, W_VD, width: int, dtype):
    W_VD = W_VD.astype(dtype)
    return W_VD if W_VD.shape[1] == width else lax.all_gather(W_VD, "fsdp", axis=1, tiled=True)


def _summed_over_rows(spec: Spec, dW_DV, width: int) -> jax.Array:
    """The rows' contributions added up, each device keeping the part of the width that its head shard has."""
    axes = spec.row_axes
    if spec.head_spec(width)[1]:
        dW_DV = lax.psum_scatter(dW_DV, "fsdp", scatter_dimension=0, tiled=True)
        axes = tuple(name for name in axes if name != "fsdp")
    return lax.psum(dW_DV, axes) if axes else dW_DV


def _product(a, b, a_axis: int, b_axis: int):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _logits(spec: Spec, h_cD, W_VD, column_V):
    s_cV = _product(h_cD, W_VD, 1, 1)
    return s_cV if spec.vocab_size is None else jnp.where((column_V < spec.vocab_size)[None, :], s_cV, ABSENT)


def _row_sums(spec: Spec, *entries_cV):
    """Each array summed over the whole vocabulary, in one collective."""
    sums = jnp.stack([jnp.sum(x, axis=-1) for x in entries_cV])
    return tuple(lax.psum(sums, spec.vocab_axis) if spec.vocab_axis else sums)


def _row_maxima(spec: Spec, *entries_cV):
    maxima = jnp.stack([jnp.max(x, axis=-1) for x in entries_cV])
    return tuple(lax.pmax(maxima, spec.vocab_axis) if spec.vocab_axis else maxima)


def _of_outcomes(spec: Spec, s_cV, t_cV, label_c, column_V):
    """Loss, stats and slope with respect to the student's logits. Outcomes are the tokens, `merged` ones being one,
    whose logit is their logsumexp; each of them takes its share of the outcome's slope."""
    at_M, share_cM = jnp.array(spec.merged, jnp.int32), None
    if spec.merged:
        if label_c is not None:
            label_c = jnp.where(jnp.isin(label_c, at_M), spec.merged[0], label_c)
        at_M = _here(at_M, column_V)
        s_cV, share_cM = _merge(spec, s_cV, at_M)
        t_cV = None if t_cV is None else _merge(spec, t_cV, at_M)[0]
    if spec.loss is None:
        loss_c, stats, slope_cV = _cross_entropy(spec, s_cV, label_c, column_V)
    elif label_c is None:
        loss_c, stats, slope_cV = _divergence(spec, spec.loss, s_cV, t_cV)
    else:
        loss_c, stats, slope_cV = _policy_gradient(spec, spec.loss, s_cV, t_cV, label_c, column_V)
    if share_cM is not None:
        slope_cV = slope_cV.at[:, at_M].set(_values(spec, slope_cV, at_M[:1]) * share_cM, mode="drop")
    return loss_c, stats, slope_cV


def _merge(spec: Spec, x_cV, at_M) -> tuple[jax.Array, jax.Array]:
    """The logits with these columns as one outcome, in the first of them, and each one's share of it."""
    x_cM = _values(spec, x_cV, at_M)
    whole_c1 = jax.nn.logsumexp(x_cM, axis=1, keepdims=True)
    one_cM = jnp.full_like(x_cM, ABSENT).at[:, :1].set(whole_c1)
    return x_cV.at[:, at_M].set(one_cM, mode="drop"), jnp.exp(x_cM - whole_c1)


def _here(ids, column_V):
    """The columns of these ids in this device's slice of the vocabulary; its length where they are elsewhere."""
    at = ids - column_V[0]
    return jnp.where((at >= 0) & (at < column_V.shape[0]), at, column_V.shape[0])


def _values(spec: Spec, x_cV, at):
    """x at these columns of each row, [K] or [c, K], whichever device has them; 0 where none has."""
    at_cK = jnp.broadcast_to(at, (x_cV.shape[0], at.shape[-1]))
    x_cK = jnp.where(at_cK < x_cV.shape[1], jnp.take_along_axis(x_cV, at_cK, axis=1, mode="clip"), 0.0)
    return lax.psum(x_cK, spec.vocab_axis) if spec.vocab_axis else x_cK


def _policy_gradient(spec: Spec, loss: "LossConfig", s_cV, t_cV, label_c, column_V):
    """-A log q(label) with the advantage A = (log p - log q)(label) + KL(q||p) held fixed; the stats are reverse_kl's.

    Its slope A (q - one_label) is that of KL(q||p) in expectation over labels drawn from q. The KL is the mean of
    -(log p - log q) under q, so that it is the baseline that leaves A no mean, in closed form (vOPD, 2605.07865).
    """
    kl_c, stats, _ = _divergence(spec, replace(loss, kind="reverse_kl"), s_cV, t_cV)
    own_c, _, slope_cV = _cross_entropy(spec, s_cV, label_c, column_V)
    advantage_c = own_c - _cross_entropy(spec, t_cV, label_c, column_V)[0] + kl_c
    return advantage_c * own_c, stats, advantage_c[:, None] * slope_cV


def _cross_entropy(spec: Spec, s_cV, label_c, column_V):
    """Loss, stats and slope with respect to the logits; a label outside the vocabulary makes its row NaN."""
    (top_c,) = _row_maxima(spec, s_cV)
    z_cV = s_cV - top_c[:, None]
    e_cV = jnp.exp(z_cV)
    hit_cV = label_c[:, None] == column_V[None, :]
    S_c, ez_c, z_label_c, hits_c = _row_sums(
        spec, e_cV, e_cV * z_cV, jnp.where(hit_cV, z_cV, 0.0), hit_cV & (z_cV > ABSENT / 2)
    )
    loss_c = jnp.where(hits_c == 1, jnp.log(S_c) - z_label_c, jnp.nan)
    slope_cV = e_cV / S_c[:, None] - hit_cV
    return loss_c, {"loss": loss_c, "student_entropy": jnp.log(S_c) - ez_c / S_c}, slope_cV


def _divergence(spec: Spec, loss: "LossConfig", s_cV, t_cV):
    """Stabilised loss, stats and slope of the former with respect to the student's logits s.

    Everything is written in d = log q - log p (q student, p target), formed from logits shifted first, so that equal
    inputs give exactly 0. If the loss is the sum of f_i(q_i), its slope in s_i is a_i - q_i * sum(a), with
    a_i = q_i f_i'(q_i). `_entries` leaves a multiple k of q out of a: unless an entry is clipped it drops out anyway.
    """
    top_s_c, top_t_c = _row_maxima(spec, s_cV, t_cV)
    z_cV, y_cV = s_cV - top_s_c[:, None], t_cV - top_t_c[:, None]
    e_cV, f_cV = jnp.exp(z_cV), jnp.exp(y_cV)
    S_c, T_c, ez_c, fy_c = _row_sums(spec, e_cV, f_cV, e_cV * z_cV, f_cV * y_cV)
    q_cV, p_cV = e_cV / S_c[:, None], f_cV / T_c[:, None]
    d_cV = z_cV - y_cV - jnp.log(S_c / T_c)[:, None]
    term_cV, a_cV, k = _entries(loss, d_cV, q_cV, p_cV)
    if loss.stabiliser == "per_entry":
        keep_cV = term_cV <= loss.clip
        a_cV = jnp.where(keep_cV, a_cV, -k * q_cV)
        raw_c, used_c, a_c = _row_sums(spec, term_cV, jnp.where(keep_cV, term_cV, loss.clip), a_cV)
    else:
        raw_c, a_c = _row_sums(spec, term_cV, a_cV)
        used_c = raw_c
    slope_cV = a_cV - q_cV * a_c[:, None]
    if loss.stabiliser == "rescale":
        scale_c = jnp.where(raw_c > loss.clip, loss.clip / raw_c, 1.0)
        used_c, slope_cV = scale_c * raw_c, scale_c[:, None] * slope_cV
    entropies = {"student_entropy": jnp.log(S_c) - ez_c / S_c, "target_entropy": jnp.log(T_c) - fy_c / T_c}
    return used_c, {"loss": raw_c, **entropies}, slope_cV


def bucket_divergence(spec: Spec, loss: "LossConfig", s_cV, ids_cK, logprobs_cK, column_V):
    """As `_divergence`, of K + 1 outcomes: the ids that the target is known at, and all other tokens as one.

    An outcome has a logit too, the tokens' logsumexp, so that `_divergence` reads the outcomes as a vocabulary; each
    token of the rest takes its share of the rest's slope. An id outside the vocabulary is no outcome: what the target
    gives it falls to the rest. Float64 where the arrays are.
    """
    vocab = spec.vocab_size or column_V.shape[0] * spec.axis_size("tensor")
    known_cK = (ids_cK >= 0) & (ids_cK < vocab)
    at_cK = _here(jnp.where(known_cK, ids_cK, -1), column_V)
    s_cK = jnp.where(known_cK, _values(spec, s_cV, at_cK), ABSENT)
    rest_cV = _put(s_cV, at_cK, jnp.full_like(s_cK, ABSENT))
    (top_c,) = _row_maxima(spec, rest_cV)
    z_cV = rest_cV - top_c[:, None]
    e_cV = jnp.exp(z_cV)
    S_c, ez_c = _row_sums(spec, e_cV, e_cV * z_cV)
    # Log-probabilities that add up to one do so within a few roundings: of a smaller rest nothing is known.
    p_cK = jnp.where(known_cK, jnp.exp(logprobs_cK), 0.0)
    left_c = jnp.maximum(1 - jnp.sum(p_cK, axis=1), 8 * jnp.finfo(s_cV.dtype).eps)
    left_c = jnp.where(top_c > ABSENT / 2, jnp.log(left_c), ABSENT)
    s_cO = jnp.concatenate([s_cK, (top_c + jnp.log(S_c))[:, None]], axis=1)
    t_cO = jnp.concatenate([jnp.where(known_cK, logprobs_cK, ABSENT), left_c[:, None]], axis=1)
    used_c, stats, slope_cO = _divergence(replace(spec, mesh=None), loss, s_cO, t_cO)
    tails = {"tail_mass": jax.nn.softmax(t_cO)[:, -1], "student_tail_mass": jax.nn.softmax(s_cO)[:, -1]}
    inside_c = tails["student_tail_mass"] * (jnp.log(S_c) - ez_c / S_c)
    stats = {**stats, "student_entropy": stats["student_entropy"] + inside_c, **tails}
    slope_cV = _put(e_cV * (slope_cO[:, -1] / S_c)[:, None], at_cK, slope_cO[:, :-1])
    return used_c, stats, slope_cV


_put = jax.vmap(lambda row_V, at_K, values_K: row_V.at[at_K].set(values_K, mode="drop"))


def _entries(loss: "LossConfig", d, q, p) -> tuple[Any, Any, float]:
    """Each vocabulary entry's term of the divergence, its a of `_divergence`, and the k of that a."""
    match loss.kind:
        case "reverse_kl":
            return q * d, q * d, 1.0
        case "forward_kl":
            return -p * d, q - p, -1.0
        case "mix":
            u = loss.reverse_weight
            return u * (q * d) - (1 - u) * (p * d), u * (q * d) + (1 - u) * (q - p), 2 * u - 1
        case "jsd":
            # log(q/m) and log(p/m) of the mixture m, by the side on which the exponential cannot overflow.
            b = loss.teacher_weight
            x = jnp.log1p(jnp.where(d > 0, b, 1 - b) * jnp.expm1(-jnp.abs(d)))
            q_side = (1 - b) * q * (jnp.minimum(d, 0) - x)
            return b * p * (jnp.minimum(-d, 0) - x) + q_side, q_side, 0.0
        case _:
            raise AssertionError(loss.kind)
