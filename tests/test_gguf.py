"""GGUF files: every weight, key and token where llama.cpp looks for it; llama.cpp itself where JEVONS_LLAMA_CPP names its folder.

`JEVONS_LLAMA_CPP=package/bins/linux-x64 pytest tests/test_gguf.py` with npm's `@node-llama-cpp/linux-x64` runs all of it.
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from nets import lively, llama, nano, plain_logits, qwen2
from safetensors.torch import save_file

from jevons.data.tokenizer import train_tokenizer
from jevons.store import gguf as out
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.store.convert import convert
from jevons.store.files import CheckpointError
from jevons.store.safetensors_io import read_tensors
from jevons.store.stream import ConvertError

VOCAB = 320
TOKENIZER = train_tokenizer(["3 7 19 -> 40, so the answer is 3*7+19\n"] * 5, VOCAB)
CONFIGS = {name: lambda make=make, **c: make(**dict(vocab_size=VOCAB) | c)
           for name, make in (("deepseek2", nano), ("qwen2", qwen2), ("llama", llama))}
# Of a row's largest magnitude. Scales are float16; Q4_0 has -8..7 steps of 1/8 of it, so that one end is clipped.
ERROR = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}


def write(directory, config, kind="f16"):
    """(the published tensors, the file read back)"""
    save_checkpoint(directory / "c", lively(config), TOKENIZER, {})
    done = convert(directory / "c", "gguf", directory / "m.gguf", kind, force=True)
    return read_tensors(directory / "c"), Read(done.path), done


class Read:
    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.types = {t.name: t.tensor_type.name for t in reader.tensors}
        self.shapes = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
        self.tensors = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()).copy())
                        for t in reader.tensors}
        self.keys = {name: field.contents() for name, field in reader.fields.items()}


def near(found, expected, kind):
    assert found.shape == expected.shape
    largest = expected.abs().amax(-1, keepdim=True)
    assert ((found - expected).abs() <= largest * ERROR[kind] * 1.01 + 1e-7).all()


def turned(x, halves):
    """Rotary embedding of [T, d] at positions 0..T-1, over halves (Hugging Face) or neighbours (llama.cpp's llama)."""
    half = x.shape[1] // 2
    angle = torch.arange(len(x))[:, None] * 100.0 ** (-torch.arange(half) / half)
    a, b = (x[:, :half], x[:, half:]) if halves else (x[:, ::2], x[:, 1::2])
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 1)


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("arch", CONFIGS)
def test_every_weight_is_where_llama_cpp_looks(tmp_path, arch, kind):
    config = CONFIGS[arch](hidden_size=64, **(dict(kv_lora_rank=32, qk_nope_head_dim=32) if arch == "deepseek2" else {}))
    theirs, file, done = write(tmp_path, config, kind)
    assert done.tensors == len(file.tensors) and (tmp_path / "m.gguf").stat().st_size == done.nbytes
    simple = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
              "lm_head.weight": "output.weight", "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
              "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
              "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
              "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight"}
    if arch == "deepseek2":
        simple |= {"model.layers.1.mlp.gate.weight": "blk.1.ffn_gate_inp.weight",
                   "model.layers.1.mlp.gate.e_score_correction_bias": "blk.1.exp_probs_b.bias",
                   "model.layers.1.mlp.shared_experts.up_proj.weight": "blk.1.ffn_up_shexp.weight",
                   "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": "blk.1.attn_kv_a_mqa.weight",
                   "model.layers.0.self_attn.q_b_proj.weight": "blk.0.attn_q_b.weight"}
        for part in ("gate", "up", "down"):
            experts = torch.stack([theirs[f"model.layers.1.mlp.experts.{e}.{part}_proj.weight"] for e in range(8)])
            near(file.tensors[f"blk.1.ffn_{part}_exps.weight"], experts, kind)
    elif arch == "qwen2":
        simple |= {f"model.layers.1.self_attn.{p}_proj.{s}": f"blk.1.attn_{p}.{s}" for p in "qkv" for s in ("weight", "bias")}
    for name, ours in simple.items():
        near(file.tensors[ours], theirs[name], kind)
        vector = file.tensors[ours].dim() == 1 or "gate_inp" in ours
        assert not vector or (file.types[ours] == "F32" and torch.equal(file.tensors[ours], theirs[name]))
    right = {"token_embd.weight": kind.upper(), "output.weight": "Q8_0" if kind == "q4_0" else kind.upper()}
    assert {name: file.types[name] for name in right} == right
    assert not any("kv_b" in name or name.startswith("blk.2.") for name in file.tensors)


