"""Claims about the target's weights: copies are copies, and they are renewed exactly when due."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpd_jax.recipe.target import TargetConfig, refresh, start


def weights(value: float):
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    return {"a": jax.device_put(jnp.full(8, value), place), "b": {"c": jax.device_put(jnp.full((16, 2), value), place)}}


def values(tree) -> set[float]:
    return {float(x) for leaf in jax.tree.leaves(tree) for x in np.unique(np.asarray(leaf))}


FROZEN = TargetConfig("self_frozen", "concise")
REFRESHED = TargetConfig("self_refreshed", "concise", every=3)


@pytest.mark.parametrize("config", [FROZEN, REFRESHED])
def test_a_self_copy_outlives_the_donated_student(config):
    student = weights(1.0)
    target = start(config, student, None)
    places = [leaf.sharding for leaf in jax.tree.leaves(student)]
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    student = step(student)
    assert values(student) == {2.0} and values(target) == {1.0}
    assert [leaf.sharding for leaf in jax.tree.leaves(target)] == places


def test_a_frozen_copy_never_moves():
    target = start(FROZEN, weights(1.0), None)
    for updates in range(1, 10):
        target = refresh(FROZEN, target, weights(9.0), updates)
    assert values(target) == {1.0}


def test_a_refreshed_copy_equals_the_student_at_refreshes_only_and_survives_donation():
    target, seen = start(REFRESHED, weights(0.0), None), []
    for updates in range(1, 8):
        student = weights(float(updates))
        target = refresh(REFRESHED, target, student, updates)
        jax.tree.map(lambda x: x.delete(), student)
        seen.append(values(target))
    assert seen == [{0.0}, {0.0}, {3.0}, {3.0}, {3.0}, {6.0}, {6.0}]


def test_the_teacher_is_taken_as_it_is_and_none_is_none():
    teacher = weights(5.0)
    assert start(TargetConfig("teacher"), weights(1.0), teacher) is teacher
    assert refresh(TargetConfig("teacher"), teacher, weights(1.0), 50) is teacher
    assert start(TargetConfig("none"), weights(1.0), teacher) is None
