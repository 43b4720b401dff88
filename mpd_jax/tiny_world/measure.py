"""Measures a tiny-world model under every context on held-out problems: accuracy, length, share finished."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from mpd_jax.data.chat import Chat
from mpd_jax.data.contexts import Contexts
from mpd_jax.eval.grade import grade
from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import eos_ids, load_config, load_weights
from mpd_jax.sampling.jax_sampler import JaxSampler
from mpd_jax.sampling.sampler import Request, SamplingConfig, request_key
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.tiny_world.corpus import CONTEXTS
from mpd_jax.tiny_world.generator import heldout_problems
from mpd_jax.types import Problem

MAX_TOKENS = 256
# Longest prompts: of a question alone, and of one that quotes a draft or a solution.
SHORT, LONG = 96, 384
# (context, temperature)
ANSWERS = (
    *(("plain", temperature) for temperature in (1.0, 0.6, 0.0)),
    *((context, temperature) for context in ("concise", "concise_b", "privileged") for temperature in (1.0, 0.6)),
)
REWRITES = (("compress", 0.6), ("compress", 1.0), ("repair", 0.6))


class Subject:
    """A model directory ready to be asked."""

    def __init__(self, directory: Path):
        config: ModelConfig = load_config(directory)
        self.directory, self.ends = directory, eos_ids(directory)
        model, mesh = Model(config), make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        weights = load_weights(directory, model, mesh, "float32")
        self.samplers = {}
        for prompt_length in (SHORT, LONG):
            self.samplers[prompt_length] = JaxSampler(
                model,
                mesh,
                self.ends,
                slots=32,
                prompt_length=prompt_length,
                max_length=prompt_length + MAX_TOKENS,
                prefill_chunk=64,
                prefill_rows=8,
                vocab_size=config.vocab_size,
                dtype="float32",
            )
            self.samplers[prompt_length].load(weights, 0)

    def chat(self, concise: str = "concise", thinking: bool = True) -> Chat:
        wordings = {name: text for name, text in CONTEXTS.items() if name != "concise_b"}
        return Chat(self.directory, self.ends, thinking, replace(Contexts(**wordings), concise=CONTEXTS[concise]))

    def ask(self, prompts: list[tuple[int, ...]], problems: list[Problem], stream: str, temperature: float):
        requests = [
            Request(prompt, request_key(0, stream, 0, problem.id, 0))
            for prompt, problem in zip(prompts, problems, strict=True)
        ]
        sampler = self.samplers[SHORT if max(map(len, prompts)) <= SHORT else LONG]
        return sampler.sample(requests, SamplingConfig(temperature=temperature, max_tokens=MAX_TOKENS))


def _row(right: np.ndarray, responses: list, **keys: object) -> dict:
    return {
        **keys,
        "accuracy": round(float(right.mean()), 4),
        "mean_tokens": round(float(np.mean([len(response.ids) for response in responses])), 1),
        "share_finished": round(float(np.mean([response.ended == "stopped" for response in responses])), 4),
    }


def _right(texts: list[str], problems: list[Problem]) -> np.ndarray:
    return np.array([grade(text, problem.answer or "").correct for text, problem in zip(texts, problems, strict=True)])


def _prompt(chat: Chat, context: str, problem: Problem, draft: str) -> tuple[int, ...]:
    """An untrained student's draft may be longer than any prompt: then it counts as an empty one."""
    prompt = chat.prompt(context, problem, draft)
    return prompt if len(prompt) <= LONG else chat.prompt(context, problem, "")


def measure_answers(subject: Subject, problems: list[Problem]) -> list[dict]:
    """One row for each of `ANSWERS`. Tokens are those of the whole response, its end included."""
    rows = []
    for context, temperature in ANSWERS:
        chat = subject.chat("concise_b" if context == "concise_b" else "concise")
        prompts = [chat.prompt("concise" if context == "concise_b" else context, problem) for problem in problems]
        responses = subject.ask(prompts, problems, f"{context} {temperature}", temperature)
        right = _right([chat.answer_text(response.ids) for response in responses], problems)
        rows.append(_row(right, responses, context=context, temperature=temperature))
        print(rows[-1], flush=True)
    return rows


def measure_rewrites(subject: Subject, problems: list[Problem], drafts: list[str]) -> list[dict]:
    """One row for each of `REWRITES`, with and without own thinking; right is judged on the rewrite's answer."""
    draft_right = _right(drafts, problems)
    rows = []
    for context, temperature in REWRITES:
        for thinking in (True, False):
            chat = subject.chat(thinking=thinking)
            prompts = [_prompt(chat, context, p, draft) for p, draft in zip(problems, drafts, strict=True)]
            responses = subject.ask(prompts, problems, f"{context} {temperature} {thinking}", temperature)
            parts = [chat.split_rewrite(response.ids) for response in responses]
            right = _right([chat.decode(part[1]) if part else "" for part in parts], problems)
            row = _row(right, responses, context=context, temperature=temperature, thinking=thinking)
            rewritten = [len(part[0]) + len(part[1]) for part in parts if part]
            row |= {
                "accuracy_on_right_drafts": round(float(right[draft_right].mean()), 4),
                "accuracy_on_wrong_drafts": round(float(right[~draft_right].mean()), 4),
                "share_well_formed": round(float(np.mean([part is not None for part in parts])), 4),
                "mean_tokens_rewritten": round(float(np.mean(rewritten)), 1) if rewritten else 0.0,
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def measure(student: Path, teacher: Path, n: int, seed: int) -> dict:
    """Both models under every context. The drafts that both rewrite are the student's own, at temperature 1."""
    problems = heldout_problems(n, seed)
    subjects = {"student": Subject(student), "teacher": Subject(teacher)}
    writer, chat = subjects["student"], subjects["student"].chat()
    written = writer.ask([chat.prompt("plain", problem) for problem in problems], problems, "draft", 1.0)
    drafts = [chat.draft(response.ids) for response in written]
    return {
        "problems": {"n": n, "seed": seed, "split": "heldout"},
        "share_of_right_drafts": round(float(_right(drafts, problems).mean()), 4),
        **{
            name: [*measure_answers(subject, problems), *measure_rewrites(subject, problems, drafts)]
            for name, subject in subjects.items()
        },
    }
