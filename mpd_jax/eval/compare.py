"""`mpd-jax compare`: several methods over several seeds, each run a `mpd-jax train` of its own, and one table of them.

The directory holds one run directory an arm (arm.yaml, what it was started with, and train.log among its files), the
programs that all of them compiled, and compare.md, .csv, .json and .png, written anew whenever an arm is over. Whatever
is there already is used: a comparison that was stopped at any moment goes on by the same command.
"""

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mpd_jax import config, hosts
from mpd_jax.eval import comparison, pareto
from mpd_jax.eval.arms import Arm, Result, is_finished, is_trained, named, plan, read_result, share_evaluations, untold
from mpd_jax.files import write_atomically
from mpd_jax.lock import locked
from mpd_jax.run import refuse_another_run
from mpd_jax.screen import Screen
from mpd_jax.types import UserError

# How an arm is trained: its config's path follows. It stops, as by SIGTERM, when this process is gone.
TRAIN = (sys.executable, "-m", "mpd_jax", "train", "--while-stdin")
MEASURE = (sys.executable, "-m", "mpd_jax", "instructions", "--while-stdin")  # swept keys follow too
POLL_S = 0.5
TAIL = 15  # lines of a failed arm's log that are shown
ORPHANS_S = 120.0  # how long runs that a killed comparison left have to save


