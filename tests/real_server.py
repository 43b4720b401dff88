"""A real vLLM server on this machine's CPU, on 127.0.0.1, for the tests marked `server` (tests/install_vllm.sh)."""

import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

# With the head among the modules, prompt log-probabilities of two requests at once kill the engine.
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-target-modules", *ADAPTED)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else the first prompt log-probabilities take 18 s
    "HF_HUB_OFFLINE": "1",
}
# Ends the server that runs, if one does, and starts one of the directory that is given. Not until it answers.
SCRIPT = """
if [ -f {pid} ]; then
  group=$(cat {pid})
  kill -TERM -- -$group 2>/dev/null
  for _ in $(seq 50); do kill -0 -- -$group 2>/dev/null || break; sleep 0.2; done
  kill -KILL -- -$group 2>/dev/null
fi
setsid {command} >>{log} 2>&1 </dev/null &
echo $! >{pid}
"""


def vllm_python() -> str:
    """The interpreter of the server's environment; the test is skipped where none is named."""
    python = os.environ.get("MPD_VLLM_PYTHON")
    if not python:
        pytest.skip("MPD_VLLM_PYTHON names no python with vLLM; see tests/install_vllm.sh")
    return python


class RealServer:
    """restart: a shell command that starts it again with the weights in {directory}."""

    def __init__(self, place: Path, flags: list[str], key: str | None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log, self._pid, script = f"http://127.0.0.1:{port}", place / "log", place / "pid", place / "go"
        words = [str(Path(vllm_python()).with_name("vllm")), "serve", "DIRECTORY", "--host", "127.0.0.1"]
        words += ["--port", str(port), "--served-model-name", "tiny", "--enforce-eager", "--disable-uvicorn-access-log"]
        words += [*flags, *(["--api-key", key] if key else [])]
        set_ = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        command = shlex.join(["env", *set_, *words]).replace("DIRECTORY", '"$1"')
        script.write_text(SCRIPT.format(pid=self._pid, log=self.log, command=command))
        self.restart = f"bash {script} {{directory}}"

    def start(self, directory: Path | str) -> None:
        """Returns when it answers."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTHON", "XLA_", "JAX_"))}
        subprocess.run(self.restart.format(directory=directory), shell=True, check=True, env=environment)
        deadline = time.monotonic() + 900  # 25 s where nobody else computes
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            assert time.monotonic() < deadline and self._runs(), f"no server:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.5)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """All of its processes."""
        with suppress(ProcessLookupError, FileNotFoundError):
            os.killpg(int(self._pid.read_text()), number)

    def _runs(self) -> bool:
        try:
            os.kill(int(self._pid.read_text()), 0)
        except ProcessLookupError:
            return False
        return True


@contextmanager
def vllm_server(
    directory: Path | str, *flags: str, dtype: str = "float32", window: int = 512, key: str | None = None
) -> Iterator[RealServer]:
    """A server of the model in `directory` under the name "tiny"."""
    sizes = ["--dtype", dtype, "--max-model-len", str(window), "--max-num-seqs", "64", "--max-logprobs", "-1"]
    # Prompts are never read in parts: a seeded request whose prompt is would kill the engine.
    sizes += ["--max-num-batched-tokens", str(64 * window)]
    with tempfile.TemporaryDirectory() as place:
        server = RealServer(Path(place), [*sizes, *flags], key)
        try:
            server.start(directory)
            yield server
        finally:
            server.kill(signal.SIGTERM)
            for _ in range(50):
                if not server._runs():
                    break
                time.sleep(0.2)
            server.kill()
