"""Samples on the training mesh: chunked prefill, cached decode, a fixed number of slots refilled from a queue.

Two programs run at one shape each, `prefill` [prefill_rows, prefill_chunk] and `decode` [slots], so a response is a
function of (key, prompt, weights, sampling), bit for bit, whatever shares its batch. The last prompt token is fed by
`decode`, which therefore draws every token; `prefill` needs no vocabulary head. Decoding stays on the device until a
slot is free for a waiting request; ids and log-probabilities leave it once per finished response.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpd_jax.models.cache import KVCache
from mpd_jax.models.decoder import Model
from mpd_jax.sampling.draw import draw
from mpd_jax.sampling.sampler import Request, Response, SamplingConfig
from mpd_jax.sharding import tree_shardings
from mpd_jax.types import Array, UserError

# How often each program was traced in this process; equal shapes and equal models share one program.
TRACES: Counter[str] = Counter()

REPORT_EVERY = 128  # decode steps after which the host looks in even if no slot is free
STREAM_EVERY = 4  # decode steps between two looks at a streamed response
CPU_CACHE_BYTES = 8 * 2**20  # of keys and values; twice that was seen to cost twice the time for each token


@dataclass
class Stats:
    """What a sampler did since it was made. `decode_steps` counts device steps, each at most one token a slot."""

    decode_steps: int = 0
    prefill_calls: int = 0
    tokens: int = 0
    responses: int = 0


class Slots(NamedTuple):
    """Device state; B runs over slots, R over response tokens. Row b of `ids_BR` holds `count_B[b]` tokens."""

    cache: KVCache
    token_B: jax.Array  # fed next
    count_B: jax.Array
    active_B: jax.Array
    key_B2: jax.Array
    ids_BR: jax.Array
    logprob_BR: jax.Array


class Chunk(NamedTuple):
    """One prefill call. A row with `last` starts its slot's response; a dummy row has valid 0 and neither flag."""

    tokens_CT: Array
    slot_C: Array
    valid_C: Array
    first_C: Array
    last_C: Array
    token_C: Array
    key_C2: Array


class Settings(NamedTuple):
    """Sampling settings as scalars in arrays: changing them compiles nothing."""

    temperature: Array
    top_p: Array
    top_k: Array
    max_tokens: Array
    eos_E: Array


@dataclass(frozen=True)
class Program:
    """What the compiled programs are specialised to, besides shapes. `layout`: the sharding of every device array.

    spread: slots lie on several devices; then prompts enter the cache where it lies, with every slot taking part.
    window: cache positions that prompts, with the padding of their last chunk, can reach.
    """

    model: Model
    vocab_size: int
    layout: Slots
    spread: bool
    window: int


@partial(jax.jit, static_argnames=("program",), donate_argnames=("slots",))
def _prefill(weights: Any, slots: Slots, chunk: Chunk, *, program: Program) -> Slots:
    TRACES["prefill"] += 1
    cache = slots.cache
    nobody = slots.token_B.shape[0]  # an index out of range: the write is dropped
    first_C = jnp.where(chunk.first_C, chunk.slot_C, nobody)
    last_C = jnp.where(chunk.last_C, chunk.slot_C, nobody)
    cache = cache._replace(length_B=cache.length_B.at[first_C].set(0, mode="drop"))
    rows = chunk.tokens_CT, chunk.slot_C, chunk.valid_C
    if program.spread:  # rows picked out of a cache that is split would be sent to every device
        tokens_BT, valid_B = (jnp.zeros((nobody, *x.shape[1:]), x.dtype).at[rows[1]].set(x) for x in rows[::2])
        rows = tokens_BT, None, valid_B
    _, cache = program.model.decode(weights, rows[0], cache, rows[1], rows[2], program.window)
    slots = slots._replace(
        cache=cache,
        token_B=slots.token_B.at[last_C].set(chunk.token_C, mode="drop"),
        count_B=slots.count_B.at[last_C].set(0, mode="drop"),
        active_B=slots.active_B.at[last_C].set(True, mode="drop"),
        key_B2=slots.key_B2.at[last_C].set(chunk.key_C2, mode="drop"),
    )
    return jax.lax.with_sharding_constraint(slots, program.layout)


