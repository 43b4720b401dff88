"""The commands. The only file that reads the environment; everything it does is a call into the package."""

import errno
import json
import os
import signal
import sys
import threading
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from mpd_jax.arguments import Config, Json, Overrides
from mpd_jax.bench import command as bench
from mpd_jax.types import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach a small reasoning model to think in fewer tokens: mixed-policy distillation and its family, in JAX.",
)

Model = Annotated[
    str,
    typer.Argument(
        help="A run directory, a Hugging Face model directory, a hub id with revision (owner/name@commit), "
        "or tiny:student / tiny:teacher.",
        show_default=False,
    ),
]
# What a file system refuses because of what the user asked for.
USERS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EFBIG,
    errno.EIO,
)

Coordinator = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of process 0, in a run of several processes; TPU VMs, SLURM and Kubernetes need no flag.",
        show_default=False,
    ),
]
Processes = Annotated[int | None, typer.Option(help="How many processes the run has.", show_default=False)]
ProcessId = Annotated[int | None, typer.Option(help="Which of them this is, from 0.", show_default=False)]

Step = Annotated[
    int | None,
    typer.Option(help="The run's checkpoint after this many updates, instead of the newest.", show_default=False),
]
Best = Annotated[
    bool, typer.Option("--best", help="The run's best checkpoint by train.keep_best, instead of the newest.")
]

WhileStdin = Annotated[
    bool, typer.Option("--while-stdin", hidden=True, help="Stop, as by SIGTERM, when standard input ends.")
]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    coordinator: Coordinator = None,
    processes: Processes = None,
    process_id: ProcessId = None,
    while_stdin: WhileStdin = False,
) -> None:
    """Train the run of CONFIG: evaluate, distil, evaluate again. The same command again resumes it.

    SIGTERM, or Ctrl-C once, saves and ends with exit code 75. Where another process has died it is 69.
    """
    from mpd_jax import hosts, run
    from mpd_jax.config import load

    settings = load(config, overrides or [])
    if while_stdin:
        _stop_with_stdin()
    _join(coordinator, processes, process_id)
    try:
        run.train(settings, os.environ.get)
    except hosts.Stopped as stopped:
        if hosts.is_main():
            typer.echo(f"{stopped}; the same command again goes on", err=True)
        hosts.leave(hosts.STOPPED)
        raise typer.Exit(hosts.STOPPED) from None
    except KeyboardInterrupt as error:
        typer.echo("interrupted; the same command again goes on from the last checkpoint", err=True)
        hosts.leave(130, error)
        raise typer.Exit(130) from None
    hosts.leave(0)


def _stop_with_stdin() -> None:
    """SIGTERM to this process when its standard input ends, which another one holds open: however that one ends, so
    does this."""

    def wait() -> None:
        while os.read(0, 1):  # the stream's own lock would be held when the interpreter ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def _join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Finds the other processes of the run, if flags or the environment say that there are any."""
    from mpd_jax import hosts

    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if coordinator is not None and processes is not None and process_id is not None:
        if not 0 <= process_id < processes:
            raise UserError(
                f"--process-id: {process_id} is not allowed with --processes {processes}; number them from 0 to "
                f"{max(processes, 1) - 1}, each once"
            )
        hosts.join(coordinator, processes, process_id)
    elif len(missing) < len(given):
        raise UserError(f"{' and '.join(missing)}: missing; the three flags of a run of several processes go together")
    elif _launched() or _on_tpu():
        hosts.join()


def _one(command: str) -> None:
    """What is not training is one process's work; each of several would do it again, over the others' files."""
    import jax

    _refuse(command, _launched() or (_on_tpu() and jax.process_count() > 1))


def _refuse(command: str, one_of_several: bool) -> None:
    if one_of_several:
        raise UserError(
            f"mpd-jax {command}: it was started as one process of several, and it runs in one; start it once: with "
            "`srun --ntasks=1`, in a job without completion index, or on any other machine that sees the files"
        )


def _launched() -> bool:
    """Whether the environment says that a launcher which JAX knows started this as one process of several."""
    there = os.environ
    slurm = there.get("SLURM_NTASKS", "1") not in ("", "0", "1") and "SLURM_STEP_NODELIST" in there
    kubernetes = "KUBERNETES_SERVICE_HOST" in there and "JOB_COMPLETION_INDEX" in there
    pod = "," in there.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in there
    return slurm or kubernetes or pod


def _on_tpu() -> bool:
    """A TPU VM says nothing of others in its environment: JAX asks its metadata server."""
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    asks = os.environ.get("JAX_PLATFORMS") != "cpu" and "TPU_SKIP_MDS_QUERY" not in os.environ
    return chips and asks and find_spec("libtpu") is not None


