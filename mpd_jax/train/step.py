"""One optimiser update, jitted once per batch shape: hidden states of both models, the loss, AdamW.

The batch's weights are already divided by the global token count, so micro-batches add up to the whole batch's loss and
gradient. A token weight reads the whole batch, and so a pass without gradients goes before: it tells each token's
statistics. A non-finite loss or gradient leaves the state as it was and lowers the `finite` flag.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpd_jax.models.decoder import Model
from mpd_jax.models.kernels import takes_segments
from mpd_jax.models.lora import Adapted
from mpd_jax.recipe.loss import LossConfig, fused_bucket_divergence, fused_cross_entropy, fused_divergence
from mpd_jax.recipe.weights import TokenStats, TokenWeight, token_weight
from mpd_jax.sharding import batch_sharding
from mpd_jax.train.state import PyTree, Trained, trained_shardings
from mpd_jax.types import Batch, UserError

# Response positions are reported in buckets [0, 4), [4, 16), ... [16384, inf): the first tokens, where a wrong template
# shows, stand apart, and a bucket means the same at every length.
POSITION_EDGES = (4, 16, 64, 256, 1024, 4096, 16384)

Out = dict[str, jax.Array]
TracedBatch = Any  # a Batch whose arrays are all on the device
Divergence = Callable[..., tuple[jax.Array, Out]]  # with the contract of `fused_divergence`


def response_rows(hidden_BTD: jax.Array, at_BR: jax.Array) -> jax.Array:
    """The hidden states that predict the response, one row per token: [B * R, D]."""
    picked_BRD = jnp.take_along_axis(hidden_BTD, at_BR[:, :, None], axis=1)
    return picked_BRD.reshape(-1, picked_BRD.shape[-1])


def position_sums(value_R: jax.Array, counts_R: jax.Array, index_R: jax.Array) -> jax.Array:
    """Sum of `value_R` over the tokens that count, in each bucket of positions in the token's own response."""
    bucket_R = jnp.searchsorted(jnp.array(POSITION_EDGES), index_R, side="right")
    return jax.ops.segment_sum(jnp.where(counts_R, value_R, 0.0), bucket_R, len(POSITION_EDGES) + 1)


class Update:
    """`update(trained, target_weights, batch, base, scale) -> (trained, out)`; `trained` is donated, the rest is only
    read.

    base: the student's frozen weights where an adapter trains, else None. scale: of what the optimiser would add to the
    weights, decay included; another one compiles nothing.

    out: "loss" (what was minimised), "grad_norm", "finite", "tokens", sums over the tokens that count of "divergence",
    "student_entropy", "target_entropy", with a target on servers "tail_mass" (what it gives to other tokens than its
    top_k) and "student_tail_mass" (what the student gives them), "token_weight" where one is set, and by position
    bucket "divergence_at", "tokens_at". `traces` counts compilations: one per batch shape.
    """

    def __init__(
        self,
        body: Callable[[Trained, PyTree, TracedBatch, PyTree, jax.Array], tuple[Trained, Out]],
        mesh: Mesh | None,
        pieces: int,
        shardings: Trained | None,
        alone: bool = False,
    ):
        self.traces = 0
        self._mesh = mesh
        self._pieces = pieces
        self._alone = alone

        def traced(
            trained: Trained, target_weights: PyTree, batch: TracedBatch, base: PyTree, scale: jax.Array
        ) -> tuple[Trained, Out]:
            self.traces += 1
            return body(trained, target_weights, batch, base, scale)

        places = None if mesh is None else (shardings, NamedSharding(mesh, PartitionSpec()))
        self._jitted: Any = jax.jit(traced, donate_argnums=0, out_shardings=places)

    def __call__(
        self, trained: Trained, target_weights: PyTree, batch: Batch, base: PyTree = None, scale: float = 1.0
    ) -> tuple[Trained, Out]:
        with self._on_mesh():
            return self._jitted(trained, target_weights, self.place(batch), base, np.float32(scale))

    def lower(self, trained: Trained, target_weights: PyTree, batch: Batch, base: PyTree = None) -> Any:
        """The lowered program for arguments of these shapes; their values are not read."""
        with self._on_mesh():
            return self._jitted.lower(trained, target_weights, batch, base, np.float32(1))

    def _on_mesh(self) -> AbstractContextManager:
        """The decoder places its activations on the mesh that is set while it is traced."""
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def place(self, batch: Batch) -> Batch:
        """The host's batch on the devices; every host holds the whole of it and hands over its own rows."""
        rows = batch.response_BR.shape[0]
        shards = 1 if self._mesh is None else self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        if rows % (shards * self._pieces):
            raise UserError(
                f"a batch of {rows} rows does not divide into train.micro_batches = {self._pieces} pieces over data x "
                f"fsdp = {shards} devices; make a multiple of {shards * self._pieces} rows"
            )
        packed = self._alone and max(np.max(batch.student_segments_BT), np.max(batch.target_segments_BT)) > 1
        assert not packed, "rows of several trajectories for an attention kernel that takes one; see to_batch(alone=)"
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        sharding = batch_sharding(self._mesh)

        def spread(array: Any) -> jax.Array:
            host = np.asarray(array)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(spread, batch)


