"""The sampler that stands on vLLM servers: token ids there, token ids back, and no answer believed unread.

Every field that shapes a draw is sent, so that nothing of the server's generation_config.json takes part. Not here:
how requests reach a server that may die (servers.py), and how it gets weights (`Push`).
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import Any, Protocol

from mpd_jax import files, hosts
from mpd_jax.sampling.sampler import Request, Response, SamplingConfig
from mpd_jax.sampling.servers import ServerError, Servers
from mpd_jax.sampling.spill import Spill
from mpd_jax.types import UserError

PATH = "/v1/completions"
NEVER = -100.0  # the bias of an id that is not to be drawn; vLLM takes none lower
PROBED = 8  # tokens that show which log-probabilities a server answers
ROUNDING = 1e-3  # by which a log-probability may exceed 0


class Push(Protocol):
    """What brings the weights that train to the servers of their model."""

    def model_name(self) -> str:
        """Under which the servers hold the weights pushed last."""
        ...

    def push(self, trained: Any, version: int) -> Any:
        """Called on every process; returns once the servers answer with these weights."""
        ...

    def forget_after(self, version: int) -> None:
        """Called on every process: later versions are none any more, for others will bear their numbers."""
        ...

    def admit(self, url: str) -> None:
        """Called on process 0, in a thread of its own in which `hosts` may not be used, before the server gets work,
        and again when it was away: it may hold the weights of its start. Unreachable: it is not let in yet."""
        ...


class VLLMSampler:
    """A `Sampler` (sampler.py) whose model is on servers. Process 0 asks them, and tells the others.

    vocab_size: ids that may be drawn; the servers' heads have `padding` columns more. settings: stands for whatever
    else the responses depend on, as in train/records.py. spill: the file in which responses stay until the next call.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        eos_ids: Collection[int],
        vocab_size: int,
        padding: int = 0,
        max_length: int,
        spill: files.AnyPath,
        settings: str = "",
        push: Push | None = None,
    ):
        self.version, self.max_length = -1, max_length
        self.servers, self.eos_ids, self.vocab_size, self.padding = servers, frozenset(eos_ids), vocab_size, padding
        self._spill, self._settings, self._push = Spill(spill), settings, push
        servers.admit = self._admit

    def load(self, weights: Any, version: int) -> None:
        """Pushes `weights`, once a version; None: the servers have them already."""
        if self._push is not None and weights is not None and version != self.version:
            self._push.push(weights, version)
        self.version = version

    def forget_after(self, version: int) -> None:
        """Nothing is answered any more with later versions, whose numbers other weights will bear."""
        self.version = -1
        self._spill.clear()
        if self._push is not None:
            self._push.forget_after(version)

    def model_name(self) -> str:
        return self._push.model_name() if self._push is not None else self.servers.model

    def sample(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        progress: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Responses in the order of the requests. `progress` is told the number of finished responses, on process 0."""
        assert self.version >= 0, "load comes before sample"
        for request in requests:
            length = len(request.prompt)
            if length < 1 or length + sampling.max_tokens > self.max_length:
                raise UserError(
                    f"a prompt of {length} tokens and max_tokens = {sampling.max_tokens} exceed the {self.max_length} "
                    "tokens that this sampler was made for; raise sampling.prompt_tokens or leave the problem out"
                )
        made = hosts.from_main(lambda: self._sampled(requests, sampling, progress)) if requests else []
        return [Response(tuple(ids), tuple(logprobs), ended) for ids, logprobs, ended in made]

    def _sampled(
        self, requests: Sequence[Request], sampling: SamplingConfig, progress: Callable[[int], None] | None
    ) -> list[tuple[Sequence[int], Sequence[float], str]]:
        bodies = [self.body(request.prompt, request.key, sampling) for request in requests]
        keys = [self._key(request, body) for request, body in zip(requests, bodies, strict=True)]
        with closing(self._spill):
            there = self._spill.begin(keys)
            responses = {index: there[key] for index, key in enumerate(keys) if key in there}
            missing = [index for index in range(len(requests)) if index not in responses]

            def tell() -> None:
                if progress:
                    progress(len(responses))

            def take(number: int, answer: dict) -> None:
                index = missing[number]
                responses[index] = self._checked(answer, requests[index], sampling)
                self._spill.add(keys[index], responses[index])
                tell()

            tell()
            model = {"model": self.model_name()} if missing else {}
            self.servers.ask(PATH, [{**model, **bodies[index]} for index in missing], take, tick=tell)
        return [(r.ids, r.logprobs, r.ended) for r in map(responses.__getitem__, range(len(requests)))]

    def body(self, prompt: Sequence[int], key: tuple[int, int], sampling: SamplingConfig) -> dict[str, Any]:
        """What is sent, but for the model's name. The stops are the role's own and nobody else's (ignore_eos)."""
        seeded = self.servers.config.seed == "request"
        return {
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "seed": (key[0] << 32 | key[1]) & (2**63 - 1) if seeded else None,
            "stop_token_ids": sorted(self.eos_ids),
            "ignore_eos": True,
            "stop": [],
            "min_tokens": 0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {str(self.vocab_size + i): NEVER for i in range(self.padding)} or None,
            "n": 1,
            "stream": False,
            "echo": False,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _key(self, request: Request, body: dict) -> str:
        depends_on = json.dumps([self._settings, self.version, request.key, body])
        return hashlib.blake2b(depends_on.encode(), digest_size=12).hexdigest()

    def _admit(self, url: str) -> None:
        """A server that may get work: it has the weights, and its log-probabilities are the model's own.

        Drawing from the most probable token alone leaves these as they are; processed ones are then 0.
        """
        if self._push is not None:
            self._push.admit(url)
        greedy, alone = SamplingConfig(0.0, 1.0, 0, PROBED), SamplingConfig(1.0, 1.0, 1, PROBED)
        said = []
        for sampling in (greedy, alone):
            body = {"model": self.model_name(), **self.body((0,), (0, 0), sampling), "stop_token_ids": []}
            (answer,) = self.servers.every("POST", PATH, body, urls=[url], patience_s=0.0)
            choice = self._choice(answer)
            said.append(_numbers((choice.get("logprobs") or {}).get("token_logprobs")))
        if min(said[0], default=0.0) < -ROUNDING and min(said[1], default=-1.0) > -(ROUNDING**2):
            raise ServerError(
                f"{url}: its log-probabilities are those after temperature and truncation, not the model's own; start "
                "it with --logprobs-mode raw_logprobs, which is the default"
            )

    # Answers

    def _checked(self, answer: dict, request: Request, sampling: SamplingConfig) -> Response:
        """The response in an answer, or ServerError with what is wrong with it."""
        choice = self._choice(answer)
        ids, echo, finish = choice.get("token_ids"), choice.get("prompt_token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list) or not isinstance(echo, list):
            raise self._wrong(
                "there are no token ids in it (return_token_ids); install vLLM 0.10.2 or newer there, or take away "
                "what stands between"
            )
        if tuple(echo) != tuple(request.prompt):
            raise self._wrong(
                f"it answers a prompt of {len(echo)} tokens, and not the one of {len(request.prompt)} that was sent; "
                "look at what stands between here and the server"
            )
        strange = [token for token in ids if type(token) is not int or not 0 <= token < self.vocab_size]
        if strange:
            raise self._wrong(
                f"id {strange[0]!r} is none of the tokenizer's {self.vocab_size}; the server holds another model: "
                "serve the one that the config names"
            )
        return Response(tuple(ids), self._logprobs(choice, ids), self._ended(ids, finish, sampling.max_tokens))

    def _choice(self, answer: Any) -> dict:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._wrong("it holds no response, or several; look at what stands between here and the server")
        return choices[0]

    def _logprobs(self, choice: dict, ids: Sequence[int]) -> tuple[float, ...]:
        values = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(values, list) or len(values) != len(ids):
            count = len(values) if isinstance(values, list) else "no"
            raise self._wrong(
                f"{count} log-probabilities for {len(ids)} ids; look at what stands between here and the server"
            )
        numbers = _numbers(values)
        if len(numbers) < len(values) or max(numbers, default=0.0) > ROUNDING:
            at = next(i for i, v in enumerate(values) if not _numbers([v]) or v > ROUNDING)
            raise self._wrong(
                f"{values[at]!r} is the log-probability of id {ids[at]} at position {at}, which is to be finite and at "
                "most 0; the model there computes no numbers: look at its weights, and serve it in bfloat16 or float32"
            )
        return tuple(numbers)

    def _ended(self, ids: Sequence[int], finish: str | None, max_tokens: int) -> str:
        """ "stopped" or "cut"; refused unless the ids end as the server says that they do."""
        early = next((i for i, token in enumerate(ids[:-1]) if token in self.eos_ids), None)
        last = ids[-1] if ids else None
        if early is not None:
            raise self._wrong(f"it goes on after id {ids[early]} at position {early}, at which it was to stop")
        if finish not in ("stop", "length"):
            raise self._wrong(f"it ended for a reason that is none here: finish_reason {finish!r}")
        if last in self.eos_ids:
            return "stopped"
        if finish == "stop":
            raise self._wrong(
                f"it stopped at id {last}, and this model's ends are {sorted(self.eos_ids)}; start the server without "
                "stop words of its own (--override-generation-config)"
            )
        if len(ids) != max_tokens:
            raise self._wrong(
                f"it was cut after {len(ids)} tokens of max_tokens = {max_tokens}; raise the server's --max-model-len"
            )
        return "cut"

    def _wrong(self, why: str) -> ServerError:
        return ServerError(f"{', '.join(self.servers.urls)}{PATH}: an answer cannot be used: {why}")


def _numbers(values: Any) -> list[float]:
    """The finite numbers among `values`."""
    return [v for v in values or () if isinstance(v, int | float) and math.isfinite(v)]
