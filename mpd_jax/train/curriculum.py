"""A length curriculum gated by entropy (arXiv 2605.16826): a cap on what the student writes, raised rung by rung.

Departures: 1. the paper looks at the mean token entropy of held-out problems, this at that of the tokens trained on
(rewrites where there are), as metrics.jsonl has it of steps up to s - 2. 2. The paper names neither ladder nor
threshold: both are the user's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpd_jax.train.guards import UNREAD, Row
from mpd_jax.types import UserError


@dataclass(frozen=True)
class CurriculumConfig:
    """caps: longest response the student may write, in tokens, rung by rung; a single cap is writer.max_tokens.

    min_entropy: nats a token; the next rung is taken only while the student's mean over the last `every` steps is at
    least that. every: steps between two looks. A rung is never left downwards.
    """

    caps: tuple[int, ...]
    min_entropy: float
    every: int = 10

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            (
                "caps",
                len(self.caps) >= 2 and self.caps[0] >= 1 and list(self.caps) == sorted(set(self.caps)),
                "two or more ascending numbers of tokens; a single cap is sampling.writer.max_tokens",
            ),
            ("min_entropy", 0 <= self.min_entropy < math.inf, "0 or more, in nats a token, and finite"),
            ("every", self.every >= 1, "1 or more"),
        ):
            if not holds:
                value = getattr(self, name)
                said = list(value) if isinstance(value, tuple) else value
                raise UserError(f"{name} = {said} is not allowed; it must be {allowed}")


def cap(config: CurriculumConfig, memory: Mapping[str, int | float]) -> int:
    """Tokens that the student may write now."""
    return config.caps[int(memory["length_rung"])]


def next_rung(config: CurriculumConfig, rows: Sequence[Row], step: int, rung: int) -> int:
    """The rung from `step` on, by the rows of the last `every` steps that are read by then."""
    if step % config.every or rung + 1 == len(config.caps):
        return rung
    looked = range(step - UNREAD - config.every + 1, step - UNREAD + 1)
    entropies = [
        row["student_entropy"] for row in rows if row["step"] in looked and row.get("student_entropy") is not None
    ]
    if not entropies:
        return rung
    return rung + (sum(entropies) / len(entropies) >= config.min_entropy)
