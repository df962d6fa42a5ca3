"""Loading: FP8 blocks kept or dequantised, memory maps without a copy, the MTP layer, and every damage named."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from nets import lively, llama, nano, qwen2, random_ids

from jevons.engine.engine import Engine
from jevons.engine.types import Request, SamplingParams
from jevons.model import KVCache, build_meta
from jevons.numerics import Fp8Weight, Rows, dense, grouped_linear, linear
from jevons.numerics.fp8 import dequantise_blocks, quantise_blocks
from jevons.store import safetensors_io as io
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.store.files import CheckpointError

FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
PROJECTION = re.compile(r"(_proj|_proj_with_mqa)\.weight$")


def rewrite(directory, change, dtype=None, **config):
    """Change a checkpoint's tensors (a dictionary, in place) and its config."""
    tensors = {name: t.clone() for name, t in io.read_tensors(directory).items()}
    change(tensors)
    for path in directory.glob("model*"):
        path.unlink()
    io.write_tensors(directory, tensors)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def to_fp8(tensors):
    for name in [n for n in tensors if PROJECTION.search(n) and "eh_proj" not in n]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantise_blocks(tensors[name].float())


def wide():
    """Partial edge blocks everywhere: widths over 128 that are no multiples of it."""
    return nano(hidden_size=152, intermediate_size=200, moe_intermediate_size=136, kv_lora_rank=144, q_lora_rank=136)


@pytest.fixture
def fp8_checkpoint(tmp_path):
    save_checkpoint(tmp_path, lively(wide()), None, {})
    rewrite(tmp_path, to_fp8, quantization_config=FP8_CONFIG)
    return tmp_path


