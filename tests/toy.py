"""A model of no context, for what an update does around its models: it compiles in a moment."""

import functools
from contextlib import nullcontext

import jax
import numpy as np

from mpd_jax.train.state import Trained, init_opt_state
from mpd_jax.train.step import make_update
from tests.test_step import GRADIENT, VOCAB


class Toy:
    """Hidden states are embeddings; stands where a decoder's Model stands in `make_update`, on one device."""

    attention = "reference"

    def on(self, mesh):
        assert mesh is None
        return self

    def over(self, base, trained):
        return trained

    def hidden(self, weights, tokens_BT, segments_BT=None):
        return weights["embedding_VD"][tokens_BT]

    def head(self, weights):
        return weights["head_VD"]

    def precision(self):
        return nullcontext()


def toy_weights(seed: int):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(VOCAB, 8)).astype(np.float32) for name in ("embedding_VD", "head_VD")}


@functools.cache
def toy_update(loss, target=True, micro_batches=1, stop_ids=()):
    how = {"vocab_size": VOCAB, "micro_batches": micro_batches, "stop_ids": stop_ids}
    return make_update(Toy(), Toy() if target else None, loss, GRADIENT, None, **how)


def toy_start() -> Trained:
    weights = jax.tree.map(jax.numpy.asarray, toy_weights(0))
    return Trained(weights, init_opt_state(GRADIENT, weights))


def toy_step(batch, loss, **how):
    """Out and gradient, on the host, of one update of toys."""
    trained, out = toy_update(loss, **how)(toy_start(), toy_weights(1), batch)
    return jax.device_get(out), jax.device_get(trained.opt_state.trace)
