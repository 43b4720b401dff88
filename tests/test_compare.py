"""A comparison of methods: its arms, its table of hand-made run directories, and its runs, stopped, failed and resumed.

No test but the slow one trains: what stands for `train` copies a run directory that was made before.
"""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from mpd_jax import config, hosts
from mpd_jax.cli import app
from mpd_jax.eval import compare, comparison, pareto
from mpd_jax.eval.arms import Arm, is_finished, named, plan, read_result, read_sweep, share_evaluations, untold
from mpd_jax.eval.instructions import readers
from mpd_jax.eval.intervals import Compared, Interval
from mpd_jax.eval.samples import Sample, write_samples
from mpd_jax.run import BASE, CONCISE, evaluated_with, samples_path
from mpd_jax.types import UserError
from tests.e2e.tiny import ROOT, SMALL

CONFIGS = [str(ROOT / "configs" / "tiny" / name) for name in ("mpd.yaml", "crisp.yaml")]
WITH = ["train.steps=20", "eval.problems=4", "eval.temperatures=[1.0, 0.6]"]
# Right ones of four problems, and tokens of each, by evaluation (method) and temperature.
BASE_ROWS = {1.0: (2, 100), 0.6: (3, 120)}
CONCISE_ROWS = {1.0: (2, 60), 0.6: (2, 60)}
TRAINED = {"mpd": {1.0: (3, 50), 0.6: (3, 40)}, "crisp": {1.0: (2, 80), 0.6: (3, 80)}}


def arms_of(out: Path, seeds: int = 2) -> tuple[Arm, ...]:
    return plan(CONFIGS, WITH, [], seeds, out)


def samples(name: str, context: str, rows: dict[float, tuple[int, int]]) -> list[Sample]:
    common = {"reference": "1", "response_ids": (1,), "text": "", "answer": "", "reasoning_tokens": None, "attempt": 0}
    common |= {"name": name, "context": context, "max_tokens": 256, "ended": "stopped", "extracted": "1"}
    return [
        Sample(
            **common,
            temperature=temperature,
            problem_id=str(i),
            tokens=tokens + 2 * i - 3,
            correct=i < right,
            grader="rules",
            failure=None,
        )
        for temperature, (right, tokens) in rows.items()
        for i in range(4)
    ]


def evaluated(arm: Arm, name: str, context: str, rows: dict[float, tuple[int, int]]) -> None:
    path = samples_path(arm.directory, name)
    write_samples(path, samples(name, context, rows))
    path.with_suffix(".json").write_text(json.dumps({"settings": evaluated_with(arm.settings), "seconds": 1.0}))


