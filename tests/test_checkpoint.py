"""A run's state on disk: the same bits back, onto any mesh, and never half a checkpoint."""

import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.state import RunState, TrainConfig, Trained, abstract, new_state, optimiser
from mpd_jax.types import UserError
from tests.test_hosts import finish, start
from tests.test_step import tiny_model, weights_of

TX = optimiser(TrainConfig(learning_rate=0.1))
# Orbax leaves the reads of other arrays open when one is damaged; they are told of when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected():
    yield
    gc.collect()  # here, and not in the test of another module


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


@pytest.mark.parametrize(("figure", "best"), [("accuracy", 2), ("mean_tokens", 4)])
@pytest.mark.parametrize("first", ["noted", "saved"])
def test_the_best_by_a_figure_stays_beside_the_last(tmp_path, opened, figure, best, first):
    """Whether a state was evaluated before it was saved or after."""
    state = make_state(self_copy=False)
    figures = {0: (0.5, 90.0), 2: (0.9, 80.0), 4: (0.7, 20.0), 6: (0.8, 50.0), 7: None, 8: (0.6, 40.0)}
    for step, values in figures.items():
        if step in (0, 4, 7):  # what is on disk when it is opened counts too
            saved = opened(tmp_path, keep=1, keep_best=figure)
        if first == "saved":
            saved.save(state._replace(step=step))
        if values:
            saved.note(step, dict(zip(("accuracy", "mean_tokens"), values, strict=True)), {"problems": 9})
        if first == "noted":
            saved.save(state._replace(step=step))
        saved.wait()
    assert steps_in(saved) == [best, 8]
    assert saved.restore_one(abstract(state), "best").step == best
    assert saved.restore(abstract(state)).step == 8


def steps_in(saved: Checkpoints) -> list[int]:
    return sorted(int(name) for name in os.listdir(saved.directory) if name.isdigit())


def test_figures_of_steps_that_a_run_goes_back_behind_are_forgotten(tmp_path, opened):
    state = abstract(make_state(self_copy=False))
    saved = opened(tmp_path, keep=2, keep_best="accuracy")
    saved.save(make_state(self_copy=False))
    saved.note(3, {"accuracy": 0.5}, None)
    saved.note(4, {"accuracy": 0.9}, None)
    saved.wait()
    again = opened(tmp_path, keep=2, keep_best="accuracy")
    assert again.restore(state).step == 3
    again.save(make_state(self_copy=False)._replace(step=4))
    again.wait()
    assert opened(tmp_path, keep=2, keep_best="accuracy", read_only=True).restore_one(state, "best").step == 3
    one = '{"settings": null, "figures": [[3, %s]]}'
    for damaged in ("", "[]", '{"3": {"accuracy": 1}}', one % "4", one % '{"mean_tokens": 4}'):
        (saved.directory / "figures.json").write_text(damaged)
        with pytest.raises(UserError, match=r"--best: .*was evaluated; .*: 3, 4"):
            opened(tmp_path, keep=2, keep_best="accuracy", read_only=True).restore_one(state, "best")


def test_figures_that_were_measured_otherwise_are_not_compared(tmp_path, opened):
    state = make_state(self_copy=False)
    for step, accuracy, problems in ((2, 0.9, 4), (4, 0.5, 256), (6, 0.4, 256)):
        saved = opened(tmp_path, keep=3, keep_best="accuracy")
        saved.save(state._replace(step=step))
        saved.note(step, {"accuracy": accuracy}, {"problems": problems})
        saved.wait()
    looked = opened(tmp_path, keep=3, keep_best="accuracy", read_only=True)
    assert looked.restore_one(abstract(state), "best").step == 4


def test_a_checkpoint_is_chosen_by_its_step(tmp_path, opened):
    state = make_state(self_copy=False)
    like, saved = abstract(state), opened(tmp_path, keep=3)
    with pytest.raises(UserError, match=r"--step: 3 is no checkpoint in .*checkpoints; there is none yet"):
        saved.restore_one(like, 3)
    for step in (2, 3, 4):
        saved.save(state._replace(step=step, memory={"scale": step}))
        saved.wait()
    looked = opened(tmp_path, keep=3, read_only=True)
    assert (looked.restore_one(like, 3).step, looked.restore_one(like, 3).memory["scale"]) == (3, 3)
    with pytest.raises(UserError, match=r"--step: 5 is no checkpoint in .*; there are checkpoints of .*: 2, 3, 4"):
        looked.restore_one(like, 5)
    with pytest.raises(UserError, match=r"--best: .*no train.keep_best; give --step instead: .*: 2, 3, 4"):
        looked.restore_one(like, "best")
    damage(saved.directory / "3", "no metadata")
    with pytest.raises(UserError, match=r"--step: .*checkpoints/3 cannot be read \(\w+\); .*: 2, 3, 4"):
        looked.restore_one(like, 3)
    assert steps_in(saved) == [2, 3, 4]


