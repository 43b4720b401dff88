"""Hugging Face directories in and out: one table of names, weights streamed slice by slice both ways.

Reading gives every device only its own part; nothing holds the model a second time. A directory is written under a
temporary name and renamed when it is whole.
"""

import errno
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model, Weights
from mpd_jax.sharding import tree_shardings
from mpd_jax.types import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
READABLE = ("F32", "BF16", "F16")
COPIED = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
# Buffers that old checkpoints carry and that the config alone decides.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# Our array: its name, and for each of its dimensions in the file the axes of ours it holds, not counting those along
# which tensors are stacked: one for every {} of the name, layers and then experts.
_LAYER, _EXPERT = "model.layers.{}.", "model.layers.{}.mlp.experts.{}."
_BIAS, _AS_IS = ((0, 1),), ((0,),)
_TABLE, _IN_OUT, _TO_HEADS, _FROM_HEADS = ((0,), (1,)), ((1,), (0,)), ((1, 2), (0,)), ((2,), (0, 1))
NAMES: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "embed": ("model.embed_tokens.weight", _TABLE),
    "blocks.attention_norm.scale": (_LAYER + "input_layernorm.weight", _AS_IS),
    "blocks.attention.q": (_LAYER + "self_attn.q_proj.weight", _TO_HEADS),
    "blocks.attention.q_bias": (_LAYER + "self_attn.q_proj.bias", _BIAS),
    "blocks.attention.k": (_LAYER + "self_attn.k_proj.weight", _TO_HEADS),
    "blocks.attention.k_bias": (_LAYER + "self_attn.k_proj.bias", _BIAS),
    "blocks.attention.v": (_LAYER + "self_attn.v_proj.weight", _TO_HEADS),
    "blocks.attention.v_bias": (_LAYER + "self_attn.v_proj.bias", _BIAS),
    "blocks.attention.o": (_LAYER + "self_attn.o_proj.weight", _FROM_HEADS),
    "blocks.attention.o_bias": (_LAYER + "self_attn.o_proj.bias", _AS_IS),
    "blocks.attention.q_norm.scale": (_LAYER + "self_attn.q_norm.weight", _AS_IS),
    "blocks.attention.k_norm.scale": (_LAYER + "self_attn.k_norm.weight", _AS_IS),
    "blocks.mlp_norm.scale": (_LAYER + "post_attention_layernorm.weight", _AS_IS),
    "blocks.mlp.gate": (_LAYER + "mlp.gate_proj.weight", _IN_OUT),
    "blocks.mlp.gate_bias": (_LAYER + "mlp.gate_proj.bias", _AS_IS),
    "blocks.mlp.up": (_LAYER + "mlp.up_proj.weight", _IN_OUT),
    "blocks.mlp.up_bias": (_LAYER + "mlp.up_proj.bias", _AS_IS),
    "blocks.mlp.down": (_LAYER + "mlp.down_proj.weight", _IN_OUT),
    "blocks.mlp.down_bias": (_LAYER + "mlp.down_proj.bias", _AS_IS),
    "blocks.mlp.router": (_LAYER + "mlp.gate.weight", _IN_OUT),
    "blocks.mlp.expert_gate": (_EXPERT + "gate_proj.weight", _IN_OUT),
    "blocks.mlp.expert_up": (_EXPERT + "up_proj.weight", _IN_OUT),
    "blocks.mlp.expert_down": (_EXPERT + "down_proj.weight", _IN_OUT),
    "final_norm.scale": ("model.norm.weight", _AS_IS),
    "head": ("lm_head.weight", _TABLE),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its name, its shape there, and where it stands in our arrays.

    at: its index along the stacked axes: () alone, (layer,) or (layer, expert).
    """

    name: str
    shape: tuple[int, ...]
    ours: str
    at: tuple[int, ...]


def _path(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)


def _flat(tree: Any) -> dict[str, Any]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _tensors(model: Model) -> list[Tensor]:
    """Every tensor of a checkpoint of this model, layer by layer."""
    shapes = {ours: leaf.shape for ours, leaf in _flat(model.abstract()).items()}

    def tensor(ours: str, *at: int) -> Tensor:
        name, axes = NAMES[ours]
        inner = shapes[ours][len(at) :]
        shape = tuple(math.prod(inner[axis] for axis in group) for group in axes)
        return Tensor(name.format(*at), shape, ours, at)

    def layer(ours: str, number: int) -> Iterator[Tensor]:
        for rest in np.ndindex(shapes[ours][1 : NAMES[ours][0].count("{}")]):
            yield tensor(ours, number, *rest)

    stacked = [ours for ours in NAMES if ours in shapes and ours.startswith("blocks.")]
    layers = range(model.config.num_layers)
    blocks = [one for number in layers for ours in stacked for one in layer(ours, number)]
    alone = {ours: tensor(ours) for ours in ("embed", "final_norm.scale", "head") if ours in shapes}
    assert len(stacked) + len(alone) == len(shapes), f"no name for {sorted(set(shapes) - set(stacked) - set(alone))}"
    return [alone.pop("embed"), *blocks, *alone.values()]


# Reading


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {file.name}; give a Hugging Face model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); copy it again from the model's source") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object; copy it again from the model's source")
    return content


def load_config(directory: Path | str) -> ModelConfig:
    """The model's config. UserError names every key that is missing or not supported."""
    try:
        return ModelConfig.from_hf(_json(Path(directory) / CONFIG))
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None


