"""Parity with transformers in float32, live: logits, greedy tokens, and directories that go both ways unchanged."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import export, load_config, load_weights
from mpd_jax.sharding import MeshConfig, make_mesh
from tests.parity import record

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
TOKENS = record.tokens()


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def ours(directory, mesh):
    model = Model(load_config(directory))
    return model, load_weights(directory, model, mesh)


@pytest.mark.parametrize("family, moved", record.CASES, ids=lambda x: x)
def test_logits_equal_for_every_field(family, moved, mesh, tmp_path):
    theirs = record.build(family, record.MOVED[moved])
    theirs.save_pretrained(tmp_path)
    model, weights = ours(tmp_path, mesh)
    expected = record.logits(theirs, TOKENS)
    assert np.ptp(expected) > 2, "logits this flat would agree by accident"
    np.testing.assert_allclose(jax.jit(model.logits)(weights, TOKENS), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", record.FAMILIES)
def test_export_loads_in_transformers_unchanged(family, mesh, tmp_path):
    theirs = record.build(family, record.KEPT[family])
    theirs.save_pretrained(tmp_path / "in")
    model, weights = ours(tmp_path / "in", mesh)
    export(tmp_path / "out", tmp_path / "in", model, weights, dtype="float32", max_shard_bytes=20_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert again.dtype == torch.float32 and type(again) is type(theirs)
    np.testing.assert_array_equal(record.logits(again.eval(), TOKENS), record.logits(theirs, TOKENS))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_directory_of_transformers_comes_back_bit_for_bit(shard, mesh, tmp_path):
    theirs = record.build("llama", record.KEPT["llama"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "in", max_shard_size=shard)
    model, weights = ours(tmp_path / "in", mesh)
    export(tmp_path / "out", tmp_path / "in", model, weights, dtype="bfloat16")
    before = {k: v for file in (tmp_path / "in").glob("*.safetensors") for k, v in load_file(file).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and before[k].tobytes() == after[k].tobytes() for k in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "in" / "config.json").read_text()
    )


@pytest.mark.parametrize("family", record.FAMILIES)
def test_greedy_tokens_are_the_same(family, mesh, tmp_path):
    theirs = record.build(family, record.KEPT[family])
    theirs.save_pretrained(tmp_path)
    model, weights = ours(tmp_path, mesh)
    held, step = np.zeros_like(TOKENS), jax.jit(model.logits)
    held[:, :10] = TOKENS[:, :10]
    for at in range(10, 30):
        held[:, at] = np.asarray(step(weights, held))[:, at - 1].argmax(-1)
    np.testing.assert_array_equal(held[:, 10:30], record.greedy(theirs, TOKENS[:, :10], 20))


@pytest.mark.parametrize("family, moved", record.CASES, ids=lambda x: x)
def test_what_is_recorded_is_what_transformers_computes(family, moved):
    held = np.load(record.RECORDED / f"{family}.npz")
    computed = record.computed(record.build(family, record.MOVED[moved]))
    np.testing.assert_allclose(computed["logits"], held[f"{moved}.logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(computed["greedy"], held[f"{moved}.greedy"])
