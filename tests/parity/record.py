"""Tiny random models of transformers, and their logits and greedy tokens as recorded for machines without torch.

`python tests/parity/record.py` writes recorded/*.npz again: the config, the weights as bfloat16 bits, and what
transformers computes from them in float32.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

RECORDED = Path(__file__).parent / "recorded"
SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 63,
    "pad_token_id": 63,
}
CLASSES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
MOVED = {
    "base": {},
    "rope_theta": THETA,
    "llama3_scaling": LLAMA3,
    "eps": {"rms_norm_eps": 0.3},
    "head_dim": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "every_kv_head": {"num_key_value_heads": 4},
    "three_layers": {"num_hidden_layers": 3},
    "odd_vocabulary": {"vocab_size": 67},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
}
ONLY = {"attention_bias": ("qwen3", "llama"), "mlp_bias": ("llama",)}
CASES = [(family, moved) for moved in MOVED for family in CLASSES if family in ONLY.get(moved, CLASSES)]
KEPT = {"qwen3": {"head_dim": 16}, "qwen2": {"tie_word_embeddings": True}, "llama": {**LLAMA3, "mlp_bias": True}}


def build(family: str, changes: dict, seed: int = 0) -> torch.nn.Module:
    """A float32 model whose every parameter matters: no norm is one, no bias zero. Values are bfloat16's."""
    config_class, model_class, own = CLASSES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**SHARED | own | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.3 if parameter.ndim == 1 else 0.2)
            parameter.normal_(mean, spread).copy_(parameter.to(torch.bfloat16).float())
    return model


def tokens(rows: int = 2, length: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 63, (rows, length), dtype=np.int32)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens_BT: np.ndarray) -> np.ndarray:
    return model(torch.as_tensor(tokens_BT, dtype=torch.long)).logits.float().numpy()


def greedy(model: torch.nn.Module, prompt_BT: np.ndarray, new: int) -> np.ndarray:
    """The greedy continuation [B, new] by transformers' own loop, EOS taken for a token as any other."""
    model.generation_config.eos_token_id = None
    ids = torch.as_tensor(prompt_BT, dtype=torch.long)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    return out[:, prompt_BT.shape[1] :].numpy().astype(np.int32)


def main() -> None:
    RECORDED.mkdir(exist_ok=True)
    for family, changes in KEPT.items():
        model, tokens_BT = build(family, changes, seed=1), tokens()
        tied = "lm_head.weight" if model.config.tie_word_embeddings else None
        bits = {f"w.{k}": v.bfloat16().view(torch.uint16).numpy() for k, v in model.state_dict().items() if k != tied}
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        np.savez_compressed(
            RECORDED / f"{family}.npz",
            config=json.dumps(config),
            tokens=tokens_BT,
            logits=logits(model, tokens_BT),
            greedy=greedy(model, tokens_BT[:, :10], 12),
            **bits,
        )


if __name__ == "__main__":
    main()
