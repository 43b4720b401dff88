"""`mpd-jax train`, start to end: evaluate, train, evaluate again, sum up.

A run directory holds config.yaml (resolved), metrics.jsonl, phase.log, trajectories/, checkpoints/, evaluations/
(samples and rows), curves.png and summary.json. Whatever is there already is used, not made again.
"""

import dataclasses
import importlib.util
import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mpd_jax import __version__, build, config, files, hosts, trees
from mpd_jax.config import RunConfig
from mpd_jax.doctor import command as doctor
from mpd_jax.eval import evaluate as evaluation
from mpd_jax.eval import figures, tables
from mpd_jax.eval.evaluate import EvalConfig
from mpd_jax.eval.figures import EvalRow
from mpd_jax.eval.plot import plot_run
from mpd_jax.files import AnyPath, write_atomically
from mpd_jax.lock import locked
from mpd_jax.roles import open_roles
from mpd_jax.rollouts import stopping
from mpd_jax.screen import Screen, live_line
from mpd_jax.serving import Secrets
from mpd_jax.train import loop
from mpd_jax.train.checkpoint import Checkpoints
from mpd_jax.train.metrics import read_rows
from mpd_jax.train.state import RunState
from mpd_jax.types import Problem, UserError

MOST_EXAMPLES = 64
SEARCHED = 1024  # problems among which they are looked for, where few or none have an answer

# What may change between two starts of one run: how it is carried out, what is measured, and what has to change for a
# run that failed to go on. Everything else would make it another run.
FREE = (
    "run.dir",
    "run.compile_cache",
    "guards",
    "eval",
    "mesh",
    "problems.directory",
    "problems.tfds",
    "sampling.slots",
    "sampling.prompt_tokens",
    "sampling.prefill_chunk",
    "sampling.prefill_rows",
    "sampling.lookahead",
    "sampling.server.concurrency",
    "sampling.server.score_tokens",
    "sampling.server.timeout_s",
    "sampling.server.patience_s",
    "sampling.server.key",
    "sampling.push",
    "student.dtype",
    "student.remat",
    "student.attention",
    "student.serve",
    "teacher.dtype",
    "teacher.remat",
    "teacher.attention",
    "teacher.serve",
    "rewriter.serve",
    "train.learning_rate",
    "train.max_grad_norm",
    "train.micro_batches",
    "train.row_length",
    "train.profile_steps",
    "train.save_every",
    "train.keep",
    "train.keep_best",
    "train.keep_trajectories",
    "train.trackers",
)
BASE, CONCISE, TRAINED = "base", "prompt-only concise", "trained"
EXAMPLES = "training problems"  # the trained student on problems of the first steps, beside what was trained on


def train(settings: RunConfig, secrets: Secrets = lambda name: None) -> AnyPath:
    """Evaluate, train, evaluate again, sum up. Returns the run directory. secrets: API keys by name."""
    screen, run_dir, began = Screen(quiet=not hosts.is_main()), files.path(settings.run.dir), time.perf_counter()
    if settings.run.compile_cache:
        keep_compiled(settings.run.compile_cache, screen.say)
    steps = settings.train.steps
    with hosts.stoppable(screen.say), locked(run_dir, screen.say), screen.bar("training", steps) as advance:
        hosts.from_main(lambda: refuse_another_run(run_dir, settings))
        roles = open_roles(settings)
        doctor.before_training(settings, roles, secrets, screen.say)
        run, state = build.build(
            settings,
            run_dir,
            lambda row: advance(row["step"] + 1, live_line(row)),
            screen.say,
            screen.bar,
            secrets,
            roles=roles,
        )
        cost = recorded_cost(run_dir, state.step, steps, began)
        with closing(run), telling_what_is_saved(run.parts.checkpoints), cost as saving:
            write_atomically(run_dir / "config.yaml", config.to_yaml(settings))
            judged = Judged(run, screen)
            judged.forget_after(state.step)
            before = judged.base(state)
            parts = dataclasses.replace(
                run.parts, evaluate=judged.between, saving=saving, rolled_back=judged.forget_after
            )
            if state.step < steps:
                state = loop.train(parts, state)
            else:
                screen.say(f"all {steps} steps are done; raise train.steps to go on")
            measured = [*before, *judged.trained(state)]
            judged.examples(state)

        rows: list[EvalRow] = []

        def sum_up() -> None:
            rows[:] = with_truncation(run_dir, measured)
            summary = summarise(run_dir, settings, rows, judged.seconds())
            write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
            run.forget()
            plot_run(read_rows(run_dir / "metrics.jsonl"), judged.curve(measured), run_dir / "curves.png")

        hosts.from_main(sum_up)
    screen.show(tables.table(rows))
    if skipped := state.memory.get("skipped_updates", 0):
        dropped = f"warning: {skipped} of {state.step} updates were skipped, for every trajectory was dropped"
        screen.say(f"{dropped}; see the verdicts in {run_dir}/metrics.jsonl")
    screen.say(f"{run_dir}: summary.json, curves.png, metrics.jsonl, trajectories/, checkpoints/, evaluations/")
    return run_dir


