"""A phase's bytes, operations and time on a chip: compiled for TPUs, arithmetic for GPUs."""

import re
import time
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from mpd_jax.models.decoder import Model
from mpd_jax.plan.chips import Chip, Topology, local_bytes, shards
from mpd_jax.plan.collectives import sent_bytes
from mpd_jax.plan.flops import Flops, computes_all_scores
from mpd_jax.plan.phases import Phase

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What the compiler says of a program that is too large: all of it, or its temporaries.
WHOLE = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
TEMPORARY = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")
FLOAT32 = {True: 6, False: 15}  # bfloat16 passes of one float32 product: TPU; GPU (67 of 989 TFLOP/s)


@dataclass(frozen=True)
class Measured:
    """parts: bytes a chip by name, "temporaries" among them. seconds: of the phase in one step, at the least.

    sent: bytes a chip sends in one run of the program, by kind. bound: what takes the time: compute, memory or links.
    """

    name: str
    kind: str
    parts: dict[str, float]
    memory: float
    flops: Flops = field(default_factory=Flops)
    times: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    bound: str = ""
    utilisation: float = 0.0
    tokens: float = 0.0
    compile_seconds: float = 0.0
    said: str = ""
    notes: tuple[str, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory


def measure(phase: Phase, topology: Topology, mesh: Mesh) -> Measured:
    """Compiles the phase's program for a TPU; does the arithmetic for a GPU."""
    chip, program = topology.chip, phase.program
    parts: dict[str, float] = {name: local_bytes(tree) for name, tree in phase.resident.items()}
    parts["cache"] = parts.get("cache", 0) + parts.pop("slots", 0)
    if program is None or phase.model is None:
        return Measured(phase.name, phase.kind, parts, chip.memory, notes=phase.notes)
    given = {name: local_bytes(tree) for name, tree in program.arguments.items()}
    parts |= {name: size for name, size in given.items() if name not in phase.resident}
    began, said, sent = time.perf_counter(), "", {}
    if chip.tpu:
        temporary, sent, said = _compiled(program.lower, sum(given.values()))
    else:
        temporary = estimated_temporaries(phase, mesh, phase.model, phase.target)
        sent = estimated_sent(phase, mesh, phase.model, phase.target)
    parts["temporaries"] = temporary
    slower = FLOAT32[chip.tpu] if phase.model.dtype == "float32" else 1
    times = {
        "compute": program.flops.done / topology.count / chip.flops * slower,
        "memory": program.read / chip.hbm,
        "links": link_seconds(sent, chip),
    }
    bound = max(times, key=lambda name: times[name])
    used = program.flops.useful / topology.count / chip.flops / times[bound] if times[bound] else 0.0
    return Measured(
        phase.name,
        phase.kind,
        parts,
        chip.memory,
        program.flops,
        program.times,
        sent,
        times[bound] * program.times,
        bound,
        used,
        phase.tokens,
        time.perf_counter() - began,
        said,
        phase.notes,
        phase.sizes,
    )


def link_seconds(sent: dict[str, float], chip: Chip) -> float:
    """A TPU's collective runs over the links of one axis of the torus, half of them or fewer; a GPU's over all."""
    return sum(sent.values()) / (chip.link / 2 if chip.tpu else chip.link)


def _compiled(lower: Any, given: float) -> tuple[float, dict[str, float], str]:
    """Bytes beside the arguments, what is sent, and what the compiler said against it."""
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        return _asked(message, given), {}, message.splitlines()[0][:300]
    stats = compiled.memory_analysis()
    # Tiles of 8 x 128 make narrow arrays larger; arguments that the program does not read are not counted there.
    padding = max(0.0, stats.argument_size_in_bytes - given)
    made = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    return stats.temp_size_in_bytes + made + padding, sent_bytes(compiled.as_text()), ""


def _asked(message: str, given: float) -> float:
    """Temporaries of a program that the compiler refused for its size."""
    if whole := WHOLE.search(message):
        return max(0.0, float(whole[1]) * UNITS[whole[2]] - given)
    found = TEMPORARY.search(message)
    return float(found[1]) * UNITS[found[2]] if found else float("inf")


# Arithmetic for chips without a compiler here.


def estimated_temporaries(phase: Phase, mesh: Mesh, model: Model, teacher: Model | None) -> float:
    """What a program needs beside its arguments, to within a factor of two or so."""
    tensor, copies, sizes = mesh.shape["tensor"], shards(mesh), phase.sizes
    if phase.kind == "hand over":
        return local_bytes(phase.resident["decode copies"][0])
    if phase.kind != "train":
        config = model.config
        rows = sizes["slots"] / copies
        logits = 8 * rows * config.vocab_size / tensor
        scores = 8 * rows * config.num_heads / tensor * sizes["cache"]
        return logits + scores * (sizes["chunk"] if "prefill" in phase.name else 1)
    rows = sizes["rows"] / sizes["pieces"] / copies
    gradients = local_bytes(phase.resident["optimiser"]) / 2
    kept = sum(_layer_inputs(model, rows * sizes["student_length"] / tensor)) + max(
        _working(m, rows, sizes[f"{side}_length"], tensor)
        for m, side in ((model, "student"), (teacher, "target"))
        if m is not None
    )
    heads = sum(m.config.vocab_size * m.config.hidden_size / tensor * 2 for m in (model, teacher) if m is not None)
    head_gradient = 4 * model.config.vocab_size * model.config.hidden_size / tensor
    return gradients * (2 if sizes["pieces"] > 1 else 1) + kept + heads + head_gradient


def _width(model: Model) -> int:
    return 4 if model.dtype == "float32" else 2


def _layer_inputs(model: Model, tokens: float) -> tuple[float, float]:
    """What the backward pass keeps of all layers: their inputs, and without remat their activations too.

    tokens: of one device, positions between layers and activations within them being split over tensor.
    """
    config, width = model.config, _width(model)
    inner = 3 * config.intermediate_size + 3 * config.num_heads * config.head_dim + 2 * config.hidden_size
    inside = {"full": 0, "dots": inner / 2, "none": inner}[model.remat]
    return tokens * config.num_layers * config.hidden_size * width, tokens * config.num_layers * inside * width


def _working(model: Model, rows: float, length: int, tensor: int) -> float:
    """One layer at work: its activations, its gathered weights, and the scores of a kernel that makes all of them."""
    config, width = model.config, _width(model)
    inner = config.intermediate_size * (config.experts.per_token if config.experts else 1)
    activations = rows * length * (4 * config.hidden_size + 6 * inner / tensor) * width
    weights = sum(x.size for x in jax.tree.leaves(model.abstract()["blocks"])) / config.num_layers / tensor * width
    scores = 3 * 4 * rows * config.num_heads / tensor * length**2 if computes_all_scores(model) else 0
    return activations + 2 * weights + scores


def estimated_sent(phase: Phase, mesh: Mesh, model: Model, teacher: Model | None) -> dict[str, float]:
    """A step's gathers of weights and the scatter of gradients over fsdp, sums over data and tensor."""
    if phase.kind != "train":
        return {}
    fsdp, tensor, sizes = mesh.shape["fsdp"], mesh.shape["tensor"], phase.sizes
    count = {id(m): sum(x.size for x in jax.tree.leaves(m.abstract())) / tensor for m in (model, teacher) if m}
    passes = 2 + (model.remat == "full")
    gathered = count[id(model)] * passes * _width(model) + (count[id(teacher)] * _width(teacher) if teacher else 0)
    away = (fsdp - 1) / fsdp
    tokens = sizes["rows"] / shards(mesh) * sizes["student_length"]
    hidden = tokens * model.config.hidden_size * model.config.num_layers * _width(model)
    return {
        "all-gather": gathered * away * sizes["pieces"],
        "reduce-scatter": 4 * count[id(model)] * away,
        "all-reduce": 4 * passes * hidden * (tensor - 1) / tensor
        + 8 * count[id(model)] / fsdp * (mesh.shape["data"] - 1) / mesh.shape["data"],
    }
