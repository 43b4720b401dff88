"""Floating-point operations of a step, from the models' shapes: the compiler counts a scanned layer once.

A product of an [m, k] and a [k, n] matrix is 2 m k n. `useful` counts what the mathematics needs: half of the scores,
as attention is causal, and nothing twice. `done` adds what is computed again for the backward pass, and scores above
the diagonal where the kernel does not leave them out.
"""

from dataclasses import dataclass

import jax

from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.models.lora import Adapted


@dataclass(frozen=True)
class Flops:
    useful: float = 0.0
    done: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.useful + other.useful, self.done + other.done)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.useful * times, self.done * times)


def layer_weights(config: ModelConfig) -> int:
    """Weights of one layer that every token is multiplied with."""
    D, H = config.hidden_size, config.head_dim
    attention = 2 * D * (config.num_heads + config.num_kv_heads) * H
    feed_forward = 3 * D * config.intermediate_size
    if config.experts is not None:
        feed_forward = feed_forward * config.experts.per_token + D * config.experts.count
    return attention + feed_forward


def last_weights(config: ModelConfig) -> int:
    """Those of a layer's last product, whose result no gradient needs, unless a router weighs it."""
    return 0 if config.experts else config.hidden_size * config.intermediate_size


def weight_products(config: ModelConfig, tokens: float) -> float:
    """All layers' products of `tokens` activations with weights."""
    return 2.0 * tokens * config.num_layers * layer_weights(config)


def score_products(config: ModelConfig, tokens: float, keys: float) -> float:
    """All layers' products of queries with `keys` keys, and of scores with as many values."""
    return 4.0 * tokens * keys * config.num_heads * config.head_dim * config.num_layers


def forward(model: Model, tokens: float, length: int) -> Flops:
    """Hidden states of `tokens` tokens in rows of `length`."""
    products = weight_products(model.config, tokens)
    scores = score_products(model.config, tokens, length)
    return Flops(products + scores / 2, products + (scores if computes_all_scores(model) else scores / 2))


def computes_all_scores(model: Model) -> bool:
    """Whether the attention kernel computes scores above the diagonal too."""
    return model.attention.startswith(("reference", "auto"))


def train_step(
    student: Model | Adapted,
    target: Model | None,
    *,
    rows: int,
    student_length: int,
    target_length: int,
    response: int,
    weighed: bool = False,
) -> Flops:
    """One update: student forward and backward, target forward, both heads over the response positions. weighed: by a
    token weight, for which all that is forward is done once more, unless the compiler sees that it is the same."""
    model, tokens, R = student if isinstance(student, Model) else student.model, rows * student_length, rows * response
    config, ahead = model.config, forward(model, tokens, student_length)
    products = weight_products(config, tokens)
    again = {
        "none": 0.0,
        "full": ahead.done - 2.0 * tokens * config.num_layers * last_weights(config),
        "dots": ahead.done - products,  # scores are products between activations
    }[model.remat]
    # The fused head takes both gradients while a chunk's logits are there: logits, dh and dW.
    head = 2.0 * R * config.hidden_size * config.vocab_size
    total, first = ahead * 3 + Flops(0, again) + _twice(3 * head), ahead + _twice(head)
    if isinstance(student, Adapted):
        # Frozen weights, the head among them, have no gradients; the adapter's have, and are small.
        adapter = 6.0 * tokens * sum(x.size for x in jax.tree.leaves(student.abstract()))
        total += _twice(adapter - products - head)
    if target is not None:
        head = 2.0 * R * target.config.hidden_size * target.config.vocab_size
        read = forward(target, rows * target_length, target_length) + _twice(head)
        total, first = total + read, first + read
    return total + Flops(0, first.done) if weighed else total


def cached(model: Model, rows: int, tokens: int, held: int, cache: int, *, head: bool) -> Flops:
    """`tokens` tokens for each of `rows` rows that hold `held`; all `cache` places are read."""
    config, count = model.config, rows * tokens
    products = weight_products(config, count)
    if head:
        products += 2.0 * count * config.hidden_size * config.vocab_size
    return Flops(
        products + score_products(config, count, held + tokens / 2), products + score_products(config, count, cache)
    )


def _twice(value: float) -> Flops:
    return Flops(value, value)
