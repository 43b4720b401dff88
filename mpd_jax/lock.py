"""One trainer a run directory.

On a disk a file lock, gone with its process however that ends. In a bucket an object that names its holder, who puts
it anew every BEAT_S; one that has not changed for DEAD_AFTER_S of the looker's own clock is taken over. A holder that
was cut off for so long and finds itself taken over ends; until it has, BEAT_S after it is back, both may write.
"""

import fcntl
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from threading import Event, Thread
from uuid import uuid4

from etils import epath

from mpd_jax import files, hosts
from mpd_jax.files import AnyPath, writing
from mpd_jax.types import UserError

NAME = ".lock"
BEAT_S, DEAD_AFTER_S, LOOK_S = 10, 60, 2
TIMEOUT_S = 10  # of one request
SEEN_AFTER_S = 30  # what one host writes to a shared file system others may see with a delay


@contextmanager
def locked(run_dir: AnyPath, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """UserError if another process trains there, or if not all of this run see it. Process 0 holds the lock for all."""
    with ExitStack() as stack:

        def lock() -> str:
            token = uuid4().hex
            if isinstance(run_dir, pathlib.Path):
                _lock_file(run_dir, token, stack)
            else:
                with writing(run_dir):
                    held = _Held(run_dir, say)
                stack.callback(held.release)
            return token

        _require_seen(run_dir, hosts.from_main(lock))
        yield


def _lock_file(run_dir: pathlib.Path, token: str, stack: ExitStack) -> None:
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open(run_dir / NAME, "a"))  # noqa: SIM115 - the stack closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(run_dir, "another process") from None
    with writing(run_dir):
        file.truncate(0)
        file.write(token)
        file.flush()
        os.fsync(file.fileno())


def _require_seen(run_dir: AnyPath, token: str) -> None:
    """UserError where a process has a directory of its own in place of process 0's: no checkpoint would be whole."""
    if hosts.alone() or not isinstance(run_dir, pathlib.Path):
        return
    deadline = time.monotonic() + SEEN_AFTER_S
    while not (seen := files.read(run_dir / NAME) == token.encode()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [str(number) for number, sees in enumerate(hosts.gather(seen)) if not sees]
    if blind:
        raise UserError(
            f"run.dir: process {', '.join(blind)} does not see what process 0 writes to {run_dir}; give a directory on "
            "a file system that all hosts have mounted there, or a gs:// address"
        )


def _taken(run_dir: AnyPath, by: str) -> UserError:
    return UserError(f"run.dir: {run_dir} is being trained by {by}; wait for it, or choose another run.dir")


class _Held:
    """The lock object, taken and kept. Every put names the generation that it replaces, so of two only one succeeds."""

    def __init__(self, run_dir: epath.Path, say: Callable[[str], None]):
        from google.cloud import storage

        self._run_dir, self._ended = run_dir, Event()
        bucket, _, self._name = str(run_dir / NAME).removeprefix("gs://").partition("/")
        self._bucket = storage.Client().bucket(bucket)
        since = datetime.now(UTC).isoformat(" ", "seconds")
        self._me = {"host": socket.gethostname(), "pid": str(os.getpid()), "since": since, "token": uuid4().hex}
        self._generation = self._wait_for_the_dead(say)
        if not self._put():
            raise _taken(run_dir, _described(self._look()[1]))
        self._beats = Thread(target=self._beat, name="lock", daemon=True)
        self._beats.start()

    def _look(self) -> tuple[int, dict[str, str]]:
        """Generation and holder as they are now; 0 and nothing if there is no lock."""
        blob = self._bucket.get_blob(self._name, timeout=TIMEOUT_S)
        return (0, {}) if blob is None else (int(blob.generation or 0), blob.metadata or {})

    def _put(self) -> bool:
        """Whether the object was of the generation known (0: absent), and is this process's now."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        blob.metadata = self._me
        try:
            blob.upload_from_string(_described(self._me), if_generation_match=self._generation, timeout=TIMEOUT_S)
        except PreconditionFailed:  # also where the answer to an earlier put was lost on its way
            generation, holder = self._look()
            if holder != self._me:
                return False
            self._generation = generation
        else:
            self._generation = int(blob.generation or 0)
        return True

    def _wait_for_the_dead(self, say: Callable[[str], None]) -> int:
        """The generation to replace, once its holder is known to be dead; UserError if it lives."""
        first, holder = self._look()
        if first:
            say(f"{self._run_dir} was trained by {_described(holder)}; waiting {DEAD_AFTER_S:g} s for a sign of life")
        deadline = time.monotonic() + DEAD_AFTER_S
        while first and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            hosts.check()
            now, holder = self._look()
            if now not in (0, first):
                raise _taken(self._run_dir, _described(holder))
            first = now
        return first

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(Exception):  # the network's; the next beat tries again
                if not self._put():
                    _end(
                        f"run.dir: {self._run_dir} was taken over by {_described(self._look()[1])}, for this process "
                        f"gave no sign of life for {DEAD_AFTER_S:g} s; it ends here, and the other goes on"
                    )
                    return

    def release(self) -> None:
        self._ended.set()
        self._beats.join()
        with suppress(Exception):  # it is dead by itself after a while
            self._bucket.blob(self._name).delete(if_generation_match=self._generation, timeout=TIMEOUT_S)
        self._bucket.client.close()


def _described(holder: dict[str, str]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _end(reason: str) -> None:
    """Of this process, at once, from any thread: what it wrote from here on would be in another's run."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    hosts.leave(2, UserError(reason))
    os._exit(2)
