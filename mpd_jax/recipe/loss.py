"""How the distance between student and target is measured: the loss axis of a recipe.

`fused_divergence` is what training uses; it takes hidden states and heads, and the [rows, vocabulary] arrays of neither
model ever exist whole (kernel in recipe/fused.py). `fused_bucket_divergence` is for a target of which the most likely
tokens alone are known. `dense_divergence` is the first one's contract in plain jnp, for tests and the benchmark.
Conventions: q student, p target; reverse_kl is KL(q||p), forward_kl is KL(p||q).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Num, Shaped

from mpd_jax.recipe.fused import ABSENT, Spec, fused_loss
from mpd_jax.types import UserError

Kind = Literal["reverse_kl", "forward_kl", "jsd", "mix", "policy_gradient", "cross_entropy"]
Stabiliser = Literal["none", "rescale", "per_entry"]
Reduction = Literal["token_mean", "sum"]


@dataclass(frozen=True)
class LossConfig:
    """The loss of a recipe.

    kind            policy_gradient estimates reverse_kl's gradient from the token that the student drew, with the KL
                    as baseline (vOPD, 2605.07865): what is minimised is -A log q(token), A = (log p - log q)(token) +
                    KL(q||p) without gradient.
    teacher_weight  jsd: b in m = b p + (1 - b) q, loss b KL(p||m) + (1 - b) KL(q||m); strictly between 0 and 1.
    reverse_weight  mix: u in u KL(q||p) + (1 - u) KL(p||q).
    stabiliser      "rescale" multiplies a token's loss by min(1, clip / loss), without gradient through the factor: it
                    keeps the gradient's direction. "per_entry" replaces every vocabulary entry's term above `clip` by
                    `clip` before the sum, as the OPSD code does. It is here for reproduction: large positive terms lose
                    their gradient, negative ones keep theirs, so loss and step can point the wrong way.
    merge_stops     all ids that end the student's responses are one outcome, whose probability is their sum on both
                    sides: a target that ends by another of them is no divergence (2609.20511).
    token_weight    a function of recipe/weights.py, or package.module:function, whose value each token's weight is
                    multiplied by; "none" does nothing. Any other costs one more forward pass of both models.
    reduction       what `weight_R` is made of: "token_mean" divides by the step's token count, "sum" does not.
    chunk           rows a chunk at most; 0 chooses by size.
    """

    kind: Kind = "reverse_kl"
    teacher_weight: float = 0.5
    reverse_weight: float = 0.5
    stabiliser: Stabiliser = "none"
    clip: float = 0.05
    merge_stops: bool = False
    token_weight: str = "none"
    reduction: Reduction = "token_mean"
    chunk: int = 0

    def __post_init__(self):
        for key, allowed in (("kind", Kind), ("stabiliser", Stabiliser), ("reduction", Reduction)):
            if getattr(self, key) not in get_args(allowed):
                _refuse(key, getattr(self, key), f"one of {', '.join(get_args(allowed))}")
        if not 0 < self.teacher_weight < 1:
            remedy = "strictly between 0 and 1 (at either end the divergence is 0: use kind=forward_kl or reverse_kl)"
            _refuse("teacher_weight", self.teacher_weight, remedy)
        if not 0 <= self.reverse_weight <= 1:
            _refuse("reverse_weight", self.reverse_weight, "from 0 to 1")
        if not 0 < self.clip < float("inf"):
            _refuse("clip", self.clip, "positive and finite (stabiliser=none switches it off)")
        if self.chunk < 0:
            _refuse("chunk", self.chunk, "0 (chosen by size) or a positive number of rows")
        if self.kind in ("cross_entropy", "policy_gradient") and self.stabiliser != "none":
            why = "has no target to clip against" if self.kind == "cross_entropy" else "is no divergence to clip"
            _refuse("stabiliser", self.stabiliser, f"none beside kind={self.kind}, which {why}")


def fused_divergence(
    h_student_RD: Float[Array, "R D"],
    W_student_VD: Float[Array, "V D"],
    h_target_RE: Float[Array, "R E"],
    W_target_VE: Float[Array, "U E"],
    weight_R: Float[Array, "R"],
    *,
    loss: LossConfig,
    label_R: Int[Array, "R"] | None = None,
    merged: Sequence[int] = (),
    mesh: Mesh | None = None,
    vocab_size: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "R"]]]:
    """sum_r weight_r * divergence(student_r, target_r) in nats, and per-row stats; exact gradients at chunk memory.

    weight_R carries mask, token weight and reduction (1 / global token count); a row of weight 0 has no influence,
    whatever stands in it. Stats, fp32 [R] without gradient, 0 in rows of weight 0: "loss" (unweighted, before the
    stabiliser), "student_entropy", "target_entropy". Gradients reach h_student_RD and W_student_VD only. Products take
    operands in the hidden states' dtype and accumulate in fp32.
    label_R: the tokens that policy_gradient reads; its stat "loss" is the reverse KL. One outside the vocabulary makes
    the loss NaN. merged: ids that are one outcome on both sides, in the stats too.
    vocab_size is the number of real vocabulary rows, the first ones of both heads; rows beyond it are masked on both
    sides, and the heads may then differ in length. mesh has axes among data, fsdp (rows) and tensor (vocabulary).
    """
    if loss.kind == "cross_entropy":
        _refuse("kind", loss.kind, "a divergence here; labels go to fused_cross_entropy")
    if (loss.kind == "policy_gradient") != (label_R is not None):
        _refuse("kind", loss.kind, "policy_gradient where label_R is given, and only there")
    lengths = (W_student_VD.shape[0], W_target_VE.shape[0])
    _check_shapes(h_student_RD, W_student_VD, weight_R, vocab_size)
    _check_shapes(h_target_RE, W_target_VE, weight_R, vocab_size)
    if vocab_size is None and lengths[0] != lengths[1]:
        _refuse(
            "vocab_size", None, f"the real vocabulary size, because the heads have {lengths[0]} and {lengths[1]} rows"
        )
    spec, vocab = _spec(loss, mesh, vocab_size, min(lengths), loss.chunk, merged)
    labels = () if label_R is None else (label_R,)
    other = (lax.stop_gradient(h_target_RE), *labels, _to_length(lax.stop_gradient(W_target_VE), vocab))
    return _on_divisible_rows(spec, h_student_RD, _to_length(W_student_VD, vocab), other, weight_R)


def fused_bucket_divergence(
    h_student_RD: Float[Array, "R D"],
    W_student_VD: Float[Array, "V D"],
    top_ids_RK: Int[Array, "R K"],
    top_logprobs_RK: Float[Array, "R K"],
    weight_R: Float[Array, "R"],
    *,
    loss: LossConfig,
    mesh: Mesh | None = None,
    vocab_size: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "R"]]]:
    """`fused_divergence` against a target of which K tokens are known, the K most likely for the closest figure.

    Both sides become distributions over K + 1 outcomes, those tokens and all others as one, and the divergence is that
    of the two. Such a grouping never raises one: it is at most the divergence of the whole distributions, grows with K
    and equals it at K = V. The student's softmax is whole, so its tail is exact; the target's is what its
    probabilities leave of one, known to about 1e-6. Within the tail nothing pulls the student.
    top_ids_RK differ within a row; an id outside the vocabulary (-1) is no outcome, and its mass is the tail's. Stats
    as there ("target_entropy" is that of the outcomes), and "tail_mass", "student_tail_mass".
    """
    no_divergence = loss.kind in ("cross_entropy", "policy_gradient")
    if no_divergence or loss.stabiliser == "per_entry":
        key = "kind" if no_divergence else "stabiliser"
        allowed = "none or rescale for a tail bucket: per_entry clips single tokens, and a bucket is none"
        _refuse(key, getattr(loss, key), allowed if key == "stabiliser" else "a divergence here")
    _check_shapes(h_student_RD, W_student_VD, weight_R, vocab_size)
    spec, vocab = _spec(loss, mesh, vocab_size, W_student_VD.shape[0], loss.chunk)
    other = (top_ids_RK, lax.stop_gradient(top_logprobs_RK).astype(jnp.float32))
    return _on_divisible_rows(replace(spec, top=True), h_student_RD, _to_length(W_student_VD, vocab), other, weight_R)


def fused_cross_entropy(
    h_RD: Float[Array, "R D"],
    W_VD: Float[Array, "V D"],
    label_R: Int[Array, "R"],
    weight_R: Float[Array, "R"],
    *,
    merged: Sequence[int] = (),
    mesh: Mesh | None = None,
    vocab_size: int | None = None,
    chunk: int = 0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "R"]]]:
    """sum_r weight_r * -log q_r(label_r), and stats "loss", "student_entropy"; otherwise as `fused_divergence`.

    A label outside the vocabulary makes the loss NaN, unless its weight is 0.
    """
    _check_shapes(h_RD, W_VD, weight_R, vocab_size)
    spec, vocab = _spec(None, mesh, vocab_size, W_VD.shape[0], chunk, merged)
    return _on_divisible_rows(spec, h_RD, _to_length(W_VD, vocab), (label_R,), weight_R)


def dense_divergence(
    h_student_RD: Float[Array, "R D"],
    W_student_VD: Float[Array, "V D"],
    h_target_RE: Float[Array, "R E"],
    W_target_VE: Float[Array, "U E"],
    weight_R: Float[Array, "R"],
    *,
    loss: LossConfig,
    label_R: Int[Array, "R"] | None = None,
    merged: Sequence[int] = (),
    mesh: Mesh | None = None,
    vocab_size: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "R"]]]:
    """`fused_divergence` as a textbook writes it: both [R, V] arrays whole, gradients by autodiff. Ignores `mesh`."""
    used = weight_R != 0

    def head(h, W):
        precision = lax.Precision.HIGHEST if h.dtype == jnp.float32 else None
        h, W = jnp.where(used[:, None], h, 0), W[:vocab_size].astype(h.dtype)
        dims = (((1,), (1,)), ((), ()))
        return lax.dot_general(h, W, dims, precision=precision, preferred_element_type=jnp.float32)

    def log_outcomes(h, W):
        lx, at = jax.nn.log_softmax(head(h, W)), jnp.array(merged, jnp.int32)
        if not merged:
            return lx
        return lx.at[:, at].set(ABSENT).at[:, at[0]].set(jax.nn.logsumexp(lx[:, at], axis=1))

    lq = log_outcomes(h_student_RD, W_student_VD)
    lp = lax.stop_gradient(log_outcomes(h_target_RE, W_target_VE))
    q, p = jnp.exp(lq), jnp.exp(lp)
    match loss.kind:
        case "reverse_kl" | "policy_gradient":
            term = q * (lq - lp)
        case "forward_kl":
            term = p * (lp - lq)
        case "mix":
            term = loss.reverse_weight * q * (lq - lp) + (1 - loss.reverse_weight) * p * (lp - lq)
        case "jsd":
            b = loss.teacher_weight
            lm = jnp.logaddexp(jnp.log(b) + lp, jnp.log1p(-b) + lq)
            term = b * p * (lp - lm) + (1 - b) * q * (lq - lm)
        case _:
            raise AssertionError(loss.kind)
    raw = row = jnp.sum(term, axis=-1)
    if loss.stabiliser == "per_entry":
        row = jnp.sum(jnp.where(term <= loss.clip, term, loss.clip), axis=-1)
    elif loss.stabiliser == "rescale":
        row = lax.stop_gradient(jnp.where(raw > loss.clip, loss.clip / raw, 1.0)) * raw
    elif loss.kind == "policy_gradient":
        assert label_R is not None
        if merged:
            label_R = jnp.where(jnp.isin(label_R, jnp.array(merged)), merged[0], label_R)
        lq_R, lp_R = (jnp.take_along_axis(lx, label_R[:, None], axis=1)[:, 0] for lx in (lq, lp))
        row = -lax.stop_gradient(lp_R - lq_R + raw) * lq_R
    stats = {"loss": raw, "student_entropy": -jnp.sum(q * lq, axis=-1), "target_entropy": -jnp.sum(p * lp, axis=-1)}
    stats = {name: lax.stop_gradient(jnp.where(used, x, 0.0)) for name, x in stats.items()}
    return jnp.sum(jnp.where(used, weight_R * row, 0.0)), stats


def masked_mean(x: Num[Array, "*shape"], mask: Shaped[Array, "*shape"]) -> Float[Array, ""]:
    """Mean of x where mask is not 0, in fp32; 0 (with gradient 0) where nothing is. What is masked may be NaN."""
    kept = mask != 0
    return jnp.sum(jnp.where(kept, x.astype(jnp.float32), 0.0)) / jnp.maximum(jnp.sum(kept), 1)


def _spec(
    loss: LossConfig | None,
    mesh: Mesh | None,
    vocab_size: int | None,
    shortest: int,
    chunk: int,
    merged: Sequence[int] = (),
) -> tuple[Spec, int]:
    """The kernel's static part, and the length that heads are brought to: equal, and divisible over the mesh."""
    spec = Spec(loss, mesh, vocab_size, chunk)
    shards = spec.axis_size("tensor")
    vocab = -(-shortest // shards) * shards
    real = shortest if vocab_size is None else vocab_size
    outside = [id for id in merged if not 0 <= id < real]
    if outside:
        raise UserError(f"merged: {outside} stand outside the vocabulary of {real} tokens; leave them out")
    return Spec(loss, mesh, None if real == vocab else real, chunk, merged=tuple(merged)), vocab


def _on_divisible_rows(spec: Spec, h_RD, W_VD, other, weight_R):
    """The kernel on rows padded to divide over the mesh; what is appended has weight 0."""
    R = weight_R.shape[0]
    whole = -(-R // spec.row_shards) * spec.row_shards
    weight_R = _to_length(lax.stop_gradient(weight_R).astype(jnp.float32), whole)
    of_rows = tuple(_to_length(x, whole) for x in other[: spec.by_row])
    arrays = (_to_length(h_RD, whole), W_VD, of_rows + other[spec.by_row :], weight_R)
    mesh = spec.mesh
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        # Where shardings are part of types, shard_map takes only what lies as it wants it.
        to = jax.tree.map(lambda place: NamedSharding(mesh, place), spec.placement(h_RD, other))
        arrays = jax.reshard(arrays, to)
    value, stats = fused_loss(spec, *arrays)
    return value, {name: lax.stop_gradient(x[:R]) for name, x in stats.items()}


def _to_length(x: jax.Array, rows: int) -> jax.Array:
    """The first `rows` rows, zeros appended where there are fewer."""
    short = rows - x.shape[0]
    return x[:rows] if short <= 0 else jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1))


def _check_shapes(h_RD, W_VD, weight_R, vocab_size: int | None) -> None:
    if h_RD.ndim != 2 or W_VD.ndim != 2 or h_RD.shape != (*weight_R.shape, W_VD.shape[1]):
        shapes = f"h {h_RD.shape}, W {W_VD.shape}, weight {weight_R.shape}"
        raise UserError(f"{shapes}: expected h [R, D], W [V, D] and weight [R]; flatten [B, R, D] to [B * R, D] first")
    if vocab_size is not None and not 0 < vocab_size <= W_VD.shape[0]:
        _refuse("vocab_size", vocab_size, f"from 1 to the {W_VD.shape[0]} rows of the shorter head")


def _refuse(key: str, value, allowed: str) -> None:
    raise UserError(f"recipe.loss.{key}={value!r} is not possible: it must be {allowed}")
