"""A run that is killed at any moment and started again ends with the same weights, bit for bit, as one never stopped.

Every run is a process of its own, killed by SIGKILL when phase.log says that the phase has begun. `-m slow` kills five
runs in each phase; the short version kills one.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e.tiny import QUICKSTART, SMALL

PHASES = ("write", "rewrite", "update", "save")
STEPS = 4


def command(run_dir: Path, extra: tuple[str, ...] = ()) -> list[str]:
    overrides = [*SMALL, f"train.steps={STEPS}", f"run.dir={run_dir}", "eval.concise_row=false", "mesh.data=1"]
    overrides += extra
    return [sys.executable, "-m", "mpd_jax", "train", str(QUICKSTART), *overrides]


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """So many devices, and programs compiled once for all these processes."""
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_to_the_end(run_dir: Path, cache: Path, extra: tuple[str, ...] = ()) -> None:
    done = subprocess.run(command(run_dir, extra), env=environment(cache), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def phases(run_dir: Path) -> list[tuple[int, str]]:
    path = run_dir / "phase.log"
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines() if line.count(" ") == 2]
    return [(int(step), phase) for step, phase, _ in lines]


def open_phase(run_dir: Path) -> tuple[int, str]:
    """The last phase that began. "saved" begins none: it says that a save, which went on meanwhile, is over."""
    return [(step, phase) for step, phase in phases(run_dir) if phase != "saved"][-1]


def kill_in(
    phase: str, step: int, run_dir: Path, cache: Path, delay: float, extra: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Kills a run `delay` seconds after it entered the phase; returns the phase that was open when it died."""
    with subprocess.Popen(
        command(run_dir, extra), env=environment(cache), stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while (step, phase) not in phases(run_dir):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, f"{run_dir} never came to {phase} of step {step}"
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    return open_phase(run_dir)


def ending(run_dir: Path, out: Path) -> str:
    """A hash of the final weights, read through the exported safetensors."""
    from mpd_jax import use

    use.export(run_dir, out, "float32")
    digest = hashlib.blake2b()
    for name, tensor in sorted(load_file(out / "model.safetensors").items()):
        digest.update(name.encode() + np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def kill_and_compare(
    tmp_path: Path, repeats: int, *extra: str, phases: Sequence[str] = PHASES
) -> list[tuple[str, tuple[int, str]]]:
    cache = tmp_path / "cache"
    whole = tmp_path / "whole"
    run_to_the_end(whole, cache, extra)
    expected = ending(whole, tmp_path / "whole_export")

    def one(case: tuple[str, int]) -> tuple[str, tuple[int, str]]:
        phase, number = case
        run_dir = tmp_path / f"{phase}_{number}"
        # After step 1, at a moment of its own within the phase.
        hit = kill_in(phase, 1 + number % 2, run_dir, cache, delay=0.002 * number, extra=extra)
        run_to_the_end(run_dir, cache, extra)
        return phase, hit

    cases = [(phase, number) for phase in phases for number in range(repeats)]
    with ThreadPoolExecutor(2) as pool:
        hits = list(pool.map(one, cases))
    for phase, number in cases:
        found = ending(tmp_path / f"{phase}_{number}", tmp_path / f"{phase}_{number}_export")
        assert found == expected, f"killed in {phase} ({number}): another ending"
    return hits


@pytest.mark.slow
def test_a_killed_run_ends_like_one_never_stopped(tmp_path):
    hits = dict(kill_and_compare(tmp_path, 1, phases=("save",)))
    # The writing goes on while the next step begins.
    assert hits["save"] in ((1, "save"), (2, "write")), f"wanted save of step 1, killed in {hits['save']}"


@pytest.mark.slow
def test_twenty_killed_runs_end_like_one_never_stopped(tmp_path):
    hits = kill_and_compare(tmp_path, 5)
    for wanted, (step, hit) in hits:
        print(f"wanted {wanted:8} killed in {hit:8} of step {step}")
    for phase in PHASES:
        assert sum(hit == phase for _, (_, hit) in hits) >= 5, f"too few kills hit {phase}"


@pytest.mark.slow
def test_killed_runs_that_train_an_adapter_end_like_one_never_stopped(tmp_path):
    kill_and_compare(tmp_path, 1, "student.lora={rank: 4, alpha: 8}", "student.param_dtype=bfloat16")
