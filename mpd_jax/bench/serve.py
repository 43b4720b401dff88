"""`mpd-jax bench serve URL`: how fast the client feeds a vLLM server, and who makes how many tokens a second.

First the client in turn with the server's own benchmark load (`vllm bench serve`, a process of its own): the same
prompts as token ids, response lengths, concurrency and sampling fields. That load streams, the client does not; where
the server was not started with a long --stream-interval, streaming slows the load. Then the JAX sampler, the server and
transformers' `generate` on the same weights and problems, greedy, each answering all of them in turn.
"""

import json as text
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from mpd_jax.bench.sample import (
    WITHOUT_TORCH,
    Generate,
    Subject,
    in_batches,
    open_subject,
    threads,
    transformers_generate,
)
from mpd_jax.sampling.sampler import Request, SamplingConfig, request_key
from mpd_jax.sampling.servers import ServerConfig, Servers
from mpd_jax.sampling.vllm_client import PATH, VLLMSampler
from mpd_jax.serving import sampler_of
from mpd_jax.types import UserError

BATCH = 64  # of the JAX sampler (slots) and of transformers
WITHOUT_VLLM = "the server's own benchmark load needs its program: give --vllm .../bin/vllm"

Rate = Callable[[int], float]  # tokens a second of a round by its number


def run(
    url: str,
    *,
    json: bool = False,
    path: str = "tiny:teacher",
    vllm: str | None = None,
    concurrency: int = 256,
    count: int = 512,
    tokens: int = 64,
    pairs: int = 5,
    repeats: int = 3,
    max_tokens: int = 256,
) -> dict[str, Any]:
    """Measures, prints unless `json`, and returns what is printed. vllm: the program; without it, and without torch,
    the figures that need them are None."""
    program = shutil.which(vllm or "vllm")
    if vllm and program is None:
        raise UserError(f"--vllm: {vllm} is no program; give the path of the server's own, such as .venv/bin/vllm")
    servers = Servers([url], ServerConfig(concurrency=concurrency))
    servers.wait_until_ready()
    subject = open_subject(path, count, max_tokens)
    with TemporaryDirectory() as scratch:
        client = Client(servers, subject, Path(scratch), tokens)
        load = Load(client, program, Path(scratch), concurrency) if program else None
        feeding = feed(client, load, pairs)
        rates = side_by_side(subject, servers, Path(scratch), repeats)
    result = {
        "url": servers.urls[0],
        "model": path,
        "vllm": servers.version,
        "concurrency": concurrency,
        "requests": len(client.prompts),
        "tokens_each": tokens,
        "feeding": feeding,
        "answering": rates,
    }
    if not json:
        show(result)
    return result


class Client:
    """`len(prompts)` responses of exactly `tokens` tokens, at temperature 1, through the sampler that runs use."""

    def __init__(self, servers: Servers, subject: Subject, scratch: Path, tokens: int):
        self.servers, self.tokens = servers, tokens
        self.prompts = [request.prompt for request in subject.requests]
        self.sampling = SamplingConfig(max_tokens=tokens)
        self.sampler = served(replace(subject, files=replace(subject.files, eos_ids=frozenset())), servers, scratch)

    def __call__(self, number: int) -> float:
        requests = [Request(p, request_key(number, "bench", 0, str(i), 0)) for i, p in enumerate(self.prompts)]
        start = time.perf_counter()
        responses = self.sampler.sample(requests, self.sampling)
        return sum(len(r.ids) for r in responses) / (time.perf_counter() - start)

    def fields(self) -> dict[str, Any]:
        """What the client sends beside model and prompt; one seed for all, for the load knows no other way."""
        body = self.sampler.body((0,), (0, 0), self.sampling)
        return {name: value for name, value in body.items() if name not in ("prompt", "stream")}


class Load:
    """The same from the server's own benchmark."""

    def __init__(self, client: Client, program: str, scratch: Path, concurrency: int):
        self.expected, self.out = len(client.prompts) * client.tokens, scratch / "load.json"
        prompts = scratch / "prompts.jsonl"
        prompts.write_text("".join(text.dumps({"prompt": prompt}) + "\n" for prompt in client.prompts))
        options = {
            "base-url": client.servers.urls[0],
            "endpoint": PATH,
            "model": client.servers.model,
            "dataset-name": "custom",
            "dataset-path": prompts,
            "num-prompts": len(client.prompts),
            "max-concurrency": concurrency,
            "logprobs": 0,
            "extra-body": text.dumps(client.fields()),
            "result-dir": scratch,
            "result-filename": self.out.name,
        }
        flags = ["--backend=openai", "--skip-tokenizer-init", "--disable-shuffle", "--disable-tqdm", "--save-result"]
        self.command = [program, "bench", "serve", *flags, *(f"--{name}={value}" for name, value in options.items())]

    def __call__(self, number: int) -> float:
        done = subprocess.run(self.command, capture_output=True, text=True)
        try:
            result = text.loads(self.out.read_text())
            made, seconds = result["total_output_tokens"], result["duration"]
        except (OSError, ValueError, KeyError):
            raise UserError(f"vllm bench serve failed: {(done.stderr or done.stdout)[-500:].strip()}") from None
        if made != self.expected:
            raise UserError(f"vllm bench serve made {made} tokens of {self.expected}; look into the server's log")
        return made / seconds


