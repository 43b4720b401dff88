"""Parity with PEFT in float32, live: adapters go both ways, and the merged export is the same model."""

import jax
import numpy as np
import pytest

from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import export, load_config, load_weights
from mpd_jax.models.lora import Adapted, LoraConfig
from mpd_jax.models.peft import export_adapter, load_adapter
from mpd_jax.sharding import MeshConfig, make_mesh
from tests.parity import record, record_peft

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = record.tokens()


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("family", record_peft.CASES)
def test_adapters_go_both_ways_and_the_merged_model_is_the_same(family, tmp_path):
    theirs = record_peft.build(family)
    theirs.save_pretrained(tmp_path / "theirs")
    base = record.build(family, record.KEPT[family])
    base.save_pretrained(tmp_path / "base")
    expected, plain = record.logits(theirs, TOKENS), record.logits(base, TOKENS)
    assert np.abs(expected - plain).max() > 1, "an adapter this small would agree by accident"

    mesh, model = make_mesh(MeshConfig(), jax.devices()[:1]), Model(load_config(tmp_path / "base"))
    adapted = Adapted(model, LoraConfig(record_peft.RANK, record_peft.ALPHA, record_peft.CASES[family]))
    adapter = load_adapter(tmp_path / "theirs", adapted, mesh)
    weights = adapted.over(load_weights(tmp_path / "base", model, mesh), adapter)
    np.testing.assert_allclose(jax.jit(model.logits)(weights, TOKENS), expected, rtol=0, atol=1e-4)

    export_adapter(tmp_path / "ours", adapted, adapter, str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_array_equal(record.logits(again, TOKENS), expected)

    export(tmp_path / "merged", tmp_path / "base", model, weights, dtype="float32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(record.logits(merged, TOKENS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", record_peft.CASES)
def test_what_is_recorded_is_what_peft_computes(family):
    held = np.load(record.RECORDED / "peft.npz")
    computed = record.logits(record_peft.build(family), TOKENS)[:, record.POSITIONS]
    np.testing.assert_allclose(computed, held[f"{family}.logits"], rtol=0, atol=1e-4)
