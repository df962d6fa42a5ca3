"""Packed rows token by token: every document whole, its targets its own, nothing across documents, the same every time."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from nets import lively, nano, plain_logits, qwen2, random_ids

from jevons.data.packing import Prefetcher, align, pack, take_documents, weight_totals
from jevons.numerics.memory import on_device
from jevons.recipe import PretrainStage
from jevons.train.objective import mtp_loss, token_losses
from jevons.train.pretrain import Pretrain

PAD = 2


def random_documents(count, longest=40):
    """Ids 3..47, so that padding (2) is no document's token; weights that all differ."""
    lengths = [random.randint(1, longest) for _ in range(count)]
    return [([i % 45 + 3 for i in random_ids(n)], [round(random.uniform(0.1, 1), 4) for _ in range(n)]) for n in lengths]


def rows_of(batch):
    """(first flat index, row length) of every row."""
    start, out = 0, []
    for rows, length in batch.segments:
        out += [(start + i * length, length) for i in range(rows)]
        start += rows * length
    return out, start


@pytest.mark.parametrize("count,per_segment", [(1, 8), (3, 1), (13, 4), (8, 8), (30, 8)])
def test_every_token_and_target(count, per_segment):
    documents = random_documents(count)
    batch = pack(documents, PAD, per_segment)
    rows, end = rows_of(batch)
    assert sorted(batch.order) == list(range(count)) and len(rows) == count
    seen = torch.zeros(batch.tokens_N.numel(), dtype=torch.bool)
    for (start, length), index in zip(rows, batch.order, strict=True):
        ids, weights = documents[index]
        assert batch.tokens_N[start : start + len(ids)].tolist() == ids and len(ids) <= length
        assert batch.positions_N[start : start + len(ids)].tolist() == list(range(len(ids)))
        for i in range(len(ids)):
            for ahead, targets, loss_weights in ((1, batch.targets_N, batch.weights_N),
                                                 (2, batch.mtp_targets_N, batch.mtp_weights_N)):
                if i + ahead < len(ids):
                    assert targets[start + i] == ids[i + ahead]
                    assert loss_weights[start + i].item() == pytest.approx(weights[i + ahead])
                else:  # the next document's first token is not this one's to predict
                    assert loss_weights[start + i] == 0
        seen[start : start + len(ids)] = True
    padding = ~seen
    assert (batch.tokens_N[padding] == PAD).all() and (batch.positions_N[padding] == -1).all()
    assert (batch.weights_N[padding] == 0).all() and (batch.mtp_weights_N[padding] == 0).all()
    assert batch.tokens == seen.sum() == sum(len(ids) for ids, _ in documents)
    flat = (batch.tokens_N, batch.targets_N, batch.mtp_targets_N, batch.weights_N, batch.mtp_weights_N, batch.positions_N)
    assert {t.shape for t in flat} == {(batch.tokens_N.numel(),)} and end <= batch.tokens_N.numel()
    assert {t.dtype for t in flat[:3]} == {torch.int64} and {t.dtype for t in flat[3:5]} == {torch.float32}
    assert batch.positions_N.dtype == torch.int64


def test_rows_of_a_segment_are_of_like_length():
    documents = random_documents(40, 200)
    batch = pack(documents, PAD, 4)
    lengths = [len(documents[i][0]) for i in batch.order]
    assert lengths == sorted(lengths) and [rows for rows, _ in batch.segments] == [4] * 10
    for i, (_, length) in enumerate(batch.segments):
        assert max(lengths[4 * i : 4 * i + 4]) <= length < max(lengths[4 * i : 4 * i + 4]) + 16  # little padding


