"""A whole run whose student and teacher are real vLLM servers, one of which dies again and again.

`MPD_VLLM_PYTHON=.venv-vllm/bin/python pytest -m server -s tests/e2e/test_served_real.py` prints what each kill hit.
"""

import json
import random
import threading
import time
from pathlib import Path

import jax
import pytest

from mpd_jax import config, run
from mpd_jax.models.hf_weights import export
from mpd_jax.models.lora import StudentSpec
from mpd_jax.roles import TINY, open_model
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.train.metrics import read_rows
from mpd_jax.train.records import read_trajectories
from tests.e2e.test_kill import open_phase, phases
from tests.e2e.tiny import QUICKSTART
from tests.real_server import RealServer, vllm_server

pytestmark = pytest.mark.server

STEPS, KILLS, WINDOW = 8, 5, 768
OVERRIDES = [
    f"train.steps={STEPS}",
    "train.save_every=4",
    "eval.problems=32",
    "eval.temperatures=[1.0]",
    "eval.concise_row=false",
]


class Killer(threading.Thread):
    """In KILLS of the steps one of the servers gets a SIGKILL, at a random moment, and is started again."""

    def __init__(self, run_dir: Path, servers: dict[str, tuple[RealServer, Path]], seed: int):
        super().__init__(daemon=True)
        rng = random.Random(seed)
        steps = sorted(rng.sample(range(1, STEPS), KILLS))
        who = rng.sample([*servers] * 3, KILLS)  # each of the two dies twice at least
        self._plan = [(step, name, rng.uniform(0, 6)) for step, name in zip(steps, who, strict=True)]
        self._run_dir, self._servers = run_dir, servers
        self.hit: list[tuple[int, str, str]] = []  # (step, phase, who died)
        self.over = threading.Event()
        self.start()

    def run(self):
        for step, who, seconds in self._plan:
            while (step, "write") not in phases(self._run_dir):
                if self.over.wait(0.01):
                    return
            time.sleep(seconds)
            server, directory = self._servers[who]
            self.hit.append((*open_phase(self._run_dir), who))
            server.kill()
            print(f"SIGKILL for the {who}'s server {seconds:.1f} s into step {step}, in {self.hit[-1][1]}")
            server.start(directory)


def problem_ids(run_dir: Path) -> list[list[str]]:
    """Those of each step's trajectories, in order."""
    paths = sorted((run_dir / "trajectories").iterdir())
    return [[t.problem_id for t in read_trajectories(path)[1]] for path in paths]


def trained(run_dir: Path, *overrides: str) -> dict:
    run.train(config.load(QUICKSTART, [*OVERRIDES, f"run.dir={run_dir}", *overrides]))
    return json.loads((run_dir / "summary.json").read_text())


def test_five_kills_lose_and_double_no_problem(tmp_path):
    files = open_model("student", StudentSpec("tiny:student"), config.load(QUICKSTART).recipe.contexts)
    weights = files.weights(make_mesh(MeshConfig(), jax.devices()[:1]))
    untied = export(tmp_path / "untied", files.directory, files.model, weights, dtype="float32", untie=True)
    summary = trained(tmp_path / "here")
    with vllm_server(untied, window=WINDOW) as student, vllm_server(TINY / "teacher", window=WINDOW) as teacher:
        directories = {"student": (student, untied), "teacher": (teacher, TINY / "teacher")}
        killer = Killer(tmp_path / "served", directories, seed=int(time.time()))
        served = trained(tmp_path / "served", f"student.serve={student.url}", f"teacher.serve={teacher.url}")
        killer.over.set()
        killer.join(timeout=120)
    assert len(killer.hit) == KILLS, killer.hit
    ids = problem_ids(tmp_path / "served")
    assert ids == problem_ids(tmp_path / "here") and [len(set(step)) for step in ids] == [32] * STEPS
    assert not list((tmp_path / "served" / "trajectories").glob("unfinished*"))
    assert [row["step"] for row in read_rows(tmp_path / "served" / "metrics.jsonl")] == list(range(STEPS))
    verdicts = [(push["version"], push["verdict"]) for push in read_rows(tmp_path / "served" / "pushes.jsonl")]
    print(f"{verdicts}\nhere {summary['after']}\nserved {served['after']}")
    assert {version for version, _ in verdicts} == set(range(STEPS + 1))
    assert {verdict for _, verdict in verdicts} <= {"agrees", "verified", "undecided"}
