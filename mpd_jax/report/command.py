"""`mpd-jax report`: runs as one HTML file that needs nothing else, and their headline as a table on the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mpd_jax import __version__, files
from mpd_jax.eval.figures import EvalRow, paired_difference
from mpd_jax.files import AnyPath
from mpd_jax.report import figures
from mpd_jax.report.examples import CANDIDATES, UNKNOWN, Example, examples_of
from mpd_jax.report.gather import Measured, RunFiles, gather, name_runs
from mpd_jax.screen import Screen
from mpd_jax.types import UserError

MOST_BYTES = 5_000_000
EXAMPLE_BYTES = 3_500_000  # of them for the texts of all runs together, where the rest leaves as much
SPARE_BYTES = 100_000  # for what the page says of the texts


@dataclass(frozen=True)
class Headline:
    """Before and after of a run at its headline temperature, as far as there are both.

    difference: of accuracy, (mean, lower, upper), paired by problem. conditions: what the figures hold for.
    """

    run: str
    slot: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    difference: tuple[float, float, float] | None
    conditions: str

    @property
    def saved(self) -> float | None:
        """The share of tokens saved."""
        if self.before is None or self.after is None or not self.before["mean_tokens"]:
            return None
        return 1 - self.after["mean_tokens"] / self.before["mean_tokens"]


def run(sources: Sequence[str], out: str | None) -> AnyPath:
    """Writes the report, shows its headline, and returns where it is."""
    screen = Screen()
    different: dict[str, str] = {}
    for source in sources:
        different.setdefault(_same(source), source)
    runs = []
    with screen.bar("reading runs", len(different)) as advance:
        for source in different.values():
            runs.append(gather(source))
            advance(len(runs), source)
    name_runs(runs)
    path = files.path(out) if out else (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    if not files.remote(path) and Path(path).is_dir():
        raise UserError(f"--out: {path} is a directory; name a file, such as {path}/report.html")
    headlines = [headline(run, slot) for slot, run in enumerate(runs)]
    text = render(runs, headlines, screen)
    try:
        files.write_atomically(path, text)
    except UserError as error:
        cause = error.__cause__
        raise UserError(f"--out: {path} could not be written: {cause}; choose another place for the report") from cause
    screen.console.print(table(headlines))
    for each in runs:
        for what in each.missing:
            screen.say(f"{each.name}: {what}")
    screen.say(f"wrote {path}")
    return path


def _same(source: str) -> str:
    """Alike for all ways to name a directory."""
    return source.rstrip("/") if files.remote(source) else str(Path(source).resolve())


def headline(run: RunFiles, slot: int) -> Headline:
    before, after = run.before(run.headline), run.after(run.headline)
    shown = after or before
    return Headline(
        run.name,
        slot,
        before.figures if before else None,
        after.figures if after else None,
        _difference(before, after),
        conditions(shown, run) if shown else "not evaluated",
    )


def _difference(before: Measured | None, after: Measured | None) -> tuple[float, float, float] | None:
    """Of accuracy, paired; None where that cannot be told."""
    first, last = (m.row if m is not None else None for m in (before, after))
    if first is None or last is None or first is last or not _alike(first, last):
        return None
    return paired_difference(first, last)


def _alike(first: EvalRow, last: EvalRow) -> bool:
    """Whether the same problems were asked alike, and graded alike: what differs then is the student."""
    same = ("grader", "max_tokens", "top_p", "top_k")
    known = [(getattr(first, name), getattr(last, name)) for name in same]
    return set(first.problem_ids) == set(last.problem_ids) and all(a == b for a, b in known if None not in (a, b))


def conditions(m: Measured, run: RunFiles) -> str:
    """What an evaluation's figures hold for, in words."""
    f, c = m.figures, run.config
    top_p, top_k = f.get("top_p"), f.get("top_k")
    if top_p is None and c is not None:  # samples of before do not say
        top_p, top_k = c.eval.top_p, c.eval.top_k
    parts = [str(m.where)]
    if top_p is not None and top_p < 1:
        parts.append(f"top_p {top_p:g}")
    if top_k:
        parts.append(f"top_k {top_k}")
    parts.append(f"{f.get('n', '?')} problems x {f.get('samples_per_problem', '?')}")
    parts.append(f"at most {f.get('max_tokens', '?')} tokens, graded by {f.get('grader', '?')}")
    return ", ".join(parts)


