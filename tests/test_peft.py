"""PEFT directories: the recorded logits of PEFT, exact round trips, and what is refused by which name."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpd_jax.models import peft
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import load_config, load_weights
from mpd_jax.models.lora import Adapted, LoraConfig
from mpd_jax.models.peft import export_adapter, load_adapter
from mpd_jax.sharding import MeshConfig, make_mesh
from mpd_jax.types import UserError
from tests.parity import record, record_peft
from tests.test_lora import ADAPTED, adapter_of, bytes_of

MESH = make_mesh(MeshConfig(2, 2, 2))
QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("family", record_peft.CASES)
def test_the_logits_are_those_that_peft_computed(family, tmp_path):
    held = np.load(record.RECORDED / "peft.npz")
    config, shapes, adapter, adapter_shapes, expected = (
        held[f"{family}.{name}"] for name in ("config", "shapes", "adapter", "adapter_shapes", "logits")
    )
    (tmp_path / "config.json").write_text(str(config))
    (tmp_path / "adapter_config.json").write_text(str(adapter))
    for file, listed in (("model", shapes), ("adapter_model", adapter_shapes)):
        tensors = {name: record.draw(name, shape) for name, shape in json.loads(str(listed)).items()}
        save_file(tensors, tmp_path / f"{file}.safetensors")
    mesh, model = make_mesh(MeshConfig(), jax.devices()[:1]), Model(load_config(tmp_path))
    adapted = Adapted(model, LoraConfig(record_peft.RANK, record_peft.ALPHA, record_peft.CASES[family]))
    weights = adapted.over(load_weights(tmp_path, model, mesh), load_adapter(tmp_path, adapted, mesh))
    logits = jax.jit(model.logits)(weights, record.tokens())[:, record.POSITIONS]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.fixture
def written(tmp_path):
    return export_adapter(tmp_path / "adapter", ADAPTED, adapter_of(ADAPTED, 1, MESH), "owner/name", "0" * 40)


def test_what_is_written_is_read_on_any_mesh(written):
    adapter = adapter_of(ADAPTED, 1)
    for mesh in (MESH, make_mesh(MeshConfig(), jax.devices()[:1])):
        again = load_adapter(written, ADAPTED, mesh)
        assert jax.tree.structure(again) == jax.tree.structure(adapter) and bytes_of(again) == bytes_of(adapter)
        assert all(
            x.sharding == place
            for x, place in zip(jax.tree.leaves(again), jax.tree.leaves(ADAPTED.shardings(mesh)), strict=True)
        )
    config = json.loads((written / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8, None)
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "0" * 40)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", 8, "r = 8, and student.lora.rank = 4"),
        ("lora_alpha", 16, "lora_alpha = 16, and student.lora.alpha = 8"),
        ("target_modules", ["q_proj"], "target_modules = ['q_proj'], and student.lora.target_modules ="),
        ("target_modules", ".*proj", "target_modules = '.*proj', and student.lora.target_modules ="),
        ("peft_type", "IA3", "peft_type = 'IA3' is not supported"),
        ("task_type", "SEQ_CLS", "task_type = 'SEQ_CLS'"),
        ("bias", "all", "bias = 'all'"),
        ("use_rslora", True, "use_rslora = True"),
        ("use_dora", True, "use_dora = True"),
        ("lora_bias", True, "lora_bias = True"),
        ("modules_to_save", ["lm_head"], "modules_to_save = ['lm_head']"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern = {'q_proj': 8}"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa'"),
        ("something_new", {"on": 1}, "something_new = {'on': 1}"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_its_key(written, key, value, said):
    config = json.loads((written / "adapter_config.json").read_text())
    (written / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError) as caught:
        load_adapter(written, ADAPTED, MESH)
    assert said in str(caught.value) and "student.adapter" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(QUERY), f"{QUERY} is missing"),
        (lambda t: t.update(extra=np.ones(1, np.float32)), "extra is not part of the adapter"),
        (lambda t: t.update({QUERY: t[QUERY].T.copy()}), f"{QUERY} has shape (32, 4), and (4, 32) fits"),
        (lambda t: t.update({QUERY: t[QUERY].astype(np.float64)}), f"{QUERY} is stored as F64"),
        (lambda t: t[QUERY].fill(np.nan), f"{QUERY} holds values that are not finite"),
    ],
    ids=["missing", "extra", "misshapen", "float64", "nan"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(written, change, said):
    tensors = load_file(written / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, written / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        load_adapter(written, ADAPTED, MESH)
    assert said in str(caught.value)


def test_a_pickle_a_torn_file_and_a_missing_one_are_refused(written):
    file = written / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(written, ADAPTED, MESH)
    file.rename(written / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle, which runs code"):
        load_adapter(written, ADAPTED, MESH)
    (written / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="does not hold a JSON object"):
        load_adapter(written, ADAPTED, MESH)
    (written / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        load_adapter(written, ADAPTED, MESH)


def test_a_directory_is_written_whole_or_not_at_all(written, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists already"):
        export_adapter(written, ADAPTED, adapter_of(ADAPTED, 1), "base")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        export_adapter(tmp_path / "second", ADAPTED, adapter_of(ADAPTED, 1), "base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