def objective_of(
    student: Model | Adapted,
    loss: LossConfig,
    mesh: Mesh | None,
    vocab_size: int,
    stop_ids: Sequence[int],
    divergence: Divergence = fused_divergence,
) -> Callable[..., tuple[jax.Array, Out]]:
    """(what trains, base, hidden states and head of a target on the mesh, batch) -> the weighted sum of the loss, and
    its stats for each token."""
    merged = tuple(stop_ids) if loss.merge_stops else ()
    how: dict[str, Any] = {"mesh": mesh, "vocab_size": vocab_size}

    def objective(trained: PyTree, base: PyTree, target_rows: tuple[jax.Array, jax.Array] | None, batch: TracedBatch):
        weights = student.over(base, trained)
        hidden_BTD = student.hidden(weights, batch.student_tokens_BT, segments_BT=batch.student_segments_BT)
        rows_RD = response_rows(hidden_BTD, batch.student_at_BR)
        head_VD, weight_R = student.head(weights), batch.weight_BR.reshape(-1)
        label_R = batch.response_BR.reshape(-1)
        if loss.kind == "cross_entropy":
            return fused_cross_entropy(rows_RD, head_VD, label_R, weight_R, merged=merged, chunk=loss.chunk, **how)
        if target_rows is not None:
            drawn = label_R if loss.kind == "policy_gradient" else None
            return divergence(rows_RD, head_VD, *target_rows, weight_R, loss=loss, label_R=drawn, merged=merged, **how)
        ids_RK, logprobs_RK = (x.reshape(-1, x.shape[-1]) for x in (batch.top_ids_BRK, batch.top_logprobs_BRK))
        return fused_bucket_divergence(rows_RD, head_VD, ids_RK, logprobs_RK, weight_R, loss=loss, **how)

    return objective


def make_update(
    student: Model | Adapted,
    target: Model | None,
    loss: LossConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh | None,
    *,
    vocab_size: int,
    micro_batches: int = 1,
    stop_ids: Sequence[int] = (),
    exchanged: tuple[int, int] | None = None,
    divergence: Divergence = fused_divergence,
) -> Update:
    """The update of a recipe. target: what is read on the mesh, None where the batch holds what servers read, or
    nobody reads and the response tokens themselves are trained on. stop_ids: those that loss.merge_stops merges.
    exchanged: two ids that are read as each other in the target's distribution. divergence: how that from a target on
    the mesh is computed."""
    student, target = student.on(mesh), target.on(mesh) if target else None
    weigh = token_weight(loss.token_weight)
    objective = objective_of(student, loss, mesh, vocab_size, stop_ids, divergence)
    shardings = trained_shardings(student, tx, mesh) if mesh is not None else None

    def read(target_weights: PyTree, batch: TracedBatch) -> tuple[jax.Array, jax.Array] | None:
        if target is None:
            return None
        hidden_BTE = target.hidden(target_weights, batch.target_tokens_BT, segments_BT=batch.target_segments_BT)
        rows_RE, head_VE = response_rows(hidden_BTE, batch.target_at_BR), target.head(target_weights)
        if exchanged is not None:
            here, there = jnp.array(exchanged), jnp.array(exchanged[::-1])
            head_VE = head_VE.at[here].set(head_VE[there])
        return jax.lax.stop_gradient((rows_RE, head_VE))

    def statistics(trained: PyTree, base: PyTree, target_weights: PyTree, batch: TracedBatch) -> Out:
        """Of each token of one micro-batch, [B, R], without a gradient."""
        with student.precision():
            _, stats = objective(trained, base, read(target_weights, batch), batch)
        return {name: x.reshape(batch.weight_BR.shape) for name, x in stats.items()}

    def piece(trained: PyTree, base: PyTree, target_weights: PyTree, batch: TracedBatch) -> tuple[PyTree, Out]:
        """Gradient and sums of one micro-batch. The target is read outside the differentiated function."""
        target_rows = read(target_weights, batch)
        with student.precision():
            (value, stats), gradient = jax.value_and_grad(objective, has_aux=True)(trained, base, target_rows, batch)
        if shardings is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, shardings.weights)
        return gradient, {"loss": value, **token_sums(stats, batch)}

    def body(
        trained: Trained, target_weights: PyTree, batch: TracedBatch, base: PyTree, scale: jax.Array
    ) -> tuple[Trained, Out]:
        told: Out = {}
        if weigh is not None:
            stats = of_every_row(
                lambda part: statistics(trained.weights, base, target_weights, part), batch, micro_batches, mesh
            )
            batch, told = weighted(weigh, stats, batch)
        gradient, out = accumulate(
            lambda part: piece(trained.weights, base, target_weights, part), batch, micro_batches, mesh
        )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(out["loss"])
        updates, opt_state = tx.update(gradient, trained.opt_state, trained.weights)
        scaled = jax.tree.map(lambda x: x * scale, updates)
        moved = Trained(optax.apply_updates(trained.weights, scaled), opt_state)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, trained)
        return kept, {**out, **told, "grad_norm": norm, "finite": finite}

    alone = not all(takes_segments(model.attention) for model in (student, target) if model)
    return Update(body, mesh, micro_batches, shardings, alone)


