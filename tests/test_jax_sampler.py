from collections import Counter
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpd_jax.models import decoder
from mpd_jax.models.attention import attend
from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.sampling import jax_sampler
from mpd_jax.sampling.jax_sampler import TRACES, JaxSampler
from mpd_jax.sampling.sampler import Request, SamplingConfig
from mpd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from mpd_jax.types import UserError
from tests.compilations import compilations

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    rope_scaling=None,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tie_embeddings=True,
    max_position_embeddings=128,
)
MODEL = Model(CONFIG)
REAL = 45  # the last three columns of the head are padding
EOS = 3
ONE_DEVICE = MeshConfig(1, 1, 1)
SHAPE = {"slots": 4, "prompt_length": 19, "max_length": 60, "prefill_chunk": 8, "prefill_rows": 2}
SAMPLED = SamplingConfig(max_tokens=32)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=32)


@lru_cache
def weights(seed=0):
    """Large random weights: responses of mixed length, distributions far from uniform."""
    small = MODEL.init(jax.random.key(seed))
    return jax.tree.map(lambda x: x * (12.0 if np.std(x) > 0 else 1.0), small)


def sampler(eos=frozenset({EOS}), mesh=ONE_DEVICE, load=True, **changes):
    mesh = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    made = JaxSampler(MODEL, mesh, eos, vocab_size=REAL, dtype=jnp.float32, **{**SHAPE, **changes})
    if load:
        made.load(weights(), version=7)
    return made


@lru_cache
def shared():
    return sampler()


@lru_cache
def requests(count=11, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, SHAPE["prompt_length"] + 1, count)
    lengths[:4] = (1, 2, 9, SHAPE["prompt_length"])  # no prefill, one token, a chunk exactly full, the longest
    return tuple(Request(tuple(rng.integers(0, REAL, n).tolist()), (i, 5)) for i, n in enumerate(lengths))


@lru_cache
def responses():
    return tuple(shared().sample(requests(), SAMPLED))


def full_logits(ids):
    """float32 [T, REAL] of an uncached forward pass, at one padded shape."""
    padded = np.zeros((1, SHAPE["max_length"]), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(jax.jit(MODEL.logits)(weights(), padded))[0, : len(ids), :REAL]


def test_a_response_is_bit_identical_whatever_its_neighbours_and_order():
    made = shared()
    assert len({r.ids for r in responses()}) == len(requests())
    assert tuple(made.sample(requests()[::-1], SAMPLED))[::-1] == responses()
    for i in (0, 3, 6):
        assert made.sample([requests()[i]], SAMPLED) == [responses()[i]]
    assert tuple(made.sample(requests()[5:] + requests()[:5], SAMPLED)) == responses()[5:] + responses()[:5]


def test_a_cpu_decodes_as_many_rows_as_its_cache_holds(monkeypatch):
    """Eleven slots asked for and room for four: bit for bit the responses of a sampler of four."""
    monkeypatch.setattr(jax_sampler, "CPU_CACHE_BYTES", 4 * bytes_of_a_slot())
    made = sampler(slots=11)
    assert made.slots == 4
    assert tuple(made.sample(requests(), SAMPLED)) == responses()
    assert sampler(slots=3, load=False).slots == 3
    assert sampler(slots=16, mesh=MeshConfig(8, 1, 1), load=False).slots == 8, "every device has a row"


def bytes_of_a_slot():
    cache = MODEL.init_cache(1, SHAPE["max_length"], jnp.float32)
    return sum(x.nbytes for x in (*cache.k, *cache.v))


def test_a_prompt_reads_no_further_than_prompts_reach(monkeypatch):
    """The compiled prefill multiplies no array as long as the cache, only the window of prompts."""
    made, seen = sampler(slots=2, load=False), []
    assert made._window() == 24 and made._cache_length() == 60
    monkeypatch.setattr(decoder, "attend", lambda q, k, v, visible: seen.append(k.shape[3]) or attend(q, k, v, visible))
    shapes = jax.eval_shape(MODEL.by_layer, MODEL.abstract())
    cache = jax.eval_shape(lambda: MODEL.init_cache(2, 60, "float32"))
    row = np.zeros(1, np.int32)
    jax.eval_shape(lambda w, c: MODEL.decode(w, np.zeros((1, 8), np.int32), c, row, row, made._window()), shapes, cache)
    assert seen == [24] * CONFIG.num_layers


def test_responses_stop_at_eos_or_are_cut_and_draw_no_padding():
    ended = Counter(r.ended for r in responses())
    assert ended["stopped"] >= 2 and ended["cut"] >= 2
    for r in responses():
        assert len(r.ids) == len(r.logprobs) and max(r.ids) < REAL
        assert EOS not in r.ids[:-1]
        assert (r.ids[-1] == EOS) == (r.ended == "stopped")
        assert r.ended == "stopped" or len(r.ids) == SAMPLED.max_tokens


def test_the_eos_set_is_read_at_every_call():
    made = sampler()
    token = responses()[1].ids[0]
    made.eos_ids = frozenset({EOS, token})
    response = made.sample([requests()[1]], SAMPLED)[0]
    assert response.ids == (token,) and response.ended == "stopped"


def test_keys_decide_the_draws():
    prompt = requests()[2].prompt
    a, b, again = shared().sample([Request(prompt, (1, 2)), Request(prompt, (2, 1)), Request(prompt, (1, 2))], SAMPLED)
    assert a.ids != b.ids and a == again


SHARPER = pytest.param(SamplingConfig(temperature=0.5, top_p=0.8, max_tokens=16), marks=pytest.mark.slow)


@pytest.mark.parametrize("settings", [SAMPLED, SHARPER], ids=["sampled", "sharper"])
def test_logprobs_are_the_models_own_at_temperature_one(settings):
    for request, response in zip(requests(), shared().sample(requests(), settings), strict=True):
        logprobs_TV = jax.nn.log_softmax(full_logits(request.prompt + response.ids), axis=-1)
        at = np.arange(len(response.ids)) + len(request.prompt) - 1
        np.testing.assert_allclose(response.logprobs, logprobs_TV[at, np.array(response.ids)], atol=1e-4)


def test_greedy_is_the_argmax_of_the_full_forward_pass():
    for request, response in zip(requests(), shared().sample(requests(), GREEDY), strict=True):
        best_T = full_logits(request.prompt + response.ids).argmax(axis=-1)
        assert response.ids == tuple(best_T[len(request.prompt) - 1 : -1].tolist())


def test_top_k_of_one_is_greedy():
    made = shared()
    greedy = made.sample(requests(), GREEDY)
    top_1 = made.sample(requests(), SamplingConfig(temperature=1.0, top_k=1, max_tokens=32))
    assert [r.ids for r in top_1] == [r.ids for r in greedy]


def test_streamed_ids_are_the_sampled_ids():
    for i in (0, 1, 3):
        assert tuple(shared().stream(requests()[i], SAMPLED)) == responses()[i].ids


def test_an_abandoned_stream_leaves_nothing_behind():
    made = shared()
    next(made.stream(requests()[4], SAMPLED))
    assert tuple(made.sample(requests(), SAMPLED)) == responses()


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MeshConfig(2, 2, 2)], ids=str)
def test_each_program_compiles_once(mesh):
    """Over two loads: weights as they are read, and as an update leaves them. A trace does not see a sharding."""
    made = sampler(mesh=mesh, slots=3 if mesh == ONE_DEVICE else 8, load=False)  # shapes of their own
    train = tree_shardings(made.mesh, MODEL.logical_axes(), MODEL.abstract(), "train")
    read = jax.device_put(weights(), train)
    updated = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.1, tree), out_shardings=train)(read)
    before = Counter(TRACES)
    with compilations() as compiled:
        for version, given in enumerate((read, updated)):
            made.load(given, version)
            for settings in (SAMPLED, GREEDY, SamplingConfig(temperature=0.6, max_tokens=8)):
                made.sample(requests(), settings)
                made.sample(requests()[:1], settings)
    assert dict(TRACES - before) == {"empty": 1, "load": 1, "prefill": 1, "decode": 1, "take": 1}
    assert sorted(compiled.values()) == [1] * 5, compiled
    with compilations() as compiled:
        for settings in (SamplingConfig(top_k=4, max_tokens=8), SamplingConfig(top_p=0.9, max_tokens=8)):
            made.sample(requests(), settings)
    assert dict(compiled) == {"jit(_decode)": 1}  # the sort of top-k and top-p is the one program more


