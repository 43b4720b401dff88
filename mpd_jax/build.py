"""RunConfig into live objects.

1. mesh   2. model files, tokenizers, and whether they fit together   3. problems   4. whether sizes fit
5. how the run starts: resume its checkpoint, else the Hugging Face weights   6. samplers   7. the recipe's callables
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from mpd_jax import __version__, hosts, trees
from mpd_jax.batches import batch_to_train_on, exchanged
from mpd_jax.config import RunConfig
from mpd_jax.data.contexts import Contexts
from mpd_jax.data.order import ProblemSet
from mpd_jax.data.problems import ProblemsConfig, Split, read, refuse_overlap
from mpd_jax.data.store import Problems, longest
from mpd_jax.eval.grade import GraderPool
from mpd_jax.files import AnyPath, Lines
from mpd_jax.named import source
from mpd_jax.recipe import keep, target, write
from mpd_jax.recipe.loss import fused_divergence
from mpd_jax.recipe.recipe import Recipe
from mpd_jax.roles import ModelFiles, Roles, open_model, open_roles
from mpd_jax.rollouts import Progress, recipe_parts, share_right
from mpd_jax.samplers import load_frozen, make_samplers, served_elsewhere
from mpd_jax.sampling.agreement import Agreement
from mpd_jax.sampling.probe import PROMPTS
from mpd_jax.sampling.sampler import Sampler
from mpd_jax.sampling.vllm_client import Push, VLLMSampler
from mpd_jax.sampling.weight_push import WeightPush
from mpd_jax.scoring import scoring
from mpd_jax.serving import Secrets, Serving, unproved
from mpd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from mpd_jax.train import trackers
from mpd_jax.train.checkpoint import Checkpoints, Which
from mpd_jax.train.loop import Parts
from mpd_jax.train.metrics import Clock, Metrics, PhaseLog, Row
from mpd_jax.train.records import Records
from mpd_jax.train.state import (
    NEW_MEMORY,
    RunState,
    Trained,
    init_opt_state,
    new_state,
    optimiser,
    trained_shardings,
)
from mpd_jax.train.step import Divergence, Out, Update, make_update
from mpd_jax.types import Batch, Problem, UserError

TINY_TRAINING, TINY_HELDOUT = 20_000, 2_000

Say = Callable[[str], None]


def tiny_contexts() -> dict[str, str]:
    """The wordings that the shipped models were trained on."""
    from mpd_jax.tiny_world.corpus import CONTEXTS

    return {field.name: CONTEXTS[field.name] for field in dataclasses.fields(Contexts)}


def read_problems(config: ProblemsConfig, split: Split, say: Say = lambda message: None) -> Sequence[Problem]:
    """The problems of `problems.train` or `problems.heldout`. say: is told what was read, and what was left out."""
    if getattr(config, split) == "tiny" and "tiny" not in config.sources:
        return _tiny(split)
    problems = read(config, split, partial(_tiny, split), say)
    for line in problems.report:
        say(line)
    return problems


def read_set(name: str, directory: str = "data", say: Say = lambda message: None) -> Sequence[Problem]:
    """All problems of a set to evaluate on: a ready name, tiny, a path, or whatever else `problems.heldout` takes.

    directory: where files of ready names are looked for, each set in a directory of its name.
    """
    return read_problems(ProblemsConfig(heldout=name, directory=directory), "heldout", say)


def _tiny(split: Split) -> tuple[Problem, ...]:
    from mpd_jax.tiny_world import generator

    if split == "train":
        return tuple(generator.train_problems(TINY_TRAINING, seed=0))
    return tuple(generator.heldout_problems(TINY_HELDOUT, seed=0))


@dataclass(frozen=True)
class Run:
    """A run, ready to train and to be evaluated.

    load_student: gives the student, of what trains and its version, to every sampler that serves it. forget: removes
    responses of servers that wait to be stored.
    """

    config: RunConfig
    mesh: Mesh
    student: ModelFiles
    heldout: Sequence[Problem]
    student_sampler: Sampler
    load_student: Callable[[Any, int], None]
    parts: Parts
    forget: Callable[[], None]
    close: Callable[[], None]


def require_what_is_read(recipe: Recipe, problems: Sequence[Problem]) -> None:
    """A problem that lacks what the recipe reads is told before anything was sampled."""
    graded = set(keep.GRADED).intersection(recipe.rewrite.keep) or recipe.rewrite.how == "earliest_correct_prefix"
    privileged, worked = recipe.target.context == "privileged", recipe.write.by == "dataset"
    if not (graded or privileged or worked):
        return
    for problem in problems:
        if graded:
            keep.reference(problem)
        if privileged and problem.answer is None and problem.response is None:
            raise UserError(
                f"recipe.target.context: privileged shows a solution, and problem {problem.id!r} has neither response "
                "nor answer; name their columns in problems.columns, or choose another context"
            )
        if worked:
            write.worked_response(problem)


def check_lengths(config: RunConfig, roles: Roles) -> None:
    """Of step 4 what no problem is needed for."""
    reading = [files for files in (roles.student, roles.target(config.recipe)) if files]
    for files in reading:
        window = files.model.config.max_position_embeddings
        if config.train.max_length > window:
            raise UserError(
                f"train.max_length: {config.train.max_length} tokens exceed the window of {window} of the "
                f"{files.key}; lower it"
            )
    if config.train.max_length <= config.sampling.prompt_tokens:
        raise UserError(
            f"train.max_length: {config.train.max_length} tokens of prompt and response leave no room for a response "
            f"beside sampling.prompt_tokens = {config.sampling.prompt_tokens}; raise train.max_length"
        )


def check_sizes(config: RunConfig, roles: Roles, *problems: Sequence[Problem]) -> None:
    """Step 4: what would otherwise fail in the middle of a run."""
    check_lengths(config, roles)
    # A prompt's tokens grow with its characters; rendering every problem of a large set would take minutes.
    for problem in (problem for part in problems for problem in longest(part, 256)):
        length = len(roles.student.chat.prompt("plain", problem))
        if length > config.sampling.prompt_tokens:
            raise UserError(
                f"sampling.prompt_tokens: problem {problem.id!r} makes a prompt of {length} tokens, more than "
                f"{config.sampling.prompt_tokens}; raise it or leave the problem out"
            )


def _push(
    config: RunConfig,
    mesh: Mesh,
    whole: Callable[[Any], Any],
    run_dir: AnyPath,
    training: Sequence[Problem],
    stack: ExitStack,
    say: Say,
    distrust: Callable[[int], None],
    held: ModelFiles,
    key: str | None,
) -> Push:
    """What brings the student to its servers, or proves that those of another model hold it, on prompts of the run.
    Each push is a line on disk."""
    samples = [held.chat.prompt("plain", problem) for problem in training[:PROMPTS]]
    server, seed = config.sampling.server, config.run.seed
    if held.key != "student":
        return Agreement(held, mesh, samples, server=server, key=key, seed=seed, say=say)
    lines = stack.enter_context(closing(Lines(run_dir / "pushes.jsonl")))
    return WeightPush(
        held,
        whole,
        mesh,
        run_dir,
        samples,
        server=server,
        key=key,
        config=config.sampling.push,
        seed=seed,
        say=say,
        note=lambda report: lines.add(json.dumps(dataclasses.asdict(report))),
        distrust=distrust,
    )


def build(
    config: RunConfig,
    run_dir: AnyPath,
    live: Callable[[Row], None],
    say: Say,
    progress: Progress,
    secrets: Secrets = lambda name: None,
    roles: Roles | None = None,
) -> tuple[Run, RunState]:
    """Everything a run needs, in the order of the module's list. roles: if they are open already."""
    hosts.from_main(lambda: trackers.require(config.train.trackers, secrets))  # they are its alone
    mesh = make_mesh(config.mesh)
    roles = roles or open_roles(config)
    hosts.check()  # here and below: between steps that take minutes where models are large
    training, heldout = (read_problems(config.problems, split, say) for split in ("train", "heldout"))
    refuse_overlap(training, heldout)
    require_what_is_read(config.recipe, training)
    check_sizes(config, roles, training, heldout[: config.eval.problems])
    dealt = ProblemSet(training, config.run.seed, config.train.batch_size)
    if len(dealt.shares) > 1:
        say(f"problems.train: of each step {', '.join(f'{name} {part:.1%}' for name, part in dealt.shares.items())}")
    hosts.require_same(
        "the config, its functions, the problems or the version of mpd-jax", _digest(config, training, heldout)
    )
    for key, fingerprint in roles.fingerprints(config.recipe).items():
        hosts.require_same(f"{key}: a file of the model", fingerprint)
    hosts.check()

    settings = _fingerprint(config)
    student = roles.student
    with ExitStack() as stack:
        phases = PhaseLog(run_dir / "phase.log")
        stack.callback(phases.close)
        checkpoints = Checkpoints(
            run_dir,
            config.train.keep,
            lambda step: phases(step - 1, "saved"),
            keep_best=config.train.keep_best,
            due_every=config.train.save_every if config.guards.strict else None,
            say=say,
        )
        stack.callback(checkpoints.close)
        start = partial(_start, config, student, mesh, checkpoints, run_dir, say)
        state = start()
        hosts.check()
        base = student.base(mesh)
        hosts.check()
        whole = partial(student.trains.over, base)
        named = trackers.make(config.train.trackers, run_dir, trees.flat(dataclasses.asdict(config)), secrets)
        tracking = trackers.Trackers(named if hosts.is_main() else {}, say)
        metrics, clock = Metrics(run_dir, state.step, live, tracking), Clock(phases)
        stack.callback(metrics.close)
        stack.callback(clock.close)
        records = Records(run_dir, config.run.seed, settings, keep=config.train.keep_trajectories)

        def distrust(version: int) -> None:
            """What was sampled with later versions is sampled again."""
            if version >= 0:
                records.forget_after(version)
            serving.forget()

        push = partial(_push, config, mesh, whole, run_dir, training, stack, say, distrust)
        serving = Serving(config, run_dir, settings, secrets=secrets, say=say, progress=progress, push=push)
        score = scoring(config, roles, serving.servers, progress)
        teacher = roles.teacher_here(config.recipe)
        teacher_weights = teacher.weights(mesh) if teacher else None
        hosts.check()
        samplers = make_samplers(config, roles, mesh, whole, serving.sampler)
        load_frozen(samplers, roles, mesh, teacher_weights)
        for held in served_elsewhere(roles, teacher_weights):
            say(unproved(held))
        hosts.check()
        graders = stack.enter_context(GraderPool(config.recipe.rewrite.grader, workers=1))
        recipe = recipe_parts(config, roles, samplers, graders, progress)
        target_files, update = roles.target(config.recipe), update_of(config, roles, mesh)
        parts = Parts(
            run_dir=run_dir,
            steps=config.train.steps,
            save_every=config.train.save_every,
            eval_every=config.eval.every,
            problems=dealt,
            write=recipe.write,
            rewrite=recipe.rewrite,
            to_batch=partial(batch_to_train_on, config, mesh, roles),
            update=_update(config, update, base, whole),
            load_student=samplers.load_student if samplers.follows else lambda weights, version: None,
            checkpoints=checkpoints,
            records=records,
            metrics=metrics,
            clock=clock,
            score=score,
            teacher_weights=teacher_weights if target_files is roles.teacher else None,
            refresh=partial(target.refresh, config.recipe.target),
            profile_steps=config.train.profile_steps,
            lookahead=config.sampling.lookahead,
            max_age=config.recipe.rewrite.max_age,
            grade=partial(share_right, chat=student.chat),
            traces=lambda: update.traces,
            guards=config.guards if config.guards.bands else None,
            curriculum=config.sampling.curriculum,
            start=start,
            leaving=samplers.student.forget_after if isinstance(samplers.student, VLLMSampler) else None,
            say=say,
        )
        close = stack.pop_all().close
    return Run(
        config, mesh, student, heldout, samplers.student, samplers.load_student, parts, serving.forget, close
    ), state


