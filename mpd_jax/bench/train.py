"""`mpd-jax bench train CONFIG`: how much of the chips' peak the run's train step reaches, and its memory by length.

The step is the run's (build.update_of), its state donated, on the devices that are here; weights and token ids are
random, the former made where they lie. The same step with dense logits runs beside it. Utilisation is of model FLOPs
(plan/flops.py: nothing counted twice, half of the scores, no padding, the teacher's forward pass alone) at the peak of
dense bfloat16. Rows are full: a prompt of sampling.prompt_tokens and a response, `length` tokens together.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from mpd_jax import build
from mpd_jax.bench.head import FORMS
from mpd_jax.config import RunConfig
from mpd_jax.plan import chips, flops
from mpd_jax.plan.command import opener
from mpd_jax.plan.phases import longest_batch
from mpd_jax.roles import ModelFiles, Roles, assign_roles
from mpd_jax.screen import Screen
from mpd_jax.sharding import make_mesh
from mpd_jax.train.state import Trained, init_opt_state, optimiser
from mpd_jax.train.step import Update
from mpd_jax.types import Batch, UserError

WARM_UP = 2  # steps before those that are timed
SPREAD = 0.02  # of random weights, as Qwen3 says of its initial ones


def run(
    config: RunConfig, json: bool = False, *, lengths: Sequence[int] = (8192,), steps: int = 5, dense: bool = True
) -> dict[str, Any]:
    """Times `steps` steps at each length, fused and dense; prints a table unless `json`.

    A case that runs out of memory has fits False, and in `said` what was said. Bytes are of one device: compiled_bytes
    as the compiler counts them, peak_bytes as the device does, None where it does not, or where an earlier case or the
    making of the weights took more. Ratios are fused over dense, of seconds and of compiled_bytes.
    """
    screen = Screen()
    mesh = make_mesh(config.mesh)
    roles = assign_roles(config, opener(screen.say, mesh.devices.flat[0].platform))
    lengths = sorted(set(lengths))
    refuse(config, roles, lengths, steps)
    bench = Bench(config, roles, mesh, screen)
    # Shorter rows and the smaller form first: what a device says of its peak only ever grows.
    forms = ("fused", "dense") if dense else ("fused",)
    cases = [bench.case(form, length, steps) for form in forms for length in lengths]
    result = {**bench.told(), "steps": steps, "cases": cases, "ratios": ratios(cases) if dense else []}
    if not json:
        show(result)
    return result


def refuse(config: RunConfig, roles: Roles, lengths: Sequence[int], steps: int) -> None:
    recipe, window = config.recipe, roles.student.model.config.max_position_embeddings
    if recipe.target.weights != "teacher" or recipe.target.top_k:
        raise UserError(
            "bench train: it measures a step that reads a teacher on the mesh; set recipe.target.weights=teacher and "
            "recipe.target.top_k=0, or give another config"
        )
    if steps < 1:
        raise UserError(f"--steps {steps}: must be at least 1")
    low = config.sampling.prompt_tokens
    wrong = [length for length in lengths if not low < length <= window]
    if wrong or not lengths:
        raise UserError(
            f"--length {wrong}: must be above sampling.prompt_tokens = {low} and at most {window}, the student's window"
        )


@dataclass(frozen=True)
class Bench:
    """The models and devices of the cases. What the teacher reads with is made once, what trains anew for each."""

    config: RunConfig
    roles: Roles
    mesh: Mesh
    screen: Screen

    @property
    def teacher(self) -> ModelFiles:
        assert self.roles.teacher is not None
        return self.roles.teacher

    @cached_property
    def frozen(self) -> tuple[Any, Any]:
        """The teacher's weights, and those of the student under an adapter."""
        self.screen.say("making random weights ...")
        student = self.roles.student
        base = build.abstract_weights(student, self.mesh) if student.adapted else None
        like = build.abstract_weights(self.teacher, self.mesh), base
        try:
            return jax.block_until_ready(jax.jit(partial(drawn, like), out_shardings=_places(like))(jax.random.key(0)))
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"bench train: not even the frozen weights fit on {self.mesh.size} x {_kind(self.mesh)}; take more of "
                f"them, or set teacher.path to a smaller model ({_first_line(error)})"
            ) from error

    @cached_property
    def start(self) -> Any:
        """Jitted: a key -> weights and optimiser before the first update."""
        state, tx = build.abstract_state(self.config, self.roles.student, self.mesh), optimiser(self.config.train)

        def made(key: jax.Array) -> Trained:
            weights = drawn(state.weights, key)
            return Trained(weights, init_opt_state(tx, weights))

        return jax.jit(made, out_shardings=_places(Trained(state.weights, state.opt_state)))

    @cached_property
    def updates(self) -> dict[str, Update]:
        how = self.config, self.roles, self.mesh
        return {form: build.update_of(*how, divergence=divergence) for form, divergence in FORMS.items()}

    def case(self, form: str, length: int, steps: int) -> dict[str, Any]:
        """Figures of one form at one length; None where there are none."""
        batch, response = self.batch(length), length - self.config.sampling.prompt_tokens
        rows = self.config.train.batch_size * self.config.recipe.write.attempts
        operations = flops.train_step(
            self.roles.student.trains.on(self.mesh),
            self.teacher.model.on(self.mesh),
            rows=rows,
            student_length=length,
            target_length=int((batch.target_segments_BT > 0).sum()) // rows,
            response=response,
        ).useful
        row: dict[str, Any] = {"form": form, "length": length, "rows": rows, "flops": operations, "fits": True}
        row |= dict.fromkeys(("seconds", "tokens_per_second", "mfu", "compiled_bytes", "peak_bytes", "loss", "said"))
        frozen, before = self.frozen, self._peak()
        self.screen.say(f"{form}, {rows} rows of {length:,} tokens: compiling ...")
        try:
            row |= self._timed(self.updates[form], batch, frozen, steps, row)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            self.screen.say(f"{form}, {length:,} tokens: does not fit")
            return row | {"fits": False, "said": _first_line(error)}
        after, chip = self._peak(), chips.BY_KIND.get(_kind(self.mesh))
        row["peak_bytes"] = after if before is not None and after is not None and after > before else None
        row["tokens_per_second"] = rows * length / row["seconds"]
        row["mfu"] = operations / row["seconds"] / self.mesh.size / chip.flops if chip else None
        self.screen.say(f"{form}, {length:,} tokens: {row['seconds']:.3g} s a step")
        return row

    def _timed(self, update: Update, batch: Batch, frozen: Any, steps: int, row: dict[str, Any]) -> dict[str, Any]:
        """The loop of a run: host arrays are placed at each step, and the device is waited for at the ends alone. What
        is known before memory runs out is put into `row`."""
        (teacher, base), one = frozen, np.float32(1)
        began = time.perf_counter()
        trained = self.start(jax.random.key(1))
        compiled = update.lower(trained, teacher, update.place(batch), base).compile()
        seconds = time.perf_counter() - began
        row["compiled_bytes"] = compiled_bytes(compiled)
        trained, first = compiled(trained, teacher, update.place(batch), base, one)
        for _ in range(WARM_UP - 1):
            trained, _ = compiled(trained, teacher, update.place(batch), base, one)
        jax.block_until_ready(trained)
        self.screen.say(f"compiled in {seconds:,.0f} s; {steps} steps ...")
        began = time.perf_counter()
        for _ in range(steps):
            trained, out = compiled(trained, teacher, update.place(batch), base, one)
        jax.block_until_ready(trained)
        seconds = time.perf_counter() - began
        assert out["finite"], f"the last of {steps} updates was skipped: loss {out['loss']}"
        return {"seconds": seconds / steps, "loss": float(first["loss"])}

    def batch(self, length: int) -> Batch:
        """Rows of `length` tokens drawn from the whole vocabulary, laid out as the run's batches are."""
        train = replace(self.config.train, max_length=length, row_length=length)
        rng, vocab = np.random.default_rng(0), self.roles.student.chat.vocab_size
        return longest_batch(
            replace(self.config, train=train),
            self.roles,
            self.mesh,
            length - self.config.sampling.prompt_tokens,
            lambda count: rng.integers(vocab, size=count).tolist(),
        )

    def _peak(self) -> int | None:
        """Bytes that the fullest device of this process has held at once so far."""
        stats = [device.memory_stats() or {} for device in self.mesh.local_devices]
        return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)

    def told(self) -> dict[str, Any]:
        """What was measured, where."""
        student, chip = self.roles.student, chips.BY_KIND.get(_kind(self.mesh))
        return {
            "student": student.directory.as_posix(),
            "teacher": self.teacher.directory.as_posix(),
            "adapter": student.adapted is not None,
            "dtype": student.model.dtype,
            "loss": self.config.recipe.loss.kind,
            "remat": student.model.remat,
            "attention": student.model.on(self.mesh).attention,
            "micro_batches": self.config.train.micro_batches,
            "mesh": dict(self.mesh.shape),
            "device": f"{self.mesh.size} x {_kind(self.mesh)}",
            "peak_flops": chip.flops if chip else None,
            "memory_limit": (self.mesh.local_devices[0].memory_stats() or {}).get("bytes_limit"),
            "jax": jax.__version__,
        }


