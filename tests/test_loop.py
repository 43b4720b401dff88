"""The loop: a run that is stopped anywhere and started again ends with the same bits."""

import gzip
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax import hosts
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.sampling.sampler import request_key
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.loop import Parts, TrainingFailure, _Run, train
from mpd_jax.train.metrics import Clock, Metrics, PhaseLog, read_rows
from mpd_jax.train.records import Records
from mpd_jax.train.state import TrainConfig, abstract, new_state, optimiser
from mpd_jax.train.step import make_update
from mpd_jax.types import Batch, Problem, TopK, Trajectory, UserError
from tests.test_step import RESPONSE, VOCAB, tiny_model, weights_of

SEED, STEPS, PROMPT = 11, 6, (1, 2, 3)
MODEL = tiny_model()
TX = optimiser(TrainConfig(learning_rate=0.03, steps=STEPS))
UPDATE = make_update(MODEL, MODEL, LossConfig(), TX, None, vocab_size=VOCAB)


def update_with(trained, target, batch, scale):
    return UPDATE(trained, target, batch, scale=scale)


class Killed(BaseException):
    """Nothing in the package catches it."""


class Problems:
    def at(self, step):
        return [Problem(f"p{(4 * step + i) % 10}", "?") for i in range(4)]


class Student:
    """A writer whose every token depends on the weights it was last given, the step and the problem."""

    def __init__(self):
        self.calls, self.versions = [], []

    def load(self, weights, version):
        self.sum = sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(weights))
        self.version = version
        self.versions.append(version)

    def write(self, problems, step, memory):
        self.calls.append(step)
        return [self.one(problem, step, memory["rollbacks"]) for problem in problems]

    def one(self, problem, step, rollbacks):
        rng = np.random.default_rng([*request_key(SEED, "write", step, problem.id, 0, rollbacks), hash(self.sum)])
        ids = tuple(int(i) for i in rng.integers(0, VOCAB, rng.integers(2, RESPONSE + 1)))
        return Trajectory(problem.id, 0, PROMPT, ids, "student", self.version, "stopped")


def shorten(problems, written, step, memory):
    return [replace(t, response=t.response[:-1], verdict="kept", original=t) for t in written]


def to_batch(problems, trajectories):
    rows = [t for t in trajectories if not t.dropped]
    tokens_BT = np.zeros((4, len(PROMPT) + RESPONSE), np.int32)
    response_BR, weight_BR = np.zeros((4, RESPONSE), np.int32), np.zeros((4, RESPONSE), np.float32)
    for row, t in enumerate(rows):
        response_BR[row, : len(t.response)] = t.response
        weight_BR[row, : len(t.response)] = 1
        tokens_BT[row, : len(PROMPT) + len(t.response)] = PROMPT + t.response
    at_BR = np.broadcast_to(len(PROMPT) - 1 + np.arange(RESPONSE, dtype=np.int32), (4, RESPONSE))
    lengths = np.array([len(PROMPT) + len(t.response) for t in rows] + [0] * (4 - len(rows)))
    segments_BT = (np.arange(tokens_BT.shape[1])[None] < lengths[:, None]).astype(np.int32)
    index_BR = np.broadcast_to(np.arange(RESPONSE, dtype=np.int32), (4, RESPONSE))
    side = tokens_BT, segments_BT, at_BR
    return Batch(*side, *side, response_BR, index_BR, weight_BR / max(1.0, weight_BR.sum()))


@dataclass(frozen=True)
class Run:
    parts: Parts
    student: Student
    evaluated: list
    close: Callable[[], None]


def open_run(run_dir, start=0, kill=None, steps=STEPS, metrics=Metrics, **changed) -> Run:
    """A run of stub parts over the real update, records, metrics and checkpoints; `kill` names a step and a phase."""
    log = PhaseLog(run_dir / "phase.log")

    def phase(step, name):
        log(step, name)
        if (step, name) == kill:
            raise Killed

    student, evaluated, stack = Student(), [], ExitStack()
    stack.callback(log.close)
    parts = Parts(
        run_dir=run_dir,
        steps=steps,
        save_every=2,
        eval_every=3,
        problems=Problems(),
        write=student.write,
        rewrite=shorten,
        to_batch=to_batch,
        update=update_with,
        load_student=student.load,
        checkpoints=Checkpoints(run_dir, keep=2, on_commit=lambda step: log(step - 1, "saved")),
        records=Records(run_dir, SEED),
        metrics=metrics(run_dir, start),
        clock=Clock(phase),
        refresh=lambda own, weights, done: jax.tree.map(jnp.copy, weights) if done % 2 == 0 else own,
        evaluate=lambda state: evaluated.append(state.step),
        grade=lambda problems, written: 0.5,
    )
    parts = replace(parts, **changed)
    for part in (parts.checkpoints, parts.metrics, parts.clock):
        stack.callback(part.close)
    return Run(parts, student, evaluated, stack.close)