def served(subject: Subject, servers: Servers, scratch: Path) -> VLLMSampler:
    sampler = sampler_of(subject.files, servers, servers.window, scratch / "spill.jsonl")
    sampler.load(None, 0)
    return sampler


def feed(client: Rate, load: Rate | None, pairs: int) -> dict[str, Any]:
    """Tokens per second of both in `pairs` rounds in turn, after one of each to warm up, and the client's share."""
    rates: list[tuple[float, float]] = []
    for number in range(pairs + 1):
        rates.append((client(number), load(number) if load else 0.0))
    ours, theirs = zip(*rates[1:], strict=True)
    shares = [one / other for one, other in rates[1:]] if load else []
    return {
        "client": spread(ours),
        "load": spread(theirs) if load else None,
        "share": spread(shares) if load else None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def side_by_side(subject: Subject, servers: Servers, scratch: Path, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second up to EOS, median of `repeats` in turn, and the share of responses equal to the first one's."""
    here, there = subject.sampler(BATCH), served(subject, servers, scratch)
    greedy = transformers_generate(subject.files.directory, subject.files.eos_ids, threads())
    answers: dict[str, Generate] = {
        name: lambda requests, limit, sampler=sampler: [
            r.ids for r in sampler.sample(requests, SamplingConfig(temperature=0.0, max_tokens=limit))
        ]
        for name, sampler in (("JAX sampler", here), ("vLLM server", there))
    }
    if greedy:
        answers["transformers generate"] = in_batches(greedy, BATCH)
    for answer in answers.values():
        answer(subject.requests[:BATCH], 2)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    ids: dict[str, list[tuple[int, ...]]] = {}
    for _ in range(repeats):
        (scratch / "spill.jsonl").unlink(missing_ok=True)
        for name, answer in answers.items():
            start = time.perf_counter()
            ids[name] = answer(subject.requests, subject.max_tokens)
            seconds[name].append(time.perf_counter() - start)
    ours = ids["JAX sampler"]
    return [
        {
            "who": name,
            "responses": len(made),
            "tokens": sum(map(len, made)),
            "tokens_per_second": sum(map(len, made)) / statistics.median(seconds[name]),
            "equal_responses": sum(a == b for a, b in zip(ours, made, strict=True)) / len(made),
        }
        for name, made in ids.items()
    ]


def show(result: dict[str, Any]) -> None:
    console, feeding = Console(), result["feeding"]
    console.print(
        f"{result['model']} at {result['url']} (vLLM {result['vllm']}): {result['requests']} requests of "
        f"{result['tokens_each']} tokens, {result['concurrency']} in flight"
    )
    for name, what in (("client", "client"), ("load", "vllm bench serve")):
        if feeding[name]:
            figures = [f"{feeding[name][k]:,.0f}" for k in ("median", "low", "high")]
            console.print(f"{what}: {figures[0]} tokens a second [{figures[1]}, {figures[2]}]")
    if feeding["share"]:
        share = [f"{feeding['share'][k]:.1%}" for k in ("median", "low", "high")]
        console.print(f"client over vllm bench serve, in pairs: {share[0]} [{share[1]}, {share[2]}]")
    else:
        console.print(WITHOUT_VLLM)
    table = Table(title="Greedy, the same weights and problems, tokens up to EOS")
    for column in ("who", "responses", "tokens", "tokens/s", "equal responses"):
        table.add_column(column, justify="left" if column == "who" else "right")
    for row in result["answering"]:
        rate, equal = f"{row['tokens_per_second']:,.0f}", f"{row['equal_responses']:.1%}"
        table.add_row(row["who"], str(row["responses"]), f"{row['tokens']:,}", rate, equal)
    console.print(table)
    if len(result["answering"]) < 3:
        console.print(WITHOUT_TORCH)
