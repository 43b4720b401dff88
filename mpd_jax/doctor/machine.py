"""What this machine has: devices for the mesh, memory for what lies on it, room on its disks. Nothing is compiled."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mpd_jax import build
from mpd_jax.config import RunConfig
from mpd_jax.doctor.rows import Row, check
from mpd_jax.plan.chips import Chip, GiB, Topology
from mpd_jax.plan.measure import measure
from mpd_jax.plan.phases import phases
from mpd_jax.roles import Roles


def rows(config: RunConfig, roles: Roles, mesh: Mesh) -> list[Row]:
    """Whether the mesh divides the models, whether they fit its memory, and whether checkpoints fit the disk."""
    divides = check("mesh", lambda: _mesh(config, roles, mesh))
    if divides.verdict != "ok":
        return [divides]
    return [divides, check("memory", lambda: _memory(config, roles, mesh)), *disks(config, roles, mesh)]


def _mesh(config: RunConfig, roles: Roles, mesh: Mesh) -> str:
    build.abstract_state(config, roles.student, mesh)
    teacher = roles.teacher_here(config.recipe)
    if teacher is not None:
        build.abstract_weights(teacher, mesh)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {sizes}: every tensor divides"


def _memory(config: RunConfig, roles: Roles, mesh: Mesh) -> Row:
    """The most that a phase needs on a device, by arithmetic, against what the device has."""
    memory = device_memory()
    here = Topology(Chip("here", "", False, memory, 1.0, 1.0, 1.0), (mesh.size,))
    top = max((measure(phase, here, mesh) for phase in phases(config, roles, mesh)), key=lambda found: found.peak)
    resident = top.peak - top.parts.get("temporaries", 0)
    seen = (
        f"{top.name} needs most: {_words(top.peak)} of a device's {_words(memory)}; {_words(resident)} of them are "
        "weights, optimiser and cache, and the rest is estimated"
    )
    change = "see what `mpd-jax plan` says of such chips, and the keys that it names"
    verdict = "ok" if top.fits else "warn" if resident <= memory else "FAIL"
    return Row("memory", verdict, seen, "" if top.fits else change)


def device_memory() -> float:
    """Bytes on one device; a CPU's devices share what the machine has."""
    devices = jax.local_devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)


def _words(size: float) -> str:
    return f"{size / GiB:,.1f} GiB" if size >= GiB else f"{size / 2**20:,.1f} MiB"


def disks(config: RunConfig, roles: Roles, mesh: Mesh) -> list[Row]:
    """Room for the checkpoints that are kept and the one being written, and for the weights that servers are given."""
    state, student, train = build.abstract_state(config, roles.student, mesh), roles.student, config.train
    kept = train.keep + 1 + (train.keep_best is not None)
    size = _bytes((state.weights, state.opt_state, state.self_weights), lambda leaf: np.dtype(leaf.dtype).itemsize)
    found = [_disk("run.dir", config.run.dir, size, kept, "checkpoints", "checkpoints")]
    if student.serve:
        width = 4 if (config.sampling.push.dtype or student.model.dtype) == "float32" else 2
        whole = _bytes(student.model.abstract(), lambda leaf: width)
        place = config.sampling.push.directory or f"{config.run.dir}/served"
        found.append(_disk("sampling.push.directory", place, whole, 2, "sets of weights", ""))
    return found


def _bytes(tree: Any, width: Callable[[Any], int]) -> int:
    return sum(math.prod(leaf.shape) * width(leaf) for leaf in jax.tree.leaves(tree))


def _disk(key: str, place: str, size: int, kept: int, what: str, under: str) -> Row:
    """Room for `kept` files of `size` bytes, less those that are there already."""
    if "://" in place:
        return Row(f"{key}: room", "skipped", f"{place} is no disk of this machine")
    path = Path(place).expanduser().absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    there = len([p for p in (path / under).glob("[0-9]*")]) if under else 0
    wanted = max(1, kept - there)
    seen = f"{_words(free)} free at {path}, for {wanted} more {what} of {_words(size)} each" + (
        f" beside {there} that are there" if there else ""
    )
    if free >= wanted * size:
        return Row(f"{key}: room", "ok", seen)
    change = f"free space there, set {key} to another disk" + (", or lower train.keep" if under else "")
    return Row(f"{key}: room", "FAIL" if free < size else "warn", seen, change)
