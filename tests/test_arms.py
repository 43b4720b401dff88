"""The arms of a comparison: what tells them apart, and what of a finished one goes into the table."""

import json
from pathlib import Path

import pytest

from mpd_jax.eval import arms as arms_module
from mpd_jax.eval.arms import Arm, concise_wordings, named, plan
from mpd_jax.types import UserError
from tests.e2e.tiny import ROOT

TINY = ROOT / "configs" / "tiny"
MPD, CRISP = str(TINY / "mpd.yaml"), str(TINY / "crisp.yaml")
ALIKE = [f"{'{question}'} Be {'very ' * 12}{end}." for end in ("brief", "short")]


def arms_of(tmp_path: Path, *sweeps: str, configs=(MPD,), overrides=(), seeds: int = 1) -> tuple[Arm, ...]:
    return plan(configs, overrides, sweeps, seeds, tmp_path)


def test_swept_wordings_that_begin_alike_are_arms_rows_and_names_of_their_own(tmp_path):
    arms = arms_of(tmp_path, f"recipe.contexts.concise={json.dumps([*ALIKE, ALIKE[0] + ' '])}", seeds=2)
    assert len({arm.directory for arm in arms}) == len({arm.name for arm in arms}) == 6
    assert len({arm.row for arm in arms}) == len({arm.label for arm in arms}) == 3
    assert len(set(concise_wordings(arms).values())) == 3
    assert all(len(arms_module.shown(text)) <= arms_module.LABEL for text in ALIKE)


def test_another_method_to_compare_with_is_one_row_by_its_name(tmp_path):
    arms = arms_of(tmp_path, configs=(MPD, CRISP))
    assert named(arms, "crisp").method == "crisp"
    with pytest.raises(UserError, match=r"--against: 'opd' is no method of this comparison; give one of: mpd; crisp"):
        named(arms, "opd")
    swept = arms_of(tmp_path, "train.steps=[30, 40]")
    with pytest.raises(UserError, match=r"--against: 'mpd' names several methods; give one of: mpd, steps=30; mpd, st"):
        named(swept, "mpd")
    assert named(swept, "mpd, steps=40").settings.train.steps == 40
