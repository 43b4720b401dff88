"""Trajectories on disk read back as the same values, whole or not at all."""

import gzip
import math
import os
from dataclasses import replace

import numpy as np
import pytest

from mpd_jax.files import write_atomically
from mpd_jax.train.records import FIRST, Records, from_json, read_trajectories, to_json
from mpd_jax.types import Problem, Trajectory, UserError

PROBLEMS = [Problem("a", "?"), Problem("b ", "?")]


def trajectory(problem_id="a", original=None) -> Trajectory:
    logprobs = (-0.1, float(np.float32(-1.3)), -math.pi * 1e-30, -5e-324, float("-inf"))
    return Trajectory(
        problem_id=problem_id,
        attempt=1,
        prompt=(1, 2, 2**31 - 1),
        response=(5, 6, 7, 8, 0),
        writer="student",
        version=3,
        ended="stopped",
        verdict="kept",
        dropped=original is None,
        original=original,
        logprobs=logprobs,
        rewriting=(9, 5),
    )


def test_a_trajectory_reads_back_as_the_same_value_to_the_last_bit():
    whole = trajectory(original=trajectory())
    assert from_json(to_json(whole)) == whole
    earlier = to_json(whole).replace(',"rewriting":[9,5]', "")
    assert from_json(earlier) == replace(whole, rewriting=(0, 0), original=replace(trajectory(), rewriting=(0, 0)))


def test_records_read_back_in_order_and_unasked_steps_are_absent(tmp_path):
    records = Records(tmp_path, seed=7)
    saved = [trajectory("b "), trajectory("a", original=trajectory("a"))]
    records.save(12, saved)
    assert records.load(12, PROBLEMS) == saved
    assert records.load(13, PROBLEMS) is None
    assert records.path(12).name == "step_000012.jsonl.gz"
    assert read_trajectories(records.path(12))[1] == saved


def test_what_was_written_stays_until_its_rewrite_is_there(tmp_path):
    records = Records(tmp_path, seed=7)
    records.save(3, [trajectory()], stage="written")
    assert records.load(3, PROBLEMS) is None
    assert records.load(3, PROBLEMS, stage="written") == [trajectory()]
    records.save(3, [trajectory()])
    assert records.load(3, PROBLEMS, stage="written") is None
    assert os.listdir(records.directory) == ["step_000003.jsonl.gz"]


@pytest.mark.parametrize("left", [10, -10, "line"])
def test_trajectories_of_which_a_part_is_lost_are_made_again(tmp_path, left):
    records = Records(tmp_path, seed=7)
    records.save(0, [trajectory(), trajectory("b ")])
    data = records.path(0).read_bytes()
    lines = gzip.decompress(data).splitlines(keepends=True)
    records.path(0).write_bytes(gzip.compress(b"".join(lines[:-1])) if left == "line" else data[:left])
    assert records.load(0, PROBLEMS) is None
    with pytest.raises(ValueError, match="damaged"):
        read_trajectories(records.path(0))


def test_a_damaged_byte_anywhere_is_seen_or_changes_nothing(tmp_path):
    records = Records(tmp_path, seed=7)
    records.save(0, [trajectory()])
    data, found = records.path(0).read_bytes(), []
    for at in range(10, len(data)):
        records.path(0).write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        found.append(records.load(0, PROBLEMS))
    assert [each for each in found if each is not None] in (
        [],
        [[trajectory()]],
    )  # the last bits of a stream fill a byte


def uncompressed(records, step, stage="final"):
    """As an earlier version left it."""
    path = records.path(step, stage)
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


def test_what_earlier_versions_left_is_read_used_again_and_forgotten(tmp_path):
    records = Records(tmp_path, seed=7)
    for step in (1, 2):
        records.save(step, [trajectory()])
        uncompressed(records, step)
    records.save(3, [trajectory()], stage="written")
    uncompressed(records, 3, "written")
    assert records.load(1, PROBLEMS) == records.latest(2, PROBLEMS, 1) == [trajectory()]
    assert records.load(3, PROBLEMS, stage="written") == [trajectory()]
    records.save(3, [trajectory()])
    assert sorted(os.listdir(records.directory)) == [
        "step_000001.jsonl",
        "step_000002.jsonl",
        "step_000003.jsonl.gz",
    ]
    records.forget_after(1)
    assert os.listdir(records.directory) == ["step_000001.jsonl"]


