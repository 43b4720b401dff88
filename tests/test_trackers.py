"""TensorBoard and Weights & Biases show the rows of metrics.jsonl, each step once, and never hold a run up."""

import struct
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from mpd_jax.train import trackers
from mpd_jax.train.metrics import Metrics, Seconds
from mpd_jax.train.trackers import TensorBoard, Trackers, WeightsAndBiases, figures, require
from mpd_jax.types import UserError


def row(step, **more):
    return {"step": step, "loss": step / 2, "verdicts": {"kept": 3}, "finite": True, "grad_norm": None, **more}


def test_the_figures_of_a_row_are_its_numbers_by_name():
    position = [{"from": 4, "tokens": 9, "mean": 0.5}, {"from": 16, "tokens": 9, "mean": None}]
    shown = figures(row(3, divergence_by_position=position, entropy=float("nan"), note="text"))
    assert shown == {"loss": 1.5, "verdicts/kept": 3, "divergence_by_position/from_4": 0.5}


def events(directory):
    """(step, tag, value) of every event file, in order; TFRecord: length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_event_files_hold_every_step_once_however_the_run_went(tmp_path):
    pytest.importorskip("tensorboardX")
    board = TensorBoard(tmp_path / "tensorboard")
    board.restart([], False)
    for step in range(4):
        board.add(row(step))
    board.close()
    (earlier,) = (tmp_path / "tensorboard").iterdir()
    earlier.rename(earlier.with_name("events.out.tfevents.1.host"))  # names are of the second, and this one is over
    assert events(tmp_path / "tensorboard")[:2] == [(0, "loss", 0.0), (0, "verdicts/kept", 3.0)]
    again = TensorBoard(tmp_path / "tensorboard")  # after a kill, from the checkpoint after two steps
    again.restart([row(0), row(1)], False)
    again.add(row(2, loss=9.0))
    again.restart([row(0)], True)  # a rollback
    again.add(row(1, loss=7.0))
    again.close()
    losses = [(step, value) for step, tag, value in events(tmp_path / "tensorboard") if tag == "loss"]
    assert losses == [(0, 0.0), (1, 7.0)]


class Noted:
    """A tracker that notes what it is told, and may fail or wait."""

    def __init__(self, fails=False, waits=None):
        self.told, self.fails, self.waits = [], fails, waits

    def restart(self, rows, rewound):
        self.told.append(([r["step"] for r in rows], rewound))

    def add(self, row):
        if self.waits is not None:
            self.waits.wait()
        if self.fails:
            raise ConnectionError("no route")
        self.told.append(row["step"])

    def close(self):
        self.told.append("closed")


def test_one_that_fails_is_told_of_once_and_the_others_go_on():
    good, bad, said = Noted(), Noted(fails=True), []
    both = Trackers({"bad": bad, "good": good}, said.append)
    both.restart([])
    for step in range(3):
        both.add(row(step))
    both.close()
    assert good.told == [([], False), 0, 1, 2, "closed"] and bad.told == [([], False)]
    (warning,) = said
    assert "train.trackers: bad failed and is left out" in warning and "no route" in warning


def test_nobody_waits_for_a_slow_one_and_the_end_not_for_long():
    gate, said = threading.Event(), []
    slow = Noted(waits=gate)
    held = Trackers({"slow": slow}, said.append)
    began = time.monotonic()
    for step in range(1000):
        held.add(row(step))
    held.close(wait_s=0.1)
    assert time.monotonic() - began < 1.0
    assert said == ["warning: train.trackers: slow not done after 0.1 s; left as it is"]
    gate.set()


def test_without_trackers_there_is_no_thread():
    before = threading.active_count()
    none = Trackers({}, print)
    none.restart([])
    none.add(row(0))
    assert threading.active_count() == before
    none.close()


def test_metrics_hand_on_each_row_at_a_start_and_after_a_rollback(tmp_path):
    noted = Noted()

    def opened(start):
        return Metrics(tmp_path, start, trackers=Trackers({"noted": noted}, print))

    metrics = opened(0)
    for step in range(3):
        metrics.add(step, None, {}, lambda: Seconds({}, {}))
    metrics.settle(behind=1)
    metrics.rewind(1)
    metrics.add(1, None, {}, lambda: Seconds({}, {}))
    metrics.settle()
    metrics.close()
    assert noted.told == [([], False), 0, 1, ([0], True), 1, "closed"]
    opened(1).close()
    assert noted.told[6:] == [([0], False), "closed"]


def test_trackers_are_closed_where_the_last_rows_cannot_be_written(tmp_path, monkeypatch):
    noted = Noted()
    metrics = Metrics(tmp_path, 0, trackers=Trackers({"noted": noted}, print))
    close = metrics._lines.close

    def full():
        close()
        raise UserError("no space")

    monkeypatch.setattr(metrics._lines, "close", full)
    with pytest.raises(UserError, match="no space"):
        metrics.close()
    assert noted.told[-1] == "closed"


class FakeWandb:
    """What the library keeps of runs by id: like its server, a run counts its steps and takes none twice."""

    def __init__(self):
        self.runs, self.asked = {}, []

    def init(self, **how):
        self.asked.append(how)
        logged = self.runs.setdefault(how["id"], [])

        def log(shown, step):
            assert step >= run.step, "steps only grow"
            logged.append((step, shown["loss"]))
            run.step = step + 1

        run = SimpleNamespace(step=logged[-1][0] + 1 if logged else 0, log=log, finish=lambda: None)
        return run


def test_a_run_of_weights_and_biases_goes_on_and_after_a_rollback_there_is_another(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    (tmp_path / "one").mkdir()

    def opened():
        return WeightsAndBiases(tmp_path / "one", None, {"train.steps": 9})

    first = opened()
    first.restart([], False)
    for step in range(3):
        first.add(row(step))
    again = opened()  # a kill; step 2 is done again and was sent, step 3 was lost on its way
    again.restart([row(0), row(1)], False)
    again.add(row(2))
    again.add(row(3))
    assert list(fake.runs.values()) == [[(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]]
    again.restart([row(0)], True)
    again.add(row(1, loss=7.0))
    assert list(fake.runs.values())[1:] == [[(0, 0.0), (1, 7.0)]]
    third = opened()
    third.restart([row(0), row(1, loss=7.0)], False)
    third.close()
    assert len(fake.runs) == 2
    assert {(how["project"], how["group"], how["resume"]) for how in fake.asked} == {("mpd-jax", "one", "allow")}


def test_what_a_tracker_needs_is_told_at_once(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train.trackers: tensorboard needs tensorboardX: pip install tensorboardX"):
        require(["tensorboard"], {}.get)
    with pytest.raises(UserError, match=r"pip install 'mpd-jax\[wandb\]'"):
        require(["wandb"], {}.get)
    require([], {}.get)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        require(["wandb"], {}.get)
    require(["wandb", "tensorboard"], {"WANDB_API_KEY": "key"}.get)
    require(["wandb"], {"WANDB_MODE": "offline"}.get)
