"""What to change in a config when a phase does not fit: keys and values, largest part first."""

from jax.sharding import Mesh

from mpd_jax.config import RunConfig
from mpd_jax.plan.chips import GiB, shards
from mpd_jax.plan.flops import computes_all_scores
from mpd_jax.plan.measure import Measured
from mpd_jax.roles import Roles

LARGE = 0.2  # a part of the chip's memory that is worth a remedy


def remedies(measured: list[Measured], config: RunConfig, roles: Roles, mesh: Mesh) -> list[str]:
    """Each once, in the order of the phases and of the parts' sizes."""
    found: list[str] = []
    for phase in measured:
        if phase.fits:
            continue
        for part, size in sorted(phase.parts.items(), key=lambda item: -item[1]):
            if size > LARGE * phase.memory:
                remedy = _remedy(part, phase, config, roles, mesh)
                found.append(f"{phase.name}: {_amount(size)} of {part}: {remedy}")
        if not any(line.startswith(phase.name + ":") for line in found):
            found.append(f"{phase.name}: many small parts: raise mesh.fsdp or mesh.tensor on more chips")
    return list(dict.fromkeys(found))


def _amount(size: float) -> str:
    return "more" if size == float("inf") else f"{size / GiB:.1f} GiB"


def _remedy(part: str, phase: Measured, config: RunConfig, roles: Roles, mesh: Mesh) -> str:
    match part:
        case "decode copies":
            return _wider(roles, mesh, "decode copies are split over mesh.tensor alone")
        case "cache":
            return _smaller_cache(config, roles, mesh, phase)
        case "temporaries" if phase.kind == "train":
            return _less_in_the_step(config, roles, mesh, phase)
        case "temporaries" if phase.kind == "hand over":
            return _wider(roles, mesh, "a decode copy is split over mesh.tensor alone")
        case "temporaries" if phase.name.endswith("prefill") and config.sampling.prefill_chunk > 16:
            less = config.sampling.prefill_chunk // 2
            return f"set sampling.prefill_chunk={less}, or sampling.slots lower: a chunk's scores are all there at once"
        case "temporaries":
            return _smaller_cache(config, roles, mesh, phase)
        case "teacher" if config.teacher and config.teacher.param_dtype == "float32":
            return "set teacher.param_dtype=bfloat16, which halves it"
    return _more_chips(mesh)


def _more_chips(mesh: Mesh) -> str:
    if mesh.shape["data"] > 1:
        return f"set mesh.data=1 mesh.fsdp={mesh.shape['fsdp'] * mesh.shape['data']}: data holds copies, fsdp parts"
    return "take a topology of more chips, over which mesh.fsdp=-1 splits it, or one with more memory"


def _next_tensor(roles: Roles, mesh: Mesh) -> int | None:
    """The next size of mesh.tensor that the models and the chips allow, with mesh.data as it is."""
    models = [files.model.config for files in (roles.student, roles.teacher, roles.rewriter) if files]
    split = [
        size
        for c in models
        for size in (c.num_heads, c.vocab_size, c.experts.count if c.experts else c.intermediate_size)
    ]
    most = mesh.size // mesh.shape["data"]
    sizes = (size for size in range(mesh.shape["tensor"] + 1, most + 1) if most % size == 0)
    return next((size for size in sizes if all(s % size == 0 for s in split)), None)


def _with_tensor(mesh: Mesh, tensor: int) -> str:
    """What to set for this size: fsdp gives the chips, also where the config fixes its size."""
    fsdp = mesh.size // mesh.shape["data"] // tensor
    return f"set mesh.tensor={tensor} mesh.fsdp={fsdp} (now {mesh.shape['tensor']} and {mesh.shape['fsdp']})"


def _wider(roles: Roles, mesh: Mesh, why: str) -> str:
    if tensor := _next_tensor(roles, mesh):
        return f"{_with_tensor(mesh, tensor)}: {why}"
    if mesh.shape["data"] > 1:
        return f"{_more_chips(mesh)}; then raise mesh.tensor: {why}"
    if mesh.shape["fsdp"] == 1:
        return f"{why}, and every chip is in it: take a topology of more chips, or of chips with more memory"
    return f"{why}, and the models divide no further: take chips with more memory or a smaller model"


def _smaller_cache(config: RunConfig, roles: Roles, mesh: Mesh, phase: Measured) -> str:
    least, slots = shards(mesh), config.sampling.slots
    if slots > least:
        return f"set sampling.slots={max(least, slots // 2 // least * least)} (now {slots})"
    tensor = _next_tensor(roles, mesh)
    if tensor and roles.student.model.config.num_kv_heads % tensor == 0:
        fewer = mesh.size // tensor
        return f"{_with_tensor(mesh, tensor)}, which splits the key-value heads, and sampling.slots={fewer}"
    key, longest = _longest(config, phase)
    return f"set {key}={longest // 2} (now {longest}): the longest trace sets the cache's length"


def _longest(config: RunConfig, phase: Measured) -> tuple[str, int]:
    """The key that decides how long the phase's cache is, and its value."""
    written, asked = config.sampling.writer.max_tokens, config.eval.max_tokens
    if phase.kind == "rewrite" and config.recipe.write.by == "dataset":
        return "train.max_length", config.train.max_length
    if phase.kind != "rewrite" and phase.sizes.get("role") == "student" and asked > written:
        return "eval.max_tokens", asked
    return "sampling.writer.max_tokens", written


def _less_in_the_step(config: RunConfig, roles: Roles, mesh: Mesh, phase: Measured) -> str:
    student, pieces = config.student, config.train.micro_batches
    target = roles.target_here(config.recipe)
    if student.remat != "full":
        return f"set student.remat=full (now {student.remat})"
    gradients = phase.parts["optimiser"] / 2  # the size of a moment; pieces are summed in as much again
    rest = phase.parts["temporaries"] - gradients * (1 + (pieces > 1))
    at_most = phase.sizes["rows"] // shards(mesh)
    if pieces < at_most and rest * (1 - pieces / at_most) > gradients * (pieces == 1):
        return f"set train.micro_batches={at_most} (now {pieces}): one row a chip at a time"
    if rest < phase.parts["temporaries"] / 2:
        return f"most of it are gradients: {_more_chips(mesh)}"
    longest = config.sampling.prompt_tokens + phase.sizes["response"]
    half = max(longest // 2, config.sampling.prompt_tokens + 1)
    shorter = f"set train.max_length={half} (now {config.train.max_length}), which leaves longer trajectories out"
    if any(computes_all_scores(files.model.on(mesh)) for files in (roles.student, target) if files):
        heads = max(files.model.config.num_heads for files in (roles.student, target) if files) / mesh.shape["tensor"]
        scores = 4 * heads * max(phase.sizes["student_length"], phase.sizes["target_length"]) ** 2
        return (
            f"the reference attention holds scores of {scores / GiB:.1f} GiB a row and layer: choose a kernel that "
            f"does not, or {shorter}"
        )
    if tensor := _next_tensor(roles, mesh):
        return f"{_with_tensor(mesh, tensor)}: heads, feed-forward and vocabulary are split over it"
    return shorter