def test_slots_are_refilled_while_others_decode():
    """Static batches of four would take the longest length of each; with five ends the tail is long."""
    made = sampler(slots=4, eos=frozenset(range(3, 8)))
    lengths = [len(r.ids) for r in made.sample(requests(40, seed=3), SAMPLED)]
    static = sum(max(lengths[i : i + 4]) for i in range(0, 40, 4))
    bound = 1.15 * (sum(lengths) / 4 + max(lengths))
    assert bound < 0.8 * static, "the test wants a long tail"
    assert made.stats.tokens == sum(lengths) and made.stats.responses == 40
    assert made.stats.decode_steps <= bound


def test_weights_are_a_copy_in_the_compute_dtype():
    made = sampler(load=False)
    mine = jax.tree.map(jnp.copy, weights())
    made.load(mine, version=3)
    jax.tree.map(lambda x: x.delete(), mine)  # what donation does at the next update
    assert made.sample(requests()[:2], SAMPLED) == list(responses()[:2]) and made.version == 3
    made.load(weights(1), version=4)
    assert made.sample(requests()[:2], SAMPLED) != list(responses()[:2])


@pytest.mark.parametrize("mesh", [MeshConfig(2, 1, 2), MeshConfig(1, 2, 4)], ids=str)
def test_a_mesh_gives_the_same_greedy_tokens(mesh):
    expected = shared().sample(requests(), GREEDY)
    made = sampler(mesh=mesh)
    assert [r.ids for r in made.sample(requests(), GREEDY)] == [r.ids for r in expected]
    before, four = made.stats.prefill_calls, requests()[:4]
    made.sample(four, GREEDY)
    chunks = [-(-max(len(r.prompt) - 1, 1) // made.prefill_chunk) for r in four]
    assert made.stats.prefill_calls - before == max(chunks), "all slots' prompts enter together"


def test_progress_counts_finished_responses():
    seen = []
    shared().sample(requests(), SAMPLED, seen.append)
    assert seen == sorted(seen) and seen[-1] == len(requests())


def test_nothing_asked_nothing_sampled():
    assert shared().sample([], SAMPLED) == []


@pytest.mark.parametrize(
    ("prompt", "settings", "told"),
    [(20, SAMPLED, "20 tokens.*1 to 19"), (0, SAMPLED, "0 tokens"), (19, SamplingConfig(max_tokens=42), "19.*42.*60")],
)
def test_what_does_not_fit_is_refused_by_size(prompt, settings, told):
    with pytest.raises(UserError, match=told):
        shared().sample([Request((1,) * prompt, (0, 0))], settings)
