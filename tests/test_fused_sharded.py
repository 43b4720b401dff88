"""The fused losses on a mesh: the numbers of one device, and a chunk loop that moves nothing but row scalars."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mpd_jax.recipe.loss import LossConfig, fused_cross_entropy, fused_divergence

AXES = ("data", "fsdp", "tensor")
DIVERGENCES = [
    LossConfig("reverse_kl"),
    LossConfig("forward_kl", stabiliser="rescale", clip=0.8),
    LossConfig("jsd", teacher_weight=0.3, chunk=2),
    LossConfig("mix", reverse_weight=0.2, stabiliser="per_entry", clip=0.1, chunk=2),
    LossConfig("policy_gradient", chunk=2),
]


def mesh(*shape):
    return Mesh(np.array(jax.devices()).reshape(shape), AXES)


def problem(R=24, V=40, U=48, D=16, E=8):
    k = jax.random.split(jax.random.key(0), 5)
    weight = jax.random.uniform(k[4], (R,), minval=0.2).at[R // 2].set(0.0)
    h, W = jax.random.normal(k[0], (R, D)), jax.random.normal(k[1], (V, D)) / 3
    return h, W, jax.random.normal(k[2], (R, E)), jax.random.normal(k[3], (U, E)) / 2, weight / weight.sum()


def step(loss, mesh, vocab_size, merged=()):
    """Jitted ((value, stats), (dh, dW)) of the six arrays of a call; loss None is cross-entropy."""

    def objective(h, W, ht, Wt, weight, label):
        if loss is None:
            return fused_cross_entropy(h, W, label, weight, merged=merged, mesh=mesh, vocab_size=vocab_size, chunk=2)
        how = {"label_R": label} if loss.kind == "policy_gradient" else {}
        return fused_divergence(h, W, ht, Wt, weight, loss=loss, merged=merged, mesh=mesh, vocab_size=vocab_size, **how)

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))


def labelled(arrays):
    return *arrays, jnp.arange(arrays[0].shape[0]) * 7 % 37


def assert_same(ours, theirs):
    (value, stats), gradient = ours
    (value_1, stats_1), gradient_1 = theirs
    assert float(value) == pytest.approx(float(value_1), rel=1e-6)
    for a, b in [*zip(gradient, gradient_1, strict=True), *((stats[n], stats_1[n]) for n in stats_1)]:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_eight_devices_compute_what_one_does(shape):
    arrays = labelled(problem())
    assert_same(step(LossConfig(chunk=2), mesh(*shape), 37)(*arrays), step(LossConfig(chunk=2), None, 37)(*arrays))


@pytest.mark.parametrize("loss", [*DIVERGENCES[1:], None], ids=lambda loss: loss.kind if loss else "cross_entropy")
def test_every_loss_is_the_same_on_a_mesh_of_all_axes(loss):
    arrays = labelled(problem())
    assert_same(step(loss, mesh(2, 2, 2), 37)(*arrays), step(loss, None, 37)(*arrays))


@pytest.mark.parametrize("loss", [DIVERGENCES[-1], None], ids=lambda loss: loss.kind if loss else "cross_entropy")
def test_tokens_that_are_one_outcome_may_lie_on_different_devices(loss):
    arrays = labelled(problem())
    assert_same(step(loss, mesh(2, 2, 2), 37, (30, 3, 7))(*arrays), step(loss, None, 37, (30, 3, 7))(*arrays))


def test_sizes_that_do_not_divide_the_mesh_are_padded():
    """23 rows over 4, 41 and 39 vocabulary rows over 2, width 15 over 2."""
    arrays = labelled(problem(R=23, V=41, U=39, D=15, E=7))
    loss = LossConfig(chunk=4)
    ours = step(loss, mesh(2, 2, 2), 38)(*arrays)
    assert_same(ours, step(loss, None, 38)(*arrays))
    assert (ours[1][1][38:] == 0).all()


@pytest.mark.parametrize("loss", DIVERGENCES, ids=lambda loss: loss.kind)
def test_self_target_on_a_mesh_has_neither_loss_nor_gradient(loss):
    h, W, _, _, weight = problem()
    (value, _), gradient = step(loss, mesh(2, 2, 2), 37)(*labelled((h, W, h, W, weight)))
    assert abs(value) < 1e-7
    assert max(abs(g).max() for g in gradient) < 1e-7


@pytest.mark.parametrize("explicit", [False, True])
def test_gradients_lie_as_rows_and_heads_do(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    devices = jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)
    rows, head = NamedSharding(devices, P(("data", "fsdp"))), NamedSharding(devices, P("tensor", "fsdp"))
    everywhere = NamedSharding(devices, P())
    arrays = labelled(problem(U=40))
    to = (rows, head, rows, head, everywhere, everywhere)
    placed = [jax.device_put(x, s) for x, s in zip(arrays, to, strict=True)]
    ours = step(LossConfig(), devices, 37)(*placed)
    assert_same(ours, step(LossConfig(), None, 37)(*arrays))
    for gradient, sharding in zip(ours[1], (rows, head), strict=True):
        assert gradient.sharding.is_equivalent_to(sharding, 2)


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+)(?:-start)?\(")


def collectives(text):
    """(kind, elements, inside the chunk loop) of every collective of a compiled program."""
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    inside = set(re.findall(r" while\(.*?body=%?([\w.-]+)", text))
    assert inside
    while True:
        called = {c for name in inside for c in re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", computations[name])}
        if called <= inside:
            break
        inside |= called
    found = []
    for name, body in computations.items():
        for shape, kind in COLLECTIVE.findall(body):
            dims = re.findall(r"\w\d+\[([\d,]*)\]", shape)
            elements = sum(np.prod([int(n) for n in d.split(",") if n]) for d in dims)
            found.append((kind, int(elements), name in inside))
    return found


def test_the_chunk_loop_moves_row_scalars_only_and_gradients_are_summed_once_after_it():
    R, V, D, E, chunk = 96, 64, 32, 48, 4
    devices = mesh(2, 2, 2)
    arrays = labelled(problem(R, V, V, D, E))
    rows, head = NamedSharding(devices, P(("data", "fsdp"))), NamedSharding(devices, P("tensor", "fsdp"))
    placed = [jax.device_put(x, s) for x, s in zip(arrays, (rows, head, rows, head, rows, rows), strict=True)]
    text = step(LossConfig(chunk=chunk), devices, V).lower(*placed).compile().as_text()
    found = collectives(text)
    in_loop = [(kind, elements) for kind, elements, inside in found if inside]
    after = sorted((kind, elements) for kind, elements, inside in found if not inside and elements > 1)
    assert {kind for kind, _ in in_loop} == {"all-reduce"}
    assert len(in_loop) == 3
    assert max(elements for _, elements in in_loop) <= 4 * chunk
    assert after == sorted(
        [
            ("all-gather", V // 2 * D),
            ("all-gather", V // 2 * E),
            ("all-reduce", R // 4 * D),  # dh, over tensor
            ("reduce-scatter", V // 2 * D // 2),  # dW, over fsdp
            ("all-reduce", V // 2 * D // 2),  # dW, over data
        ]
    )