def make(arm: Arm, directory: Path | None = None) -> None:
    """The run directory of a finished arm, there or at `directory`."""
    there = dataclasses.replace(arm.settings.run, dir=str(directory or arm.directory))
    at = dataclasses.replace(arm, settings=dataclasses.replace(arm.settings, run=there))
    at.directory.mkdir(parents=True)
    evaluated(at, BASE, "plain", BASE_ROWS)
    evaluated(at, CONCISE, "concise", CONCISE_ROWS)
    evaluated(at, "trained, step 20", "plain", TRAINED[arm.method])
    step = {"written_total": 100, "rewrite_prompt_total": 30, "rewritten_total": 5, "tokens": 7, "scored_total": 11}
    step |= {"rows": 2, "row_length": 8, "padding": 0.25, "compilations": 0}
    step |= {"write_seconds": 1.5, "write_share": 0.75, "train_seconds": 0.5, "train_share": 0.25}
    rows = [{**step, "step": i, "student_entropy": i / 10} for i in range(20)]
    (at.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (at.directory / "config.yaml").write_text(config.to_yaml(arm.settings))
    (at.directory / "summary.json").write_text("{}")


def test_arms_of_a_seed_stand_together_and_share_what_is_compiled(tmp_path):
    arms = plan(CONFIGS[1:], WITH, ["recipe.target.every=[1, 10]", "recipe.loss.kind=[jsd, reverse_kl]"], 2, tmp_path)
    assert len({arm.directory for arm in arms}) == 8 and [arm.seed for arm in arms] == [0] * 4 + [1] * 4
    assert arms[1].label == "crisp, every=1, kind=reverse_kl"
    assert arms[1].directory == tmp_path / "crisp-every=1-kind=reverse_kl-seed0"
    assert arms[1].settings.recipe.target.every == 1 and arms[2].settings.recipe.target.every == 10
    assert {arm.settings.run.compile_cache for arm in arms} == {str(tmp_path / "compiled")}


def test_swept_texts_that_begin_alike_have_directories_of_their_own(tmp_path):
    wordings = [f"{'{question}'} Be {'very ' * 12}{end}.\nNow: yes" for end in ("brief", "short")]
    arms = plan(CONFIGS[1:], WITH, [f"recipe.contexts.concise={json.dumps(wordings)}"], 1, tmp_path)
    assert [arm.settings.recipe.contexts.concise for arm in arms] == wordings
    assert arms[0].directory != arms[1].directory
    assert all(len(arm.directory.name) < 80 and "\n" not in arm.label for arm in arms)


@pytest.mark.parametrize(
    "text", ["recipe.target.every", "recipe.target.every=3", "a.b=[]", "=[1]", "a.b=[1, 1]", 'a.b=[1, "1"]', "a=["]
)
def test_a_sweep_is_a_key_and_a_list_of_different_values(text):
    with pytest.raises(UserError, match=r"--sweep: "):
        read_sweep(text)


@pytest.mark.parametrize(
    ("over", "key"),
    [
        ("eval: {max_tokens: 128}", r"eval\.max_tokens = 128, and 256 in mpd"),
        ("problems: {heldout: other.jsonl}", r"problems\.heldout = 'other\.jsonl', and 'tiny' in mpd"),
        ("student: {thinking: false}", r"student\.thinking = False, and True in mpd"),
        ("student: {lora: {rank: 4, alpha: 8}, adapter: there}", r"student\.adapter = 'there', and None in mpd"),
        ("recipe: {contexts: {plain: 'Q: {question}'}}", r"recipe\.contexts\.plain = 'Q: \{question\}', and"),
    ],
)
def test_arms_that_would_not_be_graded_alike_are_refused_by_key(tmp_path, over, key):
    (tmp_path / "other.yaml").write_text(f"over: [{CONFIGS[1]}]\n{over}\n")
    with pytest.raises(UserError, match=f"other and mpd would not be graded alike: {key}"):
        plan([CONFIGS[0], str(tmp_path / "other.yaml")], WITH, [], 1, tmp_path)
    (tmp_path / "other.yaml").write_text(f"over: [{CONFIGS[1]}]\neval: {{every: 5}}\n")
    assert len(plan([CONFIGS[0], str(tmp_path / "other.yaml")], WITH, [], 1, tmp_path)) == 2


@pytest.mark.parametrize(
    ("overrides", "sweep", "told"),
    [
        (["run.dir=runs/a"], [], r"--with: run\.dir is"),
        (["run={dir: runs/a}"], [], "--with: run is"),
        ([], ["run.seed=[5, 6]"], r"--sweep: run\.seed is not allowed; .* one of --seeds seeds"),
    ],
)
def test_what_every_run_has_of_its_own_is_not_set_for_all(tmp_path, overrides, sweep, told):
    with pytest.raises(UserError, match=told):
        plan(CONFIGS, [*WITH, *overrides], sweep, 1, tmp_path)


def test_methods_that_train_and_compute_otherwise_stand_in_one_table(tmp_path):
    other = "student: {lora: {rank: 4, alpha: 8}, param_dtype: bfloat16, dtype: bfloat16, remat: full}"
    (tmp_path / "other.yaml").write_text(f"over: [{CONFIGS[1]}]\n{other}\n")
    arms = plan([CONFIGS[0], str(tmp_path / "other.yaml")], WITH, [], 1, tmp_path)
    make(arms[0])
    share_evaluations(arms[1], arms)
    assert untold(arms[1], arms)  # its untrained student is evaluated anew, for it computes otherwise


def test_two_configs_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="two configs are called 'mpd'"):
        plan([CONFIGS[0], str(ROOT / "configs" / "mpd.yaml")], [], [], 1, tmp_path)