def _which(step: int | None, best: bool) -> int | Literal["best"] | None:
    """The checkpoint asked for, or None for the newest."""
    if best and step is not None:
        raise UserError(f"--step: {step} and --best ask for two checkpoints; give one of them")
    return "best" if best else step


@app.command("eval")
def evaluate(
    source: Annotated[str, typer.Argument(help="A run directory, or a model as for `sample`.", show_default=False)],
    overrides: Overrides = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SET...",
            help="Sets to evaluate on, whole, instead of the held-out problems: ready names such as math500 aime25, or "
            "whatever problems.heldout takes.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Where problems and eval settings come from; a run directory has its own.")
    ] = None,
    regrade: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GRADER",
            help="Grade the stored samples again, and sample nothing: rules, answer_line, boxed, math_verify, "
            "dual_path, choice, or package.module:function; repeatable.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A run, or a directory of --out: the paired test against its samples.", show_default=False),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="A directory for every sample, as JSON Lines; the same command goes on there. With --set a run's are "
            "in its evaluations/.",
            show_default=False,
        ),
    ] = None,
    step: Step = None,
    best: Best = False,
) -> None:
    """Accuracy and tokens of a model or a run's student, as it is and asked for fewer words.

    On the run's held-out problems, or on sets by name; eval.attempts=16 takes 16 samples a problem.
    """
    from mpd_jax.eval import command

    _one("eval")
    changes, named = _sets(overrides or [], sets or [])
    command.run(
        source,
        config,
        changes,
        sets=named,
        regrade=regrade or [],
        against=against,
        out=out,
        which=_which(step, best),
        secrets=os.environ.get,
    )


def _sets(words: list[str], sets: list[str]) -> tuple[list[str], list[str]]:
    """Overrides, and names of sets: several may follow one --set, where they stand among the overrides."""
    return [w for w in words if "=" in w or not sets], sets + [w for w in words if "=" not in w and sets]


@app.command()
def compare(
    configs: Annotated[list[str], typer.Argument(help="One YAML file a method.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="The directory of the comparison; the same again goes on there.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--with", help="A change to all configs, such as train.steps=48; repeatable.", show_default=False),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method, of run.seed 0, 1 and on.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at the same time.")] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=[V1,V2]", help="Each method with each value; repeatable.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Show by what each row's accuracy differs from this method's too, such as on_policy.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train several methods over several seeds, and compare accuracy and tokens in one table, with intervals.

    SIGTERM, or Ctrl-C once, saves and ends with exit code 75, and the same command goes on; it is 1 if a run failed.
    """
    from mpd_jax import hosts
    from mpd_jax.eval import compare

    _refuse("compare", _launched())  # no device is touched: each run it starts needs them all
    try:
        result = compare.run(configs, overrides or [], sweep or [], seeds=seeds, out=out, jobs=jobs, against=against)
    except hosts.Stopped as stopped:
        typer.echo(f"{stopped}; the same command again goes on", err=True)
        raise typer.Exit(hosts.STOPPED) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command again goes on from the last checkpoints", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    raise typer.Exit(1 if any(arm["state"] == "failed" for arm in result["arms"]) else 0)


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Run directories; several lie over each other.", show_default=False)
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The HTML file; without it report.html in the run directory, of several in the current one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write runs as one HTML file that opens anywhere: before and after, curves, single answers, config, sources.

    A run that is not over, or has damaged files, gives a report of what there is, and of what is missing.
    """
    from mpd_jax.report import command

    _refuse("report", _launched())
    command.run(runs, out)


@app.command(hidden=True)
def instructions(
    config: Config,
    swept: Annotated[list[str], typer.Argument(help="The keys that are swept.")],
    while_stdin: WhileStdin = False,
) -> None:
    """What `compare` asks of a finished run for a swept instruction: how its reader fares by itself."""
    from mpd_jax.config import load
    from mpd_jax.eval import instructions

    if while_stdin:
        _stop_with_stdin()
    instructions.measure(load(config), swept)


@app.command()
def sample(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The problem; without it, type problems one by one.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed, problem and model give the same response.")] = 0,
    as_json: Json = False,
    step: Step = None,
    best: Best = False,
) -> None:
    """Type a problem, see the trace stream; of a run the student's before and after training, side by side."""
    from mpd_jax import use

    _one("sample")
    use.sample(model, prompt, temperature, max_tokens, seed, as_json, _which(step, best))


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A run directory, or a model as for `sample`.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The directory to write; it must not exist.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float32 or float16; without it bfloat16, and float32 for an adapter.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapter alone, in PEFT's format, instead of merged weights.")
    ] = False,
    untie: Annotated[
        bool,
        typer.Option("--untie", help="Write a head that is the embedding a second time: for servers that get pushes."),
    ] = False,
    step: Step = None,
    best: Best = False,
) -> None:
    """Write a run's student, or a model, as a directory that transformers and vLLM load unchanged."""
    from mpd_jax import use

    _one("export")
    use.export(source, out, dtype, adapter, _which(step, best), untie)


