"""Settings as nested mappings: read from YAML files, laid over each other, overridden by dotted keys, compared.

Strict where YAML is not: a key that stands twice is an error. What the keys mean is config.py's.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from mpd_jax import files
from mpd_jax.files import AnyPath
from mpd_jax.types import UserError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; a config must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, str | int | float):
                raise UserError(f"{key_node.start_mark.name}: line {key_node.start_mark.line + 1}: {key!r} is no key")
            if key in seen:
                raise UserError(
                    f"{key_node.start_mark.name}: line {key_node.start_mark.line + 1}: {key!r} stands twice"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | AnyPath) -> dict:
    """The mapping in a YAML file, laid over those of the files that its key `over` names (paths beside it)."""
    path = files.path(path)
    return _with_bases(path, _read_one(path), ())


def _with_bases(path: AnyPath, tree: dict, above: tuple[str, ...]) -> dict:
    over = tree.pop("over", [])
    if not isinstance(over, list) or not all(isinstance(name, str) for name in over):
        raise UserError(f"config {path}: over: {over!r} is not allowed; give a list of YAML files beside this one")
    if str(path) in above:
        raise UserError(f"config {path}: over: it lies over itself ({' over '.join(above)}); take one of them out")
    base: dict = {}
    for name in over:
        under_it = path.parent / name
        base = _laid_over(base, _with_bases(under_it, _read_one(under_it), (*above, str(path))))
    return _laid_over(base, tree)


def _laid_over(base: dict, tree: dict) -> dict:
    """`tree` where it says something, `base` elsewhere; sections are laid over each other key by key."""
    both = {k: _laid_over(base[k], v) for k, v in tree.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **tree, **both}


def _read_one(path: AnyPath) -> dict:
    if not files.is_file(path):
        raise UserError(f"config {path}: no such file; give the path of a YAML file, such as configs/quickstart.yaml")
    try:
        with path.open() as file:
            tree = yaml.load(file, _UniqueKeyLoader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"config {path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"config {path}: the file holds {type(tree).__name__}, not sections; see configs/quickstart.yaml"
        )
    return tree


def overridden(tree: dict, text: str) -> dict:
    """`tree` with `section.key=value` set, or with a YAML file laid over it."""
    key, equals, value_text = text.partition("=")
    path = key.strip().split(".")
    if not equals and text.endswith((".yaml", ".yml")):
        return _laid_over(tree, read_yaml(text))
    if not equals or not all(path):
        raise UserError(
            f"override {text!r}: write it as section.key=value, for example train.steps=10, or name a YAML file"
        )
    try:
        value = yaml.load(value_text, _UniqueKeyLoader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"override {text!r}: the value {value_text!r} is not valid YAML; quote it") from None

    def put(node: Any, rest: list[str]) -> dict:
        node = dict(node) if isinstance(node, dict) else {}
        node[rest[0]] = value if len(rest) == 1 else put(node.get(rest[0]), rest[1:])
        return node

    return put(tree, path)


def plain(value: Any) -> Any:
    """With lists for tuples, as YAML has them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: plain(tree)}
    parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


def under(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of `sections` or lies in one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def apart(new: Mapping[str, Any], old: Mapping[str, Any], old_is: str = "there") -> str:
    """The keys by which two flat mappings differ, with both values; empty where they do not.

    old_is: what the second is called.
    """
    return "; ".join(
        f"{key} = {new.get(key)!r}, and {old.get(key)!r} {old_is}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    )