def run(run_dir, kill=None, steps=STEPS, **changed):
    """What the command does: resume if there is a checkpoint, else start anew. Returns the state and the Run."""
    state = new_state(MODEL, TX, None, weights_of(MODEL, 0), seed=SEED, self_weights=weights_of(MODEL, 1))
    probe = Checkpoints(run_dir, keep=2)
    state = probe.restore(abstract(state)) or state
    probe.close()
    opened = open_run(run_dir, state.step, kill, steps, **changed)
    try:
        return train(opened.parts, state), opened
    finally:
        opened.close()


def rows_without_times(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_share", "_per_second"))} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    state, opened = run(run_dir)
    return jax.device_get(state), rows_without_times(run_dir), opened


PHASES = ["write", "rewrite", "update", "save"]


@pytest.mark.parametrize("step, phase", list(itertools.product([1, 3], PHASES)))
def test_a_run_stopped_in_any_phase_and_run_again_ends_with_the_same_bits(straight, tmp_path, step, phase):
    with pytest.raises(Killed):
        run(tmp_path, kill=(step, phase))
    state, opened = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), straight[0])
    assert rows_without_times(tmp_path) == straight[1]
    # What was on disk was not sampled again.
    assert step not in opened.student.calls if phase != "write" else step in opened.student.calls


@pytest.mark.parametrize("at", range(1, 12, 2))
def test_a_run_asked_to_stop_saves_first_and_ends_with_the_same_bits(straight, tmp_path, monkeypatch, at):
    """Stopped at its look number `at`: the loop's own at the top of a step, or a writer's in the middle of one."""
    looks = itertools.count(1)

    def check():
        if next(looks) == at:
            raise hosts.Stopped

    def write(problems, step, memory):
        hosts.check()
        return opened.student.write(problems, step, memory)

    monkeypatch.setattr(hosts, "check", check)
    state = new_state(MODEL, TX, None, weights_of(MODEL, 0), seed=SEED, self_weights=weights_of(MODEL, 1))
    opened = open_run(tmp_path, save_every=100)
    with pytest.raises(hosts.Stopped):
        train(replace(opened.parts, write=write), state)
    opened.close()
    done = (at - 1) // 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ([str(done)] if done else [])
    assert len(read_rows(tmp_path / "metrics.jsonl")) == done
    monkeypatch.undo()
    state, _ = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), straight[0])
    assert rows_without_times(tmp_path) == straight[1]


def test_an_evaluation_cut_short_by_a_stop_is_made_before_the_run_goes_on(straight, tmp_path):
    """The checkpoint written then can be the best like any other, also if the stop comes once more."""

    def stopped(state):
        raise hosts.Stopped

    def measured(state):
        order.append(("evaluate", state.step))
        noted.note(state.step, {"accuracy": 1.0 if state.step == 3 else 0.0}, None)

    def update(*args):
        order.append("update")
        return update_with(*args)

    def checkpoints():
        return Checkpoints(tmp_path, keep=1, keep_best="accuracy")

    for _ in range(2):
        with pytest.raises(hosts.Stopped):
            run(tmp_path, evaluate=stopped, checkpoints=checkpoints())
    order, noted = [], checkpoints()
    state, _ = run(tmp_path, evaluate=measured, update=update, checkpoints=noted)
    assert order == [("evaluate", 3), "update", "update", "update"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), straight[0])
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert steps == [3, STEPS]


def test_a_run_stopped_twice_and_one_that_was_over_end_with_the_same_bits(straight, tmp_path):
    for kill in ((0, "rewrite"), (4, "update")):
        with pytest.raises(Killed):
            run(tmp_path, kill=kill)
    run(tmp_path)
    state, opened = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), straight[0])
    assert opened.student.calls == [] and rows_without_times(tmp_path) == straight[1]


