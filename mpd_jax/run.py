"""What each command does, start to end: train, evaluate, sample, export.

A run directory holds config.yaml (resolved), metrics.jsonl, phase.log, trajectories/, checkpoints/, evaluations/
(samples and rows), curves.png and summary.json. Whatever is there already is used, not made again.
"""

import dataclasses
import fcntl
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mpd_jax import __version__, build, config
from mpd_jax.config import RunConfig
from mpd_jax.eval import evaluate as evaluation
from mpd_jax.eval.evaluate import EvalRow
from mpd_jax.eval.plot import plot_run
from mpd_jax.models.hf_weights import export as export_weights
from mpd_jax.sampling.sampler import Request, SamplingConfig, request_key
from mpd_jax.screen import Screen, live_line
from mpd_jax.train import loop
from mpd_jax.train.metrics import read_rows
from mpd_jax.train.records import write_atomically, writing
from mpd_jax.train.state import RunState
from mpd_jax.types import Problem, UserError

# What may change between two starts of one run: how it is carried out, what is measured, and what has to change for a
# run that failed to go on. Everything else would make it another run.
FREE = (
    "run.dir",
    "eval",
    "mesh",
    "sampling.slots",
    "sampling.prompt_tokens",
    "sampling.prefill_chunk",
    "sampling.prefill_rows",
    "student.dtype",
    "student.remat",
    "teacher.dtype",
    "teacher.remat",
    "train.learning_rate",
    "train.max_grad_norm",
    "train.micro_batches",
    "train.save_every",
    "train.keep",
)
BASE, CONCISE, TRAINED = "base", "prompt-only concise", "trained"


def train(settings: RunConfig) -> Path:
    """Evaluate, train, evaluate again, sum up. Returns the run directory."""
    screen, run_dir, began = Screen(), Path(settings.run.dir), time.perf_counter()
    steps = settings.train.steps
    with locked(run_dir), screen.bar("training", steps) as advance:
        refuse_another_run(run_dir, settings)
        run, state = build.build(
            settings, run_dir, lambda row: advance(row["step"] + 1, live_line(row)), screen.say, screen.bar
        )
        with closing(run):
            write_atomically(run_dir / "config.yaml", config.to_yaml(settings))
            judged = Judged(run, screen)
            before = judged.base(state)
            start = state.step
            if start < steps:
                state = loop.train(dataclasses.replace(run.parts, evaluate=judged.between), state)
            else:
                screen.say(f"all {steps} steps are done; raise train.steps to go on")
            rows = with_truncation(run_dir, [*before, *judged.trained(state)])
        record_process(run_dir, state.step - start, time.perf_counter() - began)
        summary = summarise(run_dir, settings, rows, judged.seconds)
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        plot_run(read_rows(run_dir / "metrics.jsonl"), judged.curve(rows), run_dir / "curves.png")
    screen.show(evaluation.table(rows))
    if skipped := state.memory.get("skipped_updates", 0):
        dropped = f"warning: {skipped} of {state.step} updates were skipped, for every trajectory was dropped"
        screen.say(f"{dropped}; see the verdicts in {run_dir}/metrics.jsonl")
    screen.say(f"{run_dir}: summary.json, curves.png, metrics.jsonl, trajectories/, checkpoints/, evaluations/")
    return run_dir


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """One trainer a run directory; the lock is gone with the process, however it ends."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "w")  # noqa: SIM115 - held until the end of the block
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run.dir: {run_dir} is being trained by another process; wait for it, or choose another run.dir"
            ) from None
        yield


def refuse_another_run(run_dir: Path, settings: RunConfig) -> None:
    """Refuses to resume a run with a config that learns something else."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return
    there = config.load(path)
    old, new = (config.flat(dataclasses.asdict(c)) for c in (there, settings))
    free = (*FREE, "train.steps") if there.steps_are_free and settings.steps_are_free else FREE
    changed = [
        f"{key} = {new.get(key)!r}, and {old.get(key)!r} there"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not config.under(key, free)
    ]
    if changed:
        raise UserError(
            f"run.dir: {run_dir} holds a run with another config ({'; '.join(changed)}); "
            "choose another run.dir, or restore these values to resume it"
        )


