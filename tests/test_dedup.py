"""Claims about near-duplicates: what asks nearly the same is found, what asks another thing is not, and the index of a
set leaves out of a run just what was found."""

import json
from pathlib import Path

import pytest

from mpd_jax import config, dedup
from mpd_jax.data.near import Index
from mpd_jax.data.problems import ProblemsConfig, read, read_file
from mpd_jax.types import Problem, UserError
from tests.e2e.tiny import QUICKSTART

MATH500 = Path(__file__).parents[2] / "shared/data/math500.jsonl"
ASKED = "How many positive whole-number divisors does $196$ have, if $1$ and $196$ itself are counted among them?"


def near(question: str, asked: str = ASKED) -> float:
    found = Index({"set": [Problem("e", asked)]}, 5).nearest(question)
    return found.share if found else 0.0


@pytest.mark.parametrize(
    "question",
    [
        ASKED,
        ASKED.upper(),
        ASKED.replace("$", "").replace(" ", "  \n"),
        f"Solve the following problem. {ASKED} Put your answer in a box.",
        ASKED.replace("196", "\\left( 196 \\right)"),
    ],
)
def test_the_same_question_is_found_whatever_its_dress(question):
    assert near(question) == 1.0


def test_a_question_with_a_word_changed_is_near_and_another_is_not():
    assert 0.6 < near(ASKED.replace("itself", "too")) < 1
    assert near("How many positive whole-number divisors does a prime have?") < 0.5
    assert near("What is the square of 7?") == 0
    assert near("What is 1+1?", "What is 1+1?") == near("what is $1 + 1$", "What is 1+1?") == 1
    assert near("What is 1+1?", "What is 1+2?") == 0


@pytest.mark.skipif(not MATH500.is_file(), reason="MATH-500 does not lie beside the repository")
def test_no_question_of_math500_is_near_to_another_of_it():
    problems = read_file(MATH500, {"question": "problem", "id": "unique_id"})
    index = Index({"first": problems[:250]}, 5)
    found = [index.nearest(problem.question) for problem in problems[250:]]
    assert max(f.share for f in found if f) < 0.5
    assert all(index.nearest(p.question) == ("first", p.id, 1.0) for p in problems[:250])


def told(message: str) -> None:
    """For what is said while a set is read."""


def write(path: Path, questions: list[str]) -> str:
    path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions))
    return str(path)


def test_what_the_index_found_is_left_out_of_training_alone_and_told(tmp_path):
    train = write(tmp_path / "train.jsonl", ["What is 7*8?", f"{ASKED} Explain.", "What is 9*9?"])
    heldout, index = write(tmp_path / "held.jsonl", ["Name a prime.", ASKED]), str(tmp_path / "kept.jsonl")
    settings = config.load(QUICKSTART, [f"problems.train={train}", f"problems.heldout={heldout}"])
    other = write(tmp_path / "other.jsonl", ["Which colour is the sky?"])
    assert dedup.run(settings, [other], index, share=0.6, size=5)["left out"] == {}
    summary = dedup.run(settings, [], index, share=0.6, size=5)
    assert summary["problems"] == 3 and summary["questions kept"] == 2 and summary["left out"] == {heldout: 1}
    line = json.loads(Path(index).read_text().splitlines()[1])
    assert line["id"] == "train:2" and line["near"] == {"set": heldout, "id": "held:2", "share": 1.0}
    using = ProblemsConfig(train, heldout, kept=index)
    found = read(using, "train", tuple, told)
    assert [p.id for p in found] == ["train:1", "train:3"]
    assert found.report[0].endswith(f"; left out 1 near-duplicates of {heldout} (the first: train:2)")
    assert len(read(using, "heldout", tuple, told)) == 2
    # Another file with the same questions is another order of the same problems; a new question is not known.
    write(tmp_path / "train.jsonl", ["What is  9*9?", "What is 7*8?"])
    assert len(read(using, "train", tuple, told)) == 2
    write(tmp_path / "train.jsonl", ["What is 9*9?", "What is new?"])
    with pytest.raises(UserError, match=r"kept\.jsonl does not know problem 'train:2'"):
        read(using, "train", tuple, told)


def test_a_question_that_is_left_out_may_hold_any_character(tmp_path):
    strange = f"{ASKED} \u2028 \x85 \x0c Explain."
    train = write(tmp_path / "train.jsonl", ["What is 7*8?", strange])
    heldout, index = write(tmp_path / "held.jsonl", [ASKED]), str(tmp_path / "kept.jsonl")
    settings = config.load(QUICKSTART, [f"problems.train={train}", f"problems.heldout={heldout}"])
    dedup.run(settings, [], index, share=0.6, size=5)
    assert [p.id for p in read(ProblemsConfig(train, heldout, kept=index), "train", tuple, told)] == ["train:1"]


def test_an_index_that_is_missing_or_damaged_is_refused(tmp_path):
    train, index = write(tmp_path / "t.jsonl", ["What is 7*8?"]), tmp_path / "kept.jsonl"
    using = ProblemsConfig(train, kept=str(index))
    with pytest.raises(UserError, match=r"problems\.kept: .*no such file; write it with `mpd-jax dedup CONFIG --out"):
        read(using, "train", tuple, told)
    for text in ("", "[]", '{"kept": 2, "left_out": 0}\n00\n', '{"kept": 1, "left_out": 0}\nxyz\n', '{"kept": 0}\n'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"problems\.kept: .*no index"):
            read(using, "train", tuple, told)


@pytest.mark.parametrize(
    ("share", "size", "said"), [(0.0, 5, "--share: 0.0"), (1.1, 5, "--share"), (0.5, 0, "--size: 0")]
)
def test_limits_that_make_no_sense_are_refused(share, size, said, tmp_path):
    with pytest.raises(UserError, match=said):
        dedup.run(config.load(QUICKSTART), [], str(tmp_path / "x"), share, size)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(dedup.build, "read_problems", lambda *_: pytest.fail("it was read"))
    (tmp_path / "file").write_text("")
    for out, said in ((tmp_path, "is a directory"), (tmp_path / "file" / "x", "cannot be made")):
        with pytest.raises(UserError, match=f"--out: .*{said}"):
            dedup.run(config.load(QUICKSTART), [], str(out), 0.6, 5)
