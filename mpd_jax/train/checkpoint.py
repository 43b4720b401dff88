"""The whole RunState on disk, written asynchronously, restored onto any mesh. The only module that knows Orbax.

A checkpoint is a directory named by the number of finished updates; it appears by renaming a temporary one, so a save
that was cut short is never taken for a checkpoint. Arrays are pure dicts: the optimiser state by key path.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mpd_jax.train.state import PyTree, RunState
from mpd_jax.types import UserError


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
    """Checkpoints of one run, the last `keep` of them.

    read_only: another process may be training; nothing is cleaned up or written.
    `on_commit(step)` is called by the saving thread when everything is written and only the renaming is left.
    """

    def __init__(
        self, run_dir: Path, keep: int, on_commit: Callable[[int], None] | None = None, *, read_only: bool = False
    ):
        self.directory = (Path(run_dir) / "checkpoints").absolute()
        self._saving: int | None = None

        def committed() -> None:
            if on_commit is not None and self._saving is not None:
                on_commit(self._saving)

        # Orbax logs a failed save with its traceback, from several threads; each is also raised, and told once, here.
        for name in ("absl", "concurrent.futures", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with _saying(self.directory, "opened"):
            # Orbax cleans up in the background, where it was seen to remove a save that had begun meanwhile.
            if jax.process_index() == 0 and not read_only:
                for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    shutil.rmtree(unfinished)
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={"arrays": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()},
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.LatestN(keep),
                    read_only=read_only,
                    create=not read_only,
                    async_options=ocp.options.AsyncOptions(post_finalization_callback=committed),
                ),
            )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: RunState) -> None:
        """Returns once the arrays are copied off the device, so that they may be donated; the writing goes on."""
        arrays = to_dicts(state)
        with _saying(self.directory, "written"):
            self._manager.wait_until_finished()
            _require_room(self.directory, arrays)
            self._saving = state.step
            self._manager.save(
                state.step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays),
                    run=ocp.args.JsonSave({"step": state.step, "seed": state.seed, "memory": state.memory}),
                ),
            )

    def restore(self, like: RunState) -> RunState | None:
        """The newest state, or None. `like` (arrays or abstract arrays) says where each array goes; what does not fit
        it is refused."""
        step = self.latest()
        if step is None:
            return None
        where = self.directory / str(step)
        try:
            return self._restore(step, where, like)
        except UserError:
            raise
        except Exception as error:  # Orbax and its storage layer have many for a file that is damaged
            older = [other for other in self._manager.all_steps() if other != step]
            remedy = f"resume from step {max(older)}" if older else "start anew"
            raise UserError(
                f"run.dir: {where} cannot be read ({type(error).__name__}); remove that directory and run the same "
                f"command again to {remedy}"
            ) from error

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
