"""A GGUF file of ours in llama.cpp against the checkpoint it came from: token ids, log-probs on texts, greedy tokens.

    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz
    jevons convert CHECKPOINT --to gguf --type f16 --out model.gguf
    python benchmarks/gguf_against_llama_cpp.py CHECKPOINT model.gguf --lib package/bins/linux-x64

`--lib` is a folder that holds libllama (`llama_cpp/lib` of llama-cpp-python is one too). The reference is Jevons in float32,
or `transformers` with --reference transformers. Texts are the checkpoint's own task, or the lines of --texts. Exits with 1
when the mean difference of log-probs reaches --limit, a text has other ids, or greedy tokens differ where the two best
logits of the reference are more than --gap apart.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import torch

from jevons.data.tokenizer import Tokenizer
from jevons.store.checkpoint import load_checkpoint
from jevons.tasks.registry import load_task


class _Params(ctypes.Structure):
    """llama.cpp's parameter records, larger than any version's: passed by value on the stack, the callee reads its part."""

    _fields_ = [("word", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), *((name, ctypes.c_void_p) for name in (
        "token", "embd", "pos", "n_seq_id", "seq_id", "logits"))]


class LlamaCpp:
    """One model in llama.cpp's own shared library, unpatched, with its defaults but for sizes and one thread."""

    def __init__(self, lib: Path, model: Path, context: int = 1024):
        find = lambda stem: next(p for p in sorted(lib.glob(f"{stem}*.so*")) if p.name[len(stem)] == ".")
        ctypes.CDLL(str(find("libggml-base")), ctypes.RTLD_GLOBAL)
        ggml = ctypes.CDLL(str(find("libggml")), ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(find("libllama")), ctypes.RTLD_GLOBAL)
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(self._log)
        self.said: list[str] = []
        self.lib.llama_log_set(self._quiet, None)
        ggml.ggml_backend_load_all_from_path(str(lib).encode())
        self.lib.llama_backend_init()
        self.model = self._call("llama_model_load_from_file", ctypes.c_void_p, str(model).encode(),
                                self._call("llama_model_default_params", _Params))
        if not self.model:
            raise ValueError(f"llama.cpp does not load {model}: {''.join(self.said[-6:])}")
        params = self._call("llama_context_default_params", _Params)
        if list(params.word[:4]) != [512, 2048, 512, 1]:  # n_ctx, n_batch, n_ubatch, n_seq_max
            raise ValueError(f"llama.cpp's context parameters begin with {list(params.word[:4])}, not as known here")
        params.word[0] = params.word[1] = params.word[2] = context
        threads = next(i for i in range(4, 16) if params.word[i] == params.word[i + 1] == 4)
        params.word[threads] = params.word[threads + 1] = 1
        self.context = self._call("llama_init_from_model", ctypes.c_void_p, ctypes.c_void_p(self.model), params)
        self.vocab = self._call("llama_model_get_vocab", ctypes.c_void_p, ctypes.c_void_p(self.model))
        self.size = self._call("llama_vocab_n_tokens", ctypes.c_int32, ctypes.c_void_p(self.vocab))

    def _log(self, level: int, text: bytes, _: object) -> None:
        self.said.append(text.decode("utf-8", "replace"))

    def _call(self, name: str, result, *args):
        function = getattr(self.lib, name)
        function.restype = result
        return function(*args)

    def chat_template(self) -> str:
        text = self._call("llama_model_chat_template", ctypes.c_char_p, ctypes.c_void_p(self.model), None)
        return (text or b"").decode()

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt: nothing added, special tokens read from their text."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        n = self._call("llama_tokenize", ctypes.c_int32, ctypes.c_void_p(self.vocab), raw, len(raw), room,
                       len(room), False, True)
        return list(room[:n])

    def logits(self, ids: list[int], past: int = 0) -> np.ndarray:
        """[len(ids), vocabulary] float32 in one batch: of a new sequence, or of one that has `past` tokens in the cache."""
        n = len(ids)
        if not past:
            memory = self._call("llama_get_memory", ctypes.c_void_p, ctypes.c_void_p(self.context))
            self._call("llama_memory_clear", None, ctypes.c_void_p(memory), True)
        zero = (ctypes.c_int32 * 1)(0)
        arrays = [(ctypes.c_int32 * n)(*ids), (ctypes.c_int32 * n)(*range(past, past + n)), (ctypes.c_int32 * n)(*[1] * n),
                  (ctypes.c_void_p * n)(*[ctypes.addressof(zero)] * n), (ctypes.c_int8 * n)(*[1] * n)]
        token, pos, counts, seqs, want = [ctypes.addressof(a) for a in arrays]
        batch = _Batch(n, token, None, pos, counts, seqs, want)
        if self._call("llama_decode", ctypes.c_int32, ctypes.c_void_p(self.context), batch):
            raise ValueError(f"llama_decode failed: {''.join(self.said[-3:])}")
        rows = [np.ctypeslib.as_array(self._call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float),
                                                 ctypes.c_void_p(self.context), i), (self.size,)).copy() for i in range(n)]
        return np.stack(rows)


