"""Distillation by logits: the student follows the teacher's whole distribution over the teacher's own answers.

By traces it is supervised fine-tuning on those answers (R1 section 2.4) and needs nothing of its own.
"""

from __future__ import annotations

import torch

from jevons.data.packing import Batch, Document
from jevons.data.tokenizer import Tokenizer
from jevons.model import CausalLM, TrainOutput
from jevons.numerics import upcast
from jevons.recipe import DistilStage
from jevons.train.objective import token_losses
from jevons.train.sft import SFT


def check_same_tokenizer(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raises ValueError naming the first id that means different tokens: distributions over ids could not be compared."""
    ours, theirs = teacher.vocabulary(), student.vocabulary()
    for index in range(max(teacher.vocab_size, student.vocab_size)):
        if ours.get(index) != theirs.get(index):
            raise ValueError(f"mode \"logits\" needs one tokenizer for both: id {index} is {ours.get(index)!r} for the teacher "
                             f"and {theirs.get(index)!r} for the student; mode \"traces\" goes by text and would be right")


def top_k_kl(student_KV: torch.Tensor, teacher_KV: torch.Tensor, k: int) -> torch.Tensor:
    """KL(teacher || student) a token [K], over the teacher's `k` likeliest tokens and all others together as one more.

    Never more than the whole KL, and equal to it from k = V - 1 on. Logits are taken as float32 or more."""
    teacher, student = (upcast(x).log_softmax(-1) for x in (teacher_KV, student_KV))
    k = min(k, teacher.shape[-1])
    top, ids = teacher.topk(k, dim=-1)
    if k == teacher.shape[-1]:
        return (top.exp() * (top - student.gather(-1, ids))).sum(-1)
    rest, own = (x.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True) for x in (teacher, student))
    p, q = torch.cat([top, rest], -1), torch.cat([student.gather(-1, ids), own], -1)
    return (p.exp() * (p - q)).sum(-1)


class LogitDistil(SFT):
    """`SFT` whose main loss is kl_weight * KL + (1 - kl_weight) * cross-entropy. The teacher is not trained."""

    def __init__(self, teacher: CausalLM, model: CausalLM, tokenizer: Tokenizer, documents: list[Document], stage: DistilStage,
                 seed: int, notes: list[str]):
        super().__init__(model, tokenizer, documents, stage, seed, notes)
        self.teacher = teacher.requires_grad_(False).eval()

    def main_loss(self, batch: Batch, out: TrainOutput) -> tuple[torch.Tensor, dict[str, float]]:
        weights, rows, share = batch.weights_N, self.tokenizer.vocab_size, self.stage.kl_weight
        keep = weights.nonzero().squeeze(1)
        with torch.no_grad():
            hidden = self.teacher.forward_train(batch.tokens_N, batch.positions_N, batch.segments, mtp=False).hidden_ND
            teacher = self.teacher.logits(hidden[keep])[:, :rows]  # a wider embedding may be padded
        student = self.model.logits(out.hidden_ND[keep])[:, :rows]
        kl = (top_k_kl(student, teacher, self.stage.top_k) * weights[keep]).sum() / weights.sum()
        main, sums = share * kl, {"kl": kl.item()}
        if share < 1:
            main = main + (1 - share) * token_losses(self.model, out.hidden_ND, batch.targets_N, weights) / weights.sum()
        return main, sums | {"loss": main.item()}
