"""The ways in which weights reach a vLLM server that runs: a reload from a directory, an adapter, a restart.

Each is an ordinary route or start of an unmodified server. None is believed: weight_push.py proves what came of it.
"""

import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mpd_jax.sampling.servers import ServerError, Servers, Unreachable
from mpd_jax.types import UserError

LAG_S = 15.0  # a server on another host may see a new directory of a shared disk this much later
RESETS = 3
POLL_S = 0.5
KINDS = ("auto", "reload", "adapter", "restart")

Say = Callable[[str], None]


@dataclass(frozen=True)
class PushConfig:
    """How a student that servers hold is given its new weights (`sampling.push`).

    way: reload, all weights through /collective_rpc (servers started with VLLM_SERVER_DEV_MODE=1); adapter, where one
    trains and servers load adapters while they run (--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1); restart;
    auto takes the first of adapter, reload and restart that all servers have; restart where reloads fail for good.
    directory: where the weights are put, for the servers to read: run.dir/served unless given. Servers on other hosts
    need it on a disk that they share with process 0, or a gs:// address that is mounted there.
    seen_as: the same directory under the servers' name for it.
    dtype: of the files, and the one that servers compute in: the student's dtype unless given.
    restart: a shell command that starts a server again with other weights, run on process 0's host once for every
    server; {directory} and {url} in it stand for the weights and the server. Without it somebody has to do it by hand.
    timeout_s: for a server to load the weights; one that restarts has sampling.server.patience_s.
    """

    way: Literal["auto", "reload", "adapter", "restart"] = "auto"
    directory: str | None = None
    seen_as: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    restart: str | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("directory", self.directory is None or self.directory.strip(), "a path or a gs:// address"),
            ("seen_as", self.seen_as is None or self.seen_as.strip(), "a path as the servers see it"),
            ("restart", self.restart is None or self.way in ("auto", "restart"), f"left out with way={self.way}"),
            ("timeout_s", 0 < self.timeout_s < float("inf"), "above 0, in seconds"),
        ):
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)!r} is not allowed; it must be {allowed}")
        if self.directory and self.directory.startswith("gs://") and self.seen_as is None:
            raise UserError(
                f"directory: servers read {self.directory} through a mount; set sampling.push.seen_as to its path there"
            )


class NoReload(ServerError):
    """A server that has the route, and a worker that cannot reload weights. It is as it was."""


class Way(Protocol):
    """How one server, a `Servers` of its own, is given weights.

    adapter: whether the directory holds an adapter. A version has a name of its own, which no other ever had.
    """

    kind: str
    adapter: bool

    def put(self, server: Servers, name: str, directory: str) -> None:
        """Afterwards it should compute with the weights in `directory`. Twice with the same name is allowed."""
        ...

    def holds(self, server: Servers, name: str) -> bool | None:
        """Whether it still has what was put there under this name; None if it cannot tell."""
        ...

    def model(self, server: Servers, name: str) -> str:
        """What requests name as their model."""
        ...

    def tidy(self, server: Servers, name: str, prefix: str) -> None:
        """Gives up what was put there before, under names with this prefix; nothing is in flight that uses it."""
        ...


class _Whole:
    """What ways have in common that replace a server's own weights."""

    adapter = False

    def holds(self, server: Servers, name: str) -> bool | None:
        held = _stamped(server)
        return None if held is None else held == name

    def model(self, server: Servers, name: str) -> str:
        return server.model

    def tidy(self, server: Servers, name: str, prefix: str) -> None:
        pass


class Reload(_Whole):
    """Paused, reloaded, its prefix cache emptied, stamped, resumed. A failed reload leaves half of the old weights, and
    the next request would kill the server: it stays paused, until a push has come through."""

    kind = "reload"

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s

    def put(self, server: Servers, name: str, directory: str) -> None:
        body = {
            "method": "reload_weights",
            "kwargs": {"weights_path": directory},
            "timeout": self.timeout_s,
        }
        server.every("POST", "/pause?mode=keep", ok=(200, 404))
        try:
            _when_seen(lambda: server.every("POST", "/collective_rpc", body, timeout_s=self.timeout_s + 10))
        except Unreachable:
            raise
        except ServerError as error:
            if re.search(NO_RELOAD, str(error)):
                _resume(server)
                raise NoReload(f"{error}; it cannot reload (servers on TPUs cannot)") from None
            raise ServerError(
                f"{error}; {_unseen_remedy(directory)}. It is left paused, for its weights are half replaced and a "
                "request would kill it: start it again, then run the same command again"
            ) from None
        _reset(server)
        _stamp(server, name)
        _resume(server)


