"""Whether a server computes with the new weights: a figure from log-probabilities of fixed positions.

With noise apart, server - old is new - old on a server that holds the new weights, and zero on one that still holds
the old ones: the slope of the one on the other is 1 or 0, however small the update is beside the noise of a single
position. `old` and `new` are exact (float32, of the weights as they are served): noise of theirs would stand in both
differences, through `old`, and draw the slope of a stale server towards 1/2. So updates below VISIBLE prove nothing.
What a server was off by when it was last believed is taken out of its noise: in bfloat16 most of that is the same each
time, and it may happen to lie along the update.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

LEAST_POSITIONS = 2000
SLOPE, ERROR = 0.5, 0.12  # at least, at most
VISIBLE = 1e-4  # nats, root mean square: ten times what float32 leaves of a log-probability at its worst
TOLERANCE = {"float32": 0.01, "bfloat16": 0.3}  # nats, root mean square, between two who hold the same weights
LOUDER = 3.0  # times what the server was off by when it was last believed: other weights, not noise

Verdict = Literal["agrees", "verified", "undecided", "stale"]


@dataclass(frozen=True)
class Proof:
    """What the positions say. Differences are absolute, in nats.

    verdict: verified, the server is nearer to the new weights than to those last verified, and by far more than its
    noise; stale, it is not; undecided, the update is too small to be seen against the noise; agrees, there is nothing
    to compare with and server and JAX are as near as their dtype lets them be.
    slope, error: of (server - old) on (new - old), None without an update. update, difference: root mean square of
    new - old (without its mean) and of server - new; mean, largest: of |server - new|; before: mean of |server - old|.
    """

    verdict: Verdict
    positions: int
    difference: float
    mean: float
    largest: float
    limit: float
    slope: float | None = None
    error: float | None = None
    update: float | None = None
    before: float | None = None

    @property
    def words(self) -> str:
        said = (
            f"over {self.positions} positions server and JAX differ by {self.difference:.2g} nats (root mean square; "
            f"at most {self.limit:.2g} is noise), {self.largest:.2g} at most"
        )
        if self.slope is not None and self.error is not None:
            said += f", slope {self.slope:.3f} with error {self.error:.3f} for an update of {self.update:.2g} nats"
        return f"{self.verdict}: {said}"


def judge(
    server: np.ndarray,
    new: np.ndarray,
    prompt: np.ndarray,
    tolerance: float,
    *,
    old: np.ndarray | None = None,
    off: np.ndarray | None = None,
) -> Proof:
    """Log-probabilities [N] of the same positions, prompt after prompt; `prompt` says which one each stands in.

    tolerance: the largest root mean square of server - new that two implementations may show. old: of the weights
    last verified; None if there are none. off: server - new [N] when this server was last believed.
    """
    assert len(server) == len(new) == len(prompt) >= LEAST_POSITIONS, f"{len(server)} positions"
    server, new = server.astype(np.float64), new.astype(np.float64)
    gap = np.abs(server - new)
    difference = float(np.sqrt(np.mean(gap**2)))
    known = tolerance if off is None else LOUDER * float(np.sqrt(np.mean(off**2)))
    limit = min(tolerance, max(known, VISIBLE))
    seen = partial(Proof, positions=len(new), difference=difference, mean=float(gap.mean()), largest=float(gap.max()))
    if old is None:
        return seen("agrees" if difference <= limit else "stale", limit=limit)
    old = old.astype(np.float64)
    x, y = new - old, server - old
    update, before = float(x.std()), float(np.abs(y).mean())
    beside = np.ones((len(x), 1)) if off is None else np.stack([np.ones_like(x), off], axis=1)
    slope, error = slope_by_prompt(x, y, beside, prompt) if update > 0 else (None, None)
    verdict: Verdict = "undecided"
    if not difference <= limit:  # not a number: neither
        verdict = "stale"
    elif slope is not None and error is not None and update >= VISIBLE and error <= ERROR:
        verdict = "verified" if slope >= SLOPE else "stale"
    return seen(verdict, limit=limit, slope=slope, error=error, update=update, before=before)


def slope_by_prompt(x: np.ndarray, y: np.ndarray, beside: np.ndarray, prompt: np.ndarray) -> tuple[float, float]:
    """The slope of y on x by least squares, beside other regressors [N, K]; and its error.

    Positions of a prompt share their context, and with it noise and update: what repeats is the prompt. The error is
    the jackknife over prompts. It assumes nothing about noise within a prompt, nor that it is equally loud
    everywhere, and it errs to the large side where few positions carry most of the update.
    """
    starts = np.flatnonzero(np.diff(prompt, prepend=-1))  # prompts lie one after the other
    count = len(starts)
    regressors = np.column_stack([x, beside])
    sizes = np.sqrt(np.mean(regressors**2, axis=0))
    regressors = regressors / np.where(sizes > 0, sizes, 1.0)
    products = regressors[:, :, None] * np.column_stack([regressors, y])[:, None, :]
    sums = np.add.reduceat(products, starts)
    left = np.concatenate([sums.sum(0, keepdims=True), sums.sum(0) - sums])  # with all prompts, and without each
    slopes = (np.linalg.pinv(left[..., :-1], hermitian=True) @ left[..., -1:])[:, 0, 0] / sizes[0]
    without = slopes[1:]
    return float(slopes[0]), float(np.sqrt((count - 1) / count * np.sum((without - without.mean()) ** 2)))
