"""The whole RunState on disk, written asynchronously, restored onto any mesh. The only module that knows Orbax.

A checkpoint is a directory named by the number of finished updates. It appears by renaming a temporary one, in a bucket
by the object that Orbax puts last, so a save that was cut short is never taken for a checkpoint. Arrays are pure dicts:
the optimiser state by key path.
"""

import errno
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from mpd_jax import files, hosts
from mpd_jax.files import AnyPath, write_atomically
from mpd_jax.train.state import PyTree, RunState
from mpd_jax.types import UserError

log = logging.getLogger(__name__)

FIGURES = "figures.json"  # of the evaluations of one kind, by step, and the settings that make the kind
LEFT = "left.json"  # what a guard has left: see `Checkpoints.leave`
Which = int | Literal["best"]  # a checkpoint: of this step, or the best


def to_dicts(state: RunState) -> dict[str, PyTree]:
    """The arrays of a state as nested dicts with string keys."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    arrays = {"weights": state.weights, "optimiser": {_name(path): leaf for path, leaf in leaves}}
    return arrays if state.self_weights is None else {**arrays, "self": state.self_weights}


def from_dicts(arrays: dict[str, PyTree], like: RunState) -> RunState:
    paths = jax.tree_util.tree_leaves_with_path(like.opt_state)
    leaves = [arrays["optimiser"][_name(path)] for path, _ in paths]
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
    return like._replace(weights=arrays["weights"], opt_state=opt_state, self_weights=arrays.get("self"))


class Checkpoints:
    """Checkpoints of one run: the last `keep` of them, and the best by the figure `keep_best` of those evaluated.

    due_every: steps between those that a rollback may go to; the last `keep` of them stay whatever is saved beside.
    read_only: another process may be training; nothing is cleaned up or written.
    `on_commit(step)` is called by the saving thread when everything is written and only the renaming is left. `say` is
    told of checkpoints that cannot be read. All processes of a run see the same directory, on a shared file system or
    in a bucket.
    """

    def __init__(
        self,
        run_dir: AnyPath,
        keep: int,
        on_commit: Callable[[int], None] | None = None,
        *,
        keep_best: str | None = None,
        due_every: int | None = None,
        read_only: bool = False,
        say: Callable[[str], None] = log.warning,
    ):
        self._say = say
        directory = files.path(run_dir) / "checkpoints"
        self.directory = directory if files.remote(directory) else directory.absolute()
        self._saving: int | None = None
        self._suspect: set[int] = set()
        self._read_only = read_only
        self._keep_best = keep_best
        self._arrays, self._run = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()

        def committed() -> None:
            if on_commit is not None and self._saving is not None:
                on_commit(self._saving)

        def due(steps: Sequence[int]) -> list[int]:
            good = (step for step in steps if step not in self._suspect)
            return [step for step in good if due_every and step % due_every == 0][-keep:]

        # Orbax logs a failed save with its traceback, from several threads; each is also raised, and told once, here.
        for name in ("absl", "concurrent.futures", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with _saying(self.directory, "opened"):
            # Orbax cleans up in the background, where it was seen to remove a save that had begun meanwhile.
            if hosts.is_main() and not read_only:
                for unfinished in _unfinished(epath.Path(self.directory)):
                    unfinished.rmtree()
            known = hosts.from_main(lambda: _read_figures(self.directory / FIGURES))
            self._measured: Any = known["settings"]
            self._figures: dict[int, dict[str, float]] = {step: figures for step, figures in known["figures"]}
            self._left = hosts.from_main(lambda: _read_left(self.directory / LEFT))
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={"arrays": self._arrays, "run": self._run},
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                        [checkpoint_managers.LatestN(keep), _Chosen(self._best_of), _Chosen(due)]
                    ),
                    read_only=read_only,
                    create=not read_only,
                    async_options=ocp.options.AsyncOptions(post_finalization_callback=committed),
                ),
            )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def note(self, step: int, figures: dict[str, float], settings: Any) -> None:
        """What an evaluation of the state after `step` updates came to, whether that is saved by then or not.

        settings: what it was measured with (JSON). Figures of other settings tell nothing beside it, and are forgotten.
        """
        if settings != self._measured:
            self._measured, self._figures = settings, {}
        self._figures[step] = figures
        self._write_figures()

    def _write_figures(self) -> None:
        content = {"settings": self._measured, "figures": sorted(self._figures.items())}
        write_atomically(self.directory / FIGURES, json.dumps(content))

    def save(self, state: RunState, good: bool = True) -> None:
        """Returns once the arrays are copied off the device, so that they may be donated; the writing goes on.

        good: whether a rollback may come to it; else those that one may come to stay beside it."""
        arrays = to_dicts(state)
        self._suspect = self._suspect - {state.step} if good else {*self._suspect, state.step}
        run = {"step": state.step, "seed": state.seed, "memory": state.memory, "digests": digests(arrays)}
        with _saying(self.directory, "written"):
            self._manager.wait_until_finished()
            _require_room(self.directory, arrays)
            self._saving = state.step
            self._manager.save(
                state.step,
                args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), run=ocp.args.JsonSave(run)),
            )

    def restore(self, like: RunState) -> RunState | None:
        """The newest state that can be read, or None if there is none. `like` (arrays or abstract arrays) says where
        each array goes; what does not fit it is refused. Damaged checkpoints that are newer are put aside."""
        self._remove_left()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            state, problem = self._read(step, like)
            if problem is None:
                self._put_aside(damaged, step)
                self._forget_after(step)
                return state
            damaged[step] = problem
        if damaged:
            said = "; ".join(f"{self.directory / str(step)} ({problem})" for step, problem in damaged.items())
            raise UserError(
                f"run.dir: no checkpoint can be read: {said}. Move them away and run the same command again to start "
                "anew, or bring back one that is whole"
            )
        self._forget_after(-1)
        return None

    def restore_one(self, like: RunState, which: Which) -> RunState:
        """A state that was chosen; UserError names those that are there."""
        steps = self.steps()
        there = f"there are checkpoints of these steps: {', '.join(map(str, steps))}" if steps else "there is none yet"
        step = next(iter(self._best_of(steps)), None) if which == "best" else which
        if step is None:
            why = "was evaluated" if self._keep_best else "is known to be best, for the run had no train.keep_best"
            raise UserError(f"--best: no checkpoint in {self.directory} {why}; give --step instead: {there}")
        if step not in steps:
            raise UserError(f"--step: {step} is no checkpoint in {self.directory}; {there}")
        state, problem = self._read(step, like)
        if state is None:
            raise UserError(f"--step: {self.directory / str(step)} cannot be read ({problem}); {there}")
        return state

    def leave(self, steps: Sequence[int], goes_on: int | None = None, memory: dict[str, Any] | None = None) -> None:
        """The checkpoints of these steps are none from here on, whenever the process is killed: one atomic write says
        so, and they are removed by the next `restore`. memory: of the states after up to `goes_on` updates from now
        on, where it differs from what was saved with them."""
        self.wait()
        kept = self._left if goes_on is None else {"step": goes_on, "memory": memory}
        self._left = {**kept, "steps": list(steps)}
        self._write_left()

    def memory_at(self, step: int) -> dict[str, Any]:
        """What the last rollback made of the memory of the state after `step` updates: of the one that it went to, and
        of those before, which a run goes on from where that one cannot be read."""
        return self._left["memory"] if step <= self._left["step"] else {}

    def _remove_left(self) -> None:
        """Before anything is saved again: no step of another course of the run is taken for one that was left."""
        if self._read_only or not self._left["steps"]:
            return
        for step in self._left["steps"] if hosts.is_main() else ():
            epath.Path(self.directory / str(step)).rmtree(missing_ok=True)
        hosts.gather(None)
        self._manager.reload()
        self._left = {**self._left, "steps": []}
        self._write_left()

    def _write_left(self) -> None:
        write_atomically(self.directory / LEFT, json.dumps(self._left))

    def steps(self) -> list[int]:
        """Of the complete checkpoints, without those that were left."""
        found = sorted(hosts.from_main(lambda: [int(step) for step in self._manager.all_steps()]))
        return [step for step in found if step not in self._left["steps"]]

    def _best_of(self, steps: Sequence[int]) -> list[int]:
        """The best of those that were evaluated, if there is one; the later of two that are equal."""
        if self._keep_best is None:
            return []
        sign = -1 if self._keep_best == "mean_tokens" else 1  # of tokens the fewest are best
        known = {step: self._figures[step] for step in steps if self._keep_best in self._figures.get(step, ())}
        ranked = [(sign * figures[self._keep_best], step) for step, figures in known.items()]
        return [max(ranked)[1]] if ranked else []

    def _forget_after(self, step: int) -> None:
        """A run that goes on from `step` may come to other weights after it."""
        if not self._read_only and any(later > step for later in self._figures):
            self._figures = {number: figures for number, figures in self._figures.items() if number <= step}
            self._write_figures()

    def _put_aside(self, damaged: dict[int, str], used: int) -> None:
        """Renames checkpoints that could not be read, so that their steps can be saved again; nothing is deleted."""
        for step, problem in damaged.items():
            where = self.directory / str(step)
            names = (f"damaged-{step}" + (f"-{n}" if n else "") for n in itertools.count())
            aside = next(path for name in names if not (path := where.with_name(name)).exists())
            moved = "" if self._read_only else f" and is now {aside}"
            if hosts.is_main():
                self._say(f"warning: {where} cannot be read ({problem}){moved}; going on from step {used} instead")
                if not self._read_only:
                    where.rename(aside)
        if damaged and not self._read_only:
            hosts.gather(None)
            self._manager.reload()

    def _read(self, step: int, like: RunState) -> tuple[RunState | None, str | None]:
        """The state after `step` updates, or what any process found wrong with it: each reads its own shards only."""
        state, saved, problem = None, None, None
        try:
            state, saved = self._read_own(epath.Path(self.directory / str(step)), like)
        except UserError:
            raise
        except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):  # not the checkpoint's fault
            raise
        except Exception as error:  # Orbax and its storage layer have many for a file that is damaged
            problem = type(error).__name__
            files.is_file(self.directory / str(step) / "run" / "metadata")  # tells if it is the network's
        problem = next((other for other in hosts.gather(problem) if other is not None), None)
        if state is None or problem is not None:
            return None, problem
        saved = hosts.from_main(lambda: saved)  # all count digests, or none
        # Neither Orbax nor its storage layer would know: a changed byte is an array like any other to them.
        changed = saved is not None and saved != digests(to_dicts(state))
        return (None, "other bytes than were saved") if changed else (state, None)

    def _read_own(self, where: epath.Path, like: RunState) -> tuple[RunState, dict[str, int] | None]:
        """Not through Orbax's manager: its processes wait for each other, and one that fails never comes."""
        run = self._run.restore(where / "run")
        if run["seed"] != like.seed:
            raise UserError(
                f"run.seed = {like.seed}: {where} belongs to a run with seed {run['seed']}; "
                f"set run.seed={run['seed']} to resume it, or choose another run.dir"
            )
        wanted = to_dicts(like)
        self._refuse_misfits(where, wanted)
        args = ocp.args.StandardRestore(jax.tree.map(_abstract, wanted))
        state = from_dicts(self._arrays.restore(where / "arrays", args=args), like)
        memory = {**like.memory, **run["memory"], **self.memory_at(run["step"])}
        return state._replace(step=run["step"], memory=memory), run.get("digests")

    def wait(self) -> None:
        """Until the open save, if there is one, is complete."""
        with _saying(self.directory, "written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _saying(self.directory, "written"):
            self._manager.close()

    def _refuse_misfits(self, where: epath.Path, wanted: PyTree) -> None:
        """Orbax would cut or pad an array of another shape, and cast one of another type, without a word."""
        saved = _kinds(self._arrays.metadata(where / "arrays").tree)
        expected = _kinds(wanted)
        for name in sorted(saved.keys() | expected.keys(), reverse=True):
            if saved.get(name) != expected.get(name):
                raise UserError(
                    f"run.dir: {where} does not fit this run: {name} is {saved.get(name, 'missing')} there and "
                    f"{expected.get(name, 'missing')} here. The student, recipe.target or the optimiser were changed; "
                    f"undo that to resume, or choose another run.dir"
                )


@dataclass(frozen=True)
class _Chosen:
    """Orbax's protocol of what stays: the checkpoints that `choose` takes of the steps there are."""

    choose: Callable[[Sequence[int]], Sequence[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        chosen = self.choose([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in chosen for checkpoint in checkpoints]


def _unfinished(directory: epath.Path) -> list[epath.Path]:
    """What saves that were cut short have left."""
    if not files.remote(directory):
        return list(directory.glob("*.orbax-checkpoint-tmp*"))
    steps = (path for path in directory.glob("*") if path.name.isdigit())
    return [step for step in steps if not ocp.utils.is_checkpoint_finalized(step)]


def _read_figures(path: AnyPath) -> dict[str, Any]:
    try:
        known = json.loads(files.read(path) or b"")
        figures = [(int(step), {n: float(v) for n, v in values.items()}) for step, values in known["figures"]]
        return {"settings": known["settings"], "figures": figures}
    except (ValueError, TypeError, LookupError, AttributeError):  # absent or damaged: none is known to be best
        return {"settings": None, "figures": []}


def _read_left(path: AnyPath) -> dict[str, Any]:
    nothing, data = {"step": -1, "memory": {}, "steps": []}, files.read(path)
    try:
        left = json.loads(data) if data else nothing
    except ValueError:
        left = None
    if not isinstance(left, dict) or set(left) != set(nothing):
        raise UserError(f"run.dir: {path} is damaged; what the run had rolled back to is lost: remove the file")
    return left


def _require_room(directory: AnyPath, arrays: PyTree) -> None:
    """A disk that is too full is told before it is full: a save that fails half way is told in many voices."""
    if files.remote(directory):
        return
    needed, free = sum(x.nbytes for x in jax.tree.leaves(arrays)), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes needed, {free:,} left")


def digests(arrays: PyTree) -> dict[str, int]:
    """Of every array, by its dotted name, a number that no one changed element leaves as it is, on any mesh."""
    return {_name(path): int(x) for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(_digests(arrays)))}


@jax.jit
def _digests(arrays: PyTree) -> PyTree:
    """Sums of the elements' bits, each times an odd number of its place, modulo 2^32: exact in any order. One program:
    CPU devices that meet in several at once were seen to wait for each other for ever."""

    def digest(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return jax.tree.map(digest, arrays)


def _name(path: tuple) -> str:
    return ".".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _kinds(tree: PyTree) -> dict[str, str]:
    """Type and shape of every array by its dotted name."""
    return {_name(path): f"{leaf.dtype}{[*leaf.shape]}" for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class _saying:
    """Whatever Orbax or its storage layer raises while writing, as one message: a full disk has many faces there."""

    def __init__(self, directory: AnyPath, done: str):
        self._directory, self._done = directory, done

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(
                f"run.dir: a checkpoint under {self._directory} could not be {self._done}: {error}. Checkpoints "
                f"already there are intact: free space or mend permissions and run the same command again to resume"
            ) from error
