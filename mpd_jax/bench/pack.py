"""`mpd-jax bench pack`: how much of a step is padding, packed and not, and what packing gains in a real train step.

Padding is counted at full size: lognormal lengths packed into rows against one a row as long as the longest. The draw
of median padding is timed on one device at lengths divided by `scale`, rows in proportion, a sequence being a short
prompt and its response; the model is wide for such rows, as attention of the CPU reference grows with their square.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mpd_jax.data.batching import after, to_batch
from mpd_jax.data.packing import Packing, pack
from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.recipe.loss import LossConfig
from mpd_jax.train.state import TrainConfig, Trained, init_opt_state, optimiser
from mpd_jax.train.step import make_update
from mpd_jax.types import Batch, Problem, Trajectory, UserError

MEDIAN, SIGMA, CAP, ROW, SEQUENCES = 2_500, 0.8, 10_000, 16_384, 32
FORMS = ("packed", "unpacked")


def run(
    json: bool = False, *, scale: int = 32, width: int = 512, layers: int = 2, repeats: int = 3, draws: int = 200
) -> dict[str, Any]:
    """Padding over `draws` steps, then both forms of the median one in turn; prints a table unless `json`.

    ideal_gain: unpacked positions over packed ones; gain: the ratio of response tokens per second, best times;
    share: gain / ideal_gain.
    """
    if scale < 1 or ROW % scale or width % 64 or min(layers, repeats, draws) < 1:
        given = f"scale={scale}, width={width}, layers={layers}, repeats={repeats}, draws={draws}"
        raise UserError(f"bench pack: {given}: wants a scale that divides {ROW}, a width of 64s, and the rest above 0")
    padding = {form: [_padding(lengths(seed), form) for seed in range(draws)] for form in FORMS}
    typical = int(np.argsort(padding["packed"], kind="stable")[draws // 2])
    drawn = lengths(typical) // scale
    batches = {form: _batch(np.maximum(drawn, 8), form, ROW // scale) for form in FORMS}
    seconds = _times(_model(width, layers, ROW // scale), batches, repeats)
    tokens = int((batches["packed"].weight_BR > 0).sum())
    positions = {form: int(np.prod(batches[form].student_tokens_BT.shape)) for form in FORMS}
    speed = {form: tokens / min(seconds[form]) for form in FORMS}
    gain, ideal = speed["packed"] / speed["unpacked"], positions["unpacked"] / positions["packed"]
    result = {
        "sequences": SEQUENCES,
        "row_length": ROW,
        "draws": draws,
        "padding": {form: padding[form][typical] for form in FORMS},
        "mean_padding": {form: float(np.mean(padding[form])) for form in FORMS},
        "scale": scale,
        "width": width,
        "layers": layers,
        "shapes": {form: list(batches[form].student_tokens_BT.shape) for form in FORMS},
        "response_tokens": tokens,
        "seconds": seconds,
        "response_tokens_per_second": speed,
        "gain": gain,
        "ideal_gain": ideal,
        "share": gain / ideal,
        "device": f"1 x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    if not json:
        _show(result)
    return result


def lengths(seed: int) -> np.ndarray:
    """Tokens of a step's sequences: lognormal, capped."""
    drawn = np.exp(np.log(MEDIAN) + SIGMA * np.random.default_rng(seed).standard_normal(SEQUENCES))
    return np.minimum(drawn, CAP).astype(int)


def _packing(drawn: np.ndarray, form: str, row: int) -> Packing:
    alone, tokens = form == "unpacked", drawn.tolist()
    return pack(tokens, tokens, tokens, row_length=int(drawn.max()) if alone else row, multiple=1, alone=alone)


def _padding(drawn: np.ndarray, form: str) -> float:
    packing = _packing(drawn, form, ROW)
    return 1 - float(drawn.sum()) / (packing.rows * packing.student)


def _batch(drawn: np.ndarray, form: str, row: int) -> Batch:
    random, prompt = np.random.default_rng(0), (1, 2, 3, 4)
    problems = [Problem(str(i), "?") for i in range(len(drawn))]
    responses = [tuple(int(i) for i in random.integers(5, 4_000, n - len(prompt))) for n in drawn]
    made = [
        Trajectory(problem.id, 0, prompt, response, "student", 0, "cut")
        for problem, response in zip(problems, responses, strict=True)
    ]
    longest = int(drawn.max())
    return to_batch(
        problems,
        made,
        reads=lambda t: after(prompt, t.response),
        reduction="token_mean",
        max_length=longest,
        eos_ids=(),
        row_length=longest if form == "unpacked" else row,
        alone=form == "unpacked",
    )[0]


def _model(width: int, layers: int, row: int) -> Model:
    heads = width // 64
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_layers": layers}
    shape |= {"num_heads": heads, "num_kv_heads": heads, "head_dim": 64, "max_position_embeddings": row}
    flags = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), False) | {"qk_norm": True, "tie_embeddings": True}
    physics: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "rope_scaling": None}
    return Model(ModelConfig(family="qwen3", vocab_size=4_096, **shape, **flags, **physics))


def _times(model: Model, batches: dict[str, Batch], repeats: int) -> dict[str, list[float]]:
    """Seconds of whole updates, reverse KL to other weights of the same shape, one form after the other."""
    tx = optimiser(TrainConfig())
    update: Callable = make_update(model, model, LossConfig(), tx, None, vocab_size=model.config.vocab_size)
    weights, target = (model.init(jax.random.key(seed)) for seed in (0, 1))
    trained, seconds = Trained(weights, init_opt_state(tx, weights)), {form: [] for form in FORMS}
    for repeat in range(repeats + 1):  # the first compiles
        for form in FORMS:
            start = time.perf_counter()
            trained, out = jax.block_until_ready(update(trained, target, batches[form]))
            if repeat:
                seconds[form].append(time.perf_counter() - start)
            assert out["finite"]
    return seconds


def _show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("", *FORMS, title="{sequences} sequences in rows of {row_length:,}".format(**result))

    def row(name: str, values: dict[str, Any] | Sequence, style: str) -> None:
        table.add_row(name, *(format(values[form], style) for form in FORMS))  # type: ignore[call-overload]

    row("padding of the timed step", result["padding"], ".1%")
    row(f"mean padding of {result['draws']} steps", result["mean_padding"], ".1%")
    table.add_row("rows x length, timed", *("{} x {}".format(*result["shapes"][form]) for form in FORMS))
    row("seconds a step, best", {form: min(s) for form, s in result["seconds"].items()}, ".2f")
    row("response tokens a second", result["response_tokens_per_second"], ",.0f")
    gain = "gain {gain:.2f} of an ideal {ideal_gain:.2f}: {share:.0%}".format(**result)
    sizes = "lengths divided by {scale}, width {width}, {layers} layers, {device}, jax {jax}".format(**result)
    console.print(table, gain, sizes, sep="\n")