def test_the_same_documents_give_the_same_batch():
    documents = random_documents(20)
    a, b = pack(documents, PAD), pack([(list(i), list(w)) for i, w in documents], PAD)
    assert a.order == b.order and a.segments == b.segments
    for name in ("tokens_N", "targets_N", "mtp_targets_N", "weights_N", "mtp_weights_N", "positions_N"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    equal = pack([([5] * 7, [1.0] * 7)] * 6, PAD)
    assert equal.order == list(range(6))  # equal lengths stay in order


def test_aligned_numbers_sit_where_their_token_is_predicted():
    documents = random_documents(11)
    batch = pack(documents, PAD, 3)
    flat = align(batch, [[float(i) for i in ids] for ids, _ in documents])
    inside = batch.weights_N > 0
    assert torch.equal(flat[inside], batch.targets_N[inside].float()) and (flat[~inside] == 0).all()


@pytest.mark.parametrize("config", [nano(), qwen2()], ids=["v3", "qwen2"])
def test_nothing_crosses_documents(config):
    """Hidden states and losses of packed documents are those of each alone, MTP's too."""
    model, documents = lively(config), random_documents(9, 30)
    batch = pack(documents, PAD, 4)
    with torch.no_grad():
        out = model.forward_train(batch.tokens_N, batch.positions_N, batch.segments)
        total = token_losses(model, out.hidden_ND, batch.targets_N, batch.weights_N).item()
        packed = model.logits(out.hidden_ND)
        expected = 0.0
        for (start, _), index in zip(rows_of(batch)[0], batch.order, strict=True):
            ids, weights = documents[index]
            logits = plain_logits(model, ids)
            torch.testing.assert_close(packed[start : start + len(ids)], logits, atol=1e-3, rtol=1e-3)
            if len(ids) > 1:
                losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
                expected += float(losses @ torch.tensor(weights[1:]))
        assert total == pytest.approx(expected, rel=1e-3)
        if model.mtp:
            second, count = 0.0, 0.0
            for ids, weights in documents:
                alone = model.forward_train(torch.tensor(ids), torch.arange(len(ids)), [(1, len(ids))])
                logits = model.logits(alone.mtp_hidden_ND)
                for i in range(len(ids) - 2):
                    second -= weights[i + 2] * logits[i].log_softmax(-1)[ids[i + 2]].item()
                    count += weights[i + 2]
            assert mtp_loss(model, out, batch).item() == pytest.approx(second / max(count, 1e-8), rel=1e-3)


def test_padding_leaves_load_and_gradients_alone():
    """The same documents with and without padding: equal expert loads, balance loss and gradients."""
    model, documents = lively(nano()), [(random_ids(n), [1.0] * n) for n in (5, 16, 9)]
    results, loads = [], []
    for padded in (True, False):
        model.zero_grad()
        batch = pack(documents, PAD, 2)
        keep = torch.ones_like(batch.positions_N, dtype=torch.bool) if padded else batch.positions_N >= 0
        segments = batch.segments if padded else [(1, len(documents[i][0])) for i in batch.order]
        out = model.forward_train(batch.tokens_N[keep], batch.positions_N[keep], segments, mtp=False)
        loss = token_losses(model, out.hidden_ND, batch.targets_N[keep], batch.weights_N[keep]) + out.balance_loss
        loss.backward()
        grads = [p.grad.clone() for name, p in model.named_parameters() if not name.startswith("mtp.")]
        results.append([loss.detach(), out.balance_loss.detach(), *grads])
        loads.append(out.load_RE)
    assert torch.equal(*loads)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max() + 1e-3), rtol=1e-3)


def test_a_loss_without_weighted_tokens_is_zero():
    model = lively(nano())
    hidden = torch.randn(5, 40, requires_grad=True)
    loss = token_losses(model, hidden, torch.zeros(5, dtype=torch.long), torch.zeros(5))
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all()


def test_documents_are_taken_up_to_the_budget():
    documents = random_documents(50)
    lengths = [len(ids) for ids, _ in documents]
    budget = random.randint(1, sum(lengths))
    taken = take_documents(iter(documents), budget)
    assert taken == documents[: len(taken)] and taken
    assert len(taken) == 1 or sum(lengths[: len(taken)]) <= budget
    assert len(taken) == 50 or sum(lengths[: len(taken) + 1]) > budget
    assert take_documents(iter(documents), sum(lengths)) == documents
    endless = itertools.cycle(documents)
    assert sum(len(ids) for ids, _ in take_documents(endless, 1000)) <= 1000


