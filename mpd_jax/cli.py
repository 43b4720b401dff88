"""The commands. The only file that reads the environment; everything it does is a call into the package."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mpd_jax.types import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach a small reasoning model to think in fewer tokens: mixed-policy distillation and its family, in JAX.",
)

Config = Annotated[Path, typer.Argument(help="A YAML file such as configs/quickstart.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the config, such as train.steps=10 run.seed=1.", metavar="[SECTION.KEY=VALUE]..."),
]
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

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text.")]


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train the run of CONFIG: evaluate, distil, evaluate again. The same command again resumes it."""
    from mpd_jax import run
    from mpd_jax.config import load

    try:
        run.train(load(config, overrides or []))
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command again goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None


@app.command("eval")
def evaluate(
    source: Annotated[str, typer.Argument(help="A run directory, or a model as for `sample`.", show_default=False)],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="Where problems and eval settings come from; a run directory has its own.")
    ] = None,
    regrade: Annotated[
        str | None, typer.Option(help="Grade the stored samples of a run again with this grader; sample nothing.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A directory for every sample, as JSON Lines.")] = None,
) -> None:
    """Accuracy and tokens on held-out problems of a model or a run's student, as it is and asked for fewer words."""
    from mpd_jax import use

    use.evaluate(source, config, overrides or [], regrade, out)


@app.command()
def sample(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The problem; without it, type problems one by one.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="The same seed, problem and model give the same response.")] = 0,
    as_json: Json = False,
) -> None:
    """Type a problem, see the trace stream."""
    from mpd_jax import use

    use.sample(model, prompt, temperature, max_tokens, seed, as_json)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
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
) -> None:
    """Write a run's student as a directory that transformers and vLLM load unchanged."""
    from mpd_jax import use

    use.export(source, out, dtype, adapter)


@app.command("config")
def show_config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved config: the file, the overrides, and every default."""
    from mpd_jax.config import load, to_yaml

    typer.echo(to_yaml(load(config, overrides or [])), nl=False)


bench = typer.Typer(no_args_is_help=True, help="Measure this machine: the fused head, the sampler, packing.")
app.add_typer(bench, name="bench")


@bench.command("head")
def bench_head(
    positions: Annotated[int, typer.Option(help="Response positions in the timed comparison.")] = 1024,
    as_json: Json = False,
) -> None:
    """Memory and time of the fused divergence against the dense one, at Qwen3's vocabulary."""
    from mpd_jax import bench_head

    result = bench_head.run(positions=positions, json=as_json)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@bench.command("sample")
def bench_sample(as_json: Json = False) -> None:
    """Tokens per second of the JAX sampler, against transformers' generate where torch is installed."""
    from mpd_jax import bench_sample

    result = bench_sample.run(json=as_json)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@bench.command("pack")
def bench_pack(as_json: Json = False) -> None:
    """Padding with and without packing, and what packing gains in a train step."""
    from mpd_jax import bench_pack

    result = bench_pack.run(json=as_json)
    if as_json:
        typer.echo(json.dumps(result, indent=2))


def main() -> None:
    """Run a command. A user's mistake is one message and exit code 2; only a defect shows a traceback."""
    # transformers prints advice about torch that it does not need here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in USERS:
            raise
        _fail(f"{error.filename or 'a file'}: {error.strerror}; free space or choose another place, then run again")


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)
