"""GRPO: the loss against a plain loop, the groups, what is trained and what is not, and that it learns what is rewarded."""

import copy
import random
from dataclasses import replace
from itertools import count

import pytest
import torch
from nets import lively
from own_tasks import Even, Traced
from whole_runs import metrics, timeless

from jevons.config import preset
from jevons.data.tokenizer import train_tokenizer
from jevons.engine.engine import Engine
from jevons.engine.types import Completion
from jevons.model import build_model
from jevons.reason import grpo
from jevons.reason.grpo import GRPO, PolicyTerms, policy_loss
from jevons.reason.rollout import Roller, advantages
from jevons.recipe import GRPOStage, OptimizerTable, PretrainStage
from jevons.store.run_dir import MetricsLog
from jevons.tasks.base import Reward
from jevons.train.loop import Loop, LoopSettings
from jevons.train.pretrain import Pretrain


@pytest.fixture(scope="module")
def tokenizer():
    rng, task = random.Random(1), Traced()
    problems = [task.sample(rng) for _ in range(50)]
    return train_tokenizer([t for p in problems for t in (p.prompt, task.trace(p, rng))], 288)


def nano(**changes):
    return preset("v3-nano", **dict(vocab_size=288, max_position_embeddings=128) | changes)


@pytest.fixture(scope="module")
def pretrained(tokenizer, tmp_path_factory):
    """A nano model that has read some worked solutions."""
    model, directory = build_model(nano(), seed=2), tmp_path_factory.mktemp("pretrained")
    stage = PretrainStage(kind="pretrain", tokens=40 * 600, batch_tokens=600)
    with MetricsLog(directory / "metrics.jsonl") as log:
        settings = LoopSettings("pretrain", directory, stage.optimizer, 10**6, torch.float32, 0.0)
        Loop(model, Pretrain(model, tokenizer, Traced(), stage, seed=0), settings, log).run()
    return model


def stage_of(**values) -> GRPOStage:
    return GRPOStage(**dict(kind="grpo", steps=4, problems=3, group_size=4, max_tokens=8) | values)


def objective_of(model, tokenizer, stage, task=None, seed=0):
    engine = Engine(model, tokenizer.eos_id, max_batch=64, max_len=96)
    return GRPO(model, tokenizer, task or Even(), stage, seed, engine)


# -- the loss ---------------------------------------------------------------------------------------------------------


def plain_loss(new, old, behaviour, advantage, weight, reference, low, high, cap, beta):
    """Token by token, as the papers write it."""
    from math import exp

    total = 0.0
    for i in range(len(new)):
        ratio = exp(new[i] - old[i])
        bounded = min(max(ratio, 1 - low), 1 + high)
        gain = min(ratio * advantage[i], bounded * advantage[i]) * min(exp(old[i] - behaviour[i]), cap)
        k3 = exp(reference[i] - new[i]) - (reference[i] - new[i]) - 1 if reference else 0.0
        total -= weight[i] * (gain - beta * k3)
    return total


@pytest.mark.parametrize("with_reference", [False, True])
def test_policy_loss_is_the_papers(with_reference):
    n = 400
    new, old, behaviour, reference = (-torch.rand(4, n, dtype=torch.float64) * 3).unbind()
    old = new + torch.randn(n).double() * 0.4
    advantage = torch.randn(n).double() * (torch.rand(n) > 0.2)
    weight = torch.rand(n).double() * (torch.rand(n) > 0.3)
    low, high, cap, beta = random.uniform(0.05, 0.3), random.uniform(0.05, 0.3), random.uniform(0.5, 2), random.uniform(0, 0.5)
    new.requires_grad_()
    terms = PolicyTerms(old, behaviour, advantage, weight, reference if with_reference else None)
    loss, clipped, kl = policy_loss(new, terms, low, high, cap, beta)
    plain = plain_loss(*(t.tolist() for t in (new, old, behaviour, advantage, weight)),
                       reference.tolist() if with_reference else None, low, high, cap, beta)
    assert loss.item() == pytest.approx(plain, rel=1e-12)
    assert (kl >= 0).all() and (kl > 0).any() == with_reference
    ratio = (new - old).exp()
    above, below = (ratio > 1 + high) & (advantage > 0), (ratio < 1 - low) & (advantage < 0)
    assert above.any() and below.any() and torch.equal(clipped, above | below), "both sides of the clip"
    policy_loss(new, terms, low, high, cap, 0.0)[0].backward()
    assert (new.grad[clipped] == 0).all(), "the clip holds the gradient back"
    moved = ~clipped & (advantage != 0) & (weight != 0)
    assert (new.grad[moved].sign() == -advantage[moved].sign()).all()


