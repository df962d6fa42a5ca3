"""What the experiments on plain text share: characters as tokens, one training run of the package's own loop, the same
validation for all, and intervals over paired seeds.

Data is a text file (tiny-shakespeare): the first nine tenths train, the last tenth validates, as nanoGPT cuts it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from jevons.config import ModelConfig
from jevons.data.packing import Batch
from jevons.model import CausalLM, build_model
from jevons.recipe import OptimizerTable
from jevons.store.run_dir import MetricsLog
from jevons.train.loop import Loop, LoopSettings
from jevons.train.objective import LossParts, Objective, mtp_loss, token_losses, update_router_bias

T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, 1 to 9 degrees of freedom


@dataclass
class Text:
    """Ids of characters: train and validation, and the characters in the order of their ids."""

    train: torch.Tensor
    valid: torch.Tensor
    characters: str

    @classmethod
    def read(cls, path: Path) -> Text:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            sys.exit(f"--data {path}: {error.strerror}; a text file, such as tiny-shakespeare's input.txt, would be right")
        characters = "".join(sorted(set(text)))
        number = {c: i for i, c in enumerate(characters)}
        ids = torch.tensor([number[c] for c in text])
        cut = int(len(text) * 0.9)
        return cls(ids[:cut], ids[cut:], characters)


def windows(ids: torch.Tensor, starts: torch.Tensor, length: int) -> Batch:
    """Rows of `length` ids from each start, with the next ids as targets; the last row-end has no second-next id."""
    index = starts[:, None] + torch.arange(length)
    last = len(ids) - 1
    ones = torch.ones(index.numel())
    second = torch.ones(index.shape)
    second[:, -1] = 0  # `forward_train` feeds the MTP module the following row's first token there
    parts = [ids[index], ids[index + 1], ids[(index + 2).clamp(max=last)]]
    return Batch(*(p.flatten() for p in parts), ones, second.flatten(), torch.arange(length).repeat(len(starts)),
                 [(len(starts), length)], list(range(len(starts))), index.numel())


class Characters(Objective):
    """Random windows of the training text; a step's windows come from (seed, step) alone, whatever the model is."""

    def __init__(self, model: CausalLM, text: Text, *, seed: int, steps: int, rows: int, length: int, micros: int = 1,
                 bias_speed: float = 0.0, mtp_weight: Callable[[float], float] = lambda done: 0.0):
        self.model, self.text, self.seed, self.steps = model, text, seed, steps
        self.rows, self.length, self.micros = rows, length, micros
        self.bias_speed, self.mtp_weight = bias_speed, mtp_weight
        self._weight = 0.0
        self.loads: list[torch.Tensor] = []  # [R, E] of every step

    def next_batch(self, step: int) -> list[list[Batch]]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.text.train) - self.length, (self.rows,), generator=draw)
        self._weight = self.mtp_weight(step / self.steps)
        return [[windows(self.text.train, part, self.length) for part in starts.chunk(self.micros)]]

    def loss(self, batch: Batch) -> LossParts:
        share = batch.tokens / (self.rows * self.length)
        out = self.model.forward_train(batch.tokens_N, batch.positions_N, batch.segments, mtp=self._weight > 0)
        main = token_losses(self.model, out.hidden_ND, batch.targets_N, batch.weights_N) / batch.tokens
        loss = main + self.model.config.aux_loss_alpha * out.balance_loss
        if self._weight > 0:
            loss = loss + self._weight * mtp_loss(self.model, out, batch)
        return LossParts(loss * share, {"tokens": batch.tokens, "loss": main.item() * share}, out.load_RE)

    def after_update(self, load_RE: torch.Tensor | None) -> None:
        if load_RE is not None:
            self.loads.append(load_RE)
            update_router_bias(self.model, load_RE, self.bias_speed)

    def metrics(self, sums: dict[str, float]) -> dict[str, Any]:
        return sums


def train(model: CausalLM, objective: Characters, table: OptimizerTable, dtype: torch.dtype,
          on_step: Callable[[Loop, dict[str, Any]], None] = lambda loop, record: None) -> list[dict[str, Any]]:
    """The whole run in the package's loop; the log's records, one a step."""
    records = []
    with tempfile.TemporaryDirectory() as directory, MetricsLog(Path(directory) / "metrics.jsonl") as log:
        def note(record, steps):
            records.append(record)
            on_step(loop, record)

        settings = LoopSettings("text", Path(directory), table, 10**9, dtype, 0.0, on_step=note)
        loop = Loop(model, objective, settings, log)
        loop.save = lambda *args, **options: None  # results are kept per run, not per step
        loop.run()
    return records


