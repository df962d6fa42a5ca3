"""Group relative policy optimisation (V3 report eq. 26-28, R1 eq. 1-3), with the corrections that came after it.

`policy_loss` is pure and can be read beside the papers. Defaults: token-level sum over a constant (Dr. GRPO), no
division by std, clip 0.2/0.28 (DAPO), no KL, truncated answers masked, importance weights between the engine's and the
trainer's probabilities truncated at 2. `preset = "r1"` in a recipe is the published recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jevons.data.packing import Batch, Document, align, pack, take_documents
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.model import CausalLM
from jevons.numerics import upcast
from jevons.numerics.memory import on_device
from jevons.plan import forward_flops
from jevons.reason.rollout import Episode, Roller, Rollouts
from jevons.recipe import GRPOStage
from jevons.tasks.base import Task
from jevons.train.objective import LossParts, Objective, load_metrics, mtp_loss

MICRO_TOKENS = 4096  # every core of a CPU computes one at once
REFERENCE_EVERY = 400  # steps between copies of the policy into the reference (R1, appendix B.4)


@dataclass
class PolicyTerms:
    """Per token: what the loss needs beside the current log-probs."""

    old_N: torch.Tensor  # the trainer's log-probs when the rollouts were made
    behaviour_N: torch.Tensor  # the engine's
    advantage_N: torch.Tensor
    weight_N: torch.Tensor  # 1 / normaliser where the token counts, else 0
    reference_N: torch.Tensor | None = None


def policy_loss(logprob_N: torch.Tensor, terms: PolicyTerms, clip_low: float, clip_high: float, importance_cap: float,
                kl_beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, clipped_N, kl_N): -sum of weight * (min(rho A, clip(rho) A) * min(pi_old / pi_engine, cap) - beta k3).

    k3 = pi_ref/pi - ln(pi_ref/pi) - 1 >= 0. `clipped` is True where the clip holds the gradient back.
    """
    ratio = (logprob_N - terms.old_N).exp()
    unclipped = ratio * terms.advantage_N
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * terms.advantage_N
    importance = (terms.old_N - terms.behaviour_N).exp().clamp(max=importance_cap)
    gain = torch.minimum(unclipped, clipped) * importance
    kl = torch.zeros_like(logprob_N)
    if terms.reference_N is not None:
        log_ratio = terms.reference_N - logprob_N
        kl = log_ratio.exp() - log_ratio - 1
    loss = -((gain - kl_beta * kl) * terms.weight_N).sum()
    return loss, clipped < unclipped, kl