def reference_logits(checkpoint: Path, kind: str) -> Callable[[list[int]], torch.Tensor]:
    """ids -> logits [T, V] in float32."""
    if kind == "transformers":
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        return lambda ids: theirs(torch.tensor([ids])).logits[0]
    model = load_checkpoint(checkpoint, need_tokenizer=False).model

    def ours(ids: list[int]) -> torch.Tensor:
        out = model.forward_train(torch.tensor(ids), torch.arange(len(ids)), [(1, len(ids))], mtp=False)
        return model.logits(out.hidden_ND)

    return ours


def task_texts(checkpoint: Path, n: int, seed: int) -> list[tuple[str, str]]:
    """(rendered prompt, worked solution) of problems held out from training."""
    provenance = json.loads((checkpoint / "provenance.json").read_text(encoding="utf-8"))
    task = load_task(provenance["task"]["name"], provenance["task"]["args"])
    rng, tokenizer = random.Random(seed), Tokenizer.load(checkpoint)
    problems = [task.sample_heldout(rng) for _ in range(n)]
    prompts = [tokenizer.renderer().prompt([{"role": "user", "content": p.prompt}]) for p in problems]
    return [(tokenizer.decode(ids), task.trace(p, rng)) for ids, p in zip(prompts, problems, strict=True)]


@torch.no_grad()
def compare(checkpoint: Path, llama: LlamaCpp, texts: list[tuple[str, str]], reference: str, greedy: int, gap: float) -> dict:
    run, tokenizer = reference_logits(checkpoint, reference), tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    own, everything, likely = [], [], []
    other_ids, beyond, within = 0, 0, 0
    for prompt, rest in texts:
        ids = tokenizer.encode(prompt + rest, add_special_tokens=False).ids
        other_ids += llama.tokenize(prompt + rest) != ids
        expected = torch.log_softmax(run(ids).double(), -1)
        found = torch.log_softmax(torch.from_numpy(llama.logits(ids)).double(), -1)
        pick = lambda rows, ids=ids: rows[:-1].gather(1, torch.tensor(ids[1:])[:, None]).flatten()
        own.append((pick(expected) - pick(found)).abs())
        likely.append(pick(expected))
        everything.append((expected - found).abs().flatten())
        state = tokenizer.encode(prompt, add_special_tokens=False).ids
        theirs = llama.logits(state)[-1]
        for _ in range(greedy):  # token by token through llama.cpp's cache, on the reference's path
            best = run(state)[-1].topk(2)
            if int(best.indices[0]) != int(theirs.argmax()):
                wide = float(best.values[0] - best.values[1]) > gap
                beyond, within = beyond + wide, within + (not wide)
            theirs = llama.logits([int(best.indices[0])], len(state))[-1]
            state = [*state, int(best.indices[0])]
    own, everything, likely = torch.cat(own), torch.cat(everything), torch.cat(likely)
    return {"texts": len(texts), "tokens": len(own), "texts_with_other_ids": other_ids, "mean_log_prob": likely.mean().item(),
            "mean_abs_difference": own.mean().item(), "largest_difference": own.max().item(),
            "mean_over_vocabulary": everything.mean().item(), "greedy_tokens": greedy * len(texts),
            "greedy_different_beyond_gap": beyond, "greedy_different_within_gap": within,
            "same_chat_template": llama.chat_template() == config.get("chat_template", "")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--lib", type=Path, required=True)
    parser.add_argument("--reference", choices=["jevons", "transformers"], default="jevons")
    parser.add_argument("--texts", type=Path, help="a file with one text a line")
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--greedy", type=int, default=32, help="tokens after each prompt")
    parser.add_argument("--gap", type=float, default=1e-2)
    parser.add_argument("--limit", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.texts:
        lines = args.texts.read_text(encoding="utf-8").splitlines()[: args.n]
        texts = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines]
    else:
        texts = task_texts(args.checkpoint, args.n, args.seed)
    result = compare(args.checkpoint, LlamaCpp(args.lib, args.gguf), texts, args.reference, args.greedy, args.gap)
    print(json.dumps(result, indent=2))
    bad = result["mean_abs_difference"] >= args.limit or result["texts_with_other_ids"] or result["greedy_different_beyond_gap"]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
