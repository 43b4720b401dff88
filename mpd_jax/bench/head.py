"""`mpd-jax bench head`: the fused divergence beside the dense one, memory from the compiled programs and time.

Both are value_and_grad with respect to the student's hidden states and head, jitted, every input an argument, as
constants would be folded. Memory is the temporary size that the compiler reports, so nothing runs for it; times are
taken in turn in one process.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from mpd_jax.recipe.loss import LossConfig, dense_divergence, fused_divergence
from mpd_jax.types import UserError

FORMS = {"fused": fused_divergence, "dense": dense_divergence}


def run(
    positions: int = 1024,
    json: bool = False,
    *,
    memory_positions: Sequence[int] = (1024, 2048, 4096),
    vocab: int = 151_936,
    student_width: int = 2048,
    teacher_width: int = 4096,
    repeats: int = 3,
    loss: LossConfig | None = None,
) -> dict[str, Any]:
    """Compile both forms, time them at `positions` rows (0: no timing); prints a table unless `json`.

    Ratios are fused over dense: `slope_ratio` of temporary bytes per added position, between the smallest and the
    largest of `memory_positions`, `memory_ratio` of temporary bytes at the largest, `time_ratio` of best times.
    """
    if len(set(memory_positions)) < 2 or min(memory_positions) < 1 or positions < 0 or repeats < 1:
        given = f"positions={positions}, memory_positions={list(memory_positions)}, repeats={repeats}"
        raise UserError(f"bench head: {given}: wants 2 different memory_positions, and repeats, of at least 1")
    loss = loss or LossConfig()
    shapes = partial(_shapes, vocab=vocab, student_width=student_width, teacher_width=teacher_width)
    at = sorted(memory_positions)
    memory = {form: [_temporary_bytes(_step(form, loss), shapes(rows)) for rows in at] for form in FORMS}
    slope = {form: (m[-1] - m[0]) / (at[-1] - at[0]) for form, m in memory.items()}
    result = {
        "vocab": vocab,
        "student_width": student_width,
        "teacher_width": teacher_width,
        "dtype": "bfloat16",
        "loss": loss.kind,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "memory_positions": at,
        "temporary_bytes": memory,
        "bytes_per_position": slope,
        "slope_ratio": slope["fused"] / slope["dense"],
        "memory_ratio": memory["fused"][-1] / memory["dense"][-1],
    }
    if positions:
        seconds = _times(loss, shapes(positions), repeats)
        best = {form: min(s) for form, s in seconds.items()}
        result |= {"positions": positions, "seconds": seconds, "time_ratio": best["fused"] / best["dense"]}
    if not json:
        _show(result)
    return result


def _shapes(rows: int, vocab: int, student_width: int, teacher_width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    sizes = ((rows, student_width), (vocab, student_width), (rows, teacher_width), (vocab, teacher_width))
    return (*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in sizes), jax.ShapeDtypeStruct((rows,), jnp.float32))


def _step(form: str, loss: LossConfig) -> Callable:
    def value(*arrays):
        return FORMS[form](*arrays, loss=loss)[0]

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))


def _temporary_bytes(step: Callable, shapes) -> int:
    analysis = step.lower(*shapes).compile().memory_analysis()
    if analysis is None:
        raise UserError(
            f"bench head: backend {jax.default_backend()!r} reports no memory analysis; run it on cpu, gpu or tpu"
        )
    return analysis.temp_size_in_bytes


@partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key, shape: tuple[int, int], scale: float, dtype):
    # Row by row: the random bits of a whole head would take five times its room.
    def row(k):
        return (jax.random.normal(k, shape[1:]) * scale).astype(dtype)

    return jax.lax.map(row, jax.random.split(key, shape[0]), batch_size=64)


def _times(loss: LossConfig, shapes, repeats: int) -> dict[str, list[float]]:
    # Unit entries, as after a final norm, against heads that make logits of unit variance.
    scales = [scale for h in shapes[0:4:2] for scale in (1.0, h.shape[1] ** -0.5)]
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [_random(k, s.shape, x, s.dtype) for k, s, x in zip(keys, shapes[:4], scales, strict=True)]
    arrays.append(jnp.full(shapes[4].shape, 1 / shapes[4].shape[0], jnp.float32))
    steps = {form: _step(form, loss).lower(*arrays).compile() for form in FORMS}
    for step in steps.values():
        jax.block_until_ready(step(*arrays))
    seconds = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            seconds[form].append(time.perf_counter() - start)
    return seconds


def _show(result: dict[str, Any]) -> None:
    title = "vocabulary {vocab:,}, widths {student_width:,} and {teacher_width:,}, {dtype}, {loss}"
    table = Table("", "fused", "dense", "fused / dense", title=title.format(**result))
    last = result["memory_positions"][-1]

    def row(name: str, values: dict[str, float], ratio: float, style: str) -> None:
        table.add_row(name, format(values["fused"], style), format(values["dense"], style), f"{ratio:.3f}")

    row("temporary bytes per added position", result["bytes_per_position"], result["slope_ratio"], ",.0f")
    total = {form: bytes_[-1] / 2**30 for form, bytes_ in result["temporary_bytes"].items()}
    row(f"temporary GiB at {last:,} positions", total, result["memory_ratio"], ".2f")
    if "seconds" in result:
        best = {form: min(s) for form, s in result["seconds"].items()}
        row(f"seconds at {result['positions']:,} positions, best", best, result["time_ratio"], ".2f")
        median = {form: statistics.median(s) for form, s in result["seconds"].items()}
        row("seconds, median", median, median["fused"] / median["dense"], ".2f")
    Console().print(table, f"{result['device']}, jax {result['jax']}")