def _token(weights: Any, slots: Slots, settings: Settings, program: Program, truncate: bool) -> Slots:
    """One token for every active slot."""
    h_B1D, cache = program.model.decode(
        weights, slots.token_B[:, None], slots.cache, None, slots.active_B.astype(jnp.int32)
    )
    logits_BV = program.model.project(weights, h_B1D[:, 0])
    real_V = jnp.arange(logits_BV.shape[1]) < program.vocab_size
    logits_BV = jnp.where(real_V[None, :], logits_BV, -jnp.inf)
    token_B = draw(
        logits_BV,
        slots.key_B2,
        slots.count_B,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        truncate=truncate,
    )
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    row_B = jnp.arange(token_B.shape[0])
    column_B = jnp.where(slots.active_B, slots.count_B, slots.ids_BR.shape[1])
    count_B = slots.count_B + slots.active_B
    eos_B = (token_B[:, None] == settings.eos_E[None, :]).any(axis=-1)
    return Slots(
        cache=cache,
        token_B=token_B,
        count_B=count_B,
        active_B=slots.active_B & ~eos_B & (count_B < settings.max_tokens),
        key_B2=slots.key_B2,
        ids_BR=slots.ids_BR.at[row_B, column_B].set(token_B, mode="drop"),
        logprob_BR=slots.logprob_BR.at[row_B, column_B].set(logprob_B, mode="drop"),
    )


