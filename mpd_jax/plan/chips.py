"""Chips and topologies by name: what a chip has, and devices to compile for that are not here.

Peaks are dense bfloat16 FLOP/s, bandwidths bytes a second in one direction, all a chip, as the makers publish them.
"""

import fcntl
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from mpd_jax.types import UserError

GiB = 2**30
MOST_CHIPS = 1024
LOCK_S = 20.0  # libtpu's own lock outlives its process by a moment


@dataclass(frozen=True)
class Chip:
    """memory: bytes that a program may use. hbm, link: bandwidths of the memory and of all links together.

    kinds: what JAX calls such a device.
    """

    name: str
    title: str
    tpu: bool
    memory: float
    flops: float
    hbm: float
    link: float
    kinds: tuple[str, ...] = ()


# TPU: the tables of docs.cloud.google.com/tpu/docs/v5e, v5p and v6e. Memory is what the compiler of libtpu 0.0.42 gives
# a program (15.75 of 16, 95.74 of 95, 31.25 of 32). Link: the published 1600, 4800 and 3200 Gbit/s of interconnect.
# GPU: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200 SXM; link is half of the NVLink figure, which counts
# both directions. Memory is 90 % of what the driver reports (80, 79.6 and 140.4 GiB), the rest being kept by CUDA and
# NCCL; JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5e, 16 GiB", True, 15.75 * GiB, 197e12, 819e9, 200e9, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", "TPU v5p, 95 GiB", True, 95.74 * GiB, 459e12, 2765e9, 600e9, ("TPU v5", "TPU v5p")),
        Chip("v6e", "TPU v6e, 32 GiB", True, 31.25 * GiB, 918e12, 1640e9, 400e9, ("TPU v6 lite", "TPU v6e")),
        Chip("a100", "A100 SXM, 80 GB", False, 0.9 * 80 * GiB, 312e12, 2039e9, 300e9, ("NVIDIA A100-SXM4-80GB",)),
        Chip("h100", "H100 SXM, 80 GB", False, 0.9 * 79.6 * GiB, 989e12, 3350e9, 450e9, ("NVIDIA H100 80GB HBM3",)),
        Chip("h200", "H200 SXM, 141 GB", False, 0.9 * 140.4 * GiB, 989e12, 4800e9, 450e9, ("NVIDIA H200",)),
    )
}
BY_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
EXAMPLES = "v5e:4x8, v5p:2x2x4, v6e:4x4 or h100:8"


@dataclass(frozen=True)
class Topology:
    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def parse(text: str) -> Topology:
    """`chip:sizes`. UserError for chips and shapes that there are not."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not match or match[1] not in CHIPS:
        raise UserError(f"--topology {text}: not known; give a chip of {', '.join(CHIPS)} and its sizes: {EXAMPLES}")
    chip, shape = CHIPS[match[1]], tuple(int(size) for size in match[2].split("x"))
    wanted = 1 if not chip.tpu else 3 if chip.name == "v5p" else 2
    if len(shape) != wanted or 0 in shape:
        raise UserError(f"--topology {text}: {chip.name} takes {wanted} sizes of at least 1: {EXAMPLES}")
    if math.prod(shape) > MOST_CHIPS:
        raise UserError(f"--topology {text}: {math.prod(shape):,} chips; a plan is made for {MOST_CHIPS} at most")
    return Topology(chip, shape)


def devices(topology: Topology, say: Callable[[str], None]) -> Sequence[Any]:
    """As many devices as the topology has: of the TPU compiler, or CPU devices that stand for GPUs."""
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.tpu:
        return _tpu_devices(topology, say)
    with suppress(RuntimeError):  # the CPU is in use already
        jax.config.update("jax_num_cpu_devices", topology.count)
    if len(jax.devices()) < topology.count:
        raise UserError(
            f"--topology {topology.name}: {topology.count} devices are more than this process can stand for"
        )
    return jax.devices()[: topology.count]


def _tpu_devices(topology: Topology, say: Callable[[str], None]) -> Sequence[Any]:
    _wait_for_the_compiler(say)
    # The host's share of the slice is assumed to be 2x2 chips, which sizes of 1 do not hold.
    small = tuple(min(size, 2) for size in (*topology.shape, 1, 1)[:3])
    bounds = (*small[:2], 1)
    patience = time.monotonic() + LOCK_S
    while True:
        try:
            return topologies.get_topology_desc(topology.name, "tpu", chips_per_host_bounds=bounds).devices
        except Exception as error:  # libtpu's come as several types; what they say tells them apart
            if "lockfile" not in str(error) or time.monotonic() > patience:
                raise _explained(topology, error) from error
        time.sleep(1)


def _explained(topology: Topology, error: Exception) -> UserError:
    message = str(error)
    if "lockfile" in message:
        remedy = "another process on this machine uses libtpu: wait for it to end"
    elif "INVALID_ARGUMENT" in message:
        remedy = "the compiler knows no such slice: choose one that the maker offers"
    else:
        remedy = "the TPU compiler is missing: pip install 'mpd-jax[tpu]', which a machine without TPUs may have too"
    return UserError(f"--topology {topology.name}: {remedy} ({message.splitlines()[0][:200]})")


_held: list[Any] = []


def _wait_for_the_compiler(say: Callable[[str], None]) -> None:
    """libtpu serves one process a machine and aborts a second one; plans wait for each other here until they exit."""
    if _held:
        return
    path = Path(tempfile.gettempdir()) / "mpd-jax-plan.lock"
    file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o666), "a")  # held until the process ends
    with suppress(PermissionError):  # somebody else's, who has opened it to all
        path.chmod(0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another plan on this machine: the TPU compiler serves one process at a time")
        fcntl.flock(file, fcntl.LOCK_EX)
    _held.append(file)


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of abstract ones with shardings, on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if getattr(leaf, "sharding", None) is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def shards(mesh: Mesh) -> int:
    """Devices that hold different rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
