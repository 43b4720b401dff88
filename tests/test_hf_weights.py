"""Claims about Hugging Face directories: the layout, what is refused and by which name, and that writing is whole."""

import json
import shutil
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mpd_jax.models import hf_weights
from mpd_jax.models.decoder import Model
from mpd_jax.models.hf_weights import eos_ids, export, load_config, load_weights
from mpd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from mpd_jax.types import UserError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
    "torch_dtype": "float16",
}
QWEN3 = {
    **{k: v for k, v in CONFIG.items() if k != "mlp_bias"},
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "tie_word_embeddings": True,
}
QWEN3_MOE = {
    **{k: v for k, v in QWEN3.items() if k != "intermediate_size"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "norm_topk_prob": True,
}
TOKENIZER = {
    "tokenizer.json": b'{"odd":  "spacing"}\n\n',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": "{{ '\u2028' }}\r\n".encode(),
    "generation_config.json": b'{"eos_token_id": [3, 5], "temperature": 0.6}',
    "additional_chat_templates/tool.jinja": b"tools",
}


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def flat(tree):
    return {jax.tree_util.keystr(k, simple=True, separator="."): v for k, v in jax.tree.leaves_with_path(tree)}


def same(left, right):
    a, b = flat(left), flat(right)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def write_source(directory, config=CONFIG):
    """A directory with everything but weights."""
    for name, content in {**TOKENIZER, "config.json": json.dumps(config).encode()}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def write_model(tmp_path, config=CONFIG, dtype="float32", **how):
    """A directory, its model, and the random weights in it: no bias zero, no norm one."""
    source = write_source(tmp_path / "source", config)
    model = Model(load_config(source))
    random = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: jax.numpy.asarray(random.normal(size=s.shape), s.dtype), model.abstract())
    return export(tmp_path / "model", source, model, weights, dtype=dtype, **how), model, weights


