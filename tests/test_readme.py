"""The README's commands, its method table and its file map stay true."""

import ast
import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from typer.main import get_command

from mpd_jax.cli import app
from mpd_jax.sampling.wire import ServerConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
UsageError = typer.BadParameter.__base__  # click's, which newer versions of typer hold inside


def commands() -> list[list[str]]:
    """Every `mpd-jax ...` command line inside the README's shell blocks, continuation lines joined."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|", line.split(" # ")[0]):
                words = shlex.split(part)
                if words and words[0].endswith("mpd-jax"):
                    found.append(words[1:])
    return found


def each_of(word: str) -> list[str]:
    """As a shell expands one pair of braces."""
    before, brace, rest = word.partition("{")
    inside, _, after = rest.partition("}")
    return [before + each + after for each in inside.split(",")] if brace else [word]


def test_the_readme_has_commands():
    assert {words[0] for words in commands()} >= {"train", "eval", "sample", "export", "config", "bench"}


def parse(words: list[str]) -> str | None:
    """Why a command line does not fit its command's arguments and options, or None. Nothing is run."""
    command, name, rest = get_command(app), "mpd-jax", list(words)
    try:
        while rest and hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(typer.Context(command), rest)
        command.make_context(name, rest)
    except UsageError as error:
        return error.format_message()
    return None


def test_every_command_in_the_readme_parses():
    refused = {" ".join(words): reason for words in commands() if (reason := parse(words)) is not None}
    assert not refused


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("export onlyone", "out"),
        ("export one two three", "three"),
        ("sample x --temperature hot", "temperature"),
        ("sample x --prompts y", "--prompts"),
        ("bench heads", "heads"),
        ("trian configs/quickstart.yaml", "trian"),
    ],
)
def test_a_wrong_command_does_not_parse(line, said):
    assert said in (parse(line.split()) or "")


def test_the_problem_sets_of_the_readme_resolve():
    from mpd_jax import config

    (block,) = re.findall(r"```yaml\n(problems:\n.*?)```", README, re.S)
    tree = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    resolved = config.resolve({**tree, **yaml.safe_load(block)}).problems
    assert resolved.train == ("omi", "dapo_math_17k") and resolved.sources["omi"].weight == 3


def test_every_config_command_in_the_readme_resolves():
    from mpd_jax import config

    for words in commands():
        overrides = [w for w in words[2:] if "=" in w and not w.startswith("--")]
        for name in each_of(words[1]) if len(words) > 1 and words[1].startswith("configs/") else ():
            config.load(ROOT / name, overrides)


def test_the_settings_of_servers_in_the_readme_are_the_defaults():
    (line,) = re.findall(r"^  server: (\{.*\})", README, re.M)
    assert yaml.safe_load(line) == dataclasses.asdict(ServerConfig())


def test_the_guards_and_the_curriculum_in_the_readme_load():
    from mpd_jax import config, trees

    (block,) = (yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", README, re.S) if b.startswith("guards:"))
    tree = trees.read_yaml(ROOT / "configs" / "quickstart.yaml")
    tree["sampling"] |= block["sampling"]
    assert set(config.resolve({**tree, "guards": block["guards"]}).guards.bands) == {"entropy", "tokens", "finished"}


def table_rows(text: str) -> set[str]:
    return {
        m.group(1)
        for m in re.finditer(r"^\s*\|[^|]*\|[^|]*\|[^|]*\|[^|]*\|[^|]*\|\s*`([a-z_]+)\.yaml`\s*\|\s*$", text, re.M)
    }


def test_method_table_docstring_and_configs_name_the_same_methods():
    docstring = ast.get_docstring(ast.parse((ROOT / "mpd_jax/recipe/__init__.py").read_text())) or ""
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"quickstart"}
    assert table_rows(README) == files
    assert {name for name in files if f"{name}.yaml" in docstring} == files


def test_configs_are_short_and_start_with_the_recipe():
    for path in (ROOT / "configs").glob("*.yaml"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, f"{path.name} has {len(lines)} lines"
        assert next(iter(yaml.safe_load(path.read_text()))) == "recipe", f"{path.name} starts with another section"


def test_file_map_names_every_module():
    for path in sorted((ROOT / "mpd_jax").rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            assert f"{path.name}" in README, f"{path} is missing from the README's file map"


def test_the_python_block_of_the_readme_trains():
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "from mpd_jax" in b]
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    values = names["values"]
    assert values[-1] < values[0] - 0.5


def test_the_figures_of_the_tiny_world_are_the_measured_ones():
    measured = json.loads((ROOT / "mpd_jax" / "tiny_world" / "measured.json").read_text())
    contexts = {"concise, other wording": "concise_b"}
    rows = re.findall(r"^\| ((?:plain|concise|privileged|compress|repair)[^|]*) \|(.*)\|$", README, re.M)
    assert len(rows) == 8
    for label, cells in rows:
        name, _, thinking = label.partition(", own thinking")
        wanted = {"context": contexts.get(name, name)}
        if name in ("compress", "repair"):
            wanted["thinking"] = bool(thinking)
        columns = itertools.product(("student", "teacher"), (1.0, 0.6))
        for (model, temperature), cell in zip(columns, cells.split("|"), strict=True):
            found = [r for r in measured[model] if {**r, **wanted, "temperature": temperature} == r]
            said = [f"{r['accuracy']:.3f} / {r.get('mean_tokens_rewritten', r['mean_tokens']):.0f}" for r in found]
            assert [cell.strip()] == (said or [""]), f"{label}, {model}, T {temperature}"