def test_the_sampler_gets_each_version_once_and_before_it_writes(straight):
    student = straight[2].student
    assert student.versions == list(range(STEPS))
    assert straight[2].evaluated == [3]


def test_the_self_copy_is_the_student_of_the_last_refresh(straight):
    state = straight[0]
    jax.tree.map(np.testing.assert_array_equal, state.self_weights, state.weights)


def test_rows_tell_lengths_verdicts_entropies_and_wall_shares(straight, tmp_path):
    run(tmp_path, steps=2)
    row = read_rows(tmp_path / "metrics.jsonl")[1]
    assert row["response_tokens"] == row["written_tokens"] - 1
    assert row["verdicts"] == {"kept": 4} and row["rollout_accuracy"] == 0.5
    assert row["scored_total"] == row["trained"] * len(PROMPT) + row["tokens"]
    assert row["student_entropy"] > 0 and row["target_entropy"] > 0
    assert row["divergence_by_position"][0]["tokens"] > 0
    shares = [row[f"{phase}_share"] for phase in ("load", "write", "rewrite", "train")]
    assert abs(sum(shares) - 1) < 1e-5


def test_trajectories_that_no_batch_had_room_for_are_counted(tmp_path):
    run(tmp_path, steps=1, to_batch=lambda problems, trajectories: to_batch(problems, trajectories[1:]))
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert (row["trajectories"], row["dropped"], row["too_long"]) == (4, 0, 1)


def test_the_device_is_asked_for_a_step_only_after_the_next_was_handed_over(tmp_path):
    order = []

    class Watching(Metrics):
        def settle(self, behind=0):
            rows = super().settle(behind)
            order.extend(("read", row["step"]) for row in rows)
            return rows

    def update(*args):
        order.append(("update", sum(name == "update" for name, _ in order)))
        return update_with(*args)

    run(tmp_path, steps=3, update=update, metrics=Watching, save_every=9, eval_every=0)
    assert order == [("update", 0), ("update", 1), ("read", 0), ("update", 2), ("read", 1), ("read", 2)]


def breaking(at):
    """A batch function whose batch number `at` has a weight that is not finite."""
    calls = itertools.count()

    def batch(problems, trajectories):
        made = to_batch(problems, trajectories)
        if next(calls) == at:
            made.weight_BR[0, 0] = np.inf
        return made

    return batch


@pytest.mark.parametrize("step, ids", [(2, ["p8", "p9", "p0", "p1"]), (3, ["p2", "p3", "p4", "p5"])])
def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_saves_nothing_after_it(tmp_path, step, ids):
    """Step 2 is found out while step 3 is under way, step 3 just before its save."""
    with pytest.raises(TrainingFailure, match=rf"step {step}: .*{', '.join(ids)};.*failed_step_00000{step}.npz"):
        run(tmp_path, to_batch=breaking(step), eval_every=0)
    saved = np.load(tmp_path / f"failed_step_00000{step}.npz")
    assert list(saved["problem_ids"]) == ids
    assert np.isinf(saved["weight_BR"][0, 0]) and saved["student_tokens_BT"].shape == (4, len(PROMPT) + RESPONSE)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]
    last = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert last["step"] == step and last["finite"] is False and last["loss"] is None


def test_a_token_weight_that_is_not_finite_is_named(tmp_path):
    def update(*args):
        trained, out = update_with(*args)
        return trained, {**out, "token_weight": np.float32("nan")}

    with pytest.raises(TrainingFailure, match=r"npz. recipe.loss.token_weight gave what is not finite: look at it"):
        run(tmp_path, to_batch=breaking(0), update=update, steps=1, eval_every=0)


def test_what_was_sampled_after_a_step_that_failed_once_is_sampled_again(straight, tmp_path):
    """Step 3 was sampled from weights that step 2 had not moved: a second start, in which step 2 succeeds, may not
    take it for its own."""
    with pytest.raises(TrainingFailure):
        run(tmp_path, to_batch=breaking(2), eval_every=0)
    state, _ = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), straight[0])