class Adapter:
    """Loaded under a name of its own: one that is loaded again under its old name would meet blocks of the prefix
    cache that the old weights made."""

    kind, adapter = "adapter", True

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s

    def put(self, server: Servers, name: str, directory: str) -> None:
        if self.holds(server, name):
            self._unload(server, name)
            if _has(server, "/reset_prefix_cache"):
                _reset(server)
        _resume(server)  # a run whose way was another one may have left it paused
        body = {"lora_name": name, "lora_path": directory}
        try:
            _when_seen(lambda: server.every("POST", "/v1/load_lora_adapter", body, timeout_s=self.timeout_s))
        except Unreachable:
            raise
        except ServerError as error:
            raise ServerError(f"{error}; {_unseen_remedy(directory)}") from None

    def holds(self, server: Servers, name: str) -> bool | None:
        return name in _adapters(server)

    def model(self, server: Servers, name: str) -> str:
        return name

    def tidy(self, server: Servers, name: str, prefix: str) -> None:
        for old in _adapters(server):
            if old.startswith(prefix) and old != name:
                self._unload(server, old)

    def _unload(self, server: Servers, name: str) -> None:
        server.every("POST", "/v1/unload_lora_adapter", {"lora_name": name}, ok=(200, 404))


class Restart(_Whole):
    """The command runs, or somebody is asked to; it is over when the server was seen to be away and is back."""

    kind = "restart"

    def __init__(self, command: str | None, say: Say, patience_s: float):
        self.command, self.say, self.patience_s = command, say, patience_s

    def put(self, server: Servers, name: str, directory: str) -> None:
        url, patience_s = server.urls[0], self.patience_s
        if self.command is None:
            self.say(
                f"{url} has to be started again with the new weights, within {patience_s:.0f} s: "
                f"vllm serve {shlex.quote(directory)} --served-model-name {shlex.quote(server.model)} ... "
                "(sampling.push.restart can do it)"
            )
            self._wait(server, lambda: True)
        else:
            command = self.command.replace("{directory}", shlex.quote(directory)).replace("{url}", shlex.quote(url))
            with tempfile.TemporaryFile() as output:
                # In a session of its own: Ctrl-C is for this process, not for the server.
                process = subprocess.Popen(
                    command, shell=True, start_new_session=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )

                def ended() -> bool:
                    code = process.poll()
                    if code:
                        output.seek(0)
                        said = output.read().decode(errors="replace").strip()[-500:] or "nothing"
                        raise UserError(
                            f"sampling.push.restart: {command!r} ended with exit code {code} and said: {said}"
                        )
                    return code == 0

                self._wait(server, ended)
        if _has(server, "/update_weight_version"):
            _stamp(server, name)

    def _wait(self, server: Servers, ended: Callable[[], bool]) -> None:
        went, deadline = False, time.monotonic() + self.patience_s
        while True:
            up = server.alive()[0]
            went |= not up
            if ended() and went and up:
                return
            if time.monotonic() > deadline:
                so_far = "it went and has not come back" if went else "it has not gone away"
                raise UserError(
                    f"{server.urls[0]}: {so_far} within {self.patience_s:.0f} s of its restart; look into the server's "
                    "log, mend sampling.push.restart, or raise sampling.server.patience_s"
                )
            time.sleep(POLL_S)


