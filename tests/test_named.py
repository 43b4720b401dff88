"""A name of the config is a function of the table or an import path, or is refused with what is known."""

import math
import re

import pytest

from mpd_jax.named import named
from mpd_jax.types import UserError

TABLE = {"none": lambda: 0, "entropy_guided": lambda: 1}


def test_a_name_is_the_table_s_function_and_a_path_the_module_s():
    assert named("a.b", "entropy_guided", TABLE) is TABLE["entropy_guided"]
    assert named("a.b", "math:sqrt", TABLE) is math.sqrt


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("entropy_guide", "a.b: 'entropy_guide' is not known; did you mean entropy_guided?"),
        ("xyz", "a.b: 'xyz' is not known; known there: entropy_guided, none; or give an import path"),
        ("maths:sqrt", "a.b: 'maths:sqrt' cannot be imported (ModuleNotFoundError: No module named 'maths')"),
        ("tests.raising:f", "a.b: 'tests.raising:f' cannot be imported (ZeroDivisionError: division by zero)"),
        (":sqrt", "a.b: ':sqrt' cannot be imported (ValueError: Empty module name)"),
        ("math:sqr", "a.b: 'math:sqr' is not allowed: math has no such function; did you mean sqrt?"),
        ("math:pi", "a.b: 'math:pi' is not allowed: math has no such function"),
        ("math:", "a.b: 'math:' is not allowed: math has no such function"),
    ],
)
def test_what_is_no_function_is_refused_with_key_value_and_remedy(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.__path__", [str(tmp_path)])
    (tmp_path / "raising.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=re.escape(said)):
        named("a.b", name, TABLE)
