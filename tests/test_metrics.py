"""metrics.jsonl: figures read a step late, rows never doubled, seconds charged to the phase that used them."""

import json
import time
from dataclasses import replace

import jax.numpy as jnp
import pytest

from mpd_jax.train.metrics import Clock, Metrics, PhaseLog, Seconds, device_row, read_rows, spent, summarise
from mpd_jax.types import Trajectory, UserError


def out(loss=1.5, **changed):
    base = {
        "loss": loss,
        "grad_norm": 2.0,
        "finite": True,
        "tokens": 10.0,
        "divergence": 5.0,
        "student_entropy": 20.0,
        "target_entropy": 30.0,
        "divergence_at": [4.0, 1.0, 0, 0, 0, 0, 0, 0],
        "tokens_at": [4.0, 6.0, 0, 0, 0, 0, 0, 0],
    }
    return {name: jnp.array(value) for name, value in {**base, **changed}.items()}


def trajectory(length, verdict="written", dropped=False, original=None, ended="stopped"):
    return Trajectory("p", 0, (1,), tuple(range(length)), "student", 0, ended, verdict, dropped, original)


def test_sums_over_tokens_become_means_and_empty_buckets_are_left_out():
    row = device_row(out(token_weight=6.0))
    assert (row["divergence"], row["student_entropy"], row["target_entropy"]) == (0.5, 2.0, 3.0)
    assert row["token_weight"] == 0.6 and "token_weight" not in device_row(out())
    assert row["divergence_by_position"] == [
        {"from": 0, "tokens": 4, "mean": 1.0},
        {"from": 4, "tokens": 6, "mean": pytest.approx(1 / 6)},
    ]


def test_what_is_not_finite_is_null_in_json():
    row = device_row(out(loss=float("nan"), finite=False))
    assert row["loss"] is None and row["finite"] is False
    assert "NaN" not in json.dumps(row)


def test_lengths_come_from_sampled_ids_before_anything_is_dropped():
    row = summarise(
        [
            trajectory(10, "kept", original=trajectory(40)),
            trajectory(6, "unfinished", dropped=True, original=trajectory(100, ended="cut")),
            trajectory(20),
        ]
    )
    assert row["written_tokens"] == pytest.approx((40 + 100 + 20) / 3)
    assert row["response_tokens"] == 15
    assert row["compression_ratio"] == 0.5
    assert row["verdicts"] == {"kept": 1, "unfinished": 1, "written": 1}
    assert row["ended"] == {"cut": 1, "stopped": 2}
    assert (row["trajectories"], row["dropped"]) == (3, 1)


def test_what_is_used_again_hides_nothing_of_what_is_written_now():
    again = replace(trajectory(10, "kept", original=trajectory(40)), reused=True)
    row = summarise([again, trajectory(6, ended="cut")])
    assert (row["written_tokens"], row["ended"], row["written_total"]) == (6, {"cut": 1}, 6)
    assert (row["response_tokens"], row["compression_ratio"], row["reused"]) == (8, 16 / 46, 1)
    row = summarise([again])
    assert (row["written_tokens"], row["ended"]) == (None, {})


def test_a_row_is_written_one_step_behind(tmp_path):
    seen = []
    metrics = Metrics(tmp_path, 0, live=seen.append)
    for step in range(3):
        metrics.add(step, out(loss=float(step)), {}, lambda: Seconds({}, {}))
        metrics.settle(behind=1)
        assert [row["step"] for row in read_rows(metrics.path)] == list(range(step))
    metrics.add(3, None, {"dropped": 4}, lambda: Seconds({}, {}))
    metrics.settle()
    metrics.close()
    rows = read_rows(metrics.path)
    assert rows == seen and [row["loss"] for row in rows] == [0.0, 1.0, 2.0, None]
    assert rows[3]["skipped"] and rows[3]["finite"]


def test_rows_of_steps_that_are_done_again_are_cut_off(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(4):
        metrics.add(step, out(), {}, lambda: Seconds({}, {}))
    metrics.settle()
    metrics.close()
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a row
    Metrics(tmp_path, 2).close()
    assert [row["step"] for row in read_rows(metrics.path)] == [0, 1]


class Late:
    """Stands for an array that is ready on the device some time after it was handed over."""

    def __init__(self, seconds):
        self.ready = time.perf_counter() + seconds

    def block_until_ready(self):
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return self


def test_time_spent_waiting_for_an_update_is_charged_to_the_update():
    clock = Clock()
    clock.begin(0, "update")
    late = Late(0.2)
    clock.watch({"loss": late})
    first = clock.take()
    clock.begin(1, "write")
    late.block_until_ready()
    time.sleep(0.05)
    clock.begin(1, "update")
    time.sleep(0.01)
    second = clock.take()
    first, second = first().own, second().own
    assert 0.15 < first["update"] < 0.4
    assert 0.04 < second["write"] < 0.15
    assert clock.totals == {name: first.get(name, 0.0) + second[name] for name in ("write", "update")}
    clock.close()


def test_every_phase_is_in_the_log_the_moment_it_begins(tmp_path):
    log = PhaseLog(tmp_path / "run" / "phase.log")
    clock = Clock(log)
    clock.begin(3, "write")
    clock.begin(3, "rewrite")
    lines = (tmp_path / "run" / "phase.log").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["3", "write"], ["3", "rewrite"]]
    log.close()
    clock.close()


def test_a_damaged_file_is_told_by_name(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"run.dir: .*metrics.jsonl is damaged"):
        read_rows(tmp_path / "metrics.jsonl")


def test_a_phase_tells_its_share_and_the_tokens_of_its_seconds():
    seconds = Seconds({"load": 1.0, "write": 4.0, "update": 3.0, "rewrite": 0.0}, {"score": 0.5})
    row = spent({"written_total": 100, "rewritten_total": 40, "tokens": 60}, seconds)
    assert {name: row[f"{name}_share"] for name in ("load", "write", "rewrite", "train", "score")} == {
        "load": 0.125, "write": 0.5, "rewrite": 0.0, "train": 0.375, "score": 0.0625,
    }  # fmt: skip
    assert (row["write_tokens_per_second"], row["train_tokens_per_second"]) == (25, 20)
    assert row["score_tokens_per_second"] == 120
    # What was over before the update beside it has no seconds of its own, and so no rate.
    assert row["rewrite_seconds"] == 0 and "rewrite_tokens_per_second" not in row
