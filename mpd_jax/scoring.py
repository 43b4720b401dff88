"""What a target on servers says of a step's trajectories (recipe.target.top_k), known to every process.

It is asked again by a run that resumes, instead of being stored: a target that never changes says the same again, up to
its rounding, and at 64 tokens a position it is 500 bytes where a trajectory has 5.
"""

import base64
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from mpd_jax import hosts
from mpd_jax.batches import target_reads
from mpd_jax.config import RunConfig
from mpd_jax.data.batching import fitting
from mpd_jax.roles import ModelFiles, Roles
from mpd_jax.sampling.scorer import Scorer
from mpd_jax.sampling.servers import Servers
from mpd_jax.types import Problem, TopK, Trajectory, UserError

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
Score = Callable[[Sequence[Problem], Sequence[Trajectory], int], list[Trajectory]]


def scoring(
    config: RunConfig, roles: Roles, servers: Callable[[ModelFiles], Servers], progress: Progress
) -> Score | None:
    """(problems, trajectories, step) -> the same ones, those that will be trained on with what the target says of
    them; None where it is read on the mesh. Process 0 asks, and has seen by now that it can.

    servers: those that hold a model, once they answer (Serving.servers).
    """
    target, top_k, max_length = roles.target(config.recipe), config.recipe.target.top_k, config.train.max_length
    if target is None or not top_k:
        return None
    if top_k > target.chat.vocab_size:
        raise UserError(
            f"recipe.target.top_k: {top_k} is not allowed: the teacher's vocabulary has {target.chat.vocab_size} tokens"
        )
    scorer = Scorer(servers(target), top_k)
    hosts.from_main(lambda: scorer.check(max_length))

    def score(problems: Sequence[Problem], trajectories: Sequence[Trajectory], step: int) -> list[Trajectory]:
        reads = target_reads(config, roles, problems)
        read = fitting(trajectories, reads, max_length)
        texts = [(found.tokens[: -len(t.response)], t.response) for t in read if (found := reads(t))]
        with progress(f"step {step + 1}: scoring", len(texts)) as advance:

            def told(done: int) -> None:
                advance(done)
                hosts.check()

            packed = hosts.from_main(lambda: _packed(scorer.score(texts, told)))
        tops = _unpacked(packed, [len(t.response) for t in read], top_k)
        said = {id(t): top for t, top in zip(read, tops, strict=True)}
        return [replace(t, target=said.get(id(t))) for t in trajectories]

    return score


def _packed(tops: Sequence[TopK]) -> list[str]:
    """All rows of all trajectories, as what can be told to other processes."""
    return [
        base64.b64encode(b"".join(array.tobytes() for array in arrays)).decode() for arrays in zip(*tops, strict=True)
    ]


def _unpacked(packed: Sequence[str], lengths: Sequence[int], k: int) -> list[TopK]:
    if not lengths:
        return []
    ids_NK, logprobs_NK = (
        np.frombuffer(base64.b64decode(text), dtype).reshape(-1, k)
        for text, dtype in zip(packed, (np.int32, np.float32), strict=True)
    )
    starts = np.cumsum(lengths)[:-1]
    return [TopK(*pair) for pair in zip(np.split(ids_NK, starts), np.split(logprobs_NK, starts), strict=True)]
