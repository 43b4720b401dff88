"""A run whose directory is in a bucket, killed and started again, ends like one on a disk that was never stopped."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mpd_jax import files, lock, use
from mpd_jax.eval import command as eval_command
from mpd_jax.train.metrics import read_rows
from tests import bucket
from tests.e2e.test_hosts import Processes, assert_alike
from tests.e2e.test_kill import STEPS, command, ending, environment, run_to_the_end

ADDRESS = "gs://bucket/runs/killed"


@pytest.fixture(scope="module", autouse=True)
def _bucket():
    with bucket.in_this_process():
        yield


def killed_after_a_checkpoint(run_dir: files.AnyPath, cache: Path) -> None:
    """A run that SIGKILL ends once it has saved a state and gone on."""
    with subprocess.Popen(command(run_dir), env=environment(cache), stderr=subprocess.PIPE, text=True) as process:
        while b"2 write" not in (files.read(run_dir / "phase.log") or b""):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sessions that client libraries leave
def test_a_killed_run_in_a_bucket_ends_like_one_on_a_disk(tmp_path):
    cache, there, here = tmp_path / "cache", files.path(ADDRESS), tmp_path / "whole"
    run_to_the_end(here, cache)
    killed_after_a_checkpoint(there, cache)
    assert files.is_file(there / lock.NAME)
    done = subprocess.run(command(there), env=environment(cache), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "waiting 60 s for a sign of life" in done.stderr and f"resuming {ADDRESS} after step" in done.stderr
    assert not files.is_file(there / lock.NAME)

    assert ending(there, tmp_path / "there_export") == ending(here, tmp_path / "here_export")
    names = {path.name for path in here.iterdir()} - {lock.NAME}
    assert {path.name for path in there.glob("*")} == names
    rows, whole = (read_rows(run_dir / "metrics.jsonl") for run_dir in (there, here))
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    for step in range(STEPS):
        name = f"trajectories/step_{step:06d}.jsonl.gz"
        assert files.read(there / name) == files.read(here / name)
    before, after = (json.loads(files.read(run_dir / "summary.json") or b"")["rows"] for run_dir in (there, here))
    assert before == after


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_in_a_bucket_is_evaluated_sampled_and_graded_again(capsys):
    """After the test above, of its run."""
    use.sample(ADDRESS, "Leo has 3 pens. Mon: Leo buys 2 more.", 0.0, 8, 0, as_json=True)
    assert json.loads(capsys.readouterr().out)["response_ids"]
    eval_command.run(ADDRESS, None, [], regrade=["rules"])
    assert list((files.path(ADDRESS) / "evaluations" / "regraded_rules").glob("*.jsonl"))
    eval_command.run(ADDRESS, None, ["eval.problems=4"])
    assert "trained, step 4" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_that_share_no_disk_train_like_one(tmp_path):
    there, here = files.path("gs://bucket/runs/two"), tmp_path / "one"
    longer = ("train.save_every=2", "train.schedule=constant")
    for run_dir, count in ((there, 2), (here, 1)):
        run = Processes(run_dir, count, tmp_path / "cache", *longer)
        assert run.codes() == [0] * count, run.said(0)
    assert_alike(there, here)
    assert sorted(path.name for path in (there / "checkpoints").glob("[0-9]*")) == ["2", "3"]
    again = Processes(there, 2, tmp_path / "cache", *longer, "train.steps=4")
    assert again.codes() == [0, 0] and "resuming gs://bucket/runs/two after step 3" in again.said(0)
