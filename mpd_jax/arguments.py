"""Arguments and options that several commands take, as typer reads them from annotations."""

from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="A YAML file such as configs/quickstart.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the config, such as train.steps=10 run.seed=1.", metavar="[SECTION.KEY=VALUE]..."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text.")]
