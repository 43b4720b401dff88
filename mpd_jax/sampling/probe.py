"""The fixed positions of a proof (proof.py), and their log-probabilities here and on a server.

Here they are computed in float32 of the weights as they are served: merged where the server holds them merged, and
rounded to the dtype of the files. A server answers them as prompt log-probabilities, which read no prefix cache.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpd_jax.models.decoder import Model, Weights
from mpd_jax.recipe.loss import fused_cross_entropy
from mpd_jax.sampling.servers import ServerError, Servers
from mpd_jax.sharding import batch_sharding

PROMPTS, LENGTH = 64, 48  # 64 x 47 positions
AT_ONCE = 8  # prompts in one request, and on the mesh together unless it has more shards


def probe_tokens(samples: Sequence[Sequence[int]], vocab_size: int, seed: int) -> np.ndarray:
    """Prompts of fixed ids [PROMPTS, LENGTH]: the beginnings of `samples`, then any ids, the same for a seed."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=(PROMPTS, LENGTH), dtype=np.int32)
    for row, sample in zip(tokens, samples, strict=False):
        row[: len(sample)] = sample[:LENGTH]
    return tokens


@lru_cache(maxsize=4)
def _compiled(model: Model, mesh: Mesh, dtype: str, merge: bool) -> Any:
    """(weights, tokens_BT) -> log-probabilities of every token but the first of a row, [B * (T - 1)]."""
    exact, bits = Model(model.config), jnp.finfo(dtype)

    def logprobs(weights: Weights, tokens_BT: jax.Array) -> jax.Array:
        weights = model.merged(weights) if merge and "adapter" in weights else weights
        # Not a cast there and back, which a compiler may leave out.
        weights = jax.tree.map(
            lambda w: jax.lax.reduce_precision(w.astype(jnp.float32), bits.nexp, bits.nmant), weights
        )
        hidden_BTD = exact.hidden(weights, tokens_BT)[:, :-1]
        hidden_RD, label_R = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), tokens_BT[:, 1:].reshape(-1)
        ones_R = jnp.ones(label_R.shape, jnp.float32)
        _, stats = fused_cross_entropy(hidden_RD, exact.head(weights), label_R, ones_R, mesh=mesh)
        return -stats["loss"]

    return jax.jit(logprobs, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Probe:
    """The positions of `tokens_BT`: every token but the first of a row, row after row.

    dtype: of the weights as servers read them. merge: whether an adapter is merged into them.
    """

    def __init__(self, model: Model, mesh: Mesh, tokens_BT: np.ndarray, dtype: str, merge: bool):
        self.tokens_BT, self._mesh = tokens_BT, mesh
        rows, length = tokens_BT.shape
        self.prompt = np.repeat(np.arange(rows), length - 1)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self._rows = shards * math.ceil(AT_ONCE / shards)
        self._logprobs = _compiled(model, mesh, dtype, merge)

    def here(self, weights: Weights) -> np.ndarray:
        """Of these weights [N]. Every process takes part."""
        found, place = [], batch_sharding(self._mesh)
        with jax.set_mesh(self._mesh):
            for start in range(0, len(self.tokens_BT), self._rows):
                part = self.tokens_BT[start : start + self._rows]
                full = np.resize(part, (self._rows, part.shape[1]))
                rows = jax.make_array_from_callback(full.shape, place, lambda index, full=full: full[index])
                found.append(np.asarray(self._logprobs(weights, rows))[: len(part) * (part.shape[1] - 1)])
        return np.concatenate(found)

    def there(self, server: Servers, model: str) -> np.ndarray:
        """As a server answers them for a model or adapter of that name [N]. Process 0's to ask."""
        rows = self.tokens_BT.tolist()
        chunks = [rows[at : at + AT_ONCE] for at in range(0, len(rows), AT_ONCE)]
        common = {"model": model, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "prompt_logprobs": 0}
        found: dict[int, list[float]] = {}

        def take(chunk: int, answer: dict) -> None:
            try:
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            except (KeyError, TypeError):
                raise _unusable(server, f"{str(answer)[:80]!r}, which holds no choices") from None
            if len(choices) != len(chunks[chunk]):
                raise _unusable(server, f"{len(choices)} answers to {len(chunks[chunk])} prompts")
            for number, (ids, choice) in enumerate(zip(chunks[chunk], choices, strict=True)):
                found[chunk * AT_ONCE + number] = _read(server, ids, choice.get("prompt_logprobs"))

        server.ask("/v1/completions", [{**common, "prompt": chunk} for chunk in chunks], take)
        return np.concatenate([found[row] for row in range(len(rows))])


def _read(server: Servers, ids: Sequence[int], entries: Any) -> list[float]:
    """The log-probability of every id but the first."""
    try:
        values = [float(entry[str(id_)]["logprob"]) for id_, entry in zip(ids[1:], entries[1:], strict=True)]
    except (TypeError, KeyError, ValueError):
        raise _unusable(server, f"{str(entries)[:80]!r} as prompt_logprobs of {len(ids)} ids") from None
    if not np.isfinite(values).all() or max(values) > 1e-3:
        raise _unusable(server, "log-probabilities above 0 or not finite")
    return values


def _unusable(server: Servers, what: str) -> ServerError:
    return ServerError(
        f"{', '.join(server.urls)}: it answers {what}; without prompt log-probabilities nothing proves which weights "
        "it computes with: use a vLLM that has them, without speculative decoding"
    )
