"""metrics.jsonl (one row a step), the wall time of each phase, and phase.log (which phase began when).

The device's figures of a step are read once the next step's work is under way, so the device is never waited for.
Lengths come from sampled ids, before anything is dropped or masked.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import jax
import numpy as np

from mpd_jax import files, hosts
from mpd_jax.files import AnyPath
from mpd_jax.train.step import POSITION_EDGES, Out
from mpd_jax.train.trackers import Trackers
from mpd_jax.types import Trajectory, UserError

Row = dict[str, Any]
# What later steps are decided by (guards.py, curriculum.py).
HISTORY = ("step", "made_staleness", "student_entropy", "written_tokens", "divergence", "ended")


class PhaseLog:
    """Appends "step phase seconds-since-epoch" to a file, at once, so that a killed run's last phase is known."""

    def __init__(self, path: AnyPath):
        self._lock = Lock()
        self._lines = files.Lines(path)

    def __call__(self, step: int, phase: str) -> None:
        with self._lock:
            self._lines.add(f"{step} {phase} {time.time():.6f}")

    def close(self) -> None:
        self._lines.close()


class Seconds(NamedTuple):
    """Of a step by phase: the loop's own, which make its wall time, and those that ran beside it."""

    own: dict[str, float]
    beside: dict[str, float]


class Clock:
    """Wall seconds of a step's phases, and in `totals` of the whole process.

    An update runs on after it was handed to the device: a watching thread notes when it was ready, and a phase that
    overlaps it (a writer waiting for the new weights) is charged the rest only.
    """

    def __init__(self, log: Callable[[int, str], None] = lambda step, phase: None):
        self.totals: Counter[str] = Counter()
        self._log = log
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="update-ready")
        self._phase: tuple[str, float] | None = None
        self._spans: dict[str, tuple[float, float | Future]] = {}
        self._busy_until: float | Future = 0.0
        self._beside: Counter[str] = Counter()

    def begin(self, step: int, phase: str) -> None:
        self.end()
        self._log(step, phase)
        self._phase = (phase, time.perf_counter())

    def end(self) -> None:
        if self._phase is not None:
            name, start = self._phase
            self._spans[name] = (start, time.perf_counter())
            self._phase = None

    def note(self, step: int, phase: str) -> None:
        """A phase that runs beside the loop's own began; its seconds come through `add`."""
        self._log(step, phase)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Seconds of phases that ran beside the loop's own; they are no part of its wall time."""
        self._beside.update(seconds)

    def watch(self, out: Out) -> None:
        """The running phase ends when `out` is ready on the device."""
        assert self._phase is not None, "watch outside a phase"
        name, start = self._phase
        self._spans[name] = (start, self._watcher.submit(_ready_at, out))
        self._phase = None

    def take(self) -> Callable[[], Seconds]:
        """The spans since the last call, as seconds by phase once the update is through."""
        self.end()
        spans, busy, beside = self._spans, self._busy_until, self._beside
        self._spans, self._beside = {}, Counter()
        self._busy_until = next((end for _, end in spans.values() if isinstance(end, Future)), 0.0)

        def seconds() -> Seconds:
            free = busy.result() if isinstance(busy, Future) else busy
            ends = {name: end.result() if isinstance(end, Future) else end for name, (_, end) in spans.items()}
            by_phase = {name: max(0.0, ends[name] - max(start, free)) for name, (start, _) in spans.items()}
            self.totals.update(by_phase)
            self.totals.update(beside)
            return Seconds(by_phase, dict(beside))

        return seconds

    def close(self) -> None:
        self._watcher.shutdown(wait=False, cancel_futures=True)


def _ready_at(out: Out) -> float:
    jax.block_until_ready(out)
    return time.perf_counter()


