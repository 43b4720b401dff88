"""Sets that are known by a name: which files of which commit of the Hugging Face hub, and how their rows are read.

A commit pins a set. Where the SHA-256 of a file stands here too, a copy of it is checked byte for byte, wherever it
came from. The sets of one benchmark differ by who published them: a figure holds for the one that is named here.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from mpd_jax import files
from mpd_jax.data.sources import Row, of_files
from mpd_jax.eval.grade import extract_boxed
from mpd_jax.files import AnyPath
from mpd_jax.types import UserError

Fields = Mapping[str, Any]
LETTERS = "ABCD"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


@dataclass(frozen=True)
class Ready:
    """A set of the hub. splits: of each split its files and their SHA-256, if it is known. fields: of a row, by the
    names of a Problem's fields. repeats: what becomes of rows that ask the same again."""

    repository: str
    revision: str
    splits: Mapping[str, Mapping[str, str | None]]
    fields: Callable[[Fields], Fields]
    columns: Sequence[str]
    repeats: str = "keep"
    gated: bool = False


def _math500(row: Fields) -> Fields:
    return {
        "id": row["unique_id"],
        "question": row["problem"],
        "answer": row["answer"],
        "response": row["solution"],
        "level": row["level"],
        "subject": row["subject"],
    }


def _aime24(row: Fields) -> Fields:
    return {"id": row["id"], "question": row["problem"], "answer": row["answer"], "response": row["solution"]}


def _gsm8k(row: Fields) -> Fields:
    """Its solutions end with the answer after four hashes, and hold calculations in double angle brackets."""
    worked, hashes, answer = row["answer"].rpartition("####")
    if not hashes:
        raise ValueError("no #### before the answer")
    response = re.sub(r"<<.*?>>", "", worked).strip()
    return {"question": row["question"], "answer": answer.strip().replace(",", ""), "response": response}


def _math(row: Fields) -> Fields:
    return {
        "question": row["problem"],
        "answer": boxed(row["solution"]),
        "response": row["solution"],
        "level": row["level"].removeprefix("Level "),
        "subject": row["type"],
    }


def _openmathinstruct2(row: Fields) -> Fields:
    return {
        "question": row["problem"],
        "answer": row["expected_answer"],
        "response": row["generated_solution"],
        "subject": row["problem_source"],
    }


DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def _dapo(row: Fields) -> Fields:
    """Its questions stand in a wording that is taken off: how to ask is the recipe's matter here (recipe.contexts)."""
    question = row["prompt"][0]["content"].removeprefix(DAPO_BEFORE).rstrip().removesuffix(DAPO_AFTER)
    return {"id": row["extra_info"]["index"], "question": question, "answer": row["reward_model"]["ground_truth"]}