def eos_ids(directory: Path | str) -> frozenset[int]:
    """The ids that end a response: generation_config.json's, else config.json's."""
    directory = Path(directory)
    for name in (GENERATION, CONFIG):
        if ids := eos_in(directory / name):
            return ids
    raise UserError(
        f"{directory}: neither {GENERATION} nor {CONFIG} names an eos_token_id, so no response would end; add it"
    )


def eos_in(file: Path) -> frozenset[int]:
    """The ids that one of the two files names; none where it is not there."""
    ids = _json(file).get("eos_token_id") if file.is_file() else None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise UserError(f"{file}: eos_token_id = {ids} is not allowed; give a token id or a list of them")
    return frozenset(ids)


class _Checkpoint:
    """The open files of a directory, and which holds which tensor."""

    def __init__(self, directory: Path, stack: ExitStack):
        self.directory = directory
        self.file_of: dict[str, str] = {}
        self.problems: list[str] = []
        listed = self._listed()
        self._open: dict[str, Any] = {}
        for file in sorted(set(listed.values())) or [SINGLE]:
            try:
                self._open[file] = stack.enter_context(safe_open(directory / file, framework="numpy"))
            except OSError:
                raise UserError(f"{directory}: {INDEX} lists {file}, which is not there; download it again") from None
            except SafetensorError as error:
                raise UserError(f"{directory / file} cannot be read ({error}); download it again") from None
            self.file_of.update(dict.fromkeys(self._open[file].keys(), file))
        wrong = sorted(name for name, file in listed.items() if self.file_of.get(name) != file)
        self.problems.extend(f"{name} is listed in {INDEX} but not in {listed[name]}" for name in wrong)

    def _listed(self) -> Mapping[str, str]:
        """The index, empty where one file holds everything."""
        directory = self.directory
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory; give a Hugging Face model directory")
        single, index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
        if single and index:
            raise UserError(f"{directory} holds both {SINGLE} and {INDEX}; remove the one that is not the model")
        if not single and not index:
            there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
            raise UserError(f"{directory} has no weights ({SINGLE} or {INDEX}), only: {there}; convert to safetensors")
        files = {} if single else _json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise UserError(f"{directory / INDEX} has no weight_map of tensor and file names; download it again")
        return files

    def tensor(self, name: str) -> Any:
        """A tensor that is read when it is sliced."""
        return self._open[self.file_of[name]].get_slice(name)

    def check(self, tensors: Sequence[Tensor], tied: bool) -> None:
        """UserError that lists every missing, extra, misshapen or unreadable tensor."""
        problems = self.problems
        for tensor in tensors:
            if tensor.name not in self.file_of:
                problems.append(f"{tensor.name} is missing")
                continue
            held = self.tensor(tensor.name)
            if tuple(held.get_shape()) != tensor.shape:
                problems.append(f"{tensor.name} has shape {tuple(held.get_shape())}, the config says {tensor.shape}")
            if held.get_dtype() not in READABLE:
                problems.append(f"{tensor.name} is stored as {held.get_dtype()}; {', '.join(READABLE)} can be read")
        extra = set(self.file_of) - {tensor.name for tensor in tensors}
        if tied and "lm_head.weight" in extra and not problems:
            extra.discard("lm_head.weight")
            if not self._same("lm_head.weight", "model.embed_tokens.weight"):
                problems.append("lm_head.weight differs from the embedding although tie_word_embeddings is true")
        problems.extend(f"{name} is not part of the model" for name in sorted(extra) if not DERIVED.fullmatch(name))
        if problems:
            raise UserError(
                f"{self.directory}: the weights do not fit {CONFIG}:\n  "
                + "\n  ".join(problems)
                + "\nUse the config and the weights of one model."
            )

    def _same(self, left: str, right: str, rows: int = 4096) -> bool:
        a, b = self.tensor(left), self.tensor(right)
        if a.get_shape() != b.get_shape():
            return False
        size = a.get_shape()[0]
        cuts = [slice(at, min(at + rows, size)) for at in range(0, size, rows)]
        return all(np.array_equal(*(x[cut].astype(np.float32) for x in (a, b))) for cut in cuts)

    def read(self, tensor: Tensor, shape: Sequence[int], part: Sequence[slice]) -> np.ndarray:
        """The part `part` of our array of shape `shape` (no stacked axis) that this tensor holds."""
        _, axes = NAMES[tensor.ours]
        bounds = [bound.indices(size)[:2] for bound, size in zip(part, shape, strict=True)]
        cut = []
        for first, *rest in axes:
            inner = math.prod(shape[axis] for axis in rest)
            assert all(bounds[axis] == (0, shape[axis]) for axis in rest), f"{tensor.name} is split inside a head"
            cut.append(slice(bounds[first][0] * inner, bounds[first][1] * inner))
        order = [axis for group in axes for axis in group]
        block = self.tensor(tensor.name)[tuple(cut)]
        if not np.isfinite(block).all():
            raise UserError(f"{self.directory}: {tensor.name} holds values that are not finite; download it again")
        block = block.reshape([bounds[axis][1] - bounds[axis][0] for axis in order])
        return block.transpose(np.argsort(order))