def update_of(config: RunConfig, roles: Roles, mesh: Mesh, divergence: Divergence = fused_divergence) -> Update:
    """The update of the run, jitted; it compiles for weights and batches that are only shapes, too."""
    target_files, vocab = roles.target_here(config.recipe), roles.student.chat.vocab_size
    return make_update(
        roles.student.trains,
        target_files.model if target_files else None,
        config.recipe.loss,
        optimiser(config.train),
        mesh,
        vocab_size=vocab,
        micro_batches=config.train.micro_batches,
        exchanged=exchanged(config, roles),
        stop_ids=sorted(id for id in roles.student.eos_ids if id < vocab),
        divergence=divergence,
    )


def _start(
    config: RunConfig, student: ModelFiles, mesh: Mesh, checkpoints: Checkpoints, run_dir: AnyPath, say: Say
) -> RunState:
    """Step 5. What a checkpoint holds is not loaded from elsewhere first: the run would be in memory twice."""
    state = checkpoints.restore(abstract_state(config, student, mesh))
    if state is not None:
        say(f"resuming {run_dir} after step {state.step}")
        return state
    adapter = f" and the adapter in {student.adapter}" if student.adapter else " and a new adapter"
    say(f"starting from the weights in {student.directory}{adapter if student.adapted else ''}")
    trained = student.start(mesh, config.run.seed)
    copy = target.start(config.recipe.target, trained, None) if _keeps_copy(config, student) else None
    fresh = new_state(student.trains, optimiser(config.train), mesh, trained, seed=config.run.seed, self_weights=copy)
    return fresh._replace(memory={**fresh.memory, **checkpoints.memory_at(0)})