def choose(config: PushConfig, servers: Servers, *, adapts: bool, experts: bool) -> str:
    """The kind of way that all servers have. adapts: an adapter trains; experts: the model's layers have some."""
    loads_adapters = adapts and _has(servers, "/v1/load_lora_adapter")
    reloads = _has(servers, "/collective_rpc")
    on_cpu = experts and reloads and _on_cpu(servers)
    restarts = config.restart is not None
    if config.way == "adapter" and not adapts:
        raise UserError("sampling.push.way: adapter needs one that trains; set student.lora, or way=reload")
    if config.way == "adapter" and not loads_adapters:
        raise _no_way(servers, "adapter", "/v1/load_lora_adapter")
    if config.way == "reload" and not reloads:
        raise _no_way(servers, "reload", "/collective_rpc")
    if config.way == "reload" and on_cpu:
        raise UserError(
            f"sampling.push.way: {servers.urls[0]} runs on a CPU, where vLLM reloads experts wrongly; set way=restart"
        )
    if config.way != "auto":
        return config.way
    if loads_adapters:
        return "adapter"
    if reloads and not on_cpu:
        return "reload"
    if restarts or on_cpu:
        return "restart"
    raise _no_way(servers, "auto", "/collective_rpc")


def way_of(kind: str, config: PushConfig, say: Say, patience_s: float) -> Way:
    """The way of this kind. patience_s: for a server that restarts."""
    match kind:
        case "reload":
            return Reload(config.timeout_s)
        case "adapter":
            return Adapter(config.timeout_s)
        case "restart":
            return Restart(config.restart, say, patience_s)
    raise AssertionError(kind)


def _no_way(servers: Servers, way: str, route: str) -> UserError:
    return UserError(
        f"sampling.push.way: {way} is not possible, for {', '.join(servers.urls)} lacks the route {route}; start the "
        "server with VLLM_SERVER_DEV_MODE=1 in its environment for reload, or with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 "
        "and --enable-lora for adapter (student.lora), or set sampling.push.restart to a command that starts it again"
    )


def _has(servers: Servers, route: str) -> bool:
    """Whether all have a route that takes POST only: asked by GET they refuse, and nothing happens."""
    answers = servers.every("GET", route, ok=(200, 404, 405))
    return all(isinstance(answer, dict) and answer.get("detail") == "Method Not Allowed" for answer in answers)


def _on_cpu(servers: Servers) -> bool:
    """Whether one of them computes on a CPU, as far as they say."""
    answers = servers.every("GET", "/server_info?config_format=text", ok=(200, 404))
    return any("device_config=cpu" in str(answer) for answer in answers)


def _adapters(server: Servers) -> list[str]:
    """The names of its adapters."""
    return [entry["id"] for entry in server.every("GET", "/v1/models")[0]["data"] if entry.get("parent") is not None]


def _resume(server: Servers) -> None:
    server.every("POST", "/resume", ok=(200, 404))


def _reset(server: Servers) -> None:
    """Its prefix cache is empty. Servers before 0.26 answer nothing, and are believed."""
    answer: Any = None
    for attempt in range(RESETS):
        time.sleep(attempt * POLL_S)
        answer = server.every("POST", "/reset_prefix_cache")[0]
        if not isinstance(answer, dict) or answer.get("success") is True:
            return
    raise ServerError(
        f"{server.urls[0]}/reset_prefix_cache: the server answers {answer}, {RESETS} times: its prefix cache still "
        "holds what the old weights made; somebody else may be using it: leave it to this run, and start it again"
    )


def _stamped(server: Servers) -> str | None:
    """The name that the server was given with its weights; None where it keeps none."""
    answer = server.every("GET", "/weight_info", ok=(200, 404))[0]
    return answer.get("weight_version") if isinstance(answer, dict) else None


def _stamp(server: Servers, name: str) -> None:
    server.every("POST", "/update_weight_version", {"new_version": name}, ok=(200, 404))
    held = _stamped(server)
    if held is not None and held != name:
        raise ServerError(
            f"{server.urls[0]}/weight_info: the server says that its weights are {held!r}, just after it was given "
            f"{name!r}; somebody else gives it weights too: leave it to this run, and start it again"
        )


NO_RELOAD = r"no attribute 'reload_weights'|'reload_weights' is not implemented"
UNSEEN = r"No such file|No adapter found|does not exist|not a directory|Cannot find"


def _when_seen(call: Callable[[], Any]) -> None:
    """The call, again while the server does not see the directory yet."""
    deadline = time.monotonic() + LAG_S
    while True:
        try:
            call()
            return
        except ServerError as error:
            if not re.search(UNSEEN, str(error)) or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _unseen_remedy(directory: str) -> str:
    return (
        f"if it does not see {directory}, set sampling.push.directory to a place on a disk that it shares with process "
        "0, and sampling.push.seen_as to its name for it"
    )
