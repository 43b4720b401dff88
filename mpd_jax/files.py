"""The files of a run directory but its checkpoints: process 0 writes them, the others' writes are nothing.

It is a directory on this machine, or a gs:// address. A file appears whole or not at all, except those that grow by
lines.
"""

import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, Timer

import fsspec.config
from etils import epath

from mpd_jax import hosts
from mpd_jax.types import UserError

AnyPath = pathlib.Path | epath.Path  # on this machine | at a gs:// address
PUT_AFTER_S = 2.0  # a line is in its object after this time; one object takes about one put a second


def path(address: str | os.PathLike[str]) -> AnyPath:
    """What stands for a path on this machine or for a gs:// address, which UserError if gcsfs is missing."""
    if not remote(address):
        return pathlib.Path(address)
    if not importlib.util.find_spec("gcsfs"):
        raise UserError(f"{address}: a gs:// address needs gcsfs: pip install 'mpd-jax[gcs]'")
    # What other processes write there, and Orbax in this one, would stay unseen.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(address)


def remote(path: str | os.PathLike[str]) -> bool:
    return str(path).startswith("gs://")


@contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """What a disk or a bucket refuses while writing under `run.dir` as one clear message."""
    try:
        yield
    except OSError as error:
        raise _refused(path, str(error.strerror or error), "free space or mend permissions") from error
    except Exception as error:  # each storage library has its own
        if not remote(path) or isinstance(error, UserError):
            raise
        raise _refused(path, str(error), "see to the address, the network and your rights to the bucket") from error


def _refused(path: AnyPath, why: str, remedy: str) -> UserError:
    return UserError(
        f"run.dir: {path} could not be written: {why}. What was already saved is intact: {remedy} and run the same "
        "command again to resume (or choose another run.dir)"
    )


@contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """What a bucket refuses while reading as one clear message."""
    try:
        yield
    except Exception as error:  # as in `writing`
        if not remote(path) or isinstance(error, FileNotFoundError | UserError):
            raise
        raise UserError(
            f"{path} could not be read: {error}; see to the address, the network and your rights to the bucket"
        ) from error


def is_file(path: AnyPath) -> bool:
    with reading(path):
        return path.is_file()


def read(path: AnyPath) -> bytes | None:
    """What a file holds, or None if there is none."""
    with suppress(FileNotFoundError), reading(path):
        return path.read_bytes()
    return None


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """The file holds the old content or the new, whenever the process is killed or the disk is full."""
    if not hosts.is_main():
        return
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        if not isinstance(path, pathlib.Path):
            path.write_bytes(data)
            return
        temporary = path.with_name(f".{path.name}.tmp")
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


def remove(path: AnyPath) -> None:
    """The file is gone, whether it was there or not."""
    if hosts.is_main():
        with writing(path):
            path.unlink(missing_ok=True)


@contextmanager
def written_here(directory: AnyPath) -> Iterator[pathlib.Path]:
    """For what cannot write to a bucket: a directory on this machine, whose files are under `directory` at the end."""
    if isinstance(directory, pathlib.Path):
        yield directory
        return
    with tempfile.TemporaryDirectory() as here:
        yield pathlib.Path(here)
        with writing(directory):
            for file in pathlib.Path(here).rglob("*"):
                if file.is_file():
                    (directory / file.relative_to(here).as_posix()).write_bytes(file.read_bytes())


class Lines:
    """A file that grows line by line. On a disk each is in it at once; in a bucket after `PUT_AFTER_S` or `flush`, and
    a process that is killed before that takes it along."""

    def __init__(self, path: AnyPath):
        self._path, self._file = path, None
        if hosts.is_main():
            with writing(path):
                if isinstance(path, pathlib.Path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open for the whole run
                else:
                    self._file = _GrowingObject(path)

    def add(self, line: str) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.write(f"{line}\n".encode())

    def flush(self) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with writing(self._path):
                self._file.close()


class _GrowingObject:
    """A file without append: all of it is put anew, by a thread soon after a write, or by `flush`. No write waits for
    a put."""

    def __init__(self, path: epath.Path):
        self._path, self._lock, self._putting = path, Lock(), Lock()
        self._timer: Timer | None = None
        self._data = read(path) or b""
        self._there = len(self._data)

    def write(self, data: bytes) -> None:
        with self._lock:
            self._data += data
            if self._timer is None:
                self._timer = Timer(PUT_AFTER_S, self._put_soon)
                self._timer.daemon = True
                self._timer.start()

    def _put_soon(self) -> None:
        with suppress(Exception):  # the next one tries again, and `flush` tells
            self.flush()

    def flush(self) -> None:
        with self._putting:
            with self._lock:
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                data = self._data
            if len(data) > self._there:
                self._path.write_bytes(data)
                self._there = len(data)

    close = flush