def test_the_same_trajectories_are_the_same_bytes_and_few(tmp_path):
    whole = replace(trajectory(), response=tuple(range(1000)), logprobs=(-0.5,) * 1000)
    for name in ("a", "b"):
        Records(tmp_path / name, seed=7).save(0, [whole] * 20)
    a, b = (Records(tmp_path / name, seed=7).path(0).read_bytes() for name in ("a", "b"))
    assert a == b and a[4:8] == bytes(4)  # no time
    assert len(a) < len(gzip.decompress(a)) / 10


def test_of_so_many_steps_they_stay_and_of_the_first(tmp_path):
    records = Records(tmp_path, seed=7, keep=3)
    for step in range(14):
        records.save(step, [trajectory()])
    kept = sorted(int(name[5:11]) for name in os.listdir(records.directory))
    assert kept == [*range(FIRST), 11, 12, 13]


def test_a_cap_that_came_later_removes_what_there_is_too(tmp_path):
    for step in range(14):
        Records(tmp_path, seed=7).save(step, [trajectory()])
    later = Records(tmp_path, seed=7, keep=3)
    later.save(14, [trajectory()])
    steps = lambda: sorted(int(name[5:11]) for name in os.listdir(later.directory))  # noqa: E731
    assert steps() == [*range(FIRST), 12, 13, 14]
    later.save(17, [trajectory()])  # those between were read from disk
    assert steps() == [*range(FIRST), 17]


def test_trajectories_of_another_run_are_refused_and_of_other_settings_made_again(tmp_path):
    Records(tmp_path, seed=7).save(0, [trajectory()])
    with pytest.raises(UserError, match=r"run.seed = 7"):
        Records(tmp_path, seed=8).load(0, PROBLEMS)
    with pytest.raises(UserError, match="problem 'a'"):
        Records(tmp_path, seed=7).load(0, PROBLEMS[1:])
    assert Records(tmp_path, seed=7, settings="temperature 2").load(0, PROBLEMS) is None


def test_trajectories_from_before_a_rollback_are_made_again_and_earlier_versions_had_none(tmp_path):
    records = Records(tmp_path, seed=7)
    for stage in ("written", "final"):
        records.save(0, [trajectory()], stage=stage, rollbacks=1)
        assert records.load(0, PROBLEMS, stage=stage) is None
        assert records.load(0, PROBLEMS, stage=stage, rollbacks=1) == [trajectory()]
    records.save(0, [trajectory()])
    text = gzip.decompress(records.path(0).read_bytes()).decode()
    records.path(0).write_text(text.replace(', "rollbacks": 0', ""))
    assert records.load(0, PROBLEMS) == [trajectory()]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_or_a_full_disk_while_writing_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_):
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        write_atomically(path, "new")
    assert str(path) in str(caught.value) and "run.dir" in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_latest_of_each_problem_is_found_among_so_many_steps_and_forgotten_with_its_step(tmp_path):
    def saved(step, *ids):
        records.save(step, [replace(trajectory(name), version=step, attempt=n) for n, name in enumerate(ids)])

    def found(step, within, records=None):
        records = records or Records(tmp_path, seed=7)
        return sorted((t.problem_id, t.attempt, t.version) for t in records.latest(step, PROBLEMS, within))

    records = Records(tmp_path, seed=7)
    saved(1, "a", "a", "b ")
    saved(3, "c", "b ")
    saved(5, "a")
    for reader in (records, None):  # the one that saved them, and one that finds them on disk
        assert found(5, 4, reader) == [("a", 0, 1), ("a", 1, 1), ("b ", 1, 3)]
        assert found(5, 3, reader) == [("b ", 1, 3)] and found(6, 1, reader) == [("a", 0, 5)]
        assert found(1, 9, reader) == []
    assert Records(tmp_path, seed=7, settings="other").latest(5, PROBLEMS, 4) == []
    records.forget_after(2)
    assert found(5, 4, records) == found(5, 4) == [("a", 0, 1), ("a", 1, 1), ("b ", 2, 1)]
    records.path(1).write_bytes(records.path(1).read_bytes()[:-10])
    assert found(5, 4) == []


def test_of_steps_that_nobody_asks_for_nothing_is_read_or_kept(tmp_path, monkeypatch):
    records, read = Records(tmp_path, seed=7), []
    whole = Records._whole
    monkeypatch.setattr(Records, "_whole", lambda self, step, stage: read.append(step) or whole(self, step, stage))
    for step, name in enumerate("abbc"):
        records.save(step, [trajectory(name)])
    assert records._lines_of is None  # unless it is asked for
    records.latest(4, [Problem("b", "?"), Problem("c", "?")], 4)
    assert read == [3, 2] and set(records._lines_of) == {2, 3}
    records.latest(5, [Problem("a", "?")], 2)
    assert read == [3, 2, 4] and set(records._lines_of) == {3}
