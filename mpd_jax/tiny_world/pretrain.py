"""Pretrains a tiny-world model from nothing: weighted next-token cross-entropy on documents under every context.

Muon on the matrices inside the blocks, Adam on the rest. Seeded; the same command gives the same weights on the same
machine and versions.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.tiny_world.corpus import STUDENT_MIX, TEACHER_MIX, Mix
from mpd_jax.tiny_world.tokenizer import MAX_LENGTH, VOCAB_SIZE

Weights = Any


@dataclass(frozen=True)
class Recipe:
    """Size, data and optimiser of one of the two models. `rows` multiplies the rows of a batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    mix: Mix
    steps: int
    muon_rate: float
    adam_rate: float
    rows: float = 1.0
    decay_share: float = 0.4
    warmup: int = 60


# Few updates for the student: it stops where it is right three times out of four and has something left to learn.
STUDENT = Recipe(96, 208, 4, 4, 2, True, STUDENT_MIX, steps=1150, muon_rate=0.02, adam_rate=4e-3)
TEACHER = Recipe(192, 512, 4, 6, 2, False, TEACHER_MIX, steps=1500, muon_rate=0.02, adam_rate=3e-3, rows=4 / 3)


def hf_config(recipe: Recipe, end_ids: list[int], pad_id: int) -> dict:
    """The config.json of a Qwen3ForCausalLM."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "tie_word_embeddings": recipe.tied,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": recipe.layers,
        "bos_token_id": None,
        "eos_token_id": end_ids[0],
        "pad_token_id": pad_id,
        "torch_dtype": "bfloat16",
    }


def _is_matrix(axes: tuple[str | None, ...]) -> bool:
    return axes[0] == "layers" and "embed" in axes[1:] and len(axes) > 2


def _dimension_numbers(axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    """Which axes a stacked matrix sums over and which it produces; the layers are a batch."""
    if not _is_matrix(axes):
        return None
    rest = tuple(range(1, len(axes)))
    embed = axes.index("embed")
    others = tuple(axis for axis in rest if axis != embed)
    into_embed = embed == len(axes) - 1
    return MuonDimensionNumbers(others if into_embed else (embed,), (embed,) if into_embed else others)


def rate_shape(recipe: Recipe) -> Callable[[Any], jax.Array]:
    """1 after the warm-up, falling linearly to 0 over the last `decay_share` of the steps."""

    def shape(step):
        left = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
        return jnp.clip(jnp.minimum((step + 1) / recipe.warmup, left), 0.0, 1.0)

    return shape


def optimiser(recipe: Recipe, model: Model) -> optax.GradientTransformation:
    shape = rate_shape(recipe)
    is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    numbers = jax.tree.map(_dimension_numbers, model.logical_axes(), is_leaf=is_axes)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            learning_rate=lambda step: recipe.muon_rate * shape(step),
            adam_learning_rate=lambda step: recipe.adam_rate * shape(step),
            weight_decay=0.01,
            muon_weight_dimension_numbers=numbers,
        ),
    )


def loss_fn(weights: Weights, tokens_BT: jax.Array, weights_BT: jax.Array, model: Model) -> jax.Array:
    h_BTD = model.hidden(weights, tokens_BT)[:, :-1]
    logits_BTV = jnp.einsum("btd,vd->btv", h_BTD, model.head(weights), preferred_element_type=jnp.float32)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    scale_BT = weights_BT[:, 1:]
    return jnp.sum(loss_BT * scale_BT) / jnp.maximum(jnp.sum(scale_BT), 1.0)


@partial(jax.jit, static_argnames=("model", "tx"), donate_argnums=(0, 1))
def update(weights: Weights, opt_state: Any, tokens_BT: jax.Array, weights_BT: jax.Array, model: Model, tx: Any):
    loss, gradient = jax.value_and_grad(loss_fn)(weights, tokens_BT, weights_BT, model)
    updates, opt_state = tx.update(gradient, opt_state, weights)
    return optax.apply_updates(weights, updates), opt_state, loss


def pretrain(
    recipe: Recipe,
    config: dict,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    seed: int,
    report: Callable[[str], None] = print,
    every: int = 100,
) -> tuple[Model, Weights, dict]:
    """(model, weights, record). The record holds steps, tokens and seconds, compilation included."""
    model = Model(ModelConfig.from_hf(config))
    weights = model.init(jax.random.key(seed))
    tx = optimiser(recipe, model)
    opt_state = tx.init(weights)
    began, tokens, losses = time.monotonic(), 0, []
    for step in range(recipe.steps):
        tokens_BT, weights_BT = next(batches)
        weights, opt_state, loss = update(weights, opt_state, tokens_BT, weights_BT, model, tx)
        tokens += int((weights_BT > 0).sum())
        losses.append(loss)
        if (step + 1) % every == 0:
            mean = float(np.mean(jax.device_get(losses[-every:])))
            if not np.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {step + 1}")
            report(f"step {step + 1}/{recipe.steps} loss {mean:.4f} tokens {tokens} {time.monotonic() - began:.0f}s")
    record = {"steps": recipe.steps, "tokens": tokens, "seconds": round(time.monotonic() - began, 1), "seed": seed}
    return model, weights, record
