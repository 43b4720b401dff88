"""Guards: when a run leaves a band, and that what follows is the same whenever the run is killed."""

import itertools
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mpd_jax import hosts
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.guards import Action, Band, GuardsConfig, GuardStop, answer, excursion, suspect, tripped
from mpd_jax.train.loop import _Run, train
from mpd_jax.train.metrics import Metrics, read_rows
from mpd_jax.train.records import Records, read_trajectories
from mpd_jax.train.state import NEW_MEMORY, RunState, Trained, abstract
from mpd_jax.types import UserError
from tests.test_loop import SEED, Killed, open_run, rows_without_times, to_batch

# A figure of each band inside (0) and on either side (-1, 1) of its bounds.
SIDES = {
    "entropy": {"low": 0.5, "high": 1.5, "row": lambda side: {"student_entropy": 1.0 + side}},
    "tokens": {"low": 50, "high": 90, "row": lambda side: {"written_tokens": 70.0 + 30 * side}},
    "divergence": {"low": 0.1, "high": 0.3, "row": lambda side: {"divergence": 0.2 + 0.15 * side}},
    "finished": {
        "low": 0.4,
        "high": 0.6,
        "row": lambda side: {"ended": {"cut": 5 - 4 * side, "stopped": 5 + 4 * side}},
    },
}


def series(name, sides):
    """Rows of the steps from 0 on; None is a step without any figure."""
    return [{"step": s, **({} if side is None else SIDES[name]["row"](side))} for s, side in enumerate(sides)]


def config(name="entropy", action: Action = "rollback", **changed):
    return GuardsConfig(**{name: Band(action, SIDES[name]["low"], SIDES[name]["high"])}, **changed)


@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
@pytest.mark.parametrize("side", [-1, 1], ids=["low", "high"])
@pytest.mark.parametrize("name", SIDES)
def test_every_band_answers_on_both_sides_and_two_steps_after_the_row(name, side, action):
    rows = series(name, [0, 0, side, 0])
    found = {step: tripped(config(name, action), rows, step) for step in range(6)}
    assert [step for step, open_ones in found.items() if open_ones] == [4]
    (one,) = found[4]
    assert (one.name, one.action, one.first, one.last, one.steps, one.origin) == (name, action, 2, 2, 1, 2)
    assert not any(tripped(config(name, action), series(name, [0] * 5), step) for step in range(7))


def test_bounds_are_inside_and_a_missing_bound_is_none():
    band = Band("warn", low=1.0)
    assert band.holds(1.0) and band.holds(1e9) and not band.holds(0.99)
    assert Band("warn", high=1.0).holds(-5.0)


@pytest.mark.parametrize(
    ("sides", "answered"),
    [
        ([0, -1, -1, -1, 0], [5]),
        ([0, -1, -1, 0, -1, -1], []),
        ([0, -1, 1, -1, 0], [5]),  # outside on another side is outside
        ([0, -1, None, -1, -1, 0], [6]),  # a step without the figure is passed over
    ],
)
def test_patience_counts_the_steps_in_a_row(sides, answered):
    rows = series("entropy", sides)
    found = [step for step in range(10) if tripped(config(patience=3), rows, step)]
    assert found == answered


def test_a_warning_is_said_once_an_excursion():
    rows = series("entropy", [0, -1, -1, None, -1, -1, 0, -1, -1, -1])
    assert [s for s in range(12) if tripped(config(action="warn", patience=2), rows, s)] == [4, 10]


def test_of_several_bands_the_strictest_decides_and_warnings_come_first():
    rows = [{**a, **b} for a, b in zip(series("entropy", [0, -1]), series("tokens", [0, 1]), strict=True)]
    both = GuardsConfig(entropy=Band("stop", low=0.5), tokens=Band("rollback", high=90))
    assert [one.action for one in tripped(both, rows, 3)] == ["rollback", "stop"]
    both = GuardsConfig(entropy=Band("rollback", low=0.5), tokens=Band("warn", high=90))
    assert [one.action for one in tripped(both, rows, 3)] == ["warn", "rollback"]


