"""A real run that collapses, goes back and learns after all."""

import json
import subprocess
import sys

import pytest

from tests.e2e.test_kill import environment
from tests.e2e.tiny import QUICKSTART

COLLAPSING = [
    "train.learning_rate=0.05",  # a hundred times the quickstart's
    "guards={tokens: {low: 20, action: rollback}, finished: {low: 0.5, action: rollback}, learning_rate_factor: 0.01}",
    "train.steps=14",
    "train.batch_size=8",
    "train.save_every=2",
    "train.max_length=288",
    "sampling.slots=8",
    "sampling.writer.max_tokens=192",
    "sampling.rewriter.max_tokens=64",
    "eval.problems=128",
    "eval.max_tokens=192",
    "eval.temperatures=[1.0]",
    "eval.concise_row=false",
    "mesh.data=1",
    "mesh.fsdp=1",
]


@pytest.mark.slow
def test_a_run_at_a_hundred_times_the_rate_collapses_is_rolled_back_and_learns_at_a_lower_one(tmp_path):
    command = [sys.executable, "-m", "mpd_jax", "train", str(QUICKSTART), *COLLAPSING, f"run.dir={tmp_path}"]
    done = subprocess.run(command, env=environment(tmp_path / "cache"), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    print(done.stderr)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(14))
    last = rows[-1]
    assert last["rollbacks"] >= 1 and last["learning_rate_scale"] == pytest.approx(0.01 ** last["rollbacks"])
    assert said.count("learning rate is multiplied by") == last["rollbacks"]
    assert all(row["ended"].get("stopped", 0) >= 4 for row in rows)  # the collapsed steps are gone
    summary = json.loads((tmp_path / "summary.json").read_text())
    print(
        last["rollbacks"], last["learning_rate_scale"], summary["before"], summary["after"], summary["token_reduction"]
    )
    assert summary["token_reduction"] > 0.1
    assert summary["after"]["accuracy"] > summary["before"]["accuracy"] - 0.15
