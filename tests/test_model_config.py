"""A config.json is understood whole: every key is used, read over by name, or refused by name."""

import pytest

from mpd_jax.models.config import Experts, ModelConfig, RopeScaling
from mpd_jax.types import UserError

HF = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "tie_word_embeddings": True,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}


def from_hf(leave_out=(), **changed):
    return ModelConfig.from_hf({k: v for k, v in {**HF, **changed}.items() if k not in leave_out})


def test_both_spellings_of_rotary_positions_mean_the_same():
    assert from_hf().rope_theta == 5e6 and from_hf().rope_scaling is None
    new = {"rope_type": "default", "rope_theta": 5e6}
    assert from_hf(["rope_theta"], rope_parameters=new) == from_hf(rope_scaling=None) == from_hf()
    scaled = from_hf(rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert scaled.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert from_hf(["rope_theta"], rope_parameters={"rope_type": "llama3", "rope_theta": 5e6, **LLAMA3}) == scaled


def test_experts_are_read_as_transformers_4_and_5_write_them():
    moe = from_hf(**MOE)
    assert moe.experts == Experts(8, 2, True) and moe.intermediate_size == 12 and moe.qk_norm
    new = {**MOE, "num_experts": None, "num_local_experts": 8}
    assert from_hf(**new) == from_hf(**MOE, num_local_experts=8) == moe and from_hf().experts is None
    assert not from_hf(**{**MOE, "norm_topk_prob": False}).experts.normalised
    silent = {
        "router_aux_loss_coef": 0.1,
        "output_router_logits": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    assert from_hf(["intermediate_size"], **MOE, **silent) == moe
    assert from_hf(["head_dim"], **MOE).head_dim == 4, "the size that leaving it out means in this family"


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"])
def test_nothing_about_experts_has_a_default(key):
    with pytest.raises(UserError, match=rf"{key} is missing"):
        from_hf(**{**MOE, key: None})


def test_keys_that_change_nothing_are_read_over():
    silent = {"torch_dtype": "bfloat16", "use_cache": True, "sliding_window": 4096, "max_window_layers": 1}
    silent |= {"use_sliding_window": False, "layer_types": ["full_attention"] * 2, "attention_dropout": 0.0}
    assert from_hf(**silent, some_new_key=None) == from_hf()


@pytest.mark.parametrize("key", [k for k in HF if k not in ("architectures", "hidden_act")])
def test_nothing_a_checkpoint_says_has_a_default(key):
    with pytest.raises(UserError, match=rf"{key} (is missing|= None)"):
        from_hf([key])


def test_families_that_leave_the_head_size_out_mean_hidden_over_heads():
    assert from_hf(["head_dim"], **LLAMA).head_dim == from_hf(["head_dim"], **QWEN2).head_dim == 4
    assert from_hf(**LLAMA).head_dim == 8


def test_biases_are_the_family_s():
    def biases(config):
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases(from_hf()) == (False, False, False) and biases(from_hf(attention_bias=True)) == (True, True, False)
    assert biases(from_hf(**QWEN2)) == (True, False, False)
    assert biases(from_hf(**LLAMA, attention_bias=True, mlp_bias=True)) == (True, True, True)
    assert [from_hf(**family).qk_norm for family in ({}, QWEN2, LLAMA)] == [True, False, False]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"architectures = \['MixtralForCausalLM'\] is not supported"),
        ({"architectures": None}, "architectures = None is not supported"),
        ({"model_type": "qwen2"}, "model_type = 'qwen2' must be 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; 'silu' is"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"layer_types": 5}, "layer_types = 5"),
        ({"rope_scaling": {"rope_type": []}}, "rope_type = .* is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights are not supported"),
        ({"num_experts": 8}, "num_experts = 8 is not known, and may change what the model computes"),
        ({"decoder_sparse_step": 1}, "decoder_sparse_step = 1 is not known"),
        ({**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported; 1, experts in every layer, is"),
        ({**MOE, "mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported; an empty list"),
        ({**MOE, "num_local_experts": 4}, "num_experts = 8 differs from num_local_experts = 4"),
        ({**MOE, "num_experts_per_tok": 9}, "num_experts_per_tok = 9 must not be above num_experts = 8"),
        ({**MOE, "shared_expert_intermediate_size": 4}, "shared_expert_intermediate_size = 4 is not known"),
        ({**MOE, "mlp_bias": True}, "mlp_bias = True is not supported for Qwen3MoeForCausalLM"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported for Qwen3ForCausalLM"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling.rope_type = \['yarn'\] is not supported"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "rope_scaling.mrope_section"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor is missing"),
        ({"rope_parameters": {"rope_theta": 1e4}}, r"rope_theta = 5000000.0 differs from rope_parameters.rope_theta"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 must be a multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim = 7 must be even"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6' must be a positive number"),
        ({"vocab_size": 32.5}, "vocab_size = 32.5 must be a positive whole number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' must be true or false"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_changes_the_computation_is_refused_by_name(changed, text):
    with pytest.raises(UserError, match=text):
        from_hf(**changed)


def test_one_message_names_everything_that_is_wrong():
    with pytest.raises(UserError) as error:
        from_hf(["rope_theta", "vocab_size"], num_experts=8, hidden_act="gelu")
    for key in ("rope_theta is missing", "vocab_size is missing", "num_experts = 8", "hidden_act = 'gelu'"):
        assert key in str(error.value)