@dataclass(frozen=True)
class Judged:
    """The evaluations of a run, made once and read back afterwards."""

    run: build.Run
    screen: Screen
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def base(self, state: RunState) -> list[EvalRow]:
        """The untrained student: as it is, and merely asked for fewer words."""
        wanted = [(BASE, "plain")]
        if self.run.config.eval.concise_row:
            wanted.append((CONCISE, "concise"))
        if not all(self._stored(name) for name, _ in wanted):
            self.run.load_student(state.weights if state.step == 0 else self.run.student.weights(self.run.mesh), 0)
        return [row for name, context in wanted for row in self._evaluate(name, context)]

    def between(self, state: RunState) -> None:
        """In the middle of training."""
        self.run.load_student(state.weights, state.step)
        self._evaluate(f"step {state.step}", "plain")

    def trained(self, state: RunState) -> list[EvalRow]:
        name = f"{TRAINED}, step {state.step}"
        if not self._stored(name):
            self.run.load_student(state.weights, state.step)
        return self._evaluate(name, "plain")

    def curve(self, rows: Sequence[EvalRow]) -> list[tuple[int, EvalRow]]:
        """Every stored evaluation with its step."""
        between = [(int(path.stem.split()[1]), path) for path in self._path("").parent.glob("step *.jsonl")]
        points = [(step, row) for step, path in sorted(between) for row in evaluation.read_rows(path)]
        return [*((int(r.name.split()[-1]) if r.name.startswith(TRAINED) else 0, r) for r in rows), *points]

    def _path(self, name: str) -> Path:
        return self.run.parts.run_dir / "evaluations" / f"{name}.jsonl"

    def _settings(self) -> dict[str, Any]:
        """What the samples depend on beside the weights: those made under other settings are made again."""
        c = self.run.config
        made_with = {
            "eval": dataclasses.asdict(dataclasses.replace(c.eval, every=0, concise_row=True)),
            "seed": c.run.seed,
            "problems": [c.problems.heldout, c.problems.heldout_columns, c.problems.columns],
            "contexts": [c.recipe.contexts.plain, c.recipe.contexts.concise],
            "student": dataclasses.asdict(c.student),
        }
        return json.loads(json.dumps(made_with))

    def _stored(self, name: str) -> bool:
        head = self._path(name).with_suffix(".json")
        return head.exists() and json.loads(head.read_text())["settings"] == self._settings()

    def _evaluate(self, name: str, context: str) -> list[EvalRow]:
        path, run = self._path(name), self.run
        head = path.with_suffix(".json")
        if self._stored(name):
            self.seconds[f"evaluate {name}"] = json.loads(head.read_text())["seconds"]
            return evaluation.read_rows(path)
        began = time.perf_counter()
        with self.screen.bar(f"evaluating {name}", evaluation.count(run.heldout, run.config.eval)) as advance:
            rows = evaluation.evaluate(
                name,
                run.student_sampler,
                run.student.chat,
                run.heldout,
                run.config.eval,
                seed=run.config.run.seed,
                context=context,
                out_path=path,
                progress=advance,
            )
        self.seconds[f"evaluate {name}"] = time.perf_counter() - began
        content = {
            "settings": self._settings(),
            "seconds": self.seconds[f"evaluate {name}"],
            "rows": [row.summary() for row in rows],
        }
        write_atomically(head, json.dumps(content, indent=2) + "\n")
        return rows


def with_truncation(run_dir: Path, rows: Sequence[EvalRow]) -> list[EvalRow]:
    """The rows with the control before the trained ones: the base model's samples cut to the trained length."""
    samples = evaluation.read_samples(run_dir / "evaluations" / f"{BASE}.jsonl")
    trained = [row for row in rows if row.name.startswith(TRAINED)]
    controls = [
        evaluation.truncation_row([s for s in samples if s.temperature == row.temperature], row.mean_tokens)
        for row in trained
    ]
    return [*(row for row in rows if not row.name.startswith(TRAINED)), *controls, *trained]