def _keeps_copy(config: RunConfig, student: ModelFiles) -> bool:
    new_adapter = student.adapted is not None and student.adapter is None
    return target.keeps_copy(config.recipe.target, adapter_starts_at_zero=new_adapter)


def _update(
    config: RunConfig, update: Update, base: Any, whole: Callable[[Any], Any]
) -> Callable[[Trained, Any, Batch, float], tuple[Trained, Out]]:
    """The jitted update, given what no step changes. A self target without a copy is the student's base."""

    def step(trained: Trained, target_weights: Any, batch: Batch, scale: float) -> tuple[Trained, Out]:
        read = whole(target_weights) if config.recipe.target.is_self else target_weights
        return update(trained, read, batch, base, scale)

    return step


def _digest(config: RunConfig, *problems: Sequence[Problem]) -> str:
    """A hash of what every process has to have read alike."""
    digest = hashlib.blake2b(repr((__version__, jax.__version__, config)).encode(), digest_size=16)
    for name in (config.recipe.loss.token_weight, *config.recipe.rewrite.keep):
        digest.update(source(name))
    for split in problems:
        for line in [split.digest] if isinstance(split, Problems) else map(repr, split):
            digest.update(line.encode())
    return digest.hexdigest()


def _fingerprint(config: RunConfig) -> str:
    """A hash of whatever a step's trajectories depend on; records made under another are made again."""
    free = (
        "run.dir",
        "run.compile_cache",
        "guards",
        "eval",
        "mesh",
        "problems.directory",
        "problems.tfds",
        "sampling.slots",
        "sampling.prefill_chunk",
        "sampling.prefill_rows",
        "sampling.lookahead",
        *(f"sampling.server.{how}" for how in ("concurrency", "score_tokens", "timeout_s", "patience_s", "key")),
        *(f"sampling.push.{how}" for how in ("way", "directory", "seen_as", "restart", "timeout_s")),
        *(f"{model}.{how}" for model in ("student", "teacher", "rewriter") for how in ("remat", "attention", "serve")),
        "train.micro_batches",
        "train.row_length",
        "train.save_every",
        "train.keep",
        "train.keep_best",
        "train.keep_trajectories",
        "train.trackers",
        "train.profile_steps",
        *(["train.steps"] if config.steps_are_free else []),
    )
    flat = trees.flat(dataclasses.asdict(config))
    text = json.dumps({key: value for key, value in flat.items() if not trees.under(key, free)}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def abstract_weights(files: ModelFiles, mesh: Mesh) -> Any:
    """Shapes, dtypes and places of a frozen model's weights, as `ModelFiles.weights` loads them."""
    shapes = files.model.abstract()
    places = tree_shardings(mesh, files.model.logical_axes(), shapes, "train")
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, files.param_dtype, sharding=place), shapes, places
    )


