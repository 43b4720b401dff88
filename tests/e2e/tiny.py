"""A run small enough for a test: the shipped models, few and short steps. Shared by the end-to-end tests."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

SMALL = [
    "train.steps=2",
    "train.batch_size=8",
    "train.warmup_steps=0",
    "train.save_every=1",
    "train.max_length=192",
    "sampling.slots=8",
    "sampling.prefill_rows=8",
    "sampling.writer.max_tokens=48",
    "sampling.rewriter.max_tokens=48",
    "eval.problems=8",
    "eval.temperatures=[1.0]",
    "eval.max_tokens=48",
    "mesh.fsdp=1",
    "mesh.data=-1",
]