def _gpqa(row: Fields) -> Fields:
    """Four options; their order is a function of the question, the same in every run and on every machine."""
    question = row["Question"].strip()
    right = row["Correct Answer"].strip()
    options = [right, *(row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
    seed = hashlib.blake2b(question.encode(), digest_size=8).digest()
    # Two options of the same words are told apart by their places in the row.
    order = sorted(range(4), key=lambda i: hashlib.blake2b(bytes([i]) + options[i].encode(), key=seed).digest())
    shown = "\n".join(f"{letter}. {options[i]}" for letter, i in zip(LETTERS, order, strict=True))
    return {
        "id": row["Record ID"],
        "question": f"{question}\n\n{shown}",
        "answer": LETTERS[order.index(0)],
        "response": row.get("Explanation") or None,
        "subject": row["High-level domain"],
    }


def _amc23(row: Fields) -> Fields:
    """Its answers are whole numbers, whether they are held as text, integer or decimal."""
    return {"question": row["question"], "answer": str(row["answer"]).removesuffix(".0")}


def boxed(text: str) -> str:
    """What the last \\boxed or \\fbox of a solution holds."""
    found = extract_boxed(text.replace("\\fbox", "\\boxed"))
    if found is None:
        raise ValueError("no \\boxed answer in the solution, or the last one is not closed")
    return found


def _shards(split: str, hashes: Sequence[str | None]) -> dict[str, str | None]:
    return {f"data/{split}-{i:05d}-of-{len(hashes):05d}.parquet": sha for i, sha in enumerate(hashes)}


READY: dict[str, Ready] = {
    "openmathinstruct2": Ready(
        "nvidia/OpenMathInstruct-2",
        "469216e3f46f4dacf476b382e192485ea51a143e",
        {
            "train_1M": _shards(
                "train_1M",
                (
                    "93700f39cdc87994f2c9a6ad62e1d62e09467793f57d376cfab722757ff26e1c",
                    "c208b3cda82903d9923cb0b1286b30ce9de0d2e56641cac32435b171be36b912",
                    "1a42cf7139b60ece5e14623626e1a0b9cdaadd5460704183395780ce26849e51",
                ),
            ),
            "train_2M": _shards("train_2M", (None,) * 6),
            "train_5M": _shards("train_5M", (None,) * 14),
            "train": _shards("train", (None,) * 32),
        },
        _openmathinstruct2,
        ("problem", "generated_solution", "expected_answer", "problem_source"),
    ),
    "dapo_math_17k": Ready(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "65877096c24ffa7abc4e4fa5edb95cf3413a5674",
        {
            "train": {
                "data/dapo-math-17k.parquet": "534375d6bb8630d22ab46a56e11f2ffec1d288d8f7d04099bc82d68948705941",
            }
        },
        _dapo,
        ("prompt", "reward_model", "extra_info"),
        repeats="drop",  # each of its questions stands there a hundred times
    ),
    "gsm8k": Ready(
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        {
            "train": {
                "main/train-00000-of-00001.parquet": "ea82612ea9582142387730c793eb67d3b12849002bc0b7fa6f8efafa7351419d",
            },
            "test": {
                "main/test-00000-of-00001.parquet": "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59",
            },
        },
        _gsm8k,
        ("question", "answer"),
    ),
    "math": Ready(
        "EleutherAI/hendrycks_math",
        "21a5633873b6a120296cce3e2df9d5550074f4a3",
        {
            split: {f"{subject}/{split}-00000-of-00001.parquet": None for subject in SUBJECTS}
            for split in ("train", "test")
        },
        _math,
        ("problem", "solution", "level", "type"),
    ),
    "math500": Ready(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        {"test": {"test.jsonl": "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"}},
        _math500,
        ("problem", "solution", "answer", "subject", "level", "unique_id"),
    ),
    "aime24": Ready(
        "HuggingFaceH4/aime_2024",
        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        {
            "train": {
                "data/train-00000-of-00001.parquet": "26139847601a5037c237d5928b195e7260ca8074cf4f264b794af42847f79ccf",
            }
        },
        _aime24,
        ("id", "problem", "answer", "solution"),
    ),
    "aime25": Ready(
        "math-ai/aime25",
        "563bb8404243c5f09de6ec262f2db674fe5bce9b",
        {"test": {"test.jsonl": "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331"}},
        lambda row: {"question": row["problem"], "answer": row["answer"]},
        ("problem", "answer"),
    ),
    "amc23": Ready(
        "math-ai/amc23",
        "80815d37005feb82cd7f8fbc6901d5d3eff43057",
        {
            "test": {
                "test-00000-of-00001.parquet": "b696e87ba47be4e879a60fd4ef1d4aa522ba78c5ae013c6aff5cc9788a397c5e",
            }
        },
        _amc23,
        ("question", "answer"),
    ),
    "gpqa_diamond": Ready(
        "Idavidrein/gpqa",
        "633f5ee89ab8ad4522a9f850766b73f62147ffdd",
        {"train": {"gpqa_diamond.csv": "41d1213cd7a4998605a26c2798500652572007161b3a92817ba46b35befcd305"}},
        _gpqa,
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        gated=True,
    ),
}


def of_ready(name: str, split: str, directory: str) -> Iterator[Row]:
    """The rows of a set by its name, as fields of a Problem: from `directory`/`name` if that is there, else from the
    hub's cache, or the hub."""
    ready = READY[name]
    found = [_checked(path, sha) for path, sha in _located(name, ready, split, directory)]
    for number, place, row in of_files(found, {column: column for column in ready.columns}):
        try:
            yield number, place, ready.fields(row)
        except KeyError as error:
            raise UserError(f"{place}: no column {error.args[0]!r}; it has {', '.join(map(repr, row))}") from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{place}: not a row of {name} ({error}); fetch the set again") from None


def split_of(name: str, split: str | None, role: str) -> str:
    """The split that is read: for training one of that name, for evaluation the test split, or the only one."""
    splits = READY[name].splits
    if split is None:
        usual = ("train_1M", "train") if role == "train" else ("test",)
        split = next((known for known in usual if known in splits), next(iter(splits)))
    if split not in splits:
        raise UserError(f"problems: {name}: split = {split!r} is none of its splits; choose one of {', '.join(splits)}")
    return split


def _located(name: str, ready: Ready, split: str, directory: str) -> list[tuple[AnyPath, str | None]]:
    wanted, here = ready.splits[split], files.path(directory) / name
    if all(files.is_file(here / file) for file in wanted):
        return [(here / file, sha) for file, sha in wanted.items()]
    failed: Exception | None = None
    for cached in (True, False):  # without a network the second waits long
        try:
            cache = Path(
                huggingface_hub.snapshot_download(
                    ready.repository,
                    repo_type="dataset",
                    revision=ready.revision,
                    allow_patterns=list(wanted),
                    local_files_only=cached,
                )
            )
        except Exception as error:  # the hub's own, and those of its HTTP library
            failed = error
            continue
        if all((cache / file).is_file() for file in wanted):
            return [(cache / file, sha) for file, sha in wanted.items()]
    terms = f" (accept its terms on https://huggingface.co/datasets/{ready.repository} first)" if ready.gated else ""
    raise UserError(
        f"problems: {name}: not in {here}, and not to be had from the hub ({type(failed).__name__}). Where the hub "
        f"can be reached, run{terms}: {fetching(name, split, str(here))}; and bring that directory here"
    ) from failed


def fetching(name: str, split: str, here: str) -> str:
    """The command that fetches a split of a set into a directory."""
    ready = READY[name]
    wanted = " ".join(ready.splits[split])
    return f"hf download {ready.repository} {wanted} --repo-type dataset --revision {ready.revision} --local-dir {here}"


def _checked(path: AnyPath, sha: str | None) -> AnyPath:
    if sha is None:
        return path
    with files.reading(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if found != sha:
        raise UserError(
            f"problems: {path}: not the file that is known by this name (its SHA-256 is {found}, not {sha}); fetch it "
            "again, or read your own by its path, as problems.sources.<name>.read"
        )
    return path
