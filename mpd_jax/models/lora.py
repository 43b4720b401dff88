"""Low-rank adapters: a small tree that trains beside weights that do not, y = x W + alpha / rank (x A) B.

Arrays lie as those of the decoder do, stacked by layer: A [L, in..., rank], B [L, rank, out...], always float32.
The product A B is formed only where weights are merged, for sampling and export. Files: models/peft.py.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mpd_jax.models.config import ModelSpec
from mpd_jax.models.decoder import Model, Weights
from mpd_jax.sharding import tree_shardings
from mpd_jax.types import UserError

# Hugging Face's name of a projection: module and array of ours.
TARGETS = {
    "q_proj": ("attention", "q"),
    "k_proj": ("attention", "k"),
    "v_proj": ("attention", "v"),
    "o_proj": ("attention", "o"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}


@dataclass(frozen=True)
class LoraConfig:
    """`student.lora`: the rank of the adapter, alpha (its product counts alpha / rank times), and where it is added."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = tuple(TARGETS)

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UserError(f"student.lora.{name} = {value} is not allowed; it must be above 0")
        wrong = [name for name in self.target_modules if name not in TARGETS]
        twice = len(set(self.target_modules)) < len(self.target_modules)
        if wrong or twice or not self.target_modules:
            raise UserError(
                f"student.lora.target_modules = {wrong or list(self.target_modules)} is not allowed; name some of "
                f"{', '.join(TARGETS)}, each once"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class StudentSpec(ModelSpec):
    """The `student` section: a model, and how it trains.

    lora:    an adapter trains and the model's own weights stay as they are; null: all weights train.
    adapter: a PEFT directory that the adapter starts from; null: a new one, whose product is zero.
    """

    lora: LoraConfig | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.adapter is not None and self.lora is None:
            raise UserError(
                f"student.adapter: {self.adapter} is where an adapter starts, and none trains; set student.lora to its "
                "rank and alpha, or remove student.adapter"
            )


@dataclass(frozen=True)
class Adapted:
    """A model of which an adapter trains. Beside `Model` itself, the other thing that `train` can train.

    `init`, `abstract` and `logical_axes` are of the adapter; `hidden` and `head` read the weights that `over` makes.
    """

    model: Model
    lora: LoraConfig

    def __post_init__(self) -> None:
        blocks = self.model.abstract()["blocks"]
        absent = [target for target in self.lora.target_modules if TARGETS[target][1] not in blocks[TARGETS[target][0]]]
        if absent:
            raise UserError(
                f"student.lora.target_modules = {absent} is not allowed for this model, whose feed-forward layers are "
                "experts; leave gate_proj, up_proj and down_proj out"
            )

    def on(self, mesh: Mesh | None) -> "Adapted":
        """See `Model.on`."""
        return replace(self, model=self.model.on(mesh))

    @property
    def attention(self) -> str:
        return self.model.attention

    def precision(self) -> AbstractContextManager:
        """See `Model.precision`."""
        return self.model.precision()

    def init(self, key: jax.Array) -> Weights:
        """A as PEFT draws it, uniform up to 1 / sqrt(in) either way; B zero, so that nothing changes yet."""

        def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
            module, name, part = (key.key for key in path)
            if part == "b":
                return jnp.zeros(shape.shape)
            fan_in = shape.size // shape.shape[0] // shape.shape[-1]
            number = list(TARGETS.values()).index((module, name))
            bound = fan_in**-0.5
            return jax.random.uniform(jax.random.fold_in(key, number), shape.shape, minval=-bound, maxval=bound)

        return jax.tree_util.tree_map_with_path(leaf, self.abstract())

    def abstract(self) -> Weights:
        """Shapes and dtypes of `init`."""

        def pair(shape: jax.ShapeDtypeStruct, inputs: int) -> tuple[jax.ShapeDtypeStruct, ...]:
            (layers, *rest), rank = shape.shape, self.lora.rank
            a, b = (layers, *rest[:inputs], rank), (layers, rank, *rest[inputs:])
            return jax.ShapeDtypeStruct(a, jnp.float32), jax.ShapeDtypeStruct(b, jnp.float32)

        return self._tree(self.model.abstract()["blocks"], pair)

    def logical_axes(self) -> Weights:
        """The tree of `init` with a tuple of logical axis names for every array."""

        def pair(axes: tuple[str, ...], inputs: int) -> tuple[tuple[str, ...], ...]:
            layers, *rest = axes
            return (layers, *rest[:inputs], "rank"), (layers, "rank", *rest[inputs:])

        return self._tree(self.model.logical_axes()["blocks"], pair)

    def shardings(self, mesh: Mesh) -> Any:
        """Where the adapter lives while it trains."""
        return tree_shardings(mesh, self.logical_axes(), self.abstract(), "train")

    def over(self, base: Weights, adapter: Weights | None) -> Weights:
        """The weights to read with: `base`, the very arrays, and the adapter beside them; None switches it off."""
        if adapter is None:
            return base
        scaled = {
            module: {name: {**x, "b": self.lora.scale * x["b"]} for name, x in arrays.items()}
            for module, arrays in adapter.items()
        }
        return {**base, "adapter": scaled}

    def hidden(self, weights: Weights, *args: Any, **kwargs: Any) -> jax.Array:
        return self.model.hidden(weights, *args, **kwargs)

    def head(self, weights: Weights) -> jax.Array:
        return self.model.head(weights)

    def _tree(self, blocks: Weights, pair: Any) -> Weights:
        """A tree of A and B made of something known of each target's weight; `inputs`: how many axes it reads."""
        tree: Weights = {}
        for target in self.lora.target_modules:
            module, name = TARGETS[target]
            a, b = pair(blocks[module][name], 2 if name == "o" else 1)
            tree.setdefault(module, {})[name] = {"a": a, "b": b}
        return tree
