"""The phases of a run on a mesh that need not be here: each with its programs and all that is resident meanwhile.

Arrays are shapes with places; the programs are the run's own (build.py, train/step.py, the sampler), lowered for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mpd_jax import build
from mpd_jax.batches import batch_of
from mpd_jax.config import RunConfig
from mpd_jax.data.batching import after
from mpd_jax.models.decoder import Model
from mpd_jax.plan import flops
from mpd_jax.plan.chips import local_bytes, shards
from mpd_jax.plan.flops import Flops
from mpd_jax.roles import ModelFiles, Roles
from mpd_jax.samplers import Samplers, make_samplers
from mpd_jax.sampling.jax_sampler import JaxSampler, Settings, _decode, _prefill
from mpd_jax.sampling.sampler import SamplingConfig
from mpd_jax.sharding import batch_sharding
from mpd_jax.train.state import RunState, Trained
from mpd_jax.types import Batch, Problem, TopK, Trajectory

Parts = dict[str, Any]  # name -> tree of abstract arrays
ELSEWHERE: Any = object()  # in a sampler's place: the model answers from servers, and costs the mesh nothing


@dataclass(frozen=True)
class Program:
    """A compiled program of a phase, run `times` in a step. read: bytes of HBM a chip reads and writes each time.

    arguments: trees of abstract arrays, those that live on beside the program under the names they have there.
    """

    lower: Callable[[], Any]
    arguments: Parts
    times: float
    flops: Flops
    read: float


@dataclass(frozen=True)
class Phase:
    """kind: rollout, rewrite, evaluation, hand over, train, resume: what the remedies go by."""

    name: str
    kind: str
    resident: Parts
    program: Program | None = None
    model: Model | None = None  # that samples or trains
    target: Model | None = None
    tokens: float = 0.0  # response tokens that the phase makes or trains on in a step
    notes: tuple[str, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Live:
    """What a run holds from its first step to its last."""

    state: RunState
    base: Any  # the student's frozen weights, None where all train
    target: Any  # weights the update reads beside the state's
    parts: Parts
    decode: dict[str, Any]  # decode copies by role


def live(config: RunConfig, roles: Roles, mesh: Mesh, samplers: Samplers) -> Live:
    recipe, state = config.recipe, build.abstract_state(config, roles.student, mesh)
    here = roles.teacher_here(recipe)
    teacher = build.abstract_weights(here, mesh) if here else None
    base = build.abstract_weights(roles.student, mesh) if roles.student.adapted else None
    decode = {}
    if isinstance(samplers.student, JaxSampler):
        decode["student"] = decode_copy(samplers.student, _whole(base, state.weights))
    for name, sampler in (("writer", samplers.writer), ("rewriter", samplers.rewriter)):
        if not isinstance(sampler, JaxSampler) or sampler is samplers.student:
            continue
        files = roles.teacher if name == "writer" else roles.rewriter
        assert files is not None
        shared = [n for n, held in (("student", roles.student), ("writer", roles.teacher)) if files is held]
        source = next((n for n in shared if n in decode), None)
        if source:
            decode[name] = decode[source]
        else:
            weights = teacher if files is roles.teacher else build.abstract_weights(files, mesh)
            decode[name] = decode_copy(sampler, weights)
    copies = list({id(tree): tree for tree in decode.values()}.values())
    parts: Parts = {"weights": (state.weights, base), "optimiser": state.opt_state}
    if state.self_weights is not None:
        parts["self copy"] = state.self_weights
    if teacher is not None:
        parts["teacher"] = teacher
    if copies:
        parts["decode copies"] = copies
    target = _whole(base, state.self_weights) if recipe.target.is_self else teacher
    return Live(state, base, target if roles.target_here(recipe) else None, parts, decode)


def _whole(base: Any, trained: Any) -> Any:
    """Shapes of what `over` makes of weights: an adapter beside those that it adapts, or without one those alone."""
    if base is None or trained is None:
        return trained if base is None else base
    return {**base, "adapter": trained}


def phases(config: RunConfig, roles: Roles, mesh: Mesh, *, elsewhere: bool = False) -> list[Phase]:
    """Every phase of a step, of its evaluation and of its start, at the longest lengths that the config allows.

    elsewhere: the mesh's devices stand for others, whose slots no CPU's cache limits.
    """
    samplers = make_samplers(config, roles, mesh, lambda trained: trained, lambda *_: ELSEWHERE)
    if elsewhere:
        for sampler in (samplers.student, samplers.writer, samplers.rewriter):
            if isinstance(sampler, JaxSampler):
                sampler.slots = config.sampling.slots
    held = live(config, roles, mesh, samplers)
    rows = config.train.batch_size * config.recipe.write.attempts
    sampling, prompt = config.sampling, config.sampling.prompt_tokens
    found = []
    if isinstance(samplers.writer, JaxSampler):
        role = "student" if samplers.writer is samplers.student else "writer"
        job = _Job(samplers.writer, role, rows, prompt, sampling.writer.max_tokens, sampling.writer)
        found += _sampled("rollout", job, held, mesh)
    if samplers.writer is not samplers.student and isinstance(samplers.student, JaxSampler):
        asked = config.eval.problems * config.eval.attempts
        drawn = SamplingConfig(max(config.eval.temperatures), config.eval.top_p, config.eval.top_k)
        job = _Job(samplers.student, "student", asked, prompt, config.eval.max_tokens, drawn)
        found += _sampled("evaluation", job, held, mesh)
    if isinstance(samplers.rewriter, JaxSampler):
        room = samplers.rewriter.max_length - sampling.rewriter.max_tokens
        job = _Job(samplers.rewriter, "rewriter", rows, room, sampling.rewriter.max_tokens, sampling.rewriter)
        found += _sampled("rewrite", job, held, mesh)
    update = build.update_of(config, roles, mesh)
    for name, response in trained_lengths(config):
        found.append(_train(name, config, roles, mesh, held, update, response))
    if isinstance(samplers.student, JaxSampler):
        found.append(_hand_over(samplers.student, held, mesh))
    resumed = {k: v for k, v in held.parts.items() if k in ("weights", "optimiser", "self copy")}
    note = "a checkpoint is restored in place, before teacher and samplers"
    return [*found, Phase("resume", "resume", resumed, notes=(note,))]


def trained_lengths(config: RunConfig) -> list[tuple[str, int]]:
    """Names of the trained batches, and the longest response in each: rewrites, and traces as they were written."""
    recipe, room = config.recipe, config.train.max_length - config.sampling.prompt_tokens
    written = room if recipe.write.by == "dataset" else min(config.sampling.writer.max_tokens, room)
    rewritten = min(config.sampling.rewriter.max_tokens, room)
    match recipe.rewrite.how:
        case "nobody":
            return [("train", written)]
        case "truncate" | "earliest_correct_prefix":
            return [("train on cut traces", written)]
        case _:
            raw = [("train on raw traces", written)] if recipe.rewrite.fallback == "original" else []
            return [("train", rewritten), *raw]


def longest_batch(
    config: RunConfig, roles: Roles, mesh: Mesh, response: int, ids: Callable[[int], Sequence[int]] = lambda n: (1,) * n
) -> Batch:
    """The batch of a step whose every prompt and response is as long as can be. ids: gives that many token ids."""
    rows, prompt = config.train.batch_size * config.recipe.write.attempts, config.sampling.prompt_tokens
    problems = [Problem(str(row), "") for row in range(rows)]
    say = np.zeros((response, config.recipe.target.top_k), np.int32)
    top = TopK(say, say.astype(np.float32))
    written = []
    for problem in problems:
        asked, said = tuple(ids(prompt)), tuple(ids(response))
        ended = "stopped" if said[-1] in roles.student.eos_ids else "cut"
        written.append(Trajectory(problem.id, 0, asked, said, "student", 0, ended, target=top))
    target = roles.target(config.recipe)
    others = config.recipe.target.context not in ("plain", "concise")  # prompts that hold a text of any length
    read = max(prompt, config.train.max_length - response if others else 0)
    reads = (lambda t: after((*t.prompt, *ids(read - prompt)), t.response)) if target else None
    batch, report = batch_of(config, mesh, roles.student, target, problems, written, reads)
    assert report.trajectories == rows, f"{report.trajectories} of {rows} responses of {response} tokens have a place"
    return batch


def _train(name: str, config: RunConfig, roles: Roles, mesh: Mesh, held: Live, update: Any, response: int) -> Phase:
    student, target = roles.student.model.on(mesh), roles.target_here(config.recipe)
    place = batch_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), longest_batch(config, roles, mesh, response)
    )
    rows, length = batch.student_tokens_BT.shape
    trained = Trained(held.state.weights, held.state.opt_state)
    sizes = {"student_length": length, "target_length": batch.target_tokens_BT.shape[1]}
    room = batch.response_BR.shape[1]
    operations = flops.train_step(
        roles.student.trains.on(mesh),
        target.model.on(mesh) if target else None,
        rows=rows,
        response=room,
        weighed=config.recipe.loss.token_weight != "none",
        **sizes,
    )
    arguments: Parts = {"weights": held.parts["weights"], "optimiser": trained.opt_state, "batch": batch}
    if target is not None:
        part = "self copy" if config.recipe.target.is_self else "teacher"
        arguments |= {part: held.parts[part]} if part in held.parts else {}
    return Phase(
        name,
        "train",
        held.parts,
        Program(
            lambda: update.lower(trained, held.target, batch, held.base),
            arguments,
            1,
            operations,
            _train_traffic(config, roles.student, target, mesh, batch, held),
        ),
        student,
        target.model.on(mesh) if target else None,
        tokens=config.train.batch_size * config.recipe.write.attempts * response,
        sizes={"rows": rows, "pieces": config.train.micro_batches, "response": response, **sizes},
    )


def _train_traffic(
    config: RunConfig, student: ModelFiles, target: ModelFiles | None, mesh: Mesh, batch: Batch, held: Live
) -> float:
    """HBM bytes a chip at the least: gathered weights once a pass, what the backward pass keeps, the optimiser."""

    def gathered(files: ModelFiles) -> float:
        width = np.dtype("float32" if files.model.dtype == "float32" else "uint16").itemsize
        return width * sum(x.size for x in jax.tree.leaves(files.model.abstract())) / mesh.shape["tensor"]

    passes = 2 + (student.model.remat == "full")
    once = gathered(student) * passes + (gathered(target) if target else 0)
    rows, length = batch.student_tokens_BT.shape
    width = 4 if student.model.dtype == "float32" else 2
    kept = (
        rows
        / shards(mesh)
        * length
        / mesh.shape["tensor"]
        * student.model.config.hidden_size
        * student.model.config.num_layers
        * width
    )
    states = local_bytes(held.state.weights) * 2 + local_bytes((held.state.weights, held.state.opt_state)) * 2
    return once * config.train.micro_batches + 2 * kept + states


# The sampler: the one place that knows its programs.


def decode_copy(sampler: JaxSampler, weights: Any) -> Any:
    """What `JaxSampler.load` makes of weights: shapes and places."""
    with jax.set_mesh(sampler.mesh):
        return sampler._reshard.eval_shape(weights)


def empty_slots(sampler: JaxSampler) -> Any:
    """The device state of a sampler while it samples."""
    with jax.set_mesh(sampler.mesh):
        return sampler._empty.eval_shape()


def lower_prefill(sampler: JaxSampler, weights: Any, slots: Any) -> Any:
    chunk = sampler._chunk(None, [])  # type: ignore[arg-type] - no row of a batch is asked for
    with jax.set_mesh(sampler.mesh):
        return _prefill.lower(weights, slots, chunk, program=sampler._program)


def lower_decode(sampler: JaxSampler, weights: Any, slots: Any, truncate: bool) -> Any:
    number, count = np.float32(1), np.int32(1)
    settings = Settings(*map(np.asarray, (number, number, count, count, np.zeros(len(sampler.eos_ids), np.int32))))
    with jax.set_mesh(sampler.mesh):
        return _decode.lower(weights, slots, settings, count, count, program=sampler._program, truncate=truncate)


@dataclass(frozen=True)
class _Job:
    """`rows` responses of `response` tokens to prompts of `prompt`, all as long as can be."""

    sampler: JaxSampler
    role: str
    rows: int
    prompt: int
    response: int
    sampling: Any


def _sampled(kind: str, job: _Job, held: Live, mesh: Mesh) -> list[Phase]:
    """Prefill and decode. Slots are made for a call of `sample` and gone after it."""
    sampler, weights, slots = job.sampler, held.decode[job.role], empty_slots(job.sampler)
    model = sampler.model
    cache, window = slots.cache.v[0].shape[2], sampler._window()
    parts: Parts = {"cache": slots.cache, "slots": slots._replace(cache=())}
    given: Parts = {"decode copies": weights, **parts}
    read = local_bytes(weights) + local_bytes(slots.cache)
    chunks = -(-max(job.prompt - 1, 1) // sampler.prefill_chunk)
    truncate = job.sampling.temperature > 0 and (job.sampling.top_p < 1 or job.sampling.top_k > 0)
    prefill = Program(
        lambda: lower_prefill(sampler, weights, slots),
        given,
        chunks * -(-job.rows // sampler.prefill_rows),
        flops.cached(model, sampler.prefill_rows, sampler.prefill_chunk, job.prompt // 2, window, head=False),
        read,
    )
    decode = Program(
        lambda: lower_decode(sampler, weights, slots, truncate),
        given,
        -(-job.rows // sampler.slots) * job.response,
        flops.cached(model, min(sampler.slots, job.rows), 1, job.prompt + job.response // 2, cache, head=True),
        read,
    )
    sizes = {"slots": sampler.slots, "cache": cache, "chunk": sampler.prefill_chunk, "role": job.role}
    resident = held.parts | parts
    return [
        Phase(f"{kind} prefill", kind, resident, prefill, model, sizes=sizes),
        Phase(f"{kind} decode", kind, resident, decode, model, tokens=job.rows * job.response, sizes=sizes),
    ]


def _hand_over(sampler: JaxSampler, held: Live, mesh: Mesh) -> Phase:
    """The student's new decode copy beside the one before it."""

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return sampler._reshard.lower(_whole(held.base, held.state.weights))

    copied = local_bytes(held.parts["weights"]) + local_bytes(held.decode["student"])
    program = Program(lower, {"weights": held.parts["weights"]}, 1, Flops(), copied)
    return Phase(
        "hand over",
        "hand over",
        held.parts,
        program,
        sampler.model,
        notes=("the new decode copy beside the one before",),
    )
