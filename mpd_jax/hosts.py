"""The processes of a run: how they join, what process 0 tells the others, how they are stopped and how they end.

Host code is replicated: every process makes the same calls in the same order, and only arrays are sharded. Process 0
alone reads and writes the run directory, except for checkpoints, which all of them read and write. One process alone
needs none of this, and every function here does the obvious then.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import distributed  # the coordination service's key-value store has no public name

from mpd_jax.types import UserError

STOPPED = 75  # exit code: asked to stop by a signal, saved, can go on (EX_TEMPFAIL)
LEFT_ALONE = 69  # exit code: another process of the run has died (EX_UNAVAILABLE)
FIND_S = 300.0  # how long a process looks for process 0
DEAD_AFTER_S = 60.0  # without a sign of life from a process the others end
GRACE_S = 5.0  # for the others to hear why a process ends, or to come to the same end by themselves
CHECKS_KEPT = 1000  # answers that stay in the store; no process is that far behind another
FOREVER_MS = 7 * 24 * 3600 * 1000
POLL_MS = 500  # a process that waits for process 0 passes on a signal within this time
PIECE = 1 << 20  # bytes of one value in the store

Say = Callable[[str], None]


class Stopped(BaseException):
    """The run was asked to stop. Nothing but the command ends it; it says what was saved by then."""

    def __init__(self, said: str = "stopped before the run was set up, so there was nothing to save"):
        super().__init__(said)


class _Shared:
    """The coordination service's store, and what this process has done with it.

    Messages and checks are counted apart for every thread that speaks, which has the same name on every process: what
    one thread says does not meet another's.
    """

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.checks: Counter[str] = Counter()
        self.asked = False
        self.watcher: _Watcher | None = None

    @property
    def client(self) -> Any:
        return distributed.global_state.client


_shared = _Shared()
_here = threading.local()  # `telling`: this thread is inside the call of `from_main`, where process 0 is alone


def _speaker() -> str:
    """The thread's part of the names in the store."""
    thread = threading.current_thread()
    return "main" if thread is threading.main_thread() else thread.name.replace("/", "_")


def _next(counts: Counter[str]) -> tuple[str, int]:
    speaker = _speaker()
    counts[speaker] += 1
    return speaker, counts[speaker] - 1


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    dead_after_s: float = DEAD_AFTER_S,
) -> None:
    """Makes this process one of a run's. Without arguments JAX finds the others (TPU VM, SLURM, Kubernetes).

    Comes before anything else that touches a device.
    """
    if coordinator is not None:
        _find(coordinator, process)
        if process == 0 and processes is not None and processes > 1:
            print(f"waiting for {processes - 1} other processes at {coordinator}", file=sys.stderr, flush=True)
    # It would take SIGTERM, and Orbax asks it with step numbers of its own; `check` agrees on a stop instead.
    jax.config.update("jax_enable_preemption_service", False)
    # Of CPU devices alone: two programs at once would meet the other processes in two orders, and wait for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    ours = _last_words(lambda: _nobody_came(coordinator))
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=int(FIND_S))
    except (ValueError, RuntimeError) as error:
        where = coordinator or "the cluster this process was started in"
        raise UserError(
            f"--coordinator: the processes of the run did not find each other through {where} "
            f"({str(error).splitlines()[0]}); give every process the same --coordinator HOST:PORT (an open port of "
            "process 0's host) and --processes, and its own --process-id"
        ) from error
    finally:
        ctypes.CDLL(None).signal(signal.SIGABRT, None)  # as it was; until here `ours` had to live
        del ours
    if distributed.global_state.num_processes > 1:
        _shared.watcher = _Watcher(dead_after_s)


def _last_words(say: Callable[[], None]) -> Any:
    """Lets `say` speak where JAX aborts this process with a stack trace. A handler in C, for Python's own would run too
    late; it lives as long as what is returned."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: say())
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    return handler


def _nobody_came(coordinator: str | None) -> None:
    print(
        f"error: --processes: not all processes of the run came to {coordinator or 'process 0'} within {FIND_S:g} s; "
        "start as many as --processes says (or the launcher's own number), at the same time",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _find(coordinator: str, process: int | None) -> None:
    """UserError where JAX would abort with a stack trace: an address that is none, a port in use, nobody there."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UserError(f"--coordinator: {coordinator!r} is not allowed; it must be HOST:PORT, such as host0:9000")
    if process == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UserError(
                f"--coordinator: port {port} of this host cannot be opened ({error.strerror}); choose another"
            ) from None
        return
    print(f"looking for process 0 at {coordinator}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + FIND_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator: nobody answers at {coordinator} ({error}); start process 0 there, and give every "
                    "process the same --coordinator and --processes"
                ) from None
        time.sleep(0.2)