def test_the_table_of_finished_arms(tmp_path):
    arms = arms_of(tmp_path)
    for arm in arms[:3]:
        make(arm)
    lines = comparison.lines(arms, [read_result(arm) for arm in arms[:3]], arms[3:])
    first = [line for line in lines if line.temperature == 1.0]
    names = ["vanilla", "prompt-only concise", "vanilla, cut to 50 tokens", "mpd", "crisp"]
    assert [line.method for line in first] == names and [line.seeds for line in first] == [2, 2, 2, 2, 1]
    assert [line.failed for line in first] == [0, 0, 0, 0, 1]
    assert [line.method for line in lines if line.temperature == 0.6][2] == "vanilla, cut to 40 tokens"
    figures = {line.method: line.figures for line in first}
    mpd, cut = figures["mpd"], figures["vanilla, cut to 50 tokens"]
    assert (mpd.accuracy.mean, mpd.difference.mean, mpd.tokens.mean, mpd.reduction.mean) == (0.75, 0.25, 50, 0.5)
    assert (cut.accuracy.mean, cut.difference.mean, cut.tokens.mean) == (0, -0.5, 50)
    assert figures["vanilla"].difference.mean == 0 and figures["prompt-only concise"].tokens.mean == 60
    spent = first[3].spent
    assert (spent.student_entropy, spent.seconds) == (pytest.approx(1.85), pytest.approx(40.0))
    assert (spent.writer_tokens, spent.rewriter_tokens, spent.trainer_tokens) == (2000, 700, 460)


def test_wordings_that_begin_alike_are_all_in_the_report(tmp_path):
    wordings = [f"{'{question}'} Be {'very ' * 12}{end}." for end in ("brief", "short")]
    arms = plan(CONFIGS[:1], WITH, [f"recipe.contexts.concise={json.dumps(wordings)}"], 1, tmp_path)
    report = compare._Report(tmp_path, arms)
    for arm in arms:
        make(arm)
        report.add(arm)
    first = [line for line in report.lines() if line.temperature == 1.0]
    assert len(report.of_all()) == 2 and len({line.method for line in first}) == 6
    assert [line.kind for line in first] == ["vanilla", "concise", "concise", "cut", "trained", "trained"]


def test_where_no_method_is_shorter_than_the_student_was_nothing_is_cut(tmp_path, monkeypatch):
    monkeypatch.setitem(TRAINED, "mpd", {1.0: (3, 100), 0.6: (3, 119)})
    arms = arms_of(tmp_path, seeds=1)[:1]
    make(arms[0])
    lines = comparison.lines(arms, [read_result(arms[0])])
    assert [(line.temperature, line.method) for line in lines if line.kind == "cut"] == [
        (0.6, "vanilla, cut to 119 tokens")
    ]


def test_the_table_says_how_methods_were_not_trained_alike(tmp_path):
    arm = arms_of(tmp_path, seeds=1)[0]
    make(arm)
    result, train = read_result(arm), dataclasses.replace(arm.settings.train, steps=48)
    longer = dataclasses.replace(arm, method="longer", settings=dataclasses.replace(arm.settings, train=train))
    assert "Not trained alike" not in comparison.said([result])
    told = comparison.said([result, dataclasses.replace(result, arm=longer)])
    assert told.endswith(". Not trained alike: train.steps is 20 (mpd), 48 (longer)")


