"""Claims about ready names: a row becomes the problem it states, files are the pinned ones, and a set that is not here
is told with the command that fetches it."""

import csv
import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from mpd_jax.data import catalog
from mpd_jax.data.catalog import READY, boxed
from mpd_jax.data.problems import ProblemsConfig, Source, read
from mpd_jax.types import UserError

MATH500 = Path(__file__).parents[2] / "shared/data/math500.jsonl"
# A row of each set, in the form in which it is published.
ROWS = {
    "openmathinstruct2": {
        "problem": "1+1?",
        "generated_solution": "So \\boxed{2}.",
        "expected_answer": "2",
        "problem_source": "augmented_math",
    },
    "dapo_math_17k": {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{catalog.DAPO_BEFORE}What is 1+1?{catalog.DAPO_AFTER}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    },
    "gsm8k": {
        "question": "Ann has 2,000 pens and doubles them?",
        "answer": "It is 2*2000=<<2*2000=4000>>4000.\n#### 4,000",
    },
    "math": {
        "problem": "1+1?",
        "level": "Level 3",
        "type": "Algebra",
        "solution": "\\boxed{1} no, \\boxed{\\frac{4}{2}}.",
    },
    "math500": {
        "problem": "1+1?",
        "solution": "So \\boxed{2}.",
        "answer": "2",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "test/algebra/1.json",
    },
    "aime24": {"id": 60, "problem": "1+1?", "solution": "So 002.", "answer": "002", "url": "", "year": "2024"},
    "aime25": {"problem": "1+1?", "answer": "2", "id": "0"},
    "amc23": {"id": 0, "question": "1+1?", "answer": 2.0, "url": ""},
    "gpqa_diamond": {
        "Question": "Which is even?\n",
        "Correct Answer": "two",
        "Incorrect Answer 1": "one",
        "Incorrect Answer 2": "three",
        "Incorrect Answer 3": "five",
        "Explanation": "2 = 2 * 1",
        "Record ID": "rec1",
        "High-level domain": "Physics",
    },
}
READ = {
    "openmathinstruct2": ("openmathinstruct2_train_1M:1", "1+1?", "2", "So \\boxed{2}.", None, "augmented_math"),
    "dapo_math_17k": ("9a9b6eb4", "What is 1+1?", "2", None, None, None),
    "gsm8k": ("gsm8k_train:1", "Ann has 2,000 pens and doubles them?", "4000", "It is 2*2000=4000.", None, None),
    "math": ("math_train:1", "1+1?", "\\frac{4}{2}", "\\boxed{1} no, \\boxed{\\frac{4}{2}}.", "3", "Algebra"),
    "math500": ("test/algebra/1.json", "1+1?", "2", "So \\boxed{2}.", "2", "Algebra"),
    "aime24": ("60", "1+1?", "002", "So 002.", None, None),
    "aime25": ("aime25:1", "1+1?", "2", None, None, None),
    "amc23": ("amc23:1", "1+1?", "2", None, None, None),
    "gpqa_diamond": ("rec1", "Which is even?\n\nA. two\nB. three\nC. five\nD. one", "A", "2 = 2 * 1", None, "Physics"),
}


def told(message: str) -> None:
    """For what is said while a set is read."""