def test_the_importance_weight_is_capped():
    zeros, ones = torch.zeros(1), torch.ones(1)
    for gap, expected in ((0.0, 1.0), (0.5, 1.6487), (5.0, 2.0), (-1.0, 0.3679)):
        terms = PolicyTerms(zeros, torch.tensor([-gap]), ones, ones)
        assert policy_loss(zeros, terms, 0.2, 0.2, 2.0, 0.0)[0].item() == pytest.approx(-expected, abs=1e-4)


@pytest.mark.parametrize("std", [False, True])
def test_advantages_of_a_group_sum_to_zero(std):
    values = [random.random() for _ in range(random.randint(2, 20))]
    result = advantages(values, std)
    assert sum(result) == pytest.approx(0, abs=1e-9)
    assert sorted(range(len(values)), key=values.__getitem__) == sorted(range(len(values)), key=result.__getitem__)
    spread = (sum(a * a for a in result) / len(result)) ** 0.5
    assert not std or spread == pytest.approx(1, abs=1e-3)
    assert advantages([0.5] * 5, std) == [0.0] * 5


def test_the_published_recipe():
    stage = GRPOStage(kind="grpo", steps=1, preset="r1")
    assert (stage.clip_low, stage.clip_high, stage.kl_beta, stage.minibatches) == (10, 10, 0.001, 16)
    assert (stage.problems, stage.group_size) == (32, 16) and stage.std_normalise and not stage.mask_truncated
    assert (stage.loss_normaliser, stage.resample_rounds, stage.format_weight) == ("sequence", 0, 1.0)
    modern = GRPOStage(kind="grpo", steps=1)
    assert (modern.clip_low, modern.clip_high, modern.kl_beta, modern.minibatches) == (0.2, 0.28, 0, 1)
    assert modern.loss_normaliser == "constant" and modern.mask_truncated and not modern.std_normalise


# -- groups -----------------------------------------------------------------------------------------------------------


class Scripted:
    """An engine that gives every request random ids of random length; `cut` of them end by length."""

    def __init__(self, eos_id, cut=0.3):
        self.eos_id, self.cut, self.calls = eos_id, cut, []

    def generate(self, requests, on_step=None):
        self.calls.append(list(requests))
        return [self._one(r) for r in requests]

    def _one(self, request):
        rng = random.Random(request.params.seed)
        ids = [rng.randrange(40, 288) for _ in range(rng.randint(1, request.params.max_tokens - 1))]
        cut = rng.random() < self.cut
        ids += [] if cut else [self.eos_id]
        return Completion(request.request_id, request.prompt_ids, ids, [-rng.random() for _ in ids], "length" if cut else "stop")


class ByProblem(Even):
    """Every answer to a problem scores alike, except for every third problem."""

    def __init__(self):
        self.asked = {}
        self.numbers = count()

    def sample(self, rng):
        return replace(super().sample(rng), key=str(next(self.numbers)))

    def score(self, problem, text):
        self.asked[problem.key] = self.asked.get(problem.key, 0) + 1
        return Reward({"correct": float(self.asked[problem.key] % 2 if int(problem.key) % 3 == 0 else int(problem.key) % 2)})


