"""`mpd-jax bench topk`: what of a divergence is left when a target's k most likely tokens are known and all others are
one bucket, on the shipped models.

The student writes at temperature 1, and both models read that. Every figure is a mean over its tokens, in nats.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from mpd_jax.bench.sample import Subject, open_subject
from mpd_jax.recipe.loss import LossConfig, fused_bucket_divergence, fused_divergence
from mpd_jax.sampling.sampler import Response, SamplingConfig
from mpd_jax.types import UserError

KINDS = ("reverse_kl", "forward_kl")


def run(
    json: bool = False,
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    problems: int = 64,
    max_tokens: int = 256,
) -> dict[str, Any]:
    """Measures, prints unless `json`, and returns what is printed: a row for each k, and "whole", with all known."""
    if min(ks, default=0) < 1 or min(problems, max_tokens) < 1:
        raise UserError(
            f"bench topk ks={list(ks)}, problems={problems}, max_tokens={max_tokens}: all must be at least 1"
        )
    student, teacher = (open_subject(f"tiny:{name}", problems, max_tokens) for name in ("student", "teacher"))
    written = student.sampler(slots=8).sample(student.requests, SamplingConfig(max_tokens=max_tokens))
    (h_RD, W_VD), (h_RE, W_VE) = (_read(subject, written) for subject in (student, teacher))
    weight_R = jnp.full(len(h_RD), 1 / len(h_RD))
    lp_RV = jax.nn.log_softmax(jnp.matmul(h_RE, W_VE.T, precision="highest"))
    logprobs_RK, ids_RK = jax.lax.top_k(lp_RV, max(ks))
    rows: list[dict[str, Any]] = [{"k": k} for k in ks]
    whole: dict[str, Any] = {"k": None, "tail_mass": 0.0, "student_tail_mass": 0.0}
    for kind in KINDS:
        loss = LossConfig(kind)
        whole[kind] = float(fused_divergence(h_RD, W_VD, h_RE, W_VE, weight_R, loss=loss)[0])

        @jax.jit
        def bucketed(known_RK, loss=loss):
            return fused_bucket_divergence(h_RD, W_VD, known_RK, logprobs_RK, weight_R, loss=loss)

        for row in rows:
            value, stats = bucketed(jnp.where(jnp.arange(max(ks))[None] < row["k"], ids_RK, -1))
            row[kind] = float(value)
            row |= {name: float(stats[name].mean()) for name in ("tail_mass", "student_tail_mass")}
    result = {"tokens": len(h_RD), "vocab": lp_RV.shape[1], "jax": jax.__version__, "rows": [*rows, whole]}
    if not json:
        _show(result)
    return result


def _read(subject: Subject, written: Sequence[Response]) -> tuple[jax.Array, jax.Array]:
    """The hidden states that predict what was written after the subject's own prompts [R, D], and its head [V, D]."""
    texts = [(r.prompt, w.ids) for r, w in zip(subject.requests, written, strict=True)]
    tokens_BT = np.zeros((len(texts), max(len(p) + len(w) for p, w in texts)), np.int32)
    predicts_BT = np.zeros(tokens_BT.shape, bool)
    for row, (prompt, ids) in enumerate(texts):
        end = len(prompt) + len(ids)
        tokens_BT[row, :end] = (*prompt, *ids)
        predicts_BT[row, len(prompt) - 1 : end - 1] = True
    hidden_BTD = jax.jit(subject.files.model.hidden)(subject.weights, tokens_BT)
    return hidden_BTD[predicts_BT], subject.files.model.head(subject.weights)


def _show(result: dict[str, Any]) -> None:
    title = "{tokens:,} tokens that tiny:student wrote, vocabulary {vocab}, means in nats".format(**result)
    table = Table("k", "teacher's tail", "student's tail", *(f"{kind}, of the whole" for kind in KINDS), title=title)
    *_, whole = result["rows"]
    for row in result["rows"]:
        shares = (f"{row[kind]:.4f}, {100 * row[kind] / whole[kind]:.1f} %" for kind in KINDS)
        tails = (f"{row[name]:.5f}" for name in ("tail_mass", "student_tail_mass"))
        table.add_row(str(row["k"] or "all"), *tails, *shares)
    Console().print(table, f"jax {result['jax']}")
