"""`mpd-jax doctor` on real vLLM servers: nothing but ok where all is well, and the settings that such servers die of.

`MPD_VLLM_PYTHON=.venv-vllm/bin/python pytest -m server -s tests/e2e/test_doctor_real.py` prints the tables.
"""

import pytest
from typer.testing import CliRunner

from mpd_jax import build, cli
from mpd_jax.roles import TINY
from tests.e2e.tiny import QUICKSTART
from tests.real_server import ADAPTERS, vllm_server

pytestmark = pytest.mark.server


@pytest.fixture(autouse=True)
def few_problems(monkeypatch):
    monkeypatch.setattr(build, "TINY_TRAINING", 64)
    monkeypatch.setattr(build, "TINY_HELDOUT", 32)


def doctor(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(cli.app, ["doctor", str(QUICKSTART), "mesh.data=-1", "mesh.fsdp=1", *words])
    print(found.output)
    return found.exit_code, " ".join(found.output.split())


def test_a_teacher_that_is_served_well_is_found_well(tmp_path):
    with vllm_server(TINY / "teacher", window=640) as server:
        code, said = doctor(f"teacher.serve={server.url}", "recipe.target.top_k=8", f"run.dir={tmp_path}/run")
        assert code == 0 and "FAIL" not in said
        assert "teacher: log-probabilities" in said
        code, said = doctor(
            f"teacher.serve={server.url}", f"teacher.path={TINY / 'student'}", f"run.dir={tmp_path}/run"
        )
        assert code == 1 and "serve the weights of" in said


def test_settings_that_a_server_dies_of_are_told_beforehand(tmp_path):
    """Prompts that are read in parts, seeded ones, and the reload of a tied head."""
    with vllm_server(TINY / "student", *ADAPTERS, "--max-num-batched-tokens", "2048") as server:
        code, said = doctor(f"student.serve={server.url}", "--quick", f"run.dir={tmp_path}/run")
        assert code == 1 and "seeded prompts" in said and "tied head" in said
