"""A config's name of a function, as the function: one of a table, or one of the user's own by its import path."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mpd_jax.types import UserError


def named(key: str, name: str, table: Mapping[str, Callable]) -> Callable:
    """The function that `name` stands for: an entry of `table`, or package.module:function, which is imported.

    key: the config's, for the UserError of a name that is in neither.
    """
    if name in table:
        return table[name]
    where, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"{key}: {name!r} is not known; {_near(name, table)}")
    try:
        module = importlib.import_module(where)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{key}: {name!r} cannot be imported ({type(error).__name__}: {error}); write package.module:function, and "
            "have the package installed or its directory on PYTHONPATH"
        ) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise UserError(f"{key}: {name!r} is not allowed: {where} has no such function; {_near(attribute, own)}")
    return found


def source(name: str) -> bytes:
    """The file that an import path leads to; empty for a name of the package's own, and where there is none."""
    where, colon, _ = name.partition(":")
    try:
        file = inspect.getsourcefile(importlib.import_module(where)) if colon else None
    except TypeError:  # a module that Python itself holds
        file = None
    return Path(file).read_bytes() if file else b""


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    known = f"known there: {', '.join(sorted(names)) or 'none'}"
    return f"did you mean {near[0]}?" if near else f"{known}; or give an import path, package.module:function"
