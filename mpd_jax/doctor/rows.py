"""What a check has found, as a row of the verdict table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.markup import escape
from rich.table import Table

from mpd_jax.sampling.servers import Unreachable
from mpd_jax.types import UserError

Verdict = Literal["ok", "warn", "FAIL", "skipped"]
SHOWN = ("what", "verdict", "seen", "change")
COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red", "skipped": "dim"}


@dataclass(frozen=True)
class Row:
    """what: the claim that was checked. seen: what it was checked against, or found. change: what to do about it.

    silent: nobody answered, which may be otherwise by the time that a run asks.
    """

    what: str
    verdict: Verdict
    seen: str = ""
    change: str = ""
    silent: bool = False

    @property
    def words(self) -> str:
        return f"{self.seen}; {self.change}" if self.change else self.seen


def failed(what: str, error: UserError, verdict: Verdict = "FAIL") -> Row:
    """A user's mistake: what is wrong, and behind the last semicolon of its message the remedy."""
    seen, _, change = str(error).rpartition("; ")
    return Row(what, verdict, seen or change, change if seen else "", isinstance(error, Unreachable))


def check(what: str, see: Callable[[], str | Row | None]) -> Row:
    """ok with what `see` says; its own row if it makes one; FAIL with the UserError that it raises."""
    try:
        found = see()
    except UserError as error:
        return failed(what, error)
    return found if isinstance(found, Row) else Row(what, "ok", found or "")


def table(rows: Sequence[Row]) -> Table:
    made = Table("check", "verdict", "seen, and what to change", box=box.SIMPLE_HEAD)
    for row in rows:
        change = f"\n[bold]{escape(row.change)}[/]" if row.change else ""
        colour = COLOURS[row.verdict]
        made.add_row(escape(row.what), f"[{colour}]{row.verdict}[/]", f"{escape(row.seen)}{change}")
    return made


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    return {"ok": sound(rows), "rows": [{name: getattr(row, name) for name in SHOWN} for row in rows]}


def sound(rows: Sequence[Row]) -> bool:
    return all(row.verdict != "FAIL" for row in rows)
