"""What is done with a trained run or any other model: sample from it, export it, show what it reads."""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mpd_jax import build, config, files, trees
from mpd_jax.beside import Stream, show
from mpd_jax.config import RunConfig
from mpd_jax.files import AnyPath
from mpd_jax.models.hf_weights import export as export_weights
from mpd_jax.models.peft import export_adapter
from mpd_jax.recipe.write import DatasetWriter
from mpd_jax.roles import assign_roles, make_sampler, open_model
from mpd_jax.run import TRAINED
from mpd_jax.sampling.jax_sampler import JaxSampler
from mpd_jax.sampling.sampler import Request, SamplingConfig, request_key
from mpd_jax.screen import Screen
from mpd_jax.train.checkpoint import Which
from mpd_jax.types import Problem, UserError

DRAFT = "[the draft stands here]"  # of a problem without a worked response


def refuse_choice(source: str, which: Which | None) -> None:
    """UserError where a checkpoint was asked for of what is no run."""
    if which is not None:
        raise UserError(
            f"{'--best' if which == 'best' else '--step'}: {source} is no run directory (it holds no config.yaml), so "
            "it has no checkpoints to choose from; leave it out"
        )


def model_settings(source: str, config_path: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Settings for a model that belongs to no run: those of a config, or the defaults."""
    if config_path:
        tree, of_the_run = trees.read_yaml(config_path), dict.fromkeys(("revision", "lora", "adapter"))
        return config.resolve(
            {**tree, "student": {**(tree.get("student") or {}), **of_the_run, "path": source}}, overrides
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


def sample(
    source: str,
    prompt: str | None,
    temperature: float,
    max_tokens: int,
    seed: int,
    as_json: bool,
    which: Which | None = None,
) -> None:
    """`mpd-jax sample`: one problem given, or problems typed one by one; a run answers before and after training."""
    if as_json and prompt is None:
        raise UserError("--json: needs --prompt; without it problems are typed one by one")
    sampling = SamplingConfig(temperature=temperature, max_tokens=max_tokens)
    answerer = _Answerer(source, sampling, which)
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
    """A model on the devices, ready for prompts of up to 512 tokens; of a run the student before and after training.

    Both draw alike, so that what differs is what was learnt.
    """

    def __init__(self, source: str, sampling: SamplingConfig, which: Which | None):
        run_dir = files.path(source)
        if files.is_file(run_dir / "config.yaml"):
            settings = config.load(run_dir / "config.yaml")
            restored = build.restored_student(settings, run_dir, which)
            self.files, mesh = restored.files, restored.mesh
            weights = {"untrained": restored.before, f"{TRAINED}, step {restored.step}": restored.after}
        else:
            refuse_choice(source, which)
            settings = model_settings(source, None)
            self.files = open_model("student", settings.student, settings.recipe.contexts)
            mesh = build.make_mesh(settings.mesh)
            weights = {"": lambda: self.files.weights(mesh)}
        window = self.files.model.config.max_position_embeddings
        if sampling.max_tokens >= window:
            raise UserError(f"--max-tokens: {sampling.max_tokens} does not fit the model's window of {window} tokens")
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        one = dataclasses.replace(settings.sampling, slots=rows, prefill_rows=1)
        settings = dataclasses.replace(settings, sampling=one)
        self.length = min(512, window - sampling.max_tokens)
        self.sampling = sampling
        self.samplers: dict[str, JaxSampler] = {}
        for label, load in weights.items():
            self.samplers[label] = make_sampler(self.files, settings, mesh, self.length, sampling.max_tokens)
            self.samplers[label].load(load(), 0)

    def answer(self, question: str, seed: int, as_json: bool) -> None:
        chat = self.files.chat
        if re.search("[\ud800-\udfff]", question):
            raise UserError("--prompt: it is not UTF-8; type it again")
        prompt = chat.prompt("plain", Problem("typed", question))
        if len(prompt) > self.length:
            raise UserError(
                f"--prompt: {len(prompt)} tokens, and there is room for {self.length} beside "
                f"--max-tokens {self.sampling.max_tokens}; shorten it, or lower --max-tokens"
            )
        request = Request(prompt, request_key(seed, "sample", 0, question, 0))
        if as_json:
            print(json.dumps(self._told(request), allow_nan=False))
            return
        streams = [
            Stream(label, sampler.stream(request, self.sampling), chat.decode)
            for label, sampler in self.samplers.items()
        ]
        show(streams, Console(highlight=False))

    def _told(self, request: Request) -> dict[str, Any]:
        """The last model's answer; of a run, that is the trained student's, the untrained one's under `before`."""
        *before, answer = (
            {
                "response_ids": list(response.ids),
                "logprobs": list(response.logprobs),
                "text": self.files.chat.decode(response.ids),
                "finish_reason": "stop" if response.ended == "stopped" else "length",
                "tokens": len(response.ids),
            }
            for sampler in self.samplers.values()
            for response in sampler.sample([request], self.sampling)
        )
        return {"prompt_ids": list(request.prompt), **answer} | ({"before": before[0]} if before else {})


def export(
    source: str | AnyPath,
    out: Path,
    dtype: str | None,
    adapter: bool = False,
    which: Which | None = None,
    untie: bool = False,
) -> None:
    """`mpd-jax export`: a run's student with any adapter merged, its adapter alone, or any other model."""
    run_dir = files.path(source)
    if not files.is_file(run_dir / "config.yaml"):
        _export_model(str(source), out, dtype or "bfloat16", adapter, which, untie)
        return
    settings = config.load(run_dir / "config.yaml")
    if adapter and settings.student.lora is None:
        raise UserError(f"--adapter: {source} trained all weights, not an adapter; leave --adapter out")
    if adapter and untie:
        raise UserError("--untie: an adapter holds no head; leave --untie or --adapter out")
    restored = build.restored_student(settings, run_dir, which)
    model, dtype = restored.files, dtype or ("float32" if adapter else "bfloat16")
    if adapter:
        assert model.adapted is not None, "lora without an adapter"
        pinned = settings.student.revision is not None
        base = settings.student.path if pinned else str(model.directory.absolute())
        export_adapter(out, model.adapted, restored.trained, base, settings.student.revision, dtype=dtype)
    else:
        export_weights(out, model.directory, model.model, restored.after(), dtype=dtype, untie=untie)
    Screen().say(f"wrote {out} ({dtype}), the student after step {restored.step}")


def _export_model(source: str, out: Path, dtype: str, adapter: bool, which: Which | None, untie: bool) -> None:
    refuse_choice(source, which)
    if adapter:
        raise UserError(f"--adapter: {source} is no run directory (it holds no config.yaml); leave it out")
    settings = model_settings(source, None)
    model = open_model("student", settings.student, settings.recipe.contexts)
    weights = model.weights(build.make_mesh(settings.mesh))
    export_weights(out, model.directory, model.model, weights, dtype=dtype, untie=untie)
    Screen().say(f"wrote {out} ({dtype})")


def prompts(settings: RunConfig) -> str:
    """`mpd-jax config --prompts`: what every role reads of the first problem to train on, and what the student would
    read of it under the other contexts. A draft is the problem's worked response. No weights are read."""
    roles, problem = assign_roles(settings, open_model), build.read_problems(settings.problems, "train")[0]
    student, draft = roles.student, DRAFT
    if (problem.response or "").strip():
        draft = student.chat.draft(DatasetWriter(student.chat)([problem], 0)[0].response)
    readers = roles.readers(settings.recipe)
    solved = problem.response is not None or problem.answer is not None
    contexts = ["plain", "concise", *(["privileged"] if solved else [])]
    read = {(held.key, context) for _, held, context in readers}
    readers += [("student", student, context) for context in contexts if ("student", context) not in read]
    writes, shown = settings.recipe.write.by == "student", [f"first problem of problems.train: {problem.id}"]
    for role, held, context in readers:
        ids = held.chat.prompt(context, problem, draft)
        by = "" if role == held.key else f" ({held.key})"
        role = "student, who writes" if role == "student" and context == "plain" and writes else role
        shown.append(f"=== {role}{by}, {context}: {len(ids):,} tokens ===\n{held.chat.text(ids)}")
    return "\n\n".join(shown)
