"""Rewrites that are used again: of whom, for how long, and alike in a run that was stopped."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mpd_jax.train.metrics import read_rows
from mpd_jax.train.records import Records
from mpd_jax.train.state import NEW_MEMORY as MEMORY
from tests.test_loop import SEED, Killed, Problems, open_run, rows_without_times, run, shorten

AGE = 2
# Four of ten problems a step: p0 and p1 come up in steps 0, 2 and 5, p2 and p3 in 0, 3 and 5, p4 and p5 in 1 and 3,
# p6 and p7 in 1 and 4, p8 and p9 in 2 and 4.
REUSED = [[], [], ["p0", "p1"], ["p4", "p5"], ["p8", "p9"], ["p2", "p3"]]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("reusing")
    state, opened = run(run_dir, max_age=AGE)
    return jax.device_get(state), rows_without_times(run_dir), opened


def trajectories(run_dir, step):
    return Records(run_dir, SEED).load(step, Problems().at(step))


def test_what_is_young_enough_is_used_again_and_all_else_is_made_anew(straight):
    _, rows, opened = straight
    run_dir = opened.parts.run_dir
    assert [row["reused"] for row in rows] == [len(ids) for ids in REUSED]
    assert [row["staleness"] for row in rows] == [0, 0, AGE, AGE, AGE, AGE]
    assert [row["made_staleness"] for row in rows] == [0] * 6
    for step, ids in enumerate(REUSED):
        made = trajectories(run_dir, step)
        assert [t.problem_id for t in made] == [problem.id for problem in Problems().at(step)]
        assert [t.problem_id for t in made if t.reused] == ids
        assert all(t.version == step - AGE * t.reused for t in made)
        new = [t for t in made if not t.reused]
        assert rows[step]["written_total"] == sum(len(t.original.response) for t in new)
        earlier = {t.problem_id: t for t in trajectories(run_dir, step - AGE)} if ids else {}
        assert [replace(t, reused=False) for t in made if t.reused] == [earlier[name] for name in ids]


@pytest.mark.parametrize("step, phase", [(2, "rewrite"), (3, "write"), (3, "update"), (5, "rewrite")])
def test_a_run_that_was_stopped_uses_the_same_again(straight, tmp_path, step, phase):
    with pytest.raises(Killed):
        run(tmp_path, kill=(step, phase), max_age=AGE)
    state, _ = run(tmp_path, max_age=AGE)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), straight[0])
    assert rows_without_times(tmp_path) == straight[1]


def test_a_problem_of_which_a_trajectory_was_dropped_is_made_anew_and_a_whole_step_may_be_used_again(tmp_path):
    class Same:
        def at(self, step):
            return Problems().at(0)

    def drop(problems, written, step, memory):
        asked.append([problem.id for problem in problems])
        return [
            replace(t, dropped=step == 0 and t.problem_id == "p1") for t in shorten(problems, written, step, memory)
        ]

    asked = []
    run(tmp_path, steps=5, problems=Same(), rewrite=drop, max_age=AGE, eval_every=0)
    assert asked == [["p0", "p1", "p2", "p3"], ["p1"], ["p0", "p2", "p3"], ["p1"]]
    assert [row["reused"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 3, 4, 1, 3]


def test_records_are_taken_from_disk_unless_what_was_made_or_used_again_is_too_old(tmp_path):
    problems, opened = Problems().at(2), open_run(tmp_path, max_age=AGE)
    opened.student.sum, opened.student.version = 0.0, 0
    written = opened.student.write(problems, 2, MEMORY)
    stale = shorten(problems, written, 2, MEMORY)
    used = [replace(t, reused=True) for t in stale]
    for saved, age, taken in ((stale, AGE, False), (used, AGE, True), (used, AGE - 1, False)):
        opened.parts.records.save(2, saved)
        found = replace(opened.parts, max_age=age).making.stored(2, problems, "final", MEMORY)
        assert (found is not None) == taken
    opened.close()
