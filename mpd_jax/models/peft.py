"""Adapters as directories in PEFT's format, in and out: adapter_config.json and adapter_model.safetensors.

Every key of the config is used, known not to change the adapter's product, or refused unless it is off. Pickled weights
are never read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from mpd_jax.models.decoder import Weights
from mpd_jax.models.hf_weights import DTYPES, NAMES, READABLE, drafted, save_tensors, write_json
from mpd_jax.models.lora import TARGETS, Adapted, LoraConfig
from mpd_jax.types import UserError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian"),  # some of the others change the base as well
}
USED = ("r", "lora_alpha", "target_modules")
# Names that cannot be checked, and what has an effect only in training or beside a key that must be off.
IGNORED = (
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
)
OFF = (None, False, "", [], {})


class _Tensor(NamedTuple):
    """A tensor of the file, and one layer of the array of ours that it holds, which lies the other way round there."""

    name: str
    shape: tuple[int, int]
    ours: tuple[str, str, str]
    layer: int


def _tensors(adapted: Adapted) -> list[_Tensor]:
    shapes, found = adapted.abstract(), []
    for layer in range(adapted.model.config.num_layers):
        for target in adapted.lora.target_modules:
            module, name = TARGETS[target]
            stem = NAMES[f"blocks.{module}.{name}"][0].format(layer).removesuffix(".weight")
            for part, inputs in (("a", slice(1, -1)), ("b", slice(2, None))):
                width, rank = int(np.prod(shapes[module][name][part].shape[inputs])), adapted.lora.rank
                shape = (rank, width) if part == "a" else (width, rank)
                full = f"base_model.model.{stem}.lora_{part.upper()}.weight"
                found.append(_Tensor(full, shape, (module, name, part), layer))
    return found


def load_adapter(directory: Path | str, adapted: Adapted, mesh: Mesh) -> Weights:
    """The adapter in a PEFT directory, in the training layout of `mesh`; it must be as `adapted` describes it."""
    directory = Path(directory)
    _check_config(directory, adapted.lora)
    tensors = _tensors(adapted)
    held = _read(directory, tensors)
    stacks: dict[tuple[str, str, str], list[np.ndarray]] = {}
    for tensor in tensors:
        stacks.setdefault(tensor.ours, []).append(held[tensor.name].T)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct, place: Any) -> jax.Array:
        stack = np.stack(stacks[tuple(key.key for key in path)]).astype(np.float32).reshape(shape.shape)
        return jax.make_array_from_callback(shape.shape, place, lambda index: stack[index])

    return jax.tree_util.tree_map_with_path(leaf, adapted.abstract(), adapted.shardings(mesh))


def _check_config(directory: Path, lora: LoraConfig) -> None:
    """UserError that names every key which another adapter than `lora` would have."""
    file = directory / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except FileNotFoundError:
        raise UserError(f"student.adapter: {directory} has no {CONFIG}; give a directory that PEFT wrote") from None
    except (OSError, ValueError, AssertionError):
        raise UserError(f"student.adapter: {file} does not hold a JSON object; copy it again") from None
    problems = [
        f"{key} = {config.get(key)!r} is not supported; it must be {allowed[0]!r}"
        for key, allowed in FIXED.items()
        if config.get(key, allowed[-1]) not in allowed
    ]
    rest = config.keys() - FIXED.keys() - {*USED, *IGNORED}
    problems += [f"{key} = {config[key]!r} is not supported" for key in sorted(rest) if config[key] not in OFF]
    targets = config.get("target_modules")
    there = sorted(targets) if isinstance(targets, list) and all(isinstance(t, str) for t in targets) else targets
    for ours, value, theirs, held in (
        ("rank", lora.rank, "r", config.get("r")),
        ("alpha", lora.alpha, "lora_alpha", config.get("lora_alpha")),
        ("target_modules", sorted(lora.target_modules), "target_modules", there),
    ):
        if held != value:
            problems.append(f"{theirs} = {held!r}, and student.lora.{ours} = {value!r}; set that to the same")
    if problems:
        raise UserError(f"student.adapter: {file}:\n  " + "\n  ".join(problems))


def _read(directory: Path, tensors: list[_Tensor]) -> Mapping[str, np.ndarray]:
    """Every tensor of the file, which holds these and no other."""
    file = directory / WEIGHTS
    if not file.is_file():
        pickled = f"; {PICKLED} is a pickle, which runs code when it is read" if (directory / PICKLED).exists() else ""
        raise UserError(f"student.adapter: {directory} has no {WEIGHTS}{pickled}; save the adapter as safetensors")
    wanted = {tensor.name: tensor.shape for tensor in tensors}
    try:
        with safe_open(file, framework="numpy") as opened:
            names = set(opened.keys())
            problems = [f"{name} is missing" for name in wanted if name not in names]
            problems += [f"{name} is not part of the adapter" for name in sorted(names - wanted.keys())]
            for name in sorted(names & wanted.keys()):
                held = opened.get_slice(name)
                if tuple(held.get_shape()) != wanted[name]:
                    problems.append(f"{name} has shape {tuple(held.get_shape())}, and {wanted[name]} fits the student")
                elif held.get_dtype() not in READABLE:
                    problems.append(f"{name} is stored as {held.get_dtype()}; {', '.join(READABLE)} can be read")
            arrays = {} if problems else {name: opened.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise UserError(f"student.adapter: {file} cannot be read ({error}); copy it again") from None
    problems += [f"{name} holds values that are not finite" for name, x in arrays.items() if not np.isfinite(x).all()]
    if problems:
        raise UserError(f"student.adapter: {file}:\n  " + "\n  ".join(problems))
    return arrays


def export_adapter(
    out: Path | str,
    adapted: Adapted,
    adapter: Weights,
    base: str,
    revision: str | None = None,
    *,
    dtype: str = "float32",
) -> Path:
    """Writes `out`, which PEFT and vLLM load over `base`: a hub id at `revision`, or a directory.

    `out` must not exist or be empty. Where several processes hold the adapter, all call this; the first one writes.
    """
    lora = adapted.lora
    with drafted(Path(out), dtype) as draft:
        whole = jax.tree.map(_on_host, adapter)
        if draft is not None:
            blocks = {}
            for tensor in _tensors(adapted):
                module, name, part = tensor.ours
                ours = whole[module][name][part][tensor.layer].reshape(tensor.shape[::-1])
                blocks[tensor.name] = np.ascontiguousarray(ours.T.astype(DTYPES[dtype]))
            save_tensors(draft / WEIGHTS, blocks)
            config = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base,
                "revision": revision,
                "r": lora.rank,
                "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
                "target_modules": list(lora.target_modules),
                "lora_dropout": 0.0,
                "bias": "none",
                "modules_to_save": None,
                "inference_mode": True,
            }
            write_json(draft / CONFIG, config)
    return Path(out)


def _on_host(array: jax.Array) -> np.ndarray:
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))