def test_no_state_is_saved_while_a_band_that_stops_or_rolls_back_is_left():
    rows = series("entropy", [0, 0, -1, -1, 0, 0])
    assert [s for s in range(7) if suspect(config(patience=3), rows, s)] == [3, 4]
    assert [s for s in range(7) if suspect(config(patience=2), rows, s)] == [3, 4, 5]  # answered before step 5
    assert not any(suspect(config(action="warn"), rows, s) for s in range(7))


def test_a_rollback_goes_to_the_last_due_checkpoint_before_the_weights_that_first_wrote_outside():
    one = tripped(config(), series("entropy", [0] * 8 + [-1]), 10)[0]
    memory = {**NEW_MEMORY, "rollbacks": 1, "learning_rate_scale": 0.5}
    found = answer(config(), one, memory, [4, 6, 7, 8], every=2)
    assert (found.good, found.left) == (6, [7, 8])
    assert found.memory == {"rollbacks": 2, "learning_rate_scale": 0.25}
    assert answer(config(), one, memory, [8], every=2)[1:3] == ([8], 0)


@pytest.mark.parametrize(("name", "origin"), [("entropy", 8), ("divergence", 8), ("tokens", 7), ("finished", 7)])
def test_text_that_was_made_by_older_weights_blames_those_and_text_that_is_used_again_none(name, origin):
    rows = [{**row, "made_staleness": 1, "staleness": 5} for row in series(name, [0] * 8 + [-1])]
    one = tripped(config(name), rows, 10)[0]
    assert (one.first, one.origin) == (8, origin)
    assert answer(config(name), one, NEW_MEMORY, [6, 7, 8], every=1).good == origin - 1


def test_a_stop_and_a_rollback_too_many_leave_the_last_good_checkpoint_and_say_what_to_change():
    rows = series("entropy", [0] * 8 + [-1])
    for guards in (config(action="stop"), config(max_rollbacks=1)):
        found = answer(guards, tripped(guards, rows, 10)[0], {**NEW_MEMORY, "rollbacks": 1}, [4, 7, 8], every=2)
        assert (found.good, found.left) == (None, [8])
        assert "guards.entropy: 0 at step 8, outside low = 0.5, high = 1.5: stopped" in found.said
        assert "it goes on from step 7" in found.said and "widen guards.entropy" in found.said
    assert "after guards.max_rollbacks = 1 rollbacks; learning_rate_scale = 1 stays. Raise guards.max" in found.said


def test_where_the_start_itself_is_outside_there_is_nothing_to_go_back_to():
    one = tripped(config(), series("entropy", [-1]), 2)[0]
    found = answer(config(), one, NEW_MEMORY, [1, 2], every=1)
    assert found.good is None and found.left == [1, 2]
    assert "the weights that the run starts from are outside" in found.said
    # They were inside at step 0: what they wrote for step 1 is drawn anew.
    ahead = [{**row, "made_staleness": row["step"]} for row in series("tokens", [0, 1])]
    one = tripped(config("tokens"), ahead, 3)[0]
    assert answer(config("tokens"), one, NEW_MEMORY, [1, 2], every=1)[1:3] == ([1, 2], 0)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Band("stop"),
        lambda: Band("stop", low=2.0, high=1.0),
        lambda: Band("stop", low=float("nan")),
        lambda: GuardsConfig(patience=0),
        lambda: GuardsConfig(learning_rate_factor=0.0),
        lambda: GuardsConfig(max_rollbacks=0),
    ],
)
def test_what_cannot_be_is_refused(made):
    with pytest.raises(UserError, match="is not allowed"):
        made()


# The loop