def weighted(weigh: TokenWeight, stats: Out, batch: TracedBatch) -> tuple[TracedBatch, Out]:
    """The batch with every token's weight multiplied by its token weight, and the sums of the tokens as they were: one
    that a token weight of 0 leaves out of the loss is reported all the same."""
    counts_BR = batch.weight_BR > 0
    nothing_BR = jnp.zeros_like(batch.weight_BR)
    rate_BR = nothing_BR if batch.pass_rate_BR is None else batch.pass_rate_BR
    entropies = stats["student_entropy"], stats.get("target_entropy", nothing_BR)
    factor_BR = weigh(TokenStats(stats["loss"], *entropies, counts_BR, batch.index_BR, rate_BR))
    if jnp.shape(factor_BR) != counts_BR.shape:
        raise UserError(
            f"recipe.loss.token_weight: {weigh} gave an array of shape {jnp.shape(factor_BR)}; return a weight for "
            f"each token, of the shape {counts_BR.shape} that every field of TokenStats has"
        )
    factor_BR = jnp.where(counts_BR, jax.lax.stop_gradient(factor_BR), 0.0)
    sums = token_sums({name: x.reshape(-1) for name, x in stats.items()}, batch)
    return batch._replace(weight_BR=batch.weight_BR * factor_BR), {**sums, "token_weight": factor_BR.sum()}


def token_sums(stats: dict[str, jax.Array], batch: TracedBatch) -> Out:
    counts_R, index_R = batch.weight_BR.reshape(-1) > 0, batch.index_BR.reshape(-1)
    at = position_sums(stats["loss"], counts_R, index_R)
    tokens_at = position_sums(jnp.ones_like(stats["loss"]), counts_R, index_R)
    sums = {"tokens": tokens_at.sum(), "divergence": at.sum(), "divergence_at": at, "tokens_at": tokens_at}
    for name in ("student_entropy", "target_entropy", "tail_mass", "student_tail_mass"):
        if name in stats:
            sums[name] = jnp.where(counts_R, stats[name], 0.0).sum()
    return sums


def split(batch: TracedBatch, pieces: int, mesh: Mesh | None) -> TracedBatch:
    """The micro-batches, stacked. Each has every pieces-th row: a device keeps its own rows, and each micro-batch is
    spread over all devices."""

    def parted(x: jax.Array) -> jax.Array:
        parts = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return parts
        rows = batch_sharding(mesh).spec[0]
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, rows)))

    return jax.tree.map(parted, batch)


def of_every_row(piece: Callable[[TracedBatch], Out], batch: TracedBatch, pieces: int, mesh: Mesh | None) -> Out:
    """What `piece` says of each row of its micro-batch, the rows in the batch's order, one micro-batch at a time."""
    if pieces == 1:
        return piece(batch)
    parts = jax.lax.map(piece, split(batch, pieces, mesh))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def accumulate(
    piece: Callable[[TracedBatch], tuple[PyTree, Out]], batch: TracedBatch, pieces: int, mesh: Mesh | None
) -> tuple[PyTree, Out]:
    """Sum of `piece` over the micro-batches, gradients in float32, one micro-batch in memory at a time."""

    def single(part: TracedBatch) -> tuple[PyTree, Out]:
        gradient, out = piece(part)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), out

    if pieces == 1:
        return single(batch)
    parts = split(batch, pieces, mesh)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(single, jax.tree.map(lambda x: x[0], parts))
    )
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, single(part)), None), zeros, parts)
    return total