def drawn(like: Any, key: jax.Array) -> Any:
    """Random weights of these shapes, dtypes and places; norms around 1. Stacked layers are drawn one at a time: the
    random bits of all of them would take several times their room."""
    number = iter(range(10**6))

    def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        stacked = int(len(x.shape) > 2)
        assert isinstance(x.sharding, NamedSharding)
        place = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[stacked:]))

        def draw(key: jax.Array) -> jax.Array:
            values = centre + SPREAD * jax.random.normal(key, x.shape[stacked:])
            return jax.lax.with_sharding_constraint(values.astype(x.dtype), place)

        own = jax.random.fold_in(key, next(number))
        return jax.lax.map(draw, jax.random.split(own, x.shape[0])) if stacked else draw(own)

    return jax.tree_util.tree_map_with_path(leaf, like)


def compiled_bytes(compiled: Any) -> int | None:
    """Of one device, arguments among them; what is donated counts once. None where the backend does not say."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    made = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + made + stats.temp_size_in_bytes


def out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]


def _places(like: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, like)


def _kind(mesh: Mesh) -> str:
    return mesh.devices.flat[0].device_kind


def ratios(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By length, fused over dense: seconds and compiled bytes; None where one is missing."""
    found = {(case["form"], case["length"]): case for case in cases}

    def ratio(length: int, name: str) -> float | None:
        fused, dense = (found[form, length][name] for form in ("fused", "dense"))
        return fused / dense if fused and dense else None

    lengths = sorted({length for _, length in found})
    return [{"length": n, "time": ratio(n, "seconds"), "memory": ratio(n, "compiled_bytes")} for n in lengths]