def run(run_dir, entropies, guards=None, kill=None, steps=6, save_every=2, keep=2, **changed):
    """A run whose mean entropy at a step is entropies(step, learning-rate scale), and whose text is cut where that is
    low; resumed if it can be. Returns the state, what was said, and the memory with which each step was written."""
    saved = Checkpoints(run_dir, keep=keep, due_every=save_every, say=print)
    said, written = [], []

    def start():
        weights, moments, own = ({"w": jnp.arange(4.0)} for _ in range(3))
        fresh = RunState(weights, moments, own, 0, SEED, dict(NEW_MEMORY))
        state = saved.restore(abstract(fresh))
        return state or fresh._replace(memory={**fresh.memory, **saved.memory_at(0)})

    at = []

    def batch(problems, trajectories):
        at.append(trajectories[0].version)
        return to_batch(problems, trajectories)

    def update(trained, target, batch, scale):
        moved = {"w": trained.weights["w"] + scale * (1 + np.sum(batch.response_BR))}
        sums = {name: np.float32(1) for name in ("loss", "grad_norm", "finite", "tokens", "divergence")}
        by_position = {name: np.zeros(8) for name in ("divergence_at", "tokens_at")}
        out = {**sums, **by_position, "student_entropy": np.float32(entropies(at[-1], scale))}
        return Trained(moved, jax.tree.map(jnp.sin, trained.opt_state)), out

    def write(problems, step, memory):
        written.append((step, memory["rollbacks"], memory["length_rung"]))
        ended = "cut" if entropies(opened.student.version, memory["learning_rate_scale"]) < 0.5 else "stopped"
        return [replace(t, ended=ended) for t in opened.student.write(problems, step, memory)]

    try:
        state = start()
        how = {"save_every": save_every, "checkpoints": saved, "start": start, "say": said.append, "eval_every": 0}
        how |= {"guards": guards, "to_batch": batch, "update": update, "write": write} | changed
        opened = open_run(run_dir, state.step, kill, steps)
        try:
            state = train(replace(opened.parts, **how), state)
        finally:
            opened.close()
    finally:
        saved.close()
    return jax.device_get(state), said, written


def collapse(step, scale):
    """From step 3 on, unless the learning rate is lower."""
    return 0.1 if step >= 3 and scale == 1 else 1.0


GUARDS = GuardsConfig(entropy=Band("rollback", low=0.5))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    state, said, written = run(run_dir, collapse, GUARDS)
    return state, rows_without_times(run_dir), said, written, run_dir


def test_a_run_that_collapses_goes_back_and_on_with_other_draws_at_a_lower_rate(straight):
    state, rows, said, written, run_dir = straight
    assert (state.step, state.memory["rollbacks"], state.memory["learning_rate_scale"]) == (6, 1, 0.5)
    # Row 3 is read during step 4; the checkpoint of step 4 was not written, that of step 2 was.
    assert [(step, rollbacks) for step, rollbacks, _ in written] == [
        *((step, 0) for step in range(5)),
        *((step, 1) for step in range(2, 6)),
    ]
    assert said == [
        "guards.entropy: 0.1 at step 3, outside low = 0.5: rollback 1 to step 2, from where on the "
        "learning rate is multiplied by 0.5"
    ]
    assert [row["step"] for row in rows] == list(range(6))
    assert [(row["rollbacks"], row["learning_rate_scale"]) for row in rows[1:3]] == [(0, 1.0), (1, 0.5)]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()) == ["4", "6"]


def test_of_two_bands_that_trip_at_once_the_stricter_decides_and_every_warning_is_said(monkeypatch):
    rows = [{**SIDES["entropy"]["row"](side), **SIDES["tokens"]["row"](side), "step": side} for side in (0, 1)]
    left, said = [], []
    monkeypatch.setattr(_Run, "leave", lambda run, state, guards, one: left.append((one.name, one.action)))
    for entropy, tokens in itertools.product(("warn", "rollback", "stop"), repeat=2):
        guards = GuardsConfig(entropy=Band(entropy, high=1.5), tokens=Band(tokens, high=90))
        parts = SimpleNamespace(guards=guards, metrics=SimpleNamespace(history=rows), steps=9, say=said.append)
        _Run(cast(Any, parts), 0).guarded(cast(Any, SimpleNamespace(step=3)))
    assert [action for _, action in left] == [
        "rollback",
        "stop",
        "rollback",
        "rollback",
        "stop",
        "stop",
        "stop",
        "stop",
    ]
    assert left[0][0] == "tokens" and left[2][0] == "entropy"
    assert len(said) == 6  # both of the first pair, and the one of four others


