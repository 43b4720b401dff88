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
            return _wider(config, roles, mesh, "decode copies are split over mesh.tensor alone")
        case "cache":
            return _smaller_cache(config, roles, mesh)
        case "temporaries" if phase.kind == "train":
            return _less_in_the_step(config, roles, mesh, phase)
        case "temporaries" if phase.kind == "hand over":
            return _wider(config, roles, mesh, "a decode copy is split over mesh.tensor alone")
        case "temporaries" if phase.name.endswith("prefill") and config.sampling.prefill_chunk > 16:
            less = config.sampling.prefill_chunk // 2
            return f"set sampling.prefill_chunk={less}, or sampling.slots lower: a chunk's scores are all there at once"
        case "temporaries":
            return _smaller_cache(config, roles, mesh)
        case "teacher" if config.teacher and config.teacher.param_dtype == "float32":
            return "set teacher.param_dtype=bfloat16, which halves it"
    if mesh.shape["data"] > 1:
        return f"set mesh.data=1 mesh.fsdp={mesh.shape['fsdp'] * mesh.shape['data']}: data holds copies, fsdp parts"
    return "take a topology of more chips, over which mesh.fsdp=-1 splits it, or one with more memory"


def _wider(config: RunConfig, roles: Roles, mesh: Mesh, why: str) -> str:
    """The next size of mesh.tensor that the heads and the chips allow."""
    models = [files.model.config for files in (roles.student, roles.teacher, roles.rewriter) if files]
    now, chips, data = mesh.shape["tensor"], mesh.size, mesh.shape["data"]
    for tensor in range(now + 1, chips + 1):
        inner = [c.experts.count if c.experts else c.intermediate_size for c in models]
        divides = all(c.num_heads % tensor == 0 and size % tensor == 0 for c, size in zip(models, inner, strict=True))
        if divides and all(c.vocab_size % tensor == 0 for c in models) and chips % (tensor * data) == 0:
            return f"set mesh.tensor={tensor} (now {now}): {why}"
    return f"{why}, and the heads divide no further: take chips with more memory or a smaller model"


def _smaller_cache(config: RunConfig, roles: Roles, mesh: Mesh) -> str:
    least, slots = shards(mesh), config.sampling.slots
    if slots > least:
        return f"set sampling.slots={max(least, slots // 2 // least * least)} (now {slots})"
    kv_heads = roles.student.model.config.num_kv_heads
    if kv_heads % (mesh.shape["tensor"] * 2) == 0 and mesh.shape["fsdp"] % 2 == 0:
        tensor = mesh.shape["tensor"] * 2
        return f"set mesh.tensor={tensor}, which splits the key-value heads, and sampling.slots={max(1, least // 2)}"
    longest = config.sampling.writer.max_tokens
    return f"set sampling.writer.max_tokens={longest // 2} (now {longest}): the longest trace sets the cache's length"


def _less_in_the_step(config: RunConfig, roles: Roles, mesh: Mesh, phase: Measured) -> str:
    student, pieces = config.student, config.train.micro_batches
    target = roles.target_here(config.recipe)
    if student.remat != "full":
        return f"set student.remat=full (now {student.remat})"
    at_most = phase.sizes["rows"] // shards(mesh)
    if pieces < at_most:
        return f"set train.micro_batches={at_most} (now {pieces}): one row a chip at a time"
    if any(computes_all_scores(files.model.on(mesh)) for files in (roles.student, target) if files):
        heads = max(files.model.config.num_heads for files in (roles.student, target) if files) / mesh.shape["tensor"]
        scores = 4 * heads * max(phase.sizes["student_length"], phase.sizes["target_length"]) ** 2
        return (
            f"the reference attention holds scores of {scores / GiB:.1f} GiB a row and layer: choose a kernel that "
            f"does not, or set train.max_length={config.train.max_length // 2}"
        )
    if mesh.shape["fsdp"] % 2 == 0:
        return f"set mesh.tensor={mesh.shape['tensor'] * 2}: heads, feed-forward and vocabulary are split over it"
    return f"set train.max_length={config.train.max_length // 2} (now {config.train.max_length})"
