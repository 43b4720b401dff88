"""The arms of a comparison: what tells them apart, and what of a finished one goes into the table."""

import json
from pathlib import Path

import pytest

from mpd_jax.eval import arms as arms_module
from mpd_jax.eval.arms import Arm, concise_wordings, named, plan, spent_on, unlike
from mpd_jax.types import UserError
from tests.e2e.tiny import ROOT

TINY = ROOT / "configs" / "tiny"
MPD, CRISP = str(TINY / "mpd.yaml"), str(TINY / "crisp.yaml")
SFT = str(TINY / "sft.yaml")
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


def step(seconds: float, compilations: int = 0, **named: float) -> dict:
    row = {"written_total": 100, "rewrite_prompt_total": 30, "rewritten_total": 5, "scored_total": 11}
    row |= {"rows": 4, "row_length": 10, "padding": 0.1, "compilations": compilations}
    return row | {"train_seconds": seconds / 2, "train_share": 0.5, "write_seconds": 0.0, "write_share": 0.0} | named


def test_seconds_are_those_of_as_many_steps_that_compiled_nothing(tmp_path):
    c = arms_of(tmp_path)[0].settings
    assert spent_on(c, [step(40.0, 1), step(2.0), step(4.0), step(20.0, 1)]).seconds == pytest.approx(12.0)
    assert spent_on(c, [step(40.0, 1)]).seconds is None


def test_tokens_are_those_that_somebody_sampled_or_read(tmp_path):
    c, dataset = arms_of(tmp_path)[0].settings, arms_of(tmp_path, configs=(SFT,))[0].settings
    skipped = step(1.0, skipped=True)  # all was dropped: nothing was read
    spent = spent_on(c, [step(1.0), step(1.0), skipped])
    # Of 4 x 10 places a step the student read the nine tenths that are no padding, and the target 11.
    assert (spent.writer_tokens, spent.rewriter_tokens, spent.trainer_tokens) == (300, 105, 2 * (36 + 11))
    assert spent_on(dataset, [step(1.0)]).writer_tokens == 0


def test_what_the_methods_were_not_trained_with_alike_is_told_by_key(tmp_path):
    world = arms_of(tmp_path, configs=(MPD, CRISP), overrides=["train.steps=40"], seeds=2)
    assert unlike(world) == ""
    (tmp_path / "other.yaml").write_text(f"over: [{CRISP}]\ntrain: {{steps: 48, batch_size: 8}}\nteacher: null\n")
    configs = (MPD, CRISP, str(tmp_path / "other.yaml"))
    told = unlike(arms_of(tmp_path, configs=configs, overrides=["train.batch_size=16"], seeds=2))
    assert told == "train.steps is 24 (mpd, crisp), 48 (other)"
    assert unlike(arms_of(tmp_path, "train.steps=[30, 40]")) == ""
