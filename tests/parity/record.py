"""Tiny random models of transformers, and their logits and greedy tokens as recorded for machines without torch.

`python tests/parity/record.py` writes recorded/*.npz again, a file a family: of every case the config and the tensors'
shapes as transformers saves them, and what it computes in float32. The weights are drawn again from their names. torch
and transformers are imported where a model is built, so that the tests without torch read the cases from here.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file

RECORDED = Path(__file__).parent / "recorded"
POSITIONS = (0, 1, 7, 19, 39)  # whose logits are recorded
PROMPT, NEW = 10, 12  # tokens before and in the recorded greedy continuation
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
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
FAMILIES = {
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8} | EXPERTS),
    "qwen2": ("Qwen2", {}),
    "llama": ("Llama", {}),
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
    "weights_as_they_are": {"norm_topk_prob": False},
    "one_expert": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "every_expert": {"num_experts_per_tok": 8},
    "odd_experts": {"num_experts": 5, "num_experts_per_tok": 3},
    "wide_experts": {"moe_intermediate_size": 40},
}
MIXTURES = ("weights_as_they_are", "one_expert", "every_expert", "odd_experts", "wide_experts")
ONLY = {"attention_bias": ("qwen3", "qwen3_moe", "llama"), "mlp_bias": ("llama",)}
ONLY |= dict.fromkeys(MIXTURES, ("qwen3_moe",))
CASES = [(family, moved) for moved in MOVED for family in FAMILIES if family in ONLY.get(moved, FAMILIES)]
KEPT = {
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "llama": {**LLAMA3, "mlp_bias": True},
}


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """Float32 values of a tensor of transformers. Every parameter matters: no norm is one, no bias zero."""
    random = np.random.RandomState(zlib.crc32(name.encode()))  # its stream is frozen, that of default_rng is not
    mean, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.3 if len(shape) == 1 else 0.2)
    return random.normal(mean, spread, shape).astype(np.float32)


def fused(name: str, shape: Sequence[int]) -> np.ndarray:
    """The values of a parameter of transformers, which holds experts fused that its files hold one by one."""
    layer, experts, parameter = name.partition(".mlp.experts.")
    if not experts:
        return draw(name, shape)
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    rows, columns = shape[1] // len(parts), shape[2]
    return np.stack(
        [
            np.concatenate([draw(f"{layer}{experts}{expert}.{part}.weight", (rows, columns)) for part in parts])
            for expert in range(shape[0])
        ]
    )


def tokens(rows: int = 2, length: int = 40) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 63, (rows, length), dtype=np.int32)


def build(family: str, changes: dict) -> Any:
    """A float32 model of transformers with the weights of `draw`."""
    import torch
    import transformers

    torch.set_num_threads(1)  # at this size threads only wait for each other
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SHARED | own | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(fused(name, parameter.shape)))
    return model


def logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens_BT, dtype=torch.long)).logits.float().numpy()


def greedy(model: Any, prompt_BT: np.ndarray, new: int) -> np.ndarray:
    """The greedy continuation [B, new] by transformers' own loop, EOS taken for a token as any other."""
    import torch

    model.generation_config.eos_token_id = None
    ids = torch.as_tensor(prompt_BT, dtype=torch.long)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    return out[:, prompt_BT.shape[1] :].numpy().astype(np.int32)


def computed(model: Any) -> dict[str, np.ndarray]:
    """What is recorded of a model: logits [B, positions, V] and greedy tokens [B, NEW]."""
    tokens_BT = tokens()
    return {
        "logits": logits(model, tokens_BT)[:, POSITIONS],
        "greedy": greedy(model, tokens_BT[:, :PROMPT], NEW),
    }


def saved(model: Any) -> dict[str, str]:
    """The config and the shape of every tensor, in JSON, of the directory that transformers writes."""
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = (Path(directory) / "config.json").read_text()
        tensors = load_file(Path(directory) / "model.safetensors")
    return {"config": config, "shapes": json.dumps({name: tensor.shape for name, tensor in tensors.items()})}


def main() -> None:
    RECORDED.mkdir(exist_ok=True)
    for family in FAMILIES:
        held = {}
        for moved in (moved for of, moved in CASES if of == family):
            model = build(family, MOVED[moved])
            held |= {f"{moved}.{name}": value for name, value in (saved(model) | computed(model)).items()}
        np.savez_compressed(RECORDED / f"{family}.npz", **held)


if __name__ == "__main__":
    main()