def test_no_step_is_sampled_again_with_the_same_draws(straight, undecided):
    for step in (2, 3):
        name = f"trajectories/step_{step:06d}.jsonl.gz"
        old, new = (read_trajectories(where / name)[1] for where in (undecided, straight[4]))
        assert not {t.response for t in old} & {t.response for t in new}
    for step in (0, 1):
        name = f"trajectories/step_{step:06d}.jsonl.gz"
        assert (undecided / name).read_bytes() == (straight[4] / name).read_bytes()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """With checkpoints that a rollback has to remove."""
    run_dir = tmp_path_factory.mktemp("dense")
    return run(run_dir, collapse, GUARDS, save_every=1)[0], rows_without_times(run_dir)


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    """The directory of a run like `dense`, killed when it was about to decide."""
    run_dir = tmp_path_factory.mktemp("undecided")
    with pytest.raises(Killed):
        run(run_dir, collapse, GUARDS, kill=(5, "leave"), save_every=1)
    return run_dir


def dies(*args, **kwargs):
    raise Killed


def then(real, follows):
    """`real`, and at once what follows."""

    def call(*args, **kwargs):
        result = real(*args, **kwargs)
        follows()
        return result

    return call


REMOVED = (type(epath.Path("/")), "rmtree")
MOMENTS = {  # (the call, before or after which the run is killed, once this other call was made)
    "decided": ((Checkpoints, "leave"), "after", None),
    "a checkpoint gone": (REMOVED, "after", (Checkpoints, "leave")),
    "all of them gone": ((Checkpoints, "_write_left"), "before", (Checkpoints, "leave")),
    "restored": ((Metrics, "rewind"), "before", None),
    "rewound": ((Records, "forget_after"), "before", None),
    "sampled": ((Records, "save"), "after", (Records, "forget_after")),
}


@pytest.mark.parametrize("moment", ["undecided", *MOMENTS])
def test_a_run_killed_at_any_moment_of_a_rollback_ends_with_the_same_bits(
    dense, undecided, tmp_path, monkeypatch, moment
):
    """After the decision nothing is sampled any more with the draws from before it."""
    run_dir = shutil.copytree(undecided, tmp_path / "run")
    if moment != "undecided":
        with monkeypatch.context() as patch, pytest.raises(Killed):
            (owner, name), when, armed_by = MOMENTS[moment]
            deadly = dies if when == "before" else then(getattr(owner, name), dies)
            if armed_by is None:
                patch.setattr(owner, name, deadly)
            else:
                patch.setattr(*armed_by, then(getattr(*armed_by), lambda: patch.setattr(owner, name, deadly)))
            run(run_dir, collapse, GUARDS, save_every=1)
    state, _, written = run(run_dir, collapse, GUARDS, save_every=1)
    jax.tree.map(np.testing.assert_array_equal, state, dense[0])
    assert rows_without_times(run_dir) == dense[1]
    assert written and all(rollbacks == 1 for _, rollbacks, _ in written)