def test_groups_without_spread_are_replaced_and_left_out(tokenizer):
    engine, task = Scripted(tokenizer.eos_id), ByProblem()
    rollouts = Roller(engine, tokenizer, task, stage_of(problems=6, resample_rounds=2), seed=0).roll(0)
    # round 0: problems 0..5, of which 0 and 3 have spread; round 1: 6..9, 6 and 9; round 2: 10 and 11, neither
    assert [len(call) // 4 for call in engine.calls] == [6, 4, 2]
    assert [g[0].problem.key for g in rollouts.groups] == ["0", "3", "6", "9"]
    assert rollouts.zero_spread == pytest.approx(8 / 12) and len(rollouts.all) == 48
    for group in rollouts.groups:
        assert len({e.problem.key for e in group}) == 1 and len({e.value for e in group}) == 2
        assert sum(e.advantage for e in group) == pytest.approx(0)
    assert len({e.group for e in rollouts.all}) == 12
    assert all(e.advantage == 0 for e in rollouts.all if int(e.problem.key) % 3)


def test_a_step_without_spread_trains_nothing_and_says_so(tokenizer, tmp_path):
    class Flat(Even):
        def score(self, problem, text):
            return Reward({"correct": 1.0})

    model = build_model(nano(), seed=1)
    before = copy.deepcopy(model.state_dict())
    records, _ = train(model, tokenizer, stage_of(steps=2), tmp_path, task=Flat())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    for record in records:
        assert record["zero_spread"] == 1 and record["accuracy"] == 1 and record["tokens"] > 0
        assert not {"loss", "entropy", "logprob_gap", "clip_share", "kl"} & set(record), "what was not measured is not logged"


def kept_weights(objective, micros):
    """Per episode, by its ids: the weights of its tokens."""
    by_ids = {}
    for micro in micros:
        positions = micro.keep_N.tolist()
        rows, start = [], 0
        for n, length in micro.batch.segments:
            rows += [(start + i * length, start + (i + 1) * length) for i in range(n)]
            start += n * length
        for first, end in rows:
            inside = [i for i, p in enumerate(positions) if first <= p < end]
            by_ids[tuple(micro.targets[inside].tolist())] = (
                micro.weight[inside], micro.advantage[inside], micro.behaviour[inside])
    return by_ids


@pytest.mark.parametrize("normaliser", ["constant", "sequence"])
@pytest.mark.parametrize("masked", [True, False])
def test_micro_batches_hold_each_episodes_own_numbers(tokenizer, normaliser, masked, monkeypatch):
    monkeypatch.setattr(grpo, "MICRO_TOKENS", 150)
    stage = stage_of(problems=5, max_tokens=12, loss_normaliser=normaliser, mask_truncated=masked, mtp_weight=0)
    objective = GRPO(build_model(nano(), seed=0), tokenizer, Even(), stage, 0, Scripted(tokenizer.eos_id))
    (micros,) = objective.next_batch(random.randrange(1000))
    episodes = [e for g in objective._rollouts.groups for e in g]
    assert len(micros) > 1 and any(e.truncated for e in episodes) and sum(m.share for m in micros) == pytest.approx(1)
    found = kept_weights(objective, micros)
    for e in episodes:
        weight, advantage, behaviour = found[tuple(e.completion.token_ids)]
        assert behaviour.tolist() == pytest.approx(e.completion.logprobs)
        assert advantage.tolist() == pytest.approx([e.advantage] * e.tokens)
        expected = 1 / len(episodes) / (12 if normaliser == "constant" else e.tokens)
        assert weight.tolist() == pytest.approx([0 if masked and e.truncated else expected] * e.tokens)


def test_minibatches_part_the_episodes(tokenizer):
    stage = stage_of(problems=5, minibatches=3, max_tokens=12)
    objective = GRPO(build_model(nano(), seed=0), tokenizer, Even(), stage, 0, Scripted(tokenizer.eos_id))
    updates = objective.next_batch(3)
    ids = [tuple(e.completion.token_ids) for g in objective._rollouts.groups for e in g]
    parts = [set(kept_weights(objective, micros)) for micros in updates]
    assert len(updates) == 3 and set().union(*parts) == set(ids) and sum(map(len, parts)) == len(ids)
    assert all(m.old is not None and m.old.shape == m.behaviour.shape for u in updates for m in u)


def test_random_rewards_are_coin_flips_that_never_ask_the_verifier(tokenizer):
    class Never(Even):
        def score(self, problem, text):
            return Reward({"correct": 0.0})

    class Always(Even):
        def score(self, problem, text):
            return Reward({"correct": 1.0, "format": 1.0})

    stage = stage_of(problems=40, random_reward=True, resample_rounds=0, format_weight=0.5)
    step = random.randrange(10**6)
    never, always = (Roller(Scripted(tokenizer.eos_id), tokenizer, task, stage, 0).roll(step) for task in (Never(), Always()))
    values = [e.value for e in never.all]
    assert values == [e.value for e in always.all] and set(values) == {0.0, 1.0}
    assert abs(sum(values) / len(values) - 0.5) < 0.2, "160 fair coins: five deviations"
    assert [e.reward.correct for e in always.all] == [1.0] * 160, "accuracy is still the verifier's"
    stage = stage.model_copy(update={"random_reward": False})
    true = Roller(Scripted(tokenizer.eos_id), tokenizer, Always(), stage, 0).roll(step)
    assert {e.value for e in true.all} == {1.5}
    assert [e.completion.token_ids for e in true.all] == [e.completion.token_ids for e in never.all], "the same rollouts"


def test_rollouts_are_a_function_of_weights_seed_and_step(tokenizer):
    model = lively(nano())
    stage = stage_of()

    def answers(seed, step, before=()):
        roller = objective_of(model, tokenizer, stage, seed=seed).roller
        for other in before:
            roller.roll(other)
        return [(e.problem.prompt, e.completion.token_ids, e.completion.logprobs) for e in roller.roll(step).all]

    first = answers(7, 3)
    assert answers(7, 3, before=(11, 2)) == first, "what ran before does not matter"
    assert answers(7, 4) != first and answers(8, 3) != first
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.2)
    assert answers(7, 3) != first


