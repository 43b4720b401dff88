"""Who answers for each role of a run: a sampler on the mesh, or a model's own servers where its section says `serve`.

Not here: how either of them samples (sampling/), and what a recipe asks of them (recipe/).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh

from mpd_jax.config import RunConfig
from mpd_jax.roles import ModelFiles, Roles, make_sampler, rewriting_room
from mpd_jax.sampling.jax_sampler import JaxSampler
from mpd_jax.sampling.sampler import Sampler

# A sampler for a model that servers hold, for prompts and responses of so many tokens together.
Remote = Callable[[ModelFiles, str, int], Sampler]


@dataclass(frozen=True)
class Samplers:
    """Samplers by role. The student's serves evaluation too. follows: a step samples from the student.

    load_student: gives what trains, and its version, to whoever answers with it.
    """

    student: Sampler
    writer: Sampler | None
    rewriter: Sampler | None
    load_student: Callable[[Any, int], None]
    follows: bool


def make_samplers(config: RunConfig, roles: Roles, mesh: Mesh, whole: Callable[[Any], Any], remote: Remote) -> Samplers:
    """They hold no weights yet. `whole` makes the student's weights of what trains; servers are given the latter."""
    sampling, recipe = config.sampling, config.recipe
    prompt, written = sampling.prompt_tokens, sampling.writer.max_tokens

    make = partial(_make, config, mesh, remote)
    student = make(roles.student, "student", prompt, max(written, config.eval.max_tokens))
    writer = rewriter = None
    if recipe.write.by == "student":
        writer = student
    elif recipe.write.by == "teacher":
        assert roles.teacher is not None
        writer = make(roles.teacher, "writer", prompt, written)
    if roles.rewriter is not None:
        rewriter = rewriting_sampler(config, roles, mesh, remote)
    rewrites = rewriter is not None and roles.rewriter is roles.student

    def load_student(trained: Any, version: int) -> None:
        student.load(whole(trained) if isinstance(student, JaxSampler) else trained, version)
        if rewriter is not None and rewrites:
            same_weights(rewriter, student)

    return Samplers(student, writer, rewriter, load_student, writer is student or rewrites)


def rewriting_sampler(config: RunConfig, roles: Roles, mesh: Mesh, remote: Remote) -> Sampler:
    """The one of the model that rewrites. It holds no weights yet."""
    assert roles.rewriter is not None, "no model rewrites"
    room, response = rewriting_room(config, roles), config.sampling.rewriter.max_tokens
    return _make(config, mesh, remote, roles.rewriter, "rewriter", room, response)


def _make(
    config: RunConfig, mesh: Mesh, remote: Remote, files: ModelFiles, role: str, prompt: int, response: int
) -> Sampler:
    if files.serve:
        return remote(files, role, prompt + response)
    return make_sampler(files, config, mesh, prompt, response)


def load_frozen(samplers: Samplers, roles: Roles, mesh: Mesh, teacher_weights: Any) -> None:
    """Weights that never change are loaded once; servers hold theirs, and are compared with those that are here."""
    writer = samplers.writer if samplers.writer is not samplers.student else None
    rewriter = samplers.rewriter if roles.rewriter is not roles.student else None
    if writer is not None:
        writer.load(teacher_weights, 0)
    if rewriter is None or roles.rewriter is None:
        return
    if writer is not None and roles.rewriter is roles.teacher:
        same_weights(rewriter, writer)
    elif roles.rewriter is roles.teacher:
        rewriter.load(teacher_weights, 0)
    else:
        rewriter.load(roles.rewriter.weights(mesh) if isinstance(rewriter, JaxSampler) else None, 0)


def served_elsewhere(roles: Roles, teacher_weights: Any) -> list[ModelFiles]:
    """Frozen models that servers hold and the mesh does not, each once."""
    frozen = {f.key: f for f in (roles.teacher, roles.rewriter) if f is not None and f is not roles.student}
    return [f for f in frozen.values() if f.serve and (f is not roles.teacher or teacher_weights is None)]


def same_weights(sampler: Sampler, other: Sampler) -> None:
    """`sampler` answers with the weights that `other`, of the same model, has. No second copy is made."""
    if isinstance(sampler, JaxSampler):
        assert isinstance(other, JaxSampler), "a model is served or on the mesh, not both"
        sampler.share(other)
    else:
        sampler.load(None, other.version)
