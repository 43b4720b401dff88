"""Claims about problem sets: order is a function of (seed, step); files are read whole or refused by place."""

import json
from pathlib import Path

import pytest

from mpd_jax.data.problems import ProblemsConfig, ProblemSet, read, read_jsonl, refuse_overlap
from mpd_jax.types import Problem, UserError


def problem_set(size: int, batch: int, seed: int = 0) -> ProblemSet:
    return ProblemSet(tuple(Problem(f"p{i}", f"q{i}") for i in range(size)), seed, batch)


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (7, 3), (5, 5), (7, 4), (5, 4), (9, 1)])
def test_every_problem_comes_once_an_epoch_and_a_step_never_repeats_one(size, batch):
    problems = problem_set(size, batch)
    steps = 6 * size
    dealt = [p.id for step in range(steps) for p in problems.at(step)]
    for epoch in range(len(dealt) // size):
        assert len(set(dealt[epoch * size : (epoch + 1) * size])) == size
    assert all(len({p.id for p in problems.at(step)}) == batch for step in range(steps))


def test_the_problems_of_a_step_need_no_history():
    running = [problem_set(10, 4).at(step) for step in range(30)]
    assert [problem_set(10, 4).at(step) for step in reversed(range(30))] == running[::-1]


def test_seed_and_epoch_change_the_order():
    one, other = problem_set(50, 50), problem_set(50, 50, seed=1)
    assert one.at(0) != other.at(0) and one.at(0) != one.at(1)


def test_the_order_is_the_same_on_every_machine():
    """Recorded: a run resumed under another numpy must not see other problems."""
    assert [p.id for p in problem_set(8, 8, seed=7).at(0)] == ["p4", "p1", "p6", "p3", "p2", "p7", "p5", "p0"]


@pytest.mark.parametrize("batch", [0, 6])
def test_a_step_larger_than_the_set_is_refused(batch):
    with pytest.raises(UserError, match=r"train\.batch_size: .* holds 5"):
        problem_set(5, batch)


MATH = [
    {"problem": "What is $1+1$?", "solution": "So \\boxed{2}.", "answer": "2", "unique_id": "test/a.json", "level": 2},
    {"problem": "Ünïcode  line?", "solution": "So \\boxed{3}.", "answer": 3, "unique_id": "test/b.json", "level": 1},
]
COLUMNS = {"question": "problem", "response": "solution", "id": "unique_id"}


def write(path, rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_columns_are_mapped_and_others_left_alone(tmp_path):
    path = write(tmp_path / "math.jsonl", [*MATH, ""])
    assert read_jsonl(path, COLUMNS) == (
        Problem("test/a.json", "What is $1+1$?", "2", "So \\boxed{2}."),
        Problem("test/b.json", "Ünïcode  line?", "3", "So \\boxed{3}."),
    )


def test_a_whole_benchmark_loads_with_mapped_columns(tmp_path):
    """MATH-500 where it lies beside the repository, else rows of its form."""
    full = Path(__file__).parents[2] / "shared/data/math500.jsonl"
    path, count = (full, 500) if full.is_file() else (write(tmp_path / "math.jsonl", MATH), len(MATH))
    problems = read_jsonl(path, COLUMNS)
    assert len(problems) == count and all(p.question and p.answer and p.response for p in problems)


def test_fields_are_read_from_columns_of_their_own_names(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"question": "q"}, "", {"question": "r", "answer": None}])
    assert read_jsonl(path) == (Problem("own:1", "q"), Problem("own:3", "r"))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"question": "q"}, '{"question": '], None, r"bad\.jsonl, line 2, character 14: not JSON"),
        ([[1, 2]], None, r"line 1: list, not an object"),
        ([MATH[0]], None, r"line 1: no column 'question'; it has 'problem', .*problems\.columns\.question"),
        ([MATH[0]], {**COLUMNS, "answer": "solved"}, r"line 1: no column 'solved'.*problems\.columns\.answer"),
        ([{"question": ["q"]}], None, r"line 1, column 'question': list, not text"),
        ([{"question": None}], None, r"line 1, column 'question': NoneType, not text"),
        ([{"question": "q", "answer": True}], None, r"line 1, column 'answer': bool, not text"),
        ([{"question": " "}], None, r"line 1, column 'question': empty"),
        ([{"question": "q", "id": 1}, {"question": "r", "id": 1}], None, r"line 2, column 'id': '1' stands in line 1"),
        ([], None, r"holds no problems"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_line_and_column(tmp_path, rows, columns, message):
    with pytest.raises(UserError, match=message):
        read_jsonl(write(tmp_path / "bad.jsonl", rows), columns)


def test_missing_and_undecodable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xfc"}')
    with pytest.raises(UserError, match=r"latin\.jsonl: not UTF-8 at byte 14"):
        read_jsonl(tmp_path / "latin.jsonl")


def test_an_unknown_field_is_refused():
    with pytest.raises(UserError, match=r"problems\.columns\.problem: .* id, question, answer, response"):
        ProblemsConfig(columns={"problem": "question"})


def test_heldout_problems_that_are_trained_on_are_refused():
    train = [Problem("t", "What is  1+1?")]
    refuse_overlap(train, [Problem("h", "What is 1+2?")])
    with pytest.raises(UserError, match=r"1 problems are in problems\.train too .*'h', there 't'"):
        refuse_overlap(train, [Problem("h", "What is 1+1? ")])


def test_the_heldout_file_may_name_its_columns_otherwise(tmp_path):
    train, heldout = write(tmp_path / "a.jsonl", [{"q": "1?"}]), write(tmp_path / "b.jsonl", [{"problem": "2?"}])
    config = ProblemsConfig(train, heldout, {"question": "q"}, {"question": "problem"})
    assert [read(config, split)[0].question for split in ("train", "heldout")] == ["1?", "2?"]
    assert read(ProblemsConfig(train, train, {"question": "q"}), "heldout")[0].question == "1?"
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: no column 'p'.*problems\.heldout_columns\.question"):
        read(ProblemsConfig(train, heldout, {"question": "q"}, {"question": "p"}), "heldout")
    with pytest.raises(UserError, match=r"problems\.heldout_columns\.text: no such field"):
        ProblemsConfig(heldout_columns={"text": "q"})


def test_a_file_from_windows_is_read_and_text_that_is_none_is_refused_by_place(tmp_path):
    path = write(tmp_path / "bom.jsonl", ["\ufeff" + json.dumps({"question": "1+1?"})])
    assert [problem.question for problem in read_jsonl(path)] == ["1+1?"]
    for line, told in (
        ('{"question": "Leo \\ud800 has"}', "line 1, column 'question': half a surrogate pair"),
        ('{"question": ' + "9" * 5000 + "}", "line 1: cannot be read"),
        ("[" * 20_000, "line 1"),
    ):
        with pytest.raises(UserError, match=told):
            read_jsonl(write(tmp_path / "odd.jsonl", [line]))
