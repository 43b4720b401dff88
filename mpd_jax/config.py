"""RunConfig, assembled from its owners' dataclasses: strict YAML, then dotted overrides, then one check of the whole.

Every section is declared beside the code that reads it. Unknown keys are errors that name the nearest known key.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic
import yaml

from mpd_jax.data.problems import ProblemsConfig
from mpd_jax.eval.evaluate import EvalConfig
from mpd_jax.files import AnyPath
from mpd_jax.models.config import ModelSpec
from mpd_jax.models.lora import StudentSpec
from mpd_jax.recipe.recipe import Recipe, validate
from mpd_jax.sampling.sampler import SamplingConfig
from mpd_jax.sampling.ways import PushConfig
from mpd_jax.sampling.wire import ServerConfig
from mpd_jax.sharding import MeshConfig
from mpd_jax.train.curriculum import CurriculumConfig
from mpd_jax.train.guards import GuardsConfig
from mpd_jax.train.state import TrainConfig
from mpd_jax.trees import overridden, plain, read_yaml
from mpd_jax.types import UserError

BUCKET_DIRECTORY = re.compile(r"gs://[a-z0-9][a-z0-9._-]+/[^/*?\[\]#][^*?\[\]#]*")  # without patterns and generations


@dataclass(frozen=True)
class RunSection:
    """Where the run lives, and its one root seed.

    dir: a directory on this machine or mounted there, or gs://BUCKET/DIRECTORY; all processes of a run must see it.
    compile_cache: a directory or gs:// address where compiled programs are kept: a later start, of this run or of
    another with the same shapes on the same devices, compiles nothing that it holds.
    """

    dir: str
    seed: int = 0
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        there = BUCKET_DIRECTORY.fullmatch(self.dir) or ("://" not in self.dir and self.dir.strip())
        if not there or not self.dir.isprintable():
            raise UserError(
                f"run.dir: {self.dir!r} is not allowed; give a directory on this machine, or gs://BUCKET/DIRECTORY "
                "(with none of *?[]# in it)"
            )


@dataclass(frozen=True)
class SamplingSection:
    """Sampling per role, the shape of the JAX sampler that serves them, and how servers are asked that do (`serve`).

    lookahead: 1 lets the next step's rollouts and rewriting run while this step trains, by weights that are one update
    old; 0 is strictly on-policy. Whoever writes or rewrites must then be served elsewhere (`serve`).
    slots: responses decoded side by side. prompt_tokens: longest prompt of a problem, in tokens; longer ones are
    refused. prefill_chunk, prefill_rows: the one compiled shape in which prompts enter the cache;
    where slots lie on several devices every slot takes part, and prefill_rows is their number.
    curriculum: a growing cap on what the student writes; a cap that stays is writer.max_tokens.
    """

    writer: SamplingConfig = field(default_factory=SamplingConfig)
    rewriter: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.6))
    slots: int = 32
    prompt_tokens: int = 512
    prefill_chunk: int = 128
    prefill_rows: int = 4
    lookahead: int = 0
    curriculum: CurriculumConfig | None = None
    server: ServerConfig = field(default_factory=ServerConfig)
    push: PushConfig = field(default_factory=PushConfig)

    def __post_init__(self) -> None:
        for name in ("slots", "prompt_tokens", "prefill_chunk", "prefill_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} is not allowed; it must be 1 or more")
        if self.lookahead not in (0, 1):
            raise UserError(f"lookahead = {self.lookahead} is not allowed; it must be 0 or 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on. `rewriter` is the teacher unless named; `teacher` may be absent where unused."""

    run: RunSection
    recipe: Recipe
    student: StudentSpec
    teacher: ModelSpec | None = None
    rewriter: ModelSpec | None = None
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    train: TrainConfig = field(default_factory=TrainConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    @property
    def steps_are_free(self) -> bool:
        """Whether train.steps only says when to stop; a falling learning rate depends on it."""
        return self.train.schedule == "constant"

    @property
    def voices(self) -> tuple[str, ...]:
        """The sections whose models write and rewrite."""
        write, rewrite = self.recipe.write.by, self.recipe.rewrite
        named = "rewriter" if self.rewriter and rewrite.by == "teacher" else rewrite.by
        return (*([write] if write != "dataset" else []), *([named] if rewrite.by_model else []))

    @property
    def reproducible(self) -> bool:
        """Whether run.seed decides the run, stopped or not: it does not on servers that are sent no seed, nor where the
        student's text of a step is made ahead, for after a stop newer weights make it.

        Of rounding it says nothing: where other devices, or the other requests in a server's batch, change the last
        bits of a logit, a draw that was close falls otherwise.
        """
        asked = (getattr(self, name) for name in {"student", *self.voices})  # the student, to be evaluated
        seeded = self.sampling.server.seed == "request" or not any(section.servers for section in asked)
        return seeded and not (self.sampling.lookahead and "student" in self.voices)


def load(path: str | AnyPath, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file with overrides applied. UserError names key, value and remedy.

    An override is `section.key=value`, or another YAML file whose keys are laid over those before it.
    """
    return resolve(read_yaml(path), overrides)


def resolve(tree: dict, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """A checked RunConfig from a nested mapping and overrides."""
    for override in overrides:
        tree = overridden(tree, override)
    _check_keys(tree, RunConfig, "")
    try:
        config = _adapter().validate_python(tree)
    except pydantic.ValidationError as error:
        raise UserError("\n".join(_explain(e) for e in error.errors())) from None
    validate(config.recipe)
    _check_roles(config)
    _check_serving(config)
    _check_sampled_loss(config)
    _check_training(config)
    _check_guards(config)
    return config


@functools.cache
def _adapter() -> pydantic.TypeAdapter:
    """Made once: it takes longer than reading a config."""
    return pydantic.TypeAdapter(RunConfig)


def _dataclass_in(annotation: Any) -> type | None:
    if dataclasses.is_dataclass(annotation):
        return typing.cast(type, annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((_dataclass_in(a) for a in typing.get_args(annotation) if _dataclass_in(a)), None)
    return None


def _dataclass_by_name(annotation: Any) -> type | None:
    """The section of which a mapping holds one by each name that the user gives."""
    inner = typing.get_args(annotation)
    return _dataclass_in(inner[1]) if typing.get_origin(annotation) is Mapping else None


def _check_keys(tree: Any, owner: type, prefix: str) -> None:
    """UserError for what pydantic would let through: a key that nobody reads, and true where a number belongs."""
    if not isinstance(tree, dict):
        return
    hints = typing.get_type_hints(owner)
    known = [f.name for f in dataclasses.fields(owner)]
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]!s}?" if near else f"known keys there: {', '.join(known)}"
            raise UserError(f"unknown key {prefix}{key} (value {value!r}); {hint}")
        kinds = {hints[key], *typing.get_args(hints[key])}
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise UserError(f"{prefix}{key}: {value!r} is not allowed; it must be {_allowed(hints[key])}")
        inner = _dataclass_in(hints[key])
        if inner is not None:
            _check_keys(value, inner, f"{prefix}{key}.")
        if (named := _dataclass_by_name(hints[key])) and isinstance(value, dict):
            for name, section in value.items():
                _check_keys(section, named, f"{prefix}{key}.{name}.")


# What a key may hold, in plain words.
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (quoted where YAML reads a number or a date)",
    types.NoneType: "null",
}


def _explain(error: Any) -> str:
    """Key, value and what is allowed there. An element of a list is explained by the list's key."""
    annotation, path, said = RunConfig, [], error["type"] == "value_error" and str(error["ctx"]["error"])
    for part in error["loc"]:
        owner, named = _dataclass_in(annotation), _dataclass_by_name(annotation)
        if owner is None and named is None:
            break
        annotation = named or typing.get_type_hints(owner)[part]
        path.append(part)
    where = ".".join(path)
    if said:
        return said if said.startswith(where) else f"{where}: {said}"
    if error["type"] in ("missing", "missing_argument") and len(path) == len(error["loc"]):
        return f"{where}: required and missing; set it in the YAML file or as {where}=value"
    return f"{where}: {error['input']!r} is not allowed; it must be {_allowed(annotation)}"


def _allowed(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if dataclasses.is_dataclass(annotation):
        needed = [f.name for f in dataclasses.fields(annotation) if f.default is f.default_factory]  # neither is there
        some = needed or [dataclasses.fields(annotation)[0].name]
        return f"a section such as {{{', '.join(f'{name}: ...' for name in some)}}}"
    if origin is typing.Literal:
        return " or ".join(filter(None, [", ".join(map(str, inner[:-1])), str(inner[-1])]))
    if origin is tuple:
        many = "" if Ellipsis in inner else f" {len(inner)}"
        return f"a list of{many} values, each {_allowed(inner[0])}"
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(_allowed, inner))
    if origin is Mapping and inner[1] is not str:
        return f"a section in which every key is text and every value {_allowed(inner[1])}"
    return "a section in which every key and value is text"


def _check_training(config: RunConfig) -> None:
    """Refuses what could never take effect."""
    every, steps, saved = config.eval.every, config.train.steps, config.train.save_every
    kept, profiled = config.train.keep_best, config.train.profile_steps
    if kept and (every == 0 or every % saved):
        raise UserError(
            f"train.keep_best: {kept} is measured every eval.every = {every} steps, which must be a multiple of "
            f"train.save_every = {saved}; set eval.every, or leave train.keep_best out"
        )
    if kept and every >= steps:
        raise UserError(
            f"train.keep_best: {kept} is measured every eval.every = {every} steps, and the run ends with step {steps} "
            "(train.steps), so that there is but one to choose from; lower eval.every, or leave train.keep_best out"
        )
    cap, needed = config.train.keep_trajectories, config.train.keep * saved + config.recipe.rewrite.max_age
    if cap is not None and cap < needed:
        raise UserError(
            f"train.keep_trajectories: {cap} steps are fewer than a run that is stopped may go back over: at least "
            f"train.keep * train.save_every + recipe.rewrite.max_age = {needed}; raise it, or leave it out to keep all"
        )
    if profiled and profiled[0] >= steps:
        raise UserError(
            f"train.profile_steps: {list(profiled)} begins after the last step, {steps - 1} of train.steps = {steps} "
            "counted from 0; lower it, or leave it out"
        )


def _check_guards(config: RunConfig) -> None:
    """Before a band is left there is a checkpoint that is good, and no setting is without its band; and a curriculum is
    the student's."""
    curriculum, longest, by = config.sampling.curriculum, config.sampling.writer.max_tokens, config.recipe.write.by
    if curriculum and by != "student":
        raise UserError(
            f"sampling.curriculum: it caps what the student writes, and recipe.write.by is {by}; leave it out, or set "
            "recipe.write.by=student"
        )
    if curriculum and curriculum.caps[-1] > longest:
        raise UserError(
            f"sampling.curriculum.caps: {list(curriculum.caps)} end above sampling.writer.max_tokens = {longest}; "
            "lower them, or raise that"
        )
    actions, unused = {band.action for band in config.guards.bands.values()}, GuardsConfig()
    for key, needed, there in (
        ("patience", "a band", bool(actions)),
        ("learning_rate_factor", "a band with action=rollback", "rollback" in actions),
        ("max_rollbacks", "a band with action=rollback", "rollback" in actions),
    ):
        value = getattr(config.guards, key)
        if value != getattr(unused, key) and not there:
            raise UserError(f"guards.{key}: {value} has no effect without {needed}; add one, or remove {key}")
    # A look-ahead writes with weights that are one older: one more checkpoint may be of the excursion.
    needed = 2 + config.sampling.lookahead
    if config.guards.strict and config.train.keep < needed:
        raise UserError(
            f"train.keep: {config.train.keep} is not enough for guards.{next(iter(config.guards.strict))}, for the "
            f"last checkpoint may be of weights that it finds wrong a step later; keep {needed} or more"
        )


def _check_roles(config: RunConfig) -> None:
    recipe = config.recipe
    needs = [
        (recipe.write.by == "teacher", "recipe.write.by=teacher"),
        (recipe.rewrite.by_model and recipe.rewrite.by == "teacher" and not config.rewriter,
         "recipe.rewrite.by=teacher"),
        (recipe.target.weights == "teacher", "recipe.target.weights=teacher"),
    ]  # fmt: skip
    for needed, reason in needs:
        if needed and config.teacher is None:
            raise UserError(f"teacher: missing, and {reason} needs one; add a teacher section with a path")
    if config.rewriter and (not recipe.rewrite.by_model or recipe.rewrite.by == "student"):
        raise UserError(
            f"rewriter: a model nobody uses, for recipe.rewrite is how={recipe.rewrite.how} by={recipe.rewrite.by}; "
            "remove the section, or set how=compress or repair, and by=teacher"
        )


def _check_serving(config: RunConfig) -> None:
    """Addresses are such, and a look-ahead samples nothing on the devices that train."""
    sections = {"student": config.student, "teacher": config.teacher, "rewriter": config.rewriter}
    for name, section in sections.items():
        if section is None or section.serve == "jax":
            continue
        wrong = [url for url in section.servers if not re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", url)]
        if wrong or not section.servers or len(set(section.servers)) < len(section.servers):
            raise UserError(
                f"{name}.serve: {section.serve!r} is not allowed; give jax, the address of a vLLM server such as "
                "http://host:8000, or a list of different ones (a key stands in the environment, not in the address)"
            )
    if config.student.servers and "://" in config.run.dir and config.sampling.push.directory is None:
        raise UserError(
            f"sampling.push.directory: missing; servers cannot read {config.run.dir}/served: give a directory that "
            "they share with process 0, or a gs:// address and in sampling.push.seen_as where they have it mounted"
        )
    top_k = config.recipe.target.top_k
    if top_k and config.teacher and config.teacher.serve == "jax":
        raise UserError(
            f"recipe.target.top_k: {top_k} asks the teacher's servers, and teacher.serve is jax; set it "
            "to the address of a vLLM server that holds the teacher, or top_k=0, which reads it on the mesh"
        )
    if not config.sampling.lookahead:
        return
    for name in config.voices:
        section = sections[name]
        if section is not None and section.serve == "jax":
            raise UserError(
                f"sampling.lookahead: 1 needs {name}.serve to be the address of a server, for {name} would sample on "
                "the devices that train meanwhile; set it, or sampling.lookahead=0"
            )


def _check_sampled_loss(config: RunConfig) -> None:
    """What `policy_gradient` trains on was drawn from the distribution that it trains."""
    if config.recipe.loss.kind != "policy_gradient":
        return
    sampling, room = config.sampling, config.train.max_length
    longest = sampling.prompt_tokens + sampling.writer.max_tokens
    if room < longest:
        raise UserError(
            f"train.max_length: {room} leaves whole trajectories out for their length, and recipe.loss.kind="
            f"policy_gradient would be biased towards what ends early; raise it to {longest}, which is "
            "sampling.prompt_tokens + sampling.writer.max_tokens, or lower those"
        )
    for key, value, neutral, why in (
        ("writer.temperature", sampling.writer.temperature, 1.0, "draws from another distribution than is trained"),
        ("writer.top_p", sampling.writer.top_p, 1.0, "leaves out tokens that the student gives mass"),
        ("writer.top_k", sampling.writer.top_k, 0, "leaves out tokens that the student gives mass"),
        ("lookahead", sampling.lookahead, 0, "has older weights write the text"),
    ):
        if value != neutral:
            raise UserError(
                f"sampling.{key}: {value} {why}, and recipe.loss.kind=policy_gradient would be biased; set it to "
                f"{neutral}, or use kind=reverse_kl, which is exact on any text"
            )


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load` reads back to an equal value."""
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True, width=100)
