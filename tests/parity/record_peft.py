"""Logits of adapters as PEFT computes them over the tiny models of record.py, for machines without torch and PEFT.

`python tests/parity/record_peft.py` writes recorded/peft.npz again. Weights of base and adapter are drawn from their
names; torch, transformers and PEFT are imported where a model is built.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.parity import record

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 5
CASES = {"qwen3": ALL, "qwen2": ALL, "llama": ("v_proj", "o_proj", "down_proj")}


def build(family: str) -> Any:
    """PEFT's model of a family: no part of the adapter is zero."""
    import peft
    import torch

    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(CASES[family]), task_type="CAUSAL_LM")
    model = peft.get_peft_model(record.build(family, record.KEPT[family]), lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.from_numpy(record.draw(name.replace(".default", ""), parameter.shape)))
    return model


def saved(model: Any) -> dict[str, str]:
    """The adapter's config and the shape of each of its tensors, in JSON, as PEFT saves them."""
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = (Path(directory) / "adapter_config.json").read_text()
        tensors = load_file(Path(directory) / "adapter_model.safetensors")
    return {"adapter": config, "adapter_shapes": json.dumps({name: x.shape for name, x in tensors.items()})}


def main() -> None:
    held = {}
    for family in CASES:
        base = record.saved(record.build(family, record.KEPT[family]))
        model = build(family)
        logits = record.logits(model, record.tokens())[:, record.POSITIONS]
        held |= {f"{family}.{name}": value for name, value in (base | saved(model) | {"logits": logits}).items()}
    np.savez_compressed(record.RECORDED / "peft.npz", **held)


if __name__ == "__main__":
    main()