def test_checkpoints_that_were_left_are_none_and_the_one_gone_back_to_has_what_the_rollback_remembers(tmp_path, opened):
    """From the first moment on, for every reader; a process that starts then removes them before it goes on."""
    state = make_state(self_copy=False)._replace(memory={"rollbacks": 0, "skipped_updates": 4})
    saved = opened(tmp_path, keep=3)
    for step in (2, 4, 6):
        saved.save(state._replace(step=step))
    saved.leave([6], 4, {"rollbacks": 1})
    looked = opened(tmp_path, keep=3, read_only=True)
    assert looked.steps() == [2, 4] and steps_in(saved) == [2, 4, 6]
    with pytest.raises(UserError, match=r"--step: 6 is no checkpoint in .*: 2, 4"):
        looked.restore_one(abstract(state), 6)
    again = opened(tmp_path, keep=3)
    for _ in range(2):
        back = again.restore(abstract(state))
        assert (back.step, back.memory) == (4, {"rollbacks": 1, "skipped_updates": 4})
        assert steps_in(again) == [2, 4] and again.latest() == 4
    again.save(back._replace(step=6, memory={"rollbacks": 1}))
    again.leave([])  # a stop that leaves none forgets no rollback
    assert opened(tmp_path, keep=3).restore(abstract(state)).memory["rollbacks"] == 1
    assert opened(tmp_path, keep=3).restore_one(abstract(state), 4).memory["rollbacks"] == 1
    damage(saved.directory / "4", "no metadata")  # what a rollback remembers outlives what it went to
    assert opened(tmp_path, keep=3, read_only=True).restore_one(abstract(state), 6).memory["rollbacks"] == 1
    damage(saved.directory / "6", "no metadata")
    assert opened(tmp_path, keep=3).restore(abstract(state)).memory == {"rollbacks": 1, "skipped_updates": 4}


def test_checkpoints_that_a_rollback_may_go_to_are_not_crowded_out_by_others(tmp_path, opened):
    saved, state = opened(tmp_path, keep=2, due_every=4), make_state(self_copy=False)
    for step in (4, 8, 12, 13, 14, 15):
        saved.save(state._replace(step=step))
    saved.wait()
    assert steps_in(saved) == [8, 12, 14, 15]
    for step in (16, 17, 18):
        saved.save(state._replace(step=step), good=step != 16)
    saved.wait()
    assert steps_in(saved) == [8, 12, 17, 18]


ONE_CANNOT_READ = """
import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.state import RunState

real = ocp.StandardCheckpointHandler.restore
def restore(handler, directory, *args, **kwargs):
    if me == 1 and directory.parent.name == "4":
        raise ValueError("a disk of this host alone")
    return real(handler, directory, *args, **kwargs)

ocp.StandardCheckpointHandler.restore = restore
place = NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), PartitionSpec("all"))
array = jax.jit(lambda: jnp.arange(64.0), out_shardings=place)()
state = RunState({"w": array}, {"m": array}, None, 3, 5, {})
saved = Checkpoints({run!r}, keep=2, say=lambda text: say(text.rpartition("; ")[2]))

def read():
    back = saved.restore(state)
    pairs = zip(back.weights["w"].addressable_shards, array.addressable_shards)
    here = [np.array_equal(a.data, b.data) for a, b in pairs]
    say(back.step, saved.latest(), all(here), len(here), jax.process_count())
    return back

read()
for step in (3, 4):
    saved.save(state._replace(step=step))
saved.wait()
back = read()
saved.save(back._replace(step=4))
saved.close()
"""


def test_one_process_and_two_go_on_from_each_other_s_checkpoints_and_one_that_one_cannot_read_is_put_aside_by_both(
    tmp_path, monkeypatch
):
    place = NamedSharding(make_mesh(MeshConfig(1, 8, 1)), PartitionSpec("fsdp"))
    array = jax.device_put(jnp.arange(64.0), place)
    state = RunState({"w": array}, {"m": array}, None, 2, 5, {})
    alone = Checkpoints(tmp_path, keep=2)
    alone.save(state)
    alone.close()
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    (code, said, error), other = finish(start(ONE_CANNOT_READ.replace("{run!r}", repr(str(tmp_path)))), timeout=300)
    assert code == other[0] == 0, error + other[2]
    lines = [[line for line in text.splitlines() if "Gloo" not in line] for text in (said, other[1])]
    both = ["2 2 True 1 2", "3 3 True 1 2"]
    assert lines == [[both[0], "going on from step 3 instead", both[1]], both]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4", "damaged-4"]
    alone = Checkpoints(tmp_path, keep=2)
    assert_equal(alone.restore(abstract(state)), state._replace(step=4))
    alone.close()


