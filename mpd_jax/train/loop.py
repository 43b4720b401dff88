"""The training loop: write, rewrite, batch, update, refresh, and what is due after a step.

It knows no recipe: `Parts` holds the callables that build.py made of one. A run that was killed at any moment and is
started again repeats the same steps with the same trajectories.
"""

import io
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from mpd_jax import hosts
from mpd_jax.files import AnyPath, write_atomically, written_here
from mpd_jax.train.ahead import Ahead
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.curriculum import CurriculumConfig, cap, next_rung
from mpd_jax.train.guards import Excursion, GuardsConfig, GuardStop, answer, suspect, tripped, words
from mpd_jax.train.making import Making, Score, staleness
from mpd_jax.train.metrics import Clock, Metrics, Row, summarise
from mpd_jax.train.records import Records
from mpd_jax.train.state import Memory, PyTree, RunState, Trained
from mpd_jax.train.step import Out
from mpd_jax.types import Batch, Problem, Trajectory, UserError


class TrainingFailure(UserError):
    """A loss or gradient that is not finite."""


class Problems(Protocol):
    def at(self, step: int) -> Sequence[Problem]: ...


@dataclass(frozen=True)
class Parts:
    """A run, taken apart.

    write, rewrite: (problems, step, the state's memory) -> trajectories; (problems, written, step, memory) -> as many,
                    with verdicts.
    score:          (problems, trajectories, step) -> the same ones with what a target on servers says of them.
    to_batch:       the kept trajectories as arrays of fixed shapes, or None if none is left.
    load_student:   hands weights and their version (updates done) to the student's sampler.
    teacher_weights: what the target is read with, unless the state holds a self copy.
    refresh:        (self copy, student weights, updates done) -> self copy.
    evaluate:       (state), after every `eval_every` updates (0: never) but the last, which the caller measures; the
                    student's sampler has been loaded. It may be asked again for a state that it has measured.
    traces:         how often the update was traced in this process, once for each shape of a batch.
    saving:         (updates done) is called before each save.
    profile_steps:  first and last step of the trace under run_dir/profile; of several processes each has a directory.
    lookahead:      1: the next step's trajectories are made in a thread while this step trains, by weights one older.
    max_age:        updates after which what the student wrote is used no more where its problem comes up again.
    grade:          share of the written trajectories that are right, if that can be told cheaply.
    guards:         None where no band is given. start: the state that a start of the run would begin with.
    leaving:        (updates done) is called before it is on disk that the run goes back to them: who served it forgets
                    what it learnt since.
    rolled_back:    (updates done) is called when what came after them is left.
    """

    run_dir: AnyPath
    steps: int
    save_every: int
    eval_every: int
    problems: Problems
    write: Callable[[Sequence[Problem], int, Memory], Sequence[Trajectory]]
    rewrite: Callable[[Sequence[Problem], Sequence[Trajectory], int, Memory], Sequence[Trajectory]]
    to_batch: Callable[[Sequence[Problem], Sequence[Trajectory]], Batch | None]
    update: Callable[[Trained, PyTree, Batch, float], tuple[Trained, Out]]
    load_student: Callable[[PyTree, int], None]
    checkpoints: Checkpoints
    records: Records
    metrics: Metrics
    clock: Clock
    score: Score | None = None
    teacher_weights: PyTree | None = None
    refresh: Callable[[PyTree, PyTree, int], PyTree] | None = None
    evaluate: Callable[[RunState], None] | None = None
    traces: Callable[[], int] = lambda: 0
    saving: Callable[[int], None] | None = None
    grade: Callable[[Sequence[Problem], Sequence[Trajectory]], float | None] | None = None
    profile_steps: tuple[int, int] | None = None
    lookahead: int = 0
    max_age: int = 0
    guards: GuardsConfig | None = None
    curriculum: CurriculumConfig | None = None
    start: Callable[[], RunState] | None = None
    leaving: Callable[[int], None] | None = None
    rolled_back: Callable[[int], None] | None = None
    say: Callable[[str], None] = lambda text: None

    @property
    def making(self) -> Making:
        return Making(self.write, self.rewrite, self.score, self.records, self.lookahead, self.max_age)


