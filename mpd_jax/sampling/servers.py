"""vLLM servers that hold the same model, reached over HTTP as one.

Transport and nothing else: it knows no sampling and no weights. Nothing here is told to other processes; process 0
alone speaks HTTP, and the callers see to it.
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx2

from mpd_jax.sampling.asking import Round
from mpd_jax.sampling.wire import Facts, ServerConfig, ServerError, Unreachable, Wire, unlike
from mpd_jax.types import UserError

__all__ = ["Facts", "ServerConfig", "ServerError", "Servers", "Unreachable"]

log = logging.getLogger(__name__)


class Servers:
    """Servers that hold the same model, as one. Requests go to whichever has room; what a dead one had is taken over.

    key: the API key, or None. say: told when a server goes away and comes back.
    admit: if set, called with a server's URL, in another thread, before `ask` sends it anything and again whenever it
    was away: it may have been started anew, with the weights of its start. It may call `every(..., urls=[url])`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: ServerConfig,
        *,
        key: str | None = None,
        say: Callable[[str], None] = log.warning,
    ):
        self.urls = _checked(urls)
        self.config, self.say = config, say
        self.admit: Callable[[str], None] | None = None
        self._wire = Wire(config, key)
        self._facts: Facts | None = None

    def __repr__(self) -> str:
        return f"Servers({', '.join(self.urls)})"

    @property
    def model(self) -> str:
        """The served name: of the base model, not of adapters."""
        return self.facts().model

    @property
    def window(self) -> int:
        """Prompt and response together, in tokens: what the least of them takes."""
        return self.facts().window

    @property
    def version(self) -> str:
        return self.facts().version

    def facts(self) -> Facts:
        """Of all servers that answer now, which must agree; asked once. ServerError where none answers."""
        if self._facts is None:
            self._facts = asyncio.run(self._look_at_all())
        return self._facts

    def alive(self) -> list[bool]:
        """Which of them answer GET /health with 200 now."""

        async def look(url: str) -> bool:
            try:
                async with self._wire.client() as client:
                    await self._wire.healthy(client, url)
            except Unreachable:
                return False
            return True

        async def all_of_them() -> list[bool]:
            return await asyncio.gather(*map(look, self.urls))

        return asyncio.run(all_of_them())

    def wait_until_ready(self, progress: Callable[[], None] | None = None, *, trial: bool = True) -> None:
        """Until one of them has answered a request, or without `trial` says what it holds, for `patience_s` at most.
        `progress` is called meanwhile. ServerError where one is paused, which would not answer before it is resumed."""
        began, said = time.monotonic(), False
        while True:
            try:
                facts = self.facts()
                if not trial:
                    return
                self._require_awake()
                probe = {"model": facts.model, "prompt": [0], "max_tokens": 1, "temperature": 0.0}
                self.ask("/v1/completions", [probe], lambda i, answer: None, tick=progress)
                return
            except Unreachable as error:
                left = self.config.patience_s - (time.monotonic() - began)
                if left <= 0:
                    raise
                if not said:
                    self.say(f"waiting {left:.0f} s at most (sampling.server.patience_s): {error}")
                    said = True
            if progress:
                progress()
            time.sleep(min(1.0, self.config.patience_s / 10))

    def ask(
        self,
        path: str,
        bodies: Sequence[dict],
        take: Callable[[int, dict], None],
        *,
        tick: Callable[[], None] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """POSTs every body. `take(i, answer)` is told each answer once, as it comes, in this thread; so is `tick`,
        about twice a second. What either raises ends everything, and requests in flight are given up.

        Connection errors, 429 and 5xx are asked again, at another server if there is one; so are answers that a pause
        has aborted. Every other refusal is a ServerError.
        sizes: of each request, in tokens; those in flight at a server come to `score_tokens` at most, or are one.
        """
        if bodies:
            admit = None if self.admit is None else partial(_aside, self.admit)
            asyncio.run(Round(self._wire, self.urls, path, bodies, take, tick, admit, self.say, sizes).run())

    def every(
        self,
        method: str,
        path: str,
        body: dict | None = None,
        *,
        timeout_s: float = 60.0,
        ok: Sequence[int] = (200,),
        urls: Sequence[str] | None = None,
        patience_s: float | None = None,
    ) -> list[Any]:
        """The same administrative call to every server (or to `urls`), at once; their answers in order, JSON or text.

        Only a server that takes no connection is tried again, for `patience_s` (the config's, unless given): no call is
        made twice.
        """
        patience = self.config.patience_s if patience_s is None else patience_s

        async def call(url: str) -> Any:
            async with self._wire.client() as client:
                deadline = time.monotonic() + patience
                while True:
                    try:
                        return await self._wire.call(client, url, method, path, body, timeout_s=timeout_s, ok=ok)
                    except Unreachable as error:
                        refused = isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)
                        if not refused or time.monotonic() > deadline:
                            raise
                    await asyncio.sleep(0.5)

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*map(call, urls or self.urls), return_exceptions=True)

        answers = asyncio.run(all_of_them())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _require_awake(self) -> None:
        urls = [url for url, up in zip(self.urls, self.alive(), strict=True) if up]
        answers = self.every("GET", "/is_paused", ok=range(600), urls=urls, patience_s=0.0) if urls else []
        for url, answer in zip(urls, answers, strict=True):
            if isinstance(answer, dict) and answer.get("is_paused") is True:
                raise ServerError(
                    f"{url}: it is paused, and answers no request: resume it (POST /resume) or start it again, then "
                    "run the same command again"
                )

    async def _look_at_all(self) -> Facts:
        async def one(url: str) -> Facts:
            async with self._wire.client() as client:
                return await self._wire.look(client, url)

        found = await asyncio.gather(*map(one, self.urls), return_exceptions=True)
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, Unreachable):
                raise error
        known = [(url, facts) for url, facts in zip(self.urls, found, strict=True) if isinstance(facts, Facts)]
        if not known:
            reasons = "; ".join(str(error) for error in found)
            raise Unreachable(f"{reasons}; start the server (vllm serve), or correct the URL")
        if len({facts.model for _, facts in known}) > 1:
            raise unlike([(url, facts.model) for url, facts in known])
        first = known[0][1]
        self._wire.model = first.model
        return Facts(first.model, min(facts.window for _, facts in known), first.version)


def _aside(call: Callable[[str], None], url: str) -> Awaitable[None]:
    """The call in a thread that nobody waits for once the answer is not wanted any more, as asyncio's own would be."""
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(call(url))
        except BaseException as error:  # the one who awaits it hears
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return asyncio.wrap_future(done)


def _checked(urls: Sequence[str]) -> tuple[str, ...]:
    """Base URLs, without the / and /v1 that people put behind them."""
    if isinstance(urls, str):
        urls = [urls]
    bases = []
    for url in urls:
        base = re.sub(r"(/v1)?/*$", "", str(url).strip().rstrip("/"))
        try:
            parts = urlsplit(base)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            parts, good = urlsplit(""), False
        if parts.username is not None or parts.password is not None:
            raise UserError(
                "serve: a URL with a user or a password in it is not allowed; the API key stands in the environment "
                "variable that sampling.server.key names"
            )
        if not good or parts.query or parts.fragment or re.search(r"\s", base):
            raise UserError(f"serve: {url!r} is not allowed; it must be jax or a URL such as http://localhost:8000")
        bases.append(base)
    if not bases or len(set(bases)) < len(bases):
        raise UserError(f"serve: {list(urls)} is not allowed; name one or more servers, each once")
    return tuple(bases)
