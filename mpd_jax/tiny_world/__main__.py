"""Rebuilds the tiny world: `python -m mpd_jax.tiny_world OUT_DIR` writes student/, teacher/ and measured.json.

A model that an earlier, interrupted call finished is kept. `--scale 0.01` runs every stage with a hundredth of the
updates, to see that it works.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
from tokenizers import Tokenizer

from mpd_jax.models.hf_weights import export
from mpd_jax.tiny_world.corpus import CONTEXTS, Batches, Corpus, tokenizer_texts
from mpd_jax.tiny_world.measure import measure
from mpd_jax.tiny_world.pretrain import STUDENT, TEACHER, Recipe, hf_config, pretrain
from mpd_jax.tiny_world.tokenizer import END, END_OF_TEXT, save_tokenizer, token_id, train_tokenizer

SEED = 0
MEASURE_SEED = 20_000


def build_model(name: str, recipe: Recipe, tokenizer: Tokenizer, out: Path) -> dict:
    """Trains one model and exports it to out/name; returns the record of its training."""
    end, text_end = token_id(tokenizer, END), token_id(tokenizer, END_OF_TEXT)
    config = hf_config(recipe, [end, text_end], text_end)
    batches = Batches(Corpus(tokenizer, recipe.mix).draw, SEED + 1, recipe.rows)
    model, weights, record = pretrain(
        recipe, config, iter(batches), SEED, report=lambda line: print(f"{name}: {line}", flush=True)
    )
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        source = Path(scratch)
        save_tokenizer(tokenizer, source)
        (source / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        export(out / name, source, model, weights, dtype="bfloat16")
    load = round(os.getloadavg()[2], 1)
    return {**record, "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights)), "load_15min": load}


def build_missing(out: Path, scale: float, tokenizer: Tokenizer) -> dict:
    """Builds the models that `out` lacks; training.json remembers how the others came about."""
    ledger = out / "training.json"
    records = json.loads(ledger.read_text()) if ledger.exists() else {}
    for name, recipe in (("student", STUDENT), ("teacher", TEACHER)):
        if (out / name).exists():
            if name not in records:
                raise SystemExit(f"{out / name} exists and was not built here: remove it, or name another directory")
            print(f"{name}: kept, as {out / name} is there")
            continue
        records[name] = build_model(name, replace(recipe, steps=max(2, int(recipe.steps * scale))), tokenizer, out)
        ledger.write_text(json.dumps(records))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mpd_jax.tiny_world", description="Rebuilds the tiny world from nothing."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of updates")
    parser.add_argument("--problems", type=int, default=256, help="held-out problems to measure on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    training = build_missing(args.out, args.scale, train_tokenizer(tokenizer_texts(SEED, 4000)))
    began = time.monotonic()
    measured = {
        "training": training,
        "contexts": CONTEXTS,
        **measure(args.out / "student", args.out / "teacher", args.problems, MEASURE_SEED),
        "measuring_seconds": round(time.monotonic() - began, 1),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    (args.out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(f"{args.out}: student, teacher and measured.json are there")


if __name__ == "__main__":
    main()
