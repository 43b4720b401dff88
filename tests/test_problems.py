"""Claims about problem sets: order is a function of (seed, step); files are read whole or refused by place."""

import json
from pathlib import Path

import pytest

from mpd_jax import build
from mpd_jax.data import order
from mpd_jax.data.order import ProblemSet
from mpd_jax.data.problems import ProblemsConfig, Source, read, read_file, refuse_overlap
from mpd_jax.data.store import Problems
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


def test_an_epoch_is_shuffled_once_and_not_at_every_step(monkeypatch):
    shuffled, made = [], order.Order._shuffled
    monkeypatch.setattr(order.Order, "_shuffled", lambda self, epoch: shuffled.append(epoch) or made(self, epoch))
    problems = problem_set(60, 6, seed=77)
    assert len({p.id for step in range(10) for p in problems.at(step)}) == 60 and shuffled == [0]


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
    assert read_file(path, COLUMNS) == (
        Problem("test/a.json", "What is $1+1$?", "2", "So \\boxed{2}.", "2"),
        Problem("test/b.json", "Ünïcode  line?", "3", "So \\boxed{3}.", "1"),
    )


def test_a_whole_benchmark_loads_with_mapped_columns(tmp_path):
    """MATH-500 where it lies beside the repository, else rows of its form."""
    full = Path(__file__).parents[2] / "shared/data/math500.jsonl"
    path, count = (full, 500) if full.is_file() else (write(tmp_path / "math.jsonl", MATH), len(MATH))
    problems = read_file(path, COLUMNS)
    assert len(problems) == count and all(p.question and p.answer and p.response for p in problems)


def test_fields_are_read_from_columns_of_their_own_names(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"question": "q"}, "", {"question": "r", "answer": None}])
    assert read_file(path) == (Problem("own:1", "q"), Problem("own:3", "r"))


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
        ([{"question": "q", "id": 1}, {"question": "r", "id": 1}], None, r"line 2: id '1' stands in line 1 too"),
        ([], None, r"holds no problems"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_line_and_column(tmp_path, rows, columns, message):
    with pytest.raises(UserError, match=message):
        read_file(write(tmp_path / "bad.jsonl", rows), columns)


def test_missing_and_undecodable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        read_file(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xfc"}')
    with pytest.raises(UserError, match=r"latin\.jsonl: not UTF-8 at byte 14"):
        read_file(tmp_path / "latin.jsonl")


def test_an_unknown_field_is_refused():
    with pytest.raises(
        UserError, match=r"problems\.columns\.problem: .* id, question, answer, response, level, subject"
    ):
        ProblemsConfig(columns={"problem": "question"})


def test_heldout_problems_that_are_trained_on_are_refused():
    train = [Problem("t", "What is  1+1?")]
    refuse_overlap(train, [Problem("h", "What is 1+2?")])
    with pytest.raises(UserError, match=r"1 problems are in problems\.train too .*'h', there 't'"):
        refuse_overlap(train, [Problem("h", "What is 1+1? ")])


def told(message: str) -> None:
    """For what is said while a set is read."""


def of(config: ProblemsConfig, split="train") -> Problems:
    return read(config, split, lambda: [Problem(f"t{i}", f"tiny {i}?") for i in range(40)], told)


def test_the_heldout_file_may_name_its_columns_otherwise(tmp_path):
    train, heldout = write(tmp_path / "a.jsonl", [{"q": "1?"}]), write(tmp_path / "b.jsonl", [{"problem": "2?"}])
    config = ProblemsConfig(train, heldout, {"question": "q"}, {"question": "problem"})
    assert [of(config, split)[0].question for split in ("train", "heldout")] == ["1?", "2?"]
    assert of(ProblemsConfig(train, train, {"question": "q"}), "heldout")[0].question == "1?"
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: no column 'p'.*problems\.heldout_columns\.question"):
        of(ProblemsConfig(train, heldout, {"question": "q"}, {"question": "p"}), "heldout")
    with pytest.raises(UserError, match=r"problems\.heldout_columns\.text: no such field"):
        ProblemsConfig(heldout_columns={"text": "q"})


def test_a_file_from_windows_is_read_and_text_that_is_none_is_refused_by_place(tmp_path):
    path = write(tmp_path / "bom.jsonl", ["\ufeff" + json.dumps({"question": "1+1?"})])
    assert [problem.question for problem in read_file(path)] == ["1+1?"]
    for line, told in (
        ('{"question": "Leo \\ud800 has"}', "line 1, column 'question': half a surrogate pair"),
        ('{"question": ' + "9" * 5000 + "}", "line 1: cannot be read"),
        ("[" * 20_000, "line 1"),
    ):
        with pytest.raises(UserError, match=told):
            read_file(write(tmp_path / "odd.jsonl", [line]))


CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "So 2."}]


