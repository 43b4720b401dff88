"""One call of `Servers.ask`: many requests, several servers, any of which may die, hang, refuse or come back.

One coroutine decides everything, from events in a queue; the others fly requests and look at servers. A server gets
requests only after it was looked at, and again after any fault of its connections; what was in flight at one that is
gone is asked again elsewhere, or there when it is back.
"""

import asyncio
import json
import random
import resource
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from mpd_jax.sampling.wire import BUSY, ServerError, Unreachable, Wire, words
from mpd_jax.types import UserError

TICK_S = 0.5
WATCH_S = 5.0  # between two looks at a server that works; twice away and it is
SLOW_MISS = 0.25  # what a look without an answer in time counts: a busy server may miss some, not eight in a row
RETURN_S = 1.0  # between two looks at a server that is away
FIRST_S = 1.0  # for the first look at all of them
BACKOFF_S = (0.1, 20.0)  # before a request is asked again: at first, and at most
WORKING_S = 10.0  # a request that is in flight this long has been accepted

# How often one request may fail, by reason, before its failure is the run's; the rest is bounded by patience alone.
TRIES = {"failed": 8, "garbled": 3, "slow": 3, "lost": 20}
SPARE_FILES = 256  # open files beside the connections


class Fault(Exception):
    """A request that is asked again. kind: a key of TRIES, or "busy"."""

    def __init__(self, kind: str, said: str):
        super().__init__(said)
        self.kind = kind


class _Server:
    """A server, as this call knows it."""

    def __init__(self, url: str, client: Any, tokens: int):
        self.url, self.client, self.tokens = url, client, tokens  # tokens: in flight at most, where sizes are known
        self.up = False
        self.flying: dict[asyncio.Task, tuple[int, float]] = {}  # request and when it was sent
        self.look = asyncio.Event()
        self.faults, self.misses = 0, 0.0
        self.away = "it has not been looked at"
        self.looked = self.said = False


