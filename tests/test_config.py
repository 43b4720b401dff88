"""A config is strict: unknown keys, wrong types and impossible values are refused by name, and every field is read."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from mpd_jax import config
from mpd_jax.types import UserError

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def test_overrides_reach_nested_fields():
    overrides = ["train.steps=7", "recipe.loss.kind=forward_kl", "sampling.writer.temperature=0.5"]
    loaded = config.load(QUICKSTART, overrides)
    assert loaded.train.steps == 7
    assert loaded.recipe.loss.kind == "forward_kl"
    assert loaded.sampling.writer.temperature == 0.5


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_resolved_config_reads_back_equal(name, tmp_path):
    loaded = config.load(ROOT / "configs" / name)
    (tmp_path / "config.yaml").write_text(config.to_yaml(loaded))
    assert config.load(tmp_path / "config.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.step=3", "did you mean train.steps"),
        ("trian.steps=3", "did you mean train"),
        ("recipe.loss.kind=kl", "recipe.loss.kind: 'kl' is not allowed"),
        ("train.steps=many", "train.steps: 'many' is not allowed"),
        ("train.steps=0", "train.steps = 0"),
        ("train.steps", "write it as section.key=value"),
        ("sampling.writer.top_p=0", "sampling.writer: top_p = 0"),
        ("sampling.rewriter.temperature=-1", "sampling.rewriter: temperature = -1"),
        ("teacher=null", "teacher: missing"),
        ("student=null", "student: None is not allowed"),
        ("recipe.loss.kind=cross_entropy", "cross_entropy"),
        ("run={}", "run.dir: required and missing"),
    ],
)
def test_bad_values_are_refused_by_name(override, said):
    with pytest.raises(UserError) as caught:
        config.load(QUICKSTART, [override])
    assert said in str(caught.value)


def test_a_missing_file_and_a_broken_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        config.load(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("run: [")
    with pytest.raises(UserError, match="not valid YAML"):
        config.load(tmp_path / "broken.yaml")
    (tmp_path / "twice.yaml").write_text("run: {dir: a, dir: b}")
    with pytest.raises(UserError, match="'dir' stands twice"):
        config.load(tmp_path / "twice.yaml")


def declared(owner: type) -> set[tuple[str, str]]:
    """Every (dataclass, field) reachable from RunConfig."""
    hints = typing.get_type_hints(owner)
    found = set()
    for field in dataclasses.fields(owner):
        inner = config._dataclass_in(hints[field.name])
        found |= declared(inner) if inner else {(owner.__name__, field.name)}
    return found


def test_every_declared_field_is_read_by_some_code():
    contexts = {name for owner, name in declared(config.RunConfig) if owner == "Contexts"}
    read = set()
    for path in (ROOT / "mpd_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        # A context is read by its name: chat.prompt("concise", problem).
        read |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in contexts}
    unread = {f"{owner}.{name}" for owner, name in declared(config.RunConfig) if name not in read}
    assert not unread, f"declared and never read: {sorted(unread)}"
