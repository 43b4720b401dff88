"""Runs that train an adapter: what the target reads, what a checkpoint holds, and the same bits after a kill."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from mpd_jax import build, config, roles
from mpd_jax.models.hf_weights import load_weights
from mpd_jax.models.peft import export_adapter
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.sharding import make_mesh
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.loop import train
from mpd_jax.train.state import abstract, new_state
from mpd_jax.train.step import make_update
from tests.e2e.tiny import QUICKSTART
from tests.test_loop import MODEL, SEED, TX, Killed, Student, open_run
from tests.test_lora import ADAPTED, adapter_of, buffers, bytes_of, size
from tests.test_step import VOCAB, weights_of

LORA = "student.lora={rank: 4, alpha: 8}"
FROZEN = "recipe.target={weights: self_frozen, context: concise}"
REFRESHED = "recipe.target={weights: self_refreshed, context: concise, every: 2}"
UPDATE = make_update(ADAPTED, MODEL, LossConfig(), TX, None, vocab_size=VOCAB)


def opened(tmp_path: Path, *overrides: str):
    """A config, its student's files, and the mesh."""
    settings = config.load(QUICKSTART, [f"run.dir={tmp_path}/run", LORA, *overrides])
    return settings, roles.open_model("student", settings.student, settings.recipe.contexts), make_mesh(settings.mesh)


@pytest.fixture
def adapter_directory(tmp_path):
    _, files, mesh = opened(tmp_path)
    assert files.adapted is not None
    return export_adapter(tmp_path / "adapter", files.adapted, adapter_of(files.adapted, 1, mesh), "base")


def test_a_frozen_target_keeps_no_copy_unless_it_starts_from_an_adapter_and_a_refreshed_one_the_adapter_s(tmp_path):
    sizes = {}
    for name, overrides in {
        "frozen": [FROZEN],
        "refreshed": [REFRESHED],
        "frozen at a given adapter": [FROZEN, f"student.adapter={tmp_path}"],
        "teacher": [],
    }.items():
        settings, files, mesh = opened(tmp_path, *overrides)
        state = build.abstract_state(settings, files, mesh)
        sizes[name] = size(state.self_weights)
        assert size(state.weights) == size(files.trains.abstract()) < 40_000
    own = size(state.weights)
    assert sizes == {"frozen": 0, "refreshed": own, "frozen at a given adapter": own, "teacher": 0}


def test_the_copy_of_an_adapter_lies_in_buffers_of_its_own(tmp_path):
    settings, files, mesh = opened(tmp_path, REFRESHED)
    probe = Checkpoints(tmp_path, 1)
    state = build._start(settings, files, mesh, probe, tmp_path, lambda text: None)
    probe.close()
    assert jax.tree.structure(state) == jax.tree.structure(build.abstract_state(settings, files, mesh))
    assert bytes_of(state.weights) == bytes_of(state.self_weights)
    assert not set(buffers(state.weights)) & set(buffers(state.self_weights)), "donated with the adapter"


def test_the_update_is_handed_the_base_itself_as_a_frozen_target(tmp_path, monkeypatch):
    handed = {}
    monkeypatch.setattr(build, "make_update", lambda *_, **__: lambda *arrays: handed.update(arrays=arrays))
    settings, files, mesh = opened(tmp_path, FROZEN)
    base = files.base(mesh)
    live = len(jax.live_arrays())
    update = build.update_of(settings, roles.Roles(files, None, None), mesh)
    build._update(settings, update, base, partial(files.trains.over, base))("trained", None, "batch", 0.5)
    assert handed["arrays"][0] == "trained" and handed["arrays"][2] == "batch"
    assert (
        handed["arrays"][1] is base
        and handed["arrays"][3] is base
        and handed["arrays"][4] == 0.5
        and len(jax.live_arrays()) == live
    )


def run(run_dir, base, kill=None):
    """The stub run of test_loop with an adapter over `base`, its self target a copy of the adapter."""
    state = new_state(ADAPTED, TX, None, adapter_of(ADAPTED, 1), seed=SEED, self_weights=adapter_of(ADAPTED, 2))
    probe = Checkpoints(run_dir, keep=2)
    state = probe.restore(abstract(state)) or state
    probe.close()
    student = Student()
    parts = {
        "write": student.write,
        "load_student": lambda adapter, version: student.load(ADAPTED.over(base, adapter), version),
        "update": lambda trained, own, batch, scale: UPDATE(trained, ADAPTED.over(base, own), batch, base, scale),
    }
    opened = open_run(run_dir, state.step, kill, **parts)
    try:
        return train(opened.parts, state)
    finally:
        opened.close()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_adapter_and_the_same_base(tmp_path):
    base = weights_of(MODEL, 0)
    before = bytes_of(base)
    straight = jax.device_get(run(tmp_path / "straight", base))
    assert not np.array_equal(straight.weights["mlp"]["up"]["b"], adapter_of(ADAPTED, 1)["mlp"]["up"]["b"])
    with pytest.raises(Killed):
        run(tmp_path / "killed", base, (3, "update"))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run(tmp_path / "killed", base)), straight)
    assert bytes_of(base) == before
    held = Checkpoints(tmp_path / "straight", keep=2, read_only=True)
    arrays = held._manager.item_metadata(held.latest())["arrays"].tree
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(arrays) if leaf.shape) == 4 * size(ADAPTED.abstract())
    held.close()


def test_a_run_starts_from_the_adapter_it_is_given_or_from_a_new_one_that_its_seed_draws(tmp_path, adapter_directory):
    _, files, mesh = opened(tmp_path, f"student.adapter={adapter_directory}")
    assert bytes_of(files.start(mesh, 0)) == bytes_of(adapter_of(files.adapted, 1))
    _, files, mesh = opened(tmp_path)
    new = [bytes_of(files.start(mesh, seed)) for seed in (0, 0, 1)]
    assert new[0] == new[1] != new[2]
    assert bytes_of(files.base(mesh)) == bytes_of(load_weights(files.directory, files.model, mesh))
