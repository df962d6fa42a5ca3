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
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch

from jevons.bench.llama_cpp import LlamaCpp
from jevons.data.tokenizer import Tokenizer
from jevons.store.checkpoint import load_checkpoint
from jevons.tasks.registry import load_task


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