def summarise(trajectories: Sequence[Trajectory]) -> Row:
    """What the ids alone tell: counts of verdicts and endings, lengths before and after rewriting, and tokens in all
    that were written, read to be rewritten, and answered then. What was written, and what that cost, is of this step
    alone: what is used again would hide what the student writes now."""
    kept, made = [t for t in trajectories if not t.dropped], [t for t in trajectories if not t.reused]
    originals = [t.original or t for t in made]
    before, after = [len(t.response) for t in originals], [len(t.response) for t in kept]
    before_kept = sum(len((t.original or t).response) for t in kept)
    return {
        "trajectories": len(trajectories),
        "dropped": len(trajectories) - len(kept),
        "verdicts": dict(sorted(Counter(t.verdict for t in trajectories).items())),
        "ended": dict(sorted(Counter(t.ended for t in originals).items())),
        "written_tokens": _mean(before),
        "response_tokens": _mean(after),
        "reused": len(trajectories) - len(made),
        "written_total": sum(before),
        "rewrite_prompt_total": sum(t.rewriting[0] for t in made),
        "rewritten_total": sum(t.rewriting[1] for t in made),
        "trimmed": sum(t.trimmed > 0 for t in trajectories),
        "compression_ratio": sum(after) / before_kept if before_kept else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def device_row(out: Out) -> Row:
    """The update's figures as plain numbers; sums become means over the tokens that count."""
    host = {name: np.asarray(value, dtype=np.float64) for name, value in jax.device_get(out).items()}
    tokens = float(host["tokens"])
    row: Row = {"loss": _number(host["loss"]), "grad_norm": _number(host["grad_norm"]), "finite": bool(host["finite"])}
    row["tokens"] = int(tokens)
    means = ("divergence", "student_entropy", "target_entropy", "tail_mass", "student_tail_mass", "token_weight")
    for name in means:
        if name in host:
            row[name] = _number(host[name] / tokens) if tokens else None
    starts = (0, *POSITION_EDGES)
    row["divergence_by_position"] = [
        {"from": start, "tokens": int(count), "mean": _number(total / count)}
        for start, count, total in zip(starts, host["tokens_at"], host["divergence_at"], strict=True)
        if count
    ]
    return row


def _number(value: Any) -> float | None:
    """JSON knows no NaN: what is not finite is null, and the row's `finite` says so."""
    return float(value) if math.isfinite(value) else None


def spent(row: Row, seconds: Seconds) -> Row:
    """Seconds of each phase, their share of the step's wall time, and the tokens that each got through in a second.

    With a look-ahead writing and rewriting run beside the step, and the shares come to more than one.
    """
    own, beside = seconds
    by_phase = {**dict.fromkeys(("write", "rewrite", "update"), 0.0), **own, **beside}
    by_phase["train"] = by_phase.pop("update")
    wall = sum(own.values())
    made = {"write": row.get("written_total"), "rewrite": row.get("rewritten_total")}
    made |= dict.fromkeys(("score", "train"), row.get("tokens"))
    return {
        **{f"{name}_seconds": round(value, 6) for name, value in by_phase.items()},
        **{f"{name}_share": round(value / wall, 6) if wall else 0.0 for name, value in by_phase.items()},
        **{
            f"{name}_tokens_per_second": round(tokens / by_phase[name], 3)
            for name, tokens in made.items()
            if tokens and by_phase.get(name)
        },
    }


class Metrics:
    """metrics.jsonl. Rows of steps that are about to be redone are cut off when it is opened.

    trackers: are given the same rows, by process 0.
    history: the HISTORY of every row; of the rows of earlier starts process 0 alone has it.
    """

    def __init__(
        self,
        run_dir: AnyPath,
        start_step: int,
        live: Callable[[Row], None] | None = None,
        trackers: Trackers | None = None,
    ):
        self.path = run_dir / "metrics.jsonl"
        self.history: list[Row] = []
        self._live = live
        self._trackers = trackers
        self._pending: list[tuple[Row, Out | None, Callable[[], Seconds]]] = []
        hosts.from_main(lambda: self._truncate(start_step))
        self._lines = files.Lines(self.path)

    def add(self, step: int, out: Out | None, host: Row, seconds: Callable[[], Seconds]) -> None:
        """`out` None is a step without an update (nothing to learn from was left)."""
        self._pending.append(({"step": step, **host}, out, seconds))

    def settle(self, behind: int = 0) -> list[Row]:
        """Reads and writes the pending rows but the last `behind`; returns them."""
        done = []
        while len(self._pending) > behind:
            row, out, seconds = self._pending.pop(0)
            row |= device_row(out) if out is not None else {"loss": None, "finite": True, "skipped": True}
            row |= spent(row, seconds())
            self._lines.add(json.dumps(row))
            self.history.append(_decisive(row))
            if self._live is not None:
                self._live(row)
            if self._trackers is not None and hosts.is_main():
                self._trackers.add(row)
            done.append(row)
        return done

    def rewind(self, step: int) -> None:
        """Forgets `step` and all later ones, read or not."""
        self._pending.clear()
        self._lines.close()
        hosts.from_main(lambda: self._truncate(step, rewound=True))
        self._lines = files.Lines(self.path)

    def flush(self) -> None:
        """Until the rows are where a start would look for them."""
        self._lines.flush()

    def close(self) -> None:
        try:
            self._lines.close()
        finally:
            if self._trackers is not None:
                self._trackers.close()

    def _truncate(self, start_step: int, rewound: bool = False) -> None:
        rows = read_rows(self.path)
        kept = [row for row in rows if row["step"] < start_step]
        self.history = [_decisive(row) for row in kept]
        files.write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if self._trackers is not None:
            self._trackers.restart(kept, rewound)


def _decisive(row: Row) -> Row:
    return {name: row[name] for name in HISTORY if name in row}


def read_rows(path: AnyPath) -> list[Row]:
    """The rows of a file of JSON lines. A last line that a kill cut short is left out."""
    data = files.read(path) or b""
    try:
        lines = data.decode().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError:
        raise UserError(f"run.dir: {path} is damaged; take the broken line out, or remove the file") from None
