"""Whether servers hold a frozen model: their log-probabilities of fixed positions (probe.py) against its weights here.

Log-probabilities that are off by a temperature alone are told from those of other weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jax.sharding import Mesh

from mpd_jax import hosts
from mpd_jax.models.decoder import Model, Weights
from mpd_jax.sampling.probe import AT_ONCE, Probe, probe_tokens
from mpd_jax.sampling.proof import TOLERANCE, Proof, judge
from mpd_jax.sampling.servers import ServerConfig, ServerError, Servers, Unreachable
from mpd_jax.sampling.wire import LOOK_S

FITS = 12  # secants at most
SAME = 1e-4  # between two of them, relative
HALF = 0.5  # of the difference at most may be left, or a temperature explains nothing


def temperature_of(there: np.ndarray, at: Callable[[float], np.ndarray], limit: float) -> float | None:
    """The temperature at which log-probabilities [N] are the model's own; None where there is no such.

    at: those of the model at a temperature [N]. limit: root mean square that may be left, in nats. 1 / temperature is
    the one number that is fitted, by least squares over all positions.
    """
    last, now = 1.0, 1.05  # 1 / temperature
    at_last, at_now = at(1 / last), at(1 / now)
    before = _size(there - at_last)
    for _ in range(FITS):
        slope = (at_now - at_last) / (now - last)
        move = slope @ (there - at_now) / (slope @ slope)
        last, at_last, now = now, at_now, float(np.clip(now + move, now / 2, now * 2))
        at_now = at(1 / now)
        if abs(now / last - 1) < SAME:
            break
    return 1 / now if _size(there - at_now) <= min(limit, HALF * before) else None


def tempered(weights: Weights, temperature: float) -> Weights:
    """The weights of the same model with its logits over `temperature`."""
    return {**weights, "final_norm": {"scale": weights["final_norm"]["scale"] / temperature}}


def by_temperature(probe: Probe, weights: Weights, there: np.ndarray, limit: float) -> str:
    """What log-probabilities that disagree are and what to change, if a temperature is all of it; else nothing.

    Every process takes part.
    """
    found = temperature_of(there, lambda temperature: probe.here(tempered(weights, temperature)), limit)
    if found is None:
        return ""
    return (
        f"these are the model's log-probabilities at temperature {found:.3g}; start the server with --logprobs-mode "
        "raw_logprobs and without a scale or processor of logits"
    )


@dataclass(frozen=True)
class Comparison:
    """What the two differ by: nothing that their dtype does not explain, a coarser dtype, a temperature, or weights.

    seen: the figures, in words. change: what to do about them, nothing where they agree.
    """

    by: Literal["nothing", "dtype", "temperature", "weights"]
    seen: str
    change: str = ""


def compare(
    probe: Probe, there: np.ndarray, here: np.ndarray, weights: Weights, dtype: str, directory: Path
) -> Comparison:
    """Log-probabilities [N] of a server with those of the weights of `directory`. Every process takes part."""
    proof = judge(there, here, probe.prompt, TOLERANCE[dtype])
    seen = _words(proof, dtype)
    if proof.verdict == "agrees":
        return Comparison("nothing", seen)
    if change := by_temperature(probe, weights, there, proof.limit):
        return Comparison("temperature", seen, change)
    if proof.difference <= TOLERANCE["bfloat16"]:
        return Comparison("dtype", seen, f"start it with --dtype {dtype}")
    return Comparison("weights", seen, f"serve the weights of {directory}")


def _words(proof: Proof, dtype: str) -> str:
    return (
        f"over {proof.positions:,} positions server and JAX differ by {proof.mean:.2g} nats on average, "
        f"{proof.largest:.2g} at most, {proof.difference:.2g} root mean square; {dtype} allows {proof.limit:.2g}"
    )


def _size(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference))))


class Frozen(Protocol):
    """What is read of a model's files (roles.ModelFiles)."""

    @property
    def key(self) -> str: ...
    @property
    def directory(self) -> Path: ...
    @property
    def model(self) -> Model: ...
    @property
    def serve(self) -> tuple[str, ...]: ...


class Agreement:
    """A `Push` (vllm_client.py) of a model that never changes: it brings nothing, and proves that servers hold what it
    is given. samples: see `probe_tokens`. say: told of every server.
    """

    def __init__(
        self,
        held: Frozen,
        mesh: Mesh,
        samples: Sequence[Sequence[int]],
        *,
        server: ServerConfig,
        key: str | None,
        seed: int,
        say: Callable[[str], None],
    ):
        self._held, self._say = held, say
        # Short, for `admit`: whoever is away longer is asked when it is back.
        server = replace(server, patience_s=min(server.patience_s, LOOK_S))
        self._all = Servers(held.serve, server, key=key, say=lambda message: None)
        self._one = {url: Servers([url], server, key=key, say=lambda message: None) for url in self._all.urls}
        tokens_BT = probe_tokens(samples, held.model.config.vocab_size, seed)
        self._probe, self._again = (
            Probe(held.model, mesh, rows_BT, held.model.dtype, merge=True)
            for rows_BT in (tokens_BT, tokens_BT[:AT_ONCE])
        )
        self._here: np.ndarray | None = None
        self._limit = TOLERANCE[held.model.dtype]

    def model_name(self) -> str:
        return self._all.model

    def forget_after(self, version: int) -> None: ...

    def push(self, trained: Weights, version: int) -> None:
        """Every server that answers computes with these weights, or ServerError. Every process calls it."""
        held, here = self._held, self._probe.here(trained)
        for url, there in hosts.from_main(self._ask).items():
            found = compare(self._probe, np.array(there), here, trained, held.model.dtype, held.directory)
            if found.by in ("temperature", "weights"):
                raise ServerError(
                    f"{held.key}.serve: {url} does not hold {held.key}.path: {found.seen}; {found.change}"
                )
            if found.by == "dtype":
                self._limit = TOLERANCE["bfloat16"]
                self._say(f"warning: {url}: {found.seen}; {found.change}, or set {held.key}.dtype=bfloat16")
            else:
                self._say(f"{held.key}: {url} computes with {held.key}.path: {found.seen}")
        self._here = here

    def _ask(self) -> dict[str, list[float]]:
        found = {}
        for (url, server), up in zip(self._one.items(), self._all.alive(), strict=True):
            try:
                if up:
                    found[url] = self._probe.there(server, server.model).tolist()
            except Unreachable as error:
                self._say(f"{error}; its weights are compared when it is back")
        return found

    def admit(self, url: str) -> None:
        """A server that may have been started anew holds the same weights still: a few positions suffice to see it."""
        if self._here is None:
            return
        server = self._one[url]
        there = self._again.there(server, server.model)
        difference = _size(there - self._here[: len(there)])
        if not difference <= self._limit:
            raise ServerError(
                f"{self._held.key}.serve: {url} computes with other weights than at first: over {len(there)} positions "
                f"server and JAX differ by {difference:.2g} nats, root mean square, and {self._limit:.2g} are allowed; "
                f"serve the weights of {self._held.directory} there, as `mpd-jax doctor` proves them"
            )