def train(parts: Parts, state: RunState) -> RunState:
    """Runs the steps that are left. `state` is used up: its buffers are donated to the first update.

    Stopped, at the top of a step or by a callback, it saves first, unless a guard may leave the state: trajectories are
    on disk already, and a step's sampling that is cut short is done again.
    """
    run = _Run(parts, state.step)
    try:
        while (state := run.guarded(state)).step < parts.steps:
            step = state.step
            hosts.check()
            run.evaluate(state)
            run.profile(step)
            problems = parts.problems.at(step)
            trajectories = run.trajectories(state, problems)
            run.look_ahead(state)
            batch = run.batch(step, problems, trajectories)
            state, out = run.update(state, problems, batch)
            state = run.refresh(state)
            run.measure(state, out, problems, trajectories, batch)
            state = run.lengthen(state)
            run.save_if_due(state)
        run.save(state, good=not run.suspect(state))
    except hosts.Stopped:
        run.rest()
        run.save_unless_suspect(state)
        raise
    finally:
        run.profile(None)
        parts.checkpoints.wait()
        parts.clock.end()
    return state


class _Run:
    """What the loop remembers from one step to the next, and nothing that a checkpoint would have to hold."""

    def __init__(self, parts: Parts, start: int):
        self.parts = parts
        self.saved = start  # the step that a start would begin with now
        self.loaded: int | None = None
        self.held: dict[int, tuple[Sequence[Problem], Batch]] = {}
        self.profiling, self.trace = False, ExitStack()
        self.ahead: Ahead | None = None
        self.traces = 0
        self.asked: dict[int, Memory] = {}  # the memory by which the trajectories of a step were made

    def guarded(self, state: RunState) -> RunState:
        """The state to go on from: this one, or one from before what a guard has left. At the end all rows are seen."""
        guards, metrics = self.parts.guards, self.parts.metrics
        if guards is None:
            return state
        ended = state.step == self.parts.steps
        if ended:
            self.settle(behind=0)
        for step in range(state.step, state.step + 1 + ended):
            found = hosts.from_main(partial(tripped, guards, metrics.history, step))
            ones = [Excursion(*fields) for fields in found]
            for one in ones:
                if one.action == "warn":
                    self.parts.say(f"warning: {words(guards, one)}")
            if ones and ones[-1].action != "warn":
                return self.leave(state, guards, ones[-1])
        return state

    def leave(self, state: RunState, guards: GuardsConfig, one: Excursion) -> RunState:
        """Goes back behind an excursion, or stops there. No kill undoes it: it is on disk before anything goes on."""
        parts = self.parts
        self.rest()
        parts.clock.begin(state.step, "leave")
        parts.checkpoints.wait()
        found = answer(guards, one, state.memory, parts.checkpoints.steps(), parts.save_every)
        if parts.leaving is not None:
            parts.leaving(max(one.origin - 1, 0) if found.good is None else found.good)
        parts.checkpoints.leave(found.left, found.good, found.memory)
        if found.good is None:
            raise GuardStop(found.said)
        parts.say(found.said)
        for leaf in jax.tree.leaves((state.weights, state.opt_state, state.self_weights)):
            leaf.delete()  # else the run would be in memory twice
        assert parts.start is not None, "guards without a start"
        state = parts.start()
        parts.metrics.rewind(state.step)
        parts.records.forget_after(state.step - 1)
        if parts.rolled_back is not None:
            parts.rolled_back(state.step)
        self.saved, self.loaded, self.held, self.asked = state.step, None, {}, {}
        parts.clock.take()()
        return state

    def lengthen(self, state: RunState) -> RunState:
        """The next rung of the curriculum where it is time for it: a part of the step, so that no stop repeats it."""
        curriculum, memory = self.parts.curriculum, state.memory
        if curriculum is None or state.step % curriculum.every:
            return state
        history, rung = self.parts.metrics.history, int(memory["length_rung"])
        rung = hosts.from_main(lambda: next_rung(curriculum, history, state.step, rung))
        return state._replace(memory={**memory, "length_rung": rung})

    def profile(self, step: int | None) -> None:
        """Starts the trace at its first step and ends it after its last, or when there are no more steps (None)."""
        first, last = self.parts.profile_steps or (0, -1)
        wanted = step is not None and first <= step <= last
        if wanted and not self.profiling:
            where = self.parts.run_dir / "profile"
            # A trace is named by second and host, and two processes of one host may write theirs in the same second.
            where = where if hosts.alone() else where / f"process_{jax.process_index()}"
            jax.profiler.start_trace(self.trace.enter_context(written_here(where)))
        elif self.profiling and not wanted:
            if step is not None:
                self.settle(behind=0)  # the device's work of the last step belongs to it
            jax.profiler.stop_trace()
            self.trace.close()
        self.profiling = wanted

    def trajectories(self, state: RunState, problems: Sequence[Problem]) -> Sequence[Trajectory]:
        """Those of the look-ahead, or from disk if a run that was killed had come that far, else made now."""
        parts, step = self.parts, state.step
        if self.ahead is not None:
            parts.clock.begin(step, "wait")
            ahead, self.ahead = self.ahead, None
            made = ahead.result()
            parts.clock.add(ahead.seconds)
            return made
        self.asked[step] = state.memory
        final = self.parts.making.stored(step, problems, "final", state.memory)
        if final is not None:
            return self.parts.making.scored(step, problems, final, parts.clock.begin)
        parts.clock.begin(step, "load")
        self.load(state)
        return self.parts.making.made(step, problems, state.memory, parts.clock.begin)

    def look_ahead(self, state: RunState) -> None:
        """Begins the next step's trajectories, by the weights that this step starts from."""
        parts, step = self.parts, state.step + 1
        if not parts.lookahead or step >= parts.steps:
            return
        problems = parts.problems.at(step)
        if self.parts.making.stored(step, problems, "final", state.memory) is None:
            parts.clock.begin(state.step, "load")
            self.load(state)
            self.asked[step] = state.memory
            self.ahead = Ahead(partial(self.parts.making.made, step, problems, state.memory), parts.clock.note)

    def rest(self) -> None:
        """Until nothing samples any more; what was being made is made again."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            ahead.wait()

    def batch(self, step: int, problems: Sequence[Problem], trajectories: Sequence[Trajectory]) -> Batch | None:
        self.parts.clock.begin(step, "update")
        return self.parts.to_batch(problems, trajectories)

    def load(self, state: RunState) -> None:
        if self.loaded != state.step:
            self.parts.load_student(state.weights, state.step)
            self.loaded = state.step

    def update(self, state: RunState, problems: Sequence[Problem], batch: Batch | None) -> tuple[RunState, Out | None]:
        parts, step = self.parts, state.step
        if batch is None or not np.any(np.asarray(batch.weight_BR) > 0):
            memory = {**state.memory, "skipped_updates": state.memory.get("skipped_updates", 0) + 1}
            return state._replace(step=step + 1, memory=memory), None
        self.held = {number: held for number, held in self.held.items() if number >= step - 1}
        self.held[step] = (problems, batch)
        target_weights = parts.teacher_weights if state.self_weights is None else state.self_weights
        scale = state.memory["learning_rate_scale"]
        trained, out = parts.update(Trained(state.weights, state.opt_state), target_weights, batch, scale)
        parts.clock.watch(out)
        return state._replace(**trained._asdict(), step=step + 1), out

    def refresh(self, state: RunState) -> RunState:
        if state.self_weights is None or self.parts.refresh is None:
            return state
        return state._replace(self_weights=self.parts.refresh(state.self_weights, state.weights, state.step))

    def measure(
        self,
        state: RunState,
        out: Out | None,
        problems: Sequence[Problem],
        trajectories: Sequence[Trajectory],
        batch: Batch | None,
    ) -> None:
        """Host work while the device comes to `state`; then the figures of the step before, which are ready."""
        step = state.step - 1
        row = summarise(trajectories)
        row |= rows_of(batch)
        row["staleness"] = staleness(step, trajectories)
        row["made_staleness"] = staleness(step, [t for t in trajectories if not t.reused])
        traces, self.traces = self.traces, self.parts.traces()
        row["compilations"] = self.traces - traces
        row["too_long"] = row["trajectories"] - row["dropped"] - row["trained"]
        if self.parts.grade is not None:
            row["rollout_accuracy"] = self.parts.grade(problems, [t.original or t for t in trajectories])
        if self.parts.guards is not None or state.memory["rollbacks"]:
            row |= {name: state.memory[name] for name in ("rollbacks", "learning_rate_scale")}
        if self.parts.curriculum is not None:
            row["length_cap"] = cap(self.parts.curriculum, self.asked[step])
        self.asked.pop(step)
        self.parts.metrics.add(step, out, row, self.parts.clock.take())
        self.settle(behind=1)

    def settle(self, behind: int) -> None:
        for row in self.parts.metrics.settle(behind):
            if not row["finite"]:
                self.fail(row)

    def fail(self, row: Row) -> None:
        step = row["step"]
        problems, batch = self.held[step]
        path = self.parts.run_dir / f"failed_step_{step:06d}.npz"
        ids = [problem.id for problem in problems]
        save_batch(path, batch, ids)
        self.parts.records.forget_after(step)
        weight = row.get("token_weight", 0.0)
        said = "" if weight is not None else "recipe.loss.token_weight gave what is not finite: look at it first. "
        raise TrainingFailure(
            f"step {step}: the loss or its gradient is not finite (loss {row['loss']}, gradient norm "
            f"{row['grad_norm']}) on problems {', '.join(ids)}; the weights were left as they were, the batch is in "
            f"{path}. {said}Lower train.learning_rate or train.max_grad_norm, or use float32 for student.dtype, and "
            "run the same command again: it resumes from the last checkpoint"
        )

    def evaluate(self, state: RunState) -> None:
        """Where it is due, before the next step: a start in the middle of one, or before it, comes to it again."""
        if not self.parts.eval_every or state.step % self.parts.eval_every or state.step == 0:
            return
        assert self.parts.evaluate is not None, "eval_every without evaluate"
        self.settle(behind=0)
        if self.ahead is not None:
            self.ahead.wait()  # the same sampler answers with other weights from here on
        self.parts.clock.begin(state.step - 1, "evaluate")
        self.load(state)
        self.parts.evaluate(state)
        self.parts.clock.take()()

    def save_if_due(self, state: RunState) -> None:
        if state.step % self.parts.save_every == 0:
            self.save_unless_suspect(state)

    def save_unless_suspect(self, state: RunState) -> None:
        """Not where the next guard may find that it should have been left: the good ones would be crowded out, and a
        start comes here again by the trajectories on disk."""
        self.settle(behind=0)
        if not self.suspect(state):
            self.save(state)

    def suspect(self, state: RunState) -> bool:
        """Whether the next guard may find that it should have been left, by the rows that were read."""
        guards, history = self.parts.guards, self.parts.metrics.history
        return guards is not None and hosts.from_main(lambda: suspect(guards, history, state.step))

    def save(self, state: RunState, good: bool = True) -> None:
        """Only after the flags of all steps so far were read, and with their rows where a start finds them."""
        self.settle(behind=0)
        if state.step == self.saved:
            return
        self.parts.metrics.flush()
        self.parts.clock.begin(state.step - 1, "save")
        if self.parts.saving is not None:
            self.parts.saving(state.step)
        self.parts.checkpoints.save(state, good)
        self.saved = state.step
        self.parts.clock.take()()


def rows_of(batch: Batch | None) -> Row:
    """How many trajectories are trained on, in how many rows of how many tokens, and the share that is padding.

    scored_total: tokens that the target reads, prompts among them; of one on servers as after the student's prompts.
    """
    if batch is None:
        return {"trained": 0, "scored_total": 0}
    first_BR = (np.asarray(batch.index_BR) == 0) & (np.asarray(batch.weight_BR) > 0)
    rows, length = batch.student_segments_BT.shape
    padding = float(np.mean(np.asarray(batch.student_segments_BT) == 0))
    read_BT = batch.target_segments_BT if batch.top_ids_BRK is None else batch.student_segments_BT
    row: Row = {"trained": int(first_BR.sum()), "scored_total": int(np.count_nonzero(read_BT))}
    return {**row, "rows": rows, "row_length": length, "padding": round(padding, 6)}


def save_batch(path: AnyPath, batch: Batch, problem_ids: Sequence[str]) -> None:
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in batch._asdict().items() if array is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, problem_ids=np.array(problem_ids), **arrays)
    write_atomically(path, buffer.getvalue())