def test_a_question_may_be_a_chat_and_columns_may_lie_deep(tmp_path):
    rows = [{"messages": CHAT, "info": {"gold": ["2"]}}, {"messages": CHAT[:1], "info": {"gold": [2]}}]
    found = read_file(write(tmp_path / "c.jsonl", rows), {"answer": "info.gold.0"})
    assert found == (Problem("c:1", "1+1?", "2", "So 2."), Problem("c:2", "1+1?", "2"))
    for turns, said in (
        ([{"role": "system", "content": "Be brief."}, *CHAT], "roles 'system', 'user', 'assistant'"),
        ([{"role": "user", "content": ["1+1?"]}], "line 1, column 'messages': list, not text"),
        ([{"role": "user", "content": " "}], "line 1, column 'question': empty"),
    ):
        with pytest.raises(UserError, match=said):
            read_file(write(tmp_path / "d.jsonl", [{"messages": turns}]))


def test_level_and_subject_are_read_and_columns_of_such_names_that_hold_no_text_are_another_thing(tmp_path):
    path = write(tmp_path / "l.jsonl", [{"question": "q", "level": 3, "subject": ["Algebra"]}])
    assert read_file(path) == (Problem("l:1", "q", level="3"),)
    with pytest.raises(UserError, match="line 1, column 'subject': list, not text"):
        read_file(path, {"subject": "subject"})


def test_what_is_left_out_of_training_is_told_and_what_is_held_out_is_whole(tmp_path):
    rows = [{"question": q} for q in ("one?", "o?", "one  ?", "a very long one?")] + [
        {"question": "x", "dropped": True}
    ]
    path = write(tmp_path / "f.jsonl", rows)
    config = ProblemsConfig(
        "mine", "mine", lengths={"question": (3, 10)}, sources={"mine": Source(path, repeats="drop")}
    )
    found = of(config)
    assert [p.question for p in found] == ["one?", "one  ?"]
    assert found.report[0].startswith(f"problems.train: {path}: 2 problems, content ")
    for part in (
        "; left out 1 with question under the 3 to 10 characters (the first: f:2)",
        "; left out 1 with question over the 3 to 10 characters (the first: f:4)",
        f"; left out 1 given up by a rewrite (the first: problems: {path}, line 5)",
    ):
        assert part in found.report[0]
    assert len(of(config, "heldout")) == 4
    again = write(tmp_path / "g.jsonl", [{"question": "one?", "id": 1}, {"question": " one?", "id": 1}])
    found = of(ProblemsConfig("mine", sources={"mine": Source(again, repeats="drop")}))
    assert [p.id for p in found] == ["1"] and "left out 1 asking the same as one before" in found.report[0]
    with pytest.raises(UserError, match=r"it holds no problems; left out 4 with question under"):
        of(ProblemsConfig(path, lengths={"question": (50, 60)}))


def test_the_parts_of_a_set_share_no_question_and_leave_none_out(tmp_path):
    rows = [{"question": f"{i // 2}?"} for i in range(400)]  # each is asked twice
    path = write(tmp_path / "s.jsonl", rows)
    config = ProblemsConfig("a", "b", sources={"a": Source(path, part=(0, 0.8)), "b": Source(path, part=(0.8, 1))})
    train, heldout = of(config), of(config, "heldout")
    refuse_overlap(train, heldout)
    assert len(train) + len(heldout) == 400 and 280 < len(train) < 360
    assert f"left out {len(heldout)} of the other part" in train.report[0]
    with pytest.raises(UserError, match=r"problems\.sources\.a\.part: \[0\.5, 0\.5\] is not allowed"):
        ProblemsConfig(sources={"a": Source(path, part=(0.5, 0.5))})


