"""Conversions between precisions: exact where they can be, within one FP8 step where not, whole files or none."""

import json
import os
import random
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from nets import lively, llama, nano, qwen2
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from jevons.cli import app
from jevons.config import ConfigError, ModelConfig
from jevons.data.tokenizer import train_tokenizer
from jevons.model import build_model
from jevons.store import convert as cv
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.store.convert import convert
from jevons.store.files import CheckpointError, StoreError
from jevons.store.safetensors_io import INDEX, read_headers, read_tensors
from jevons.store.stream import ConvertError, Source, in_fp8

VOCAB = 288
TOKENIZER = train_tokenizer(["3 7 19 -> 40\n"] * 5, VOCAB)
WIDE = dict(vocab_size=VOCAB, hidden_size=160, intermediate_size=288)  # more than one block, the last ones partial
CONFIGS = {"v3": lambda: nano(**WIDE), "qwen2": lambda: qwen2(**WIDE, tie_word_embeddings=True), "llama": lambda: llama(**WIDE)}
F8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A training checkpoint, never written to."""
    directory = tmp_path_factory.mktemp("base") / "trained"
    save_checkpoint(directory, lively(CONFIGS["v3"]()), TOKENIZER, {"tokens": 5})
    return directory


@pytest.fixture(scope="module")
def fp8(base, tmp_path_factory):
    return convert(base, "fp8", tmp_path_factory.mktemp("fp8") / "c").path


def tensors_of(directory):
    return {name: t.clone() for name, t in read_tensors(directory).items()}


def changed(source, target, change):
    """A copy of a one-file checkpoint with its tensors changed."""
    shutil.copytree(source, target)
    tensors = tensors_of(source)
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / INDEX).unlink(missing_ok=True)
    return target


def step_of(w):
    """E4M3's step at every value of [M, N] under 128 x 128 scales of its own, float64, by the format's definition."""
    steps = torch.empty(w.shape, dtype=torch.float64)
    for i in range(0, w.shape[0], 128):
        for j in range(0, w.shape[1], 128):
            block = w[i : i + 128, j : j + 128].double()
            scale = block.abs().max() / 448
            exponent = torch.floor(torch.log2((block / scale).abs().clamp_min(2.0**-6)))
            steps[i : i + 128, j : j + 128] = scale * torch.exp2(exponent - 3)
    return steps


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_every_precision(tmp_path, name):
    model = lively(CONFIGS[name]())
    save_checkpoint(tmp_path / "hf", model, TOKENIZER, {"tokens": 5})
    limit = random.choice([10**9, 100_000])
    for before, after in [("hf", "bf16"), ("bf16", "fp8"), ("fp8", "bf16-again"), ("bf16-again", "hf-again")]:
        convert(tmp_path / before, after.removesuffix("-again"), tmp_path / after, max_shard_bytes=limit)
    first, bf16, blocks, last = (tensors_of(tmp_path / d) for d in ("hf", "bf16", "fp8", "hf-again"))
    assert first.keys() == bf16.keys() == last.keys()
    assert {n: (t.shape, t.dtype) for n, t in first.items()} == {n: (t.shape, t.dtype) for n, t in last.items()}
    quantised = 0
    for tensor_name, w in first.items():
        if tensor_name.endswith("e_score_correction_bias"):
            assert torch.equal(w, last[tensor_name]) and blocks[tensor_name].dtype is torch.float32
            continue
        assert torch.equal(bf16[tensor_name], w.bfloat16())
        if blocks[tensor_name].dtype is F8:
            quantised += 1
            error = (last[tensor_name].double() - bf16[tensor_name].double()).abs()
            assert (error <= step_of(bf16[tensor_name])).all(), tensor_name
            assert error.max() > 0
        else:
            assert torch.equal(last[tensor_name], w.bfloat16().float())
    assert quantised == sum(n.endswith("_scale_inv") for n in blocks) > 5
    loaded = load_checkpoint(tmp_path / "hf-again")
    assert loaded.config == model.config and loaded.tokenizer.encode("3 7") == TOKENIZER.encode("3 7")
    assert loaded.provenance == {"tokens": 5, "converted": ["hf", "bf16", "fp8", "bf16", "hf"]}


def test_deepseeks_layout(base, fp8):
    """Which tensors are FP8 blocks, which stay, and what config.json says: the published checkpoint's."""
    config = json.loads((fp8 / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                                             "activation_scheme": "dynamic"}
    assert config["torch_dtype"] == "bfloat16"
    stored = {name: info.dtype for name, info in read_headers(fp8).items()}
    for name in read_headers(base):
        matrix = name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")
        if matrix and not name.endswith("eh_proj.weight"):
            assert stored.pop(name) == "F8_E4M3" and stored.pop(f"{name}_scale_inv") == "F32", name
        else:
            assert stored.pop(name) == ("F32" if name.endswith("e_score_correction_bias") else "BF16"), name
    assert not stored
    index = json.loads((fp8 / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(fp8).values())


def test_the_published_census():
    """Elements by type of DeepSeek-V3's own checkpoint (facts, section 1.6)."""
    v3 = ModelConfig(vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
                     num_hidden_layers=61,
                     num_attention_heads=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
                     topk_group=4, first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                     qk_rope_head_dim=64, v_head_dim=128, num_nextn_predict_layers=1)
    count = {"fp8": 0, "bf16": 0, "f32": 0}
    for name, view in build_model(v3, device="meta").hf_state_dict().items():
        if in_fp8(name, tuple(view.shape)):
            count["fp8"] += view.numel()
            count["f32"] += -(-view.shape[0] // 128) * -(-view.shape[1] // 128)
        else:
            count["f32" if name.endswith("e_score_correction_bias") else "bf16"] += view.numel()
    assert count == {"fp8": 680_571_043_840, "bf16": 3_918_786_560, "f32": 41_555_600}


def test_torchs_own_reader_opens_the_fp8_output(base, tmp_path):
    from torch.distributed.checkpoint import QuantizedHuggingFaceStorageReader, load

    for limit in (10**9, 60_000):
        out = convert(base, "fp8", tmp_path / str(limit), max_shard_bytes=limit).path
        source = Source(out)
        state = {name: torch.full(info.shape, torch.nan) for name, info in source.tensors.items()}
        load(state, storage_reader=QuantizedHuggingFaceStorageReader(str(out)), no_dist=True)
        for name, tensor in state.items():
            assert torch.equal(tensor, source.read(name)), name


def test_transformers_opens_the_bf16_output(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = convert(base, "bf16", tmp_path / "c").path
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert loaded.dtype is torch.bfloat16 and not info["missing_keys"] and not info["mismatched_keys"]
    layers = load_checkpoint(base).config.num_hidden_layers
    assert all(key.startswith(f"model.layers.{layers}.") for key in info["unexpected_keys"])
    state, ours = loaded.state_dict(), tensors_of(out)
    same = [n for n in ours if n in state]
    assert len(same) > 20 and all(torch.equal(state[n].float(), ours[n].float()) for n in same)
    assert transformers.AutoTokenizer.from_pretrained(out).encode("3 7") == TOKENIZER.encode("3 7")


def test_one_tensor_at_a_time(base, tmp_path, monkeypatch):
    alive, read = [], Source.read

    def spy(self, name, dtype=torch.float32):
        assert sum(ref() is not None for ref in alive) <= 2
        tensor = read(self, name, dtype)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Source, "read", spy)
    for kind in ("bf16", "fp8", "gguf"):
        alive.clear()
        convert(base, kind, tmp_path / kind)
        assert len(alive) >= 40


def test_scales_may_lie_in_another_shard(fp8, tmp_path):
    shutil.copytree(fp8, tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors_of(fp8).items():
        shards["b.safetensors" if name.endswith("_scale_inv") else "a.safetensors"][name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / "c" / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (tmp_path / "c" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    one, two = (tensors_of(convert(d, "bf16", tmp_path / o).path) for d, o in ((fp8, "one"), (tmp_path / "c", "two")))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_every_byte_is_reported_and_the_default_name_says_what_it_is(base, tmp_path):
    shutil.copytree(base, tmp_path / "mine")
    seen = []
    done = convert(tmp_path / "mine", "bf16", progress=lambda now, total: seen.append((now, total)))
    assert done.path == tmp_path / "mine-bf16" and done.nbytes == sum(p.stat().st_size for p in done.path.iterdir())
    total = sum(i.end - i.start for i in Source(base).tensors.values())
    assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) == done.tensors
    assert convert(tmp_path / "mine", "gguf", gguf_type="q8_0").path == tmp_path / "mine-q8_0.gguf"


SCALE = "model.layers.0.self_attn.o_proj.weight_scale_inv"


@pytest.mark.parametrize("value,message", [
    (torch.nan, "scale_inv holds nan"), (-1e-3, "scale_inv holds -0.001"), (torch.inf, "scale_inv holds inf")])
def test_scales_that_are_none(fp8, tmp_path, value, message):
    def spoil(tensors):
        tensors[SCALE].view(-1)[random.randrange(tensors[SCALE].numel())] = value

    bad = changed(fp8, tmp_path / "bad", spoil)
    for kind in ("bf16", "hf", "gguf"):
        with pytest.raises(CheckpointError, match=message) as caught:
            convert(bad, kind, tmp_path / "out")
        assert "layers.0.self_attn.o_proj" in str(caught.value) and "model.safetensors" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("change,message", [
    (lambda t: t.pop(SCALE), f"o_proj.weight is F8_E4M3, which needs two dimensions and a .*{SCALE}"),
    (lambda t: t.__setitem__(SCALE, torch.ones(1, 3)), "has shape \\[1, 3\\]; \\[2, 1\\] would be right"),
    (lambda t: t.__setitem__("model.norm.weight_scale_inv", torch.ones(1, 1)), "model.norm.weight_scale_inv scales BF16"),
    (lambda t: t.__setitem__("nothing_scale_inv", torch.ones(1, 1)), "nothing_scale_inv scales no tensor"),
    (lambda t: t.__setitem__("model.norm.weight", torch.ones(160, dtype=torch.int32)), "model.norm.weight is I32"),
    (lambda t: t[SCALE.removesuffix("_scale_inv")].view(torch.uint8)[3, 5].fill_(random.choice([0x7F, 0xFF])),
     "o_proj.weight holds a value that is not finite"),
    (lambda t: t.__setitem__("model.layers.9.x", torch.ones(2)), "model.layers.9.x has no place in this Deepseek"),
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight \\(1 in all\\) is missing"),
    (lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.weight holds a value that is not finite"),
])
def test_tensors_that_cannot_be(fp8, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert(changed(fp8, tmp_path / "bad", change), "bf16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_info_names_a_tensor_that_does_not_fit(base, tmp_path):
    bad = changed(base, tmp_path / "bad", lambda t: t.__setitem__("model.norm.weight", torch.ones(3)))
    result = CliRunner().invoke(app, ["info", str(bad)])
    assert result.exit_code != 0
    assert "model.norm.weight has shape [3]; [160] would be right" in f"{result.output} {result.exception}"


def test_what_is_refused(base, fp8, tmp_path):
    for arguments, message in [
            (dict(to="int4"), "--to int4 is not a format; hf, fp8, bf16, gguf are"),
            (dict(to="gguf", gguf_type="q3_k"), "--type q3_k is not a GGUF type"),
            (dict(to="bf16", gguf_type="f16"), "--type f16 is GGUF's"),
            (dict(to="hf"), "is float32 already"),
            (dict(to="bf16", out=tmp_path / "no" / "where"), "there is no directory"),
            (dict(to="bf16", out=base), "lie in each other"),
            (dict(to="bf16", out=base / "below"), "lie in each other"),
            (dict(to="bf16", out=base.parent, force=True), "lie in each other"),
    ]:
        with pytest.raises(ConvertError, match=message):
            convert(base, **arguments)
    with pytest.raises(ConvertError, match="is fp8 already; --to hf, bf16, gguf would"):
        convert(fp8, "fp8", tmp_path / "again")
    with pytest.raises(ConfigError, match="config.json does not exist"):
        convert(tmp_path, "bf16")
    assert not list(tmp_path.iterdir())


def test_a_missing_shard_is_named(base, tmp_path):
    out = convert(base, "bf16", tmp_path / "c", max_shard_bytes=60_000).path
    shard = sorted(out.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        convert(out, "hf", tmp_path / "out")


def test_what_is_there_stays_unless_forced(base, fp8, tmp_path):
    out = tmp_path / "out"
    convert(base, "bf16", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ConvertError, match="exists; --force would replace it"):
        convert(base, "fp8", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    convert(base, "fp8", out, force=True)
    assert {n: i.dtype for n, i in read_headers(out).items()} == {n: i.dtype for n, i in read_headers(fp8).items()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for kind in ("fp8", "gguf"):
        with pytest.raises(ConvertError, match="--force replaces only such"):
            convert(base, kind, tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("kind", ["fp8", "gguf"])
def test_an_interrupted_conversion_leaves_nothing(base, tmp_path, kind):
    def stop(now, total):
        if now > total // 2:
            raise KeyboardInterrupt

    convert(base, kind, tmp_path / "out")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(KeyboardInterrupt):
        convert(base, kind, tmp_path / "out", force=True, progress=stop)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failing_swap_puts_the_old_directory_back(base, tmp_path, monkeypatch):
    convert(base, "bf16", tmp_path / "out")
    rename, calls = os.rename, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(a, b)

    monkeypatch.setattr(cv.os, "rename", second_fails)
    with pytest.raises(StoreError, match="Input/output error"):
        convert(base, "fp8", tmp_path / "out", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and Source(tmp_path / "out").precision == "bf16"


@pytest.mark.parametrize("kind", ["bf16", "gguf"])
def test_a_full_disk(base, tmp_path, kind):
    """A real limit of the operating system: one clear line, the old output intact, nothing partial beside it."""
    convert(base, kind, tmp_path / "out")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    size = max(map(len, before.values()))
    code = (f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2); from jevons.cli import main; "
            f"sys.argv = ['jevons', 'convert', {str(base)!r}, '--to', {kind!r}, '--out', {str(tmp_path / 'out')!r}, '--force']; "
            "main()")
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120,
                         env=os.environ | {"PYTHONPATH": str(root)})
    assert run.returncode == 1 and f"error: {tmp_path / 'out'} could not be written: File too large" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command(base, tmp_path):
    def jevons(*args):
        return CliRunner().invoke(app, ["convert", *map(str, args)])

    result = jevons(base, "--to", "gguf", "--type", "q8_0", "--out", tmp_path / "m.gguf")
    assert result.exit_code == 0, result.output
    assert "note: llama.cpp's deepseek2 has no MTP module" in result.output and f"wrote {tmp_path / 'm.gguf'}: " in result.output
    assert isinstance(jevons(base, "--to", "int4").exception, ConvertError)
    assert isinstance(jevons(base, "--to", "gguf", "--out", tmp_path / "m.gguf").exception, ConvertError)
    assert jevons(base).exit_code == 2
    assert load_file(base / "model.safetensors").keys() == read_headers(base).keys()