def plain_dequantised(codes, scale_inv):
    """By its definition, element by element in float64."""
    block = [[float(scale_inv[i // 128, j // 128]) for j in range(codes.shape[1])] for i in range(codes.shape[0])]
    return codes.double() * torch.tensor(block, dtype=torch.float64)


def load(directory, **options):
    return load_checkpoint(directory, need_tokenizer=False, **options).model


@torch.no_grad()
def hidden_of(model, ids):
    cache, pages = KVCache(model.config, 16, 8), torch.arange(16)[None]
    meta = build_meta(pages, [0], [len(ids)], 8)
    return model(torch.tensor(ids), meta.positions_N, cache, meta)


def test_fp8_weights_are_their_codes_times_their_scales(fp8_checkpoint):
    stored, loaded = io.read_tensors(fp8_checkpoint), load(fp8_checkpoint).hf_state_dict()
    checked = 0
    for name, tensor in loaded.items():
        if stored[name].dtype == torch.float8_e4m3fn:
            expected = plain_dequantised(stored[name], stored[f"{name}_scale_inv"])
            torch.testing.assert_close(tensor.double(), expected, atol=0, rtol=1e-6)
            checked += 1
    assert checked == sum(name.endswith("_scale_inv") for name in stored) > 40


def test_kept_fp8_blocks_give_the_same_network(fp8_checkpoint):
    """Prefill, absorbed decode (kv_b is FP8 too), the MTP module and 20 greedy tokens: blocks kept or dequantised."""
    kept, opened = load(fp8_checkpoint, frozen=True), load(fp8_checkpoint)
    attn, experts = kept.layers[1].self_attn, kept.layers[1].mlp.experts
    assert isinstance(attn.kv_b_proj.weight, Fp8Weight) and isinstance(attn.qkv_a_proj.weight, Rows)
    assert all(isinstance(w, Fp8Weight) for w in (*experts.down_proj, *kept.mtp[0].mlp.experts.down_proj))
    ids = random_ids(50)
    hidden = hidden_of(opened, ids)
    torch.testing.assert_close(hidden_of(kept, ids), hidden, atol=1e-4, rtol=1e-4)
    mtp = [model.forward_train(torch.tensor(ids), torch.arange(50), [(1, 50)]).mtp_hidden_ND for model in (kept, opened)]
    torch.testing.assert_close(*mtp, atol=1e-4, rtol=1e-4)
    answers = [Engine(m, -1, max_batch=1).generate([Request(ids, SamplingParams(20, 0.0))])[0].token_ids for m in (kept, opened)]
    assert answers[0] == answers[1]


def test_kept_fp8_blocks_save_as_they_were(fp8_checkpoint, tmp_path):
    save_checkpoint(tmp_path / "again", load(fp8_checkpoint, frozen=True), None, {})
    first, second = (io.read_tensors(d) for d in (fp8_checkpoint, tmp_path / "again"))
    assert set(first) == set(second)
    assert all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == FP8_CONFIG


def test_packed_weights_multiply_like_their_dense_selves():
    m, n = random.randint(1, 700), random.randint(1, 300)
    w = torch.randn(m, n)
    packed = Fp8Weight(*quantise_blocks(w))
    both, bias = Rows([packed, w[: m // 2 + 1]]), torch.randn(m + m // 2 + 1)
    expected = torch.cat([plain_dequantised(packed.codes, packed.scale_inv), w[: m // 2 + 1].double()])
    x = torch.randn(3, 5, n)
    torch.testing.assert_close(dense(both, torch.float32).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(linear(x, both, bias).double(), x.double() @ expected.T + bias.double(), atol=1e-3, rtol=1e-4)
    assert both.shape == expected.shape and both.linear(x, None).shape == (3, 5, len(bias))
    ends = torch.tensor([2, 2, 7, 15], dtype=torch.int32)  # an expert without rows among them
    experts = [torch.randn(6, n) for _ in range(4)]
    rows = x.flatten(0, 1)
    one_by_one = torch.cat([rows[:2] @ experts[0].T, rows[2:7] @ experts[2].T, rows[7:] @ experts[3].T])
    torch.testing.assert_close(grouped_linear(rows, experts, ends), one_by_one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_dequantisation_is_the_reference(dtype):
    """To the bit, for every code that is a number, subnormal ones and zeros of both signs included."""
    rows, columns = 128 * random.randint(1, 9), 128 * random.randint(1, 4)
    every = torch.arange(256, dtype=torch.uint8)
    every[[0x7F, 0xFF]] = 0  # NaN
    codes = every[torch.randint(256, (rows, columns))].view(torch.float8_e4m3fn)
    scale_inv = torch.rand(rows // 128, columns // 128) * 0.01
    expected = dequantise_blocks(codes, scale_inv, dtype)
    assert torch.equal(Fp8Weight(codes, scale_inv).dense(dtype), expected)


@pytest.mark.parametrize("make", [nano, qwen2, lambda: qwen2(tie_word_embeddings=True), llama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_is_the_same_network(tmp_path, make, dtype):
    save_checkpoint(tmp_path, lively(make()), None, {}, dtype=dtype, max_shard_bytes=30_000)
    frozen, copied = load(tmp_path, frozen=True), load(tmp_path, dtype=dtype)
    assert frozen.embed_tokens.weight.dtype == dtype and frozen.rope.dtype == torch.float32
    assert not any(p.requires_grad for p in frozen.parameters())
    state, expected = frozen.hf_state_dict(), copied.hf_state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[n], expected[n]) for n in state)
    ids = random_ids(20)
    difference = (hidden_of(frozen, ids) - hidden_of(copied, ids)).abs().float()
    assert difference.max() < 1e-4 if dtype == torch.float32 else difference.mean() < 0.03
    answer = Engine(frozen, -1, max_batch=2).generate([Request(ids, SamplingParams(5, 1.0))])[0]
    assert len(answer.token_ids) == 5


def memory(key):
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
@pytest.mark.parametrize("frozen", [False, True])
def test_peak_memory(tmp_path, frozen):
    """Mapped: nothing is copied. Copied: the model as it will live and one tensor, whatever the shards' number."""
    config = nano(hidden_size=256, intermediate_size=4096, num_hidden_layers=8, first_k_dense_replace=8, vocab_size=48,
                  num_nextn_predict_layers=0)
    save_checkpoint(tmp_path, lively(config), None, {}, max_shard_bytes=10**7)
    load(tmp_path, frozen=frozen)  # whatever is allocated once
    size = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert size > 90e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("the kernel keeps its counters")
    before = memory("VmRSS"), memory("RssAnon")
    model = load(tmp_path, frozen=frozen)
    if frozen:
        assert memory("RssAnon") - before[1] < 4e6
        assert sum(p.double().sum().item() for p in model.hf_state_dict().values()) != 0  # reads every page
        assert memory("RssAnon") - before[1] < 10e6
    else:
        assert memory("VmHWM") - before[0] < size + 10e6


# -- the MTP layer ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_mtp_layer_is_the_one_transformers_reads(tmp_path):
    """model.layers.N.* through `transformers`' own MTP layer: order of the concatenation, and the normed hidden state."""
    transformers = pytest.importorskip("transformers")
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpLayer"):
        pytest.skip("this transformers has no MTP layer")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    yarn = dict(rope_type="yarn", factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
    save_checkpoint(tmp_path, lively(nano(num_attention_heads=4, rope_scaling=yarn)), None, {})
    ours, n = load(tmp_path), 30
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prefix = f"model.layers.{ours.config.num_hidden_layers}."
    stored = {k.removeprefix(prefix): t for k, t in io.read_tensors(tmp_path).items() if k.startswith(prefix)}
    theirs = layers.MtpLayer(main.config, v3.DeepseekV3DecoderLayer, v3.DeepseekV3RMSNorm, ours.config.num_hidden_layers)
    experts = range(ours.config.n_routed_experts)
    for name, tensor in theirs.state_dict().items():
        local = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        if name.endswith("experts.gate_up_proj"):
            gate_up = [[stored[f"mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")] for e in experts]
            value = torch.stack([torch.cat(pair) for pair in gate_up])
        elif name.endswith("experts.down_proj"):
            value = torch.stack([stored[f"mlp.experts.{e}.down_proj.weight"] for e in experts])
        else:
            value = stored[local]
        tensor.copy_(value)
    ids = torch.tensor([random_ids(n + 1)])
    normed = main.model(ids[:, :n]).last_hidden_state
    embeds = main.model.embed_tokens(ids[:, 1:])
    mask = torch.full((1, 1, n, n), float("-inf")).triu(1)
    expected = theirs.eval()(embeds, normed, main.model.rotary_emb(embeds, torch.arange(n)[None]), mask, None, None)[0]
    out = ours.forward_train(ids[0], torch.arange(n + 1), [(1, n + 1)])
    torch.testing.assert_close(out.mtp_hidden_ND[:n], expected, atol=1e-4, rtol=1e-4)
    cache, meta = KVCache(ours.config, 8, 8, layers=1), build_meta(torch.arange(8)[None], [0], [n], 8)
    cached = ours.forward_mtp(out.hidden_ND[:n], ids[0, 1:], meta.positions_N, cache, meta)
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=1e-4)


# -- damage -------------------------------------------------------------------------------------------------------------

KV_B, NORM, DOWN = ("model.layers.1.self_attn.kv_b_proj.weight", "model.norm.weight",
                    "model.layers.1.mlp.experts.3.down_proj.weight")


def edit(name, value):
    return lambda t: t.update({name: value(t.get(name))})


def broken(scale, at):
    scale.view(-1)[-1] = at
    return scale


DAMAGE = {
    "an integer weight": (edit(DOWN, lambda t: torch.zeros(t.shape, dtype=torch.int64)), f"{DOWN} is stored as I64; F32 or"),
    "FP8 without scales": (lambda t: t.pop(f"{KV_B}_scale_inv"), f"{KV_B} is stored as F8_E4M3.*_scale_inv"),
    "FP8 norm": (edit(NORM, lambda t: t.to(torch.float8_e4m3fn)), f"{NORM} is stored as F8_E4M3"),
    "the other FP8": (edit(KV_B, lambda t: t.float().to(torch.float8_e5m2)), f"{KV_B}.*is stored as F8_E5M2|F8_E5M2; F8_E4M3"),
    "scales of nothing": (edit(f"{NORM}_scale_inv", lambda _: torch.ones(1, 1)), f"{NORM}_scale_inv.* scales a tensor .* F32"),
    "surplus scales": (edit("model.extra_scale_inv", lambda _: torch.ones(1, 1)), "model.extra_scale_inv has no place"),
    "scales of another shape": (edit(f"{KV_B}_scale_inv", lambda t: t.new_ones(1, 1)), f"{KV_B}_scale_inv has shape .1, 1."),
    "integer scales": (edit(f"{KV_B}_scale_inv", lambda t: t.int()), f"{KV_B}_scale_inv is stored as I32; F32 or BF16"),
    "a NaN scale": (edit(f"{DOWN}_scale_inv", lambda t: broken(t, float("nan"))), f"{DOWN}_scale_inv holds nan"),
    "a negative scale": (edit(f"{DOWN}_scale_inv", lambda t: broken(t, -1.0)), f"{DOWN}_scale_inv holds -1.0"),
    "an infinite scale": (edit(f"{DOWN}_scale_inv", lambda t: broken(t, float("inf"))), f"{DOWN}_scale_inv holds inf"),
    "a missing expert": (lambda t: t.pop(DOWN), r"has no place|scales|is missing from model\.safetensors"),
    "mis-shaped codes": (edit(DOWN, lambda t: t[:, :-1].contiguous()), f"{DOWN} has shape"),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_fp8_names_tensor_and_file(fp8_checkpoint, name, frozen):
    change, message = DAMAGE[name]
    rewrite(fp8_checkpoint, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(fp8_checkpoint, frozen=frozen)
    assert "model.safetensors" in str(error.value)


@pytest.fixture
def sharded(tmp_path):
    save_checkpoint(tmp_path, lively(nano()), None, {}, max_shard_bytes=60_000)
    return tmp_path, sorted(tmp_path.glob("model-*.safetensors"))


@pytest.mark.parametrize("frozen", [True, False])
def test_shards_missing_cut_or_swapped(sharded, frozen):
    directory, shards = sharded
    first, second = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(first[: len(first) // 2])
    with pytest.raises(CheckpointError, match=f"{shards[0].name} is truncated"):
        load(directory, frozen=frozen)
    shards[0].write_bytes(second)
    shards[1].write_bytes(first)
    with pytest.raises(CheckpointError, match="which model.safetensors.index.json|lacks tensor|is in two files"):
        load(directory, frozen=frozen)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing|lacks tensor|holds"):
        load(directory, frozen=frozen)


def test_a_header_of_two_gigabytes_is_refused_unread(tmp_path):
    save_checkpoint(tmp_path, lively(nano()), None, {})
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write((2 << 30).to_bytes(8, "little"))
        file.truncate(3 << 30)  # sparse
    with pytest.raises(CheckpointError, match="model.safetensors is .*no safetensors file: its header claims 2147483648"):
        load(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    io.write_tensors(tmp_path, {"a": torch.randn(1000)})
    info = io.read_headers(tmp_path)["a"]
    info.file.write_bytes(info.file.read_bytes()[:-100])
    for read in (io.read_tensor, lambda i: io.map_tensor(i, {})):
        with pytest.raises(CheckpointError, match="model.safetensors became shorter"):
            read(info)


def test_unaligned_tensors_of_other_writers(tmp_path):
    """A header that ends anywhere, an odd number of bytes before a float: nothing in the format forbids it."""
    values = torch.randn(5)
    header = json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
                         "b": {"dtype": "F32", "shape": [5], "data_offsets": [3, 23]}}).encode() + b" "
    content = len(header).to_bytes(8, "little") + header + b"\1\2\3" + values.numpy().tobytes()
    (tmp_path / io.SINGLE).write_bytes(content)
    infos = io.read_headers(tmp_path)
    assert torch.equal(io.read_tensors(tmp_path)["b"], values) and torch.equal(io.read_tensor(infos["b"]), values)
