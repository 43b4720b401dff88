"""How a server was started, as far as it tells, and starts with which some servers were seen to die or to lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpd_jax.config import RunConfig
from mpd_jax.doctor.rows import Row
from mpd_jax.models.hf_weights import CONFIG, load_config
from mpd_jax.roles import ModelFiles
from mpd_jax.sampling.proof import TOLERANCE
from mpd_jax.sampling.servers import Servers

Told = Mapping[str, Any]
HEADS = ("lm_head", "embed_tokens")


def told(server: Servers) -> Told | None:
    """The server's own config; None where it keeps it to itself (without VLLM_SERVER_DEV_MODE=1)."""
    (answer,) = server.every("GET", "/server_info?config_format=json", ok=(200, 404, 422, 500))
    found = answer.get("vllm_config") if isinstance(answer, dict) else None
    return found if isinstance(found, dict) else None


def value(info: Told, section: str, name: str) -> Any:
    """A setting of the server's config, or None."""
    return (info.get(section) or {}).get(name)


def dtype(info: Told | None) -> str | None:
    """The dtype it computes in, if it tells and it is one that proofs know."""
    name = str(value(info, "model_config", "dtype")).removeprefix("torch.") if info else ""
    return name if name in TOLERANCE else None


def rows(config: RunConfig, held: ModelFiles, info: Told | None, *, samples: bool, scores: bool) -> list[Row]:
    """samples, scores: whether responses are drawn there, whether log-probabilities of prompts are asked for."""
    key, seeded = held.key, samples and config.sampling.server.seed == "request"
    unseeded = samples and not seeded
    tied = key == "student" and held.adapted is None and held.model.config.tie_embeddings
    if info is None:
        matter = {
            "--max-num-batched-tokens of --max-num-seqs x --max-model-len on a CPU, for seeded responses": seeded,
            "a --seed of its own at every start (--seed $RANDOM), for responses without seeds": unseeded,
            "--lora-target-modules without head and embedding, with --enable-lora": scores or key == "student",
            "an untied export (`mpd-jax export --untie`) on a CPU, for its reload keeps a tied head": tied,
        }
        needed = [flag for flag, matters in matter.items() if matters]
        if not needed:
            return [Row(f"{key}: start flags", "skipped", "it does not tell them")]
        seen = "it does not tell them (VLLM_SERVER_DEV_MODE is not set there)"
        return [Row(f"{key}: start flags", "warn", seen, f"see that it has {', and '.join(needed)}")]
    on_cpu = "cpu" in str(value(info, "device_config", "device"))
    found = [_told(key, info, on_cpu)]
    if seeded:
        found.append(_seeds(key, info, on_cpu))
    if unseeded:
        found.append(_noise(key, info))
    if value(info, "lora_config", "max_loras") and (scores or key == "student"):
        found.append(_adapters(key, info, on_cpu))
    if tied and on_cpu and config.sampling.push.way in ("auto", "reload"):
        found.append(_tied(key, info))
    return found


def _told(key: str, info: Told, on_cpu: bool) -> Row:
    defaults = value(info, "model_config", "override_generation_config")
    names = ("dtype", "max_logprobs", "logprobs_mode", "generation_config")
    seen = ", ".join(f"{name} {value(info, 'model_config', name)}" for name in names)
    seen += f" {defaults}" if defaults else ""
    return Row(f"{key}: start flags", "ok", f"{seen}, on {'a CPU' if on_cpu else 'an accelerator'}")


def _seeds(key: str, info: Told, on_cpu: bool) -> Row:
    """On a CPU a seeded request whose prompt is read in parts raises in the worker, which ends the server."""
    what = f"{key}: seeded prompts"
    at_once, sequences = (value(info, "scheduler_config", n) for n in ("max_num_batched_tokens", "max_num_seqs"))
    window, parts = (
        value(info, "model_config", "max_model_len"),
        value(info, "scheduler_config", "enable_chunked_prefill"),
    )
    if not on_cpu or parts is False or at_once is None or at_once >= (needed := (sequences or 1) * (window or 1)):
        return Row(what, "ok", "none is read in parts" if on_cpu else "may be read in parts: it is no CPU")
    return Row(
        what,
        "FAIL",
        f"prompts are read in parts of {at_once:,} tokens, and on a CPU a seeded one that is ends the server",
        f"start it with --max-num-batched-tokens {needed} (its --max-num-seqs x --max-model-len) or with "
        "--no-enable-chunked-prefill, or set sampling.server.seed=none",
    )


def _noise(key: str, info: Told) -> Row:
    """Responses without seeds of their own are drawn from the engine's, which is 0 unless it is given one."""
    what, seed = f"{key}: noise", value(info, "model_config", "seed")
    if seed != 0:
        return Row(what, "ok", f"--seed {seed}")
    seen = "its --seed is 0, as at every start without one: two servers, or one that is started again, draw alike"
    return Row(what, "warn", seen, "start it with --seed $RANDOM")


def _adapters(key: str, info: Told, on_cpu: bool) -> Row:
    """With the head among the adapted modules, prompt log-probabilities of two requests at once end the server."""
    what, modules = f"{key}: adapters", value(info, "lora_config", "target_modules")
    if modules and not set(HEADS) & set(modules):
        return Row(what, "ok", f"of {', '.join(modules)}")
    seen = (
        "head and embedding may be adapted, and with them log-probabilities of several prompts at once end the server"
    )
    change = "start it with --lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    return Row(what, "FAIL" if on_cpu else "warn", seen, change)


def _tied(key: str, info: Told) -> Row:
    """A CPU packs the head when it starts: after a reload a tied one still multiplies with the old weights."""
    directory = Path(str(value(info, "model_config", "model")))
    here = directory.is_absolute() and (directory / CONFIG).is_file()
    if here and not load_config(directory).tie_embeddings:
        return Row(f"{key}: tied head", "ok", f"untied in {directory}")
    seen = f"the head {'is' if here else 'may be'} the embedding in {directory}, which a CPU does not reload"
    change = "serve what `mpd-jax export --untie` writes, or set sampling.push.way=restart"
    return Row(f"{key}: tied head", "FAIL" if here else "warn", seen, change)