def alone() -> bool:
    return distributed.global_state.client is None or distributed.global_state.num_processes == 1


def is_main() -> bool:
    """Whether this is process 0, which reads and writes the run directory and is the one to be heard."""
    return distributed.global_state.process_id == 0


def from_main(call: Callable[[], Any]) -> Any:
    """What `call` returns on process 0 (JSON), on every process; a mistake that it finds there, or a stop, is raised
    everywhere. It may take long: the others wait, and pass on the signals that they get. Inside it process 0 decides
    alone, and `check` asks nobody."""
    if alone() or _telling():
        return call()
    reply: dict[str, Any] = {}
    if is_main():
        _here.telling = True
        try:
            reply = {"value": call()}
        except UserError as error:
            reply = {"refused": str(error)}
        except Stopped:
            reply = {"stopped": True}
        finally:
            _here.telling = False
    reply = json.loads(_broadcast(json.dumps(reply).encode()))
    if "stopped" in reply:
        raise Stopped
    if "refused" in reply:
        raise UserError(reply["refused"])
    return reply["value"]


def _telling() -> bool:
    return getattr(_here, "telling", False)


def gather(value: Any) -> list[Any]:
    """Every process's JSON value, in the order of the processes, on every process."""
    if alone():
        return [value]
    client, state = _shared.client, distributed.global_state
    name = "mpd/message/{}/{}".format(*_next(_shared.messages))
    client.key_value_set(f"{name}/{state.process_id}", json.dumps(value))
    client.wait_at_barrier(f"{name}/written", FOREVER_MS)
    values = [json.loads(client.blocking_key_value_get(f"{name}/{i}", FOREVER_MS)) for i in range(state.num_processes)]
    client.wait_at_barrier(f"{name}/read", FOREVER_MS)
    if is_main():
        client.key_value_delete(name)
    return values


def require_same(what: str, value: str) -> None:
    """UserError unless every process has the same value: host code is replicated, and so must be what it reads."""
    values = gather(value)
    others = [str(process) for process, other in enumerate(values) if other != values[0]]
    if others:
        raise UserError(
            f"{what}: process {', '.join(others)} of {len(values)} has read something else than process 0; give every "
            "host the same config, files and version"
        )


def _broadcast(data: bytes) -> bytes:
    """Process 0's bytes, on every process, through the store: nothing is compiled, and no device is waited for."""
    client, name = _shared.client, "mpd/message/{}/{}".format(*_next(_shared.messages))
    if is_main():
        cuts = range(0, len(data), PIECE)
        for piece, start in enumerate(cuts):
            client.key_value_set_bytes(f"{name}/{piece}", data[start : start + PIECE])
        client.key_value_set(f"{name}/pieces", str(len(cuts)))
    else:
        pieces = int(_wait_for(f"{name}/pieces"))
        data = b"".join(client.blocking_key_value_get_bytes(f"{name}/{piece}", FOREVER_MS) for piece in range(pieces))
    client.wait_at_barrier(f"{name}/read", FOREVER_MS)
    if is_main():
        client.key_value_delete(name)
    return data


