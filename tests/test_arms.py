"""The arms of a comparison: what tells them apart, and what of a finished one goes into the table."""

import json
from pathlib import Path

from mpd_jax.eval import arms as arms_module
from mpd_jax.eval.arms import Arm, concise_wordings, plan
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