@contextmanager
def telling_what_is_saved(checkpoints: Checkpoints) -> Iterator[None]:
    """A run that was asked to stop says what it left."""
    try:
        yield
    except hosts.Stopped:
        step = checkpoints.latest()
        nothing = "stopped before the first checkpoint, so there is nothing to go on from but the start"
        raise hosts.Stopped(nothing if step is None else f"stopped and saved after step {step}") from None


def keep_compiled(directory: str, say: Callable[[str], None] = lambda text: None) -> None:
    """Compiled programs are read from and written to `directory`, however small; call it before the first. say: is told
    of one that can only be read."""
    if "://" not in directory:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.compile_cache: {directory} cannot be made ({error.strerror}); choose a directory that can be "
                "written, or leave it out"
            ) from None
        if not os.access(directory, os.W_OK | os.X_OK):
            say(f"warning: run.compile_cache: {directory} cannot be written; programs that it lacks are not kept")
    elif not directory.startswith("gs://") or not importlib.util.find_spec("gcsfs"):
        raise UserError(
            f"run.compile_cache: {directory} is not allowed; give a directory, or a gs:// address with gcsfs installed "
            "(pip install 'mpd-jax[gcs]')"
        )
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def refuse_another_run(run_dir: AnyPath, settings: RunConfig) -> None:
    """Refuses to resume a run with a config that learns something else."""
    path = run_dir / "config.yaml"
    if not files.is_file(path):
        return
    there = config.load(path)
    old, new = (trees.flat(dataclasses.asdict(c)) for c in (there, settings))
    free = (*FREE, "train.steps") if there.steps_are_free and settings.steps_are_free else FREE
    old, new = ({key: value for key, value in c.items() if not trees.under(key, free)} for c in (old, new))
    changed = trees.apart(new, old)
    if changed:
        raise UserError(
            f"run.dir: {run_dir} holds a run with another config ({changed}); "
            "choose another run.dir, or restore these values to resume it"
        )