def test_a_step_of_which_nothing_is_left_skips_its_update(straight, tmp_path):
    def drop(problems, written, step, memory):
        return [replace(t, dropped=step == 2, verdict="dropped" if step == 2 else "kept") for t in written]

    updates = []

    def update(*args):
        updates.append(1)
        return update_with(*args)

    for name, batch in {"zeros": to_batch, "none": lambda p, ts: None if ts[0].dropped else to_batch(p, ts)}.items():
        state, _ = run(tmp_path / name, rewrite=drop, to_batch=batch, update=update)
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        assert len(updates) == STEPS - 1 and state.memory["skipped_updates"] == 1
        assert rows[2]["skipped"] and rows[2]["loss"] is None and rows[2]["dropped"] == 4
        assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(jax.device_get(state.weights)))
        updates.clear()


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on_from_what_was_saved(straight, tmp_path, monkeypatch):
    import os

    real, full = os.fsync, itertools.count()

    def fsync(descriptor):
        if next(full) > 7:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"run.dir: .*trajectories.*No space left on device"):
            run(tmp_path)
    state, _ = run(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), straight[0])


def test_phases_are_logged_in_order_and_a_save_is_open_until_it_is_told_written(straight):
    lines = [line.split()[:2] for line in (straight[2].parts.run_dir / "phase.log").read_text().splitlines()]
    assert [line for line in lines if line[1] != "saved"][:10] == [
        [str(step), phase] for step in (0, 1) for phase in ("load", "write", "rewrite", "update")
    ] + [["1", "save"], ["2", "load"]]
    for step in ("1", "3", "5"):
        assert lines.index([step, "save"]) < lines.index([step, "saved"])


def test_the_rows_of_all_steps_are_kept_before_a_state_that_will_not_make_them_again(tmp_path, monkeypatch):
    events, save = [], Checkpoints.save

    class Told(Metrics):
        def flush(self):
            events.append(("kept", len(read_rows(self.path))))

    def saving(checkpoints, state, good):
        events.append(("saved", state.step))
        save(checkpoints, state, good)

    monkeypatch.setattr(Checkpoints, "save", saving)
    run(tmp_path, metrics=Told)
    assert events == [(what, done) for done in (2, 4, 6) for what in ("kept", "saved")]


def test_several_processes_leave_their_traces_in_directories_of_their_own(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(jax.profiler, "start_trace", started.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    loop = _Run(cast(Any, SimpleNamespace(run_dir=tmp_path, profile_steps=(0, 0))), 0)
    loop.profile(0)
    loop.profile(None)
    monkeypatch.setattr(hosts, "alone", lambda: False)
    loop.profile(0)
    assert started == [tmp_path / "profile", tmp_path / "profile" / "process_1"]


@pytest.mark.parametrize("steps", [(1, 1), (1, 9)], ids=["ends inside the run", "would end after it"])
def test_profiled_steps_leave_a_trace(steps, tmp_path):
    run(tmp_path, steps=3, profile_steps=steps, eval_every=0)
    traces = list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0
    assert b"PjitFunction" in traces[0].read_bytes()


def said_of(problems, trajectories, step):
    return [replace(t, target=TopK(np.full((len(t.response), 1), step), np.zeros(1))) for t in trajectories]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_step_is_scored_once_before_its_batch_and_again_after_a_kill(tmp_path, lookahead):
    asked, met = [], []

    def score(problems, trajectories, step):
        asked.append(step)
        return said_of(problems, trajectories, step)

    def batch(problems, trajectories):
        met.append({int(t.target.ids_RK[0, 0]) for t in trajectories})
        return to_batch(problems, trajectories)

    how = {"score": score, "to_batch": batch, "lookahead": lookahead, "steps": 4}
    with pytest.raises(Killed):
        run(tmp_path, kill=(2, "update"), **how)
    first = list(asked)
    assert first[:3] == [0, 1, 2]
    _, opened = run(tmp_path, **how)
    assert met == [{0}, {1}, {2}, {3}]
    assert asked[len(first) :] == [2, 3]  # the stored trajectories of step 2, and those of step 3
    assert b"target" not in gzip.decompress(opened.parts.records.path(0).read_bytes())  # it is asked again
    rows = opened.parts.metrics.path.read_text().splitlines()
    assert all('"score_seconds"' in row and '"score_tokens_per_second"' in row for row in rows)
