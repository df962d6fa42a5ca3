"""The GPU's attention kernels against plain float64: on a GPU compiled, else run by Triton's interpreter on a CPU.

The interpreter has to be chosen before triton is imported, so the first test runs the others in a process of their own.
"""

import os
import random
import subprocess
import sys

import pytest
import torch

from jevons.config import ModelConfig
from jevons.numerics import triton_mla
from jevons.numerics.paged import grouped_heads, latent_heads

if triton_mla.triton is None:
    pytest.skip("triton is not installed", allow_module_level=True)

if not triton_mla.INTERPRETED and not torch.cuda.is_available():
    def test_in_the_interpreter():
        """All tests below."""
        env = os.environ | {"TRITON_INTERPRET": "1", "JEVONS_NATIVE": "0"}
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-rA", "-p", "no:cacheprovider", __file__], env=env,
                              capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert done.stdout.count("PASSED") >= 9, done.stdout[-3000:]

    def test_off_a_gpu_the_kernels_say_why_not():
        assert "no GPU" in triton_mla.why_not(torch.device("cpu"))
        assert not triton_mla.available(torch.zeros(1, 1, 16))


def test_splits_fill_the_chip_and_no_more():
    for _ in range(300):
        programs, longest = random.randint(1, 4000), random.randint(1, 200_000)
        tile, sms = random.choice([16, 32, 64]), random.choice([16, 108, 132])
        splits = triton_mla.choose_splits(programs, longest, tile, sms)
        assert 1 <= splits <= triton_mla.MOST_SPLITS
        assert splits == 1 or longest / splits >= triton_mla.LEAST_TILES * tile
        assert splits == 1 or programs * (splits - 1) < triton_mla.WAVES * sms
    assert triton_mla.choose_splits(2, 32_768, 32, 132) == 64  # one sequence of V3's 128 heads on an H100
    assert triton_mla.choose_splits(256, 32_768, 32, 132) == 2


@pytest.mark.parametrize("heads", [latent_heads(128, 512, 64, 1.0, 1e-6), latent_heads(16, 512, 64, 1.0, 1e-6),
                                   grouped_heads(12, 2, 128, 1.0), grouped_heads(32, 8, 64, 1.0)])
def test_tiles_fit_shared_memory(heads):
    for memory in (232_448, 166_912, 101_376):  # H100, A100, RTX 4090
        for itemsize in (2, 4):
            for queries in (1, 2, 4, 300):
                rows, cells, warps, stages = triton_mla.tiles(heads, queries, itemsize, memory)
                width = heads.plain + heads.rotary + (0 if heads.plain else heads.value)
                assert rows >= 16 and cells >= 16 and warps in (4, 8)
                assert (rows * (heads.plain + heads.rotary) + stages * cells * width) * itemsize <= memory
    assert triton_mla.tiles(latent_heads(128, 512, 64, 1.0, 1e-6), 1, 2, 232_448) == (64, 32, 8, 2)


