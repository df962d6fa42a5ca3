"""Checkpoint directories: exact, strict, and either whole or known not to be."""

import json
import os
import shutil

import pytest
import torch

from jevons.config import ConfigError, ModelConfig, preset
from jevons.data.tokenizer import TokenizerError, train_tokenizer
from jevons.model import build_model
from jevons.store import checkpoint as ck
from jevons.store.checkpoint import is_complete, load_checkpoint, save_checkpoint
from jevons.store.files import CheckpointError, StoreError
from jevons.store.safetensors_io import read_tensors, write_tensors

TOKENIZER = train_tokenizer(["3 7 19 -> 40\n"] * 5, 288)
NANO = preset("v3-nano", vocab_size=288, max_position_embeddings=64)
QWEN2 = ModelConfig(architecture="Qwen2ForCausalLM", vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, attention_bias=True,
                    tie_word_embeddings=True)
LLAMA = ModelConfig(architecture="LlamaForCausalLM", vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
CONFIGS = {"v3": NANO, "qwen2": QWEN2, "llama": LLAMA}


def random_model(config):
    model = build_model(config, seed=int(torch.randint(2**31, ())))
    for gate in model.routers():
        gate.e_score_correction_bias.normal_()
    return model


def same(a, b):
    a, b = a.hf_state_dict(), b.hf_state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path):
    model = random_model(NANO)
    save_checkpoint(tmp_path / "c", model, TOKENIZER, {"tokens": 5})
    return tmp_path / "c", model


def edit_tensors(directory, change):
    tensors = {name: t.clone() for name, t in read_tensors(directory).items()}
    change(tensors)
    write_tensors(directory, tensors)


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_round_trip(tmp_path, name, limit):
    model = random_model(CONFIGS[name])
    provenance = {"recipe": "é", "seed": 3, "scores": [{"name": "a", "accuracy": 0.5, "n": 2}]}
    save_checkpoint(tmp_path, model, TOKENIZER, provenance, max_shard_bytes=limit)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == CONFIGS[name] and loaded.provenance == provenance
    assert same(loaded.model, model) and not loaded.model.training
    assert loaded.tokenizer.encode("3 7 19 -> 40 é") == TOKENIZER.encode("3 7 19 -> 40 é")
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == TOKENIZER.eos_id


def test_bf16_keeps_the_router_bias_and_says_its_dtype(tmp_path):
    model = random_model(NANO)
    save_checkpoint(tmp_path, model, TOKENIZER, {}, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = read_tensors(tmp_path)
    for name, tensor in model.hf_state_dict().items():
        wanted = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert stored[name].dtype == wanted and torch.equal(stored[name], tensor.to(wanted)), name
    loaded = load_checkpoint(tmp_path, dtype=torch.bfloat16).model
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters())
    assert all(g.e_score_correction_bias.dtype == torch.float32 for g in loaded.routers())
    tied = random_model(QWEN2)
    save_checkpoint(tmp_path / "tied", tied, TOKENIZER, {})
    tied = load_checkpoint(tmp_path / "tied", dtype=torch.bfloat16).model
    assert tied.lm_head.weight is tied.embed_tokens.weight


def test_missing_surplus_and_misshaped_are_named_with_their_file(saved):
    directory, _ = saved
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    cases = [
        (lambda t: t.pop(name), rf"{name} \(1 in all\) is missing from model\.safetensors"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"model\.safetensors: tensor model\.extra has no place"),
        (lambda t: t.update({name: torch.zeros(3, 5)}), rf"model\.safetensors: tensor {name} has shape \[3, 5\]; \[64, 32\]"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.2.")], "num_nextn_predict_layers 0"),
        (lambda t: t.update({"model.layers.2.embed_tokens.weight": torch.zeros(288, 64)}), "embed_tokens.weight differs"),
        (lambda t: t.update({"model.layers.2.shared_head.head.weight": torch.zeros(288, 64)}), "shared_head.head.weight differs"),
    ]
    good = (directory / "model.safetensors").read_bytes()
    for change, message in cases:
        edit_tensors(directory, change)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(directory)
        (directory / "model.safetensors").write_bytes(good)
    load_checkpoint(directory)


def test_copies_under_the_mtp_layer_may_be_absent(saved):
    directory, model = saved
    edit_tensors(directory, lambda t: [t.pop(f"model.layers.2.{n}.weight") for n in ("embed_tokens", "shared_head.head")])
    assert same(load_checkpoint(directory).model, model)


def test_tied_head(tmp_path):
    model = random_model(QWEN2)
    save_checkpoint(tmp_path, model, TOKENIZER, {})
    assert "lm_head.weight" not in read_tensors(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert same(load_checkpoint(tmp_path).model, model)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(288, 64)}))
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_checkpoint(tmp_path)


