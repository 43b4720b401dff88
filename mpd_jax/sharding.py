"""The mesh, the one table of logical-axis rules, the divisibility checks, and placement.

Arrays name their dimensions by logical axes; this table alone says which mesh axes carry them. Training splits every
weight over `fsdp` as well; decoding does not, for it would gather each weight again for every token.
`between` is a row's positions between layers, where each stands alone: what the backward pass keeps is split, too.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mpd_jax.types import UserError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
Column = Literal["train", "decode"]
MeshAxes = str | tuple[str, ...] | None
Logical = tuple[str | None, ...]
AnyMesh = Mesh | AbstractMesh

# logical axis: (train, decode)
RULES: dict[str, tuple[MeshAxes, MeshAxes]] = {
    "batch": (("data", "fsdp"), ("data", "fsdp")),
    "slots": (("data", "fsdp"), ("data", "fsdp")),
    "layers": (None, None),
    "embed": ("fsdp", None),
    "vocab": ("tensor", "tensor"),
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "head": (None, None),
    "mlp": ("tensor", "tensor"),
    "experts": ("tensor", "tensor"),
    "expert_mlp": (None, None),
    "routes": (None, None),
    "length": (None, None),
    "norm": (None, None),
    "rank": (None, None),
    "between": ("tensor", None),
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one size may be -1, which takes what is left.

    data: copies of the weights. fsdp: weights, gradients and optimiser split, gathered where used. tensor: heads,
    feed-forward and vocabulary split.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self):
        sizes = dict(zip(AXES, (self.data, self.fsdp, self.tensor), strict=True))
        bad = [f"mesh.{name} = {size}" for name, size in sizes.items() if size < 1 and size != -1]
        if bad or list(sizes.values()).count(-1) > 1:
            raise UserError(f"{', '.join(bad) or 'mesh'}: sizes must be 1 or more, and at most one of them -1")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these sizes over all devices. UserError if they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not make {len(devices)} devices; "
            "change mesh.data, mesh.fsdp or mesh.tensor, or set one of them to -1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices > 1:  # between slices the network is slow: only `data` may cross it
        if sizes[0] % slices:
            raise UserError(
                f"mesh.data = {sizes[0]}: the devices are {slices} slices, and only data may run across them; choose a "
                f"multiple of {slices}"
            )
        devices = sorted(devices, key=lambda device: (device.slice_index, device.id))
    return Mesh(np.array(devices).reshape(sizes), AXES)


def partition_spec(logical: Logical, column: Column = "train") -> PartitionSpec:
    """The mesh axes of an array's dimensions; two dimensions on one mesh axis are refused."""
    axes = [RULES[name][0 if column == "train" else 1] if name else None for name in logical]
    used = [a for entry in axes for a in ((entry,) if isinstance(entry, str) else entry or ())]
    twice = {a for a in used if used.count(a) > 1}
    assert not twice, f"logical axes {logical} put two dimensions on mesh axis {sorted(twice)}"
    return PartitionSpec(*axes)


def mesh_size(mesh: AnyMesh, axes: MeshAxes) -> int:
    return math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))


@lru_cache(maxsize=64)  # once, not for every tensor
def _say_replicated(heads: int, axes: MeshAxes, parts: int) -> None:
    log.warning("mesh.%s = %d does not divide %d key-value heads; they are replicated", axes, parts, heads)


def check_divides(
    name: str, shape: Sequence[int], logical: Logical, mesh: AnyMesh, column: Column = "train"
) -> Logical:
    """The logical axes that can be split. Key-value heads and positions that do not divide are replicated; others are
    refused."""
    spec, kept = partition_spec(logical, column), list(logical)
    for at, (size, axes) in enumerate(zip(shape, spec, strict=True)):
        parts = mesh_size(mesh, axes)
        if size % parts == 0:
            continue
        if logical[at] in ("kv_heads", "between"):
            kept[at] = None
            if logical[at] == "kv_heads":
                _say_replicated(size, axes, parts)
            continue
        raise UserError(
            f"mesh.{axes if isinstance(axes, str) else ' x mesh.'.join(axes or ())} = {parts}: tensor {name} has "
            f"{size} along {logical[at]!r}, which does not divide; choose mesh sizes that divide it"
        )
    return tuple(kept)


def named(mesh: Mesh, logical: Logical, column: Column = "train") -> NamedSharding:
    return NamedSharding(mesh, partition_spec(logical, column))


def tree_shardings(mesh: Mesh, logical_tree: Any, shape_tree: Any, column: Column = "train") -> Any:
    """A NamedSharding for every array of a tree of shapes, by the tree of its logical axes."""

    def leaf(path: tuple, shape: Any, logical: Logical) -> NamedSharding:
        name = ".".join(str(getattr(p, "key", p)) for p in path)
        return named(mesh, check_divides(name, shape.shape, logical, mesh, column), column)

    return jax.tree_util.tree_map_with_path(leaf, shape_tree, logical_tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data x fsdp."""
    return named(mesh, ("batch",))


def constrain(x: jax.Array, logical: Logical, column: Column = "train") -> jax.Array:
    """The activation placed by its logical axes when a mesh is set (`jax.set_mesh`); itself otherwise."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return x
    logical = check_divides("of activations", x.shape, logical, mesh, column)
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, column))
