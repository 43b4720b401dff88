"""A decoder's shape and physics, read from a Hugging Face config.json: every key is used, ignored by name, or refused.

Nothing that comes from a checkpoint has a default here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mpd_jax.types import UserError


@dataclass(frozen=True)
class ModelSpec:
    """A model section of a run's config (`student`, `teacher`, `rewriter`).

    path:        a local directory, a gs:// address, a hub id, or tiny:student / tiny:teacher.
    revision:    the commit of a hub id, 40 hexadecimal digits.
    dtype:       of the computation. param_dtype: of the weights as held.
    remat:       what the backward pass computes again: none, full (every layer), dots (all but matrix products).
    attention:   the kernel of training and scoring: splash (TPU), cudnn (GPU, bfloat16), reference (anywhere, costly in
                 long rows), or auto, which takes the one of the mesh's devices; see kernels.choose.
    thinking:    the template's enable_thinking.
    serve:       who answers with this model: jax, a sampler on the mesh; or the address of a vLLM server that holds it,
                 http://host:8000, or several such addresses in a list. See sampling.server and sampling.push.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    attention: Literal["auto", "reference", "splash", "cudnn"] = "auto"
    thinking: bool = True
    serve: str | tuple[str, ...] = "jax"

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses in `serve`; none where the model answers on the mesh."""
        if self.serve == "jax":
            return ()
        return (self.serve,) if isinstance(self.serve, str) else self.serve


@dataclass(frozen=True)
class RopeScaling:
    """llama3 rope scaling; see attention.rope_frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Experts:
    """How many experts a layer has, how many of them a token goes through, and whether their weights sum to one."""

    count: int
    per_token: int
    normalised: bool


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass depends on. intermediate_size: of the feed-forward, or of each expert.

    experts: None in a dense decoder, which is what the default is for.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    max_position_embeddings: int
    experts: Experts | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """The config of a parsed config.json. UserError names every key that is missing or not supported."""
        return _from_hf(hf)


FAMILIES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
# Keys that may only have the values of a plain decoder, whose layers are all alike. Absent or null means the same.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pretraining_tp": (0, 1),
}
# Keys that do not change the forward pass. sliding_window and max_window_layers count only with use_sliding_window.
IGNORED = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "attention_dropout",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "do_sample",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "max_length",
        "max_new_tokens",
        "max_window_layers",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "repetition_penalty",
        "return_dict",
        "sliding_window",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    ]
)


class _Reader:
    """A config.json being read: what is wrong with it is collected, so that one message names everything."""

    def __init__(self, hf: Mapping[str, Any]):
        self.hf = hf
        self.read: set[str] = set()
        self.problems: list[str] = []

    def get(self, key: str) -> Any:
        self.read.add(key)
        return self.hf.get(key)

    def number(self, key: str, value: Any, kind: type[int] | type[float] = int) -> Any:
        """A positive int or float; 1 where it is wrong, so that reading goes on."""
        if value is None:
            self.problems.append(f"{key} is missing")
        elif type(value) not in (int, kind) or not 0 < value < float("inf"):
            self.problems.append(f"{key} = {value!r} must be a positive {'whole ' if kind is int else ''}number")
        else:
            return kind(value)
        return kind(1)

    def flag(self, key: str, absent: bool | None = None) -> bool:
        """True or false. `absent`: what the format means by leaving the key out; None if it must be there."""
        value = self.get(key)
        value = absent if value is None else value
        if value is None:
            self.problems.append(f"{key} is missing")
        elif not isinstance(value, bool):
            self.problems.append(f"{key} = {value!r} must be true or false")
        return value is True

    def finish(self) -> None:
        for key, allowed in FIXED.items():
            value = self.get(key)
            if value is not None and value not in allowed:
                self.problems.append(f"{key} = {value!r} is not supported; {' or '.join(map(repr, allowed))} is")
        layer_types = self.get("layer_types") or []
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            self.problems.append(f"layer_types = {layer_types!r}: only a list of 'full_attention' is supported")
        if self.get("quantization_config") is not None:
            self.problems.append("quantization_config: quantised weights are not supported; use the unquantised model")
        for key in sorted(set(self.hf) - self.read - IGNORED):
            if self.hf[key] is not None:
                self.problems.append(f"{key} = {self.hf[key]!r} is not known, and may change what the model computes")
        if self.problems:
            raise UserError(
                "config.json is not of a supported model:\n  "
                + "\n  ".join(self.problems)
                + "\nUse a Qwen3, Qwen3-MoE, Qwen2 or Llama model with a complete config.json."
            )