def test_rows_are_compared_with_a_method_over_the_seeds_of_both(tmp_path, monkeypatch):
    arms = arms_of(tmp_path)
    for arm in arms[:3]:  # of crisp there is seed 0 alone
        monkeypatch.setitem(TRAINED, "mpd", {1.0: (3 if arm.seed == 0 else 0, 50), 0.6: (3, 40)})
        make(arm)
    report = compare._Report(tmp_path, arms, named(arms, "crisp"))
    for arm in arms[:3]:
        report.add(arm)
    rows = {row["method"]: row for row in report.write()["rows"] if row["temperature"] == 1.0}
    assert rows["mpd"]["difference"] == -0.125 and rows["mpd"]["against_difference"] == 0.25
    assert rows["vanilla"]["against_difference"] == 0 and rows["crisp"]["against_difference"] is None
    assert rows["mpd"]["against"] == "crisp" and rows["mpd"]["against_difference_lower"] <= 0.25
    first = next(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    assert (first["against"], first["against_difference"]) == ("crisp", "0.0")
    text = (tmp_path / "compare.md").read_text()
    assert "| vs crisp |" in text.splitlines()[4] and "| +25.0 [" in text
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(comparison.table(report.lines(), report.of_all()))
    shown = console.export_text()
    assert "vs crisp" in shown and "+25.0" in shown and "…" not in shown


def test_a_method_of_which_no_run_is_over_has_an_empty_row(tmp_path):
    arms = arms_of(tmp_path, seeds=1)
    make(arms[0])
    results = [read_result(arms[0])]
    lines = comparison.lines(arms, results, arms[1:])
    assert comparison.cells(lines[4], " ") == {"method": "crisp (n = 0, 1 failed)"}
    pareto.plot(lines, tmp_path / "plot.png")
    assert comparison.as_csv(lines).count("\n") == 11 and comparison.as_markdown(lines, results)


def test_the_files_of_a_comparison_say_the_same(tmp_path):
    arms = arms_of(tmp_path)
    for arm in arms:
        make(arm)
    report = compare._Report(tmp_path, arms)
    for arm in arms:
        report.add(arm)
    content = report.write()
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(content))
    rows = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == [row["method"] for row in content["rows"]] and len(rows) == 10
    assert float(rows[3]["difference_lower"]) == content["rows"][3]["difference_lower"]
    assert "| mpd (n = 2) | 75.0 [" in (tmp_path / "compare.md").read_text()
    assert [arm["state"] for arm in content["arms"]] == ["finished"] * 4
    assert matplotlib.image.imread(tmp_path / "compare.png").shape[0] > 1000
    console = Console(width=comparison.WIDTH, file=io.StringIO(), record=True)
    console.print(comparison.table(report.lines(), report.of_all()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= comparison.WIDTH and "…" not in text and "2k / 700 /" in text


def test_an_arm_is_over_when_its_config_and_evaluations_are_those_of_now(tmp_path):
    arm = arms_of(tmp_path)[0]
    assert not is_finished(arm)
    make(arm)
    assert is_finished(arm)
    (more,) = plan(CONFIGS[:1], [*WITH, "eval.attempts=2"], [], 1, tmp_path)
    assert more.directory == arm.directory and not is_finished(more)
    # A start with other evaluation settings leaves its config beside the summary of before.
    (arm.directory / "config.yaml").write_text(config.to_yaml(more.settings))
    assert not is_finished(more)


def test_the_untrained_student_is_evaluated_once_a_seed(tmp_path):
    first, second, other = (arms_of(tmp_path)[i] for i in (0, 1, 2))
    evaluated(first, BASE, "plain", BASE_ROWS)
    for arm in (second, other):
        share_evaluations(arm, (first, second, other))
    copied = samples_path(second.directory, BASE)
    assert copied.read_bytes() == samples_path(first.directory, BASE).read_bytes()
    assert copied.with_suffix(".json").exists() and not samples_path(second.directory, CONCISE).exists()
    assert not other.directory.exists()


STUB = """
import pathlib, shutil, signal, sys, time
made, arm = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).parent
with open(made / "started", "a") as file:
    file.write(arm.name + (" shared" if (arm / "evaluations" / "base.json").exists() else "") + "\\n")
if (made / "hang").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (made / "hung").touch()
    time.sleep(60)
if not (made / arm.name).exists():
    print("error: nothing was made", file=sys.stderr)
    sys.exit(3)
shutil.copytree(made / arm.name, arm, dirs_exist_ok=True)
"""


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """Where finished runs lie, to be copied by what stands for `train`."""
    monkeypatch.setattr(compare, "POLL_S", 0.02)
    monkeypatch.setattr(pareto, "plot", lambda lines, path: None)
    for arm in arms_of(tmp_path / "out"):
        make(arm, tmp_path / "made" / arm.directory.name)
    (tmp_path / "stub.py").write_text(STUB)
    return tmp_path / "made"


def run(made: Path, jobs: int = 1) -> dict:
    command = (sys.executable, "-S", str(made.parent / "stub.py"), str(made))
    out = made.parent / "out"
    return compare.run(CONFIGS, WITH, [], seeds=2, out=out, jobs=jobs, train=command, measure=command)


def started(made: Path) -> list[str]:
    lines = (made / "started").read_text().splitlines()
    (made / "started").unlink()
    return lines


def test_finished_arms_are_not_trained_again_and_failed_ones_are(made, capsys):
    (made / "crisp-seed0").rename(made / "away")
    content = run(made)
    assert started(made) == ["mpd-seed0", "crisp-seed0 shared", "mpd-seed1", "crisp-seed1 shared"]
    assert [arm["state"] for arm in content["arms"]] == ["finished", "failed", "finished", "finished"]
    assert content["arms"][1]["error"] == "exit code 3: error: nothing was made"
    said = " ".join(capsys.readouterr().err.split())
    assert "crisp, seed 0 failed, exit code 3" in said and "error: nothing was made" in said
    assert "crisp (n = 1, 1 failed)" in (made.parent / "out" / "compare.md").read_text()
    (made / "away").rename(made / "crisp-seed0")
    assert {arm["state"] for arm in run(made)["arms"]} == {"finished"} and started(made) == ["crisp-seed0 shared"]
    run(made)
    assert not (made / "started").exists()


def test_two_at_once_do_not_evaluate_the_untrained_student_twice(made):
    run(made, jobs=2)
    order = started(made)
    assert {line.split()[0] for line in order[:2]} == {"mpd-seed0", "mpd-seed1"}
    assert sorted(order[2:]) == ["crisp-seed0 shared", "crisp-seed1 shared"]


def test_a_comparison_that_is_stopped_passes_it_on_and_goes_on_later(made, monkeypatch):
    (made / "hang").touch()

    def stop():
        while not (made / "hung").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: ended.append(process.returncode))
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(hosts.Stopped, match="stopped; 0 of 4 arms are over"):
        run(made)
    thread.join()
    assert ended == [75] and started(made) == ["mpd-seed0"]
    (made / "hang").unlink()
    assert {arm["state"] for arm in run(made)["arms"]} == {"finished"}


@pytest.mark.parametrize(
    ("config_file", "swept", "who"),
    [
        (0, ["recipe.contexts.compress"], ("rewrites",)),
        (0, ["recipe.contexts.concise"], ()),  # MPD's target reads the plain prompt
        (0, ["recipe.target.context", "recipe.contexts.compress"], ("target", "rewrites")),
        (1, ["recipe.contexts.concise"], ("target",)),
        (1, ["recipe.contexts.compress"], ()),
        (1, ["recipe.target.every"], ()),
        (2, ["recipe.contexts.repair"], ("rewrites",)),
        (2, ["recipe.target.context"], ("rewrites",)),
        (3, ["recipe.contexts.privileged"], ("target",)),
    ],
)
def test_who_reads_a_swept_instruction(config_file, swept, who):
    configs = [*CONFIGS, *(ROOT / "configs" / "tiny" / name for name in ("trd.yaml", "opsd.yaml"))]
    assert readers(config.load(configs[config_file]), swept) == who


def test_a_swept_instruction_is_measured_once_beside_its_run(made, tmp_path):
    sweep = ['recipe.contexts.compress=["{question} {draft} Brief.", "{question} {draft} Short."]']
    arms = plan(CONFIGS[:1], WITH, sweep, 2, tmp_path / "out")
    for arm in arms:
        make(arm, made / arm.directory.name)
    found = {"rewrites": {t: [[0.75, 0.5, 1.0], 31.0] for t in ("1", "0.6")}}
    (made / "instruction.json").write_text(
        json.dumps({"settings": evaluated_with(arms[0].settings), "readings": found})
    )
    measure = f"import sys, shutil, pathlib; made = pathlib.Path({str(made)!r}); print(*sys.argv[2:], file=open(made / "
    measure += "'measured', 'a')); shutil.copy(made / 'instruction.json', pathlib.Path(sys.argv[1]).parent)"
    train = (sys.executable, "-S", str(made.parent / "stub.py"), str(made))
    words = {"seeds": 2, "out": tmp_path / "out", "jobs": 1, "train": train}
    content = compare.run(CONFIGS[:1], WITH, sweep, **words, measure=(sys.executable, "-S", "-c", measure))
    assert {arm["state"] for arm in content["arms"]} == {"finished"} and len(started(made)) == 4
    assert (made / "measured").read_text() == "recipe.contexts.compress\n" * 2
    trained = [row for row in content["rows"] if row["kind"] == "trained"]
    assert [(row["rewrites_accuracy"], row["rewrites_tokens"], row["target_accuracy"]) for row in trained] == [
        (0.75, 31.0, None)
    ] * 4
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| instruction alone, % |" in text and "| rewrites: 75.0 [50.0, 100.0] 31.0 tokens |" in text


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1), (None, 75)])
def test_the_exit_code_says_how_a_comparison_ended(monkeypatch, tmp_path, state, code):
    asked = []

    def run(*words, **named):
        asked.append((words, named))
        if state is None:
            raise hosts.Stopped("stopped; 0 of 1 arms are over")
        return {"arms": [{"state": state}]}

    monkeypatch.setattr(compare, "run", run)
    words = [
        "compare",
        "a.yaml",
        "b.yaml",
        "--with",
        "train.steps=3",
        "--with",
        "c.yaml",
        "--sweep",
        "d=[1]",
        "--against",
        "b",
    ]
    done = CliRunner().invoke(app, [*words, "--json", "--seeds", "4", "--out", str(tmp_path)])
    assert done.exit_code == code
    assert asked == [
        (
            (["a.yaml", "b.yaml"], ["train.steps=3", "c.yaml"], ["d=[1]"]),
            {"seeds": 4, "out": tmp_path, "jobs": 1, "against": "b"},
        )
    ]
    if state is None:
        assert "0 of 1 arms are over; the same command again goes on" in done.output
    else:
        assert json.loads(done.stdout) == {"arms": [{"state": state}]}


