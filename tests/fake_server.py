"""A vLLM server in a thread of the test, 127.0.0.1: it speaks the bodies that a real 0.32.0 was seen to speak.

Its numbers come from `logprobs(ids) -> [T, V]`, the log-softmax of the next token at every position, so that a table
or a small JAX model stands behind it. It misbehaves on command: `fault` is asked at every request to /v1/completions,
and the attributes under "standing faults" hold until they are taken back. `kill` and `start` are a SIGKILL and a
restart on the same port: what was pushed is gone, as with the real one.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

Logprobs = Callable[[Sequence[int]], np.ndarray]

# What `fault` may answer. Any three digits are that HTTP status with the body recorded for it.
FAULTS = (
    "drop",  # the connection closes before any answer
    "half",  # the connection closes in the middle of the answer
    "truncated",  # status 200 and half of the JSON, as if it were all
    "html",  # status 200 and a page
    "slow",  # the answer after `slow_s`
    "hang",  # no answer as long as the server lives
    "die",  # the server is killed, with this request in flight
    "vanish",  # its host is gone, with this request in flight: see `vanish`
    "freeze",  # it takes connections from now on and answers none
    "no completion",  # status 200 and JSON that is none
    "abort",  # finish_reason abort, some of the ids
    "no ids",  # a server too old to answer token ids
    "wrong ids",  # ids out of the vocabulary
    "wrong prompt",  # the echo of another prompt
    "few logprobs",  # one log-probability too few
    "no eos",  # finish_reason stop, and the last id is no EOS
    "nan",  # a log-probability that is none
)

ERRORS = {
    429: {"error": {"message": "Too many requests.", "type": "TooManyRequests", "param": None, "code": 429}},
    500: {
        "error": {
            "message": "EngineCore encountered an issue. See stack trace (above) for the root cause.",
            "type": "InternalServerError",
            "param": None,
            "code": 500,
        }
    },
    503: {
        "error": {
            "message": "The engine is currently busy and cannot accept new requests. Please try again later or on a "
            "different instance.",
            "type": "Service Unavailable",
            "param": None,
            "code": 503,
        }
    },
}


def bigram(seed: int, vocab_size: int = 512, scale: float = 2.0) -> Logprobs:
    """A model for the fake server: the next token depends on the last one alone."""
    logits_VV = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size)) * scale
    table_VV = logits_VV - np.log(np.exp(logits_VV).sum(-1, keepdims=True))
    return lambda ids: table_VV[np.asarray(ids)]


class Refused(Exception):
    """An HTTP answer that is an error."""

    def __init__(self, status: int, body: Any):
        super().__init__(status)
        self.status, self.body = status, body


def bad(message: str, param: str | None = None, kind: str = "BadRequestError", code: int = 400) -> Refused:
    return Refused(code, {"error": {"message": message, "type": kind, "param": param, "code": code}})


@dataclass(frozen=True)
class Seen:
    """A request as it came. `authorization` is that header, or None."""

    method: str
    path: str
    body: Any
    authorization: str | None


class FakeServer:
    """vocab_size, window, eos_id: of the model. key: the API key asked for under /v1. dev: whether the admin routes
    are there (VLLM_SERVER_DEV_MODE). lora: whether adapters may be loaded at run time.

    read_weights, read_adapter: a directory's `logprobs`, for reload_weights and /v1/load_lora_adapter.
    """

    def __init__(
        self,
        logprobs: Logprobs | None = None,
        *,
        vocab_size: int = 512,
        window: int = 512,
        eos_id: int = 508,
        model: str = "tiny",
        key: str | None = None,
        version: str = "0.32.0",
        max_logprobs: int = 20,
        dev: bool = True,
        lora: bool = True,
        read_weights: Callable[[str], Logprobs] | None = None,
        read_adapter: Callable[[str], Logprobs] | None = None,
    ):
        self.initial = logprobs or bigram(0, vocab_size)
        self.vocab_size, self.window, self.eos_id, self.model = vocab_size, window, eos_id, model
        self.key, self.version, self.max_logprobs, self.dev, self.lora = key, version, max_logprobs, dev, lora
        self.read_weights, self.read_adapter = read_weights, read_adapter
        self.tokenize: Callable[[Any], list[int]] | None = None  # of a text, or of messages
        self.info: dict | None = None  # /server_info?config_format=json
        # Faults of single requests: (number of the completion request, from 0 on; its body) -> one of FAULTS, or None
        self.fault: Callable[[int, dict], str | int | None] = lambda number, body: None
        self.slow_s = 0.2
        # Standing faults
        self.stale = False  # reload_weights and load_lora_adapter answer 200 and change nothing
        self.stale_pushes = 0  # so do as many of them
        self.stamped: str | None = None  # /weight_info always says this
        self.device = "cuda"  # what /server_info says
        self.reload_error: str | None = None  # reload_weights answers 500 with it
        self.reset_fails = False  # reset_prefix_cache answers 200 {"success": false}
        self.off_temperature = 1.0  # every log-probability answered is at this temperature
        self.processed = False  # --logprobs-mode processed_logprobs: those of sampled tokens after temperature, top-k
        self.healthy = True
        self.token_s = 0.0  # seconds a token
        # What the tests look at
        self.seen: list[Seen] = []
        self.completions = 0
        self.in_flight = self.most_in_flight = 0
        self.resets = 0
        self._lock = threading.RLock()
        self._port = 0
        self._http: _Http | None = None
        self.start()

    # Life

    def start(self) -> None:
        """Starts it, or starts it again on the same port with the weights that it began with."""
        with self._lock:  # a `kill` under way ends first, else the port is still taken
            assert self._http is None, "it runs"
            self.logprobs, self.weight_version = self.initial, "default"
            self.adapters: dict[str, Logprobs] = {}
            self.paused: str | None = None
            self.in_flight = 0
            self._http = _Http(("127.0.0.1", self._port), _handler(self))
            self._port = self._http.server_address[1]
            threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """Every connection is closed at once, and nobody listens any more."""
        with self._lock:
            http, self._http = self._http, None
            if http is not None:
                http.end()

    def freeze(self) -> None:
        """The system takes connections, as for a process that is stuck; no request is read any more."""
        assert self._http is not None
        self._http.shutdown()

    def vanish(self) -> None:
        """As a host without power: no connection is taken, by a full backlog, and those that are open stay silent."""
        self.freeze()
        assert self._http is not None
        self._http.socket.listen(0)
        for _ in range(3):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex(self._http.server_address)
            self._http.waiting.append(waiting)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def bodies(self, path: str = "/v1/completions") -> list[dict]:
        """What was asked at a path."""
        return [seen.body for seen in list(self.seen) if seen.path == path]

    # Answers

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
        """The JSON, text or None (empty) of an answer with status 200."""
        name = f"{method} {path}"
        public: dict[str, Callable[[], Any]] = {
            "GET /health": self._health,
            "GET /version": lambda: {"version": self.version},
            "GET /v1/models": self._models,
            "POST /v1/completions": lambda: self._completion(body),
            **({"POST /tokenize": lambda: self._tokenize(body)} if self.tokenize else {}),
            "GET /load": lambda: {"server_load": self.in_flight},
        }
        adapters: dict[str, Callable[[], Any]] = {
            "POST /v1/load_lora_adapter": lambda: self._load_adapter(body),
            "POST /v1/unload_lora_adapter": lambda: self._unload_adapter(body),
        }
        admin: dict[str, Callable[[], Any]] = {
            "POST /pause": lambda: self._pause((query.get("mode") or ["abort"])[0]),
            "POST /resume": self._resume,
            "GET /is_paused": lambda: {"is_paused": self.paused is not None},
            "POST /collective_rpc": lambda: self._rpc(body),
            "POST /reset_prefix_cache": self._reset,
            "POST /update_weight_version": lambda: self._stamp(body),
            "GET /weight_info": lambda: {"weight_version": self.stamped or self.weight_version},
            "GET /server_info": lambda: {"vllm_config": self._config(query.get("config_format") == ["json"])},
        }
        routes = {**public, **(adapters if self.lora else {}), **(admin if self.dev else {})}
        if name in routes:
            return routes[name]()
        if any(route.endswith(f" {path}") for route in routes):
            raise Refused(405, {"detail": "Method Not Allowed"})
        raise Refused(404, {"detail": "Not Found"})

    def _health(self) -> None:
        if not self.healthy:
            raise Refused(503, None)

    def _models(self) -> dict:
        base = {"id": self.model, "object": "model", "owned_by": "vllm", "root": self.model, "parent": None}
        loaded = [{**base, "id": name, "root": "/adapter", "parent": self.model} for name in self.adapters]
        return {"object": "list", "data": [{**base, "max_model_len": self.window}, *loaded]}

    def _config(self, as_json: bool) -> Any:
        text = f"model='{self.model}', device_config={self.device}, max_logprobs={self.max_logprobs}"
        return self.info if as_json and self.info is not None else text

    def _tokenize(self, body: dict) -> dict:
        assert self.tokenize is not None
        ids = self.tokenize(body.get("prompt", body.get("messages")))
        return {"count": len(ids), "max_model_len": self.window, "tokens": ids, "token_strs": None}

    def _pause(self, mode: str) -> dict:
        self.paused = mode
        while mode == "wait" and self.in_flight > 0:
            time.sleep(0.005)
        return {"status": "paused"}

    def _resume(self) -> dict:
        self.paused = None
        return {"status": "resumed"}

    def _rpc(self, body: dict) -> dict:
        if body.get("method") != "reload_weights":
            raise _failed_rpc(f"'Worker' object has no attribute '{body.get('method')}'")
        if self.reload_error is not None:
            raise _failed_rpc(self.reload_error)
        path = body.get("kwargs", {}).get("weights_path") or body.get("args", [None, None])[1]
        if self.read_weights is None or path is None:
            raise _failed_rpc(f"No such file or directory: {path!r}")
        try:
            logprobs = self.read_weights(path)
        except (OSError, ValueError, KeyError) as error:
            raise _failed_rpc(str(error)) from None
        if not self._ignores():
            self.logprobs = logprobs
        return {"results": [None]}

    def _ignores(self) -> bool:
        self.stale_pushes -= 1
        return self.stale or self.stale_pushes >= 0

    def _reset(self) -> dict:
        self.resets += 1
        return {"success": not self.reset_fails}

    def _stamp(self, body: dict) -> dict:
        self.weight_version = body["new_version"]
        return {"success": True, "new_version": self.weight_version}

    def _load_adapter(self, body: dict) -> str:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters and not body.get("load_inplace"):
            raise bad(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
        try:
            logprobs = self.read_adapter(path) if self.read_adapter else self.logprobs
        except OSError:
            message = f"Loading lora {name} failed: No adapter found for {path}"
            raise bad(message, kind="NotFoundError", code=404) from None
        self.adapters[name] = self.logprobs if self._ignores() else logprobs
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload_adapter(self, body: dict) -> str:
        name = body["lora_name"]
        if name not in self.adapters:
            raise bad(f"The lora adapter '{name}' cannot be found.", kind="NotFoundError", code=404)
        del self.adapters[name]
        return f"Success: LoRA adapter '{name}' removed successfully."

    # Completions

    def _completion(self, body: dict) -> dict:
        with self._lock:
            number, self.completions = self.completions, self.completions + 1
        fault = self.fault(number, body)
        if fault is not None and fault not in FAULTS and not isinstance(fault, int):
            raise AssertionError(f"no such fault: {fault}")
        if isinstance(fault, int):
            raise Refused(fault, ERRORS.get(fault, {"detail": "?"}))
        if fault in ("drop", "half", "truncated", "html", "hang", "die", "vanish", "freeze"):
            raise _Broken(fault)
        if fault == "no completion":
            return {"choices": [None]}
        with self._running():
            if fault == "slow":
                time.sleep(self.slow_s)
            prompts = self._check(body)
            n = body.get("n") or 1
            choices = [self._choice(body, ids, p * n + i, fault) for p, ids in enumerate(prompts) for i in range(n)]
            while self.paused in ("keep", "wait") and self._http is not None:
                time.sleep(0.005)
        new = sum(len(choice.pop("_ids")) for choice in choices)
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": new}
        usage["total_tokens"] = usage["prompt_tokens"] + new
        return {
            "id": f"cmpl-{number}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.get("model") or self.model,
            "choices": choices,
            "usage": usage,
        }

    @contextmanager
    def _running(self) -> Iterator[None]:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1

    def _check(self, body: dict) -> list[list[int]]:
        """The prompts, or the refusal that the real server was seen to give."""
        model = body.get("model")
        if model is not None and model != self.model and model not in self.adapters:
            message = f"The model `{model}` does not exist. Valid aliases: {self.model}."
            raise bad(message, "model", "NotFoundError", 404)
        prompt = body.get("prompt")
        prompts = prompt if prompt and isinstance(prompt[0], list) else [prompt or []]
        for name, what in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            k = body.get(name)
            if k is not None and self.max_logprobs >= 0 and (k > self.max_logprobs or k == -1):
                k = self.vocab_size if k == -1 else k
                raise bad(
                    f"Requested {what} logprobs of {k}, which is greater than max allowed: {self.max_logprobs} "
                    f"(parameter={name}, value={k})",
                    name,
                )
        if (body.get("n") or 1) > 1 and body.get("temperature") == 0:
            raise bad(f"n must be 1 when using greedy sampling, got {body['n']}.")
        for ids in prompts:
            if not ids:
                raise bad("You must pass at least one prompt")
            if max(ids) >= self.vocab_size:
                raise bad(f"Token id {max(ids)} is out of vocabulary")
            if len(ids) > self.window:
                raise bad(
                    f"This model's maximum context length is {self.window} tokens. However, your prompt contains "
                    f"{len(ids)} input tokens, which exceeds this limit even without any output tokens. Please reduce "
                    f"the length of the input prompt. (parameter=input_tokens, value={len(ids)})",
                    "input_tokens",
                )
            if len(ids) == self.window or body.get("max_tokens", 16) < 1:
                raise bad("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", "max_tokens")
        return prompts

    def _choice(self, body: dict, prompt: list[int], index: int, fault: str | int | None) -> dict:
        logprobs = self.adapters.get(body.get("model") or "", self.logprobs)
        ids, values, finish, stop = self._sample(body, prompt, index, logprobs)
        if fault == "abort":
            ids, values, finish, stop = ids[: len(ids) // 2], values[: len(ids) // 2], "abort", None
        if fault == "wrong ids":
            ids = [self.vocab_size + 7, *ids[1:]]
        if fault == "no eos":
            ids, finish = [*ids[:-1], 1 if self.eos_id != 1 else 2], "stop"
        if fault == "few logprobs":
            values = values[:-1]
        if fault == "nan":
            values = [*values[:-1], None]
        choice: dict[str, Any] = {
            "_ids": ids,
            "index": index,
            "text": "".join(map(_text, ids)),
            "logprobs": None,
            "finish_reason": finish,
            "stop_reason": stop,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
        if body.get("logprobs") is not None:
            choice["logprobs"] = self._sampled_logprobs(body, prompt, ids, values, logprobs)
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(body["prompt_logprobs"], prompt, logprobs)
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
            choice["prompt_token_ids"] = [0, *prompt] if fault == "wrong prompt" else prompt
        if fault == "no ids":
            del choice["token_ids"], choice["prompt_token_ids"]
        return choice

    def _sample(
        self, body: dict, prompt: list[int], index: int, logprobs: Logprobs
    ) -> tuple[list[int], list[float], str, int | None]:
        """(ids, their log-probabilities, finish_reason, stop_reason)."""
        temperature = body.get("temperature", 1.0)
        stops = set(body.get("stop_token_ids") or ())
        rng = np.random.default_rng(None if body.get("seed") is None else [body["seed"], index])
        room = min(body.get("max_tokens", 16), self.window - len(prompt))
        ids: list[int] = []
        values: list[float] = []
        while len(ids) < room and self.paused != "abort":
            if self.token_s:
                time.sleep(self.token_s)
            raw_V = self._off(logprobs([*prompt, *ids])[-1])
            drawn_V = raw_V if temperature == 0 else _truncated(raw_V / temperature, body)
            token = (
                int(drawn_V.argmax()) if temperature == 0 else int((drawn_V + rng.gumbel(size=len(drawn_V))).argmax())
            )
            ids.append(token)
            values.append(float((drawn_V if self.processed else raw_V)[token]))
            if token == self.eos_id and not body.get("ignore_eos"):
                return ids, values, "stop", None
            if token in stops:
                return ids, values, "stop", token
        return ids, values, "abort" if self.paused == "abort" else "length", None

    def _off(self, logprobs_V: np.ndarray) -> np.ndarray:
        return logprobs_V if self.off_temperature == 1 else _normal(logprobs_V / self.off_temperature)

    def _sampled_logprobs(
        self, body: dict, prompt: list[int], ids: list[int], values: list[float], logprobs: Logprobs
    ) -> dict:
        name = (lambda i: f"token_id:{i}") if body.get("return_tokens_as_token_ids") else _text
        tops = []
        for position, (token, value) in enumerate(zip(ids, values, strict=False)):
            best: np.ndarray = np.zeros(0, int)
            row_V = best
            if body["logprobs"] > 0:
                row_V = self._off(logprobs([*prompt, *ids[:position]])[-1])
                best = np.argsort(-row_V, kind="stable")[: body["logprobs"]]
            tops.append({name(token): value, **{name(int(i)): float(row_V[i]) for i in best}})
        offsets = np.cumsum([0, *(len(_text(i)) for i in ids)])[: len(ids)].tolist()
        return {
            "text_offset": offsets,
            "token_logprobs": values,
            "tokens": [name(i) for i in ids],
            "top_logprobs": tops,
        }

    def _prompt_logprobs(self, k: int, prompt: list[int], logprobs: Logprobs) -> list[dict | None]:
        rows_TV = logprobs(prompt)
        entries: list[dict | None] = [None]
        for token, row_V in zip(prompt[1:], rows_TV, strict=False):
            row_V = self._off(row_V)
            order = np.argsort(-row_V, kind="stable") if k else ()
            wanted = [token, *(int(i) for i in (order if k == -1 else order[:k]) if int(i) != token)]
            entries.append(
                {
                    str(i): {
                        "logprob": float(row_V[i]),
                        "rank": 1 + int(np.count_nonzero(row_V > row_V[i])),
                        "decoded_token": _text(i),
                    }
                    for i in wanted
                }
            )
        return entries


def _failed_rpc(why: str) -> Refused:
    message = f"Call to collective_rpc method failed: Worker failed with error '{why}', please check the stack trace"
    return bad(message, kind="InternalServerError", code=500)


def _text(token: int) -> str:
    return chr(token) if 32 <= token < 127 else ""


def _normal(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())


def _truncated(logits_V: np.ndarray, body: dict) -> np.ndarray:
    """Log-probabilities after top-k, then top-p."""
    if (body.get("top_k") or 0) <= 0 and body.get("top_p", 1.0) == 1:
        return _normal(logits_V)
    order = np.argsort(-logits_V, kind="stable")
    keep = len(order)
    if (body.get("top_k") or 0) > 0:
        keep = min(keep, body["top_k"])
    probabilities = np.exp(_normal(logits_V[order[:keep]]))
    keep = int((np.cumsum(probabilities) - probabilities < body.get("top_p", 1.0)).sum())
    kept_V = np.full(len(order), -np.inf)
    kept_V[order[:keep]] = _normal(logits_V[order[:keep]])
    return kept_V


class _Broken(Exception):
    """The answer goes wrong below HTTP, or as HTTP that is no JSON."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    block_on_close = False

    def __init__(self, *arguments: Any):
        self.open: set[socket.socket] = set()
        self.waiting: list[socket.socket] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away, or a server that was killed: nobody needs to read of it."""

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.waiting:
            connection.close()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._serve("GET", None)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            self._serve("POST", json.loads(raw) if raw else None)

        def _serve(self, method: str, body: Any) -> None:
            parts = urlsplit(self.path)
            server.seen.append(Seen(method, parts.path, body, self.headers.get("Authorization")))
            try:
                wrong = server.key and self.headers.get("Authorization") != f"Bearer {server.key}"
                if wrong and parts.path.startswith("/v1/"):
                    raise Refused(401, {"error": "Unauthorized"})
                self._send(200, server.answer(method, parts.path, parse_qs(parts.query), body))
            except Refused as refused:
                self._send(refused.status, refused.body)
            except _Broken as broken:
                self._break(str(broken))

        def _send(self, status: int, body: Any) -> None:
            data = b"" if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self._raw(status, data, len(data), "text/plain" if isinstance(body, str) else "application/json")

        def _raw(self, status: int, data: bytes, length: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(data)

        def _break(self, how: str) -> None:
            text = b'{"id": "cmpl-0", "choices": [{"index": 0, "text": "'
            if how == "truncated":
                return self._raw(200, text, len(text), "application/json")
            if how == "html":
                page = b"<html><body>Welcome</body></html>"
                return self._raw(200, page, len(page), "text/html")
            if how == "half":
                self._raw(200, text, 10 * len(text), "application/json")
            if how == "die":
                server.kill()
            if how == "vanish":
                server.vanish()
            if how == "freeze":
                server.freeze()
            while how in ("hang", "vanish", "freeze") and server._http is self.server:
                time.sleep(0.01)
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
