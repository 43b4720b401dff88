"""`mpd-jax bench sample`: the JAX sampler beside transformers' `generate`, on the shipped student, greedy.

Both answer the same problems: transformers in left-padded batches, the sampler with at most as many slots, fed by a
queue. Only tokens up to EOS count, compilation is left out, and the two are timed in turn in one process on the same
threads. Then, at temperature 1, decode steps against the ideal, and tokens that change with the compiled shape.
torch is imported by this bench alone, and only when it runs; without it what needs transformers is left out.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from mpd_jax.build import read_problems
from mpd_jax.data.contexts import Contexts
from mpd_jax.data.problems import ProblemsConfig
from mpd_jax.models.config import ModelSpec
from mpd_jax.roles import ModelFiles, open_model
from mpd_jax.sampling.jax_sampler import JaxSampler
from mpd_jax.sampling.sampler import Request, Response, SamplingConfig, request_key
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.types import UserError

WITHOUT_TORCH = "the comparison with transformers' generate needs torch: pip install torch"

Generate = Callable[[Sequence[Request], int], list[tuple[int, ...]]]


@dataclass(frozen=True)
class Subject:
    """What is measured: a model on one device, and requests drawn from the problems that ship with it."""

    files: ModelFiles
    mesh: Mesh
    weights: Any
    requests: tuple[Request, ...]
    max_tokens: int

    def sampler(self, slots: int, prefill_chunk: int | None = None) -> JaxSampler:
        longest = max(len(r.prompt) for r in self.requests)
        sampler = JaxSampler(
            self.files.model,
            self.mesh,
            self.files.eos_ids,
            slots=slots,
            prompt_length=longest,
            max_length=longest + self.max_tokens,
            prefill_chunk=prefill_chunk or longest - 1,
            prefill_rows=1,  # in steady state one slot at a time falls free
            vocab_size=self.files.chat.vocab_size,
            dtype=jnp.float32,
        )
        sampler.load(self.weights, 0)
        return sampler


def run(
    json: bool = False,
    *,
    path: str = "tiny:student",
    batches: Sequence[int] = (8, 64),
    rounds: int = 3,
    repeats: int = 3,
    max_tokens: int = 384,
) -> dict[str, Any]:
    """Measures, prints unless `json`, and returns what is printed. A batch size answers `rounds` x as many problems.

    Without torch the figures of transformers are None.
    """
    if min(batches, default=0) < 1 or min(rounds, repeats, max_tokens) < 1:
        given = f"batches={list(batches)}, rounds={rounds}, repeats={repeats}, max_tokens={max_tokens}"
        raise UserError(f"bench sample {given}: every size must be at least 1")
    subject = open_subject(path, count=max(batches) * rounds, max_tokens=max_tokens)
    generate = transformers_generate(subject.files.directory, subject.files.eos_ids, threads())
    result = {
        "model": path,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "threads": threads(),
        "batches": [compare(subject, generate, size, size * rounds, repeats) for size in batches],
        "steps": refill_steps(subject, slots=min(batches)),
        "shape_divergence": shape_divergence(subject, slots=(min(batches), max(1, min(batches) // 2))),
    }
    if not json:
        show(result)
    return result


def threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_subject(path: str, count: int, max_tokens: int) -> Subject:
    files = open_model("model", ModelSpec(path), Contexts())
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    problems = read_problems(ProblemsConfig(), "heldout")[:count]
    requests = tuple(
        Request(files.chat.prompt("plain", problem), request_key(0, "bench", 0, problem.id, 0)) for problem in problems
    )
    return Subject(files, mesh, files.weights(mesh), requests, max_tokens)


def transformers_generate(directory: Path, eos_ids: frozenset[int], threads: int) -> Generate | None:
    """transformers' greedy `generate` over left-padded batches, responses cut behind their first EOS.

    None without torch.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def generate(requests: Sequence[Request], max_tokens: int) -> list[tuple[int, ...]]:
        longest = max(len(r.prompt) for r in requests)
        pad = [longest - len(r.prompt) for r in requests]
        ids = torch.tensor([[0] * n + list(r.prompt) for n, r in zip(pad, requests, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=sorted(eos_ids),
                pad_token_id=min(eos_ids),
            )
        return [_until_eos(row, eos_ids) for row in out[:, longest:].tolist()]

    return generate


def _until_eos(ids: list[int], eos_ids: frozenset[int]) -> tuple[int, ...]:
    end = next((t + 1 for t, token in enumerate(ids) if token in eos_ids), len(ids))
    return tuple(ids[:end])


def in_batches(generate: Generate, size: int) -> Generate:
    def answer(requests: Sequence[Request], max_tokens: int) -> list[tuple[int, ...]]:
        parts = [requests[i : i + size] for i in range(0, len(requests), size)]
        return [ids for part in parts for ids in generate(part, max_tokens)]

    return answer


def compare(subject: Subject, generate: Generate | None, size: int, count: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of both at one batch size, best of `repeats` in turn, and whether the tokens are equal."""
    requests, sampler = subject.requests[:count], subject.sampler(size)

    def ours(requests: Sequence[Request], max_tokens: int) -> list[tuple[int, ...]]:
        return [r.ids for r in sampler.sample(requests, SamplingConfig(temperature=0.0, max_tokens=max_tokens))]

    answers: dict[str, Generate] = {"ours": ours}
    if generate:
        answers["theirs"] = in_batches(generate, size)
    for answer in answers.values():
        answer(requests[:size], 2)  # compiles
    best, ids = dict.fromkeys(answers, float("inf")), {}
    for _ in range(repeats):
        for name, answer in answers.items():
            start = time.perf_counter()
            ids[name] = answer(requests, subject.max_tokens)
            best[name] = min(best[name], time.perf_counter() - start)
    rate = {name: sum(map(len, ids[name])) / best[name] for name in ids}
    theirs = ids.get("theirs")
    equal = theirs and sum(a == b for a, b in zip(ids["ours"], theirs, strict=True)) / len(requests)
    return {
        "batch": size,
        "responses": len(requests),
        "tokens": sum(map(len, ids["ours"])),
        "tokens_per_second": rate["ours"],
        "transformers_tokens_per_second": rate.get("theirs"),
        "speedup": rate["ours"] / rate["theirs"] if theirs else None,
        "equal_responses": equal,
    }


def refill_steps(subject: Subject, slots: int) -> dict[str, Any]:
    """Decode steps for sampled responses of uneven length, over sum of lengths / slots + longest length."""
    sampler = subject.sampler(slots)
    responses = sampler.sample(subject.requests, SamplingConfig(max_tokens=subject.max_tokens))
    lengths = [len(r.ids) for r in responses]
    slots = sampler.slots  # on a CPU perhaps fewer than asked for
    ideal = sum(lengths) / slots + max(lengths)
    static = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    return {
        "slots": slots,
        "responses": len(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "decode_steps": sampler.stats.decode_steps,
        "ratio": sampler.stats.decode_steps / ideal,
        "static_ratio": static / ideal,
    }


def shape_divergence(subject: Subject, slots: tuple[int, int], count: int = 64) -> dict[str, Any]:
    """Share of tokens that differ when the same requests run at another number of slots and prefill chunk.

    Within one shape a response is bit-identical; across shapes sums may round differently and a draw may tip over.
    """
    requests, sampling = subject.requests[:count], SamplingConfig(max_tokens=subject.max_tokens)
    one = subject.sampler(slots[0]).sample(requests, sampling)
    other = subject.sampler(slots[1], prefill_chunk=32).sample(requests, sampling)
    return {"slots": list(slots), "responses": len(requests), "share": differing_share(one, other)}


def differing_share(one: Sequence[Response], other: Sequence[Response]) -> float:
    """Positions, over the longer of each pair of responses, where the two do not hold the same token."""
    different = total = 0
    for a, b in zip(one, other, strict=True):
        longest = max(len(a.ids), len(b.ids))
        same = sum(x == y for x, y in zip(a.ids, b.ids, strict=False))
        different, total = different + longest - same, total + longest
    return different / max(total, 1)


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"greedy, {result['model']}, {result['device']}, {result['threads']} threads")
    for column in ("batch", "responses", "tokens/s", "transformers", "speed-up", "equal responses"):
        table.add_column(column, justify="right")
    for row in result["batches"]:
        theirs = ("-", "-", "-")
        if row["speedup"] is not None:
            theirs = (
                f"{row['transformers_tokens_per_second']:,.0f}",
                f"{row['speedup']:.1f}x",
                f"{row['equal_responses']:.1%}",
            )
        table.add_row(str(row["batch"]), str(row["responses"]), f"{row['tokens_per_second']:,.0f}", *theirs)
    console.print(table)
    if any(row["speedup"] is None for row in result["batches"]):
        console.print(WITHOUT_TORCH)
    steps, shapes = result["steps"], result["shape_divergence"]
    console.print(
        f"{steps['responses']} sampled responses, mean {steps['mean_length']:.0f} and longest {steps['longest']} "
        f"tokens: {steps['decode_steps']} decode steps in {steps['slots']} slots, {steps['ratio']:.2f} x (sum / slots "
        f"+ longest); batches without refilling would take {steps['static_ratio']:.2f} x"
    )
    console.print(
        f"tokens that differ between {shapes['slots'][0]} and {shapes['slots'][1]} slots: {shapes['share']:.2%}"
    )
