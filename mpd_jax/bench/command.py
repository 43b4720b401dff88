"""The `bench` commands. Each imports its benchmark when it runs, so that help comes at once."""

import json
from typing import Annotated, Any

import typer

from mpd_jax.arguments import Config, Json, Overrides

app = typer.Typer(
    no_args_is_help=True, help="Measure: the train step, the fused head, the sampler, packing, a server, scoring."
)


def _tell(result: dict[str, Any], as_json: bool) -> None:
    """A benchmark prints its table itself, unless JSON is asked for."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens a row; repeatable.  [default: 8192]")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps at each length.")] = 5,
    dense: Annotated[bool, typer.Option(help="The same step with dense logits, too.")] = True,
    as_json: Json = False,
) -> None:
    """Utilisation, speed and memory of the train step of CONFIG on the devices that are here, with random weights.

    train.batch_size is the number of rows; no weights are read or downloaded.
    """
    from mpd_jax.bench import train
    from mpd_jax.config import load

    settings = load(config, overrides or [])
    _tell(train.run(settings, as_json, lengths=length or (8192,), steps=steps, dense=dense), as_json)


@app.command()
def head(
    positions: Annotated[int, typer.Option(help="Response positions in the timed comparison.")] = 1024,
    as_json: Json = False,
) -> None:
    """Memory and time of the fused divergence against the dense one, at Qwen3's vocabulary."""
    from mpd_jax.bench import head

    _tell(head.run(positions=positions, json=as_json), as_json)


@app.command()
def sample(as_json: Json = False) -> None:
    """Tokens per second of the JAX sampler, against transformers' generate where torch is installed."""
    from mpd_jax.bench import sample

    _tell(sample.run(json=as_json), as_json)


@app.command()
def pack(as_json: Json = False) -> None:
    """Padding with and without packing, and what packing gains in a train step."""
    from mpd_jax.bench import pack

    _tell(pack.run(json=as_json), as_json)


@app.command()
def serve(
    url: Annotated[str, typer.Argument(help="A vLLM server, without an API key.", show_default=False)],
    model: Annotated[str, typer.Option(help="What it serves: a directory, or tiny:student / tiny:teacher.")] = (
        "tiny:teacher"
    ),
    vllm: Annotated[
        str | None, typer.Option(help="The server's own program, for `vllm bench serve`.", show_default=False)
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 256,
    as_json: Json = False,
) -> None:
    """How fast the client feeds a server, against the server's own benchmark; and tokens per second of all samplers."""
    from mpd_jax.bench import serve

    _tell(serve.run(url, json=as_json, path=model, vllm=vllm, concurrency=concurrency), as_json)


@app.command()
def topk(as_json: Json = False) -> None:
    """Of the divergence from a teacher what is left when a server says its k most likely tokens, k from 1 to 64."""
    from mpd_jax.bench import topk

    _tell(topk.run(json=as_json), as_json)