@partial(jax.jit, static_argnames=("program", "truncate"), donate_argnames=("slots",))
def _decode(
    weights: Any,
    slots: Slots,
    settings: Settings,
    limit: Array,
    enough: Array,
    *,
    program: Program,
    truncate: bool,
) -> tuple[Slots, Array]:
    """Decodes until `enough` slots finished, none is active, or `limit` steps; returns the number of steps too."""
    TRACES["decode"] += 1
    started = slots.active_B.sum()

    def more(carry: tuple[Slots, Array]) -> Array:
        active = carry[0].active_B.sum()
        return (active > 0) & (started - active < enough) & (carry[1] < limit)

    def step(carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
        return _token(weights, carry[0], settings, program, truncate), carry[1] + 1

    slots, steps = jax.lax.while_loop(more, step, (slots, jnp.int32(0)))
    return jax.lax.with_sharding_constraint(slots, program.layout), steps


@jax.jit
def _take(slots: Slots, slot_C: Array) -> tuple[Array, Array]:
    TRACES["take"] += 1
    return slots.ids_BR[slot_C], slots.logprob_BR[slot_C]


def _decode_copy(weights: Any, model: Model, dtype: Any) -> Any:
    TRACES["load"] += 1
    # A copy even where nothing changes: the trainer donates its own buffers at the next step.
    return jax.tree.map(lambda x: jnp.array(x, dtype=dtype, copy=True), model.by_layer(weights))


@dataclass
class _Batch:
    """One call of `sample` or `stream`: its device state, and what the host knows of it."""

    requests: Sequence[Request]
    settings: Settings
    truncate: bool
    slots: Slots
    queue: deque[int]
    running: dict[int, int]  # slot -> request


class JaxSampler:
    """A model that answers, on the training mesh. See `mpd_jax.sampling.sampler.Sampler` for the contract.

    slots: responses decoded side by side, fewer on a CPU whose own cache would not hold them. prompt_length,
    max_length: longest prompt, and longest prompt + response, in tokens. vocab_size: columns of the head beyond it are
    padding and are never drawn. dtype: of weights and cache.
    Every process of a multi-host run calls every method with the same arguments and gets the same responses.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        eos_ids: frozenset[int],
        *,
        slots: int,
        prompt_length: int,
        max_length: int,
        prefill_chunk: int,
        prefill_rows: int,
        vocab_size: int,
        dtype: Any,
    ):
        self.model, self.mesh, self.eos_ids = model, mesh, eos_ids
        self.prompt_length, self.max_length = prompt_length, max_length
        self.prefill_chunk = min(prefill_chunk, max(prompt_length - 1, 1))
        self.vocab_size, self.dtype = vocab_size, jnp.dtype(dtype)
        self.slots = self._fitting(slots)
        spread = mesh.shape["data"] * mesh.shape["fsdp"] > 1
        self._asked_rows = prefill_rows
        self.version = -1
        self.stats = Stats()
        self._weights: Any = None
        shapes = jax.eval_shape(model.by_layer, model.abstract())
        layout = tree_shardings(mesh, model.by_layer_axes(), shapes, "decode")
        self._reshard = jax.jit(partial(_decode_copy, model=model, dtype=self.dtype), out_shardings=layout)
        self._program = Program(model, vocab_size, self._layout(), spread, self._window())
        self._empty = jax.jit(self._new_slots, out_shardings=self._program.layout)

    @property
    def prefill_rows(self) -> int:
        """Prompts that one prefill reads."""
        return self.slots if self._program.spread else min(self._asked_rows, self.slots)

    def load(self, weights: Any, version: int) -> None:
        """Copies the weights into the decode layout and dtype. The caller's arrays may be donated afterwards."""
        with jax.set_mesh(self.mesh):
            self._weights = self._reshard(weights)
        self.version = version

    def share(self, other: "JaxSampler") -> None:
        """Samples with the weights that another sampler of the same model and mesh has loaded: one copy serves both."""
        assert (other.model, other.mesh, other.dtype) == (self.model, self.mesh, self.dtype), "unlike samplers"
        self._weights, self.version = other._weights, other.version

    def sample(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        progress: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Responses in the order of the requests. `progress` is told the number of finished responses."""
        batch = self._batch(requests, sampling)
        responses: dict[int, Response] = {}
        while batch.queue or batch.running:
            self._refill(batch)
            self._advance(batch, limit=REPORT_EVERY)
            responses.update(self._collect(batch))
            if progress:
                progress(len(responses))
        return [responses[index] for index in range(len(requests))]

    def stream(self, request: Request, sampling: SamplingConfig) -> Iterator[int]:
        """The token ids of one response as they come: the same ids as `sample` returns."""
        batch = self._batch([request], sampling)
        self._refill(batch)
        (slot,) = batch.running
        sent, active = 0, True
        while active:
            self._advance(batch, limit=STREAM_EVERY)
            active = bool(np.asarray(batch.slots.active_B)[slot])
            count = int(np.asarray(batch.slots.count_B)[slot])
            ids_R, _ = self._rows(batch, [slot])[0]
            yield from (int(token) for token in ids_R[sent:count])
            sent = count
        self.stats.tokens += sent
        self.stats.responses += 1

    def _batch(self, requests: Sequence[Request], sampling: SamplingConfig) -> _Batch:
        assert self._weights is not None, "load comes before sample"
        for request in requests:
            length = len(request.prompt)
            if not 1 <= length <= self.prompt_length:
                raise UserError(
                    f"a prompt of {length} tokens was asked for; this sampler takes 1 to {self.prompt_length}; "
                    "raise sampling.prompt_tokens or leave the problem out"
                )
            if length + sampling.max_tokens > self.max_length:
                raise UserError(
                    f"a prompt of {length} tokens and max_tokens = {sampling.max_tokens} exceed the {self.max_length} "
                    "cache slots of a row; lower max_tokens"
                )
        settings = Settings(
            temperature=np.array(sampling.temperature, np.float32),
            top_p=np.array(sampling.top_p, np.float32),
            top_k=np.array(sampling.top_k, np.int32),
            max_tokens=np.array(sampling.max_tokens, np.int32),
            eos_E=np.array(sorted(self.eos_ids), np.int32),
        )
        truncate = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)
        with jax.set_mesh(self.mesh):
            slots = self._empty()
        return _Batch(requests, settings, truncate, slots, deque(range(len(requests))), {})

    def _fitting(self, slots: int) -> int:
        """On a CPU no more slots than its own cache holds, but one for each device that they lie on."""
        if self.mesh.devices.flat[0].platform != "cpu":
            return slots
        cache = jax.eval_shape(lambda: self.model.init_cache(1, self._cache_length(), self.dtype))
        fit = CPU_CACHE_BYTES // sum(x.size * x.dtype.itemsize for x in (*cache.k, *cache.v))
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return min(slots, max(1, fit // shards) * shards)

    def _new_slots(self) -> Slots:
        TRACES["empty"] += 1
        B, R = self.slots, self.max_length
        return Slots(
            cache=self.model.init_cache(B, self._cache_length(), self.dtype),
            token_B=jnp.zeros(B, jnp.int32),
            count_B=jnp.zeros(B, jnp.int32),
            active_B=jnp.zeros(B, bool),
            key_B2=jnp.zeros((B, 2), jnp.uint32),
            ids_BR=jnp.zeros((B, R), jnp.int32),
            logprob_BR=jnp.zeros((B, R), jnp.float32),
        )

    def _cache_length(self) -> int:
        """Room for the longest row and, after it, for the padding of a last prompt chunk."""
        return max(self.max_length, self._window())

    def _window(self) -> int:
        return max(1, -(-(self.prompt_length - 1) // self.prefill_chunk)) * self.prefill_chunk

    def _layout(self) -> Slots:
        """The cache follows the rules; what the host reads is whole on every device, and small."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        shapes = jax.eval_shape(self._new_slots)
        cache = tree_shardings(self.mesh, self.model.cache_axes(), shapes.cache, "decode")
        return jax.tree.map(lambda _: whole, shapes)._replace(cache=cache)

    def _refill(self, batch: _Batch) -> None:
        """Gives every free slot the next waiting request, and its prompt to the cache."""
        pending: deque[tuple[int, int]] = deque()  # slot, tokens already in the cache
        for slot in range(self.slots):
            if slot not in batch.running and batch.queue:
                batch.running[slot] = batch.queue.popleft()
                pending.append((slot, 0))
        while pending:
            rows = [pending.popleft() for _ in range(min(self.prefill_rows, len(pending)))]
            chunk = self._chunk(batch, rows)
            with jax.set_mesh(self.mesh):
                batch.slots = _prefill(self._weights, batch.slots, chunk, program=self._program)
            self.stats.prefill_calls += 1
            pending.extendleft(
                (slot, start + self.prefill_chunk)
                for row, (slot, start) in reversed(list(enumerate(rows)))
                if not chunk.last_C[row]
            )

    def _chunk(self, batch: _Batch, rows: list[tuple[int, int]]) -> Chunk:
        C, T = self.prefill_rows, self.prefill_chunk
        taken = {slot for slot, _ in rows}
        spare = [slot for slot in range(self.slots) if slot not in taken]  # dummy rows: distinct slots, nothing valid
        chunk = Chunk(
            tokens_CT=np.zeros((C, T), np.int32),
            slot_C=np.array([slot for slot, _ in rows] + spare[: C - len(rows)], np.int32),
            valid_C=np.zeros(C, np.int32),
            first_C=np.zeros(C, bool),
            last_C=np.zeros(C, bool),
            token_C=np.zeros(C, np.int32),
            key_C2=np.zeros((C, 2), np.uint32),
        )
        for row, (slot, start) in enumerate(rows):
            request = batch.requests[batch.running[slot]]
            body = request.prompt[:-1][start : start + T]
            chunk.tokens_CT[row, : len(body)] = body
            chunk.valid_C[row] = len(body)
            chunk.first_C[row] = start == 0
            chunk.last_C[row] = start + T >= len(request.prompt) - 1
            chunk.token_C[row] = request.prompt[-1]
            chunk.key_C2[row] = request.key
        return chunk

    def _advance(self, batch: _Batch, limit: int) -> None:
        """Decodes until a waiting request can have a slot, all rows finished, or `limit` steps."""
        enough = np.int32(1 if batch.queue else self.slots + 1)
        with jax.set_mesh(self.mesh):
            batch.slots, steps = _decode(
                self._weights,
                batch.slots,
                batch.settings,
                np.int32(limit),
                enough,
                program=self._program,
                truncate=batch.truncate,
            )
        self.stats.decode_steps += int(steps)

    def _rows(self, batch: _Batch, slots: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Whole rows of the output buffers, fetched at one compiled shape."""
        rows = []
        for start in range(0, len(slots), self.prefill_rows):
            part = slots[start : start + self.prefill_rows]
            wanted_C = np.array(part + [0] * (self.prefill_rows - len(part)), np.int32)
            with jax.set_mesh(self.mesh):
                ids_CR, logprobs_CR = jax.device_get(_take(batch.slots, wanted_C))
            rows.extend(zip(ids_CR[: len(part)], logprobs_CR[: len(part)], strict=True))
        return rows

    def _collect(self, batch: _Batch) -> dict[int, Response]:
        """The responses that finished, by request; their slots are free afterwards."""
        active_B, count_B = jax.device_get((batch.slots.active_B, batch.slots.count_B))
        done = [slot for slot in sorted(batch.running) if not active_B[slot]]
        responses = {}
        for slot, (ids_R, logprobs_R) in zip(done, self._rows(batch, done), strict=True):
            count = int(count_B[slot])
            ids = tuple(ids_R[:count].tolist())
            ended = "stopped" if ids[-1] in self.eos_ids else "cut"
            responses[batch.running.pop(slot)] = Response(ids, tuple(logprobs_R[:count].tolist()), ended)
            self.stats.tokens += count
            self.stats.responses += 1
        return responses