def run(
    configs: Sequence[str],
    overrides: Sequence[str],
    sweeps: Sequence[str],
    *,
    seeds: int,
    out: Path,
    jobs: int,
    against: str | None = None,
    train: Sequence[str] = TRAIN,
    measure: Sequence[str] = MEASURE,
) -> dict[str, Any]:
    """Trains the arms that are not over, and returns what compare.json holds. Stopped once a signal asked for it.

    against: the method that all rows are compared with, beside vanilla.
    train, measure: the commands that train the config whose path follows, and that measure its swept instructions.
    """
    if jobs < 1:
        raise UserError(f"--jobs: {jobs} is not allowed; it must be 1 or more")
    if "://" in str(out):
        raise UserError(f"--out: {out} is not allowed; give a directory on this machine")
    arms, screen = plan(configs, overrides, sweeps, seeds, out), Screen()
    other = named(arms, against) if against is not None else None
    for arm in arms:
        refuse_another_run(arm.directory, arm.settings)
    with _alone(out), hosts.stoppable(screen.say):
        report = _Report(out, arms, other)
        for arm in arms:
            if is_finished(arm):
                report.add(arm)
        waiting = [arm for arm in arms if arm.directory not in report.results]
        _wait_for_orphans(waiting, screen)
        work = _Work(report, screen, jobs, train, measure, deque(waiting))
        try:
            with screen.bar("arms", len(arms)) as advance:
                work.through(advance)
        except hosts.Stopped:
            raise hosts.Stopped(f"stopped; {len(report.results)} of {len(arms)} arms are over") from None
        finally:
            work.end()
        content = report.write()
    console = Console(file=sys.stderr, highlight=False)
    if report.results:
        table = comparison.table(report.lines(), report.of_all())
        console.width = max(console.width, table.width or 0)
        console.print(table)
    screen.say(f"{out}: compare.md, compare.csv, compare.json, compare.png, and a run directory an arm")
    return content


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """UserError where another comparison works there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made ({error.strerror}); choose another directory") from None
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except UserError:
            raise UserError(
                f"--out: {out} is being filled by another `mpd-jax compare`; wait for it, or choose another --out"
            ) from None
        yield


def _wait_for_orphans(arms: Sequence[Arm], screen: Screen) -> None:
    """Runs of a comparison that was killed save and end by themselves; until then they hold their directories."""
    deadline, told = time.monotonic() + ORPHANS_S, False
    for arm in arms:
        while _is_held(arm.directory) and time.monotonic() < deadline:
            if not told:
                screen.say(f"{arm.name}: a run of before is still saving; waiting for it")
            told = True
            hosts.check()
            time.sleep(POLL_S)


def _is_held(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    try:
        with locked(directory):
            return False
    except UserError:
        return True


@dataclass
class _Report:
    """The finished and failed arms, and the files that say what they come to."""

    out: Path
    arms: Sequence[Arm]
    against: Arm | None = None
    results: dict[Path, Result] = field(default_factory=dict)  # by the arm's directory
    failed: dict[Path, str] = field(default_factory=dict)  # why

    def add(self, arm: Arm) -> None:
        self.results[arm.directory] = read_result(arm)

    def of_all(self) -> list[Result]:
        """In the order of the arms, whenever they were over."""
        return [self.results[arm.directory] for arm in self.arms if arm.directory in self.results]

    def lines(self) -> list[comparison.Line]:
        failed = [arm for arm in self.arms if arm.directory in self.failed]
        return comparison.lines(self.arms, self.of_all(), failed, self.against)

    def write(self) -> dict[str, Any]:
        """The four files; of results, if there are any."""
        content: dict[str, Any] = {"arms": [self._arm(arm) for arm in self.arms], "rows": []}
        if self.results:
            lines, results = self.lines(), self.of_all()
            content |= {"measured": comparison.said(results), "rows": [comparison.flat(line) for line in lines]}
            write_atomically(self.out / "compare.md", comparison.as_markdown(lines, results))
            write_atomically(self.out / "compare.csv", comparison.as_csv(lines))
            pareto.plot(lines, self.out / "compare.png")
        write_atomically(self.out / "compare.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return content

    def _arm(self, arm: Arm) -> dict[str, Any]:
        found: dict[str, Any] = {
            "method": arm.label,
            "values": dict(arm.values),
            "seed": arm.seed,
            "directory": str(arm.directory),
            "state": "failed" if arm.directory in self.failed else "unfinished",
        }
        if result := self.results.get(arm.directory):
            rows = [*result.vanilla.values(), *result.concise.values(), *result.trained.values()]
            found |= {"state": "finished", **asdict(result.spent), "evaluations": [row.summary() for row in rows]}
        if arm.directory in self.failed:
            found["error"] = self.failed[arm.directory]
        return found


@dataclass
class _Running:
    arm: Arm
    measures: bool
    process: subprocess.Popen
    log: Path
    log_start: int
    began: float

    def end(self, kill: bool = False) -> None:
        """Waits for its end."""
        if kill:
            self.process.kill()
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()


@dataclass
class _Work:
    """The arms that are not over: those that wait, and those that run, `jobs` at once."""

    report: _Report
    screen: Screen
    jobs: int
    train: Sequence[str]
    measure: Sequence[str]
    waiting: deque[Arm]
    running: list[_Running] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    def through(self, advance: Any) -> None:
        while self.waiting or self.running:
            hosts.check()
            while self.waiting and len(self.running) < self.jobs:
                self._start(self._next())
            for one in [one for one in self.running if one.process.poll() is not None]:
                self.running.remove(one)
                one.end()
                self._settle(one)
            done = len(self.report.results) + len(self.report.failed)
            advance(done, self._text())
            time.sleep(POLL_S)

    def end(self) -> None:
        """Asks what runs to save and stop, and waits for it; at a second Ctrl-C it is killed."""
        try:
            for one in self.running:
                one.process.terminate()
            for one in self.running:
                one.process.wait()
        finally:
            for one in self.running:
                one.end(kill=True)

    def _next(self) -> Arm:
        """The first that waits and does not evaluate the untrained student beside a run of its seed that does; where
        all that wait would, the first of them: with more jobs than seeds some do it twice."""
        busy = {one.arm.seed for one in self.running}
        arms = self.report.arms
        free = [arm for arm in self.waiting if arm.seed not in busy or not untold(arm, arms)]
        arm = free[0] if free else self.waiting[0]
        self.waiting.remove(arm)
        return arm

    def _start(self, arm: Arm) -> None:
        arm.directory.mkdir(parents=True, exist_ok=True)
        share_evaluations(arm, self.report.arms)
        settings, log = arm.directory / "arm.yaml", arm.directory / "train.log"
        write_atomically(settings, config.to_yaml(arm.settings))
        measures = is_trained(arm)
        command = [*self.measure, str(settings), *arm.swept] if measures else [*self.train, str(settings)]
        with open(log, "ab") as out:
            # A session of its own: Ctrl-C is ours to pass on. Standard input ends with this process.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.append(_Running(arm, measures, process, log, out.tell(), time.monotonic()))

    def _settle(self, one: _Running) -> None:
        """An arm whose process has ended is over, has its instruction still to be measured, or failed."""
        arm, code = one.arm, one.process.returncode
        if not one.measures and is_trained(arm):
            self.took.append(time.monotonic() - one.began)
        if is_finished(arm):
            self.report.add(arm)
        elif is_trained(arm) and not one.measures:
            self.waiting.appendleft(arm)
        else:
            with open(one.log, "rb") as file:
                file.seek(one.log_start)
                tail = "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL:])
            self.report.failed[arm.directory] = f"exit code {code}: {tail}"
            self.screen.say(f"{arm.name} failed, exit code {code}; the end of {one.log}:\n{tail}")
        self.report.write()

    def _text(self) -> str:
        """What runs, how far it is, and how long the rest may take."""
        texts = [f"{one.arm.name} ({_steps(one.arm)}/{one.arm.settings.train.steps})" for one in self.running]
        if self.took:
            each, now = sum(self.took) / len(self.took), time.monotonic()
            left = each * len(self.waiting) + sum(max(0.0, each - (now - one.began)) for one in self.running)
            texts.append(f"about {left / self.jobs / 60:.0f} min left")
        return ", ".join(texts)


def _steps(arm: Arm) -> int:
    """The steps that are in its metrics."""
    try:
        return (arm.directory / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