def test_a_run_ends_when_whoever_started_it_is_gone():
    code = "import mpd_jax.cli as c, time; c._stop_with_stdin(); print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdin and child.stdout and child.stdout.readline() == b"up\n"
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=10) == -signal.SIGTERM
    child.stdout.close()


def test_labels_of_crowded_marks_do_not_overlap():
    def line(i: int) -> comparison.Line:
        accuracy, tokens = Interval(0.8 + i / 500, 0.78, 0.84), Interval(40 + i % 3, 38, 44)
        return comparison.Line(f"a method of {i}", 1.0, "trained", 3, 0, Compared(accuracy, accuracy, tokens, tokens))

    figure = Figure(figsize=(7.5, 5.2), dpi=150, layout="constrained")
    canvas, axes, lines = FigureCanvasAgg(figure), figure.subplots(), [line(i) for i in range(12)]
    pareto._points(axes, lines)
    canvas.draw()
    boxes = pareto._label(axes, lines, canvas.get_renderer())
    inside = axes.get_window_extent()
    assert len(boxes) == 12
    for i, box in enumerate(boxes):
        assert inside.x0 <= box[0] and box[2] <= inside.x1 and inside.y0 <= box[1] and box[3] <= inside.y1
        assert not pareto._shared(box[None], boxes[:i]).any()