def show(result: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    adapter = " (adapter)" if result["adapter"] else ""
    table = Table(title="{student}{0} from {teacher}, {dtype}, {loss}, remat {remat}".format(adapter, **result))
    columns = ("tokens a row", "rows", "logits", "seconds a step", "tokens a second", "TFLOP a step", "of the peak")
    for column in (*columns, "GiB compiled", "GiB seen"):
        table.add_column(column, justify="right")

    def cell(value: float | None, style: str) -> str:
        return "-" if value is None else format(value, style)

    def gib(value: int | None) -> str:
        return "-" if value is None else f"{value / chips.GiB:,.2f}"

    for case in sorted(result["cases"], key=lambda case: case["length"]):
        time_ = cell(case["seconds"], ".3g") if case["fits"] else "does not fit"
        sizes = f"{case['length']:,}", str(case["rows"]), case["form"]
        speed = cell(case["tokens_per_second"], ",.0f"), f"{case['flops'] / 1e12:,.4g}", cell(case["mfu"], ".1%")
        table.add_row(*sizes, time_, *speed, gib(case["compiled_bytes"]), gib(case["peak_bytes"]))
    lines = [
        f"{r['length']:,} tokens a row, fused over dense: {cell(r['time'], '.2f')} of the time, "
        f"{cell(r['memory'], '.2f')} of the memory"
        for r in result["ratios"]
    ]
    peak = (
        f"a peak of {result['peak_flops'] / 1e12:,.0f} TFLOP/s each" if result["peak_flops"] else "their peak unknown"
    )
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    limit = (
        f" of {result['memory_limit'] / chips.GiB:,.1f} GiB that a program may use" if result["memory_limit"] else ""
    )
    lines.append(f"{result['device']}{limit}, {peak}; {mesh}, attention {result['attention']}, jax {result['jax']}")
    console.print(table, *lines, sep="\n", highlight=False)