def abstract_state(config: RunConfig, student: ModelFiles, mesh: Mesh) -> RunState:
    """Shapes, dtypes and places of the run's state: what a checkpoint is restored into."""
    model, tx = student.trains, optimiser(config.train)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, student.trained_dtype), model.abstract())
    shapes = Trained(weights, jax.eval_shape(partial(init_opt_state, tx), weights))
    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        trained_shardings(model, tx, mesh),
    )
    self_weights = placed.weights if _keeps_copy(config, student) else None
    return RunState(placed.weights, placed.opt_state, self_weights, 0, config.run.seed, dict(NEW_MEMORY))


@dataclass(frozen=True)
class Restored:
    """The student of a run after `step` updates. base: what stays as it is; trained: all the rest."""

    files: ModelFiles
    mesh: Mesh
    seed: int
    step: int
    base: Any
    trained: Any

    def before(self) -> Any:
        """The whole weights before the first update."""
        return self.files.trains.over(self.base, self.files.start(self.mesh, self.seed))

    def after(self) -> Any:
        """The whole weights now."""
        return self.files.trains.over(self.base, self.trained)


def restored_student(config: RunConfig, run_dir: AnyPath, which: Which | None = None) -> Restored:
    """The student of a run at a checkpoint, the newest unless `which` names another, on whatever devices are here.
    Changes nothing in the run."""
    try:
        mesh = make_mesh(config.mesh)
    except UserError:  # it was trained on other devices than are here
        mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    files = open_model("student", config.student, config.recipe.contexts)
    checkpoints = Checkpoints(run_dir, config.train.keep, keep_best=config.train.keep_best, read_only=True)
    like = abstract_state(config, files, mesh)
    try:
        state = checkpoints.restore(like) if which is None else checkpoints.restore_one(like, which)
    finally:
        checkpoints.close()
    if state is None:
        raise UserError(f"{run_dir}: it holds no checkpoint yet; run `mpd-jax train {run_dir}/config.yaml` first")
    return Restored(files, mesh, config.run.seed, state.step, files.base(mesh), state.weights)
