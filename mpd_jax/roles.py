"""The models of a run by the parts they play: their files, whether they fit together, and their samplers.

Not here: weights that train (train/state.py), and what a recipe makes of the roles (rollouts.py).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpd_jax.config import RunConfig
from mpd_jax.data.chat import Chat, require_same_prompts, require_same_vocabulary
from mpd_jax.data.contexts import Contexts
from mpd_jax.models.config import ModelConfig, ModelSpec
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import eos_ids, load_config, load_weights
from mpd_jax.models.locate import fingerprint, locate
from mpd_jax.models.lora import Adapted, StudentSpec
from mpd_jax.models.peft import load_adapter
from mpd_jax.recipe.recipe import Recipe
from mpd_jax.sampling.jax_sampler import JaxSampler
from mpd_jax.types import UserError

log = logging.getLogger(__name__)

TINY = Path(__file__).parent / "tiny_world"


@dataclass(frozen=True)
class ModelFiles:
    """A model's directory and what is read from it without its weights.

    adapted: what trains, if that is an adapter. adapter: the directory that it starts from, if it is not a new one.
    serve: addresses of the servers that hold the model; none: it answers on the mesh.
    """

    key: str
    directory: Path
    model: Model
    chat: Chat
    eos_ids: frozenset[int]
    param_dtype: str
    adapted: Adapted | None = None
    adapter: Path | None = None
    serve: tuple[str, ...] = ()

    @property
    def trains(self) -> Model | Adapted:
        return self.adapted or self.model

    @property
    def trained_dtype(self) -> str:
        return "float32" if self.adapted else self.param_dtype

    def weights(self, mesh: Mesh) -> Any:
        """The directory's weights."""
        return load_weights(self.directory, self.model, mesh, self.param_dtype)

    def base(self, mesh: Mesh) -> Any:
        """The weights that stay as they are; None where all train."""
        return self.weights(mesh) if self.adapted else None

    def start(self, mesh: Mesh, seed: int) -> Any:
        """What trains, before the first update."""
        if self.adapted is None:
            return self.weights(mesh)
        if self.adapter is not None:
            return load_adapter(self.adapter, self.adapted, mesh)
        return jax.jit(self.adapted.init, out_shardings=self.adapted.shardings(mesh))(jax.random.key(seed))


def open_model(key: str, spec: ModelSpec, contexts: Contexts, weights: bool = True) -> ModelFiles:
    """The files of a config section `key` (student, teacher, rewriter). Errors name the section. weights: whether a
    model that is elsewhere is fetched with its weights."""
    kind, _, name = spec.path.partition(":")
    if kind == "tiny" and name not in ("student", "teacher"):
        raise UserError(
            f"{key}.path: {spec.path!r} is not allowed; tiny:student and tiny:teacher ship with the package"
        )
    try:
        directory = TINY / name if kind == "tiny" else locate(spec.path, spec.revision, weights)
        stops = eos_ids(directory)
        model = described(load_config(directory), spec)
        chat = Chat(directory, stops, spec.thinking, contexts)
    except UserError as error:
        raise UserError(f"{key}.path: {error}") from None
    if chat.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{key}.path: {spec.path} has a tokenizer of {chat.vocab_size} ids for a model of "
            f"{model.config.vocab_size}; the directory mixes two models' files"
        )
    if not isinstance(spec, StudentSpec) or spec.lora is None:
        return ModelFiles(key, directory, model, chat, stops, spec.param_dtype, serve=spec.servers)
    if spec.lora.rank > model.config.hidden_size:
        raise UserError(
            f"{key}.lora.rank = {spec.lora.rank} is not allowed: it exceeds the model's width of "
            f"{model.config.hidden_size}, and so the rank of any update; lower it"
        )
    adapter = Path(spec.adapter).expanduser() if spec.adapter else None
    adapted = Adapted(model, spec.lora)
    return ModelFiles(key, directory, model, chat, stops, spec.param_dtype, adapted, adapter, spec.servers)


