"""Rows of a data set, in the order in which they are stored: JSON Lines, Parquet and CSV files, here or at gs://,
Hugging Face datasets, and tensorflow-datasets without TensorFlow.

Each reader yields (number from 1 on, place for messages, row). No code of a data set is run. Not here: what the columns
mean (rows.py), and the sets that are known by name (catalog.py).
"""

import csv
import importlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from mpd_jax import files
from mpd_jax.data.rows import DROPPED, FIELDS, MESSAGES
from mpd_jax.files import AnyPath
from mpd_jax.models.locate import COMMIT, HUB_ID
from mpd_jax.types import UserError

Row = tuple[int, str, Mapping[str, Any]]
HUB, TFDS = "hf:", "tfds:"
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
BATCH = 4096  # rows that are decoded at a time


def needed(module: str, what: str) -> Any:
    """A module of the extra `data`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise UserError(f"{what} needs {error.name}: pip install 'mpd-jax[data]'") from None


def of_files(paths: Iterable[AnyPath], named: Mapping[str, str]) -> Iterator[Row]:
    """The rows of files, one after the other; what is numbered goes on from each to the next.

    named: the columns of the fields that are not in columns of their own names.
    """
    first = 0
    for path in paths:
        reader = {".parquet": _parquet, ".csv": _csv}.get(path.suffix)
        last = 0
        with files.reading(path):
            for last, place, row in reader(path, named) if reader else _jsonl(path):
                yield first + last, place, row
        first += last


def listed(address: str) -> list[AnyPath]:
    """The file at an address, or those of one kind in a directory, by name."""
    path = files.path(address)
    if files.is_file(path):
        return [path]
    with files.reading(path):
        found = sorted(p for p in path.glob("*") if p.suffix in SUFFIXES) if path.is_dir() else []
    if len({p.suffix for p in found}) > 1:
        raise UserError(f"problems: {path}: files of several kinds ({found[0].name}, {found[-1].name}); name one file")
    return found


def _jsonl(path: AnyPath) -> Iterator[Row]:
    with path.open("rb") as file:
        start = 0  # where the line begins, in bytes
        for number, line in enumerate(file, start=1):
            place = f"problems: {path}, line {number}"
            try:
                row = from_json(line)  # three times as fast as json, and no word on where the error is
            except ValueError:
                row = None
            if type(row) is not dict:
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"problems: {path}: not UTF-8 at byte {start + error.start}; store the file as UTF-8"
                    ) from None
                row = _object(text, place) if text.strip() else None
            start += len(line)
            if row is not None:
                yield number, place, row


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}, character {error.colno}: not JSON ({error.msg}); write one object a line") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: cannot be read ({error}); write one plain object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: {type(row).__name__}, not an object; write one object a line")
    return row


def _csv(path: AnyPath, named: Mapping[str, str]) -> Iterator[Row]:
    with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        number = 0
        try:
            if len(names := reader.fieldnames or ()) > len(set(names)):
                raise UserError(f"problems: {path}, line 1: two columns of one name; rename one of them")
            for number, row in enumerate(reader, start=1):
                place = f"problems: {path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{place}: other columns than the first line names; quote what holds a comma")
                yield number, place, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"problems: {path}, row {number + 1}: no UTF-8 text with commas between ({error})"
            ) from None


def _parquet(path: AnyPath, named: Mapping[str, str]) -> Iterator[Row]:
    parquet, arrow = needed("pyarrow.parquet", f"problems: {path}: Parquet"), needed("pyarrow", "Parquet")
    with path.open("rb") as opened:
        try:
            # Read as it is used: a file may be one group of a million rows.
            file = parquet.ParquetFile(opened, pre_buffer=False, buffer_size=2**20)
        except arrow.ArrowInvalid as error:
            raise UserError(f"problems: {path}: not a Parquet file ({error}); write it anew") from None
        names = file.schema_arrow.names
        number = 0
        try:
            for batch in file.iter_batches(BATCH, columns=_among(names, named), use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"problems: {path}, row {number}", row
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"problems: {path}, after row {number}: damaged ({error}); copy it again") from None


def _among(names: Sequence[str], named: Mapping[str, str]) -> list[str]:
    """Those of a set's columns that are looked at; all of them where one is missing, for the message that follows."""
    asked = MESSAGES if "question" not in names and MESSAGES in names else "question"
    roots = {field: column if column in names else column.split(".")[0] for field, column in named.items()}
    if not {roots.get("question", asked), *roots.values()} <= set(names):
        return list(names)
    wanted = {DROPPED, asked, *(roots.get(field, field) for field in FIELDS)}
    return [name for name in names if name in wanted]