def _rope(reader: _Reader) -> tuple[float, RopeScaling | None]:
    """Base and scaling: transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling."""
    theta, old, new = (reader.get(key) for key in ("rope_theta", "rope_scaling", "rope_parameters"))
    name, rope = ("rope_parameters", new) if new else ("rope_scaling", old or {})
    if not isinstance(rope, Mapping) or (new and old and new != old):
        reader.problems.append(f"{name} = {rope!r} is no object, or differs from rope_scaling = {old!r}")
        rope = {}
    rope = {key: value for key, value in rope.items() if value is not None}
    inner = rope.pop("rope_theta", None)
    if None not in (theta, inner) and theta != inner:
        reader.problems.append(f"rope_theta = {theta!r} differs from {name}.rope_theta = {inner!r}")
    base = reader.number("rope_theta", theta if inner is None else inner, float)
    kinds = {str(rope.pop(key)) for key in ("rope_type", "type") if key in rope} or {"default"}
    scaling = None
    if kinds == {"llama3"}:
        factors = dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), float)
        fields = {**factors, "original_max_position_embeddings": int}
        scaling = RopeScaling(
            **{key: reader.number(f"{name}.{key}", rope.pop(key, None), kind) for key, kind in fields.items()}
        )
        if not scaling.low_freq_factor < scaling.high_freq_factor and not reader.problems:
            reader.problems.append(f"{name}.low_freq_factor must be below {name}.high_freq_factor")
    elif kinds != {"default"}:
        reader.problems.append(f"{name}.rope_type = {sorted(kinds)} is not supported; 'default' or 'llama3' is")
        rope = {}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        reader.problems.append(f"{name}.partial_rotary_factor is not supported; 1.0 is")
    reader.problems.extend(f"{name}.{key} = {value!r} is not known" for key, value in sorted(rope.items()))
    return base, scaling


def _experts(reader: _Reader, family: str) -> Experts | None:
    """The experts of a layer. Layers are scanned, so all of them must have some."""
    if family != "qwen3_moe":
        return None
    old, new = (reader.get(key) for key in ("num_experts", "num_local_experts"))  # as transformers 4 and 5 write it
    if None not in (old, new) and old != new:
        reader.problems.append(f"num_experts = {old!r} differs from num_local_experts = {new!r}")
    count = reader.number("num_experts", new if old is None else old)
    per_token = reader.number("num_experts_per_tok", reader.get("num_experts_per_tok"))
    if per_token > count and not reader.problems:
        reader.problems.append(f"num_experts_per_tok = {per_token} must not be above num_experts = {count}")
    step, dense = reader.get("decoder_sparse_step"), reader.get("mlp_only_layers")
    if step not in (None, 1):
        reader.problems.append(f"decoder_sparse_step = {step!r} is not supported; 1, experts in every layer, is")
    if dense not in (None, []):
        reader.problems.append(f"mlp_only_layers = {dense!r} is not supported; an empty list, no dense layer, is")
    # The width of dense layers, of which there are none; and what only a training loss of the router would read.
    reader.read |= {"intermediate_size", "output_router_logits", "router_aux_loss_coef"}
    return Experts(count, per_token, reader.flag("norm_topk_prob"))


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    reader = _Reader(hf)
    architectures = reader.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(f"config.json: architectures = {architectures!r} is not supported; {', '.join(FAMILIES)} are")
    family = FAMILIES[architecture]
    if reader.get("model_type") != family:
        reader.problems.append(f"model_type = {hf.get('model_type')!r} must be {family!r} for {architecture}")
    vocab, width, layers, heads, kv_heads, window = (reader.number(key, reader.get(key)) for key in COUNTS)
    inner = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    head_dim = reader.get("head_dim")
    if head_dim is None and family != "qwen3":  # Qwen3 means 128 by leaving it out, the others hidden / heads
        head_dim = width // heads
        if width % heads:
            reader.problems.append(f"hidden_size = {width} must be a multiple of num_attention_heads = {heads}")
    head_dim = reader.number("head_dim", head_dim)
    if head_dim % 2 and not reader.problems:
        reader.problems.append(f"head_dim = {head_dim} must be even")
    if heads % kv_heads:
        reader.problems.append(f"num_attention_heads = {heads} must be a multiple of num_key_value_heads = {kv_heads}")
    theta, scaling = _rope(reader)
    # Files from before these keys existed leave them out and mean none; the tensors' names would show a mistake.
    attention_bias, mlp_bias = (reader.flag(key, absent=False) for key in ("attention_bias", "mlp_bias"))
    if mlp_bias and family != "llama":
        reader.problems.append(f"mlp_bias = True is not supported for {architecture}; false is")
    config = ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=reader.number(inner, reader.get(inner)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", reader.get("rms_norm_eps"), float),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias and family != "qwen2",
        mlp_bias=mlp_bias,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tie_embeddings=reader.flag("tie_word_embeddings"),
        max_position_embeddings=window,
        experts=_experts(reader, family),
    )
    reader.finish()
    return config
