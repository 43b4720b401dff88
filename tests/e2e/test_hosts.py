"""Runs of several processes on this machine: what they learn, how they are stopped, and what is said when one dies.

Two processes of four CPU devices each, against one process of eight. `-m slow` runs the longer proofs.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from mpd_jax.files import AnyPath
from mpd_jax.train.metrics import read_rows
from mpd_jax.train.records import read_trajectories
from tests.e2e.test_kill import ending, environment, open_phase, phases
from tests.e2e.tiny import QUICKSTART, SMALL

STEPS = 3
OVERRIDES = [*SMALL, f"train.steps={STEPS}", "mesh.fsdp=2", "eval.concise_row=false", "eval.problems=4"]
OVERRIDES.append("train.save_every=9")  # only what a signal asks for, and the end


class Processes:
    """`processes` processes of one run, over eight devices in all."""

    def __init__(self, run_dir: AnyPath, processes: int, cache: Path, *overrides: str, devices: int = 8):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [
            sys.executable,
            "-m",
            "mpd_jax",
            "train",
            str(QUICKSTART),
            *OVERRIDES,
            f"run.dir={run_dir}",
            *overrides,
        ]
        self.run_dir, self._stack = run_dir, ExitStack()
        self.output = [cache.with_name(f"{run_dir.name}.{number}") for number in range(processes)]
        self.all = []
        for number, path in enumerate(self.output):
            flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", processes, "--process-id", number]
            self.all.append(
                subprocess.Popen(
                    [*words, *(map(str, flags) if processes > 1 else ())],
                    env=environment(cache, devices // processes),
                    stdout=subprocess.DEVNULL,
                    stderr=self._stack.enter_context(path.open("w")),
                )
            )

    def codes(self, timeout: float = 600) -> list[int]:
        with self._stack:
            try:
                return [process.wait(timeout) for process in self.all]
            finally:
                for process in self.all:
                    process.kill()

    def signal(self, which: int, number: int) -> None:
        self.all[which].send_signal(number)

    def said(self, which: int) -> str:
        return self.output[which].read_text()

    def wait_for(self, step: int, phase: str, timeout: float = 600) -> None:
        deadline = time.monotonic() + timeout
        while (step, phase) not in phases(self.run_dir):
            assert all(process.poll() is None for process in self.all), self.said(0)
            assert time.monotonic() < deadline, f"{self.run_dir} never came to {phase} of step {step}"
            time.sleep(0.005)


def written(run_dir: AnyPath) -> list[list[tuple]]:
    """Problem and ids of every trajectory, drafts too, step by step."""
    steps = []
    for path in sorted((run_dir / "trajectories").glob("step_*.jsonl.gz")):
        rows = read_trajectories(path)[1]
        steps.append([(t.problem_id, t.response, t.original.response if t.original else None, t.verdict) for t in rows])
    return steps


def losses(run_dir: AnyPath) -> list[float]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return [np.nan if row["loss"] is None else row["loss"] for row in rows]  # None: nothing was left to learn from


def assert_alike(run_dir: AnyPath, other: AnyPath) -> None:
    assert written(run_dir) == written(other)
    np.testing.assert_allclose(losses(run_dir), losses(other), rtol=1e-5)
    a, b = (json.loads((path / "summary.json").read_text()) for path in (run_dir, other))
    assert a["rows"] == b["rows"]


@pytest.mark.slow
def test_two_processes_that_are_stopped_go_on_as_one(tmp_path):
    """The signal reaches process 1 alone, while the second step is being written; both save and end."""
    one, two = tmp_path / "one", tmp_path / "two"
    run = Processes(two, 2, tmp_path / "cache")
    run.wait_for(1, "write")
    run.signal(1, signal.SIGTERM)
    assert run.codes() == [75, 75], run.said(0) + run.said(1)
    assert "stopped and saved" in run.said(0) and "stopped" not in run.said(1) and "training" not in run.said(1)
    done = len(losses(two))
    assert open_phase(two)[1] == "save" and done < STEPS
    assert [path.name for path in (two / "checkpoints").iterdir()] == [str(done)]
    for run_dir in (two, one):
        run = Processes(run_dir, 1, tmp_path / "cache")
        assert run.codes() == [0], run.said(0)
        assert ("resuming" in run.said(0)) == (run_dir == two)
    assert_alike(two, one)
    costs, summary = read_rows(two / "processes.jsonl"), json.loads((two / "summary.json").read_text())
    assert [cost["steps"] for cost in costs] == [done, STEPS - done]
    assert summary["seconds"]["wall"] == pytest.approx(sum(cost["seconds"] for cost in costs))
    assert summary["peak_memory_bytes"] == max(cost["peak_memory_bytes"] for cost in costs)


@pytest.mark.slow
def test_two_processes_end_with_the_same_bits_whether_they_were_stopped_or_not(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = Processes(whole, 2, tmp_path / "cache")
    assert run.codes() == [0, 0], run.said(0) + run.said(1)
    for step, phase, which in ((0, "rewrite", 0), (1, "write", 1), (2, "update", 0)):
        run = Processes(stopped, 2, tmp_path / "cache")
        run.wait_for(step, phase)
        run.signal(which, signal.SIGTERM)
        assert run.codes() in ([75, 75], [0, 0]), run.said(0) + run.said(1)
    run = Processes(stopped, 2, tmp_path / "cache")
    assert run.codes() == [0, 0], run.said(0) + run.said(1)
    assert ending(stopped, tmp_path / "a") == ending(whole, tmp_path / "b")
    assert_alike(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_by_name(tmp_path, victim):
    run = Processes(tmp_path / "run", 2, tmp_path / "cache")
    run.wait_for(0, "rewrite")
    run.signal(victim, signal.SIGKILL)
    began = time.monotonic()
    codes = run.codes()
    print(f"process {victim} killed: the other ended after {time.monotonic() - began:.1f} s")
    assert codes[1 - victim] == 69, run.said(1 - victim)
    assert f"process {victim} of 2 ({socket.gethostname()})" in run.said(1 - victim).splitlines()[-1]
    again = Processes(tmp_path / "run", 2, tmp_path / "cache")
    assert again.codes() == [0, 0], again.said(0) + again.said(1)


@pytest.mark.slow
def test_a_run_moved_from_eight_devices_to_four_to_eight_goes_on_alike(tmp_path):
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run = Processes(whole, 1, tmp_path / "cache", "train.save_every=1")
    assert run.codes() == [0], run.said(0)
    for step, devices in ((1, 8), (2, 4)):  # killed with the step's trajectories on disk, before it is saved
        run = Processes(moved, 1, tmp_path / "cache", "train.save_every=1", devices=devices)
        run.wait_for(step, "update")
        run.signal(0, signal.SIGKILL)
        run.codes()
    run = Processes(moved, 1, tmp_path / "cache", "train.save_every=1")
    assert run.codes() == [0], run.said(0)
    assert written(moved) == written(whole)
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_a_run_stopped_at_ten_random_moments_ends_with_the_same_bits(tmp_path):
    """One run, stopped by SIGTERM again and again, each time at a moment that nobody chose."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps = "train.steps=16"
    assert Processes(whole, 1, tmp_path / "cache", steps).codes() == [0]
    moments, rng = [], np.random.default_rng(0)
    while len(moments) < 10:
        run = Processes(stopped, 1, tmp_path / "cache", steps)
        enough = len(phases(stopped)) + int(rng.integers(1, 7))
        while len(phases(stopped)) < enough and run.all[0].poll() is None:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.3)))
        run.signal(0, signal.SIGTERM)
        code = run.codes()[0]
        if code == 0:
            break
        assert code == 75, run.said(0)
        moments.append(open_phase(stopped))
    print("stopped in", moments)
    assert Processes(stopped, 1, tmp_path / "cache", steps).codes() == [0]
    assert len(moments) == 10 and len(set(moments)) >= 5
    assert ending(stopped, tmp_path / "a") == ending(whole, tmp_path / "b")
    assert_alike(stopped, whole)
