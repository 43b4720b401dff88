"""`mpd-jax plan`: does the run fit a topology that is not here, how long is a step, and what to change if not.

Memory on TPUs is the compiler's word; on GPUs it is arithmetic. Times are a roofline: the largest of compute, memory
traffic and links, each at its peak, everything else hidden behind it. No run is faster; most take 1.5 to 3 times that.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import jax
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from rich.table import Table

from mpd_jax.build import check_lengths
from mpd_jax.config import RunConfig
from mpd_jax.data.chat import Chat
from mpd_jax.data.contexts import Contexts
from mpd_jax.models.config import ModelConfig, ModelSpec
from mpd_jax.models.hf_weights import load_config
from mpd_jax.models.kernels import choose
from mpd_jax.models.locate import HUB_ID
from mpd_jax.models.lora import Adapted, StudentSpec
from mpd_jax.plan import chips
from mpd_jax.plan.chips import GiB, Topology
from mpd_jax.plan.measure import Measured, measure
from mpd_jax.plan.phases import phases
from mpd_jax.plan.remedies import remedies
from mpd_jax.roles import ModelFiles, Roles, assign_roles, described, open_model
from mpd_jax.sharding import make_mesh

DAY = 86_400
STEP = ("rollout", "rewrite", "train", "hand over")  # the phases that every step goes through
ASSUMED = (
    "every prompt and response as long as the config allows; every product and collective at its peak",
    "a phase takes the largest of operations / peak, HBM traffic / bandwidth, bytes sent / links; the rest is hidden",
    "decoding reads all weights and the whole cache for every token; a TPU's collectives use half of its links",
)


@dataclass(frozen=True)
class Size:
    """Stands in for a tokenizer: a plan needs its size, and two ids that an update may have to exchange."""

    vocab_size: int
    closing: int = 0
    delimiter: int = 1


def known_shapes() -> dict[str, Any]:
    """config.json of models of the Hugging Face hub, by hub id."""
    return json.loads((files("mpd_jax.plan") / "shapes.json").read_text())["models"]


def opener(say: Callable[[str], None], platform: str) -> Callable[[str, ModelSpec, Contexts], ModelFiles]:
    """Opens a section's model without a network: its files where they are here, else the shapes that are shipped.

    Its attention is the one that the planned chips would choose.
    """

    def open_shape(key: str, spec: ModelSpec, contexts: Contexts) -> ModelFiles:
        chosen = choose(spec.attention, spec.dtype, platform)
        if not chosen.endswith("_emulated"):
            spec = replace(spec, attention=cast(Any, chosen))
        name, _, commit = spec.path.partition("@")
        if spec.path.startswith("tiny:") or Path(spec.path).expanduser().is_dir():
            return open_model(key, spec, contexts)
        shipped = known_shapes().get(name)
        if not HUB_ID.fullmatch(name):
            return open_model(key, spec, contexts)  # which says what is wrong
        found = try_to_load_from_cache(name, "config.json", revision=spec.revision or commit or None)
        if isinstance(found, str):
            config = load_config(Path(found).parent)
        elif shipped is not None:
            config = ModelConfig.from_hf(shipped["config"])
            say(f"{key}: {name} is not on this machine; its shape comes with the package")
        else:
            return open_model(key, spec, contexts)  # the hub, or the message that says what is wrong
        size = Size(shipped["tokenizer"] if shipped else config.vocab_size)
        model = described(config, spec)
        adapted = Adapted(model, spec.lora) if isinstance(spec, StudentSpec) and spec.lora else None
        adapter = Path(spec.adapter).expanduser() if isinstance(spec, StudentSpec) and spec.adapter else None
        chat, stops = cast(Chat, size), frozenset({0, 1})
        return ModelFiles(key, Path(spec.path), model, chat, stops, spec.param_dtype, adapted, adapter, spec.servers)

    return open_shape


def run(config: RunConfig, text: str, json: bool = False) -> dict[str, Any]:
    """The plan of a config on a topology, printed unless `json`. `fits` says whether every phase does."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        if not json:
            console.print(message, highlight=False)

    topology = chips.parse(text)
    devices = chips.devices(topology, say)
    mesh = make_mesh(config.mesh, devices)
    roles = assign_roles(config, opener(say, "tpu" if topology.chip.tpu else "gpu"))
    check_lengths(config, roles)
    measured = []
    for phase in phases(config, roles, mesh, elsewhere=not topology.chip.tpu):
        if not json and topology.chip.tpu and phase.program:
            console.print(f"compiling {phase.name} ...", style="dim", highlight=False)
        measured.append(measure(phase, topology, mesh))
    result = summary(config, topology, roles, measured, said) | {
        "mesh": dict(mesh.shape),
        "remedies": remedies(measured, config, roles, mesh),
    }
    if not json:
        show(console, result)
    return result


