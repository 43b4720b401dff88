"""What the servers of a run can do, found out by asking them what the run will ask, a few tokens at a time."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jax.sharding import Mesh

from mpd_jax.config import RunConfig
from mpd_jax.data.chat import marked, parting, user
from mpd_jax.doctor import flags
from mpd_jax.doctor.models import PROBE
from mpd_jax.doctor.rows import Row, check, failed, sound
from mpd_jax.models.decoder import Weights
from mpd_jax.plan.phases import ELSEWHERE
from mpd_jax.roles import ModelFiles, Roles
from mpd_jax.samplers import make_samplers
from mpd_jax.sampling.agreement import compare
from mpd_jax.sampling.probe import PROMPTS, Probe, probe_tokens
from mpd_jax.sampling.sampler import Request, SamplingConfig
from mpd_jax.sampling.scorer import Scorer
from mpd_jax.sampling.servers import ServerError, Servers, Unreachable
from mpd_jax.sampling.vllm_client import PATH
from mpd_jax.sampling.ways import choose
from mpd_jax.sampling.wire import LOOK_S
from mpd_jax.serving import require_window, sampler_of
from mpd_jax.types import UserError

DRAWN = 16  # tokens of a trial response
PATIENCE_S = 180.0  # for an answer: a server may compile when it is first asked


@dataclass(frozen=True)
class Asked:
    """What a run asks of the servers of a model. length: of a prompt with its response, in tokens, 0 where nothing is
    sampled. top_k: most likely tokens at a position, 0 where nothing is scored."""

    held: ModelFiles
    length: int
    top_k: int


def asked_of_servers(config: RunConfig, roles: Roles, mesh: Mesh) -> list[Asked]:
    """By model. UserError where a sampler on the mesh cannot be made."""
    lengths: dict[str, int] = {}
    models: dict[str, ModelFiles] = {}

    def remote(held: ModelFiles, role: str, length: int) -> object:
        models[held.key], lengths[held.key] = held, max(length, lengths.get(held.key, 0))
        return ELSEWHERE

    make_samplers(config, roles, mesh, lambda trained: trained, remote)  # type: ignore[arg-type] - nobody samples
    top_k, target = config.recipe.target.top_k, roles.target(config.recipe)
    scored = target.key if target is not None and top_k else None
    if target is not None and scored:
        models[scored] = target
    return [Asked(held, lengths.get(key, 0), top_k if key == scored else 0) for key, held in models.items()]


class Inspected:
    """The servers of one model, each looked at alone.

    whole: their start flags too, which may take a server some seconds to tell. Without it one that does not answer its
    first request soon is left alone: it compiles, or a run that was killed left it paused, and the next push will end
    that.
    """

    def __init__(self, config: RunConfig, asked: Asked, key: str | None, *, whole: bool):
        self.config, self.asked, self.whole = config, asked, whole
        server = config.sampling.server
        if whole:
            server = replace(server, patience_s=PATIENCE_S, timeout_s=PATIENCE_S)
        self.all = Servers(asked.held.serve, server, key=key, say=lambda message: None)
        self.one = {url: Servers([url], server, key=key, say=lambda message: None) for url in self.all.urls}

    @property
    def name(self) -> str:
        return self.asked.held.key

    def rows(self) -> list[Row]:
        if len(self.one) > 1:
            try:
                self.all.facts()
            except Unreachable:
                pass  # said of each below
            except UserError as error:
                return [failed(f"{self.name}: servers", error)]
        found: dict[Row, list[str]] = {}
        for url, server in self.one.items():
            for row in self._rows(server):
                found.setdefault(row, []).append(url)
        return [row if len(at) == len(self.one) else replace(row, what=f"{row.what}, {', '.join(at)}")
                for row, at in found.items()]  # fmt: skip

    def _rows(self, server: Servers) -> list[Row]:
        held, name = self.asked.held, self.name
        try:
            facts = server.facts()
        except Unreachable as error:
            others = any(other.alive()[0] for other in self.one.values() if other is not server)
            return [failed(f"{name}: server", error, "warn" if others else "FAIL")]
        except UserError as error:
            return [failed(f"{name}: server", error)]
        seen = f"vLLM {facts.version}, {facts.model!r}, {facts.window:,} tokens"
        found = [Row(f"{name}: server", "ok", seen)]
        if self.whole:
            told = flags.told(server)
            found += flags.rows(self.config, held, told, samples=self.asked.length > 0, scores=self.asked.top_k > 0)
        if not sound(found):
            return found  # what follows might be its end
        found.append(check(f"{name}: vocabulary of the server", lambda: self._vocabulary(server)))
        if found[-1].silent:
            return found
        if self.asked.length:
            found.append(check(f"{name}: window", lambda: self._window(server)))
            found += self._drawn(server)
        if self.asked.top_k:
            found.append(check(f"{name}: scores", lambda: self._scores(server)))
        found += self._tokenized(server)
        if name == "student":
            found.append(check(f"{name}: push", lambda: self._push(server)))
        return found

    def _window(self, server: Servers) -> str:
        require_window(self.name, server, server.window, self.asked.length)
        return f"{self.asked.length:,} tokens of prompt and response at most, {server.window:,} are taken"

    def _vocabulary(self, server: Servers) -> str:
        rows = self.asked.held.model.config.vocab_size
        body = {"model": server.model, "prompt": [rows - 1], "max_tokens": 1, "temperature": 0.0}
        server.every("POST", PATH, body, timeout_s=PATIENCE_S if self.whole else LOOK_S, patience_s=0.0)
        return f"it takes id {rows - 1:,}, the last row of the head"

    def _drawn(self, server: Servers) -> list[Row]:
        """One seed drawn twice: what the sampler refuses in an answer, and whether the two are alike."""
        held, what = self.asked.held, f"{self.name}: responses"
        seeded = self.config.sampling.server.seed == "request"
        with tempfile.TemporaryDirectory() as place:
            sampler = sampler_of(held, server, server.window, Path(place) / "drawn.jsonl")
            sampler.load(None, 0)
            request = Request(held.chat.prompt("plain", PROBE), (1, 2))
            try:
                first, second = sampler.sample([request] * 2, SamplingConfig(max_tokens=DRAWN))
            except UserError as error:
                return [failed(what, error)]
            finally:
                server.admit = None
        row = Row(
            what,
            "ok",
            "token ids, and the model's own log-probabilities (raw); every sampling field is sent, so that the "
            "server's generation_config takes no part",
        )
        if not seeded:
            none = "none is sent (sampling.server.seed=none): the run is not reproducible"
            return [row, Row(f"{self.name}: seeds", "ok", none)]
        if first.ids == second.ids:
            return [row, Row(f"{self.name}: seeds", "ok", f"one seed drew the same {len(first.ids)} tokens twice")]
        at = parting(first.ids, second.ids)
        seen = f"one seed drew other tokens the second time, from token {at} on"
        change = "set sampling.server.seed=none if it ignores seeds; such a run is not reproducible"
        return [row, Row(f"{self.name}: seeds", "warn", seen, change)]

    def _scores(self, server: Servers) -> str:
        Scorer(server, self.asked.top_k).check(self.config.train.max_length)
        return f"the {self.asked.top_k} most likely tokens of a position, in {self.config.train.max_length:,} tokens"

    def _tokenized(self, server: Servers) -> list[Row]:
        """Ids are sent, never text: the server's own tokenizer shows which model it holds."""
        chat, what = self.asked.held.chat, f"{self.name}: tokenizer of the server"
        text, prompt = chat.message("plain", PROBE), chat.prompt("plain", PROBE)
        bodies = (
            {"prompt": text, "add_special_tokens": False},
            {"messages": [user(text)], "add_generation_prompt": True, "chat_template_kwargs": chat.template},
        )
        try:
            found = [
                server.every("POST", "/tokenize", body, ok=(200, 400, 404), timeout_s=LOOK_S)[0] for body in bodies
            ]
        except UserError as error:
            return [failed(what, error)]
        words, rendered = (answer.get("tokens") if isinstance(answer, dict) else None for answer in found)
        if not isinstance(words, list) or not isinstance(rendered, list):
            return [Row(what, "skipped", "it has no route /tokenize that answers")]
        if words != (ours := list(chat.encode(text))):
            at = parting(ours, words)
            seen = f"{text!r} is {words[at : at + 5]} from token {at} on, and {ours[at : at + 5]} by {self.name}.path"
            return [Row(what, "FAIL", seen, "serve the model that the config names")]
        if rendered != list(prompt):
            at = parting(prompt, rendered)
            known = [i for i in rendered if isinstance(i, int) and 0 <= i < chat.vocab_size]
            seen = f"its chat template makes {marked(chat, known, at)}, and {self.name}.path {marked(chat, prompt, at)}"
            change = "ids are sent, so that it takes no part; but look whether it is the model that the config names"
            return [Row(what, "warn", seen, change)]
        return [Row(what, "ok", f"a prompt of {len(prompt)} tokens, id by id the one that is sent")]

    def _push(self, server: Servers) -> str | Row:
        held, push = self.asked.held, self.config.sampling.push
        experts = held.model.config.experts is not None
        way = choose(push, server, adapts=held.adapted is not None, experts=experts)
        if way == "restart" and push.restart is None:
            seen = "restart, by hand: the run waits for it at every push"
            return Row(f"{self.name}: push", "warn", seen, "set sampling.push.restart to a command that does it")
        return way

    def agreement(self, mesh: Mesh, samples: Sequence[Sequence[int]], weights: Weights) -> list[Row]:
        """Log-probabilities of the same ids here, of the weights in the directory, and at each server."""
        held, found = self.asked.held, []
        tokens_BT = probe_tokens(samples[:PROMPTS], held.model.config.vocab_size, self.config.run.seed)
        for url, server in self.one.items():
            at = f", {url}" if len(self.one) > 1 else ""

            def see(server: Servers = server, what: str = f"{self.name}: log-probabilities{at}") -> str | Row:
                dtype = flags.dtype(flags.told(server)) or held.model.dtype
                probe = Probe(held.model, mesh, tokens_BT, dtype, merge=True)
                there = probe.there(server, server.model)
                found = compare(probe, there, probe.here(weights), weights, dtype, held.directory)
                if found.by == "nothing":
                    return found.seen
                if found.by == "weights" and self.name == "student":
                    seen = f"it does not hold the weights of {held.directory} now ({found.seen})"
                    return Row(what, "skipped", f"{seen}: the first push proves those that it is given")
                raise ServerError(f"{found.seen}; {found.change}")

            found.append(check(f"{self.name}: log-probabilities{at}", see))
        return found
