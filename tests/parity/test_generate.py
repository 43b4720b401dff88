import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config, load_weights
from mpd_jax.sampling.jax_sampler import JaxSampler
from mpd_jax.sampling.sampler import Request, SamplingConfig
from mpd_jax.sharding import MeshConfig, make_mesh

PROMPT, NEW = 14, 40


DENSE = {"tie_word_embeddings": False, "intermediate_size": 64}
MIXED = DENSE | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


@pytest.mark.parametrize(
    "family, own",
    [("Qwen3", DENSE | {"tie_word_embeddings": True}), ("Qwen3", DENSE), ("Qwen3Moe", MIXED)],
    ids=["tied", "untied", "experts"],
)
def test_greedy_equals_transformers_generate_token_for_token(family, own, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e6,
        max_position_embeddings=128,
        initializer_range=0.4,
        **own,
    )
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    reference.save_pretrained(tmp_path)
    model = Model(load_config(tmp_path))
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    eos = frozenset({5, 6, 7})
    sampler = JaxSampler(
        model,
        mesh,
        eos,
        slots=3,
        prompt_length=PROMPT,
        max_length=PROMPT + NEW,
        prefill_chunk=6,
        prefill_rows=2,
        vocab_size=96,
        dtype=jnp.float32,
    )
    sampler.load(load_weights(tmp_path, model, mesh), 0)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(8, 96, n).tolist()) for n in (1, 3, 7, 13, PROMPT, 6, 10)]
    responses = sampler.sample([Request(p, (0, 0)) for p in prompts], SamplingConfig(temperature=0.0, max_tokens=NEW))
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=sorted(eos),
                pad_token_id=0,
            )
        assert response.ids == tuple(out[0, len(prompt) :].tolist())
    assert {r.ended for r in responses} == {"stopped", "cut"}