def test_other_damage(saved):
    directory, _ = saved
    weights = directory / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    with pytest.raises(CheckpointError, match="truncated: tensor"):
        load_checkpoint(directory)
    weights.write_bytes(good)
    edit_config(directory, hidden_size=96)
    with pytest.raises(CheckpointError, match=r"has shape .* would be right by config\.json"):
        load_checkpoint(directory)
    edit_config(directory, hidden_size=64, vocab_size=256)
    with pytest.raises(CheckpointError, match="tokenizer.json has 288 ids, config.json's vocab_size is 256"):
        load_checkpoint(directory)
    edit_config(directory, vocab_size=288, attention_sinks=4)
    with pytest.raises(ConfigError, match="attention_sinks"):
        load_checkpoint(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json does not exist"):
        load_checkpoint(directory)
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        load_checkpoint(directory / "nowhere")
    for text, message in (("[1", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "holds list"),
                          ('{"task": 5}', "task is 5; an object"), ('{"task": {"name": 5}}', "task is .*name and args"),
                          ('{"scores": 7}', "scores is 7; a list"), ('{"scores": [{"a": 1}]}', "with name, accuracy and n")):
        (directory / "provenance.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"provenance.json.* {message}"):
            ck.read_provenance(directory)
    (directory / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="config.json is not JSON: maximum recursion"):
        load_checkpoint(directory)
    for name, most in (("num_hidden_layers", "4,096"), ("n_routed_experts", "65,536")):
        (directory / "config.json").write_text(json.dumps(CONFIGS["v3"].to_hf() | {name: 10**9}))
        with pytest.raises(ConfigError, match=f"config.json: {name} is 1000000000; at most {most} would be right"):
            ck.ModelConfig.load(directory)


def test_without_a_tokenizer(tmp_path):
    model = random_model(LLAMA)
    save_checkpoint(tmp_path, model, None, {})
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        load_checkpoint(tmp_path)
    loaded = load_checkpoint(tmp_path, need_tokenizer=False)
    assert loaded.tokenizer is None and same(loaded.model, model)


def test_saving_again_replaces_shards_and_keeps_other_files(tmp_path):
    save_checkpoint(tmp_path, random_model(NANO), TOKENIZER, {"n": 1}, max_shard_bytes=20_000)
    (tmp_path / "train_state").mkdir()
    second = random_model(NANO)
    save_checkpoint(tmp_path, second, TOKENIZER, {"n": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "provenance.json", "tokenizer.json",
        "tokenizer_config.json", "train_state"]
    loaded = load_checkpoint(tmp_path)
    assert same(loaded.model, second) and loaded.provenance == {"n": 2}


def fail_at(monkeypatch, module, name, count):
    original, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > count:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize("name,count", [("write_json", 0), ("write_json", 2), ("write_tensors", 0), ("fsync", 3)])
def test_full_disk_leaves_the_last_good_one(saved, monkeypatch, name, count):
    directory, model = saved
    before = sorted(p.name for p in directory.iterdir())
    with monkeypatch.context() as patch:
        fail_at(patch, ck, name, count)
        with pytest.raises(StoreError, match="could not be written.*No space left"):
            save_checkpoint(directory, random_model(NANO), TOKENIZER, {})
    assert sorted(p.name for p in directory.iterdir()) == before
    loaded = load_checkpoint(directory)
    assert same(loaded.model, model) and loaded.provenance == {"tokens": 5}


@pytest.mark.parametrize("count", range(1, 7))
def test_interrupted_while_moving_is_known_to_be_incomplete(saved, monkeypatch, count):
    """Stopped after any number of renames: the directory never loads as a mixture, and the next save mends it."""
    directory, _ = saved
    edit_config(directory, max_position_embeddings=32)
    second = random_model(NANO)
    with monkeypatch.context() as patch:
        replace, calls = os.replace, []

        def killed(*args):
            if ".unfinished" in str(args[0]) and ".unfinished" not in str(args[1]):
                calls.append(args)
                if len(calls) == count:
                    raise KeyboardInterrupt
            return replace(*args)

        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(directory, second, TOKENIZER, {"n": 2})
    assert not is_complete(directory)
    with pytest.raises(CheckpointError, match="incomplete"):
        load_checkpoint(directory)
    save_checkpoint(directory, second, TOKENIZER, {"n": 2})
    assert same(load_checkpoint(directory).model, second)


def test_a_copied_directory_is_enough(saved, tmp_path):
    directory, model = saved
    shutil.copytree(directory, tmp_path / "elsewhere")
    shutil.rmtree(directory)
    assert same(load_checkpoint(tmp_path / "elsewhere").model, model)