def test_weights_of_documents_are_those_of_their_batch():
    documents = random_documents(20)
    main, second, rows = weight_totals(documents)
    batch = pack(documents, PAD)
    assert batch.weights_N.double().sum().item() == pytest.approx(main, rel=1e-6)
    assert batch.mtp_weights_N.double().sum().item() == pytest.approx(second, rel=1e-6) and rows == 20


def test_a_batch_moves_whole():
    batch = pack(random_documents(5), PAD)
    batch.share = 0.25
    moved = on_device(batch, torch.device("meta"))
    assert moved.tokens_N.device.type == moved.weights_N.device.type == moved.positions_N.device.type == "meta"
    assert (moved.share, moved.segments, moved.order, moved.tokens) == (0.25, batch.segments, batch.order, batch.tokens)
    assert on_device(batch, torch.device("cpu")) is batch


@pytest.mark.parametrize("config", [nano, qwen2])
def test_packed_documents_are_attention_under_a_block_mask(config):
    """Documents packed as segments against one long row in float64 whose attention has the explicit mask: causal, own
    document only, positions from 0 in each."""
    from jevons.model import attention

    model, documents = lively(config()), [(random_ids(n), [1.0] * n) for n in (7, 12, 3, 9)]
    batch = pack(documents, PAD, 2)
    with torch.no_grad():
        packed = model.logits(model.forward_train(batch.tokens_N, batch.positions_N, batch.segments, mtp=False).hidden_ND)
    lengths = [len(documents[i][0]) for i in batch.order]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & torch.ones(31, 31, dtype=torch.bool).tril()

    def masked(q_NHd, k_NHd, v_NHv, segments, scale):
        scores = torch.einsum("qhd,khd->hqk", q_NHd.double(), k_NHd.double()) * scale
        probs = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khv->qhv", probs, v_NHv.double()).float().flatten(1)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.heads, "usable", lambda *_: False)
        patch.setattr(attention, "attend_segments", masked)
        row = torch.tensor([i for k in batch.order for i in documents[k][0]])
        positions = torch.cat([torch.arange(n) for n in lengths])
        wanted = model.logits(model.forward_train(row, positions, [(1, 31)], mtp=False).hidden_ND)
    torch.testing.assert_close(packed[batch.positions_N >= 0], wanted, atol=2e-4, rtol=1e-3)


def test_the_prefetcher_changes_no_number():
    asked = []

    def make(step):
        asked.append(step)
        return step * 10

    prefetcher = Prefetcher(make)
    steps = [0, 1, 2, 2, 7, 8, 3]  # in order, again, and jumps as after a resume
    assert [prefetcher.get(step) for step in steps] == [s * 10 for s in steps]
    prefetcher.close()
    assert asked.count(1) == 1


def test_an_error_in_the_prefetcher_is_raised_where_its_step_is_asked():
    def make(step):
        if step == 2:
            raise RuntimeError("no problem left")
        return step

    prefetcher = Prefetcher(make)
    assert [prefetcher.get(0), prefetcher.get(1)] == [0, 1]
    with pytest.raises(RuntimeError, match="no problem left"):
        prefetcher.get(2)
    prefetcher.close()


# -- pretraining ---------------------------------------------------------------------------------------------------------


class Counting:
    """A task whose problems are numbers and whose traces are that number's digits, repeated."""

    def sample(self, rng):
        return type("Problem", (), {"prompt": str(rng.randrange(10**6))})()

    def trace(self, problem, rng):
        return problem.prompt * rng.randint(1, 5)


@pytest.fixture(scope="module")
def tokenizer():
    from jevons.data.tokenizer import train_tokenizer

    return train_tokenizer(["0123456789"] * 3, 288)


def pretrain_of(tokenizer, seed, **stage):
    model = lively(nano(vocab_size=288))
    values = dict(kind="pretrain", tokens=5000, batch_tokens=500) | stage
    return Pretrain(model, tokenizer, Counting(), PretrainStage(**values), seed)