def test_a_source_may_be_called_tiny(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"question": "mine?"}])
    config = ProblemsConfig(sources={"tiny": Source(path)})
    assert [p.question for p in build.read_problems(config, "train")] == ["mine?"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_temporary_directory_is_told_with_what_to_change(monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(UserError, match=r"temporary directory .*No space left on device.*TMPDIR"):
        Problems().add(Problem("x", "q"))


def test_a_pinned_content_is_checked_whatever_file_it_came_from(tmp_path):
    rows = [{"question": "1+1?", "answer": "2"}]
    content = of(ProblemsConfig(write(tmp_path / "a.jsonl", rows))).parts[0].content
    pinned = Source(write(tmp_path / "b.jsonl", [{"id": "x", **rows[0]}]), content=content)
    assert len(of(ProblemsConfig("mine", sources={"mine": pinned}))) == 1
    write(tmp_path / "b.jsonl", [{"question": "1+1?", "answer": "3"}])
    with pytest.raises(UserError, match=rf"problems\.sources\.mine\.content: it is \w+ and not {content}"):
        of(ProblemsConfig("mine", sources={"mine": pinned}))


def mixture(tmp_path, weights, sizes=(60, 40)) -> ProblemsConfig:
    """Two sources, one of them the 40 of `of`; the other's ids are those too."""
    path = write(tmp_path / "m.jsonl", [{"question": f"{i}?", "id": f"t{i}"} for i in range(sizes[0])])
    return ProblemsConfig(
        ("mine", "tiny"), sources={"mine": Source(path, weight=weights[0]), "tiny": Source("tiny", weight=weights[1])}
    )


@pytest.mark.parametrize(("weights", "batch"), [((3, 1), 8), ((0.9, 0.1), 8), ((1, 1), 5), ((2, 1), 10)])
def test_sources_are_mixed_by_weight_and_every_step_is_a_function_of_seed_and_number(tmp_path, weights, batch):
    problems = of(mixture(tmp_path, weights))
    assert len(problems) == 100 and len({p.id for p in problems}) == 100
    dealt, steps = ProblemSet(problems, 0, batch), 240
    ids = [[p.id for p in dealt.at(step)] for step in range(steps)]
    assert all(len(set(step)) == batch for step in ids)
    mine = [i for step in ids for i in step if i.startswith("mine:")]
    assert len(mine) / (steps * batch) == pytest.approx(weights[0] / sum(weights), rel=0.011)
    assert dealt.shares["mine"] == pytest.approx(weights[0] / sum(weights), rel=0.01)
    for epoch in range(len(mine) // 60):
        assert len(set(mine[epoch * 60 : epoch * 60 + 60])) == 60
    again = ProblemSet(of(mixture(tmp_path, weights)), 0, batch)
    assert [[p.id for p in again.at(step)] for step in reversed(range(steps))] == ids[::-1]
    assert [p.id for p in ProblemSet(problems, 1, batch).at(0)] != ids[0]


def test_one_source_is_dealt_as_ever_and_a_mixture_that_no_step_can_hold_is_refused(tmp_path):
    path = write(tmp_path / "o.jsonl", [{"question": f"{i}?", "id": f"p{i}"} for i in range(8)])
    assert [p.id for p in ProblemSet(read_file(path), 7, 8).at(0)] == ["p4", "p1", "p6", "p3", "p2", "p7", "p5", "p0"]
    with pytest.raises(UserError, match=r"problems\.train: mine 0\.01% of the weight and 60 problems, tiny 99\.99%"):
        ProblemSet(of(mixture(tmp_path, (1, 9999))), 0, 8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": ("mine", "a/b.jsonl")}, r"problems\.train: 'a/b\.jsonl' in a list needs a name"),
        ({"train": ()}, r"problems\.train: \(\) is not allowed"),
        ({"train": ("tiny", "tiny")}, r"give a set, or a list of different ones"),
        ({"lengths": {"words": (1, 2)}}, r"problems\.lengths\.words: no such field"),
        ({"lengths": {"question": (3, 2)}}, r"problems\.lengths\.question: \[3, 2\] holds nothing"),
        ({"sources": {"x": Source("a.jsonl", weight=0)}}, r"problems\.sources\.x\.weight: 0 is not allowed"),
        (
            {"sources": {"x": Source("a.jsonl", weight=float("inf"))}},
            r"problems\.sources\.x\.weight: inf is not allowed",
        ),
        (
            {"sources": {"x": Source("a.jsonl", revision="0" * 40)}},
            r"problems\.sources\.x\.revision: .* not for a\.jsonl",
        ),
        ({"sources": {"x": Source("tfds:a", subset="b")}}, r"problems\.sources\.x\.subset: 'b' is for a hf: set"),
        (
            {"sources": {"x": Source("math500", columns={"id": "n"})}},
            r"problems\.sources\.x\.columns: .* no ready name",
        ),
        ({"sources": {"x": Source("a.jsonl", columns={"text": "n"})}}, r"problems\.sources\.x\.columns\.text: no such"),
    ],
)
def test_what_could_have_no_effect_is_refused_with_its_key(settings, said):
    with pytest.raises(UserError, match=said):
        ProblemsConfig(**{"sources": {"mine": Source("a.jsonl")}, **settings})