def test_latent_attention_is_absorbed_as_llama_cpp_does_it(tmp_path):
    config = CONFIGS["deepseek2"]()
    theirs, file, _ = write(tmp_path, config)
    heads, nope, v, rank = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    w, c, q = theirs["model.layers.1.self_attn.kv_b_proj.weight"], torch.randn(7, rank), torch.randn(heads, nope)
    kv = (c @ w.T).view(7, heads, nope + v)
    keys = torch.einsum("thn,hn->ht", kv[..., :nope], q)
    absorbed = torch.einsum("hrn,hn->hr", file.tensors["blk.1.attn_k_b.weight"], q) @ c.T
    torch.testing.assert_close(absorbed, keys, atol=2e-2, rtol=1e-3)
    values = torch.einsum("hvr,tr->thv", file.tensors["blk.1.attn_v_b.weight"], c)
    torch.testing.assert_close(values, kv[..., nope:], atol=2e-2, rtol=1e-3)


def test_llamas_rows_turn_in_neighbours(tmp_path):
    theirs, file, _ = write(tmp_path, CONFIGS["llama"]())
    x = torch.randn(9, 32)
    for name, heads in (("q", 4), ("k", 2)):
        halves = (x @ theirs[f"model.layers.0.self_attn.{name}_proj.weight"].T).view(9, heads, 16)
        pairs = (x @ file.tensors[f"blk.0.attn_{name}.weight"].T).view(9, heads, 16)
        for h in range(heads):
            torch.testing.assert_close(turned(pairs[:, h], False), turned(halves[:, h], True), atol=2e-2, rtol=1e-3)


def test_hyperparameters(tmp_path):
    c = CONFIGS["deepseek2"](routed_scaling_factor=2.5)
    _, file, _ = write(tmp_path, c)
    expected = {"block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings,
                "embedding_length": c.hidden_size, "attention.head_count": c.num_attention_heads, "attention.head_count_kv": 1,
                "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim, "attention.value_length": c.kv_lora_rank,
                "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim, "attention.value_length_mla": c.v_head_dim,
                "attention.q_lora_rank": c.q_lora_rank, "attention.kv_lora_rank": c.kv_lora_rank, "expert_gating_func": 2,
                "rope.dimension_count": c.qk_rope_head_dim, "leading_dense_block_count": 1, "expert_count": 8,
                "expert_used_count": 2, "expert_shared_count": 1, "expert_weights_scale": 2.5, "expert_weights_norm": True,
                "expert_group_count": 4, "expert_group_used_count": 2, "expert_feed_forward_length": c.moe_intermediate_size}
    assert {k: file.keys.get(f"deepseek2.{k}") for k in expected} == expected
    assert file.keys["deepseek2.attention.layer_norm_rms_epsilon"] == np.float32(c.rms_norm_eps)
    assert file.keys["general.architecture"] == "deepseek2" and file.keys["general.file_type"] == 1


def test_the_mtp_module_is_left_out_aloud(tmp_path):
    theirs, file, done = write(tmp_path, CONFIGS["deepseek2"]())
    left = [t for n, t in theirs.items() if n.startswith("model.layers.2.")]
    [note] = done.notes
    assert f"no MTP module: {len(left)} tensors of model.layers.2 ({sum(t.numel() for t in left):,} parameters" in note
    assert write(tmp_path, CONFIGS["deepseek2"](num_nextn_predict_layers=0))[2].notes == []


def test_rows_that_are_no_multiple_of_32_are_named(tmp_path):
    _, file, done = write(tmp_path, CONFIGS["qwen2"](intermediate_size=40), "q8_0")
    odd = [name for name, kind in file.types.items() if kind == "F16"]
    assert odd == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert done.notes == ["q8_0 packs rows of 32: 2 tensors with other rows are f16, blk.0.ffn_down.weight the first"]


