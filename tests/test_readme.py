"""The README's commands, its method table and its file map stay true."""

import ast
import re
import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


def test_the_readme_has_commands():
    assert {words[0] for words in commands()} >= {"train", "eval", "sample", "export", "config", "bench"}


def test_every_command_in_the_readme_parses():
    from mpd_jax.cli import app

    for words in commands():
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0, f"mpd-jax {' '.join(words)}: {result.output}"
        named = set(re.findall(r"(?<!\S)--[a-z-]+", " ".join(words)))
        assert all(flag in result.output for flag in named), f"mpd-jax {' '.join(words)}: unknown flag in {named}"


def test_every_config_command_in_the_readme_resolves():
    from mpd_jax import config

    for words in commands():
        if len(words) > 1 and words[1].startswith("configs/"):
            overrides = [w for w in words[2:] if "=" in w and not w.startswith("--")]
            config.load(ROOT / words[1], overrides)


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
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    values = names["values"]
    assert values[-1] < values[0] - 0.5