@dataclass
class Micro:
    """A packed micro-batch of episodes and, over its kept tokens only, what the loss needs."""

    batch: Batch
    keep_N: torch.Tensor  # flat positions that predict a completion token
    targets: torch.Tensor
    behaviour: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    share: float = 1.0  # of its update's tokens
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class GRPO(Objective):
    score = ("accuracy", 1)

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, task: Task, stage: GRPOStage, seed: int, engine: Engine):
        self.model, self.tokenizer, self.stage = model, tokenizer, stage
        self.steps = stage.steps
        self.roller = Roller(engine, tokenizer, task, stage, seed)
        self.reference = copy.deepcopy(model).requires_grad_(False) if stage.kl_beta > 0 else None
        self.dtype = torch.float32  # set by the pipeline to the loop's, for the passes taken outside of it
        self._rollouts: Rollouts | None = None
        self._load: torch.Tensor | None = None

    def spread(self, part: tuple[int, int], everyone: Callable[[Any], list[Any]]) -> None:
        """Roll out this rank's part of the problems; `everyone` gives all ranks' of something. Micro-batches are the same
        everywhere, and shared out after."""
        self.roller.part, self.roller.everyone = part, everyone

    def next_batch(self, step: int) -> list[list[Micro]]:
        if self.reference is not None and step > 0 and step % REFERENCE_EVERY == 0:
            self.reference.load_state_dict(self.model.state_dict())
        rollouts = self._rollouts = self.roller.roll(step, self.interrupt)
        self._load = None
        episodes = [e for group in rollouts.groups for e in group]
        if not episodes:
            return []
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(step)).tolist()
        share = -(-len(episodes) // self.stage.minibatches)
        updates = [self._micros([episodes[i] for i in order[first : first + share]]) for first in range(0, len(order), share)]
        if self.stage.minibatches > 1 or self.reference is not None:
            rank, ranks = self.roller.part
            self._recompute([micro for update in updates for micro in update[rank::ranks]])
        return updates

    def _micros(self, episodes: Sequence[Episode]) -> list[Micro]:
        """Micro-batches of one update; every token's weight already holds the update's normaliser."""
        stage, micros = self.stage, []
        remaining = sorted(episodes, key=lambda e: len(e.completion.prompt_ids) + e.tokens)
        documents: list[Document] = [(e.completion.prompt_ids + e.completion.token_ids,
                                      [0.0] * len(e.completion.prompt_ids) + [1.0] * e.tokens) for e in remaining]
        while documents:
            chosen = take_documents(iter(documents), MICRO_TOKENS)
            part, remaining = remaining[: len(chosen)], remaining[len(chosen) :]
            documents = documents[len(chosen) :]
            batch = pack(chosen, self.tokenizer.pad_id)
            keep = batch.weights_N.nonzero().squeeze(1)
            prompts = [[0.0] * len(e.completion.prompt_ids) for e in part]

            def per_token(values: list[list[float]], prompts=prompts, batch=batch, keep=keep) -> torch.Tensor:
                return align(batch, [p + v for p, v in zip(prompts, values, strict=True)])[keep]

            def norm(e: Episode) -> float:
                if stage.mask_truncated and e.truncated:
                    return 0.0
                return 1.0 / (len(episodes) * (stage.max_tokens if stage.loss_normaliser == "constant" else max(1, e.tokens)))

            micros.append(Micro(batch, keep, batch.targets_N[keep], per_token([e.completion.logprobs for e in part]),
                                per_token([[e.advantage] * e.tokens for e in part]),
                                per_token([[norm(e)] * e.tokens for e in part])))
        total = sum(m.keep_N.numel() for m in micros)
        for micro in micros:
            micro.share = micro.keep_N.numel() / total
        return micros

    def _logprobs(self, model: CausalLM, micro: Micro, hidden_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the tokens taken, and of the whole vocabulary, at the rollouts' temperature.

        The head runs in float32: bf16 logits alone were most of the gap to the engine's log-probs."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            logits = model.logits(upcast(hidden_ND.index_select(0, micro.keep_N))) / self.stage.temperature
        everything = logits.log_softmax(-1)
        return everything.gather(1, micro.targets[:, None]).squeeze(1), everything

    @torch.no_grad()
    def _recompute(self, micros: list[Micro]) -> None:
        """Log-probs of the policy before this step's updates, and of the reference."""
        device = self.model.embed_tokens.weight.device
        for micro in micros:
            here = on_device(micro, device)
            b = here.batch
            with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                out = self.model.forward_train(b.tokens_N, b.positions_N, b.segments, mtp=False)
                micro.old = self._logprobs(self.model, here, out.hidden_ND)[0]
                if self.reference is not None:
                    out = self.reference.forward_train(b.tokens_N, b.positions_N, b.segments, mtp=False)
                    micro.reference = self._logprobs(self.reference, here, out.hidden_ND)[0]

    def loss(self, micro: Micro) -> LossParts:
        stage, b = self.stage, micro.batch
        with_mtp = bool(self.model.mtp) and stage.mtp_weight > 0
        out = self.model.forward_train(b.tokens_N, b.positions_N, b.segments, mtp=with_mtp, detach_trunk=True)
        logprob, everything = self._logprobs(self.model, micro, out.hidden_ND)
        old = logprob.detach() if micro.old is None else micro.old
        terms = PolicyTerms(old, micro.behaviour, micro.advantage, micro.weight, micro.reference)
        loss, clipped, kl = policy_loss(logprob, terms, stage.clip_low, stage.clip_high, stage.importance_cap, stage.kl_beta)
        count = micro.keep_N.numel()
        with torch.no_grad():
            sums = {"loss": loss.item(), "count": count, "clipped": clipped.sum().item(), "kl": kl.sum().item(),
                    "entropy": -(everything.exp() * everything).sum().item(),
                    "gap": (old - micro.behaviour).abs().sum().item()}
        if with_mtp:  # the module keeps learning on the rollouts; trunk, embedding and head do not feel it
            second = mtp_loss(self.model, out, b, detach_head=True)
            sums |= {"mtp": second.item() * count}
            loss = loss + stage.mtp_weight * micro.share * second
        return LossParts(loss, sums, out.load_RE)

    def sampling_flops(self) -> float:
        """One forward pass of every prompt and every answer, those without spread too."""
        lengths = [len(e.completion.prompt_ids) + e.tokens for e in self._rollouts.all]
        return sum(n * forward_flops(self.model.config, (n + 1) / 2) for n in lengths)

    def after_update(self, load_RE: torch.Tensor | None) -> None:
        if load_RE is not None:  # logged only: during RL the router bias is frozen
            self._load = load_RE if self._load is None else self._load + load_RE

    def metrics(self, sums: dict[str, float]) -> dict[str, Any]:
        episodes, rollouts = self._rollouts.all, self._rollouts
        right = [e.tokens for e in episodes if e.reward.correct == 1.0]
        wrong = [e.tokens for e in episodes if e.reward.correct != 1.0]
        parts = {name: _mean([e.reward.parts.get(name, 0.0) for e in episodes])
                 for name in sorted({name for e in episodes for name in e.reward.parts})}
        thinking = [self._thinking(e) for e in episodes]
        record = {
            "tokens": sum(e.tokens for e in episodes),
            "reward": _mean([e.value for e in episodes]), "reward_parts": parts, "accuracy": len(right) / len(episodes),
            "zero_spread": rollouts.zero_spread, "length": _mean([e.tokens for e in episodes]), "length_right": _mean(right),
            "length_wrong": _mean(wrong), "thinking_length": _mean(thinking),
            "truncated": _mean([float(e.truncated) for e in episodes]),
        }
        if sums:  # no group had spread: nothing was trained, and there is nothing to say of it
            per_token = {"clip_share": "clipped", "entropy": "entropy", "logprob_gap": "gap", "kl": "kl", "mtp_loss": "mtp"}
            record |= {"loss": sums["loss"]} | {k: sums[s] / sums["count"] for k, s in per_token.items() if s in sums}
        return record | load_metrics(self._load)

    def _thinking(self, episode: Episode) -> int:
        """Tokens up to `</think>`; all of them where it never came."""
        end = self.roller.end_think_id
        ids = episode.completion.token_ids
        return ids.index(end) if end in ids else len(ids)

    def samples(self) -> list[dict[str, Any]]:
        """Up to four episodes of different groups, right and wrong ones in turn."""
        shown: list[Episode] = []
        groups: set[int] = set()
        for want in (1, 0, 1, 0):
            for e in self._rollouts.all:
                if int(e.reward.correct == 1.0) == want and e.group not in groups:
                    shown.append(e)
                    groups.add(e.group)
                    break
        return [e.shown() for e in shown]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.reference is None else dict(self.reference.state_dict())

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.reference is not None:
            self.reference.load_state_dict(tensors)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