def table(headlines: Sequence[Headline]) -> Table:
    """The headline for a terminal of 80 columns."""
    result = Table(title="Before and after, 95 % intervals", box=SIMPLE_HEAD, pad_edge=False)
    result.caption = escape("; ".join(dict.fromkeys(h.conditions for h in headlines)))
    result.add_column("run", overflow="fold")
    for column in ("accuracy, %", "difference", "tokens", "saved"):
        result.add_column(column, justify="right", no_wrap=True)
    for h in headlines:
        both = [
            ("-", "-") if f is None else (f"{100 * f['accuracy']:.1f}", f"{f['mean_tokens']:.1f}")
            for f in (h.before, h.after)
        ]
        (accuracy, tokens), (accuracy_after, tokens_after) = both
        change = (
            "" if h.difference is None else "{:+.1f}\n\\[{:+.1f}, {:+.1f}]".format(*(100 * d for d in h.difference))
        )
        saved = "" if h.saved is None else f"{h.saved:.0%}"
        result.add_row(escape(h.run), f"{accuracy} → {accuracy_after}", change, f"{tokens} → {tokens_after}", saved)
    return result


def render(runs: Sequence[RunFiles], headlines: Sequence[Headline], screen: Screen) -> str:
    """The whole page. Whatever a file of a run holds is escaped by the templates."""
    # The loader reads the package's own files; StrictUndefined: a name that is wrong is an error, not a gap.
    environment = Environment(
        loader=PackageLoader("mpd_jax", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "whole": whole, "tokens": tokens}
    candidates = [_candidates(run, screen) for run in runs]
    lengths = [(run, figures.lengths(run)) for run in runs]
    most = figures.most_points(runs)
    page = partial(
        environment.get_template("page.html.j2").render,
        runs=runs,
        headlines=headlines,
        rows=[(run, _rows(run)) for run in runs],
        scatter=figures.accuracy_against_tokens(runs),
        lengths=[(run, figures.charts.join(made)) for run, made in lengths],
        training=figures.training(runs),
        of_one=[(run, figures.of_one_run(run, most)) for run in runs],
        version=__version__,
    )
    rest = len(_whole(page(examples="", count=0, left_out=0, filters=())).encode()) + SPARE_BYTES
    if rest > MOST_BYTES:
        raise UserError(
            f"report: figures of {len(runs)} runs alone take {rest / 1e6:.1f} MB, and a report at most "
            f"{MOST_BYTES / 1e6:g} MB; give fewer runs at a time"
        )
    shown, left_out = _fitting(runs, candidates, environment, min(EXAMPLE_BYTES, MOST_BYTES - rest))
    text = _whole(
        page(
            examples=Markup("\n").join(html for _, html in shown),
            count=len(shown),
            left_out=left_out,
            filters=filters([example for example, _ in shown]),
        )
    )
    assert len(text.encode()) <= MOST_BYTES, f"a report of {len(text.encode())} bytes"
    return text


def _whole(text: str) -> str:
    """Without what no page may hold: NUL, and characters that are half of one, as data sets have them."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def whole(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def tokens(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _rows(run: RunFiles) -> list[dict[str, Any]]:
    """Every evaluation, with its difference from the untrained student on the same problems, drawn alike."""
    made = []
    for m in run.measured:
        before = run.before(m.where)
        other = before is not None and before is not m and before.figures["mean_tokens"]
        saved = 1 - m.figures["mean_tokens"] / before.figures["mean_tokens"] if before and other else None
        made.append({**m.figures, "how": str(m.where), "difference": _difference(before, m), "saved": saved})
    return made


def _candidates(run: RunFiles, screen: Screen) -> list[Example]:
    with screen.bar(f"{run.name}: comparing texts", 2 * CANDIDATES) as advance:
        return examples_of(run, advance)


def _fitting(
    runs: Sequence[RunFiles], candidates: Sequence[Sequence[Example]], environment: Environment, most: int
) -> tuple[list[tuple[Example, Markup]], int]:
    """Examples and their HTML, as many as fit, each run having an equal part; and how many were left out."""
    template = environment.get_template("example.html.j2")
    shown: list[tuple[Example, Markup]] = []
    left_out = 0
    for slot, (each, found) in enumerate(zip(runs, candidates, strict=True)):
        room = most // len(runs)
        for example in found:
            html = template.render(e=example, run=each.name if len(runs) > 1 else "", slot=slot)
            room -= len(html.encode("utf-8", "replace")) + 1
            if room < 0:
                left_out += 1
            else:
                shown.append((example, Markup(html)))
    return shown, left_out


def filters(examples: Sequence[Example]) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """(attribute, label, [(value, examples that have it)]) of each choice that there is."""
    made = []
    for name, label in (
        ("source", "problems"),
        ("verdict", "verdict"),
        ("level", "level"),
        ("change", "change of correctness"),
    ):
        found = [getattr(example, name) for example in examples]
        counts = {
            value: found.count(value) for value in sorted({v for v in found if v}, key=lambda v: (v == UNKNOWN, v))
        }
        if counts:
            made.append((name, label, list(counts.items())))
    return made
