"""What a person sees while a command runs: progress bars on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_EVERY_S = 10.0


class Screen:
    """Progress, messages and tables on standard error; standard output stays free for results.

    quiet: says nothing, for a process whose words another one says already.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, highlight=False, quiet=quiet)
        self._progress: Progress | None = None

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)

    def show(self, renderable: Any) -> None:
        self.console.print(renderable)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields `advance(done, text="")`. Without a terminal a line every ten seconds says how far it is."""
        if not self.console.is_terminal:
            yield self._logged(title, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        outer = self._progress
        progress = outer or Progress(*columns, console=self.console)
        if outer is None:
            progress.start()
            self._progress = progress
        task = progress.add_task(title, total=total, text="")
        try:
            yield lambda done, text="": progress.update(task, completed=done, text=text)
        finally:
            if outer is None:
                progress.stop()
                self._progress = None
            else:
                progress.remove_task(task)

    def _logged(self, title: str, total: int) -> Callable[..., None]:
        told = time.monotonic()

        def advance(done: int, text: str = "") -> None:
            nonlocal told
            if time.monotonic() - told >= LOG_EVERY_S or done >= total:
                told = time.monotonic()
                self.say(f"{title} {done}/{total} {text}".rstrip())

        return advance


def live_line(row: Mapping[str, Any]) -> str:
    """Loss, tokens and accuracy of a step in one line."""
    parts = []
    for key, name, form in (
        ("loss", "loss", ".4f"),
        ("written_tokens", "tokens", ".1f"),
        ("response_tokens", "rewritten", ".1f"),
        ("rollout_accuracy", "accuracy", ".2f"),
    ):
        if row.get(key) is not None:
            parts.append(f"{name} {row[key]:{form}}")
    return "  ".join(parts) or "no trajectory was kept"
