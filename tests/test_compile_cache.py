"""A process that finds the compile cache filled compiles nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import collections, json, sys
import jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rsplit("/", 1)[-1]]))
from mpd_jax.run import keep_compiled
keep_compiled(sys.argv[1])
from tests.test_step import gradient_step, make_batch
from mpd_jax.recipe.loss import LossConfig
out, _ = gradient_step(make_batch(), loss=LossConfig(kind="cross_entropy"), target=False)
print(json.dumps({**seen, "loss": float(out["loss"])}))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    def process() -> dict:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache")]
        root = Path(__file__).parent.parent
        return json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)

    first, second = process(), process()
    assert first["cache_misses"] > 1 and any((tmp_path / "cache").iterdir())
    assert second["cache_hits"] == second["compile_requests_use_cache"] == first["compile_requests_use_cache"]
    assert "cache_misses" not in second and second["loss"] == first["loss"]
