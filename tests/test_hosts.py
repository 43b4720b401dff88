"""What the processes of a run tell each other: two small ones, without a device, say what they saw."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mpd_jax import cli, hosts
from mpd_jax.types import UserError

ROOT = __file__.rsplit("/tests/", 1)[0]
PROGRAM = """
import os, sys, time
from mpd_jax import hosts
from mpd_jax.types import UserError
me = int(sys.argv[2])
hosts.join(sys.argv[1], 2, me, dead_after_s=3.0)

def say(*words):
    print(*words, flush=True)

def refuse():
    raise UserError("no such thing")

try:
{body}
except hosts.Stopped:
    say("stopped")
    hosts.leave(hosts.STOPPED)
    sys.exit(hosts.STOPPED)
except UserError as error:
    say("refused", error)
    hosts.leave(2, error)
hosts.leave(0)
"""


def start(body: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    words = [sys.executable, "-c", PROGRAM.replace("{body}", indented), address]
    env = {**os.environ, "PYTHONPATH": ROOT}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return [subprocess.Popen([*words, str(number)], **pipes) for number in range(2)]


def finish(processes: list[subprocess.Popen], timeout: float = 60) -> list[tuple[int, str, str]]:
    """(exit code, what it said, what stood on standard error) of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
            process.communicate()
        raise
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_process_0_tells_the_others_and_all_hear_all():
    body = """
say(hosts.from_main(lambda: {"long": "x" * 3_000_000, "who": me})["who"], len(hosts.from_main(lambda: "y" * 2**21)))
say(hosts.gather([me, "a"]), hosts.is_main(), hosts.alone())
hosts.require_same("this", "same")
hosts.from_main(refuse)
"""
    for number, (code, said, _) in enumerate(finish(start(body))):
        assert (code, said) == (2, f"0 {2**21}\n[[0, 'a'], [1, 'a']] {number == 0} False\nrefused no such thing\n")


def test_what_one_process_has_read_differently_is_refused_on_all():
    for code, said, _ in finish(start('hosts.require_same("the config", str(me))')):
        assert code == 2 and "the config: process 1 of 2 has read something else than process 0" in said


def test_a_run_directory_that_not_all_processes_see_is_refused_before_anything_is_made(tmp_path):
    body = f"""
from pathlib import Path
from mpd_jax import lock
lock.SEEN_AFTER_S = 0.5
for number in range(2):  # the second time another token stands there
    with lock.locked(Path("{tmp_path}/shared")):
        say("seen")
with lock.locked(Path(f"{tmp_path}/{{me}}")):
    say("not seen")
"""
    for number, (code, said, _) in enumerate(finish(start(body))):
        told = f"refused run.dir: process 1 does not see what process 0 writes to {tmp_path}/{number}; give a directory"
        assert code == 2 and said.startswith(f"seen\nseen\n{told}"), said


def test_a_signal_to_one_process_stops_all_at_the_same_call():
    body = """
import signal
with hosts.stoppable(say):
    for number in range(1000):
        time.sleep(0.01 + 0.01 * me)
        if me == 1 and number == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        print(number, end=" ")
        hosts.check()
"""
    (code, said, _), other = finish(start(body))
    assert code == 75 and "stopped" in said and other[:2] == (code, said)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_while_process_0_asks_for_all_stops_all(victim):
    """Process 0 looks on its own in the call; process 1 waits for it, and has the signal in one of the two cases."""
    body = f"""
import signal, threading
def ask():
    for number in range(100):
        time.sleep(0.1)
        hosts.check()
with hosts.stoppable(say):
    hosts.check()
    if me == {victim}:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    hosts.from_main(ask)
"""
    for code, said, _ in finish(start(body)):
        assert (code, said) == (75, "stopped\n")


def test_what_two_threads_say_does_not_meet():
    """A thread of its own asks process 0 while the main thread does; on process 1 the two come in another order."""
    body = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(1, "ahead") as pool:
    later = pool.submit(lambda: [hosts.from_main(lambda: f"ahead {n}") for n in range(20) if not time.sleep(0.02 * me)])
    here = [hosts.from_main(lambda: f"main {n}") for n in range(20) if not time.sleep(0.02 * (1 - me))]
    say(later.result() == [f"ahead {n}" for n in range(20)], here == [f"main {n}" for n in range(20)])
"""
    for code, said, error in finish(start(body)):
        assert (code, said) == (0, "True True\n"), error


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_with_a_message_that_names_it(victim):
    processes = start('say("here"); hosts.from_main(lambda: time.sleep(60)) if me == 0 else time.sleep(60)')
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    code, _, error = finish(processes)[1 - victim]
    assert time.monotonic() - began < 15
    assert code == hosts.LEFT_ALONE, error
    why = r"has given no sign of life for 3 s" if victim else "cannot be reached any more"
    assert f"process {victim} of 2 ({socket.gethostname()}) {why}" in error.splitlines()[-1], error


def test_a_process_that_fails_alone_is_named_with_its_reason():
    (code, _, error), other = finish(start("refuse() if me == 1 else time.sleep(60)"))
    assert other[0] == 2 and code == hosts.LEFT_ALONE
    assert f"process 1 of 2 ({socket.gethostname()}) ended: no such thing" in error


def test_one_process_needs_nobody():
    assert hosts.alone() and hosts.is_main()
    assert hosts.from_main(lambda: (1, 2)) == (1, 2) and hosts.gather("a") == ["a"]
    hosts.require_same("this", "same")
    with pytest.raises(UserError):
        hosts.from_main(lambda: (_ for _ in ()).throw(UserError("no")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_obeyed_at_the_next_look(number):
    said = []
    before = signal.getsignal(number)
    with hosts.stoppable(said.append):
        hosts.check()
        os.kill(os.getpid(), number)
        with pytest.raises(hosts.Stopped):
            hosts.check()
        if number == signal.SIGINT:
            assert "Ctrl-C again" in said[0]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(1)
    assert signal.getsignal(number) is before
    with hosts.stoppable(said.append):
        hosts.check()


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node[1-2]"}, True),
        ({"SLURM_NTASKS": "", "SLURM_STEP_NODELIST": "node1"}, False),
        ({"SLURM_NTASKS": "8"}, False),  # a batch script's own shell, before srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "worker-0,worker-1"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "slice-0"}, True),
    ],
)
def test_launchers_are_known_by_their_environment(monkeypatch, environment, several):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli._launched() == several


@pytest.mark.parametrize("address", ["localhost", "localhost:abc", ":9000", "localhost:99999"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(UserError, match="HOST:PORT"):
        hosts.join(address, 2, 0)


def test_a_port_in_use_and_a_coordinator_that_is_not_there_are_told(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of this host cannot be opened"):
            hosts.join(f"localhost:{port}", 2, 0)
    monkeypatch.setattr(hosts, "FIND_S", 0.0)
    with pytest.raises(UserError, match=f"nobody answers at localhost:{port}"):
        hosts.join(f"localhost:{port}", 2, 1)


ALONE = """
import sys
from mpd_jax import hosts
hosts.FIND_S = 2
hosts.join(sys.argv[1], 2, 0)
"""


def test_a_process_whose_others_never_come_says_so():
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, f"localhost:{port}"],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 2, ran.stderr
    assert "waiting for 1 other processes at localhost:" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("error: --processes: not all processes of the run came to localhost:")