class Round:
    """See `Servers.ask`."""

    def __init__(
        self,
        wire: Wire,
        urls: Sequence[str],
        path: str,
        bodies: Sequence[dict],
        take: Callable[[int, dict], None],
        tick: Callable[[], None] | None,
        admit: Callable[[str], Awaitable[None]] | None,
        say: Callable[[str], None],
        sizes: Sequence[int] | None = None,
    ):
        self.wire, self.urls, self.config = wire, urls, wire.config
        self.path, self.bodies, self.take, self.tick, self.admit, self.say = path, bodies, take, tick, admit, say
        self.sizes = sizes
        self.pending = deque(range(len(bodies)))
        self.left = len(bodies)
        self.faults: dict[int, Counter[str]] = defaultdict(Counter)
        self.tasks: set[asyncio.Task] = set()
        self.began = self.alive_at = time.monotonic()  # alive: the last answer, or the last time one was being made
        self.dark_since: float | None = self.began

    async def run(self) -> None:
        _allow_files(self.config.concurrency * len(self.urls) + SPARE_FILES)
        self.events: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self.wire.client()) for _ in self.urls]
            tokens = self.config.score_tokens
            self.all = [_Server(url, client, tokens) for url, client in zip(self.urls, clients, strict=True)]
            try:
                for server in self.all:
                    self._start(self._watch(server))
                self._start(self._clock())
                while self.left:
                    self._send()
                    (await self.events.get())()
            finally:
                for task in self.tasks:
                    task.cancel()
                await asyncio.gather(*self.tasks, return_exceptions=True)

    def _start(self, work: Any) -> asyncio.Task:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _send(self) -> None:
        """Gives waiting requests to servers that have room, the emptiest first; none before all were looked at."""
        if not all(server.looked for server in self.all) and time.monotonic() - self.began < FIRST_S:
            return
        while self.pending:
            room = [s for s in self.all if s.up and self._has_room(s, self.pending[0])]
            if not room:
                return
            server = min(room, key=lambda s: len(s.flying))
            index = self.pending.popleft()
            server.flying[self._start(self._fly(server, index))] = (index, time.monotonic())

    def _has_room(self, server: _Server, index: int) -> bool:
        if not server.flying or self.sizes is None:
            return len(server.flying) < self.config.concurrency
        tokens = self.sizes[index] + sum(self.sizes[other] for other, _ in server.flying.values())
        return len(server.flying) < self.config.concurrency and tokens <= server.tokens

    async def _fly(self, server: _Server, index: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            outcome: Any = await self._post(server, self.bodies[index])
        except Exception as error:  # raised by the loop: a task that dies in silence would be waited for
            outcome = error
        self.events.put_nowait(partial(self._landed, server, task, index, outcome))

    async def _post(self, server: _Server, body: dict) -> dict:
        """The answer, or why there is none: Fault if it is asked again, ServerError if that is final."""
        try:
            status, text = await self.wire.exchange(
                server.client, server.url, "POST", self.path, body, self.config.timeout_s
            )
        except Unreachable as error:
            raise Fault("slow" if error.slow else "lost", str(error)) from None
        if status != 200:
            refusal = self.wire.refusal(server.url, self.path, status, text)
            if status in BUSY:
                raise Fault("busy", str(refusal))
            if status >= 500 and "per-request seed" not in text:
                raise Fault("failed", str(refusal))
            raise refusal
        try:
            answer = json.loads(text)
            aborted = any(choice.get("finish_reason") == "abort" for choice in answer.get("choices") or ())
        except ValueError:
            raise Fault("garbled", f"{server.url}{self.path}: no JSON, but {text[-80:]!r} at its end") from None
        except (AttributeError, TypeError):
            raise Fault("garbled", f"{server.url}{self.path}: no completion, but {text[:80]!r}") from None
        if aborted:
            raise Fault("busy", f"{server.url}{self.path}: the server has aborted the request (finish_reason abort)")
        if isinstance(answer.get("error"), dict | str):
            raise Fault("failed", f"{server.url}{self.path}: the server answers 200 and an error: {words(text)}")
        return answer

    # Events

    def _landed(self, server: _Server, task: asyncio.Task, index: int, outcome: Any) -> None:
        if server.flying.pop(task, None) is None:
            return  # it has been taken from this server, and is asked elsewhere
        if isinstance(outcome, dict):
            self.left -= 1
            self.alive_at = time.monotonic()
            self.take(index, outcome)
            return
        if not isinstance(outcome, Fault):
            raise outcome
        self._count(index, outcome)
        if outcome.kind in ("lost", "failed"):
            if server.up and self.sizes is not None:
                self._ask_less(server, outcome)
            server.up, server.away = False, str(outcome)
            server.faults += 1
            server.misses += outcome.kind == "lost"
        server.look.set()
        delay = _backoff(self.faults[index].total()) * random.uniform(0.5, 1.0)
        asyncio.get_running_loop().call_later(delay, self.events.put_nowait, partial(self.pending.append, index))

    def _ask_less(self, server: _Server, fault: Fault) -> None:
        """It may have run out of memory: what it reads at once is halved, for the rest of this call."""
        server.tokens = max(1, server.tokens // 2)
        self.say(
            f"{fault}; {server.tokens:,} tokens are asked of it at once from now on. If it runs out of memory, lower "
            "sampling.server.score_tokens, or --max-num-batched-tokens and --gpu-memory-utilization there"
        )

    def _count(self, index: int, fault: Fault) -> None:
        """Raises what a request fails with in the end."""
        self.faults[index][fault.kind] += 1
        if fault.kind == "busy":
            if time.monotonic() - self.alive_at > self.config.patience_s:
                raise ServerError(
                    f"{fault}, for {self.config.patience_s:g} s; lower sampling.server.concurrency, resume the server "
                    "if it is paused, or raise sampling.server.patience_s"
                )
        elif self.faults[index][fault.kind] >= TRIES[fault.kind]:
            raise ServerError(f"request {index} failed {TRIES[fault.kind]} times. {fault}; {_remedy(fault.kind)}")

    def _seen(self, server: _Server, faults: int, whole: bool, error: Unreachable | None) -> None:
        """A look at a server: a whole one lets it in, unless a fault came meanwhile; two that fail take its work."""
        server.looked = True
        if error is None:
            server.misses = 0
            if whole and not server.up and faults == server.faults:
                server.up = True
                if server.said:
                    self.say(f"{server.url} is back")
                    server.said = False
            return
        server.away = str(error)
        server.misses += SLOW_MISS if error.slow else 1
        at_work = server.flying or (error.slow and server.up)
        if server.misses >= 2 or not at_work:
            server.up = False
            self._take_over(server)

    def _take_over(self, server: _Server) -> None:
        lost = [index for index, _ in server.flying.values()]
        for task in server.flying:
            task.cancel()
        server.flying.clear()
        self.pending.extendleft(reversed(lost))
        if not server.said and self.left:
            again = f"; {len(lost)} requests that were in flight there are asked again" if lost else ""
            alone = not any(other.up or not other.looked for other in self.all)
            ends = f"; no server is left, the run ends if that lasts {self.config.patience_s:g} s" if alone else ""
            self.say(f"{server.away}{again}{ends}")
            server.said = True

    def _ticked(self) -> None:
        now = time.monotonic()
        if any(now - since > WORKING_S for server in self.all for _, since in server.flying.values()):
            self.alive_at = now
        if any(server.up or server.flying for server in self.all):
            self.dark_since = None
        elif self.dark_since is None:
            self.dark_since = now
        elif now - self.dark_since > self.config.patience_s:
            reasons = "; ".join(server.away for server in self.all)
            raise Unreachable(
                f"{reasons}, for {self.config.patience_s:g} s; start the server and run the same command again, or "
                "raise sampling.server.patience_s"
            )
        if self.tick:
            self.tick()

    # What goes on beside

    async def _clock(self) -> None:
        while True:
            self.events.put_nowait(self._ticked)
            await asyncio.sleep(min(TICK_S, max(self.config.patience_s / 4, 0.01)))

    async def _watch(self, server: _Server) -> None:
        while True:
            server.look.clear()
            faults, whole, error = server.faults, not server.up, None
            try:
                if whole:
                    await self.wire.look(server.client, server.url)
                    if self.admit is not None:
                        await self.admit(server.url)
                else:
                    await self.wire.healthy(server.client, server.url)
            except Unreachable as away:
                error = away
            except BaseException as final:
                if not isinstance(final, asyncio.CancelledError):
                    self.events.put_nowait(partial(_raise, final))
                raise
            self.events.put_nowait(partial(self._seen, server, faults, whole, error))
            wait = RETURN_S * random.uniform(0.5, 1.0) if error is not None else WATCH_S
            if error is None and faults != server.faults:
                continue
            try:
                async with asyncio.timeout(wait):
                    await server.look.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(0.02)  # faults come in swarms


def _raise(error: BaseException) -> None:
    raise error


def _backoff(times: int) -> float:
    """Seconds, doubled up to the most with every time; "busy" has no bound, and a float has one."""
    low, high = BACKOFF_S
    return min(high, low * 2 ** min(times, 30))


def _remedy(kind: str) -> str:
    return {
        "failed": "look into the server's log",
        "garbled": "look at what stands between here and the server",
        "slow": "raise sampling.server.timeout_s, or lower max_tokens or sampling.server.concurrency",
        "lost": "look into the server's log: it may die of this request",
    }[kind]


def _allow_files(count: int) -> None:
    """Every request in flight is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise UserError(
                f"sampling.server.concurrency: {count} open files are needed and the system allows {hard}; lower it, "
                "or raise the limit (ulimit -Hn)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
