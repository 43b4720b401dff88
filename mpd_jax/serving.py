"""Models that vLLM servers hold: from `serve` of a config's sections to samplers that ask there (samplers.Remote).

Process 0 alone speaks with servers; every process makes the same calls here, and hears what it has to.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from mpd_jax import files, hosts
from mpd_jax.config import RunConfig
from mpd_jax.roles import ModelFiles
from mpd_jax.sampling.servers import Servers
from mpd_jax.sampling.vllm_client import Push, VLLMSampler
from mpd_jax.types import UserError

Secrets = Callable[[str], str | None]  # the environment, of which only the command line knows
MakePush = Callable[[ModelFiles, str | None], Push]  # what brings or proves a model's weights; with the API key


def require_window(key: str, servers: Servers, window: int, max_length: int) -> None:
    """UserError unless the servers of section `key` take as much as is to be read and written there."""
    if max_length > window:
        raise UserError(
            f"{key}.serve: prompts and responses of {max_length} tokens together exceed the {window} that "
            f"{', '.join(servers.urls)} takes; raise --max-model-len there, or lower sampling.prompt_tokens, or "
            "max_tokens in sampling.writer, sampling.rewriter or eval"
        )


def unproved(held: ModelFiles) -> str:
    """What is said of servers whose weights are not on the mesh."""
    return (
        f"{held.key}: that {', '.join(held.serve)} computes with {held.key}.path is unproved, for the mesh does not "
        "hold these weights; `mpd-jax doctor` compares them"
    )


class Serving:
    """Makes the samplers of models that are served, once their servers answer.

    run_dir: holds responses until they are stored as what they are for. settings: see VLLMSampler. push: makes what
    brings the student's weights to its servers, and what proves that those of another model hold it; without it
    nothing does.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: files.AnyPath,
        settings: str,
        *,
        secrets: Secrets,
        say: Callable[[str], None],
        progress: Callable[[str, int], AbstractContextManager[Callable[..., None]]],
        push: MakePush | None = None,
    ):
        self._config, self._run_dir, self._settings = config.sampling.server, run_dir, settings
        # A key that cannot be one is process 0's to refuse.
        self._key = secrets(self._config.key) if hosts.is_main() else None
        self._say, self._progress, self._push = say, progress, push
        self._servers: dict[str, Servers] = {}
        self._pushes: dict[str, Push] = {}
        self._spills: list[files.AnyPath] = []

    def servers(self, held: ModelFiles) -> Servers:
        """The servers of a model, once one of them has answered."""
        if held.key not in self._servers:
            servers = self._servers[held.key] = Servers(held.serve, self._config, key=self._key, say=self._say)
            hosts.from_main(lambda: self._wait(held.key, servers))
        return self._servers[held.key]

    def sampler(self, held: ModelFiles, role: str, max_length: int) -> VLLMSampler:
        """A sampler of a served model, for prompts and responses of `max_length` tokens together."""
        servers = self.servers(held)
        if self._push is not None and held.key not in self._pushes:
            self._pushes[held.key] = self._push(held, self._key)
        window = hosts.from_main(lambda: servers.window)
        require_window(held.key, servers, window, max_length)
        self._spills.append(self._run_dir / "trajectories" / f"unfinished.{role}.jsonl")
        return sampler_of(
            held, servers, max_length, self._spills[-1], settings=self._settings, push=self._pushes.get(held.key)
        )

    def forget(self) -> None:
        """Removes the last responses: they are stored elsewhere by now."""
        for path in self._spills:
            files.remove(path)

    def _wait(self, key: str, servers: Servers) -> None:
        with self._progress(f"waiting for {key}.serve", 1) as advance:

            def tick() -> None:
                advance(0)
                hosts.check()

            # The student is proved by its first push, and a push that was cut short has left its servers paused.
            servers.wait_until_ready(tick, trial=key != "student")
            advance(1)
        says = f"{servers.model!r}, prompts and responses of {servers.window} tokens, vLLM {servers.version}"
        self._say(f"{key}: served by {', '.join(servers.urls)} ({says})")


def sampler_of(
    held: ModelFiles,
    servers: Servers,
    max_length: int,
    spill: files.AnyPath,
    settings: str = "",
    push: Push | None = None,
) -> VLLMSampler:
    """A sampler on servers that hold this model; see VLLMSampler."""
    return VLLMSampler(
        servers,
        eos_ids=held.eos_ids,
        vocab_size=held.chat.vocab_size,
        padding=held.model.config.vocab_size - held.chat.vocab_size,
        max_length=max_length,
        spill=spill,
        settings=settings,
        push=push,
    )
