"""The report: one file that needs nothing else, whatever a run has to tell and whatever its texts hold."""

import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mpd_jax.data.chat import Chat
from mpd_jax.data.contexts import Contexts
from mpd_jax.report import charts, command, examples
from mpd_jax.report.examples import Answer, Example, difference
from mpd_jax.report.gather import gather, name_runs
from mpd_jax.roles import TINY
from mpd_jax.train.records import Records
from mpd_jax.types import UserError
from tests.run_files import PROBLEMS, evaluated, metrics, sample, trajectory, write_run

HOSTILE = '<script>alert("1")</script></pre>&amp;<img src=x onerror=alert(2)>'
VOID = {"meta", "link", "br", "input", "hr", "img"}


class Page(HTMLParser):
    """What a browser would see: the elements, their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def named(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


@pytest.fixture(scope="module")
def encode():
    return Chat(TINY / "student", {0}, True, Contexts()).encode


@pytest.fixture(autouse=True)
def problems(monkeypatch):
    monkeypatch.setattr(examples.build, "read_problems", lambda config, split: PROBLEMS)


def written(tmp_path, *runs):
    command.run([str(run) for run in runs], str(tmp_path / "report.html"))
    return Page((tmp_path / "report.html").read_text())


def test_a_whole_run_is_told_and_nothing_is_fetched(tmp_path, encode, capsys):
    page = written(tmp_path, write_run(tmp_path / "run", encode))
    assert "123.5 → 63.5" in page.text and "49 % fewer" in page.text and "50.0 → 75.0" in page.text
    assert "What is missing" not in page.text
    titles = {svg.get("aria-label") for svg in page.named("svg", role="img")}
    assert titles >= {
        "temperature 1",
        "responses, temperature 1",
        "training, step 1",
        "training, step 2",
        "loss",
    }
    assert titles >= {"tokens per response", "entropy", "divergence by position", "verdicts", "wall time by phase"}
    assert "trajectories/step_000000.jsonl.gz" in page.text and "by: student" in page.text
    for tag, attributes in page.elements:
        fetched = {attributes.get(name) for name in ("src", "href", "data", "action")} - {None}
        assert all(address.startswith(("#", "data:")) for address in fetched), (tag, fetched)
    text = (tmp_path / "report.html").read_text()
    assert "@import" not in text and "url(" not in text and "http" not in text
    shown = capsys.readouterr().err
    assert "50.0 → 75.0" in shown and "123.5 → 63.5" in shown and "49%" in shown


def test_examples_lie_side_by_side_and_can_be_filtered(tmp_path, encode):
    page = written(tmp_path, write_run(tmp_path / "run", encode))
    rows = page.named("details", **{"class": "example"})
    assert len(rows) == 16
    known = [
        row for row in rows if row["data-source"] == "trained on" and row["data-change"] == "right before and after"
    ]
    assert len(known) == 6 and {row["data-verdict"] for row in known} == {"kept", "longer"}
    assert {row["data-change"] for row in rows if row["data-source"] == "held out"} == {
        "right before and after",
        "wrong → right",
        "wrong before and after",
    }
    titles = {
        "original by the untrained student": 16,
        "rewrite by the teacher": 8,
        "trained student, step 2": 14,
    }
    assert {title: page.text.count(title) for title in titles} == titles
    assert {select["name"] for select in page.named("select")} == {"source", "verdict", "change"}
    assert len(page.named("del")) >= 8 and len(page.named("ins")) >= 8


def test_what_a_model_or_a_problem_says_is_text_and_no_markup(tmp_path, encode, monkeypatch):
    run = write_run(tmp_path / "run", encode)
    hostile = [replace(problem, question=HOSTILE) for problem in PROBLEMS]
    monkeypatch.setattr(examples.build, "read_problems", lambda config, split: hostile)
    plain = written(tmp_path, run)
    base = [replace(sample("base", i, 100, True, HOSTILE), reference=HOSTILE) for i in range(8)]
    evaluated(run, "base", [replace(s, problem_id=f"{s.problem_id}{HOSTILE}") for s in base])
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + f"# {HOSTILE}\n")
    page = written(tmp_path, run)
    assert page.text.count(HOSTILE) > 30
    assert not page.named("img") and len(page.named("script")) == len(plain.named("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


@pytest.mark.parametrize("damage", [b"", b'{"step": 1, "lo\n', b'[]\n{"loss": 1}\n\xff\n'])
def test_of_a_run_that_is_not_over_there_is_what_there_is(tmp_path, encode, damage):
    run = write_run(tmp_path / "run", encode)
    for name in ("summary.json", "evaluations/trained, step 2.jsonl", "evaluations/trained, step 2.json"):
        (run / name).unlink()
    first = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]
    (run / "metrics.jsonl").write_bytes(first + damage)
    page = written(tmp_path, run)
    assert "123.5 → –" in page.text and "1 of 2 steps; the run is not finished" in page.text
    assert "the trained student is not evaluated" in page.text and "summary.json: absent" in page.text
    assert ("damaged and left out" in page.text) == bool(damage)


def test_an_evaluation_in_the_middle_stands_for_the_trained_student_until_there_is_one(tmp_path, encode):
    run = write_run(tmp_path / "run", encode, steps=4)
    for name in ("jsonl", "json"):
        (run / "evaluations" / f"trained, step 4.{name}").unlink()
    for step, tokens in ((2, 90), (1, 110)):
        evaluated(run, f"step {step}", [sample(f"step {step}", i, tokens, True) for i in range(8)])
    assert "123.5 → 90.0" in written(tmp_path, run).text


def test_sets_by_name_have_charts_of_their_own_and_the_held_out_problems_stay_the_headline(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    for name, tokens in (("base", 300), ("trained, step 2", 200)):
        of_set = [replace(sample(name, i, tokens, True), problem_set="math500", top_p=0.95) for i in range(8)]
        evaluated(run, f"math500/{name}", of_set)
        evaluated(run, f"regraded_boxed/{name}", [replace(s, problem_set="elsewhere") for s in of_set])
    page = written(tmp_path, run)
    assert "123.5 → 63.5" in page.text and "300.0 → 200.0" not in page.text
    titles = [svg.get("aria-label") for svg in page.named("svg", role="img")]
    assert titles[:2] == ["temperature 1", "math500, temperature 1"] and "elsewhere" not in page.text
    assert "evaluations/math500/base.jsonl" in page.text and "300.0" in page.text and "33 %" in page.text
    assert len(page.named("details", **{"class": "example", "data-source": "held out"})) == 8
    for path in (run / "evaluations").glob("*.json*"):
        path.unlink()
    assert "300.0 → 200.0" in written(tmp_path, run).text


def test_of_samples_that_are_damaged_the_stored_figures_are_told(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    path = run / "evaluations" / "base.jsonl"
    path.write_text(path.read_text()[:-200])
    page = written(tmp_path, run)
    assert "123.5 → 63.5" in page.text and "line 8 is not a JSON object" in page.text
    assert "its figures are those of base.json" in page.text
    path.with_suffix(".json").write_text("{")
    page = written(tmp_path, run)
    assert "– → 63.5" in page.text and "the untrained student is not evaluated" in page.text


def test_damaged_trajectories_and_an_unknown_config_are_said(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    path = run / "trajectories" / "step_000000.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    page = written(tmp_path, run)
    assert "step_000000.jsonl.gz: left out of the examples: damaged" in page.text
    (run / "config.yaml").write_text("key: of another version\n")
    page = written(tmp_path, run)
    assert "config.yaml: this version cannot read it" in page.text and "key: of another version" in page.text


def test_several_runs_lie_over_each_other_under_names_that_differ(tmp_path, encode):
    runs = [write_run(tmp_path / way / "run", encode, saved=saved) for way, saved in (("a", 60), ("b", 30))]
    page = written(tmp_path, *runs, runs[0])
    assert "a/run" in page.text and "b/run" in page.text
    assert "123.5 → 63.5" in page.text and "123.5 → 93.5" in page.text
    assert {row["data-run"] for row in page.named("details", **{"class": "example"})} == {"a/run", "b/run"}
    slots = {a["class"] for a in page.named("path") if a["class"].startswith("mark full")}
    assert slots == set() and {a["class"] for a in page.named("path") if "mark" in a["class"]} >= {
        "mark s0 full",
        "mark s1 full",
    }


def test_names_are_as_short_as_they_can_be_and_differ(tmp_path):
    class Named:
        def __init__(self, path):
            self.path, self.name = path, ""

    runs = [Named(path) for path in ("x/a/run", "y/a/run", "y/b", "gs://bucket/b/run")]
    name_runs(runs)
    assert [run.name for run in runs] == ["x/a/run", "y/a/run", "b", "b/run"]


def test_what_is_no_run_or_no_file_is_refused(tmp_path, encode):
    with pytest.raises(UserError, match="is no run directory"):
        gather(str(tmp_path))
    with pytest.raises(UserError, match=r"--out: .* is a directory"):
        command.run([str(write_run(tmp_path / "run", encode))], str(tmp_path))


def test_long_texts_are_cut_and_a_report_stays_small(tmp_path, encode, monkeypatch):
    assert command.EXAMPLE_BYTES + 1_000_000 < command.MOST_BYTES <= 5_000_000
    monkeypatch.setattr(command, "EXAMPLE_BYTES", 400_000)
    run = write_run(tmp_path / "run", encode)
    long = "".join(f"word{i} & " for i in range(4000))
    many = [replace(sample("base", 0, 100, True, long), problem_id=f"p{i}") for i in range(12)]
    evaluated(run, "base", many)
    evaluated(run, "trained, step 2", [replace(s, name="trained, step 2") for s in many])
    page = written(tmp_path, run)
    assert 300_000 < (tmp_path / "report.html").stat().st_size < 500_000
    (told,) = re.findall(r"(\d+) of 20 are left out", page.text)
    assert len(page.named("details", **{"class": "example"})) == 20 - int(told) < 20
    assert "more characters are left out" in page.text


def test_a_long_run_has_no_more_points_than_a_picture_shows(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    short = len((written(tmp_path, run), (tmp_path / "report.html").read_text())[1])
    (run / "metrics.jsonl").write_text(metrics(5000))
    written(tmp_path, run)
    assert len((tmp_path / "report.html").read_text()) - short < 200_000


def test_of_many_long_runs_curves_have_fewer_points_and_texts_the_room_that_is_left(tmp_path, encode, monkeypatch):
    run = write_run(tmp_path / "run", encode)
    (run / "metrics.jsonl").write_text(metrics(300))
    many = [shutil.copytree(run, tmp_path / f"run{i}") for i in range(8)]
    sizes, shown = [], []
    for runs in ([run], many, many):
        shown.append(len(written(tmp_path, *runs).named("details", **{"class": "example"})))
        sizes.append((tmp_path / "report.html").stat().st_size)
        monkeypatch.setattr(command, "MOST_BYTES", max(sizes) if len(sizes) > 1 else command.MOST_BYTES)
    assert shown[:2] == [16, 8 * 16] and 0 < shown[2] < 8 * 16
    assert sizes[1] < 6 * sizes[0] and sizes[2] <= sizes[1]
    monkeypatch.setattr(command, "MOST_BYTES", sizes[0])
    with pytest.raises(UserError, match=r"of 8 runs alone take .* give fewer runs"):
        written(tmp_path, *many)


def test_a_run_given_twice_stands_once(tmp_path, encode, monkeypatch):
    run = write_run(tmp_path / "run", encode)
    monkeypatch.chdir(tmp_path)
    assert not written(tmp_path, run, "run", "./run/").named("select", name="run")


def test_figures_that_are_no_numbers_are_not_drawn(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    rows = [json.loads(line) for line in metrics(4).splitlines()]
    rows[1]["loss"], rows[2]["grad_norm"] = float("nan"), float("inf")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written(tmp_path, run)
    assert not re.search(r"\b(nan|inf)\b", (tmp_path / "report.html").read_text())


def test_half_a_character_is_shown_as_unknown(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    path = run / "evaluations" / "base.jsonl"
    path.write_text(path.read_text().replace("Leo starts", "Leo \\ud835 starts"))
    assert "Leo ? starts" in written(tmp_path, run).text


def test_what_cannot_be_read_or_graded_is_said(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    for name in ("summary.json", "evaluations/trained, step 2.jsonl"):
        (run / name).unlink()
        (run / name).mkdir()
    text = (run / "config.yaml").read_text()
    assert "grader: rules" in text
    (run / "config.yaml").write_text(text.replace("grader: rules", "grader: not_there.module:function"))
    page = written(tmp_path, run)
    assert "summary.json: unreadable" in page.text and "123.5 → 63.5" in page.text
    assert "what is right among texts of training is not known" in page.text or "config.yaml: this version" in page.text


def test_values_that_nobody_wrote_are_damage_and_no_end_of_the_report(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    path, rows = run / "evaluations" / "base.jsonl", []
    for change in ({"text": None}, {"tokens": float("nan")}):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, **change}) + "\n" for row in rows))
        assert "base.jsonl: sample 1 is damaged" in written(tmp_path, run).text
    odd = [{"verdicts": [1]}, {"divergence_by_position": 3}, {"divergence_by_position": [{}]}, {"train_share": "a"}]
    lines = [json.dumps({"step": number, **row}) + "\n" for number, row in enumerate(odd)]
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "summary.json").write_text(json.dumps({"rows": [{"name": "base, cut at 9"}], "versions": [1]}))
    (run / "evaluations" / "base.json").write_text(json.dumps({"rows": [{"name": "base", "temperature": "hot"}]}))
    other = replace(trajectory(0, encode), response=(10**9,))
    Records(run, seed=0).save(0, [other])
    page = written(tmp_path, run)
    assert "metrics.jsonl: lines 1, 2, 3, 4 are damaged" in page.text and "summary.json: damaged" in page.text
    assert "ids that the student's tokenizer has not" in page.text
    (run / "config.yaml").write_text("\0")
    assert "\0" not in (written(tmp_path, run), (tmp_path / "report.html").read_text())[1]


def test_an_evaluation_that_is_under_way_is_said_to_be(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    (run / "evaluations" / "base.json").write_text('{"settings": {}}')
    assert "evaluations/base.jsonl: the evaluation is not over" in written(tmp_path, run).text


def test_what_was_graded_or_cut_otherwise_is_not_set_against_the_untrained_student(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    assert "+25.0" in written(tmp_path, run).text
    for change in ({"grader": "boxed 1"}, {"max_tokens": 512}):
        trained = [replace(sample("trained, step 2", i, 60, True), **change) for i in range(8)]
        evaluated(run, "trained, step 2", trained)
        page = written(tmp_path, run)
        assert "50.0 → 100.0" in page.text and "+50.0" not in page.text


def test_a_report_that_cannot_be_written_says_so(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file/report.html could not be written: .*choose another place"):
        command.run([str(run)], str(tmp_path / "file" / "report.html"))


def answer(correct, text="a"):
    return Answer("t", text, 1, "stopped", correct)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (True, False, "right → wrong"),
        (False, True, "wrong → right"),
        (True, True, "right before and after"),
        (None, True, "not known"),
    ],
)
def test_the_change_of_correctness_is_from_the_original_to_the_trained_student(before, after, said):
    assert Example("s", "i", "p", "r", "", "", answer(before), answer(False), answer(after)).change == said
    assert Example("s", "i", "p", "r", "", "", answer(before), None, None).change == "not known"


words = st.lists(st.sampled_from(["so", "2+3=5", "so,", "\n", "  ", "the", "\u00a0"]), max_size=30).map(" ".join)


@given(words, words)
def test_pieces_make_the_text_again_and_what_is_unmarked_is_in_both(a, b):
    ours, theirs = difference(a, b)
    assert ("".join(t for _, t in ours), "".join(t for _, t in theirs)) == (a, b)
    common = [" ".join(" ".join(t for marked, t in side if not marked).split()) for side in (ours, theirs)]
    assert common[0] == common[1]
    assert not any(marked for marked, _ in difference(a, a)[0])


def test_a_word_that_is_new_is_the_only_one_marked():
    ours, theirs = difference("so 2+3=5 and done", "so 2+3=5 done")
    assert [t.strip() for marked, t in ours if marked] == ["and"] and not any(marked for marked, _ in theirs)


def coordinates(figure):
    paths = re.findall(r'<path class="(?:line|mark|cross|area|band)[^"]*" d="([^"]*)"', figure)
    return [tuple(map(float, pair)) for path in paths for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_what_is_drawn_lies_on_the_picture():
    curve = charts.Line("one", [(1, 3.0), (2, -1e6), (3, 1e-9)], 0)
    mark = charts.Mark("m", 5.0, 50.0, (2.0, 9.0), (10.0, 90.0), 9, "diamond")
    made = [
        charts.lines("t", [curve], "x", "y"),
        charts.lines("t", [charts.Line("one", [(4, 0.0)], 0)], "x", "y"),
        charts.scatter("t", [mark, mark], "x", "y", [("diamond", "d")]),
        charts.histogram("t", [("one", [3, 3, 3], 0), ("two", [], 1), ("three", range(99), 2)], "x"),
        charts.stacked("t", [1.0, 2.0], [("a", [0.2, 0.9]), ("none", [0, 0]), ("b", [0.8, 0.4])], "y"),
        charts.stacked("t", [1.0], [("a", [1.0])], "y"),
    ]
    for figure in made:
        Page(str(figure))
        found = coordinates(str(figure))
        assert found and all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in found)
    assert "none" not in made[4] and "two" not in made[3]
    assert charts.lines("t", [charts.Line("one", [], 0)], "x", "y") is None
    assert charts.histogram("t", [("one", [], 0)], "x") is None and charts.stacked("t", [], [], "y") is None
    assert HOSTILE not in str(charts.lines(HOSTILE, [charts.Line(HOSTILE, [(1, 1)], 0)], HOSTILE, HOSTILE))


def test_a_histogram_holds_all_of_a_group_and_a_scatter_its_intervals():
    figure = str(charts.histogram("t", [("one", [0.0] * 30 + [10.0] * 10, 0)], "x"))
    (line,) = re.findall(r'<path class="line s0" d="([^"]*)"', figure)
    heights = [float(y) for _, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", line)]
    floor = charts.HEIGHT - charts.BOTTOM
    tall, short = floor - min(heights), floor - heights[-2]
    assert tall / short == pytest.approx(3, abs=0.02)
    few, many = [0.0, 10.0], [0.0, 10.0] * 30
    first, second = re.findall(
        r'class="area s\d" d="([^"]*)"', str(charts.histogram("t", [("a", few, 0), ("b", many, 1)], "x"))
    )
    assert first == second  # shares, not counts
    mark = charts.Mark("m", 5.0, 50.0, (2.0, 9.0), (10.0, 90.0), 0)
    (cross,) = re.findall(
        r'class="cross s0" d="M(\S+) (\S+)H(\S+)M(\S+) (\S+)V(\S+)"', str(charts.scatter("t", [mark], "x", "y", []))
    )
    left, y, right, x, low, high = map(float, cross)
    assert (x - left) / (right - left) == pytest.approx(3 / 7, abs=0.01)
    assert (low - y) / (low - high) == pytest.approx(0.5, abs=0.01)


def test_steps_are_whole_and_what_each_took_lies_before_its_end():
    assert charts.ticks(1, 2, 6, whole=True) == [1, 2] and charts.ticks(0, 48, 6, whole=True) == [0, 10, 20, 30, 40]
    figure = str(charts.stacked("t", [1.0, 2.0], [("a", [0.25, 0.75]), ("b", [0.75, 0.25])], "y"))
    first = re.findall(r'class="band s0" d="([^"]*)"', figure)[0]
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", first)]
    width, height = charts.WIDTH - charts.LEFT - charts.RIGHT, charts.HEIGHT - charts.TOP - charts.BOTTOM
    at = [((x - charts.LEFT) / width, (charts.HEIGHT - charts.BOTTOM - y) / height) for x, y in points[:4]]
    assert np.allclose(at, [(0, 0.25), (0.5, 0.25), (0.5, 0.75), (1, 0.75)], atol=0.01)


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (0.001, 0.0013), (0, 123456), (99.9, 100.1)])
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 7 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    steps = {round(b - a, 12) for a, b in pairwise(found)}
    assert max(steps) - min(steps) < 1e-9 * max(map(abs, found)) + 1e-12


def test_the_headline_says_what_there_is_when_a_half_is_missing(tmp_path, encode):
    run = gather(str(write_run(tmp_path / "run", encode)))
    run.name = "[b]run[/b]"
    run.measured = [m for m in run.measured if m.kind == "trained"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(command.table([command.headline(run, 0)]))
    shown = console.export_text()
    assert "- → 75.0" in shown and "[b]run[/b]" in shown


def test_a_config_without_evaluations_is_a_report_too(tmp_path, encode):
    run = write_run(tmp_path / "run", encode)
    for path in (run / "evaluations").iterdir():
        path.unlink()
    (run / "summary.json").write_text(json.dumps({"rows": 3}))
    page = written(tmp_path, run)
    assert "No evaluation could be read" in page.text and "summary.json: damaged" in page.text
