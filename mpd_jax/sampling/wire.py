"""The wire to one vLLM server: exchanges, what it says of itself, and its refusals as plain errors with a remedy.

The API key is in one header of the clients made here, and in no message.
"""

import asyncio
import json
import math
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import httpx2

from mpd_jax.types import UserError

CONNECT_S = 5.0  # less than LOOK_S: a host that has vanished takes no connection, a busy server takes its time
LOOK_S = 10.0  # for an answer that costs the server nothing
LEAST_VERSION = (0, 10, 2)  # the first to answer token ids (return_token_ids)
REJECTED = (401, 403)
BUSY = (429, 503)


class ServerError(UserError):
    """What a server said, in its own words, and what to do about it."""


class Unreachable(ServerError):
    """Nobody answers there now; later somebody may. `slow`: it took the connection, and its time."""

    def __init__(self, message: str, slow: bool = False):
        super().__init__(message)
        self.slow = slow


@dataclass(frozen=True)
class ServerConfig:
    """How vLLM servers are asked (`serve` of student, teacher and rewriter).

    concurrency: requests in flight at each server; two to four times its --max-num-seqs keep its batch full.
    timeout_s: for one response, from sending to its last token. patience_s: how long no server may be reachable
    before the run ends; a server that is started again within it costs no response.
    seed: "request" makes responses repeatable, each from a seed of its own; "none" is for servers that refuse seeds.
    key: name of the environment variable with the API key, where the servers ask for one.
    score_tokens: tokens in flight at each server that scores (recipe.target.top_k). It keeps some hundred bytes for
    each of the top_k entries of each token until the whole answer is out: at 64 entries these are 2 GB. More gains
    nothing, for a server reads a few thousand tokens at a time.
    """

    concurrency: int = 256
    timeout_s: float = 3600.0
    patience_s: float = 900.0
    seed: Literal["request", "none"] = "request"
    key: str = "VLLM_API_KEY"
    score_tokens: int = 65536

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("concurrency", self.concurrency >= 1, "1 or more"),
            ("timeout_s", 0 < self.timeout_s < math.inf, "above 0, in seconds"),
            ("patience_s", 0 <= self.patience_s < math.inf, "0 or more, in seconds"),
            ("score_tokens", self.score_tokens >= 1, "1 or more"),
            ("key", re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key), "the name of an environment variable"),
        ):
            if not holds:
                # The key itself is written here by mistake now and then; it is not repeated.
                value = "this text" if name == "key" else getattr(self, name)
                raise UserError(f"{name} = {value} is not allowed; it must be {allowed}")


@dataclass(frozen=True)
class Facts:
    """What a server says of itself. model: the name of its base model. window: of prompt and response, in tokens."""

    model: str
    window: int
    version: str


