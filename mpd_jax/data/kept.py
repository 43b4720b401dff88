"""The index of near-duplicates: which problems of a set are kept, by a hash of their questions.

It is JSON Lines: first how it was made, then one line for each problem that is left out (with the problem of an
evaluation set that it is near to), then the hash of each that is kept.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpd_jax import files
from mpd_jax.types import UserError


@dataclass(frozen=True)
class Kept:
    """path: of the index. kept: sorted hashes. left_out: hash -> name of the set that the problem is near to."""

    path: str
    kept: np.ndarray
    left_out: Mapping[int, str]

    @classmethod
    def read(cls, path: str) -> "Kept":
        data = files.read(files.path(path))
        if data is None:
            raise UserError(f"problems.kept: {path}: no such file; write it with `mpd-jax dedup CONFIG --out {path}`")
        # At line feeds only: a question that was left out may hold other characters that Python takes for line ends.
        head, *lines = data.decode(errors="replace").removesuffix("\n").split("\n")
        try:
            made = json.loads(head)
            gone = [json.loads(line) for line in lines[: made["left_out"]]]
            kept = np.sort(np.array([int(line, 16) for line in lines[made["left_out"] :]], np.uint64))
            if len(kept) != made["kept"]:
                raise ValueError("it ends early")
            return cls(path, kept, {int(line["content"], 16): line["near"]["set"] for line in gone})
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise UserError(f"problems.kept: {path}: no index ({error}); write it anew with `mpd-jax dedup`") from None

    def why_not(self, content: int, id: str) -> str | None:
        """Why a problem is left out, or None. UserError if the index does not know it."""
        if content in self.left_out:
            return f"near-duplicates of {self.left_out[content]}"
        at = int(np.searchsorted(self.kept, np.uint64(content)))
        if at == len(self.kept) or int(self.kept[at]) != content:
            raise UserError(
                f"problems.kept: {self.path} does not know problem {id!r}: it was made of other problems; write it "
                "anew with `mpd-jax dedup`"
            )
        return None


def write(path: str, made: Mapping[str, Any], kept: Iterable[int], left_out: Iterable[Mapping[str, Any]]) -> None:
    """An index that `Kept.read` reads. made: how, to stand in its first line."""
    hashes, gone = sorted(set(kept)), list(left_out)
    lines = [json.dumps({**made, "kept": len(hashes), "left_out": len(gone)})]
    lines += [json.dumps(line, ensure_ascii=False) for line in gone]
    files.write_atomically(files.path(path), "\n".join([*lines, *(f"{content:016x}" for content in hashes)]) + "\n")
