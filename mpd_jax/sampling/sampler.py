"""What every sampler is: prompts in, responses out, each a pure function of its own key.

The JAX sampler and a remote server stand behind the same protocol. Log-probabilities are the model's own, at
temperature 1 over the whole vocabulary, whatever temperature and truncation the tokens were drawn with.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpd_jax.types import UserError

COLDEST = 1e-5  # below it logits over temperature leave the range of float32


def usable_temperature(temperature: float) -> bool:
    return temperature == 0 or COLDEST <= temperature < math.inf


@dataclass(frozen=True)
class SamplingConfig:
    """How one role samples. temperature 0 is greedy, COLDEST the least above it; top_p 1, top_k 0 truncate nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("temperature", usable_temperature(self.temperature), f"0 (greedy), or {COLDEST:g} or more, and finite"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1, which switches it off"),
            ("top_k", self.top_k >= 0, "0, which switches it off, or more"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
        ):
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)} is not allowed; it must be {allowed}")


@dataclass(frozen=True)
class Request:
    """One response to sample: prompt ids, and two uint32 that alone decide its random draws (see `request_key`)."""

    prompt: tuple[int, ...]
    key: tuple[int, int]


@dataclass(frozen=True)
class Response:
    """Sampled ids (with the EOS if the model wrote it), their log-probabilities, and how it ended: "stopped", "cut"."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: str


class Sampler(Protocol):
    """A model that answers. `load` hands over weights (once a step at most), `sample` uses the last ones loaded.

    version: the number they were loaded with, -1 before. max_length: of prompt and response together, in tokens.
    """

    version: int
    max_length: int

    def load(self, weights: Any, version: int) -> None: ...

    def sample(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        progress: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Responses in the order of the requests. `progress` is told the number of finished responses."""
        ...


def request_key(
    seed: int, stream: str, step: int, problem_id: str, attempt: int, rollbacks: int = 0
) -> tuple[int, int]:
    """The key of one response: a stable hash of what the response may depend on, and of nothing else.

    `stream` keeps roles apart ("write", "rewrite", "eval"): the same problem in the same step draws afresh for each.
    """
    text = f"{seed}\0{stream}\0{step}\0{problem_id}\0{attempt}\0{rollbacks}"
    high, low = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), dtype="<u4")
    return int(high), int(low)
