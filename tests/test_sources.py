"""Claims about readers: the same rows are the same problems in every form, and what cannot be read is told by place."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from mpd_jax.data import sources
from mpd_jax.data.problems import ProblemsConfig, Source, read, read_file
from mpd_jax.data.store import Problems
from mpd_jax.types import Problem, UserError
from tests import tfds_files

HERE = Path(__file__).parent
PREPARED = HERE / "data/tfds"  # ten problems, written by tests/tfds_files.py
TEN = HERE / "data/ten.jsonl"  # the same
MATH500 = Path(__file__).parents[2] / "shared/data/math500.jsonl"
COLUMNS = {"question": "problem", "response": "solution", "id": "unique_id"}


def told(message: str) -> None:
    """For what is said while a set is read."""


def of(source: Source, split="train", **settings) -> Problems:
    return read(ProblemsConfig("set", "set", sources={"set": source}, **settings), split, tuple, told)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole() -> tuple[Path, list[dict], dict[str, str]]:
    """MATH-500 where it lies beside the repository, else the ten problems; its rows; its columns."""
    return (MATH500, rows_of(MATH500), COLUMNS) if MATH500.is_file() else (TEN, rows_of(TEN), {})


def test_parquet_holds_the_same_problems_in_the_same_order(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, rows, columns = whole()
    for name, part in (("one.parquet", rows), ("many/a.parquet", rows[:7]), ("many/b.parquet", rows[7:])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet.write_table(arrow.Table.from_pylist(part), tmp_path / name, row_group_size=3)
    expected = read_file(path, columns)
    assert read_file(tmp_path / "one.parquet", columns) == expected
    assert read_file(tmp_path / "many", columns) == expected
    # Without ids they are numbered through, as the lines of one file are.
    columns = {field: column for field, column in columns.items() if field != "id"}
    lines = tmp_path / "many.jsonl"
    lines.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "id"}) + "\n" for row in rows))
    assert [p.id for p in read_file(lines, columns)][-1] == f"many:{len(rows)}"
    for file in (tmp_path / "many").iterdir():
        parquet.write_table(parquet.read_table(file).select([c for c in rows[0] if c != "id"]), file)
    assert read_file(tmp_path / "many", columns) == read_file(lines, columns)


def test_a_dataset_of_hugging_face_holds_the_same_problems_in_the_same_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    path, rows, columns = whole()
    expected = read_file(path, columns)
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "splits")
    assert of(Source(f"hf:{tmp_path}/saved", columns=columns)) == expected
    assert of(Source(f"hf:{tmp_path}/splits", split="train", columns=columns)) == expected
    assert of(Source(f"hf:{tmp_path}/splits", split="test", columns=columns)) == expected[:1]
    for source, said in (
        (Source(f"hf:{tmp_path}/splits"), r"split = None is none of its splits; choose one of train, test"),
        (Source(f"hf:{tmp_path}/saved", split="train"), r"it has no splits; remove split = 'train'"),
        (Source(f"hf:{tmp_path}/saved", columns={"question": "none"}), r"saved, row 1: no column 'none'; it has '"),
        (Source(f"hf:{tmp_path}/saved", revision="0" * 40), r"a directory has no revision"),
        (Source(f"hf:{tmp_path}/absent"), r"no such directory, and no id of the hub"),
        (Source("hf:owner/name"), r"revision = None is not 40 hexadecimal digits"),
        (Source("hf:owner/name", revision="main"), r"revision = 'main' is not 40 hexadecimal digits"),
    ):
        with pytest.raises(UserError, match=said):
            of(source)


def test_a_directory_of_data_files_is_a_dataset_of_hugging_face_too(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train.jsonl").write_text(TEN.read_text())
    assert of(Source(f"hf:{tmp_path}/files")) == read_file(TEN)


def test_a_set_of_the_hub_that_is_not_here_is_told_with_the_command_that_fetches_it(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError) as caught:
        of(Source("hf:owner/name", revision="0" * 40))
    assert f"hf download owner/name --repo-type dataset --revision {'0' * 40} --local-dir name" in str(caught.value)


def test_tfds_holds_the_same_problems_in_the_same_order_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    expected = read_file(TEN)
    assert len(expected) == 10 and all(p.answer and p.response and p.level for p in expected)
    for name in ("tfds:ten", "tfds:ten:1.0.0"):
        assert of(Source(name, split="train"), tfds=str(PREPARED)) == expected
    assert of(Source("tfds:ten"), tfds=str(PREPARED)) == expected
    path, rows, columns = whole()
    tfds_files.write(tmp_path, "whole", rows)
    assert of(Source("tfds:whole", columns=columns), tfds=str(tmp_path)) == read_file(path, columns)
    assert "tensorflow" not in sys.modules
    for source, said in (
        (Source("tfds:ten", split="test"), r"split = 'test' is none of its splits; choose one of train"),
        (Source("tfds:ten", columns={"answer": "gold"}), r"tfds:ten, row 1: no column 'gold'; it has '"),
        (
            Source("tfds:absent_set"),
            r"tfds:absent_set: .*prepared where TensorFlow is installed: python -c .*file_format='array_record'",
        ),
        (Source("tfds:math_qa"), r"tfds:math_qa: .*not prepared here\. It is read here, and prepared where Tensor"),
    ):
        with pytest.raises(UserError, match=said):
            of(source, tfds=str(PREPARED))


def test_a_csv_file_is_read_and_a_row_of_another_form_is_told_by_line(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('question,answer\n"What, and\nhow?",2\n1+1?,\n')
    assert read_file(path) == (Problem("c:1", "What, and\nhow?", "2"), Problem("c:2", "1+1?", ""))
    for text, said in (
        ("question,answer\na,b,c\n", r"c\.csv, line 2: other columns than the first line names"),
        ("question,answer\na,b\nc\n", r"c\.csv, line 3: other columns"),
        ("question,id,id\na,b,c\n", r"c\.csv, line 1: two columns of one name"),
        ('question\n"a" b\n', r"c\.csv, row 1: no UTF-8 text with commas between"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_file(path)


def test_a_directory_is_read_by_name_and_numbered_through(tmp_path):
    for name, text in (("b.jsonl", '{"question": "3?"}\n'), ("a.jsonl", '{"question": "1?"}\n\n{"question": "2?"}\n')):
        (tmp_path / name).write_text(text)
    name = tmp_path.name
    assert [(p.id, p.question) for p in read_file(tmp_path)] == [
        (f"{name}:1", "1?"),
        (f"{name}:3", "2?"),
        (f"{name}:4", "3?"),
    ]
    (tmp_path / "b.jsonl").write_text('{"question": 3')
    with pytest.raises(UserError, match=r"b\.jsonl, line 1, character 15: not JSON"):
        read_file(tmp_path)
    (tmp_path / "c.csv").write_text("question\n")
    with pytest.raises(UserError, match=r"files of several kinds \(a\.jsonl, c\.csv\)"):
        read_file(tmp_path)


def test_what_is_no_parquet_and_a_column_of_a_wrong_type_are_told_by_place(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    path.write_bytes(b"none")
    with pytest.raises(UserError, match=r"p\.parquet: not a Parquet file"):
        read_file(path)
    for rows, columns, said in (
        ([{"question": "a"}, {"question": None}], {}, r"p\.parquet, row 2, column 'question': NoneType, not text"),
        ([{"question": [1]}], {}, r"p\.parquet, row 1, column 'question': list, not text"),
        ([{"q": "a", "b": "c"}], {}, r"p\.parquet, row 1: no column 'question'; it has 'q', 'b'"),
        ([{"question": "a", "b": "c"}], {"answer": "d"}, r"no column 'd'; it has 'question', 'b': .*columns\.answer"),
    ):
        parquet.write_table(arrow.Table.from_pylist(rows), path)
        with pytest.raises(UserError, match=said):
            read_file(path, columns)
    chat = {"messages": [{"role": "user", "content": "1+1?"}], "info": {"gold": "2"}, "other": b"\xff"}
    parquet.write_table(arrow.Table.from_pylist([chat]), path)
    assert read_file(path, {"answer": "info.gold"}) == (Problem("p:1", "1+1?", "2"),)


def test_a_missing_number_is_no_answer():
    """pandas writes one as NaN, beside which whole numbers become decimals."""
    from mpd_jax.data.rows import problem

    row = {"question": "1+1?", "answer": math.nan, "level": math.nan, "id": math.nan}
    assert problem(row, {"level": "level"}, "row 1", "x", "columns") == Problem("x", "1+1?")
    with pytest.raises(UserError, match="row 1, column 'question': NoneType, not text"):
        problem({"question": math.nan}, {}, "row 1", "x", "columns")


def test_a_set_of_tfds_whose_code_would_be_fetched_is_refused(monkeypatch):
    monkeypatch.setattr(sources, "needed", lambda *_: pytest.fail("it was looked for"))
    for name in ("kaggle:my_set", "huggingface:gsm8k/main", "my-space:set:1.0.0"):
        with pytest.raises(UserError, match=rf"problems: tfds:{name}: sets of a namespace are not read"):
            of(Source(f"tfds:{name}"))


def test_bytes_are_text_or_refused_by_place():
    from mpd_jax.data.rows import problem

    assert problem({"question": "é".encode()}, {}, "row 1", "x", "columns").question == "é"
    with pytest.raises(UserError, match="row 1, column 'question': not UTF-8 at byte 1"):
        problem({"question": b"a\xff"}, {}, "row 1", "x", "columns")


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("x.parquet", "pyarrow"),
        (f"hf:{HERE}/data", "datasets"),
        ("tfds:ten", "array_record"),
        ("tfds:ten", "tensorflow_datasets"),
    ],
)
def test_a_missing_extra_is_told_with_what_to_install(source, missing, tmp_path, monkeypatch):
    imported = importlib.import_module

    def without(name):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return imported("json") if name == "array_record" else imported(name)

    monkeypatch.setattr(sources.importlib, "import_module", without)
    (tmp_path / "x.parquet").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"needs {missing}: pip install 'mpd-jax\[data\]'"):
        of(Source(source))