def record_process(run_dir: Path, steps: int, seconds: float) -> None:
    """One line a process that trained: a run that was resumed cost what all of them cost."""
    path = run_dir / "processes.jsonl"
    lines = path.read_text() if path.exists() else ""
    if steps or not lines:
        line = {"steps": steps, "seconds": round(seconds, 3), "peak_memory_bytes": peak_memory()}
        write_atomically(path, lines + json.dumps(line) + "\n")


def summarise(
    run_dir: Path, settings: RunConfig, rows: Sequence[EvalRow], eval_seconds: dict[str, float]
) -> dict[str, Any]:
    """summary.json: before and after at the headline temperature, every row, paired differences, cost, versions."""
    headline = settings.eval.temperatures[0]
    before = {row.temperature: row for row in rows if row.name == BASE}
    after = {row.temperature: row for row in rows if row.name.startswith(TRAINED)}
    steps = read_rows(run_dir / "metrics.jsonl")
    processes = [json.loads(line) for line in (run_dir / "processes.jsonl").read_text().splitlines()]
    seconds = {name: sum(row[f"{name}_seconds"] for row in steps) for name in ("write", "rewrite", "train")}
    seconds |= {**eval_seconds, "wall": sum(process["seconds"] for process in processes)}
    differences = {
        f"{t:g}": dict(zip(("mean", "lower", "upper"), evaluation.paired_difference(before[t], after[t]), strict=True))
        for t in after
    }
    return {
        "before": before[headline].summary(),
        "after": after[headline].summary(),
        "token_reduction": 1 - after[headline].mean_tokens / before[headline].mean_tokens,
        "paired_accuracy_difference": differences,
        "rows": [row.summary() for row in rows],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
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


def evaluate(
    source: str, config_path: Path | None, overrides: Sequence[str], regrade: str | None, out: Path | None
) -> None:
    """`mpd-jax eval`: a run's trained student or a model of its own, or stored samples under another grader."""
    run_dir = Path(source)
    is_run = (run_dir / "config.yaml").is_file()
    if regrade and not is_run:
        raise UserError(f"--regrade: {source} is no run directory (it holds no config.yaml), so it stores no samples")
    if regrade:
        _regrade(run_dir, regrade)
        return
    if is_run:
        settings = config.load(config_path or run_dir / "config.yaml", overrides)
        files, state, mesh = build.restored_student(config.load(run_dir / "config.yaml"), run_dir)
        weights, name = state.weights, f"{source}, step {state.step}"
    else:
        settings, name = _model_settings(source, config_path, overrides), source
        files, mesh = (
            build.open_model("student", settings.student, settings.recipe.contexts),
            build.make_mesh(settings.mesh),
        )
        weights = files.weights(mesh)
    problems = build.read_problems(settings.problems, "heldout")
    sampler = build.make_sampler(files, settings, mesh, settings.sampling.prompt_tokens, settings.eval.max_tokens)
    sampler.load(weights, 0)
    screen, rows = Screen(), []
    contexts = [(name, "plain"), (f"{name}, {CONCISE}", "concise")][: 2 if settings.eval.concise_row else 1]
    for label, context in contexts:
        with screen.bar(f"evaluating {label}", evaluation.count(problems, settings.eval)) as advance:
            rows += evaluation.evaluate(
                label,
                sampler,
                files.chat,
                problems,
                settings.eval,
                seed=settings.run.seed,
                context=context,
                out_path=out / f"{context}.jsonl" if out else None,
                progress=advance,
            )
    Console().print(evaluation.table(rows))


def _regrade(run_dir: Path, grader: str) -> None:
    stored = sorted((run_dir / "evaluations").glob("*.jsonl"))
    if not stored:
        raise UserError(f"--regrade: {run_dir}/evaluations holds no samples; run `mpd-jax eval {run_dir}` first")
    out = run_dir / "evaluations" / f"regraded_{grader}"
    rows = [row for path in stored for row in evaluation.regrade(path, grader, out / path.name)]
    Console().print(evaluation.table(rows))


def _model_settings(source: str, config_path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Settings for a model that belongs to no run: those of a config, or the defaults."""
    if config_path:
        tree = config.read_yaml(config_path)
        return config.resolve(
            {**tree, "student": {**(tree.get("student") or {}), "path": source, "revision": None}}, overrides
        )
    tiny = source.startswith("tiny:")
    recipe = {
        "write": {"by": "dataset"},
        "rewrite": {},
        "target": {"weights": "none"},
        "loss": {"kind": "cross_entropy"},
        "contexts": build.tiny_contexts() if tiny else {},
    }
    tree = {"run": {"dir": "."}, "recipe": recipe, "student": {"path": source}}
    if tiny:
        tree |= {"eval": {"max_tokens": 256}, "sampling": {"prompt_tokens": 96, "prefill_chunk": 64}}
    return config.resolve(tree, overrides)


def sample(source: str, prompt: str | None, temperature: float, max_tokens: int, seed: int, as_json: bool) -> None:
    """`mpd-jax sample`: one problem given, or problems typed one by one."""
    if as_json and prompt is None:
        raise UserError("--json: needs --prompt; without it problems are typed one by one")
    sampling = SamplingConfig(temperature=temperature, max_tokens=max_tokens)
    answerer = _Answerer(source, sampling)
    if prompt is not None:
        answerer.answer(prompt, seed, as_json)
        return
    print("Type a problem, then Enter; an empty line ends.", file=sys.stderr)
    while line := _typed():
        try:
            answerer.answer(line, seed, as_json)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _typed() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


class _Answerer:
    """A model on the devices, ready for prompts of up to 512 tokens."""

    def __init__(self, source: str, sampling: SamplingConfig):
        run_dir = Path(source)
        if (run_dir / "config.yaml").is_file():
            settings = config.load(run_dir / "config.yaml")
            self.files, state, mesh = build.restored_student(settings, run_dir)
            weights = state.weights
        else:
            settings = _model_settings(source, None)
            self.files = build.open_model("student", settings.student, settings.recipe.contexts)
            mesh = build.make_mesh(settings.mesh)
            weights = self.files.weights(mesh)
        window = self.files.model.config.max_position_embeddings
        if sampling.max_tokens >= window:
            raise UserError(f"--max-tokens: {sampling.max_tokens} does not fit the model's window of {window} tokens")
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        one = dataclasses.replace(settings.sampling, slots=rows, prefill_rows=1)
        settings = dataclasses.replace(settings, sampling=one)
        length = min(512, window - sampling.max_tokens)
        self.sampling = sampling
        self.sampler = build.make_sampler(self.files, settings, mesh, length, sampling.max_tokens)
        self.sampler.load(weights, 0)

    def answer(self, question: str, seed: int, as_json: bool) -> None:
        chat = self.files.chat
        prompt = chat.prompt("plain", Problem("typed", question))
        request = Request(prompt, request_key(seed, "sample", 0, question, 0))
        if as_json:
            response = self.sampler.sample([request], self.sampling)[0]
            print(
                json.dumps(
                    {
                        "prompt_ids": list(prompt),
                        "response_ids": list(response.ids),
                        "logprobs": list(response.logprobs),
                        "text": chat.decode(response.ids),
                        "finish_reason": "stop" if response.ended == "stopped" else "length",
                    }
                )
            )
            return
        ids: list[int] = []
        shown = ""
        for token in self.sampler.stream(request, self.sampling):
            ids.append(token)
            text = chat.decode(ids)
            # A character may be spread over tokens; until it is whole it decodes to a replacement character.
            if text.startswith(shown) and not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
        print(f"\n[{len(ids)} tokens]", flush=True)


def export(source: Path, out: Path, dtype: str) -> None:
    """`mpd-jax export`."""
    if not (source / "config.yaml").is_file():
        raise UserError(f"{source}: no run directory (it holds no config.yaml); give the run.dir of a training run")
    settings = config.load(source / "config.yaml")
    files, state, _ = build.restored_student(settings, source)
    export_weights(out, files.directory, files.model, state.weights, dtype=dtype)
    Screen().say(f"wrote {out} ({dtype})")