def described(config: ModelConfig, spec: ModelSpec) -> Model:
    """The model of this shape as a config section asks for it."""
    return Model(config, spec.dtype, spec.remat, spec.attention)


@dataclass(frozen=True)
class Roles:
    """The models of a run by role; the same object where one model plays several. None: nobody needs it."""

    student: ModelFiles
    teacher: ModelFiles | None
    rewriter: ModelFiles | None

    def target(self, recipe: Recipe) -> ModelFiles | None:
        """The files whose model reads as the target."""
        if recipe.target.weights == "none":
            return None
        return self.teacher if recipe.target.weights == "teacher" else self.student

    def target_here(self, recipe: Recipe) -> ModelFiles | None:
        """The target, if it is read on the mesh."""
        return None if recipe.target.top_k else self.target(recipe)

    def teacher_here(self, recipe: Recipe) -> ModelFiles | None:
        """The teacher, if its weights are needed on the mesh: to be read as the target, or to answer unserved."""
        read = self.target_here(recipe) is self.teacher
        return self.teacher if self.teacher and (read or not self.teacher.serve) else None

    def readers(self, recipe: Recipe) -> list[tuple[str, ModelFiles, str]]:
        """Who reads a prompt, as (role, files, context)."""
        found = [("student", self.student, "plain")]
        if recipe.write.by == "teacher" and self.teacher:
            found.append(("writer", self.teacher, "plain"))
        if (target := self.target(recipe)) is not None:
            context = recipe.rewrite.how if recipe.target.context == "rewrite" else recipe.target.context
            found.append(("target", target, context))
        if self.rewriter is not None:
            found.append(("rewriter", self.rewriter, recipe.rewrite.how))
        return found

    def fingerprints(self, recipe: Recipe) -> dict[str, str]:
        """By config key a hash of the model's files that are read here; of weights that only its servers hold, none."""
        found = {}
        for files in (files for files in (self.student, self.teacher, self.rewriter) if files):
            weights = files is self.student or files is self.teacher_here(recipe) or not files.serve
            found[files.key] = fingerprint(files.directory, weights)
            if files.adapter is not None:
                found[f"{files.key}.adapter"] = fingerprint(files.adapter, weights)
        return found


def assign_roles(config: RunConfig, open_model: Callable[[str, ModelSpec, Contexts], ModelFiles]) -> Roles:
    """Which models the recipe needs and what each of them does, opened by `open_model`."""
    recipe = config.recipe
    contexts = recipe.contexts
    student = open_model("student", config.student, contexts)
    teacher, rewrites = None, recipe.rewrite.by_model
    teacher_rewrites = rewrites and recipe.rewrite.by == "teacher" and config.rewriter is None
    if config.teacher and (recipe.write.by == "teacher" or recipe.target.weights == "teacher" or teacher_rewrites):
        teacher = open_model("teacher", config.teacher, contexts)
    rewriter = None
    if rewrites:
        named = open_model("rewriter", config.rewriter, contexts) if config.rewriter else teacher
        rewriter = student if recipe.rewrite.by == "student" else named
    return Roles(student, teacher, rewriter)


def open_roles(config: RunConfig) -> Roles:
    """Step 2: the files of every role that the recipe needs, refused unless they fit together."""
    roles = assign_roles(config, open_model)
    student = roles.student
    for _, require in requirements(config, roles):
        require()
    if student.trained_dtype != "float32":
        log.warning(
            "student.param_dtype = %s: a weight moves only where its update exceeds half a rounding step, 0.2 to "
            "0.4 %% of its size; smaller ones are lost. It saves 2 bytes a parameter; Adam's moments stay in float32",
            student.param_dtype,
        )
    return roles