def summary(
    config: RunConfig, topology: Topology, roles: Roles, measured: list[Measured], said: list[str]
) -> dict[str, Any]:
    trained = [phase for phase in measured if phase.kind == "train"]
    longest = max(trained, key=lambda phase: phase.seconds)  # a batch is as long as its longest row
    step = [phase for phase in measured if phase.kind in STEP and (phase.kind != "train" or phase is longest)]
    seconds = sum(phase.seconds for phase in step)
    useful = sum(phase.flops.useful * phase.times for phase in step)
    written = sum(phase.tokens for phase in step if phase.kind in ("rollout", "rewrite"))
    models = {k: f.directory.as_posix() for k, f in named_roles(roles).items()}
    known = all(phase.fits or not phase.said for phase in step)
    return {
        "topology": topology.name,
        "chip": topology.chip.title,
        "chips": topology.count,
        "estimate": not topology.chip.tpu,
        "models": models,
        "jax": jax.__version__,
        "memory": topology.chip.memory,
        "phases": [
            {
                **asdict(phase),
                "peak": phase.peak,
                "fits": phase.fits,
                "teraflops": phase.flops.useful * phase.times / 1e12,
            }
            for phase in measured
        ],
        "fits": all(phase.fits for phase in measured),
        "step_seconds": seconds if known else None,
        "utilisation": useful / topology.count / topology.chip.flops / seconds if seconds and known else None,
        "trained_tokens_a_day": longest.tokens * DAY / seconds if seconds and known else None,
        "sampled_tokens_a_day": written * DAY / seconds if seconds and known else None,
        "assumed": list(ASSUMED),
        "said": said,
    }


def named_roles(roles: Roles) -> dict[str, ModelFiles]:
    named = {"student": roles.student, "teacher": roles.teacher, "rewriter": roles.rewriter}
    return {name: files for name, files in named.items() if files is not None}


PARTS = ("weights", "optimiser", "self copy", "teacher", "decode copies", "cache", "temporaries")


def show(console: Console, result: dict[str, Any]) -> None:
    kind = "estimated, not compiled" if result["estimate"] else f"compiled by jax {result['jax']}"
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    used = [part for part in PARTS if any(phase["parts"].get(part, 0) for phase in result["phases"])]
    limit = result["memory"] / GiB
    table = Table(title=f"{result['topology']} ({result['chip']}), {mesh}: GiB a chip of {limit:.2f}, {kind}")
    table.add_column("phase")
    for column in (*used, "peak", "fits"):
        table.add_column(column, justify="right")
    for phase in result["phases"]:
        sizes = [f"{phase['parts'].get(part, 0) / GiB:.2f}" for part in used]
        table.add_row(phase["name"], *sizes, f"{phase['peak'] / GiB:.2f}", "yes" if phase["fits"] else "[red]no[/]")
    console.print(table)
    times = Table("phase", title="one step, at the longest lengths")
    for column in ("runs", "TFLOP useful", "done / useful", "GB sent a chip", "seconds at least", "bound by", "used"):
        times.add_column(column, justify="right")
    for phase in result["phases"]:
        if not phase["times"]:
            continue
        useful, runs = phase["flops"]["useful"], phase["times"]
        again = f"{phase['flops']['done'] / useful:.2f}" if useful else "-"
        sent = "-" if phase["said"] else f"{sum(phase['sent'].values()) * runs / 1e9:,.1f}"
        row = (f"{runs:,.0f}", f"{phase['teraflops']:,.1f}", again, sent, f"{phase['seconds']:,.2f}", phase["bound"])
        times.add_row(phase["name"], *row, f"{phase['utilisation']:.1%}")
    console.print(times)
    if result["step_seconds"] is not None:
        console.print(
            f"a step takes {result['step_seconds']:,.0f} s at least, at {result['utilisation']:.1%} of the peak; a day "
            f"samples {result['sampled_tokens_a_day'] / 1e6:,.1f} M tokens and trains on "
            f"{result['trained_tokens_a_day'] / 1e6:,.1f} M",
            highlight=False,
        )
    for line in result["assumed"]:
        console.print(f"assumed: {line}", highlight=False, style="dim")
    for line in result["remedies"]:
        console.print(f"does not fit: {line}", highlight=False, style="red")
