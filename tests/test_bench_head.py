"""The benchmark of the fused divergence, at a size that takes no time."""

import json

import pytest

from mpd_jax.bench import head
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.types import UserError

SMALL = {"memory_positions": (64, 256), "vocab": 4000, "student_width": 32, "teacher_width": 64, "repeats": 2}


def test_the_fused_form_adds_a_small_share_of_the_dense_form_s_memory_a_position(capsys):
    result = head.run(32, json=True, loss=LossConfig(chunk=16), **SMALL)
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(result)) == result
    assert result["slope_ratio"] == result["bytes_per_position"]["fused"] / result["bytes_per_position"]["dense"]
    assert result["bytes_per_position"]["dense"] > 3 * 4 * SMALL["vocab"]
    assert result["slope_ratio"] < 0.02
    assert result["memory_ratio"] < 0.35
    assert result["positions"] == 32
    assert [len(result["seconds"][form]) for form in ("fused", "dense")] == [2, 2]
    assert result["time_ratio"] == min(result["seconds"]["fused"]) / min(result["seconds"]["dense"])


def test_the_table_names_what_was_measured(capsys):
    head.run(0, **SMALL)
    table = capsys.readouterr().out
    assert "vocabulary 4,000" in table
    assert "temporary bytes per added position" in table
    assert "seconds" not in table


@pytest.mark.parametrize("sizes", [{"memory_positions": (64, 64)}, {"repeats": 0}, {"positions": -1}])
def test_sizes_that_cannot_be_measured_are_refused(sizes):
    with pytest.raises(UserError, match="bench head"):
        head.run(**{**SMALL, **sizes})