def test_tied_embeddings_have_no_head(tmp_path):
    _, file, _ = write(tmp_path, CONFIGS["qwen2"](tie_word_embeddings=True), "q4_0")
    assert "output.weight" not in file.tensors and file.types["token_embd.weight"] == "Q8_0"


def test_tokenizer_and_template(tmp_path):
    _, file, _ = write(tmp_path, CONFIGS["qwen2"](vocab_size=VOCAB + 3))  # three rows that no token uses
    raw = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    config = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    tokens, kinds = file.keys["tokenizer.ggml.tokens"], file.keys["tokenizer.ggml.token_type"]
    added = {a["content"]: a["id"] for a in raw["added_tokens"]}
    assert {t: i for i, t in enumerate(tokens[:VOCAB])} == raw["model"]["vocab"] | added
    assert kinds[VOCAB:] == [gguf.TokenType.UNUSED] * 3 and len(set(tokens)) == VOCAB + 3
    for token in raw["added_tokens"]:
        assert kinds[token["id"]] == (gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    assert file.keys["tokenizer.ggml.merges"] == [" ".join(m) for m in raw["model"]["merges"]]
    assert file.keys["tokenizer.chat_template"] == config["chat_template"]
    assert (file.keys["tokenizer.ggml.model"], file.keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    ids = [file.keys[f"tokenizer.ggml.{r}_token_id"] for r in ("bos", "eos", "padding")]
    assert ids == [TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id] and file.keys["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("patterns,name", [
    ([list(out._PRE)[1][0]], "llama-bpe"),
    ([r"\p{N}{1,3}", list(out._PRE)[2][1], list(out._PRE)[2][2].replace(r"\r\n", "\r\n")], "deepseek-v3"),
    (["[\r\n]", r"\s?[A-Za-zµÀ-Ö]+", r"\s+$"], "deepseek-llm"),
    ([r"\p{N}{1,2}"], None), ([], None),
])
def test_pre_tokenizers(patterns, name):
    steps = [{"type": "Split", "pattern": {"Regex": p}} for p in patterns] + [{"type": "ByteLevel"}]
    raw = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    if name:
        assert out._pre_tokenizer(raw, "t.json") == name
        raw["model"]["type"] = "Unigram"
    with pytest.raises(ConvertError, match="t.json cuts text by"):
        out._pre_tokenizer(raw, "t.json")


def describe(config, **rope):
    writer = gguf.GGUFWriter(None, "deepseek2" if config.is_deepseek else "llama")
    out._describe(writer, config.model_copy(update={"rope_scaling": rope or None}))
    return {key.split(".", 1)[1]: field.value for key, field in writer.kv_data[0].items()}


def test_yarn():
    rope = dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=16.0)
    keys = describe(nano(), **rope, mscale=0.707, mscale_all_dim=0.707)
    assert keys["rope.scaling.type"] == "yarn" and keys["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert keys["rope.scaling.original_context_length"] == 4096 and keys["rope.scaling.factor"] == 40
    assert (keys["rope.scaling.yarn_beta_fast"], keys["rope.scaling.yarn_beta_slow"]) == (16, 1)
    assert "rope.scaling.yarn_log_multiplier" not in describe(llama(), **rope)
    assert "rope.scaling.type" not in describe(nano())
    for config, more in [(nano(), {}), (nano(), dict(mscale=1.0, mscale_all_dim=0.5)), (llama(), dict(attention_factor=1.0)),
                         (llama(), dict(mscale=1.0, mscale_all_dim=1.0))]:
        with pytest.raises(ConvertError, match="llama.cpp would scale attention otherwise"):
            describe(config, **rope, **more)


def test_llama3_factors_are_transformers(tmp_path):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=random.choice([64, 512, 8192]))
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope | {"rope_theta": 5e5})
    scaled, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    config = llama(head_dim=128, rope_theta=5e5).model_copy(update={"rope_scaling": rope})
    plain = 5e5 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    torch.testing.assert_close(plain / out._llama3_factors(config).double(), scaled.double(), atol=1e-12, rtol=1e-5)


