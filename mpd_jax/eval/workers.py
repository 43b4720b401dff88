"""Processes that compare answers: each question costs at most its own time limit, never the run.

Not here: what is asked (grade.py), and what a process does with it (grade_worker.py).
"""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpd_jax.types import UserError

# Clock seconds for each processor second allowed: generous, since only a worker that waits for nothing should meet it.
STALLED = 60
# After which a worker is ended from here, too: a user's function may have taken its alarm, or left a process behind it.
GRACE_S = 5.0


class _Worker:
    """One comparing process and the item it has in hand. It ends with its standard input, so it outlives nobody."""

    def __init__(self, limit_s: float, function: str | None):
        # A plain process rather than multiprocessing's spawn: that one would import the caller's main script, and with
        # it jax, in every worker and in every replacement. -P keeps this folder's module names out of its path.
        script, where = str(Path(__file__).with_name("grade_worker.py")), [each or os.getcwd() for each in sys.path]
        clock_s = math.ceil(STALLED * limit_s)
        settings = {"seconds": limit_s, "clock_s": clock_s, "function": function, "path": where if function else []}
        command = [sys.executable, "-P", "-W", "ignore", script, json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.ready = False
        self.item: Any = None
        self._patience_s = clock_s + GRACE_S
        self.due = time.monotonic() + self._patience_s

    def send(self, item: Any, question: dict) -> None:
        self.item, self.due = item, time.monotonic() + self._patience_s
        with contextlib.suppress(BrokenPipeError):  # if it has died, `receive` will say so
            print(json.dumps(question), file=self.process.stdin, flush=True)

    def receive(self) -> dict | None:
        """Its next line, or None when it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> int:
        """Ends it; the exit status it had come to by itself, if it had."""
        self.process.kill()
        status = self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # pyright: ignore[reportOptionalMemberAccess]
        return status


class Workers:
    """Up to `count` processes, started when there is work for them. limit_s: processor seconds for one question.

    function: the import path of a user's function that answers; without it math-verify does.
    """

    def __init__(self, count: int, limit_s: float, function: str | None = None):
        self.count, self.limit_s, self.function = count, limit_s, function
        self.pool: list[_Worker] = []

    def close(self) -> None:
        while self.pool:
            self.pool.pop().close()

    def ask(self, questions: Mapping[Any, dict]) -> dict[Any, dict]:
        """The reply to each question: correct, found, failure. One is in each worker's hands at a time."""
        replies: dict[Any, dict] = {}
        queue = deque(questions)
        # A worker that died between two calls, idle, is replaced like one that never was.
        for worker in [w for w in self.pool if w.process.poll() is not None]:
            self._drop(worker)
        while queue or any(worker.item is not None for worker in self.pool):
            while len(self.pool) < min(self.count, len(queue)):
                self.pool.append(_Worker(self.limit_s, self.function))
            for worker in self.pool:
                if queue and worker.ready and worker.item is None:
                    worker.send(queue[0], questions[queue.popleft()])
            for worker, spoke in self._waiting():
                reply = worker.receive() if spoke else None
                if reply is None:
                    if spoke:  # it has come to its end, and has a status of its own
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            worker.process.wait(1.0)
                    status = self._drop(worker)
                    if not worker.ready:
                        raise UserError(
                            f"grader: {self.function or 'math-verify'}: its process could not start (exit status "
                            f"{status}; it has {self.limit_s:g} processor seconds a question and 4 GiB): see what it "
                            "said above, and mend that"
                        )
                    ended = {-signal.SIGPROF: "timeout", -signal.SIGALRM: "stalled"}.get(status, "crash")
                    failure = ended if spoke else "stalled"
                    reply = {"correct": False, "found": None, "failure": failure}
                worker.ready = True
                if worker.item is not None:
                    replies[worker.item] = reply
                    worker.item = None
        return replies

    def _drop(self, worker: _Worker) -> int:
        self.pool.remove(worker)
        return worker.close()

    def _waiting(self) -> list[tuple[_Worker, bool]]:
        """The workers that have something to say, and those that are overdue; waits until there is one."""
        busy = [worker for worker in self.pool if worker.item is not None or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # pyright: ignore
            patience = max(0.0, min(worker.due for worker in busy) - time.monotonic())
            spoke = [key.data for key, _ in selector.select(patience)]
        now = time.monotonic()
        return [(w, True) for w in spoke] + [(w, False) for w in busy if w not in spoke and w.due <= now]