def test_a_pretraining_batch_is_a_function_of_seed_and_step(tokenizer):
    seed = random.randrange(10**9)
    first, second, other = (pretrain_of(tokenizer, s) for s in (seed, seed, seed + 1))
    in_order = [first.next_batch(step)[0][0].tokens_N for step in range(4)]
    for step in (3, 1, 0):
        assert torch.equal(second.next_batch(step)[0][0].tokens_N, in_order[step])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(in_order, 2))
    assert not torch.equal(other.next_batch(0)[0][0].tokens_N, in_order[0])
    assert first.steps == 10
    for batch in (first.next_batch(s)[0][0] for s in range(3)):
        assert 300 < batch.tokens < 700


def test_a_worked_solution_past_the_context_is_said(tokenizer):
    class Long(Counting):
        def trace(self, problem, rng):
            return "1" * 2000 + "</think>\n1"

    model = lively(nano(vocab_size=288))
    objective = Pretrain(model, tokenizer, Long(), PretrainStage(kind="pretrain", tokens=5000, batch_tokens=500), 0)
    with pytest.raises(ValueError, match=r"does not fit the context of 128; set max_position_embeddings"):
        objective.next_batch(0)


def test_micro_batches_share_a_batch(tokenizer):
    """Their losses, weighed by their shares, are the mean over all of their tokens."""
    objective = pretrain_of(tokenizer, random.randrange(10**9), batch_tokens=1000, micro_batch_tokens=400, mtp_weight=0.0)
    (batches,) = objective.next_batch(0)
    assert len(batches) == 2 and sum(b.share for b in batches) == pytest.approx(1)
    assert 700 < sum(b.tokens for b in batches) < 1300
    parts = [objective.loss(b) for b in batches]
    losses = [token_losses(objective.model, objective.model.forward_train(b.tokens_N, b.positions_N, b.segments).hidden_ND,
                           b.targets_N, b.weights_N) for b in batches]
    mean = sum(loss.item() for loss in losses) / sum(b.weights_N.sum().item() for b in batches)
    assert sum(p.sums["loss"] for p in parts) == pytest.approx(mean, rel=1e-5)
    alpha = objective.model.config.aux_loss_alpha
    balance = sum(p.sums["balance_loss"] for p in parts)
    assert sum(p.loss.item() for p in parts) == pytest.approx(mean + alpha * balance, rel=1e-5)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_prompts_weigh_less_and_answers_end_in_eos(tokenizer, prompt_weight):
    objective = pretrain_of(tokenizer, random.randrange(10**9), prompt_weight=prompt_weight)
    ((batch,),) = objective.next_batch(0)
    start = 0
    for rows, length in batch.segments:
        for _ in range(rows):
            row = slice(start, start + length)
            real = int((batch.positions_N[row] >= 0).sum())
            weights = batch.weights_N[row][: real - 1].tolist()
            own = weights.index(1.0)
            assert weights == [prompt_weight] * own + [1.0] * (real - 1 - own) and 0 < own < real - 1
            assert batch.tokens_N[row][real - 1] == tokenizer.eos_id
            start += length
    parts = objective.loss(batch)
    assert parts.loss.isfinite() and parts.sums["tokens"] == batch.tokens and parts.load_RE.shape == (2, 8)


def test_the_pretraining_loss_is_the_sum_of_its_parts(tokenizer):
    objective = pretrain_of(tokenizer, 1, mtp_weight=0.4)
    ((batch,),) = objective.next_batch(0)
    parts = objective.loss(batch)
    sums, alpha = parts.sums, objective.model.config.aux_loss_alpha
    assert parts.loss.item() == pytest.approx(sums["loss"] + 0.4 * sums["mtp_loss"] + alpha * sums["balance_loss"], rel=1e-5)
    before = [g.e_score_correction_bias.clone() for g in objective.model.routers()]
    objective.after_update(parts.load_RE)
    assert all(not torch.equal(b, g.e_score_correction_bias) for b, g in zip(before, objective.model.routers(), strict=True))
    metrics = objective.metrics(sums)
    assert len(metrics["expert_load"]) == 2 and metrics["loss"] == sums["loss"]


def test_pretraining_without_mtp_loss(tokenizer):
    objective = pretrain_of(tokenizer, 1, mtp_weight=0.0)
    ((batch,),) = objective.next_batch(0)
    objective.after_update(objective.loss(batch).load_RE)