@pytest.mark.slow
def test_two_methods_over_two_seeds_are_trained_killed_and_compared(tmp_path):
    words = [sys.executable, "-m", "mpd_jax", "compare", *CONFIGS, "--seeds", "2", "--out", str(tmp_path / "out")]
    words += [word for override in SMALL for word in ("--with", override)]
    first = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
    assert first.stderr
    metrics = tmp_path / "out" / "crisp-seed0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes()):
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.communicate()
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {arm["state"] for arm in content["arms"]} == {"finished"} and len(content["arms"]) == 4
    assert [row["seeds"] for row in content["rows"]] == [2] * 5


@pytest.mark.slow
def test_a_swept_instruction_is_read_by_target_and_rewriter(tmp_path):
    sweeps = ["recipe.target.context=[concise]", 'recipe.contexts.compress=["{question}\\nDraft:\\n{draft}\\nGo."]']
    words = [sys.executable, "-m", "mpd_jax", "compare", CONFIGS[0], "--seeds", "1", "--out", str(tmp_path / "out")]
    words += [word for override in SMALL for word in ("--with", override)]
    done = subprocess.run([*words, "--sweep", sweeps[0], "--sweep", sweeps[1], "--json"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    row = json.loads(done.stdout)["rows"][-1]
    assert row["target_accuracy"] > 0.5 and row["target_tokens"] < 48
    assert row["rewrites_accuracy"] is not None and row["rewrites_tokens"] < 48
