"""The whole RunState on disk, written asynchronously, restored onto any mesh. The only module that knows Orbax.

A checkpoint is a directory named by the number of finished updates; it appears by renaming a temporary one, so a save
that was cut short is never taken for a checkpoint. Arrays are pure dicts: the optimiser state by key path.
"""

import errno
import itertools
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mpd_jax import hosts
from mpd_jax.train.state import PyTree, RunState
from mpd_jax.types import UserError

log = logging.getLogger(__name__)


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
    """Checkpoints of one run: the last `keep` of them, and the best by the figure `keep_best` that it was saved with.

    read_only: another process may be training; nothing is cleaned up or written.
    `on_commit(step)` is called by the saving thread when everything is written and only the renaming is left. `say` is
    told of checkpoints that cannot be read. All processes of a run see the same directory, on a shared file system.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        on_commit: Callable[[int], None] | None = None,
        *,
        keep_best: str | None = None,
        read_only: bool = False,
        say: Callable[[str], None] = log.warning,
    ):
        self._say = say
        self.directory = (Path(run_dir) / "checkpoints").absolute()
        self._saving: int | None = None
        self._read_only = read_only

        def committed() -> None:
            if on_commit is not None and self._saving is not None:
                on_commit(self._saving)

        # Orbax logs a failed save with its traceback, from several threads; each is also raised, and told once, here.
        for name in ("absl", "concurrent.futures", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with _saying(self.directory, "opened"):
            # Orbax cleans up in the background, where it was seen to remove a save that had begun meanwhile.
            if hosts.is_main() and not read_only:
                for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished)
            hosts.gather(None)
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={"arrays": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(
                    best_fn=_better(keep_best) if keep_best else None,
                    preservation_policy=_preserved(keep, keep_best),
                    read_only=read_only,
                    create=not read_only,
                    async_options=ocp.options.AsyncOptions(post_finalization_callback=committed),
                ),
            )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: RunState, figures: dict[str, float] | None = None) -> None:
        """Returns once the arrays are copied off the device, so that they may be donated; the writing goes on.

        figures: what an evaluation of this state came to.
        """
        arrays = to_dicts(state)
        with _saying(self.directory, "written"):
            self._manager.wait_until_finished()
            _require_room(self.directory, arrays)
            self._saving = state.step
            self._manager.save(
                state.step,
                metrics=figures,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),
                    run=ocp.args.JsonSave({"step": state.step, "seed": state.seed, "memory": state.memory}),
                ),
            )

    def restore(self, like: RunState) -> RunState | None:
        """The newest state that can be read, or None if there is none. `like` (arrays or abstract arrays) says where
        each array goes; what does not fit it is refused. Damaged checkpoints that are newer are put aside."""
        damaged: dict[int, str] = {}
        steps = hosts.from_main(lambda: [int(step) for step in self._manager.all_steps()])
        for step in sorted(steps, reverse=True):
            state, problem = None, None
            try:
                state = self._restore(step, self.directory / str(step), like)
            except UserError:
                raise
            except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):  # not the checkpoint's fault
                raise
            except Exception as error:  # Orbax and its storage layer have many for a file that is damaged
                problem = type(error).__name__
            # A process reads its own shards only.
            problem = next((other for other in hosts.gather(problem) if other is not None), None)
            if problem is None:
                self._put_aside(damaged, step)
                return state
            damaged[step] = problem
        if damaged:
            said = "; ".join(f"{self.directory / str(step)} ({problem})" for step, problem in damaged.items())
            raise UserError(
                f"run.dir: no checkpoint can be read: {said}. Move them away and run the same command again to start "
                "anew, or bring back one that is whole"
            )
        return None

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

    def _restore(self, step: int, where: Path, like: RunState) -> RunState:
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if run["seed"] != like.seed:
            raise UserError(
                f"run.seed = {like.seed}: {where} belongs to a run with seed {run['seed']}; "
                f"set run.seed={run['seed']} to resume it, or choose another run.dir"
            )
        wanted = to_dicts(like)
        self._refuse_misfits(step, where, wanted)
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(jax.tree.map(_abstract, wanted)))
        arrays = self._manager.restore(step, args=args)["arrays"]
        state = from_dicts(arrays, like)
        return state._replace(step=run["step"], memory={**like.memory, **run["memory"]})

    def wait(self) -> None:
        """Until the open save, if there is one, is complete."""
        with _saying(self.directory, "written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _saying(self.directory, "written"):
            self._manager.close()

    def _refuse_misfits(self, step: int, where: Path, wanted: PyTree) -> None:
        """Orbax would cut or pad an array of another shape, and cast one of another type, without a word."""
        saved = _kinds(self._manager.item_metadata(step)["arrays"].tree)
        expected = _kinds(wanted)
        for name in sorted(saved.keys() | expected.keys(), reverse=True):
            if saved.get(name) != expected.get(name):
                raise UserError(
                    f"run.dir: {where} does not fit this run: {name} is {saved.get(name, 'missing')} there and "
                    f"{expected.get(name, 'missing')} here. The student, recipe.target or the optimiser were changed; "
                    f"undo that to resume, or choose another run.dir"
                )


def _better(figure: str) -> Callable[[dict[str, float]], float]:
    """The higher, the better; of tokens the fewest are best."""
    return lambda figures: -figures[figure] if figure == "mean_tokens" else figures[figure]


def _preserved(keep: int, keep_best: str | None) -> Any:
    last = checkpoint_managers.LatestN(keep)
    if keep_best is None:
        return last
    best = checkpoint_managers.BestN(get_metric_fn=_better(keep_best), n=1, keep_checkpoints_without_metrics=False)
    return checkpoint_managers.AnyPreservationPolicy([last, best])


def _require_room(directory: Path, arrays: PyTree) -> None:
    """A disk that is too full is told before it is full: a save that fails half way is told in many voices."""
    needed, free = sum(x.nbytes for x in jax.tree.leaves(arrays)), shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes needed, {free:,} left")


def _name(path: tuple) -> str:
    return ".".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _kinds(tree: PyTree) -> dict[str, str]:
    """Type and shape of every array by its dotted name."""
    return {_name(path): f"{leaf.dtype}{[*leaf.shape]}" for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class _saying:
    """Whatever Orbax or its storage layer raises while writing, as one message: a full disk has many faces there."""

    def __init__(self, directory: Path, done: str):
        self._directory, self._done = directory, done

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(
                f"run.dir: a checkpoint under {self._directory} could not be {self._done}: {error}. Checkpoints "
                f"already there are intact: free space or mend permissions and run the same command again to resume"
            ) from error
