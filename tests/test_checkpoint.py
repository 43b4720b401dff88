"""A run's state on disk: the same bits back, onto any mesh, and never half a checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.state import RunState, TrainConfig, Trained, abstract, new_state, optimiser
from mpd_jax.types import UserError
from tests.test_step import tiny_model, weights_of

TX = optimiser(TrainConfig(learning_rate=0.1))


def make_state(mesh=None, self_copy=True, seed=5, **changed) -> RunState:
    model = tiny_model(**changed)
    own = weights_of(model, 1, mesh) if self_copy else None
    state = new_state(model, TX, mesh, weights_of(model, 0, mesh), seed=seed, self_weights=own)
    return state._replace(step=3, memory={"rollbacks": 2, "scale": 0.1})


def advance(trained: Trained) -> Trained:
    updates, opt_state = TX.update(jax.tree.map(jnp.sin, trained.weights), trained.opt_state, trained.weights)
    return Trained(jax.tree.map(jnp.add, trained.weights, updates), opt_state)


def assert_equal(a: RunState, b: RunState) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture
def opened():
    managers = []

    def open_in(*args, **kwargs):
        managers.append(Checkpoints(*args, **kwargs))
        return managers[-1]

    yield open_in
    for manager in managers:
        manager.close()


@pytest.mark.parametrize("self_copy", [True, False])
def test_a_state_comes_back_bit_for_bit_with_self_copy_and_memory(tmp_path, opened, self_copy):
    state = make_state(self_copy=self_copy)
    saved = opened(tmp_path, keep=2)
    saved.save(state)
    saved.wait()
    fresh = make_state(self_copy=self_copy)._replace(step=0, memory={"rollbacks": 0, "scale": 1.0})
    back = opened(tmp_path, keep=2).restore(abstract(fresh))
    assert_equal(back, state)
    assert (back.step, back.seed, back.memory) == (3, 5, {"rollbacks": 2, "scale": 0.1})


def test_no_checkpoint_is_none(tmp_path, opened):
    assert opened(tmp_path, keep=1).restore(abstract(make_state())) is None


def test_a_state_saved_on_one_mesh_is_restored_onto_another(tmp_path, opened):
    wide, narrow = make_mesh(MeshConfig(1, 8, 1)), make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    state = make_state(wide)
    saved = opened(tmp_path, keep=1)
    saved.save(state)
    saved.wait()
    like = make_state(narrow)
    back = opened(tmp_path, keep=1).restore(abstract(like))
    assert_equal(back, state)
    for leaf, place in zip(jax.tree.leaves(back.weights), jax.tree.leaves(like.weights), strict=True):
        assert leaf.sharding == place.sharding


def test_an_update_that_donates_the_state_does_not_reach_the_open_save(tmp_path, opened):
    """The checkpoint holds what was there when save was called, however fast the buffers are used again."""
    saved = opened(tmp_path, keep=3)
    state = make_state(self_copy=False, hidden_size=256)
    step = jax.jit(advance, donate_argnums=0)
    wanted = {}
    for number in range(3):
        wanted[number] = jax.tree.map(np.copy, jax.device_get((state.weights, state.opt_state)))
        saved.save(state._replace(step=number))
        trained = Trained(state.weights, state.opt_state)
        for _ in range(3):
            trained = step(trained)
        state = state._replace(**trained._asdict())
        saved.wait()
        back = saved.restore(abstract(state))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get((back.weights, back.opt_state)), wanted[number])


def test_the_last_checkpoints_stay_and_one_cut_short_while_saved_or_deleted_is_none(tmp_path, opened):
    saved = opened(tmp_path, keep=2)
    state = make_state(self_copy=False)
    for step in (0, 2, 4, 6):
        saved.save(state._replace(step=step))
    saved.wait()
    assert sorted(os.listdir(saved.directory)) == ["4", "6"]
    (saved.directory / "6").rename(saved.directory / "6.orbax-checkpoint-tmp")
    (saved.directory / "2").mkdir()  # what a kill leaves of an old one that was being removed
    again = opened(tmp_path, keep=2)
    assert sorted(os.listdir(again.directory)) == ["2", "4"]
    assert again.restore(abstract(state)).step == 4
    again.save(state._replace(step=6))
    again.wait()
    assert sorted(os.listdir(again.directory)) == ["4", "6"]


def test_the_end_of_writing_is_told_before_a_save_is_a_checkpoint(tmp_path, opened):
    seen = []

    def note(step):
        seen.append((step, (tmp_path / "checkpoints" / str(step)).exists()))

    saved = opened(tmp_path, keep=1, on_commit=note)
    saved.save(make_state(self_copy=False))
    saved.wait()
    assert seen == [(3, False)]


def test_a_checkpoint_of_another_run_is_refused(tmp_path, opened):
    saved = opened(tmp_path, keep=1)
    saved.save(make_state())
    saved.wait()
    with pytest.raises(UserError, match=r"run.seed = 6.*seed 5"):
        saved.restore(abstract(make_state(seed=6)))
    with pytest.raises(UserError, match=r"weights.blocks.mlp.up is float32\[2, 32, 64\] there and .*\[2, 32, 96\]"):
        saved.restore(abstract(make_state(intermediate_size=96)))
    with pytest.raises(UserError, match=r"self.final_norm.scale is float32.* missing here"):
        saved.restore(abstract(make_state(self_copy=False)))


FULL_DISK = """
import resource, sys
sys.path[:0] = [{tests!r}]
import tests.conftest
from tests.test_checkpoint import make_state
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.types import UserError
saved = Checkpoints({run!r}, keep=1)
state = make_state(self_copy=False)
saved.save(state)
saved.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    saved.save(state._replace(step=4))
    saved.wait()
except UserError as error:
    print("TOLD", error)
"""


def test_a_full_disk_is_told_in_one_message_and_the_last_checkpoint_stays(tmp_path, opened):
    code = FULL_DISK.format(tests=str(Path(__file__).parent.parent), run=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("TOLD run.dir: a checkpoint under"), done.stdout + done.stderr
    # The storage library's threads may outlive its event loop when a write has failed; what they print is not ours.
    ours = re.sub(r"Traceback .*\n(  .*\n)*RuntimeError: Event loop is closed\n", "", done.stderr)
    assert "Traceback" not in ours, ours
    back = opened(tmp_path, keep=1).restore(abstract(make_state(self_copy=False)))
    assert back.step == 3


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, opened, monkeypatch):
    saved = opened(tmp_path, keep=1)
    state = make_state(self_copy=False)
    size = sum(x.nbytes for x in jax.tree.leaves((state.weights, state.opt_state)))
    room = SimpleNamespace(free=size)
    monkeypatch.setattr("shutil.disk_usage", lambda path: room)
    saved.save(state)
    saved.wait()
    room.free = size - 1
    with pytest.raises(
        UserError, match=rf"run.dir: .*No space left on device: {size:,} bytes needed, {size - 1:,} left"
    ):
        saved.save(state._replace(step=4))
    assert saved.latest() == 3


def test_a_damaged_checkpoint_is_told_with_the_one_to_go_back_to(tmp_path, opened):
    saved = opened(tmp_path, keep=2)
    state = make_state(self_copy=False)
    for step in (3, 4):
        saved.save(state._replace(step=step))
        saved.wait()
    (saved.directory / "4" / "run" / "metadata").write_bytes(b"")
    with pytest.raises(UserError, match=r"run.dir: .*checkpoints/4 cannot be read .*resume from step 3"):
        opened(tmp_path, keep=2).restore(abstract(state))