def damage(checkpoint: Path, how: str) -> None:
    """What a disk or a copy that broke off leaves behind."""
    if how == "no metadata":
        (checkpoint / "run" / "metadata").write_bytes(b"")
    elif how == "no arrays":
        shutil.rmtree(checkpoint / "arrays")
    else:
        files = [path for path in (checkpoint / "arrays").rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        whole = largest.read_bytes()
        half = len(whole) // 2
        rest = {
            "cut short": b"",
            "zeros": b"\0" * (len(whole) - half),
            "a bit": bytes([whole[half] ^ 4]) + whole[half + 1 :],
        }
        largest.write_bytes(whole[:half] + rest[how])


# Orbax leaves coroutines behind when one array of several cannot be read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["no metadata", "no arrays", "cut short", "zeros", "a bit"])
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_used(tmp_path, opened, how):
    saved = opened(tmp_path, keep=3)
    state = make_state(self_copy=False)
    for step in (2, 3, 4):
        saved.save(state._replace(step=step))
        saved.wait()
    damage(saved.directory / "4", how)
    told = []
    looked = opened(tmp_path, keep=3, read_only=True, say=told.append)
    assert looked.restore(abstract(state)).step == 3
    assert "checkpoints/4 cannot be read" in told[0] and (saved.directory / "4").exists()
    again = opened(tmp_path, keep=3, say=told.append)
    assert_equal(again.restore(abstract(state)), state._replace(step=3))
    assert re.search(r"checkpoints/4 cannot be read \([\w ]+\) and is now .*damaged-4; going on from step 3", told[1])
    assert sorted(os.listdir(saved.directory)) == ["2", "3", "damaged-4"] and again.latest() == 3
    again.save(state._replace(step=4))
    again.wait()
    assert opened(tmp_path, keep=3).restore(abstract(state)).step == 4
    damage(saved.directory / "4", how)
    assert opened(tmp_path, keep=3, say=told.append).restore(abstract(state)).step == 3
    assert sorted(os.listdir(saved.directory)) == ["2", "3", "damaged-4", "damaged-4-1"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"step": 3}'])
def test_a_damaged_record_of_a_rollback_is_told(tmp_path, opened, text):
    opened(tmp_path, keep=1)
    (tmp_path / "checkpoints" / "left.json").write_text(text)
    with pytest.raises(UserError, match=r"left\.json is damaged; .* remove the file"):
        opened(tmp_path, keep=1)


def test_a_checkpoint_from_before_there_were_digests_is_read(tmp_path, opened):
    saved, state = opened(tmp_path, keep=1), make_state(self_copy=False)
    saved.save(state)
    saved.wait()
    path = saved.directory / "3" / "run" / "metadata"
    run = json.loads(path.read_text())
    assert len(run.pop("digests")) == len(jax.tree.leaves((state.weights, state.opt_state)))
    path.write_text(json.dumps(run))
    assert_equal(opened(tmp_path, keep=1).restore(abstract(state)), state)


def test_no_checkpoint_that_can_be_read_is_refused_and_nothing_is_moved(tmp_path, opened):
    saved = opened(tmp_path, keep=2)
    state = make_state(self_copy=False)
    for step in (3, 4):
        saved.save(state._replace(step=step))
        saved.wait()
        damage(saved.directory / str(step), "no metadata")
    with pytest.raises(UserError, match=r"run.dir: no checkpoint can be read: .*checkpoints/4 .*checkpoints/3 "):
        opened(tmp_path, keep=2).restore(abstract(state))
    assert sorted(os.listdir(saved.directory)) == ["3", "4"]


def test_weights_survive_from_eight_devices_to_four_to_eight(tmp_path, opened):
    """The same bits, each time in the places of the mesh they are restored onto."""
    sizes = ((2, 2, 2), (1, 4, 1), (1, 8, 1))
    meshes = [make_mesh(MeshConfig(*each), jax.devices()[: math.prod(each)]) for each in sizes]
    state = whole = make_state(meshes[0])
    for number, mesh in enumerate(meshes[1:], start=4):
        saved = opened(tmp_path, keep=1)
        saved.save(state._replace(step=number))
        saved.wait()
        like = make_state(mesh)
        state = opened(tmp_path, keep=1).restore(abstract(like))
        places = [[x.sharding for x in jax.tree.leaves(each[:3])] for each in (state, like)]
        assert places[0] == places[1]
        assert_equal(state, whole._replace(step=number))