def test_rollouts_of_a_damaged_model_are_an_error(tokenizer):
    """Not empty answers, which would be scored and trained on."""
    model = lively(nano())
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        objective_of(model, tokenizer, stage_of()).roller.roll(0)


# -- training ---------------------------------------------------------------------------------------------------------


def loop_of(model, tokenizer, stage, directory, log, task=None, seed=0, dtype=torch.float32, stop=lambda: False, save_every=2):
    objective = objective_of(model, tokenizer, stage, task, seed)
    objective.dtype = dtype
    settings = LoopSettings("grpo", directory, stage.optimizer, save_every, dtype, 0.0, should_stop=stop)
    return Loop(model, objective, settings, log)


def train(model, tokenizer, stage, directory, **options):
    """(step records, loop) of a whole run."""
    records = []
    directory.mkdir(parents=True, exist_ok=True)
    with MetricsLog(directory / "metrics.jsonl") as log:
        loop = loop_of(model, tokenizer, stage, directory, log, save_every=10**6, **options)
        loop.settings.on_step = lambda record, steps: records.append(record)
        loop.run()
    return records, loop


def test_a_right_answer_gains_probability_and_a_wrong_one_loses(tokenizer):
    # every token meets every expert: at the edge of a choice the objective jumps, and no gradient says so
    model = lively(nano(n_group=1, topk_group=1, num_experts_per_tok=nano().n_routed_experts))
    stage = stage_of(problems=6, mtp_weight=0, mask_truncated=False)
    objective = objective_of(model, tokenizer, stage)
    (micros,) = objective.next_batch(random.randrange(1000))

    def logprobs(micro):
        out = model.forward_train(micro.batch.tokens_N, micro.batch.positions_N, micro.batch.segments, mtp=False)
        return objective._logprobs(model, micro, out.hidden_ND)[0]

    def objective_value():
        with torch.no_grad():
            return sum((logprobs(m) * m.advantage * m.weight).sum().item() for m in micros)

    before = objective_value()
    for micro in micros:
        objective.loss(micro).loss.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt()
    rates, moved = [], 0.0
    for distance in (3e-4, 1e-3, 3e-3):  # short ones drown in float32's rounding, long ones in curvature
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= (distance - moved) / norm * p.grad
        moved = distance
        rates.append((objective_value() - before) / (distance * norm.item()))
    assert any(rate == pytest.approx(1, rel=0.1) for rate in rates), "log-probs, weighted by advantage, rise as the gradient says"


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
def test_trainer_and_engine_agree_on_log_probs(tokenizer, pretrained, tmp_path, dtype, limit):
    model = copy.deepcopy(pretrained)
    records, _ = train(model, tokenizer, stage_of(steps=2, problems=6, max_tokens=24), tmp_path, dtype=dtype)
    for record in records:
        assert 0 < record["logprob_gap"] < limit and record["clip_share"] == 0 and record["kl"] == 0
        assert 0 < record["entropy"] < 4