def of_hub(
    name: str, subset: str | None, revision: str | None, split: str | None, named: Mapping[str, str]
) -> Iterator[Row]:
    """A set of the Hugging Face hub at a commit, or a local directory: as `save_to_disk` wrote it, or of data files."""
    datasets = needed("datasets", f"problems: {HUB}{name}")
    what, local = f"problems: {HUB}{name}", files.path(name).is_dir()
    if local and revision:
        raise UserError(f"{what}: a directory has no revision; remove revision = {revision!r}")
    if not local and not HUB_ID.fullmatch(name):
        raise UserError(f"{what}: no such directory, and no id of the hub; give a directory, or owner/name")
    if not local and not (revision and COMMIT.fullmatch(revision)):
        raise UserError(
            f"{what}: revision = {revision!r} is not 40 hexadecimal digits, and a set of the hub is pinned to its "
            f"commit; take it from https://huggingface.co/datasets/{name}/commits/main"
        )
    try:
        if local and any((files.path(name) / head).is_file() for head in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, subset, revision=revision)
    except Exception as error:  # the library's own, the hub's, and those of each file format
        raise UserError(
            f"{what}: {_first_line(error)}. If the set is not here, run where the hub can be reached: hf "
            f"download {name} --repo-type dataset --revision {revision} --local-dir {name.split('/')[-1]}; bring the "
            f"directory here, and read {HUB}{name.split('/')[-1]}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        found = found[_split(split, list(found), what)]
    elif split is not None:
        raise UserError(f"{what}: it has no splits; remove split = {split!r}")
    found = found.select_columns(_among(found.column_names, named))
    for number, row in enumerate(found, start=1):
        yield number, f"{what}, row {number}", row


def _split(split: str | None, known: Sequence[str], what: str) -> str:
    if split in known:
        return str(split)
    if split is None and len(known) == 1:
        return known[0]
    raise UserError(f"{what}: split = {split!r} is none of its splits; choose one of {', '.join(known)}")


def of_tfds(name: str, split: str | None, directory: str | None) -> Iterator[Row]:
    """A set that tensorflow-datasets prepared as array_record, under `directory` or where it keeps them all."""
    what = f"problems: {TFDS}{name}"
    if re.match(r"[\w-]+:(?!\d)", name):  # tensorflow-datasets would fetch the code of such a one, and run it
        raise UserError(f"{what}: sets of a namespace are not read; prepare it, and give its name, as tfds:name")
    needed("array_record", what)
    tfds = needed("tensorflow_datasets", what)
    try:
        splits = list(tfds.builder(name, data_dir=directory).info.splits)
        if not splits:
            raise FileNotFoundError("known to tensorflow-datasets, and not prepared here")
        found = tfds.data_source(name, split=_split(split, splits, what), data_dir=directory, download=False)
        count = len(found)
    except UserError:
        raise
    except Exception as error:  # it has a different one for each thing that is missing
        raise UserError(
            f"{what}: {_first_line(error)}. It is read here, and prepared where TensorFlow is installed: "
            f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', file_format='array_record')"
            f'.download_and_prepare()"; bring its directory here, to {directory or "~/tensorflow_datasets"}'
        ) from error
    for number in range(1, count + 1):
        yield number, f"{what}, row {number}", _plain(found[number - 1])


def _first_line(error: Exception) -> str:
    """Some go on with the names of all the sets that there are."""
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0].rstrip('.')}"


def _plain(value: Any) -> Any:
    """numpy's values as Python's; turns of a chat, which come as one array a key, as a list of turns."""
    if isinstance(value, Mapping):
        row = {key: _plain(inner) for key, inner in value.items()}
        if {"role", "content"} <= row.keys() and all(isinstance(column, list) for column in row.values()):
            return [dict(zip(row, turn, strict=True)) for turn in zip(*row.values(), strict=True)]
        return row
    return value.tolist() if hasattr(value, "tolist") else value