def laid(directory: Path, name: str, rows: list[dict], monkeypatch, split: str | None = None) -> str:
    """The files of a set, with `rows` in its first one; JSON Lines stand for Parquet here."""
    ready = READY[name]
    files = {}
    for file in ready.splits[catalog.split_of(name, split, "train")]:
        path = (directory / name / file).with_suffix(".csv" if name == "gpqa_diamond" else ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with path.open("w", newline="") as opened:
                writer = csv.DictWriter(opened, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[path.relative_to(directory / name).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        rows = rows if name == "gpqa_diamond" else []
    here = {**ready.splits, catalog.split_of(name, split, "train"): files}
    monkeypatch.setitem(READY, name, dataclasses.replace(ready, splits=here))
    return str(directory)


@pytest.mark.parametrize("name", READY)
def test_a_row_of_each_set_is_the_problem_that_it_states(name, tmp_path, monkeypatch):
    directory = laid(tmp_path, name, [ROWS[name]], monkeypatch)
    (problem,) = read(ProblemsConfig(train=name, directory=directory), "train", tuple, told)
    assert (problem.id, problem.question, problem.answer, problem.response, problem.level, problem.subject) == READ[
        name
    ]


def test_the_order_of_options_is_the_questions_own_and_not_the_same_for_all():
    rows = [{**ROWS["gpqa_diamond"], "Question": f"Which is even, {i}?"} for i in range(200)]
    fields = [READY["gpqa_diamond"].fields(row) for row in rows]
    assert fields == [READY["gpqa_diamond"].fields(row) for row in rows]
    for found in fields:
        options = dict(line.split(". ") for line in found["question"].splitlines()[2:])
        assert options[found["answer"]] == "two" and sorted(options.values()) == ["five", "one", "three", "two"]
    answers = [found["answer"] for found in fields]
    assert all(30 < answers.count(letter) < 70 for letter in "ABCD")


def test_what_is_repeated_a_hundred_times_is_read_once(tmp_path, monkeypatch):
    directory = laid(tmp_path, "dapo_math_17k", [ROWS["dapo_math_17k"]] * 100, monkeypatch)
    found = read(ProblemsConfig(train="dapo_math_17k", directory=directory), "train", tuple, told)
    assert len(found) == 1 and "left out 99 asking the same as one before (the first: 9a9b6eb4)" in found.report[0]


@pytest.mark.skipif(not MATH500.is_file(), reason="MATH-500 does not lie beside the repository")
def test_math500_is_the_file_of_the_pinned_commit(tmp_path):
    (tmp_path / "math500").mkdir()
    (tmp_path / "math500/test.jsonl").symlink_to(MATH500)
    found = read(ProblemsConfig(heldout="math500", directory=str(tmp_path)), "heldout", tuple, told)
    assert len(found) == 500 and found[0].id == "test/precalculus/807.json"
    assert {p.level for p in found} == set("12345") and len({p.subject for p in found}) == 7
    # Two of its answers are written otherwise than in the solution.
    assert sum(boxed(p.response) == p.answer for p in found) >= 490


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path):
    (tmp_path / "aime25").mkdir()
    (tmp_path / "aime25/test.jsonl").write_text(json.dumps(ROWS["aime25"]))
    with pytest.raises(UserError, match=r"aime25/test\.jsonl: not the file that is known by this name .* not b4e273c0"):
        read(ProblemsConfig(heldout="aime25", directory=str(tmp_path)), "heldout", tuple, told)


def test_a_set_that_is_not_here_is_told_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(catalog.huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as caught:
        read(ProblemsConfig(heldout="gpqa_diamond", directory=str(tmp_path)), "heldout", tuple, told)
    for part in (
        "accept its terms on https://huggingface.co/datasets/Idavidrein/gpqa first",
        "hf download Idavidrein/gpqa gpqa_diamond.csv --repo-type dataset --revision "
        f"633f5ee89ab8ad4522a9f850766b73f62147ffdd --local-dir {tmp_path}/gpqa_diamond",
    ):
        assert part in str(caught.value)


def test_a_set_in_the_cache_of_the_hub_is_read_without_asking_the_hub(tmp_path, monkeypatch):
    directory = laid(tmp_path, "aime25", [ROWS["aime25"]], monkeypatch)

    def cached(repository, *, revision, local_files_only, **_):
        assert (repository, revision, local_files_only) == ("math-ai/aime25", READY["aime25"].revision, True)
        return f"{directory}/aime25"

    monkeypatch.setattr(catalog.huggingface_hub, "snapshot_download", cached)
    config = ProblemsConfig(heldout="aime25", directory=str(tmp_path / "elsewhere"))
    assert [p.id for p in read(config, "heldout", tuple, told)] == ["aime25:1"]


def test_a_row_of_another_form_is_told_by_place_and_column(tmp_path, monkeypatch):
    for row, said in (
        ({"question": "1+1?"}, r"train-00000-of-00001\.jsonl, line 1: no column 'answer'; it has 'question'"),
        ({"question": "1+1?", "answer": "2"}, r"line 1: not a row of gsm8k \(no #### before the answer\)"),
        ({"question": "1+1?", "answer": 2}, r"line 1: not a row of gsm8k"),
    ):
        directory = laid(tmp_path, "gsm8k", [row], monkeypatch)
        with pytest.raises(UserError, match=said):
            read(ProblemsConfig(train="gsm8k", directory=directory), "train", tuple, told)


def test_a_split_is_that_of_the_role_unless_it_is_named():
    assert [catalog.split_of("gsm8k", None, role) for role in ("train", "heldout")] == ["train", "test"]
    assert catalog.split_of("aime24", None, "heldout") == "train"
    with pytest.raises(UserError, match=r"split = 'dev' is none of its splits; choose one of train, test"):
        read(ProblemsConfig("x", sources={"x": Source("gsm8k", split="dev")}), "train", tuple, told)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"so \boxed{\frac{1}{2}}, or \boxed{\text{a \{set\}}}", r"\text{a \{set\}}"),
        (r"$\boxed 7$", "7"),
        (r"\fbox{x}", "x"),
    ],
)
def test_the_last_box_is_the_answer(text, held):
    assert boxed(text) == held


@pytest.mark.parametrize("text", ["none", r"\boxed{open", ""])
def test_a_solution_without_a_box_is_no_answer(text):
    with pytest.raises(ValueError, match="boxed"):
        boxed(text)


def test_every_pin_is_a_commit_and_every_hash_whole():
    for ready in READY.values():
        assert len(ready.revision) == 40 and int(ready.revision, 16)
        for sha in (sha for files in ready.splits.values() for sha in files.values() if sha):
            assert len(sha) == 64 and int(sha, 16)
