"""The look-ahead: the next step's trajectories beside the update, by weights that are one older, and never older."""

import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from mpd_jax import hosts
from mpd_jax.train.ahead import Ahead
from mpd_jax.train.loop import train
from mpd_jax.train.metrics import read_rows
from mpd_jax.types import UserError
from tests.test_loop import MODEL, SEED, STEPS, TX, Killed, open_run, run, weights_of
from tests.test_loop import new_state as fresh


def start():
    return fresh(MODEL, TX, None, weights_of(MODEL, 0), seed=SEED, self_weights=weights_of(MODEL, 1))


def test_every_step_but_the_first_is_written_by_weights_one_update_older(tmp_path):
    run(tmp_path, lookahead=1, eval_every=0)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0] + [1] * (STEPS - 1)
    assert all(row["wait_seconds"] >= 0 and row["write_seconds"] > 0 for row in rows[1:])


def test_without_it_no_step_is_stale(tmp_path):
    run(tmp_path, steps=3)
    assert {row["staleness"] for row in read_rows(tmp_path / "metrics.jsonl")} == {0}


def test_the_same_answers_give_the_same_weights_whoever_is_faster(tmp_path):
    ends = []
    for name, slow in (("writer", "write"), ("update", "update")):
        opened = open_run(tmp_path / name, steps=4, lookahead=1)
        call = getattr(opened.parts, slow)

        def late(*args, call=call):
            time.sleep(0.05)
            return call(*args)

        state = train(replace(opened.parts, **{slow: late}), start())
        ends.append(jax.device_get(state.weights))
        opened.close()
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_an_update_does_not_wait_for_the_next_step_s_writer(tmp_path):
    """The writer of step 1 does not return before the update of step 0 has begun."""
    opened, updated = open_run(tmp_path, steps=2, lookahead=1, eval_every=0), threading.Event()

    def write(problems, step, memory):
        assert step == 0 or updated.wait(30), "the update waits for the look-ahead"
        return opened.student.write(problems, step, memory)

    def update(*args):
        updated.set()
        return opened.parts.update(*args)

    state = train(replace(opened.parts, write=write, update=update), start())
    opened.close()
    assert state.step == 2


def test_what_goes_wrong_beside_the_loop_ends_it_with_the_same_words(tmp_path):
    opened = open_run(tmp_path, lookahead=1)

    def write(problems, step, memory):
        if step == 2:
            raise UserError("http://host:8000: gone")
        return opened.student.write(problems, step, memory)

    with pytest.raises(UserError, match="http://host:8000: gone"):
        train(replace(opened.parts, write=write), start())
    opened.close()


def test_a_stop_is_heard_beside_the_loop_and_what_is_done_is_saved(tmp_path):
    opened = open_run(tmp_path, lookahead=1, save_every=100, eval_every=0)

    def write(problems, step, memory):
        if step == 3:
            raise hosts.Stopped
        return opened.student.write(problems, step, memory)

    with pytest.raises(hosts.Stopped):
        train(replace(opened.parts, write=write), start())
    opened.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    state, _ = run(tmp_path, lookahead=1, eval_every=0)
    assert state.step == STEPS


def test_a_killed_run_takes_what_was_made_ahead_and_nothing_older(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill=(3, "update"), lookahead=1, eval_every=0)
    # The checkpoint is that of two updates; the trajectories of steps 2 and 3 were made by weights one older.
    _, opened = run(tmp_path, lookahead=1, eval_every=0)
    assert min(opened.student.calls) > 3
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS)) and max(row["staleness"] for row in rows) == 1


def test_trajectories_older_than_the_config_allows_are_made_again(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill=(3, "update"), lookahead=1, eval_every=0)
    _, opened = run(tmp_path, lookahead=0, eval_every=0)
    assert {2, 3} <= set(opened.student.calls)
    assert all(row["staleness"] == 0 for row in read_rows(tmp_path / "metrics.jsonl")[2:])


def test_an_evaluation_waits_until_nobody_samples_with_the_older_weights(tmp_path):
    opened, busy = open_run(tmp_path, steps=4, eval_every=2, lookahead=1), threading.Event()

    def write(problems, step, memory):
        busy.set()
        time.sleep(0.05)
        made = opened.student.write(problems, step, memory)
        busy.clear()
        return made

    seen = []
    train(replace(opened.parts, write=write, evaluate=lambda state: seen.append(busy.is_set())), start())
    opened.close()
    assert seen == [False]


def test_seconds_of_each_phase_are_those_of_the_thread():
    def make(begin):
        begin(0, "write")
        time.sleep(0.05)
        begin(0, "rewrite")
        return ()

    noted = []
    ahead = Ahead(make, lambda step, phase: noted.append((step, phase)))
    assert ahead.result() == ()
    assert 0.04 < ahead.seconds["write"] < 1 and noted == [(0, "write"), (0, "rewrite")]


def test_a_stopped_loop_leaves_nobody_sampling(tmp_path, monkeypatch):
    opened, sampling, stopped = open_run(tmp_path, lookahead=1, eval_every=0), threading.Event(), threading.Event()
    updates = iter(range(9))

    def write(problems, step, memory):
        if step == 2:
            sampling.set()
            assert stopped.wait(30)
        made = opened.student.write(problems, step, memory)
        sampling.clear()
        return made

    def update(*args):
        if next(updates) == 1:  # step 2 is being written
            assert sampling.wait(30)
            monkeypatch.setattr(hosts, "check", stop)
            stopped.set()
        return opened.parts.update(*args)

    def stop():
        raise hosts.Stopped

    with pytest.raises(hosts.Stopped):
        train(replace(opened.parts, write=write, update=update), start())
    opened.close()
    assert not sampling.is_set()
