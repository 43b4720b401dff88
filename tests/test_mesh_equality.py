"""One step is the same step however it is laid out: meshes, packing, accumulation.

float32, highest precision, a random model of 8 heads and 8 key-value heads. Loss to 1e-6 relative, gradient to 2e-5 in
each tensor's norm, against one device with one trajectory a row. Every mesh packs for itself.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from mpd_jax.data.batching import after, to_batch
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.types import Problem, Trajectory
from tests.test_step import VOCAB, gradient_step

MESHES = {
    "1 device": None,
    "data 8": MeshConfig(8, 1, 1),
    "fsdp 8": MeshConfig(1, 8, 1),
    "tensor 8": MeshConfig(1, 1, 8),
    "2 x 2 x 2": MeshConfig(2, 2, 2),
}
GRID = list(itertools.product(MESHES, ("packed", "unpacked"), (1, 2)))
# One of each mesh, packing and accumulation; `pytest -m slow tests/test_mesh_equality.py` runs the whole grid.
QUICK = [
    ("1 device", "packed", 1),
    ("data 8", "packed", 2),
    ("fsdp 8", "unpacked", 2),
    ("tensor 8", "packed", 1),
    ("2 x 2 x 2", "packed", 2),
]
SUMS = ("tokens", "divergence", "student_entropy", "target_entropy", "divergence_at", "tokens_at")


def batch_for(mesh: MeshConfig | None, packing: str, micro_batches: int):
    random = np.random.default_rng(0)
    problems = [Problem(f"p{i}", "?") for i in range(28)]
    made, targets = [], {}
    for problem in problems:
        prompt, target, body = (
            tuple(int(i) for i in random.integers(0, VOCAB - 1, n))
            for n in (random.integers(2, 6), random.integers(3, 9), random.integers(1, 20))
        )
        made.append(Trajectory(problem.id, 0, prompt, (*body, VOCAB - 1), "student", 0, "stopped"))
        targets[problem.id] = target
    return to_batch(
        problems,
        made,
        reads=lambda t: after(targets[t.problem_id], t.response),
        reduction="token_mean",
        max_length=64,
        eos_ids={VOCAB - 1},
        multiple=micro_batches * (mesh.data * mesh.fsdp if mesh else 1),
        alone=packing == "unpacked",
    )[0]


@functools.cache
def step(name: str, packing: str, micro_batches: int):
    mesh = MESHES[name]
    batch = batch_for(mesh, packing, micro_batches)
    return gradient_step(batch, mesh=make_mesh(mesh) if mesh else None, micro_batches=micro_batches)


def gaps(a, b) -> tuple[float, float]:
    """The relative difference of the losses, and the largest of a gradient tensor over its norm."""
    pairs = zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True)
    loss = abs(a[0]["loss"] - b[0]["loss"]) / abs(b[0]["loss"])
    return float(loss), max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)


def check(name: str, packing: str, micro_batches: int) -> tuple[float, float]:
    whole, other = step("1 device", "unpacked", 1), step(name, packing, micro_batches)
    loss, gradient = gaps(other, whole)
    assert loss < 1e-6 and gradient < 2e-5, (name, packing, micro_batches, loss, gradient)
    for figure in SUMS:
        np.testing.assert_allclose(other[0][figure], whole[0][figure], rtol=1e-5, err_msg=figure)
    return loss, gradient


@pytest.mark.parametrize("layout", QUICK, ids=str)
def test_a_layout_of_each_kind_gives_the_same_step(layout):
    check(*layout)


@pytest.mark.slow
def test_every_layout_gives_the_same_step():
    worst = [max(figures) for figures in zip(*(check(*layout) for layout in GRID), strict=True)]
    print(f"worst of {len(GRID)} layouts: loss {worst[0]:.1e}, gradient {worst[1]:.1e}")


def test_the_layouts_differ():
    """Else they would agree for nothing: packed rows hold several trajectories, most on one device."""
    rows = {name: batch_for(mesh, "packed", 2).weight_BR.shape[0] for name, mesh in MESHES.items()}
    assert rows["1 device"] < rows["data 8"] < batch_for(None, "unpacked", 1).weight_BR.shape[0]
    assert batch_for(None, "packed", 1).student_segments_BT.max() > 2
    index_BR = batch_for(None, "packed", 1).index_BR
    assert index_BR.max() + 1 < index_BR.shape[1]  # positions are those of a response, not of the row