class Wire:
    """How servers are spoken to. `model`: the name under which all must serve, once it is known."""

    def __init__(self, config: ServerConfig, key: str | None):
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(
                f"sampling.server.key: the API key in {config.key} holds spaces, line ends or letters that no HTTP "
                "header may have; set it anew"
            )
        self.config, self._key = config, key or None
        self.model: str | None = None

    def client(self) -> httpx2.AsyncClient:
        """A client for one server. No limit of its pool: how many requests are in flight is the caller's to say.

        A connection serves one request: to look through hundreds of idle ones before each costs more than a new one,
        and the server closes them after 5 s of its own accord.
        """
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx2.Timeout(None, connect=CONNECT_S)
        # trust_env: proxies and .netrc of the environment are not for servers that stand beside the trainer.
        return httpx2.AsyncClient(
            headers=headers, timeout=timeout, limits=limits, trust_env=False, verify=_certificates()
        )

    async def exchange(
        self, client: Any, url: str, method: str, path: str, body: dict | None, timeout_s: float
    ) -> tuple[int, str]:
        """(status, text) of one exchange. Unreachable where there is no whole answer."""
        content = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(timeout_s):
                response = await client.request(method, f"{url}{path}", content=content, headers=headers)
        except TimeoutError:
            raise Unreachable(f"{url}{path}: no answer within {timeout_s:g} s", slow=True) from None
        except httpx2.ConnectTimeout as error:
            raise Unreachable(f"{url}: nobody answers there (no connection within {CONNECT_S:g} s)") from error
        except (httpx2.ConnectError, httpx2.InvalidURL) as error:
            raise Unreachable(f"{url}: nobody answers there ({_cause(error)})") from error
        except httpx2.RequestError as error:
            said = f"the connection ended before the answer did ({_cause(error)})"
            raise Unreachable(f"{url}{path}: {said}") from error
        return response.status_code, response.text

    async def call(
        self,
        client: Any,
        url: str,
        method: str,
        path: str,
        body: dict | None = None,
        *,
        timeout_s: float = LOOK_S,
        ok: Sequence[int] = (200,),
    ) -> Any:
        """The answer of one exchange, JSON or text; ServerError unless its status is one of `ok`."""
        status, text = await self.exchange(client, url, method, path, body, timeout_s)
        if status not in ok:
            raise self.refusal(url, path, status, text)
        try:
            return json.loads(text)
        except ValueError:
            return text

    async def healthy(self, client: Any, url: str) -> None:
        """Unreachable unless it says that it is well."""
        status, text = await self.exchange(client, url, "GET", "/health", None, LOOK_S)
        if status == 404:
            raise ServerError(f"{url}: {_no_vllm('GET /health answers 404')}")
        if status != 200:
            raise Unreachable(f"{url}: GET /health answers {status} {words(text)}".rstrip())

    async def look(self, client: Any, url: str) -> Facts:
        """What the server says of itself. Unreachable, or ServerError if it is none that can be used."""
        await self.healthy(client, url)
        status, text = await self.exchange(client, url, "GET", "/v1/models", None, LOOK_S)
        if status >= 500 or status in BUSY:
            raise Unreachable(f"{url}/v1/models: the server answers {status}: {words(text)}")
        if status in REJECTED:
            raise self.refusal(url, "/v1/models", status, text)
        try:
            bases = [entry for entry in json.loads(text)["data"] if entry.get("parent") is None]
            model, window = str(bases[0]["id"]), int(bases[0]["max_model_len"])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ServerError(f"{url}: {_no_vllm(f'GET /v1/models answers {status} {words(text)[:100]!r}')}") from None
        answer = await self.call(client, url, "GET", "/version", ok=(200, 404))
        version = answer.get("version") if isinstance(answer, dict) else None
        if not version:
            raise ServerError(f"{url}: {_no_vllm(f'GET /version answers {words(json.dumps(answer))[:100]!r}')}")
        _require_version(url, str(version))
        facts = Facts(model, window, str(version))
        if self.model is not None and facts.model != self.model:
            raise unlike([(url, facts.model), ("the others", self.model)])
        return facts

    def refusal(self, url: str, path: str, status: int, text: str) -> ServerError:
        """An answer that is an error, in the server's words and with a remedy."""
        said = words(text) or "nothing"
        return ServerError(f"{url}{path}: the server answers {status}: {said}{self._remedy(status, said)}")

    def _remedy(self, status: int, said: str) -> str:
        if status in REJECTED:
            had = "another key than" if self._key else "the key"
            return f"; set the environment variable {self.config.key} to {had} the server was started with (--api-key)"
        for pattern, remedy in _REMEDIES:
            if re.search(pattern, said):
                return f"; {remedy}"
        if status == 404:
            return f"; {_no_vllm('this route is missing')}"
        return ""


_REMEDIES = (
    (r"model .* does not exist", "it has been started with another model or --served-model-name: start it as before"),
    (
        r"maximum context length|maximum model length|max_tokens must be at least 1",
        "raise the server's --max-model-len, or lower sampling.prompt_tokens or max_tokens",
    ),
    (r"logprobs of .* greater than max allowed", "raise the server's --max-logprobs, or lower recipe.target.top_k"),
    (r"out of vocabulary", "the server holds a model with another vocabulary: serve the one that the config names"),
    (r"per-request seed", "set sampling.server.seed=none; such a run is not reproducible"),
)


@cache
def _certificates() -> ssl.SSLContext:
    """Whom https addresses are believed; to read them takes longer than many an exchange."""
    return httpx2.create_ssl_context(trust_env=False)


def words(text: str) -> str:
    """An error body's own words: vLLM's, FastAPI's, or whatever a proxy in between writes."""
    try:
        body = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:300]
    for name in ("error", "detail", "message"):
        if isinstance(body, dict) and body.get(name):
            body = body[name]
    return body if isinstance(body, str) else json.dumps(body)[:300]


def _no_vllm(why: str) -> str:
    return (
        f"this is no vLLM server, or not its address ({why}); give the address at which `vllm serve` listens, without "
        "a path (http://host:8000)"
    )


def _require_version(url: str, version: str) -> None:
    numbers = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    if numbers is None or "dev" in version:  # built from sources: what it lacks shows at the first answer
        return
    if tuple(int(number or 0) for number in numbers.groups()) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ServerError(
            f"{url}: vLLM {version} is too old: token ids are answered from {least} on (return_token_ids); install a "
            "newer vLLM there"
        )


def unlike(held: Sequence[tuple[str, str]]) -> ServerError:
    names = ", ".join(f"{url}: {model!r}" for url, model in held)
    return ServerError(f"serve: the servers of one list must hold the same model, under one name; they hold {names}")


def _cause(error: BaseException) -> str:
    """The operating system's words if there are any."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return str(error) or type(error).__name__
