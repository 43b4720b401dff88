"""What the files of the models say: tokenizers, ends, padding, prompts. No weights are read."""

from jax.sharding import Mesh

from mpd_jax import build
from mpd_jax.config import RunConfig
from mpd_jax.doctor.rows import Row, check
from mpd_jax.models.hf_weights import CONFIG, GENERATION, eos_in
from mpd_jax.roles import ModelFiles, Roles, requirements
from mpd_jax.types import Problem

PROBE = Problem("probe", "What is 1+1?", answer="2")
DRAFT = "1+1 is 2."
SHOWN = 240  # characters of a prompt


def named(roles: Roles) -> list[ModelFiles]:
    """Every model once."""
    found = (roles.student, roles.teacher, roles.rewriter)
    return list({files.key: files for files in found if files is not None}.values())


def rows(config: RunConfig, roles: Roles) -> list[Row]:
    found = [check(what, holds) for what, holds in requirements(config, roles)]
    for files in named(roles):
        found += [_vocabulary(files), _ends(files), _thinking(files)]
    return [*found, *_prompts(config, roles)]


def problems(config: RunConfig, roles: Roles, mesh: Mesh) -> Row:
    """What `build` asks of the problems, and of the lengths that they are to have."""

    def see() -> str:
        said: list[str] = []
        training, heldout = (build.read_problems(config.problems, split, said.append) for split in ("train", "heldout"))
        build.refuse_overlap(training, heldout)
        build.require_what_is_read(config.recipe, training)
        build.check_sizes(config, roles, training, heldout[: config.eval.problems])
        windows = ", ".join(f"{f.key} {f.model.config.max_position_embeddings:,}" for f in named(roles))
        seen = (
            f"{len(training):,} to train on, {len(heldout):,} held out; train.max_length {config.train.max_length:,}, "
            f"prompts of at most {config.sampling.prompt_tokens:,} tokens; windows: {windows}"
        )
        return "; ".join([seen, *(line for line in said if "left out" in line)])

    return check("problems and lengths", see)


def _vocabulary(files: ModelFiles) -> Row:
    ids, head = files.chat.vocab_size, files.model.config.vocab_size
    padding = f"; {head - ids:,} of them are padding, and never drawn" if head > ids else ""
    return Row(f"{files.key}: vocabulary", "ok", f"{ids:,} ids in the tokenizer, {head:,} rows in the head{padding}")


def _ends(files: ModelFiles) -> Row:
    what, end = f"{files.key}: ends", files.chat.end[-1]
    told = {name: eos_in(files.directory / name) for name in (CONFIG, GENERATION)}
    seen = ", ".join(f"{name} {sorted(ids)}" for name, ids in told.items() if ids)
    seen += f"; its template ends a response with {end} ({files.chat.text((end,))!r})"
    if missing := told[CONFIG] - files.eos_ids:
        change = f"{GENERATION} is used; add {sorted(missing)} to eos_token_id there if the model ends with it"
        return Row(what, "warn", seen, change)
    return Row(what, "ok", seen)


def _thinking(files: ModelFiles) -> Row:
    chat, asked = files.chat, f"{files.key}.thinking={str(files.chat.thinking).lower()}"
    seen = "in a span of its own" if chat.thinks else "no span: all of a response is its answer"
    return Row(f"{files.key}: thinking", "ok", f"{seen} ({asked})")


def _prompts(config: RunConfig, roles: Roles) -> list[Row]:
    """The prompt of every role, as it is read."""
    return [_prompt(role, files, context) for role, files, context in roles.readers(config.recipe)]


def _prompt(role: str, files: ModelFiles, context: str) -> Row:
    def see() -> str:
        ids = files.chat.prompt(context, PROBE, DRAFT)
        text = repr(files.chat.text(ids))
        shown = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
        return f"{len(ids)} tokens: {shown}"

    by = "" if role == files.key else f" ({files.key})"
    return check(f"{role}{by}: prompt, {context}", see)
