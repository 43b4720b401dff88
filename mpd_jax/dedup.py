"""`mpd-jax dedup`: which problems to train on are near-duplicates of evaluation problems, found once before any run."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpd_jax import build, files
from mpd_jax.config import RunConfig
from mpd_jax.data import kept
from mpd_jax.data.near import Index
from mpd_jax.data.store import contents
from mpd_jax.screen import Screen
from mpd_jax.types import UserError


def run(settings: RunConfig, against: Sequence[str], out: str, share: float, size: int) -> dict[str, Any]:
    """Writes the index of `problems.train` for `problems.kept`; returns what it says of itself.

    against: sets as problems.heldout takes them, which is the one if there are none. share: of an evaluation question,
    from which on a training question is left out. size: tokens of a shingle.
    """
    for name, value, allowed in (("share", share, 0 < share <= 1), ("size", size, size >= 1)):
        if not allowed:
            raise UserError(
                f"--{name}: {value} is not allowed; it must be {'in (0, 1]' if name == 'share' else '1 or more'}"
            )
    _require_place(out)
    screen, config = Screen(), dataclasses.replace(settings.problems, kept=None, lengths=None)
    sets = {
        name: build.read_problems(dataclasses.replace(config, heldout=name), "heldout", screen.say)
        for name in against or [config.heldout]
    }
    index, training = Index(sets, size), build.read_problems(config, "train", screen.say)
    stay, left = set(), {}
    with screen.bar("looking for near-duplicates", len(training)) as advance:
        for done, (problem, content) in enumerate(zip(training, contents(training).tolist(), strict=True), start=1):
            near = index.nearest(problem.question)
            if near is None or near.share < share:
                stay.add(content)
            else:
                left[content] = {
                    "content": f"{content:016x}",
                    "id": problem.id,
                    "near": near._asdict(),
                    "question": problem.question,
                }
            if done % 1000 == 0 or done == len(training):
                advance(done)
    made = {
        "train": config.train,
        "against": {name: len(problems) for name, problems in sets.items()},
        "share": share,
        "size": size,
    }
    kept.write(out, made, stay - left.keys(), left.values())
    found = Counter(line["near"]["set"] for line in left.values())
    return {**made, "problems": len(training), "questions kept": len(stay), "left out": dict(found), "written": out}


def _require_place(out: str) -> None:
    """UserError where the index could not be written, before the hour that it may take to make."""
    path = files.path(out)
    if not isinstance(path, Path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {path.parent} cannot be made ({error.strerror}); choose another place") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out: {path} is a directory, or cannot be written; give the path of a file")