@torch.no_grad()
def validate(model: CausalLM, text: Text, length: int, rows: int = 64, most: int | None = None) -> dict[str, Any]:
    """Over the whole validation text in windows that follow each other: main loss; with an MTP module its loss, and how often
    its best guess of the second-next token is what the main head finds best there; each router's load [R][E]."""
    starts = torch.arange(0, len(text.valid) - length - 1, length)[:most]
    model.eval()
    tokens = main = second = pairs = accepted = 0.0
    load = None
    for part in starts.split(rows):
        batch = windows(text.valid, part, length)
        out = model.forward_train(batch.tokens_N, batch.positions_N, batch.segments)
        logits = model.logits(out.hidden_ND).float()
        main += F.cross_entropy(logits, batch.targets_N, reduction="sum").item()
        tokens += batch.tokens
        load = out.load_RE if load is None or out.load_RE is None else load + out.load_RE
        if out.mtp_hidden_ND is not None:
            guess = model.logits(out.mtp_hidden_ND).float()
            losses = F.cross_entropy(guess, batch.mtp_targets_N, reduction="none")
            second += (losses * batch.mtp_weights_N).sum().item()
            inner = batch.mtp_weights_N[:-1] > 0
            accepted += (guess.argmax(-1)[:-1] == logits.argmax(-1)[1:])[inner].sum().item()
            pairs += int(inner.sum())
    model.train()
    found: dict[str, Any] = {"valid_loss": main / tokens, "valid_tokens": int(tokens)}
    if load is not None:
        found["load"] = load.tolist()
    if pairs:
        found |= {"mtp_loss": second / pairs, "acceptance_on_text": accepted / pairs}
    return found


@torch.no_grad()
def generated_acceptance(model: CausalLM, text: Text, prompts: int = 32, prompt: int = 32, new: int = 64) -> float:
    """Second-token acceptance where it is used: prompts of validation text are continued greedily, and the MTP module's best
    guess of the second-next token is held against what came."""
    model.eval()
    starts = torch.linspace(0, len(text.valid) - prompt - 1, prompts).long()
    ids = text.valid[starts[:, None] + torch.arange(prompt)]
    for _ in range(new):
        length = ids.shape[1]
        out = model.forward_train(ids.flatten(), torch.arange(length).repeat(prompts), [(prompts, length)], mtp=False)
        ids = torch.cat([ids, model.logits(out.hidden_ND.view(prompts, length, -1)[:, -1]).argmax(-1)[:, None]], 1)
    length = ids.shape[1]
    out = model.forward_train(ids.flatten(), torch.arange(length).repeat(prompts), [(prompts, length)])
    guess = model.logits(out.mtp_hidden_ND).argmax(-1).view(prompts, length)
    model.train()
    return (guess[:, prompt - 1 : -2] == ids[:, prompt + 1 :]).float().mean().item()


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by Student's t. One value has no interval: infinite."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    wide = T_975[len(values) - 2] * spread if len(values) - 2 < len(T_975) else 1.98 * spread
    return mean, mean - wide, mean + wide


def kept(out: Path | None, name: str, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`run()`, or what an earlier call with the same settings left in OUT/name.json: a stopped experiment goes on."""
    path = out / f"{name}.json" if out else None
    if path and path.is_file():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found
        sys.exit(f"{path} was made with other settings; give another --out, or remove it")
    began = time.process_time()
    found = run() | {"settings": settings, "cpu_seconds": round(time.process_time() - began, 1)}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(found))
        os.replace(path.with_suffix(".part"), path)
    return found


def arguments(description: str, settings: type) -> argparse.ArgumentParser:
    """What every experiment is told, and an option for each of its settings (a dataclass)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tiny-shakespeare's input.txt, or another text")
    parser.add_argument("--out", type=Path, help="where each run leaves its result; runs found there are not repeated")
    parser.add_argument("--quick", action="store_true", help="a few steps of a smaller model: shows that it runs, nothing else")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser


def settings_of(args: argparse.Namespace, settings: type, **quick: int) -> Any:
    """The settings that were given, or the `quick` ones; torch has its threads from here on."""
    torch.set_num_threads(args.threads)
    return settings(**quick) if args.quick else settings(**{name: getattr(args, name) for name in asdict(settings())})


def mixture(vocab: int, hidden: int, inter: int, layers: int = 4, **changes: Any) -> ModelConfig:
    """A V3-style model of 16 experts, 4 of them a token's."""
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, moe_intermediate_size=inter, num_hidden_layers=layers,
        num_attention_heads=4, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, n_group=4, topk_group=2,
        first_k_dense_replace=1, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
        max_position_embeddings=256, initializer_range=0.02, **{"aux_loss_alpha": 0.0} | changes)


def build(config: ModelConfig, seed: int) -> CausalLM:
    return build_model(config, seed=seed)
