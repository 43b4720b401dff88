"""The target axis: whose weights give the distribution the student is pulled to, and when a self copy is renewed.

The context the target is read under is a matter of its prompts (data/batching.py), not of its weights.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

Weights = Any


@dataclass(frozen=True)
class TargetConfig:
    """weights: the teacher's, a copy of the student's own (frozen at the start, or renewed), or none.

    context: the prompt the target reads the response after: the problem as the student reads it, with a word to be
    brief (CRISP), what a rewriter reads of it (TRD, 2606.08432), or with a solution (OPSD, 2601.18734). A departure
    from TRD: the rewriter's delimiter is read as the end of the student's thinking.
    every: updates between renewals, self_refreshed only (CRISP: 50).
    top_k: 0 reads the whole distribution on the mesh. Above, the teacher is on servers alone (teacher.serve): they are
    asked for its top_k most likely tokens at each position, and all others are one tail bucket.
    own_template: the teacher may render prompts by another chat template or thinking mode than the student's.
    """

    weights: Literal["teacher", "self_frozen", "self_refreshed", "none"] = "teacher"
    context: Literal["plain", "concise", "rewrite", "privileged"] = "plain"
    every: int | None = None
    top_k: int = 0
    own_template: bool = False

    @property
    def is_self(self) -> bool:
        return self.weights in ("self_frozen", "self_refreshed")


def copied(weights: Weights) -> Weights:
    """The same values in buffers of their own, placed alike: the student's are donated to the next update."""
    return jax.tree.map(jnp.copy, weights)


def keeps_copy(config: TargetConfig, adapter_starts_at_zero: bool) -> bool:
    """Whether the target needs a copy of what trains: a frozen one is an adapter that began at zero, switched off."""
    return config.is_self and not (config.weights == "self_frozen" and adapter_starts_at_zero)


def start(config: TargetConfig, student_weights: Weights, teacher_weights: Weights | None) -> Weights | None:
    """The target's weights at step 0: a copy of the student's, the teacher's themselves (frozen anyway), or None."""
    if config.is_self:
        return copied(student_weights)
    return teacher_weights if config.weights == "teacher" else None


def refresh(config: TargetConfig, target_weights: Weights, student_weights: Weights, updates: int) -> Weights:
    """The target's weights after `updates` updates in all: a fresh copy of the student's when one is due."""
    if config.weights == "self_refreshed":
        assert config.every is not None, "self_refreshed without an interval"
        if updates % config.every == 0:
            return copied(student_weights)
    return target_weights