def test_a_rollback_that_removes_no_checkpoint_is_remembered_too(straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        armed = then(Records.forget_after, lambda: patch.setattr(Records, "save", then(Records.save, dies)))
        patch.setattr(Records, "forget_after", armed)
        run(tmp_path, collapse, GUARDS)
    state, _, written = run(tmp_path, collapse, GUARDS)
    jax.tree.map(np.testing.assert_array_equal, state, straight[0])
    assert [step for step, rollbacks, _ in written if rollbacks == 0] == []


def test_what_is_used_again_after_a_rollback_is_from_before_it_also_in_a_run_that_was_killed(tmp_path, monkeypatch):
    whole, _, _ = run(tmp_path / "whole", collapse, GUARDS, max_age=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Records, "forget_after", dies)
        run(tmp_path / "killed", collapse, GUARDS, max_age=2)
    state, _, _ = run(tmp_path / "killed", collapse, GUARDS, max_age=2)
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    rows = rows_without_times(tmp_path / "whole")
    assert rows_without_times(tmp_path / "killed") == rows and all(row["reused"] for row in rows[2:])


@pytest.mark.parametrize(("at", "save_every"), [(4, 2), (5, 2), (6, 2), (5, 1)])
def test_a_run_asked_to_stop_twice_around_an_excursion_ends_with_the_same_bits(
    straight, dense, tmp_path, monkeypatch, at, save_every
):
    """It saves where no checkpoint is due, but no state that may be left, and crowds none out that a rollback goes
    to."""
    for last in (at, 2):
        looks = itertools.count(1)

        def check(looks=looks, last=last):
            if next(looks) == last:
                raise hosts.Stopped

        with monkeypatch.context() as patch, pytest.raises(hosts.Stopped):
            patch.setattr(hosts, "check", check)
            run(tmp_path, collapse, GUARDS, save_every=save_every)
    state, _, _ = run(tmp_path, collapse, GUARDS, save_every=save_every)
    whole = {2: straight, 1: dense}[save_every]
    jax.tree.map(np.testing.assert_array_equal, state, whole[0])
    assert rows_without_times(tmp_path) == whole[1]


def test_good_checkpoints_are_not_crowded_out_while_patience_lasts_nor_by_a_last_step_within_it(tmp_path):
    guards = replace(GUARDS, patience=3)
    state, said, _ = run(tmp_path, collapse, guards, steps=5, save_every=1)
    assert (state.step, said) == (5, [])
    _, said, _ = run(tmp_path, collapse, guards, steps=8, save_every=1)
    assert said[0].endswith("since step 3: rollback 1 to step 2, from where on the learning rate is multiplied by 0.5")


def test_a_run_without_a_checkpoint_from_before_goes_back_to_its_start(tmp_path):
    def leaving(done):
        left.append((done, (tmp_path / "whole" / "checkpoints" / "left.json").exists()))

    left = []
    whole, said, written = run(tmp_path / "whole", collapse, GUARDS, save_every=100, leaving=leaving)
    assert "rollback 1 to step 0" in said[0] and left == [(0, False)]
    assert [step for step, rollbacks, _ in written if rollbacks] == list(range(6))
    with pytest.raises(Killed):
        run(tmp_path / "killed", collapse, GUARDS, save_every=100, start=dies)
    state, _, written = run(tmp_path / "killed", collapse, GUARDS, save_every=100)
    assert [(step, rollbacks) for step, rollbacks, _ in written] == [(step, 1) for step in range(6)]
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_a_stop_leaves_nothing_of_the_bad_state_and_a_wider_band_goes_on_from_before_it(straight, tmp_path):
    guards = replace(GUARDS, entropy=Band("stop", low=0.5))
    for _ in range(2):  # started again unchanged it stops again
        with pytest.raises(
            GuardStop, match=r"guards.entropy: 0.1 at step 3, .* it goes on from step 2, from before that"
        ):
            run(tmp_path, collapse, guards)
        looked = Checkpoints(tmp_path, keep=2, read_only=True)
        assert max(looked.steps()) == 2
        looked.close()
    wider = replace(GUARDS, entropy=Band("warn", low=0.5))
    state, said, written = run(tmp_path, collapse, wider)
    assert (state.step, state.memory["rollbacks"], written[0][0]) == (6, 0, 5)  # what was sampled is used
    assert said == ["warning: guards.entropy: 0.1 at step 3, outside low = 0.5"]


def test_rollbacks_end_in_a_stop_and_what_happens_in_the_last_steps_is_answered_too(tmp_path):
    guards = replace(GUARDS, max_rollbacks=2)
    with pytest.raises(GuardStop, match=r"after guards\.max_rollbacks = 2 rollbacks"):
        run(tmp_path, lambda step, scale: 0.1 if step == 5 else 1.0, guards)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert (rows[-1]["step"], rows[-1]["rollbacks"], rows[-1]["learning_rate_scale"]) == (5, 2, 0.25)
    looked = Checkpoints(tmp_path, keep=2, read_only=True)
    assert max(looked.steps()) == 4
    looked.close()


def test_a_step_that_is_being_made_ahead_is_given_up_and_what_older_weights_wrote_blames_those(tmp_path):
    """Row 4 was written by the weights of step 3, so that neither checkpoint 3 nor 4 is good."""
    guards = GuardsConfig(finished=Band("rollback", low=0.5))
    state, said, written = run(tmp_path, collapse, guards, save_every=1, keep=3, lookahead=1)
    assert "at step 4, outside low = 0.5: rollback 1 to step 2" in said[0]
    assert (state.step, state.memory["rollbacks"]) == (6, 1)
    assert [step for step, rollbacks, _ in written if rollbacks] == [2, 3, 4, 5]
    assert [row["staleness"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 0, 1, 1, 1]


def test_the_excursion_of_a_series_is_what_its_last_rows_say():
    assert excursion("entropy", Band("stop", low=0.5), series("entropy", [-1, 0]), 5) is None
