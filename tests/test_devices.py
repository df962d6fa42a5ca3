"""`--device`: what is asked for is there or refused; and the GPU's code paths, taken on a CPU.

"cpu:0" is the CPU, but not the device that commands take the plain way for.
"""

import json
from dataclasses import replace

import pytest
import torch
from nets import lively, nano, qwen2
from own_tasks import Traced
from test_engine import engine_of, explain, request
from typer.testing import CliRunner

from jevons.cli import app
from jevons.data.packing import pack
from jevons.data.tokenizer import train_tokenizer
from jevons.engine.types import Request, SamplingParams
from jevons.model.offload import OffloadedExperts, expert_bytes
from jevons.numerics.memory import on_device
from jevons.reason.evaluate import evaluate
from jevons.runtime import Runtime
from jevons.store.checkpoint import save_checkpoint
from jevons.terminal.beside import context_that_fits
from jevons.terminal.checkpoint import open_checkpoint

CPU = Runtime.detect("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import random

    rng, task, path = random.Random(3), Traced(), tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([t for p in (task.sample(rng) for _ in range(50)) for t in (p.prompt, task.trace(p, rng))], 288)
    save_checkpoint(path, lively(nano(vocab_size=288, hidden_size=64)), tokenizer, {})
    return path


@pytest.fixture
def gpu(monkeypatch):
    """A machine that takes "cpu:0" for its GPU."""
    real = Runtime.detect
    monkeypatch.setattr(Runtime, "detect", lambda device=None: CPU if device == "cpu:0" else real(device))
    return "cpu:0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["serve"], ["chat"], ["eval", "--task", "countdown"]])
def test_a_gpu_that_is_not_there_is_refused(command, checkpoint):
    done = CliRunner().invoke(app, [command[0], str(checkpoint), *command[1:], "--device", "cuda"])
    assert done.exit_code and "no CUDA device" in str(done.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_runs_too(tmp_path):
    for command in (["up"], ["run"]):
        done = CliRunner().invoke(app, [*command, "countdown-laptop", "--out", str(tmp_path / "run"), "--device", "cuda"])
        assert done.exit_code and "no CUDA device" in str(done.exception)
        assert not (tmp_path / "run").exists()


def test_options_that_would_have_no_effect_are_refused(checkpoint, gpu):
    with pytest.raises(ValueError, match="--device cuda would be right"):
        open_checkpoint(checkpoint, None, "cpu", 1.0)
    with pytest.raises(ValueError, match="bf16 or fp8 would be right"):
        open_checkpoint(checkpoint, "int8", gpu)
    with pytest.raises(ValueError, match="'tpu'"):
        open_checkpoint(checkpoint, None, "tpu")


@pytest.mark.parametrize("weights", [None, "bf16", "fp8"])
def test_the_whole_model_on_the_gpu(weights, checkpoint, gpu):
    model = open_checkpoint(checkpoint, weights, gpu).model
    bank = model.layers[1].mlp.experts
    assert isinstance(bank.down_proj, list) == (weights == "fp8")  # stacked: a captured step needs it
    assert model.embed_tokens.weight.dtype == CPU.dtype
    engine = engine_of(model, graphs=True)
    done = engine.generate([Request([5, 6, 7], SamplingParams(8, 0.0)) for _ in range(3)])
    assert {tuple(c.token_ids) for c in done} == {tuple(done[0].token_ids)} and len(done[0].token_ids) == 8


@pytest.mark.parametrize("weights", [None, "int4", "fp8"])
def test_experts_in_ram(weights, checkpoint, gpu):
    plain = open_checkpoint(checkpoint, weights, gpu, 0.0).model
    loaded = open_checkpoint(checkpoint, weights, gpu, 3 * expert_bytes(plain) / 2**30)
    banks = [m for m in loaded.model.modules() if isinstance(m, OffloadedExperts)]
    assert len(banks) == 2 and loaded.model.expert_counts["expert_slots"] == 3  # the MTP module's too
    asked = [Request([5, 6, 7], SamplingParams(12, 0.0)) for _ in range(2)]
    texts = [c.token_ids for c in engine_of(loaded.model).generate(asked)]
    assert texts[0] == texts[1] and loaded.model.expert_counts["expert_uses"] > 0


def test_what_the_engine_defaults_to_on_a_gpu(monkeypatch):
    """bf16 cells and static steps, with the same tokens as the model's own float32 by `explain`'s measure where it is float32."""
    from jevons.engine import engine as module

    monkeypatch.setattr(module, "defaults", lambda model, dtype, graphs: (model.embed_tokens.weight.dtype, True))
    model = lively(qwen2())
    engine, asked = engine_of(model), [request(temperature=0.0) for _ in range(5)]
    assert engine.graphs is not None and engine.cache.data.shape[1] == engine.scheduler.pool.free + 1
    for r, done in zip(asked, engine.generate(asked), strict=True):
        explain(model, r, done.token_ids, done.logprobs)


def test_batches_move_whole():
    batch = pack([([3, 4, 5], [0.0, 1.0, 1.0]), ([6, 7], [1.0, 1.0])], 0)
    assert on_device(batch, torch.device("cpu")) is batch
    moved = on_device(replace(batch, share=0.5), torch.device("meta"))
    assert all(v.device.type == "meta" for v in vars(moved).values() if isinstance(v, torch.Tensor))
    assert (moved.segments, moved.order, moved.tokens, moved.share) == (batch.segments, batch.order, batch.tokens, 0.5)


def test_the_context_that_a_gpu_holds(monkeypatch):
    class OnGpu:
        class embed_tokens:
            weight = type("W", (), {"device": torch.device("cuda"), "itemsize": 2})

    config = nano(max_position_embeddings=128)
    from jevons.plan import kv_bytes_per_token

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (kv_bytes_per_token(config, 2) * 4 * 100, 10**12))
    assert context_that_fits(config, 4, OnGpu) == 75
    assert context_that_fits(config, 1, OnGpu) == 128 == context_that_fits(config, 1)


def test_evaluation_runs_on_what_was_opened(checkpoint, gpu):
    loaded = open_checkpoint(checkpoint, None, gpu, 0.0)
    result, _ = evaluate(loaded.model, loaded.tokenizer, Traced(), n=3, max_tokens=8)
    assert json.dumps(result.record()) and result.n == 3