@dataclass(frozen=True)
class Judged:
    """The evaluations of a run, made once and read back afterwards."""

    run: build.Run
    screen: Screen

    def base(self, state: RunState) -> list[EvalRow]:
        """The untrained student: as it is, and merely asked for fewer words. Rows are process 0's alone, here and
        below."""
        wanted = [(BASE, "plain")]
        if self.run.config.eval.concise_row:
            wanted.append((CONCISE, "concise"))
        if not all(self._stored(name) for name, _ in wanted):
            run = self.run
            # Nothing here may hold on to the weights of the start: they would stay beside the state's.
            run.load_student(state.weights if state.step == 0 else run.student.start(run.mesh, run.config.run.seed), 0)
        return [row for name, context in wanted for row in self._evaluate(name, context)]

    def between(self, state: RunState) -> None:
        """In the middle of training."""
        self._student(f"step {state.step}", state)

    def trained(self, state: RunState) -> list[EvalRow]:
        return self._student(f"{TRAINED}, step {state.step}", state)

    def _student(self, name: str, state: RunState) -> list[EvalRow]:
        """The student as it is. Noted are the figures that train.keep_best may name, at the first temperature."""
        if not self._stored(name):
            self.run.load_student(state.weights, state.step)
        rows = self._evaluate(name, "plain")
        figures = hosts.from_main(lambda: {"accuracy": rows[0].accuracy, "mean_tokens": rows[0].mean_tokens})
        self.run.parts.checkpoints.note(state.step, figures, self._settings())
        return rows

    def examples(self, state: RunState) -> None:
        """The trained student on some problems that were trained on: beside the original and the rewrite of the first
        steps they show what it learnt. Once each, at the first temperature; those without an answer are left out."""
        run, at, found = self.run, self.run.parts.problems.at, dict[str, Problem]()
        wanted = min(run.config.eval.problems, MOST_EXAMPLES)
        for step in range(min(state.step, -(-SEARCHED // run.config.train.batch_size))):
            found |= {problem.id: problem for problem in at(step) if (problem.answer or "").strip()}
            if len(found) >= wanted:
                break
        name = f"{EXAMPLES}, step {state.step}"
        if not found or self._stored(name):
            return
        once = dataclasses.replace(
            run.config.eval, problems=wanted, attempts=1, temperatures=run.config.eval.temperatures[:1]
        )
        if run.student_sampler.version != state.step:
            run.load_student(state.weights, state.step)
        self._evaluate(name, "plain", list(found.values()), once, EXAMPLES)

    def forget_after(self, step: int) -> None:
        """Removes what was measured of later steps: a resumed run may come to other weights there."""
        for path in list(self._path("").parent.glob("**/*.json*")) if hosts.is_main() else ():
            number = re.search(r"step (\d+)$", path.stem)
            if number and int(number[1]) > step:
                files.remove(path)

    def seconds(self) -> dict[str, float]:
        """Of every stored evaluation, whichever process made it."""
        heads = {path.stem: self._head(path.stem) for path in sorted(self._path("").parent.glob("*.json"))}
        return {f"evaluate {name}": head["seconds"] for name, head in heads.items() if "seconds" in head}

    def curve(self, rows: Sequence[EvalRow]) -> list[tuple[int, EvalRow]]:
        """Every stored evaluation with its step."""
        stored = [path for path in self._path("").parent.glob("step *.jsonl") if self._is_stored(path.stem)]
        between = [(int(path.stem.split()[1]), path) for path in stored]
        points = [(step, row) for step, path in sorted(between) for row in evaluation.read_rows(path)]
        return [*((int(r.name.split()[-1]) if r.name.startswith(TRAINED) else 0, r) for r in rows), *points]

    def _path(self, name: str) -> AnyPath:
        return samples_path(self.run.parts.run_dir, name)

    def _settings(self) -> dict[str, Any]:
        return evaluated_with(self.run.config)

    def _stored(self, name: str) -> bool:
        return hosts.from_main(lambda: self._is_stored(name))

    def _is_stored(self, name: str) -> bool:
        return is_evaluated(self.run.parts.run_dir, name, self.run.config)

    def _head(self, name: str) -> dict[str, Any]:
        return _evaluation_head(self.run.parts.run_dir, name)

    def _evaluate(
        self,
        name: str,
        context: str,
        problems: Sequence[Problem] | None = None,
        how: EvalConfig | None = None,
        problem_set: str = "",
    ) -> list[EvalRow]:
        """On the held-out problems by the config, unless others are given, with the name of what they are."""
        path, run = self._path(name), self.run
        problems, how = run.heldout if problems is None else problems, how or run.config.eval
        if self._stored(name):
            return evaluation.read_rows(path) if hosts.is_main() else []
        began = time.perf_counter()
        with self.screen.bar(f"evaluating {name}", evaluation.count(problems, how)) as advance:
            rows = evaluation.evaluate(
                name,
                run.student_sampler,
                run.student.chat,
                problems,
                how,
                seed=run.config.run.seed,
                context=context,
                problem_set=problem_set,
                out_path=path,
                progress=stopping(advance),
            )
        content = {
            "settings": self._settings(),
            "seconds": time.perf_counter() - began,
            "rows": [row.summary() for row in rows],
        }
        write_atomically(path.with_suffix(".json"), json.dumps(content, indent=2) + "\n")
        return rows


def samples_path(run_dir: AnyPath, name: str) -> AnyPath:
    """The samples of a run's evaluation; beside them, with the suffix .json, what they were made with."""
    return run_dir / "evaluations" / f"{name}.jsonl"


def evaluated_with(c: RunConfig) -> dict[str, Any]:
    """What the samples depend on beside the weights: those made under other settings are made again."""
    made_with = {
        "eval": dataclasses.asdict(dataclasses.replace(c.eval, every=0, concise_row=True)),
        "seed": c.run.seed,
        "problems": c.problems.described("heldout"),
        "contexts": [c.recipe.contexts.plain, c.recipe.contexts.concise],
        "student": dataclasses.asdict(c.student),
    }
    return json.loads(json.dumps(made_with))


def is_evaluated(run_dir: AnyPath, name: str, c: RunConfig) -> bool:
    """Whether the samples of an evaluation are there, made with the settings of `c`."""
    return _evaluation_head(run_dir, name).get("settings") == evaluated_with(c)


def _evaluation_head(run_dir: AnyPath, name: str) -> dict[str, Any]:
    """What is known of an evaluation beside its samples; nothing if it is absent or damaged, and made again."""
    try:
        head = json.loads(files.read(samples_path(run_dir, name).with_suffix(".json")) or b"")
    except ValueError:
        return {}
    return head if isinstance(head, dict) else {}


def with_truncation(run_dir: AnyPath, rows: Sequence[EvalRow]) -> list[EvalRow]:
    """The rows with the control before the trained ones: the base model's samples cut to the trained length."""
    samples = evaluation.read_samples(run_dir / "evaluations" / f"{BASE}.jsonl")
    trained = [row for row in rows if row.name.startswith(TRAINED)]
    controls = [
        figures.truncation_row([s for s in samples if s.temperature == row.temperature], row.mean_tokens)
        for row in trained
    ]
    return [*(row for row in rows if not row.name.startswith(TRAINED)), *controls, *trained]


@contextmanager
def recorded_cost(run_dir: AnyPath, start: int, steps: int, began: float) -> Iterator[Callable[[int], None]]:
    """This process's line of processes.jsonl: a run that was resumed cost what all of them cost.

    Yields what is called with the number of updates before each save; the line is written then and at the end, however
    that comes. A process that finds the run over (all `steps` done and summed up) adds none.
    """
    path, done = run_dir / "processes.jsonl", start
    found = hosts.from_main(lambda: [(files.read(path) or b"").decode(), files.is_file(run_dir / "summary.json")])
    lines, summed_up = found

    def saving(step: int) -> None:
        nonlocal done
        done, seconds = step, time.perf_counter() - began
        gained = max(done - start, 0)  # a rollback may go behind where this process began
        line = {"steps": gained, "seconds": round(seconds, 3), "peak_memory_bytes": peak_memory()}
        write_atomically(path, f"{lines}{json.dumps(line)}\n")

    try:
        yield saving
    finally:
        if start < steps or not summed_up:
            saving(done)


def summarise(
    run_dir: AnyPath, settings: RunConfig, rows: Sequence[EvalRow], eval_seconds: dict[str, float]
) -> dict[str, Any]:
    """summary.json: before and after at the headline temperature, every row, paired differences, cost, versions."""
    headline = settings.eval.temperatures[0]
    before = {row.temperature: row for row in rows if row.name == BASE}
    after = {row.temperature: row for row in rows if row.name.startswith(TRAINED)}
    steps = read_rows(run_dir / "metrics.jsonl")
    processes = read_rows(run_dir / "processes.jsonl")
    seconds = {name: sum(row[f"{name}_seconds"] for row in steps) for name in ("write", "rewrite", "train")}
    seconds |= {**eval_seconds, "wall": sum(process["seconds"] for process in processes)}
    differences = {
        f"{t:g}": dict(zip(("mean", "lower", "upper"), figures.paired_difference(before[t], after[t]), strict=True))
        for t in after
    }
    return {
        "before": before[headline].summary(),
        "after": after[headline].summary(),
        "token_reduction": 1 - after[headline].mean_tokens / before[headline].mean_tokens,
        "paired_accuracy_difference": differences,
        "rows": [row.summary() for row in rows],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "compilations": sum(row.get("compilations", 0) for row in steps),
        "reproducible": settings.reproducible,
        "peak_memory_bytes": max(process["peak_memory_bytes"] for process in processes),
        "versions": versions(),
    }


def peak_memory() -> int:
    """Bytes, of this process and of its first accelerator where that keeps its own memory."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = jax.local_devices()[0].memory_stats() or {}
    return max(host, device.get("peak_bytes_in_use", 0))


def versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    device = jax.local_devices()[0]
    return {
        "mpd-jax": __version__,
        **{name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device.device_kind}",
    }