@app.command()
def rewrite(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl",
            help="Problems with responses, one object a line; or a run's trajectories/step_*.jsonl.gz.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="What is there already stays.", show_default=False)],
    config: Annotated[str, typer.Option(help="The rewriter, recipe.rewrite and columns.", show_default=False)],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Rewrite the responses of a file, for training with recipe.write.by=dataset. The same command again resumes."""
    from mpd_jax import offline
    from mpd_jax.config import load

    settings = load(config, overrides or [])
    _one("rewrite")
    summary = offline.rewrite(source, out, settings, os.environ.get)
    typer.echo(json.dumps(summary, indent=2) if as_json else "\n".join(f"{k}: {v}" for k, v in summary.items()))


@app.command()
def dedup(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="The index to write, for problems.kept.")] = "data/kept.jsonl",
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="An evaluation set, such as math500 or a file; repeatable. Without it, problems.heldout.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="What part of an evaluation question makes a near-duplicate.")] = 0.6,
    size: Annotated[int, typer.Option(help="Words, numbers and signs in a row that are compared.")] = 5,
    as_json: Json = False,
) -> None:
    """Find near-duplicates of evaluation problems among those to train on; problems.kept then leaves them out."""
    from mpd_jax import dedup
    from mpd_jax.config import load

    settings = load(config, overrides or [])
    _one("dedup")
    summary = dedup.run(settings, against or [], out, share, size)
    typer.echo(json.dumps(summary, indent=2) if as_json else "\n".join(f"{k}: {v}" for k, v in summary.items()))


@app.command("config")
def show_config(
    config: Config,
    overrides: Overrides = None,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Print what every role reads of the first problem to train on, instead.")
    ] = False,
) -> None:
    """Print the resolved config: the file, the overrides, and every default."""
    from mpd_jax.config import load, to_yaml

    settings = load(config, overrides or [])
    if prompts:
        from mpd_jax import use

        typer.echo(use.prompts(settings))
    else:
        typer.echo(to_yaml(settings), nl=False)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="Chips and sizes, such as v5e:4x8, v5p:2x2x4, v6e:4x4 or h100:8.", show_default=False)
    ] = ...,  # type: ignore[assignment] - typer's sign for a required option
    as_json: Json = False,
) -> None:
    """Will it fit? Memory of every phase and time of a step on chips that are not here; exit code 1 if it does not.

    For TPUs the run's own programs are compiled for the topology, on this machine's CPU; libtpu must be installed. It
    serves one process at a time, so a second plan waits for the first. For GPUs it is arithmetic, an estimate.
    """
    # The compiler would look for a TPU of this machine, on the network too, and warn that there is none.
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ):
        os.environ.setdefault(key, value)
    from mpd_jax.config import load
    from mpd_jax.plan import command

    result = command.run(load(config, overrides or []), topology, json=as_json)
    if as_json:
        typer.echo(json.dumps(result, indent=2, default=str))
    raise typer.Exit(0 if result["fits"] else 1)


@app.command()
def doctor(
    config: Config,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Load no weights: leave out agreement with servers.")] = False,
    as_json: Json = False,
) -> None:
    """Check models, tokenizers, prompts, servers, memory and disk of a run; exit code 1 if any of them fails."""
    from mpd_jax.config import load
    from mpd_jax.doctor import command

    settings = load(config, overrides or [])
    _one("doctor")
    result = command.run(settings, os.environ.get, json=as_json, quick=quick)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    raise typer.Exit(0 if result["ok"] else 1)


app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run a command. A user's mistake is one message and exit code 2; only a defect shows a traceback."""
    # transformers prints advice about torch that it does not need here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        _fail(str(error), error)
    except OSError as error:
        if error.errno not in USERS:
            _defect(error)
            raise
        where = error.filename or "a file"
        _fail(f"{where}: {error.strerror}; free space or choose another place, then run again", error)
    except Exception as error:
        _defect(error)
        raise


def _fail(message: str, error: Exception) -> None:
    typer.echo(f"error: {message}", err=True)
    if hosts := sys.modules.get("mpd_jax.hosts"):
        hosts.leave(2, error)
    sys.exit(2)


def _defect(error: Exception) -> None:
    """Where this is one process of several the others hear of it; else the caller's traceback is all."""
    if (hosts := sys.modules.get("mpd_jax.hosts")) and not hosts.alone():
        traceback.print_exc()
        hosts.leave(1, error)
