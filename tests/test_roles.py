"""Models that do not fit together are told with the section that names them, before any weight is read."""

import json
from pathlib import Path

import pytest

from mpd_jax import config
from mpd_jax.roles import TINY, open_roles
from mpd_jax.types import UserError
from tests.e2e.tiny import QUICKSTART

END, TEXT_END = 508, 506  # <|im_end|>, which the template writes, and <|endoftext|>


def copy_of(name: str, directory: Path, eos_ids: list[int]) -> Path:
    """A shipped model that stops at other ids."""
    directory.mkdir()
    for path in (TINY / name).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    generation = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": eos_ids}))
    return directory


@pytest.mark.parametrize(
    ("student", "teacher", "refused"),
    [
        ([END, TEXT_END], [END, TEXT_END], False),
        ([END, TEXT_END], [END], False),
        ([END], [END, TEXT_END], False),
        ([TEXT_END], [END, TEXT_END], True),  # a base model beside its instruction-tuned teacher
        ([TEXT_END], [END], True),
    ],
    ids=["equal", "teacher stops at one", "student stops at one", "overlapping", "disjoint"],
)
def test_a_teacher_whose_end_the_student_does_not_know_is_refused(tmp_path, student, teacher, refused):
    paths = [copy_of("student", tmp_path / "s", student), copy_of("teacher", tmp_path / "t", teacher)]
    settings = config.load(QUICKSTART, [f"student.path={paths[0]}", f"teacher.path={paths[1]}"])
    if not refused:
        assert open_roles(settings).teacher is not None
        return
    with pytest.raises(UserError, match=rf"teacher.path: .*id {END} \('<\|im_end\|>'\).*\[{TEXT_END}\] only"):
        open_roles(settings)


def test_the_rewriter_may_think_or_not_as_it_likes_and_the_teacher_may_not():
    roles = open_roles(config.load(QUICKSTART, ["rewriter={path: 'tiny:teacher', thinking: false}"]))
    assert roles.rewriter is not None and roles.teacher is not None
    assert not roles.rewriter.chat.thinks and roles.teacher.chat.thinks
    with pytest.raises(UserError, match=r"teacher.path: its chat template renders the plain prompt"):
        open_roles(config.load(QUICKSTART, ["teacher.thinking=false"]))
    roles = open_roles(config.load(QUICKSTART, ["teacher.thinking=false", "recipe.target.own_template=true"]))
    assert roles.teacher is not None and not roles.teacher.chat.thinks and roles.student.chat.thinks


def test_only_models_that_the_recipe_needs_are_opened(tmp_path):
    nowhere = f"teacher.path={tmp_path}/nowhere"
    with pytest.raises(UserError, match=r"teacher.path: .*nowhere"):
        open_roles(config.load(QUICKSTART, [nowhere]))
    alone = ["recipe.rewrite.by=student", "recipe.target={weights: self_frozen, context: concise}"]
    roles = open_roles(config.load(QUICKSTART, [nowhere, *alone]))
    assert roles.teacher is None and roles.rewriter is roles.student


def test_weights_that_round_updates_away_are_told_and_a_frozen_base_rounds_none(caplog):
    open_roles(config.load(QUICKSTART, ["student.param_dtype=bfloat16", "student.lora={rank: 2, alpha: 4}"]))
    assert not caplog.records
    open_roles(config.load(QUICKSTART, ["student.param_dtype=bfloat16"]))
    assert "student.param_dtype = bfloat16: a weight moves only where" in caplog.text


def test_a_rank_beyond_the_models_width_is_refused():
    with pytest.raises(UserError, match=r"student.lora.rank = 97 is not allowed: it exceeds the model's width of 96"):
        open_roles(config.load(QUICKSTART, ["student.lora={rank: 97, alpha: 4}"]))


@pytest.mark.parametrize(
    ("changed", "overrides", "differ"),
    [
        ("s/model.safetensors", [], {"student"}),
        ("t/model.safetensors", [], {"teacher"}),
        ("t/model.safetensors", ["teacher.serve=http://a:1"], {"teacher"}),  # read on the mesh as the target
        ("t/model.safetensors", ["teacher.serve=http://a:1", "recipe.target.top_k=4"], set()),
        ("t/tokenizer.json", ["teacher.serve=http://a:1", "recipe.target.top_k=4"], {"teacher"}),
        ("r/model.safetensors", ["rewriter={path: r}"], {"rewriter"}),
        ("r/model.safetensors", ["rewriter={path: r, serve: 'http://a:1'}"], set()),
        ("a/adapter_model.safetensors", ["student.lora={rank: 4, alpha: 8}", "student.adapter=a"], {"student.adapter"}),
    ],
)
def test_hosts_whose_files_differ_are_known_by_what_is_read_of_them(tmp_path, monkeypatch, changed, overrides, differ):
    monkeypatch.chdir(tmp_path)
    for name, model in (("s", "student"), ("t", "teacher"), ("r", "teacher")):
        copy_of(model, tmp_path / name, [END])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(bytes(64))
    settings = config.load(QUICKSTART, ["student.path=s", "teacher.path=t", *overrides])
    roles = open_roles(settings)
    before = roles.fingerprints(settings.recipe)
    data = bytearray((tmp_path / changed).read_bytes())
    data[-1] ^= 1
    (tmp_path / changed).write_bytes(data)
    after = roles.fingerprints(settings.recipe)
    assert {key for key in before if before[key] != after[key]} == differ
