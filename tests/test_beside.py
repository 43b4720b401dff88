"""Responses side by side on a wide terminal, one after the other elsewhere, to the last character."""

import io
import re

import pytest
from rich.console import Console

from mpd_jax.beside import WIDE, Stream, show


def console(width, terminal=True):
    return Console(file=io.StringIO(), width=width, height=12, force_terminal=terminal, color_system=None)


def streams(*texts):
    """A token is a byte, so that characters are spread over tokens."""

    def decode(ids):
        return bytes(ids).decode(errors="replace")

    return [Stream(f"model {i}", iter(text.encode()), decode) for i, text in enumerate(texts)]


def lines_of(shown):
    return re.sub(r"\x1b\[\??\d*[A-Za-z]", "", shown.file.getvalue()).splitlines()


@pytest.mark.parametrize(("width", "terminal"), [(WIDE - 1, True), (WIDE, False)])
def test_where_there_is_no_room_one_follows_the_other(width, terminal):
    shown = console(width, terminal)
    show(streams("long → and\nlonger", "short"), shown)
    assert lines_of(shown) == [
        "--- model 0 ---",
        "long → and",
        "longer",
        "[19 tokens]",
        "--- model 1 ---",
        "short",
        "[5 tokens]",
        "[19 → 5 tokens, -74%]",
    ]


def test_one_alone_is_text_and_its_tokens():
    shown = console(200)
    (one,) = streams("[bold]no markup[/bold]")
    one.label = ""
    show([one], shown)
    assert lines_of(shown) == ["[bold]no markup[/bold]", "[22 tokens]"]


def test_on_a_wide_terminal_both_stream_at_once_and_stand_whole_at_the_end():
    shown, order = console(120), []

    def noted(tokens, number):
        for token in tokens:
            order.append(number)
            yield token

    both = streams("\n".join(f"first {i}" for i in range(30)), "[b]second[/b] →")
    for number, stream in enumerate(both):
        stream.tokens = noted(stream.tokens, number)
    show(both, shown)
    assert order[:6] == [0, 1, 0, 1, 0, 1]
    end = lines_of(shown)[-32:]
    assert end[0].split("  ")[0] == "model 0: 259 tokens" and end[0].rstrip().endswith("model 1: 17 tokens")
    assert [line.split() for line in end[2:-1]] == [["first", str(i)] for i in range(1, 30)]
    assert end[1].split() == ["first", "0", "[b]second[/b]", "→"] and end[1].index("[b]") > 50
    assert end[-1] == "[259 → 17 tokens, -93%]"


def test_while_it_streams_the_newest_lines_are_seen():
    shown = console(120)
    show(streams("\n".join(f"line {i}." for i in range(40)), "y"), shown)
    *frames, _ = re.split(r"(?:\x1b\[1A\x1b\[2K)+", shown.file.getvalue())
    assert max(frame.count("\n") for frame in frames) <= 12
    assert all(any(f"line {i}." in frame for frame in frames) for i in range(40))


def test_a_character_that_never_becomes_whole_is_left_out():
    shown = console(80)
    (one,) = streams("")
    one.tokens = iter("ok →".encode()[:-1])
    show([one], shown)
    assert lines_of(shown)[-2:] == ["ok ", "[5 tokens]"]
