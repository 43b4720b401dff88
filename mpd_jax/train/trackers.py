"""TensorBoard and Weights & Biases: copies of metrics.jsonl, written by a thread of process 0.

metrics.jsonl is the record. A tracker is given its rows again at every start and after every rollback, so that what it
shows continues without gaps and without steps that stand twice. One that fails is told of once and left out from there
on: nothing of it ends a run or makes a step wait.
"""

import importlib.util
import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from mpd_jax import files
from mpd_jax.files import AnyPath
from mpd_jax.types import UserError

Row = Mapping[str, Any]
Variables = Callable[[str], str | None]  # of the environment, by name
PACKAGES = {"tensorboard": ("tensorboardX", "tensorboardX"), "wandb": ("wandb", "'mpd-jax[wandb]'")}
NO_KEY_NEEDED = ("offline", "disabled", "dryrun")  # values of WANDB_MODE
LAST_WORDS_S = 20.0  # how long the end of a run waits for its trackers


class Tracker(Protocol):
    """A view of the rows. `restart`: these are all there are; `rewound` where steps that it knows are done again
    otherwise. Both and `add` may wait for a disk or a network."""

    def restart(self, rows: Sequence[Row], rewound: bool) -> None: ...

    def add(self, row: Row) -> None: ...

    def close(self) -> None: ...


def figures(row: Row) -> dict[str, float]:
    """The numbers of a row by name; those of a count or a list as `name/part`."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= figures({f"{name}/{part}": each for part, each in value.items()})
        elif name == "divergence_by_position":
            found |= {f"{name}/from_{part['from']}": part["mean"] for part in value if part["mean"] is not None}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and name != "step":
            found[name] = value
    return found


class TensorBoard:
    """Event files under `directory`, made anew from the rows at every start."""

    def __init__(self, directory: AnyPath):
        self._directory = directory
        self._writer: Any = None

    def restart(self, rows: Sequence[Row], rewound: bool) -> None:
        from tensorboardX import SummaryWriter

        self.close()
        for path in list(self._directory.glob("events.out.tfevents.*")):
            files.remove(path)
        # A server that watches the directory forgets what it has read of steps from purge_step on.
        self._writer = SummaryWriter(str(self._directory), purge_step=0, flush_secs=10)
        for row in rows:
            self.add(row)
        self._writer.flush()

    def add(self, row: Row) -> None:
        for name, value in figures(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """A run there, found again by the id in wandb.json. Steps that it has are not sent again; it cannot take any back,
    so that after a rollback a new run of the same group begins, with all rows."""

    def __init__(self, run_dir: AnyPath, project: str | None, config: Mapping[str, Any]):
        self._path, self._project, self._config = run_dir / "wandb.json", project or "mpd-jax", config
        self._name = run_dir.name
        self._here = None if files.remote(run_dir) else str(run_dir)  # for the library's own files
        self._run: Any = None

    def restart(self, rows: Sequence[Row], rewound: bool) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        self.close()
        known = files.read(self._path)
        if known is None or rewound:
            files.write_atomically(self._path, json.dumps({"id": secrets.token_hex(8)}))
        name = json.loads(files.read(self._path) or b"")["id"]
        how = {"project": self._project, "group": self._name, "name": self._name, "config": dict(self._config)}
        self._run = wandb.init(id=name, resume="allow", dir=self._here, **how)
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        if row["step"] >= self._run.step:
            self._run.log(figures(row), step=row["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


def require(names: Sequence[str], variables: Variables) -> None:
    """A tracker that cannot work is told before anything else is done."""
    for name in names:
        module, package = PACKAGES[name]
        if not importlib.util.find_spec(module):
            raise UserError(f"train.trackers: {name} needs {module}: pip install {package}, or leave it out")
    if "wandb" in names and not variables("WANDB_API_KEY") and variables("WANDB_MODE") not in NO_KEY_NEEDED:
        raise UserError(
            "train.trackers: wandb needs the environment variable WANDB_API_KEY (or WANDB_MODE=offline, to be sent "
            "later by `wandb sync`); set it, or leave wandb out"
        )


def make(names: Sequence[str], run_dir: AnyPath, config: Mapping[str, Any], variables: Variables) -> dict[str, Tracker]:
    """By name. config: what is shown of the run beside its figures."""
    made: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run_dir / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(run_dir, variables("WANDB_PROJECT"), config),
    }
    return {name: made[name]() for name in names}


class Trackers:
    """All trackers of a run, behind one thread. Methods only leave word for it."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]):
        self._trackers, self._say = dict(trackers), say
        self._waiting: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="trackers", daemon=True) if trackers else None
        if self._thread is not None:
            self._thread.start()

    def restart(self, rows: Sequence[Row], rewound: bool = False) -> None:
        self._tell(lambda tracker: tracker.restart(rows, rewound))

    def add(self, row: Row) -> None:
        self._tell(lambda tracker: tracker.add(row))

    def close(self, wait_s: float = LAST_WORDS_S) -> None:
        """Waits, but not for ever: what they have not written by then the next start gives them again."""
        if self._thread is None:
            return
        self._tell(lambda tracker: tracker.close())
        self._waiting.put(None)
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._say(
                f"warning: train.trackers: {', '.join(self._trackers)} not done after {wait_s:g} s; left as it is"
            )
        self._thread = None

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        if self._thread is not None:
            self._waiting.put(what)

    def _work(self) -> None:
        while (what := self._waiting.get()) is not None:
            for name, tracker in list(self._trackers.items()):
                try:
                    what(tracker)
                except Exception as error:  # each library has its own
                    del self._trackers[name]
                    said = f"{type(error).__name__}: {error}"
                    self._say(f"warning: train.trackers: {name} failed and is left out from here on ({said})")