def requirements(config: RunConfig, roles: Roles) -> list[tuple[str, Callable[[], None]]]:
    """What has to hold between the files of the roles, in words; each raises UserError where it does not."""
    recipe, student, teacher, rewriter = config.recipe, roles.student, roles.teacher, roles.rewriter
    found: list[tuple[str, Callable[[], None]]] = []
    if recipe.rewrite.how in ("truncate", "earliest_correct_prefix"):
        found.append(("student: has a thinking span to cut", lambda: _require_span(student)))
    if recipe.target.weights == "none":  # only text travels
        return found
    if teacher is not None:
        own = recipe.target.own_template and recipe.target.weights == "teacher"
        require = require_same_vocabulary if own else require_same_prompts
        what = "ids are" if own else "ids and plain prompt are"
        found.append(
            (f"{teacher.key}: {what} the student's", partial(require, student.chat, teacher.chat, teacher.key))
        )
        found.append((f"{teacher.key}: the student knows its end", partial(_require_known_end, student, teacher)))
    if rewriter is not None and rewriter is not teacher and rewriter is not student:
        same = partial(require_same_vocabulary, student.chat, rewriter.chat, rewriter.key)
        found.append((f"{rewriter.key}: ids are the student's", same))
    return found


def _require_span(student: ModelFiles) -> None:
    if not student.chat.thinks:
        raise UserError(
            "recipe.rewrite.how: truncate and earliest_correct_prefix cut the thinking span, and the student's "
            "template has none (student.thinking); set student.thinking=true or rewrite otherwise"
        )


def _require_known_end(student: ModelFiles, teacher: ModelFiles) -> None:
    """A student that is pulled to an end at which its own sampler does not stop writes on and on."""
    end = teacher.chat.end[-1]
    if end not in student.eos_ids:
        raise UserError(
            f"teacher.path: its responses end with id {end} ({teacher.chat.decode((end, end))!r}), and the student "
            f"stops at {sorted(student.eos_ids)} only; add {end} to eos_token_id in the student's "
            "generation_config.json"
        )


def rewriting_room(config: RunConfig, roles: Roles) -> int:
    """The longest prompt for a rewrite, in tokens: problem, whole draft and instruction, unless a window is short, be
    it the rewriter's or that of a target which reads the same (context `rewrite`)."""
    recipe, sampling, readers = config.recipe, config.sampling, [roles.rewriter]
    if recipe.target.context == "rewrite":
        readers.append(roles.target(recipe))
    window = min(files.model.config.max_position_embeddings for files in readers if files)
    window = min(recipe.rewrite.window or window, window)
    draft = config.train.max_length if recipe.write.by == "dataset" else sampling.writer.max_tokens
    room = min(2 * sampling.prompt_tokens + draft, window - sampling.rewriter.max_tokens)
    if room <= sampling.prompt_tokens:
        keys = ", ".join(files.key for files in readers if files)
        raise UserError(
            f"sampling.rewriter.max_tokens: {sampling.rewriter.max_tokens} of a window of {window} tokens "
            f"({keys}; recipe.rewrite.window) leave {room} for problem and draft; lower it, or raise the window"
        )
    return room


def make_sampler(files: ModelFiles, config: RunConfig, mesh: Mesh, prompt: int, response: int) -> JaxSampler:
    """A sampler of this model for prompts and responses of these lengths, in tokens."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.sampling.slots % shards:
        raise UserError(
            f"sampling.slots: {config.sampling.slots} slots do not divide over mesh.data x mesh.fsdp = {shards} "
            f"devices; choose a multiple of {shards}"
        )
    window = files.model.config.max_position_embeddings
    if prompt + response > window:
        raise UserError(
            f"{files.key}: prompts of {prompt} and responses of {response} tokens exceed the model's window of "
            f"{window}; lower sampling.prompt_tokens, or max_tokens in sampling.writer, sampling.rewriter or eval"
        )
    return JaxSampler(
        files.model,
        mesh,
        files.eos_ids,
        slots=config.sampling.slots,
        prompt_length=prompt,
        max_length=prompt + response,
        prefill_chunk=config.sampling.prefill_chunk,
        prefill_rows=config.sampling.prefill_rows,
        vocab_size=files.chat.vocab_size,
        dtype=jnp.dtype(files.model.dtype),
    )