def load_weights(directory: Path | str, model: Model, mesh: Mesh, param_dtype: str = "float32") -> Weights:
    """The weights of a directory, in the training layout of `mesh`. Every tensor must be there, and no other."""
    tensors = _tensors(model)
    shapes, treedef = jax.tree_util.tree_flatten_with_path(model.abstract())
    shardings = _flat(tree_shardings(mesh, model.logical_axes(), model.abstract(), "train"))
    by_ours: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_ours.setdefault(tensor.ours, []).append(tensor)
    dtype = DTYPES[param_dtype]
    with ExitStack() as stack:
        checkpoint = _Checkpoint(Path(directory), stack)
        checkpoint.check(tensors, model.config.tie_embeddings)
        leaves = []
        for path, leaf in shapes:
            ours = _path(path)
            leaves.append(_load(checkpoint, by_ours[ours], leaf.shape, shardings[ours], dtype))
        return jax.tree.unflatten(treedef, leaves)


def _load(
    checkpoint: _Checkpoint, tensors: list[Tensor], shape: tuple[int, ...], sharding: NamedSharding, dtype: np.dtype
) -> jax.Array:
    """One of our arrays, one device's part after the other: the host holds a single part, each of its tensors alone."""
    tensor_at = {tensor.at: tensor for tensor in tensors}
    stacked = len(tensors[0].at)

    def part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        block = np.empty([stop - start for start, stop in bounds], dtype)
        inner = [slice(*bound) for bound in bounds[stacked:]]
        for at in itertools.product(*(range(*bound) for bound in bounds[:stacked])):
            row = tuple(index - start for index, (start, _) in zip(at, bounds[:stacked], strict=True))
            block[row] = checkpoint.read(tensor_at[at], shape[stacked:], inner)
        return block

    devices_of: dict[tuple, list[Any]] = {}  # several where they hold the same part
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in devices_of.items():
        block = part(bounds)
        pieces.extend(jax.block_until_ready([jax.device_put(block, device) for device in devices]))
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


# Writing


