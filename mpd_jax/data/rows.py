"""A row of any data set as a Problem: which column holds what, chat messages or plain text, bytes or text.

What cannot be read is told by place (file and line, or set and row) and column; nothing is left out in silence.
"""

from collections.abc import Mapping
from typing import Any

from mpd_jax.types import Problem, UserError

FIELDS = ("id", "question", "answer", "response", "level", "subject")
DROPPED = "dropped"  # a row with true there is one that `mpd-jax rewrite` gave up
MESSAGES = "messages"  # where a row without a question has it
LABELS = ("level", "subject")  # a column of such a name may be another thing, unless it is named


def problem(row: Mapping[str, Any], named: Mapping[str, str], where: str, default_id: str, key: str) -> Problem:
    """The problem of a row.

    named: the column of a field; one that is not named is read from the column of its own name, if there is one. A dot
    reaches into a column of objects or lists: `reward_model.ground_truth`, `choices.0`. A question may be a list of
    chat messages. key: the setting that names the columns.
    """
    found: dict[str, str] = {}
    for field in FIELDS:
        column = named.get(field, field)
        value = row.get(column)
        if type(value) is str and value.isascii():
            found[field] = value  # nearly all are such, of a million rows
            continue
        if column not in row and field not in named and field != "question":
            continue
        there, value = _reach(row, column)
        value = None if value != value else value  # NaN is how pandas writes a missing one
        if field == "question" and not there and field not in named and MESSAGES in row:
            column, there, value = MESSAGES, True, row[MESSAGES]
        if not there:
            raise UserError(f"{where}: no column {column!r}; it has {', '.join(map(repr, row))}: set {key}.{field}")
        place = f"{where}, column {column!r}"
        if field == "question":
            value, worked = _asked(value, place, key)
            if worked is not None and "response" not in named:
                found["response"] = worked
        elif value is None or (field in LABELS and field not in named and not _is_text(value)):
            continue
        found[field] = _text(value, field, place, key)
    if not found["question"].strip():
        column = named.get("question", "question")
        raise UserError(f"{where}, column {column!r}: empty; every problem needs a question")
    found.setdefault("id", default_id)
    return Problem(**found)


def _reach(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Whether there is such a column, and what it holds. A column whose name has dots goes first."""
    if column in row:
        return True, row[column]
    if "." not in column:
        return False, None
    value: Any = row
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes | int | float) and not isinstance(value, bool)


def _text(value: Any, field: str, place: str, key: str) -> str:
    if not _is_text(value):
        raise UserError(f"{place}: {type(value).__name__}, not text; set {key}.{field} to a text column")
    try:
        text = value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}; store the text as UTF-8") from None
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{place}: half a surrogate pair is no text; take it out")
    return text


def _asked(value: Any, place: str, key: str) -> tuple[Any, str | None]:
    """What is asked, and the worked response if `value` is a chat that has one: one turn of a user, one of an
    assistant after it. How a role is instructed is the recipe's matter, so that a system turn is refused."""
    if not (isinstance(value, list | tuple) and value and all(isinstance(turn, Mapping) for turn in value)):
        return value, None
    roles = [_text(turn.get("role", ""), "question", place, key) for turn in value]
    if roles not in (["user"], ["user", "assistant"]):
        raise UserError(
            f"{place}: messages of the roles {', '.join(map(repr, roles))}; a problem is one of 'user', or that and "
            "the 'assistant' who solves it (what else is told to a model is in recipe.contexts); write it so, or set "
            f"{key}.question to another column, such as {place.rsplit(' ', 1)[-1][1:-1]}.1.content"
        )
    texts = [_text(turn.get("content"), "question", place, key) for turn in value]
    return texts[0], texts[1] if len(texts) > 1 else None