def rewrite(directory, change):
    """Changes the tensors of a single-file directory."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_tensors_lie_as_transformers_lays_them(tmp_path):
    directory, _, weights = write_model(tmp_path)
    held = load_file(directory / "model.safetensors")
    attention, mlp = weights["blocks"]["attention"], weights["blocks"]["mlp"]
    x = np.random.default_rng(1).normal(size=8).astype(np.float32)
    heads = np.einsum("d,dnh->nh", x, attention["q"][1]) + attention["q_bias"][1]
    name = "model.layers.1.self_attn"
    np.testing.assert_allclose(
        held[f"{name}.q_proj.weight"] @ x + held[f"{name}.q_proj.bias"], heads.ravel(), rtol=1e-4
    )
    back = np.einsum("nh,nhd->d", heads, attention["o"][1])
    np.testing.assert_allclose(held[f"{name}.o_proj.weight"] @ heads.ravel(), back, rtol=1e-4)
    np.testing.assert_allclose(held["model.layers.2.mlp.down_proj.weight"], mlp["down"][2].T)
    np.testing.assert_array_equal(held["lm_head.weight"], weights["head"])
    assert set(held) == {t.name for t in hf_weights._tensors(Model(load_config(directory)))} and len(held) == 3 + 3 * 16


def test_every_expert_is_a_tensor_of_its_own(tmp_path):
    directory, _, weights = write_model(tmp_path, QWEN3_MOE)
    held, mlp = load_file(directory / "model.safetensors"), weights["blocks"]["mlp"]
    for name, ours in (("gate_proj", "expert_gate"), ("up_proj", "expert_up"), ("down_proj", "expert_down")):
        np.testing.assert_array_equal(held[f"model.layers.2.mlp.experts.7.{name}.weight"], mlp[ours][2, 7].T)
    np.testing.assert_array_equal(held["model.layers.1.mlp.gate.weight"], mlp["router"][1].T)
    assert sum(".experts." in name for name in held) == 3 * 8 * 3


@pytest.mark.parametrize("config", [CONFIG, QWEN3, QWEN3_MOE], ids=["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("limit", [10**9, 700])
def test_what_is_written_is_read(tmp_path, config, limit):
    directory, model, weights = write_model(tmp_path, config, max_shard_bytes=limit)
    same(load_weights(directory, model, one_device()), weights)


@pytest.mark.parametrize("config", [CONFIG, QWEN3_MOE], ids=["llama", "qwen3_moe"])
def test_load_save_load_is_exact_to_the_byte(tmp_path, config):
    directory, model, _ = write_model(tmp_path, config, dtype="bfloat16")
    weights = load_weights(directory, model, one_device(), "bfloat16")
    assert all(x.dtype == ml_dtypes.bfloat16 for x in jax.tree.leaves(weights))
    again = export(tmp_path / "again", directory, model, weights, dtype="bfloat16")
    files = {f.relative_to(directory) for f in directory.rglob("*")}
    assert files == {f.relative_to(again) for f in again.rglob("*")}
    assert all((directory / f).read_bytes() == (again / f).read_bytes() for f in files if (again / f).is_file())


def test_files_of_mixed_types_are_read(tmp_path):
    directory, model, weights = write_model(tmp_path, dtype="bfloat16")
    exact = np.asarray(weights["final_norm"]["scale"])
    half = np.asarray(weights["embed"]).astype(np.float16)
    rewrite(directory, lambda t: t.update({"model.norm.weight": exact, "model.embed_tokens.weight": half}))
    read = load_weights(directory, model, one_device())
    np.testing.assert_array_equal(read["final_norm"]["scale"], exact)
    np.testing.assert_array_equal(read["embed"], half.astype(np.float32))
    np.testing.assert_array_equal(read["head"], weights["head"].astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("config", [CONFIG, QWEN3_MOE], ids=["llama", "qwen3_moe"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_every_device_gets_its_own_part(tmp_path, sizes, config):
    mesh = make_mesh(MeshConfig(*sizes))
    directory, model, weights = write_model(tmp_path, config)
    read = load_weights(directory, model, mesh)
    same(read, weights)
    placed = tree_shardings(mesh, model.logical_axes(), model.abstract())
    for name, array in flat(read).items():
        assert array.sharding.is_equivalent_to(flat(placed)[name], array.ndim), name
    same(load_weights(export(tmp_path / "out", directory, model, read, dtype="float32"), model, mesh), weights)


def test_no_read_is_larger_than_one_device_s_part_of_a_layer(tmp_path, monkeypatch):
    """So the host holds at most one part of one of our arrays, never the file."""
    read = reads(monkeypatch)
    directory, model, _ = write_model(tmp_path)
    load_weights(directory, model, make_mesh(MeshConfig(fsdp=8)))
    assert [size for name, size in read if name == "model.layers.1.self_attn.q_proj.weight"] == [16 * 8 // 8] * 8
    assert [size for name, size in read if name == "lm_head.weight"] == [16 * 8 // 8] * 8
    assert [size for name, size in read if name == "model.norm.weight"] == [8], "a replicated array is read once"


def test_an_expert_is_read_for_the_devices_that_hold_it_and_in_their_parts(tmp_path, monkeypatch):
    read = reads(monkeypatch)
    directory, model, _ = write_model(tmp_path, QWEN3_MOE)
    load_weights(directory, model, make_mesh(MeshConfig(1, 2, 4)))
    for expert in range(8):
        sizes = [size for name, size in read if name == f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        assert sizes == [6 * 8 // 2] * 2


def reads(monkeypatch):
    """(tensor, elements) of every read from now on, in a list that fills."""
    read, real = [], hf_weights._Checkpoint.tensor

    class Counted:
        def __init__(self, name, held):
            self.name, self.held = name, held

        def __getitem__(self, part):
            read.append((self.name, self.held[part].size))
            return self.held[part]

        def __getattr__(self, name):
            return getattr(self.held, name)

    monkeypatch.setattr(hf_weights._Checkpoint, "tensor", lambda self, name: Counted(name, real(self, name)))
    return read


def test_everything_wrong_is_named_at_once(tmp_path):
    directory, model, _ = write_model(tmp_path)

    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((4, 8), np.float32)
        tensors["model.layers.3.input_layernorm.weight"] = np.zeros(8, np.float32)
        tensors["lm_head.weight"] = np.zeros((16, 8), np.int8)

    rewrite(directory, spoil)
    with pytest.raises(UserError) as error:
        load_weights(directory, model, one_device())
    for line in (
        "model.norm.weight is missing",
        "model.layers.2.mlp.up_proj.weight is missing",
        "model.layers.0.self_attn.k_proj.weight has shape (4, 8), the config says (8, 8)",
        "model.layers.3.input_layernorm.weight is not part of the model",
        "lm_head.weight is stored as I8",
        str(directory),
    ):
        assert line in str(error.value)


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    directory, model, weights = write_model(tmp_path, QWEN3)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    same(load_weights(directory, model, one_device()), weights)
    rewrite(directory, lambda t: t["lm_head.weight"].__setitem__((15, 7), 0.5))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding although tie_word_embeddings"):
        load_weights(directory, model, one_device())


def test_buffers_that_the_config_decides_are_passed_over(tmp_path):
    directory, model, weights = write_model(tmp_path)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}
    rewrite(directory, lambda t: t.update(buffer))
    same(load_weights(directory, model, one_device()), weights)


def break_(what, directory):
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    match what:
        case "no weights":
            single.rename(directory / "pytorch_model.bin")
        case "cut":
            single.write_bytes(single.read_bytes()[:-9])
        case "no safetensors":
            single.write_bytes(b"<html>not found</html>")
        case "two":
            index.write_text("{}")
        case "no map" | "missing shard" | "wrong shard":
            single.rename(directory / "a.safetensors")
            map_ = dict.fromkeys(load_file(directory / "a.safetensors"), "a.safetensors")
            map_["model.norm.weight"] = "b.safetensors"
            index.write_text(json.dumps({"weight_map": map_} if what != "no map" else {"metadata": {}}))
            if what == "wrong shard":
                save_file({}, directory / "b.safetensors")
        case "gone":
            shutil.rmtree(directory)


@pytest.mark.parametrize(
    "what, text",
    [
        ("no weights", r"has no weights .*pytorch_model\.bin.*convert to safetensors"),
        ("cut", r"model\.safetensors cannot be read .*download it again"),
        ("no safetensors", r"model\.safetensors cannot be read .*download it again"),
        ("two", r"holds both model\.safetensors and model\.safetensors\.index\.json"),
        ("no map", r"index\.json has no weight_map"),
        ("missing shard", r"lists b\.safetensors, which is not there"),
        ("wrong shard", r"model\.norm\.weight is listed in model\.safetensors\.index\.json but not in b\.safetensors"),
        ("gone", r"is not a directory; give a Hugging Face model directory"),
    ],
)
def test_broken_directories_are_refused_with_a_remedy(tmp_path, what, text):
    directory, model, _ = write_model(tmp_path)
    break_(what, directory)
    with pytest.raises(UserError, match=text):
        load_weights(directory, model, one_device())


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json; give a Hugging Face model directory"):
        load_config(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json (is not valid JSON|does not hold a JSON object)"):
            load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts": 4}))
    with pytest.raises(UserError, match=rf"{tmp_path}: .*\n  num_experts = 4"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "generation, config, ids",
    [
        ({"eos_token_id": [3, 5]}, {"eos_token_id": 1}, {3, 5}),
        ({"eos_token_id": 7}, {}, {7}),
        ({"temperature": 1}, {"eos_token_id": 1}, {1}),
        (None, {"eos_token_id": [0, 2]}, {0, 2}),
    ],
)
def test_end_ids_come_from_the_generation_config_first(tmp_path, generation, config, ids):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_ids(tmp_path) == ids


@pytest.mark.parametrize(
    "config, text", [({}, "no response would end"), ({"eos_token_id": ["</s>"]}, "</s>.*token id")]
)
def test_a_model_without_an_end_id_is_refused(tmp_path, config, text):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=text):
        eos_ids(tmp_path)


def test_export_copies_everything_else_byte_for_byte(tmp_path):
    directory, _, _ = write_model(tmp_path, dtype="bfloat16")
    assert all((directory / name).read_bytes() == content for name, content in TOKENIZER.items())
    config = json.loads((directory / "config.json").read_text())
    assert config == {**CONFIG, "torch_dtype": "bfloat16"} and list(config) == list(CONFIG)
    assert {f.name for f in directory.iterdir()} == {n.split("/")[0] for n in TOKENIZER} | {
        "config.json",
        "model.safetensors",
    }


def test_a_head_that_is_untied_computes_the_same(tmp_path):
    out, model, weights = write_model(tmp_path, QWEN3, untie=True)
    tensors, config = load_file(out / "model.safetensors"), load_config(out)
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert not config.tie_embeddings and replace(config, tie_embeddings=True) == model.config
    untied = Model(config)
    tokens_BT = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(
        untied.logits(load_weights(out, untied, one_device()), tokens_BT), model.logits(weights, tokens_BT)
    )


def test_the_index_lists_exactly_what_is_there(tmp_path):
    directory, _, _ = write_model(tmp_path, max_shard_bytes=700)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in directory.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))] and len(files) > 3
    held, total = {}, 0
    for file in files:
        tensors = load_file(directory / file)
        sizes = [t.nbytes for t in tensors.values()]
        assert sum(sizes) <= 700 or len(sizes) == 1
        held.update(dict.fromkeys(tensors, file))
        total += sum(sizes)
        assert safe_open(directory / file, framework="numpy").metadata() == {"format": "pt"}
    assert index == {"metadata": {"total_size": total}, "weight_map": held}


def test_an_occupied_target_is_refused_and_left_alone(tmp_path):
    directory, model, weights = write_model(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="taken exists already"):
        export(taken, directory, model, weights)
    assert [f.name for f in taken.iterdir()] == ["notes.txt"]
    (taken / "notes.txt").unlink()
    assert export(taken, directory, model, weights) == taken and (taken / "config.json").exists()


@pytest.mark.parametrize("at", ["shard", "tokenizer", "rename"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, at):
    directory, model, weights = write_model(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def full_at_the_second(file, *rest):
        full() if "00002" in str(file) else real(file, *rest)

    real = hf_weights.save_tensors
    place = {"tokenizer": (shutil, "copyfile", full), "rename": (hf_weights.Path, "replace", full)}
    monkeypatch.setattr(*place.get(at, (hf_weights, "save_tensors", full_at_the_second)))
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "out", directory, model, weights, max_shard_bytes=700)
    assert {f.name for f in tmp_path.iterdir()} == {"source", "model"}


def test_the_library_s_error_shows_the_system_s(tmp_path):
    with pytest.raises(OSError) as error:
        hf_weights.save_tensors(tmp_path / "none" / "x.safetensors", {"x": np.ones(1)})
    assert error.value.errno == 2


def test_a_type_that_cannot_hold_the_values_is_refused(tmp_path):
    directory, model, weights = write_model(tmp_path)
    large = {**weights, "head": weights["head"].at[0, 0].set(1e6)}
    with pytest.raises(UserError, match=r"float16 cannot hold lm_head\.weight.*use bfloat16"):
        export(tmp_path / "out", directory, model, large, dtype="float16")
    with pytest.raises(UserError, match="dtype = 'int8' is not allowed"):
        export(tmp_path / "out", directory, model, weights, dtype="int8")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    directory, model, _ = write_model(tmp_path)

    def spoil(tensors):
        spoilt = tensors["model.layers.1.mlp.up_proj.weight"].copy()
        spoilt[1, 2] = np.nan
        tensors["model.layers.1.mlp.up_proj.weight"] = spoilt

    rewrite(directory, spoil)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight holds values that are not finite"):
        load_weights(directory, model, make_mesh(MeshConfig(fsdp=8)))