def export(
    out: Path | str,
    source: Path | str,
    model: Model,
    weights: Weights,
    *,
    dtype: str = "bfloat16",
    untie: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes `out`, which transformers loads unchanged: these weights, with the config and tokenizer of `source`.

    Everything but the weights and the config's dtype is copied byte for byte. An adapter among the weights is merged.
    untie: a head that is the embedding is written as one of its own, and the config says so. A server that reloads
    weights while it runs may go on with the old ones in a head that is not among them.
    """
    source = Path(source)
    with drafted(Path(out), dtype) as draft:
        assert load_config(source) == model.config, f"{source} describes another model than the weights'"
        config = _json(source / CONFIG)
        if "adapter" in weights:
            places = jax.tree.map(lambda w: w.sharding, {k: w for k, w in weights.items() if k != "adapter"})
            weights = jax.jit(model.merged, out_shardings=places)(weights)
        if untie and model.config.tie_embeddings:
            model = replace(model, config=replace(model.config, tie_embeddings=False))
            weights, config["tie_word_embeddings"] = {**weights, "head": weights["embed"]}, False
        shards = _plan(_tensors(model), DTYPES[dtype].itemsize, max_shard_bytes)
        _write_weights(draft, shards, _flat(weights), DTYPES[dtype])
        if draft is not None:
            _write_rest(draft, source, config, dtype)
    return Path(out)


@contextmanager
def drafted(out: Path, dtype: str) -> Iterator[Path | None]:
    """A directory that becomes `out` when the block is over; `out` must not exist or be empty.

    Where several processes hold the weights, all enter; the first one writes, and the others get None. (`mpd-jax
    export` is one process.) Nothing is left behind by an error.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not allowed; it must be one of {', '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty directory; choose another name or remove it")
    writer = jax.process_index() == 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)) if writer else None
    except OSError as error:
        raise UserError(f"{out}: its directory cannot be made ({error.strerror}); choose another") from error
    try:
        yield draft
        if draft is not None:
            draft.chmod(0o755)  # mkdtemp's own is for this user alone
            draft.replace(out)
    except BaseException:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        raise


def _plan(tensors: Sequence[Tensor], itemsize: int, limit: int) -> list[list[Tensor]]:
    """Tensors by file, in order, no file above `limit` bytes unless one tensor is."""
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size
    return shards


def _write_weights(
    draft: Path | None, shards: list[list[Tensor]], arrays: Mapping[str, jax.Array], dtype: np.dtype
) -> None:
    """The weight files, and the index where there are several. Without `draft` only the gathers are taken part in."""
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    weight_map, total = {}, 0
    for file, shard in zip(names, shards, strict=True):
        block = {}
        for tensor in shard:
            array = _host(arrays[tensor.ours], tensor)
            if draft is None:
                continue
            block[tensor.name] = _to_file(array, tensor, dtype)
            weight_map[tensor.name], total = file, total + block[tensor.name].nbytes
        if draft is not None:
            save_tensors(draft / file, block)
    if draft is not None and count > 1:
        write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _host(array: Any, tensor: Tensor) -> np.ndarray:
    """One tensor of a stacked array, or an array that stands alone, whole on this host."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding), array.sharding
        return np.asarray(_taken(array.sharding.mesh)(array, tensor.at))
    return np.asarray(array[tensor.at])


@lru_cache(maxsize=8)
def _taken(mesh: Mesh | AbstractMesh) -> Any:
    """(array, at) -> array[at] whole on every device; compiled once a shape, not for every layer and expert."""
    return jax.jit(lambda array, at: array[at], out_shardings=NamedSharding(mesh, PartitionSpec()))


def _to_file(array: np.ndarray, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    order = [axis for group in NAMES[tensor.ours][1] for axis in group]
    # safetensors writes the memory as it lies: a transposed view would be stored untransposed.
    with np.errstate(over="ignore"):
        block = np.ascontiguousarray(array.transpose(order).reshape(tensor.shape).astype(dtype))
    if dtype == np.float16 and not np.isfinite(block).all():
        raise UserError(f"dtype = float16 cannot hold {tensor.name}, which has values above 65504; use bfloat16")
    return block


def save_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the library hides the system's error in its text
        found = re.search(r"os error (\d+)", str(error))
        number = int(found.group(1)) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(file)) from error
    file.chmod(0o644)  # safetensors leaves it readable by its writer alone, and a server may run as another user


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sources(source: Path) -> Iterator[Path]:
    yield from (file for pattern in COPIED for file in sorted(source.glob(pattern)) if file.is_file())


def _write_rest(draft: Path, source: Path, config: Mapping[str, Any], dtype: str) -> None:
    """The config with its dtype, and the source's own bytes of everything else."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # readers take either
    write_json(draft / CONFIG, {**config, **dict.fromkeys(keys, dtype)})
    for file in _sources(source):
        target = draft / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