def test_router_bias_stays_and_the_mtp_module_learns_alone(tokenizer, tmp_path):
    model = lively(nano())
    before = copy.deepcopy(model)
    # advantages of zero weight: only the MTP loss is left
    stage = stage_of(steps=3, problems=6, mask_truncated=False,
                     optimizer=OptimizerTable(matrices="adamw", lr=1e-3, weight_decay=0.0))
    objective = objective_of(model, tokenizer, stage)
    (micros,) = objective.next_batch(0)
    for micro in micros:
        micro.weight.zero_()
        objective.loss(micro).loss.backward()
    felt = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert felt and all(n.startswith("mtp.") for n in felt), "trunk, embedding and head do not feel the MTP loss"
    dense = {n for n, _ in model.named_parameters() if n.startswith("mtp.") and "experts" not in n}
    assert dense <= felt
    model.zero_grad()

    train(model, tokenizer, stage, tmp_path)
    for gate, old in zip(model.routers(), before.routers(), strict=True):
        assert torch.equal(gate.e_score_correction_bias, old.e_score_correction_bias)
    changed = {n for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True) if not torch.equal(p, q)}
    assert dense <= changed and any(n.startswith("layers.") for n in changed)


@pytest.mark.parametrize("changes", [
    dict(minibatches=3),
    dict(minibatches=2, kl_beta=0.05, std_normalise=True, loss_normaliser="sequence", mask_truncated=False),
], ids=["minibatches", "reference"])
def test_resume_is_exact_with_minibatches_and_a_reference(tokenizer, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(grpo, "REFERENCE_EVERY", 3)  # once within the run, and once after the resume
    stage = stage_of(steps=7, problems=4, optimizer=OptimizerTable(matrices="muon", lr=1e-3, weight_decay=0.1), **changes)
    start = lively(nano())
    finished = copy.deepcopy(start)
    records, _ = train(finished, tokenizer, stage, tmp_path / "whole")
    if "kl_beta" in changes:
        # a step's first update after the reference was taken anew has none, its second has
        assert all(r["kl"] > 0 for r in records if "kl" in r)
    assert any("clip_share" in r for r in records)

    lost = random.choice((3, 4, 5))
    saved = (lost - 1) // 2 * 2

    def lose(record, steps):
        if record["step"] == lost:  # before its state is saved
            raise KeyboardInterrupt

    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        loop = loop_of(copy.deepcopy(start), tokenizer, stage, tmp_path, log)
        loop.settings.on_step = lose
        with pytest.raises(KeyboardInterrupt):
            loop.run()
    model, rest = copy.deepcopy(start), []
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        loop = loop_of(model, tokenizer, stage, tmp_path, log)
        loop.settings.on_step = lambda record, steps: rest.append(record)
        assert loop.resume() == saved
        loop.run()
    assert timeless(rest) == timeless(records[saved:])
    assert timeless(metrics(tmp_path)) == timeless(metrics(tmp_path / "whole"))
    for (name, p), q in zip(model.named_parameters(), finished.parameters(), strict=True):
        assert torch.equal(p, q), name


# -- learning ---------------------------------------------------------------------------------------------------------


class Letters(Even):
    """Right when at least half of the answer's characters are small letters: one in ten at random."""

    def score(self, problem, text):
        small = sum("a" <= c <= "z" for c in text)
        return Reward({"correct": float(small >= 0.5 * max(1, len(text)))})


def test_it_learns_what_is_rewarded_and_nothing_from_coin_flips(tokenizer, tmp_path):
    seed = random.randrange(1000)
    results = {}
    for control in (False, True):
        stage = stage_of(steps=20, problems=8, group_size=8, max_tokens=8, random_reward=control, mask_truncated=False,
                         mtp_weight=0, optimizer=OptimizerTable(matrices="adamw", lr=3e-3, weight_decay=0.0, schedule="constant"))
        records, _ = train(build_model(nano(), seed=seed), tokenizer, stage, tmp_path / str(control), task=Letters(), seed=seed)
        results[control] = [r["accuracy"] for r in records]
    early, late = (sum(results[False][i:j]) / 5 for i, j in ((0, 5), (15, 20)))
    assert late > early + 0.3
    assert sum(results[True][15:20]) / 5 < early + 0.2