def _wait_for(key: str) -> str:
    """A value of process 0's, whenever it comes. Python sees a signal only between two waits, and passes it on."""
    while True:
        try:
            return _shared.client.blocking_key_value_get(key, POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if _shared.asked:
            _ask_for_stop()


def _ask_for_stop() -> None:
    me = distributed.global_state.process_id
    _shared.client.key_value_set(f"mpd/asked/{me}", "1", allow_overwrite=True)


# Stopping


@contextmanager
def stoppable(say: Say) -> Iterator[None]:
    """While it lasts SIGTERM, or Ctrl-C once, makes `check` raise; a second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _shared.asked = False

    def ask(number: int, frame: Any) -> None:
        _shared.asked = True

    def interrupt(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("stopping once the state is saved; Ctrl-C again stops at once")
        _shared.asked = True

    before = {
        number: signal.signal(number, call) for number, call in ((signal.SIGTERM, ask), (signal.SIGINT, interrupt))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises Stopped if the run was asked to stop, on every process in the same call: process 0 decides.

    Every process calls it equally often. It costs a message between hosts.
    """
    stop = _shared.asked
    if not alone() and is_main():
        stop = stop or bool(_shared.client.key_value_dir_get("mpd/asked/"))
    if not alone() and not _telling():
        client, (speaker, number) = _shared.client, _next(_shared.checks)
        if is_main():
            client.key_value_set(f"mpd/check/{speaker}/{number}", str(int(stop)))
            if number >= CHECKS_KEPT:
                client.key_value_delete(f"mpd/check/{speaker}/{number - CHECKS_KEPT}")
        else:
            if stop:
                _ask_for_stop()
            stop = _wait_for(f"mpd/check/{speaker}/{number}") == "1"
    if stop:
        raise Stopped


# Ending


def leave(code: int, error: BaseException | None = None) -> None:
    """The end of this process's part. After an error the others hear of it, and this does not return: if another
    process died first, that is the message, and LEFT_ALONE the exit code."""
    watcher, _shared.watcher = _shared.watcher, None
    if watcher is not None and error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            watcher.wait_for_the_dead()  # a process that dies breaks the collectives of the others
        watcher.tell(_reason(error))
        sys.stderr.flush()
        os._exit(code)
    if watcher is not None:
        _shared.client.wait_at_barrier("mpd/left", FOREVER_MS)
        watcher.stop()
    if _shared.client is not None:
        jax.distributed.shutdown()


def _reason(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


class _Watcher(threading.Thread):
    """Tells the store that this process is alive, and ends it with a plain message when another one is not."""

    def __init__(self, dead_after_s: float):
        super().__init__(name="hosts", daemon=True)
        self._client = _shared.client
        self._me, self._count = distributed.global_state.process_id, distributed.global_state.num_processes
        self._dead_after, self._every = dead_after_s, min(2.0, dead_after_s / 6)
        self._seen: dict[str, tuple[str, float]] = {}
        self._ending = threading.Event()
        self._names: dict[str, str] = {}
        self._client.key_value_set(f"mpd/name/{self._me}", socket.gethostname())
        self._client.wait_at_barrier("mpd/names", FOREVER_MS)
        self._names = self._all("name")
        if self._me != 0:
            self._explain_aborts()
        self.start()

    def _explain_aborts(self) -> None:
        """JAX aborts a process, with a stack trace, when process 0 is gone. This has the last word."""

        def aborting() -> None:
            host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            except OSError:
                self._give_up("0", "cannot be reached any more")

        self._aborting = _last_words(aborting)  # kept: the handler lives as long as this

    def _all(self, kind: str) -> dict[str, str]:
        found = self._client.key_value_dir_get(f"mpd/{kind}/")
        return {key.rpartition("/")[2]: value for key, value in found}

    def run(self) -> None:
        beat = 0
        while not self._ending.wait(self._every):
            beat += 1
            try:
                self._client.key_value_set(f"mpd/alive/{self._me}", str(beat), allow_overwrite=True)
                alive, ended = self._all("alive"), self._all("end")
            except jax.errors.JaxRuntimeError:
                if not self._ending.is_set():
                    self._give_up("0", "cannot be reached any more")
                return
            self._look(alive, ended)

    def _look(self, alive: dict[str, str], ended: dict[str, str]) -> None:
        now = time.monotonic()
        for other in map(str, range(self._count)):
            if other == str(self._me):
                continue
            if ended.get(other):
                if not self._ending.wait(GRACE_S):  # else this process has come to the same end
                    self._give_up(other, ended[other])
                return
            last, since = self._seen.get(other, (None, now))
            if alive.get(other, "0") != last:
                self._seen[other] = (alive.get(other, "0"), now)
            elif now - since > self._dead_after:
                self._give_up(other, f"has given no sign of life for {self._dead_after:g} s")

    def _give_up(self, other: str, why: str) -> None:
        """Ends this process, but not before the store has told the others, if it lives in this one."""
        if self._me == 0:
            self._client.key_value_set(f"mpd/end/{other}", why, allow_overwrite=True)
            time.sleep(2 * self._every + 1)
        name = self._names.get(other, "?")
        print(
            f"error: process {other} of {self._count} ({name}) {why}; this one ends too. The same command on "
            "all hosts goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LEFT_ALONE)

    def wait_for_the_dead(self) -> None:
        """Until another process would be known to be dead; if one is, this does not return."""
        time.sleep(self._dead_after + 3 * self._every)

    def stop(self) -> None:
        self._ending.set()

    def tell(self, reason: str) -> None:
        """Lets the others know why this process ends; process 0, whose end is the store's, waits until they do."""
        self._ending.set()
        try:
            self._client.key_value_set(f"mpd/end/{self._me}", f"ended: {reason}", allow_overwrite=True)
            deadline = time.monotonic() + 2 * GRACE_S if self._me == 0 else 0.0
            while time.monotonic() < deadline and len(self._all("end")) < self._count:
                time.sleep(0.1)
        except jax.errors.JaxRuntimeError:
            pass  # process 0 is gone already
