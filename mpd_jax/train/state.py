"""What a run is at any moment (`RunState`), how it is optimised (`TrainConfig`), and where each array of it lives.

Not here: the update itself (step.py) and the copy on disk (checkpoint.py).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpd_jax.models.decoder import Model
from mpd_jax.models.lora import Adapted
from mpd_jax.sharding import tree_shardings
from mpd_jax.types import UserError

PyTree = Any
Memory = dict[str, int | float]  # small named numbers that belong to a run


@dataclass(frozen=True)
class TrainConfig:
    """The `train` section. One step is one optimiser update on `batch_size` problems.

    micro_batches: pieces that a step's batch is split into to save memory; the result does not depend on it.
    schedule:      what the rate does after `warmup_steps`, down to zero at `steps` unless constant.
    weight_decay:  on matrices and embeddings; norms and biases are left alone.
    max_grad_norm: global-norm clipping; 0 switches it off.
    save_every:    steps between checkpoints, of which the last `keep` stay; the final step is always saved. With guards
                   that stop or roll back the last `keep` that are a multiple of save_every stay beside them.
    keep_best:     the checkpoint that was best by this figure of the evaluations (eval.every, and the last) stays too:
                   highest accuracy, or fewest mean_tokens, at the first temperature.
    keep_trajectories: of how many steps, the newest, the trajectories stay on disk, beside those of the first 8; all if
                   not given.
    trackers:      where the figures of metrics.jsonl go too: tensorboard (event files under run.dir/tensorboard), wandb
                   (Weights & Biases; its key from the environment).
    max_length:    tokens of prompt and response together; a longer trajectory is dropped and counted.
    row_length:    the longest row that trajectories are packed into, max_length unless given. Every shape of a step's
                   rows is compiled once (data/packing.py). Where attention takes no segments, a row is one trajectory.
    profile_steps: [first, last] steps, counted from 0, whose trace is written under run.dir/profile; xprof opens it.
    """

    steps: int = 100
    batch_size: int = 32
    micro_batches: int = 1
    learning_rate: float = 5e-6
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    save_every: int = 50
    keep: int = 2
    keep_best: Literal["accuracy", "mean_tokens"] | None = None
    keep_trajectories: int | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    max_length: int = 4096
    row_length: int | None = None
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batches", "save_every", "keep", "max_length"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("trackers", len(set(self.trackers)) == len(self.trackers), "a list of different ones")
        allowed = f"at least train.max_length = {self.max_length}"
        self._require("row_length", self.row_length is None or self.row_length >= self.max_length, allowed)
        first, last = self.profile_steps or (0, 0)
        self._require("profile_steps", 0 <= first <= last, "[first, last] with 0 <= first <= last")
        for name in ("learning_rate", "eps"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "above 0 and finite")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("schedule", self.schedule in ("constant", "cosine", "linear"), "constant, cosine or linear")
        self._require("warmup_steps", self.warmup_steps < self.steps, f"below train.steps = {self.steps}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(f"train.{name} = {getattr(self, name)!r}: must be {allowed}; change train.{name}")


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The rate of update number `count` (0 is the first, which already moves the weights)."""
    peak, warmup, rest = config.learning_rate, config.warmup_steps, config.steps - config.warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup])


def decayed(weights: PyTree) -> PyTree:
    """True where weight decay applies. By name: layer stacking gives norms and biases a second dimension."""

    def matrix(path: tuple, _: Any) -> bool:
        return not any("norm" in str(key) or "bias" in str(key) for key in path)

    return jax.tree_util.tree_map_with_path(matrix, weights)


def optimiser(config: TrainConfig) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adam = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(clip, adam)


class Trained(NamedTuple):
    """The part of a run that an update replaces; its buffers are donated."""

    weights: PyTree
    opt_state: PyTree


class RunState(NamedTuple):
    """A run: `step` updates are done. `self_weights` are real copies (or None), never the buffers of `weights`.

    weights: what trains, all of the student's or an adapter; frozen weights are no part of the state.

    memory: rollbacks and learning_rate_scale (guards.py), length_rung (curriculum.py), skipped_updates.
    """

    weights: PyTree
    opt_state: PyTree
    self_weights: PyTree | None
    step: int
    seed: int
    memory: Memory


NEW_MEMORY: Memory = {"rollbacks": 0, "learning_rate_scale": 1.0, "length_rung": 0, "skipped_updates": 0}


def init_opt_state(tx: optax.GradientTransformation, weights: PyTree) -> PyTree:
    """Moments are float32 whatever the weights are stored in."""
    return tx.init(jax.tree.map(lambda w: w.astype(jnp.float32), weights))


def trained_shardings(model: Model | Adapted, tx: optax.GradientTransformation, mesh: Mesh) -> Trained:
    """Where weights and optimiser state live: each moment beside its weight, counters everywhere."""
    shapes = model.abstract()
    weights = tree_shardings(mesh, model.logical_axes(), shapes, "train")
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(lambda w: init_opt_state(tx, w), shapes),
        weights,
        transform_non_params=lambda _: everywhere,
    )
    return Trained(weights, opt_state)


def new_state(
    model: Model | Adapted,
    tx: optax.GradientTransformation,
    mesh: Mesh | None,
    weights: PyTree,
    *,
    seed: int,
    self_weights: PyTree | None = None,
) -> RunState:
    """The state before the first update."""
    shardings = trained_shardings(model, tx, mesh).opt_state if mesh is not None else None
    opt_state = jax.jit(lambda w: init_opt_state(tx, w), out_shardings=shardings)(weights)
    return RunState(weights, opt_state, self_weights, 0, seed, dict(NEW_MEMORY))


def abstract(state: RunState) -> RunState:
    """Shapes, dtypes and places of a state without its arrays: what a checkpoint is restored into."""

    def leaf(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    weights, opt_state, self_weights = jax.tree.map(leaf, (state.weights, state.opt_state, state.self_weights))
    return state._replace(weights=weights, opt_state=opt_state, self_weights=self_weights)
