"""The picture of a run: a PNG whatever the run has to show, and no global state."""

import ast
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mpd_jax.eval import plot as module
from mpd_jax.eval.figures import rows_of
from mpd_jax.eval.plot import plot_run
from mpd_jax.eval.samples import Sample


def row(name, context, tokens, temperature=1.0):
    common = {"name": name, "context": context, "temperature": temperature, "max_tokens": 200, "ended": "stopped"}
    common |= {"attempt": 0, "reference": "1", "response_ids": (1,), "text": "", "answer": "", "reasoning_tokens": None}
    common |= {"extracted": "1", "grader": "rules", "failure": None}
    samples = [Sample(**common, problem_id=str(i), tokens=tokens + i % 7, correct=i % 9 > 0) for i in range(40)]
    return rows_of(samples)[0]


METRICS = [{"step": s, "written_tokens": 100.0 - s, "response_tokens": None if s == 3 else 40.0} for s in range(50)]
EVALS = [(0, row("base", "plain", 100)), (0, row("concise", "concise", 80)), (50, row("student", "plain", 50))]


@pytest.mark.parametrize(
    ("metrics", "evals"),
    [(METRICS, EVALS), (METRICS[:1], EVALS[:1]), (METRICS, []), ([], EVALS), ([], EVALS[1:2]), ([], [])],
)
def test_any_part_of_a_run_makes_a_picture(tmp_path, metrics, evals):
    plot_run(metrics, evals, tmp_path / "plot.png")
    image = matplotlib.image.imread(tmp_path / "plot.png")
    assert image.shape[0] > 500 and image.shape[1] > 800
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def colour_area(path, colour):
    image = matplotlib.image.imread(path)[..., :3]
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(image - wanted[None, None, :]).max(axis=-1) < 0.05).sum())


def test_each_series_is_drawn_when_it_is_there(tmp_path):
    plot_run(METRICS, EVALS, tmp_path / "all.png")
    plot_run(METRICS, [], tmp_path / "no_evals.png")
    plot_run([], EVALS, tmp_path / "no_metrics.png")
    for colour, without in (
        (module.HELD_OUT, "no_evals"),
        (module.WRITTEN, "no_metrics"),
        (module.TRAINED_ON, "no_metrics"),
    ):
        assert colour_area(tmp_path / "all.png", colour) > 200
        assert colour_area(tmp_path / f"{without}.png", colour) == 0


def test_only_the_first_temperature_is_drawn(tmp_path):
    plot_run(METRICS, EVALS, tmp_path / "one.png")
    plot_run(METRICS, [*EVALS, (50, row("student", "plain", 5, temperature=0.0))], tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_step_without_a_figure_is_left_out(tmp_path):
    holes = [{**row, "response_tokens": None} if row["step"] % 10 == 3 else row for row in METRICS]
    without = [{k: v for k, v in row.items() if v is not None} for row in holes]
    assert any(len(row) == 2 for row in without)
    plot_run(holes, [], tmp_path / "holes.png")
    plot_run(without, [], tmp_path / "without.png")
    assert (tmp_path / "holes.png").read_bytes() == (tmp_path / "without.png").read_bytes()
    assert colour_area(tmp_path / "holes.png", module.TRAINED_ON) > 200


def test_pyplot_is_not_used():
    tree = ast.parse(Path(module.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if "pyplot" in name]