if triton_mla.INTERPRETED or torch.cuda.is_available():
    from nets import lively, llama, nano, qwen2, random_ids
    from test_paged_attention import gqa_config, heads_of, mla_config, near, ragged, reference, scene
    from triton.runtime import interpreter

    from jevons.engine.engine import Engine
    from jevons.engine.types import Request, SamplingParams
    from jevons.model import attention, build_meta

    def _index(tensor, scope, real=interpreter._patch_lang_tensor):
        """numpy 2.4 makes no integer of an array with one element any more, which the interpreter does for loops' bounds."""
        real(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    if triton_mla.INTERPRETED:
        interpreter._patch_lang_tensor = _index
    device = "cpu" if triton_mla.INTERPRETED else "cuda"
    interpreted = pytest.mark.skipif(not triton_mla.INTERPRETED, reason="compares paths of the CPU")

    def attend(heads, q, cache, meta, splits=None, lengths=None):
        """Poisoned memory under the result: every element must be written."""
        real = torch.empty
        given = (q, cache.layers[1], meta.page_table_SP, *meta.on_device, meta.lengths_S if lengths is None else lengths)
        try:
            torch.empty = lambda *a, **k: real(*a, **k).fill_(float("nan"))
            return triton_mla.attend(heads, *(t.to(device) for t in given), meta.max_query, meta.max_context, splits).cpu()
        finally:
            torch.empty = real

    @pytest.mark.parametrize("make", [mla_config, gqa_config], ids=["mla", "gqa"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
    def test_any_table_any_lengths_any_splits(make, dtype):
        for _ in range(2 if dtype == torch.float32 else 1):
            config, (contexts, lens) = make(), ragged()
            contexts = [min(c, 200) for c in contexts[:3]]
            lens = [min(n, 7) for n in lens[:3]]
            heads = heads_of(config)
            cache, meta, kept = scene(config, contexts, lens, dtype)
            q = (torch.randn(sum(lens), heads.heads, heads.plain + heads.rotary) * random.choice([1, 3])).to(dtype)
            want = reference(heads, q, kept, contexts, lens)
            for splits in (1, random.randint(2, 7)):
                near(attend(heads, q, cache, meta, splits), want, kept, dtype, "gathered")

    def test_v3s_heads_with_drafts():
        config = nano(num_attention_heads=128, kv_lora_rank=512, qk_rope_head_dim=64)
        heads, contexts, lens = heads_of(config), [37, 0], [1, 2]
        cache, meta, kept = scene(config, contexts, lens, torch.bfloat16)
        q = torch.randn(3, 128, 576).bfloat16()
        got = attend(heads, q, cache, meta, 2)
        want = reference(heads, q, kept, contexts, lens)
        assert (got.double() - want).norm() / want.norm() < 1e-2

    def test_it_agrees_with_the_gathering_path_under_static_padding():
        """Rows with no cells give zeros, padded queries disturb nobody, one's own NaN stays one's own."""
        config = mla_config()
        heads, contexts, lens = heads_of(config), [40, 130, 3], [3, 3, 3]
        cache, meta, kept = scene(config, contexts, lens, torch.float32)
        q = torch.randn(9, heads.heads, heads.plain + heads.rotary)
        want = reference(heads, q, kept, contexts, lens)
        lengths = meta.lengths_S.clone()
        lengths[0] -= 2  # its last two queries are padding
        lengths[2] = 0
        got = attend(heads, q, cache, meta, 3, lengths)
        near(torch.cat([got[:1], got[3:6]]), torch.cat([want[:1], want[3:6]]), kept, torch.float32)
        assert (got[6:] == 0).all() and got.isfinite().all()
        q[4] = float("nan")
        got = attend(heads, q, cache, meta, 2)
        assert got[4].isnan().all()
        near(torch.cat([got[:4], got[5:]]), torch.cat([want[:4], want[5:]]), kept, torch.float32)

    def test_wrong_shapes_are_refused():
        heads = latent_heads(2, 16, 16, 1.0, 1e-6)
        with pytest.raises(ValueError, match=r"\[N, 2, 32\]"):
            triton_mla.attend(heads, torch.zeros(1, 2, 30), torch.zeros(1, 4, 32), torch.zeros(1, 1, dtype=torch.long),
                              *[torch.tensor([0, 1])] * 3, 1, 4)

    @interpreted
    @pytest.mark.parametrize("make", [nano, qwen2, llama])
    def test_the_layer_and_its_prompts(make, monkeypatch):
        """`cached` through the kernels is `cached` by gathering: a fresh prompt (keys and values per head), drafts after it."""
        config: ModelConfig = make()
        model, outs = lively(config), []
        attn = model.layers[0].self_attn
        x, y = torch.randn(11, config.hidden_size), torch.randn(4, config.hidden_size)
        for path in (True, False):
            monkeypatch.setattr(triton_mla, "available", lambda q, path=path: path)
            cache = attention.KVCache(config, 6, 8)
            table = torch.tensor([[4, 1], [0, 5]])
            with torch.no_grad():
                first = build_meta(table, [0, 0], [8, 3], 8)
                then = build_meta(table, [8, 3], [2, 2], 8)
                outs.append((attn.cached(x, model.rope[first.positions_N], 0, cache, first),
                             attn.cached(y, model.rope[then.positions_N], 0, cache, then), cache.data))
        for got, want in zip(*outs, strict=True):
            torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)

    @interpreted
    def test_the_engine_end_to_end():
        """Prompts, decode and the MTP module's drafts over static buffers: the same tokens as by gathering."""
        model, texts = lively(nano()), []
        asked = [Request(random_ids(random.randint(2, 9)), SamplingParams(6, 0.0 if i else 0.8, seed=i)) for i in range(3)]
        for path, graphs in ((True, True), (False, False)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton_mla, "available", lambda q, path=path: path)
                engine = Engine(model, -1, max_batch=4, max_len=64, speculate=2, graphs=graphs)
                again = [Request(r.prompt_ids, r.params) for r in asked]
                texts.append([c.token_ids for c in engine.generate(again)])
        assert texts[0] == texts[1]
