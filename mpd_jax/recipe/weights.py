"""Token weights: how much each response token counts in the loss, told from what the whole batch is like.

A weight is one pure function of TokenStats, traced into the update; no gradient flows through it. Here is the one table
of those that come with the package; `recipe.loss.token_weight` takes an import path of the user's own as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpd_jax.named import named


class TokenStats(NamedTuple):
    """What is known of each response token of a step's batch, arrays [B, R] in the batch's order.

    divergence      nats, before any weight or stabiliser (cross_entropy: -log q of the token).
    student_entropy nats.
    target_entropy  nats, 0 without a target; of one known at its top_k tokens, that of the outcomes.
    counts          bool, false at padding: reduce with where=counts, for what stands there is no token's.
    index           the number of the token in its response, from 0 on.
    pass_rate       the share of its problem's attempts of this step, as they were written, that plain rules find right:
                    0 or 1 with one attempt, and 0.5 where the problem has no reference answer. It is told by what
                    follows a token, so that a weight by it biases policy_gradient.
    """

    divergence: jax.Array
    student_entropy: jax.Array
    target_entropy: jax.Array
    counts: jax.Array
    index: jax.Array
    pass_rate: jax.Array


# -> weights [B, R], by which the batch's own are multiplied.
TokenWeight = Callable[[TokenStats], jax.Array]


def even(stats: TokenStats) -> jax.Array:
    return jnp.ones_like(stats.divergence)


def entropy_guided(stats: TokenStats, gamma: float = 0.2) -> jax.Array:
    """clip(1 - gamma H / H_max, 0.1, 1) of the target's entropy H, its maximum in the batch being taken as 1 nat at
    least: what the target is unsure of counts less. EGRSD (2605.13255), gamma from 0.1 to 0.3."""
    highest = jnp.max(stats.target_entropy, initial=1.0, where=stats.counts)
    return jnp.clip(1 - gamma * stats.target_entropy / highest, 0.1, 1.0)


TABLE: dict[str, TokenWeight] = {"none": even, "entropy_guided": entropy_guided}


def token_weight(name: str) -> TokenWeight | None:
    """The function of that name or import path; None for "none", which needs no statistics. UserError if unknown."""
    found = named("recipe.loss.token_weight", name, TABLE)
    return None if found is even else found
