"""A target on vLLM servers: its most likely tokens before each response token, from log-probabilities of the prompt.

Every answer is checked before it is believed; what a server did wrong has a message of its own. As with the samplers,
process 0 alone speaks with servers, and the callers see to it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpd_jax.sampling.servers import ServerError, Servers
from mpd_jax.types import TopK, UserError

PATH = "/v1/completions"
MASS = 1e-3  # by which probabilities may add up to more than one, rounding included


class Scorer:
    """Asks for the `top_k` most likely tokens of a frozen model after any text.

    Servers answer the log-probabilities of a prompt at temperature 1 and over the whole vocabulary, whatever they are
    asked, so that is the one temperature here. The number of prompt tokens in flight is bounded (ServerConfig).
    """

    def __init__(self, servers: Servers, top_k: int, temperature: float = 1.0):
        if temperature != 1:
            raise UserError(
                f"temperature = {temperature} is not allowed for a target on servers: they ignore it in the "
                "log-probabilities of a prompt; set it to 1, or read the target on the mesh"
            )
        if top_k < 1:
            raise UserError(
                f"recipe.target.top_k: {top_k} is not allowed for a target on servers; it must be 1 or more"
            )
        self.servers, self.top_k = servers, top_k

    def check(self, max_length: int) -> None:
        """Raises what would end the run later: too small a window, or server, for what will be asked."""
        if max_length >= self.servers.window:  # one token is always made
            raise ServerError(
                f"{self.servers}: prompt and response of {max_length} tokens (train.max_length) and one more exceed "
                f"the {self.servers.window} that it takes; raise its --max-model-len, or lower train.max_length"
            )
        self.score([((0,), (0,))])

    def score(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int]]], progress: Callable[[int], None] | None = None
    ) -> list[TopK]:
        """For each (prompt, response) in ids what the model says before each token of the response.

        `progress` is told how many are done, also while nothing comes.
        """
        found: dict[int, TopK] = {}

        def take(index: int, answer: dict) -> None:
            found[index] = top_of(answer, *texts[index], self.top_k)
            tick()

        def tick() -> None:
            if progress:
                progress(len(found))

        bodies = [self._body([*prompt, *response]) for prompt, response in texts]
        self.servers.ask(PATH, bodies, take, tick=tick, sizes=[len(body["prompt"]) for body in bodies])
        return [found[index] for index in range(len(texts))]

    def _body(self, ids: list[int]) -> dict:
        """Every field that could come from the server's generation_config is said."""
        return {
            "model": self.servers.model,
            "prompt": ids,
            "prompt_logprobs": self.top_k,
            "max_tokens": 1,  # fewer are refused
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "return_token_ids": True,
        }


def top_of(answer: dict, prompt: Sequence[int], response: Sequence[int], k: int) -> TopK:
    """What an answer says before each response token. ServerError where it says anything else."""
    ids = [*prompt, *response]
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise _wrong("not one choice for one prompt", "look at what stands between here and the server")
    entries, echo = choices[0].get("prompt_logprobs"), choices[0].get("prompt_token_ids")
    if not isinstance(entries, list):
        raise _wrong("no log-probabilities of the prompt (prompt_logprobs)", "use a vLLM that has them")
    if echo != ids:
        said = "no ids of the prompt" if echo is None else "other ids than were asked for"
        raise _wrong(f"{said} (return_token_ids)", "look at what stands between here and the server")
    if len(entries) != len(ids) or entries[0] is not None:
        raise _wrong(
            f"{len(entries)} entries for a prompt of {len(ids)} tokens, the first of them {str(entries[:1])[:60]}; it "
            "must be one a token, and null before the first",
            "use a vLLM that says what 0.32 does",
        )
    rows = [_best(entries[at], ids[at], k, at) for at in range(len(prompt), len(ids))]
    pairs = np.array(rows, np.float64).reshape(len(rows), k, 2)
    return TopK(pairs[..., 0].astype(np.int32), pairs[..., 1].astype(np.float32))


def _best(entry: Any, actual: int, k: int, at: int) -> list[tuple[int, float]]:
    """The k most likely (id, log-probability) of one position, the best first.

    A server adds the token that stands there where it is not among them, and in no certain order.
    """
    where = f"at position {at}"
    try:
        found = [(int(name), float(said["logprob"])) for name, said in entry.items()]
    except (AttributeError, TypeError, ValueError, LookupError):
        raise _wrong(f"{str(entry)[:80]!r} {where}", "use a vLLM that says what 0.32 does") from None
    held = dict(found)
    if len(held) < len(found) or min(held, default=0) < 0:
        raise _wrong(f"an id twice, or one below 0, {where}", "use a vLLM that says what 0.32 does")
    if actual not in held:
        raise _wrong(f"nothing on token {actual}, which stands {where}", "it has read another prompt: look at its log")
    bad = [value for value in held.values() if not math.isfinite(value) or value > MASS]
    if bad:
        raise _wrong(
            f"a log-probability of {bad[0]} {where}", "its weights or its arithmetic are broken: look at its log"
        )
    if len(held) > k:
        aside = held.pop(actual)
        if aside > min(held.values()) + MASS:
            raise _wrong(f"others than the {k} most likely tokens {where}", "use a vLLM that says what 0.32 does")
    if len(held) != k:
        raise _wrong(
            f"{len(held)} of the {k} most likely tokens {where}",
            "lower recipe.target.top_k to what it gives, or raise the server's --max-logprobs",
        )
    mass = sum(map(math.exp, held.values()))
    if mass > 1 + MASS:
        raise _wrong(
            f"probabilities that add up to {mass:.4f} {where}",
            "they must be the model's own: start it with --logprobs-mode raw_logprobs",
        )
    return sorted(held.items(), key=lambda pair: (-pair[1], pair[0]))


def _wrong(said: str, remedy: str) -> ServerError:
    return ServerError(f"teacher.serve: the server answers {said}; {remedy}")