@pytest.mark.parametrize("config,message", [
    (lambda: nano(num_hidden_layers=27), "27 layers for V2-Lite, which has no q_lora_rank; this one has 20"),
    (lambda: nano(n_shared_experts=0), "n_shared_experts is 0"),
])
def test_shapes_that_llama_cpp_would_not_load(config, message):
    with pytest.raises(ConvertError, match=message):
        describe(config())
    describe(nano(num_hidden_layers=27, q_lora_rank=None))


@pytest.mark.parametrize("change,message", [
    (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "experts.3.up_proj.weight is missing"),
    (lambda t: t.__setitem__("model.layers.9.x", torch.ones(2)), "model.layers.9.x has no place"),
    (lambda t: t.__setitem__("model.norm.weight", torch.ones(41)), "model.norm.weight has shape \\[41\\]; \\[40\\]"),
    (lambda t: t["lm_head.weight"].mul_(1e7), "lm_head.weight holds a value that is past the largest float16"),
])
def test_tensors_that_cannot_be(tmp_path, change, message):
    save_checkpoint(tmp_path / "c", lively(CONFIGS["deepseek2"]()), TOKENIZER, {})
    tensors = {n: t.clone() for n, t in read_tensors(tmp_path / "c").items()}
    change(tensors)
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "c", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_tokenizer_that_cannot_be(tmp_path):
    save_checkpoint(tmp_path / "c", lively(CONFIGS["qwen2"]()), TOKENIZER, {})
    path = tmp_path / "c" / "tokenizer.json"
    text = path.read_text()
    for spoiled, message in [("{}", "is not a tokenizer.json"), ("[", "is not a tokenizer.json"), (None, "does not exist"),
                             (text.replace('"id": 0,', f'"id": {VOCAB},'), f"has id {VOCAB}, config.json's vocab_size is")]:
        path.unlink()
        if spoiled is not None:
            path.write_text(spoiled)
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "c", "gguf")
        path.touch()


@pytest.mark.parametrize("arch", CONFIGS)
def test_fp8_blocks_go_to_gguf_too(tmp_path, arch):
    save_checkpoint(tmp_path / "c", lively(CONFIGS[arch]()), TOKENIZER, {})
    convert(tmp_path / "c", "fp8", tmp_path / "fp8")
    convert(tmp_path / "fp8", "hf", tmp_path / "hf")
    one, two = (Read(convert(tmp_path / d, "gguf", tmp_path / f"{d}.gguf").path) for d in ("fp8", "hf"))
    assert one.tensors.keys() == two.tensors.keys() and all(torch.equal(one.tensors[n], two.tensors[n]) for n in one.tensors)
    assert one.keys | {"general.name": ""} == two.keys | {"general.name": ""}


@pytest.mark.skipif("JEVONS_LLAMA_CPP" not in os.environ, reason="JEVONS_LLAMA_CPP does not name a folder with libllama")
@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(q_lora_rank=None, n_group=1, topk_group=1)])
def test_llama_cpp_gives_the_same_log_probs(tmp_path, arch, changes):
    if arch != "deepseek2" and "n_group" in changes:
        pytest.skip("deepseek2's")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
    from gguf_against_llama_cpp import LlamaCpp

    write(tmp_path, CONFIGS[arch](**changes))
    model = load_checkpoint(tmp_path / "c").model
    ids = [random.randrange(VOCAB) for _ in range(60)]
    llama_cpp = LlamaCpp(Path(os.environ["JEVONS_LLAMA_CPP"]), tmp_path / "m.gguf")
    found = torch.log_softmax(torch.from_numpy(llama_cpp.logits(ids)), -1)
    expected = torch.log_softmax(plain_logits(model, ids), -1)
    # a token whose two nearest experts tie may take the other one: the median is over tokens
    assert (found - expected).abs().mean(1).median() < 2e-2 < expected.std()
    text = "3 7 19 -> 40, it's the ANSWER  \n\n 12345 äöü <think>\n"
    assert llama_cpp.tokenize(text) == TOKENIZER._full.encode(text, add_special_tokens=False).ids
    shutil.rmtree(tmp_path)
