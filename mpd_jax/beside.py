"""Responses while they are sampled: side by side on a terminal that is wide enough, else one after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

WIDE = 100  # columns of a terminal from which two texts are read more easily beside each other
REPLACEMENT = "\ufffd"

Decode = Callable[[Sequence[int]], str]


@dataclass
class Stream:
    """A response under way. label: whose it is; "" where it is the only one."""

    label: str
    tokens: Iterator[int]
    decode: Decode
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def step(self) -> bool:
        """One more token; False at the end."""
        token = next(self.tokens, None)
        if token is None:
            return False
        self.ids.append(token)
        text = self.decode(self.ids)
        # A character may be spread over tokens; until it is whole it decodes to a replacement character.
        if text.startswith(self.text) and not text.endswith(REPLACEMENT):
            self.text = text
        return True

    @property
    def count(self) -> str:
        return f"{len(self.ids)} tokens"


def show(streams: Sequence[Stream], console: Console) -> None:
    """Draws until all are over, with the tokens of each."""
    if len(streams) > 1 and console.is_terminal and console.width >= WIDE:
        _side_by_side(streams, console)
    else:
        _in_turn(streams, console)
    if len(streams) == 2 and streams[0].ids:
        before, after = (len(stream.ids) for stream in streams)
        console.print(f"[{before} → {after} tokens, {after / before - 1:+.0%}]", markup=False, highlight=False)


def _in_turn(streams: Sequence[Stream], console: Console) -> None:
    for stream in streams:
        if stream.label:
            print(f"--- {stream.label} ---", file=console.file)
        shown = 0
        while stream.step():
            print(stream.text[shown:], end="", flush=True, file=console.file)
            shown = len(stream.text)
        print(f"\n[{stream.count}]", flush=True, file=console.file)


def _side_by_side(streams: Sequence[Stream], console: Console) -> None:
    """While they are drawn the last lines that fit the terminal; in the end the whole texts."""
    with Live(console=console, transient=True, auto_refresh=False) as live:
        going = list(streams)
        while going:
            going = [stream for stream in going if stream.step()]
            live.update(_columns(streams, console, console.height - 4), refresh=True)
    console.print(_columns(streams, console))


def _columns(streams: Sequence[Stream], console: Console, height: int | None = None) -> Table:
    """height: of the text, in lines; None shows all of it."""
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
    width = console.width // len(streams) - 2
    for stream in streams:
        table.add_column(f"{stream.label}: {stream.count}", ratio=1, overflow="fold", header_style="bold")
    if height is None:
        table.add_row(*(Text(stream.text) for stream in streams))
        return table
    most = max(height, 1)
    # Every token draws anew: of a long text only the lines that may be seen are wrapped.
    ends = [Text("\n".join(stream.text.rsplit("\n", most)[-most:])) for stream in streams]
    table.add_row(*(Text("\n").join(end.wrap(console, width)[-most:]) for end in ends))
    return table
