"""The files of a run directory but its checkpoints: process 0 writes them, the others' writes are nothing.

A file appears whole or not at all, except those that grow by lines.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpd_jax import hosts
from mpd_jax.types import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An operating-system error while writing under `run.dir` as one clear message."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.dir: {path} could not be written: {error.strerror or error}. What was already saved is intact: free "
            f"space or mend permissions there and run the same command again to resume (or choose another run.dir)"
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file holds the old content or the new, whenever the process is killed or the disk is full."""
    if not hosts.is_main():
        return
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def remove(path: Path) -> None:
    """The file is gone, whether it was there or not."""
    if hosts.is_main():
        path.unlink(missing_ok=True)


class Lines:
    """A file that grows line by line, each in it at once."""

    def __init__(self, path: Path):
        self._path, self._file = path, None
        if hosts.is_main():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run

    def add(self, line: str) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.write(f"{line}\n".encode())

    def close(self) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.close()
