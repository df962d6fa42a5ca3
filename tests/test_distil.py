"""Distillation: the teacher's verified answers as data, its distribution as a target, and students of other families."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import lively, nano, plain_hidden, qwen2
from test_pipeline import CPU, Quiet
from whole_runs import metrics, timeless

from jevons.config import preset
from jevons.data.tokenizer import train_tokenizer
from jevons.model import build_model
from jevons.reason import teach
from jevons.reason.pipeline import Run
from jevons.reason.teach import TeacherError, new_student, sample_traces
from jevons.recipe import DistilStage, RecipeError, load_recipe, parse_recipe
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.store.convert import convert
from jevons.tasks.registry import load_task
from jevons.train.distil import LogitDistil, check_same_tokenizer, top_k_kl
from jevons.train.loop import Interrupted
from jevons.train.sft import read_conversations, render

TOKENIZER = train_tokenizer(["sun moon rain wind sea hill tree leaf."] * 3, 288)
STUDENT = {"preset": "qwen2-nano"}


def stage_of(**values):
    return DistilStage(**dict(kind="distil", student=STUDENT, problems=9, samples=2, max_tokens=12, keep="all") | values)


# -- the divergence ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(2, 40), st.integers(1, 50), st.floats(0.1, 30), st.integers(0, 2**31))
def test_it_is_the_whole_divergence_or_less(vocab, k, scale, seed):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, vocab, generator=g, dtype=torch.float64) * scale for _ in range(2))
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1)
    some = top_k_kl(student, teacher, k)
    assert (some > -1e-9).all() and (some <= whole + 1e-9).all()
    assert (some <= top_k_kl(student, teacher, k + 1) + 1e-9).all(), "more tokens tell more"
    if k >= vocab - 1:
        torch.testing.assert_close(some, whole)
    if k < vocab - 1:  # by hand, token by token
        for row in range(5):
            top = teacher[row].topk(k).indices.tolist()
            rest = [i for i in range(vocab) if i not in top]
            sums = [(p[row, [i]].exp().sum(), q[row, [i]].exp().sum()) for i in top]
            sums.append((p[row, rest].exp().sum(), q[row, rest].exp().sum()))
            by_hand = sum(float(a * (a / b.clamp(min=1e-300)).log()) for a, b in sums if a > 0)
            assert some[row].item() == pytest.approx(by_hand, rel=1e-6, abs=1e-8)
    assert top_k_kl(teacher, teacher, k).abs().max() < 1e-9
    single = top_k_kl(student.float(), teacher.float(), k).double()
    torch.testing.assert_close(single, some, atol=1e-4, rtol=1e-4)


def test_its_gradient_pulls_the_student_over():
    student, teacher = torch.randn(7, 30, dtype=torch.float64, requires_grad=True), torch.randn(7, 30, dtype=torch.float64) * 3
    assert torch.autograd.gradcheck(lambda x: top_k_kl(x, teacher, 5), student)
    (grad,) = torch.autograd.grad(top_k_kl(student, teacher, 29).sum(), student)
    torch.testing.assert_close(grad, student.softmax(-1) - teacher.softmax(-1))


# -- traces -------------------------------------------------------------------------------------------------------------------


def teacher_model(seed=None):
    return lively(nano(vocab_size=288, max_position_embeddings=256), seed)


def traces(directory, model, stage, check=lambda: None, on_round=lambda done, of: None, seed=3):
    task = load_task(f"{Path(__file__).parent}/own_tasks.py:Even")
    directory.mkdir(exist_ok=True)
    return sample_traces(model, TOKENIZER, task, stage, seed, directory, check, on_round)


def talkative(model):
    """Ends every answer soon: closing the thought and eos have about a tenth each at all times, by what all tokens share."""
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.5).add_(2 * torch.randn(model.config.hidden_size))
        shared = plain_hidden(model, [list(range(10, 60))], mtp=False)[0].hidden_ND.mean(0)
        model.lm_head.weight.mul_(0.3)
        for index in (TOKENIZER.eos_id, TOKENIZER.special["</think>"]):
            model.lm_head.weight[index] = 3.4 * shared / shared.square().sum()
    return model


def test_right_answers_are_kept_and_rounds_survive_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "ROUND", 4)
    model = talkative(teacher_model())
    task = load_task(f"{Path(__file__).parent}/own_tasks.py:Even")
    everything = traces(tmp_path / "all", model, stage_of(problems=16, samples=3, max_tokens=30))
    rows = [json.loads(line) for line in everything.read_text().splitlines()]
    assert rows and all("</think>" in r["answer"] for r in rows) and {r["correct"] for r in rows} == {0.0, 1.0}
    assert all(r["correct"] == float(len(r["answer"]) % 2 == 0) for r in rows)
    assert len({(r["question"], r["answer"]) for r in rows}) == len(rows)
    right = traces(tmp_path / "right", model, stage_of(problems=16, samples=3, max_tokens=30, keep="right"))
    assert [json.loads(line) for line in right.read_text().splitlines()] == [r for r in rows if r["correct"] == 1.0]
    assert [m[1]["content"] for _, m in read_conversations(right)] == [r["answer"] for r in rows if r["correct"] == 1.0]

    stop_in, asked = random.randrange(5, 30), [0]

    def check():
        asked[0] += 1
        if asked[0] == stop_in:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        traces(tmp_path / "again", model, stage_of(problems=16, samples=3, max_tokens=30), check)
    left = len(list((tmp_path / "again/traces").glob("*.jsonl")))
    rounds = []
    again = traces(tmp_path / "again", model, stage_of(problems=16, samples=3, max_tokens=30),
                   on_round=lambda *r: rounds.append(r))
    assert again.read_bytes() == everything.read_bytes() and rounds[-1] == (4, 4) and left < 4
    assert not (tmp_path / "again/traces").exists() and task.name == "even"


def test_a_teacher_that_never_ends_is_said(tmp_path):
    model = teacher_model()
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.eos_id] = 0
        model.lm_head.weight[50] = model.norm.weight.sign() * 0.5
    with pytest.raises(TeacherError, match="none of the teacher's 18 answers ended; a max_tokens over 2"):
        traces(tmp_path / "x", model, stage_of(max_tokens=2))


# -- students -----------------------------------------------------------------------------------------------------------------


def test_a_student_takes_the_teachers_vocabulary_and_tokens(tmp_path):
    teacher = teacher_model()
    stage = stage_of(student={"preset": "qwen2-nano", "set": {"num_hidden_layers": 1}})
    student, tokenizer = new_student(stage, teacher, TOKENIZER, 1)
    assert student.config.vocab_size == 288 and student.config.max_position_embeddings == 256 and len(student.layers) == 1
    assert (student.config.bos_token_id, student.config.eos_token_id) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
    assert tokenizer is TOKENIZER
    other = train_tokenizer(["another text, and other pairs of letters", "qqqq"] * 9, 320)
    save_checkpoint(tmp_path, lively(qwen2(vocab_size=320)), other, {})
    student, tokenizer = new_student(stage_of(student={"from": str(tmp_path)}), teacher, TOKENIZER, 1)
    assert student.config.vocab_size == 320 and tokenizer.vocab_size == 320
    with pytest.raises(ValueError, match="needs one tokenizer for both: id 2[6-9][0-9] is .* for the teacher and .* student"):
        new_student(stage_of(student={"from": str(tmp_path)}, mode="logits"), teacher, TOKENIZER, 1)
    check_same_tokenizer(TOKENIZER, TOKENIZER)


def divergence(model, teacher, documents):
    total = count = 0.0
    for ids, weights in documents:
        with torch.no_grad():
            own = [m.logits(m.forward_train(torch.tensor(ids), torch.arange(len(ids)), [(1, len(ids))], mtp=False).hidden_ND)
                   for m in (model, teacher)]
        keep = [i for i in range(len(ids) - 1) if weights[i + 1]]
        p, q = (x[keep].double().log_softmax(-1) for x in (own[1], own[0]))
        total, count = total + (p.exp() * (p - q)).sum().item(), count + len(keep)
    return total / count


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_the_loss_by_hand(kl_weight):
    teacher, student = teacher_model(), lively(qwen2(vocab_size=288, max_position_embeddings=256))
    documents = [([*range(20 + i, 30 + 2 * i), 1], [0.0] * 4 + [1.0] * (7 + i)) for i in range(9)]
    stage = stage_of(mode="logits", top_k=287, kl_weight=kl_weight, batch=9, micro_batch_tokens=60)
    objective = LogitDistil(teacher, student, TOKENIZER, documents, stage, 0, [])
    (update,) = objective.next_batch(0)
    parts = [objective.loss(b) for b in update]
    sums = {k: sum(p.sums[k] for p in parts) for k in parts[0].sums}
    kl = divergence(student, teacher, documents)
    assert len(update) > 1 and sums["kl"] == pytest.approx(kl, rel=1e-4)
    losses = []
    for ids, weights in documents:
        logits = student.logits(student.forward_train(torch.tensor(ids), torch.arange(len(ids)), [(1, len(ids))]).hidden_ND)
        losses += [-logits[i].log_softmax(-1)[ids[i + 1]].item() for i in range(len(ids) - 1) if weights[i + 1]]
    assert sums["loss"] == pytest.approx(kl_weight * kl + (1 - kl_weight) * sum(losses) / len(losses), rel=1e-4)
    grads = torch.autograd.grad(sum(p.loss for p in parts), list(student.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in grads) and not any(p.requires_grad for p in teacher.parameters())
    assert "kl" in objective.metrics(sums)


RECIPE = """
name = "taught"
[model]
from = "base"
[task]
name = "own_tasks.py:Even"
[[stages]]
kind = "distil"
MODE
problems = 40
samples = 2
max_tokens = 40
keep = "all"
epochs = 5
batch = 16
save_every = 5
optimizer = { lr = 3e-3, warmup_steps = 3 }
[stages.student]
preset = "STUDENT"
[[stages]]
kind = "eval"
n = 4
max_tokens = 8
"""


@pytest.fixture
def home(tmp_path):
    shutil.copy(Path(__file__).parent / "own_tasks.py", tmp_path)
    save_checkpoint(tmp_path / "base", talkative(teacher_model()), TOKENIZER, {})
    return tmp_path


def execute(home, mode, student, out, stop_after=None):
    (home / "x.toml").write_text(RECIPE.replace("MODE", mode).replace("STUDENT", student))
    recipe, text = load_recipe(str(home / "x.toml"))

    class Watch(Quiet):
        def should_stop(self):
            return stop_after is not None and sum(budget > 1 for _, _, budget in self.steps) >= stop_after

    observer = Watch()
    run = Run(recipe, text, home / out, observer, CPU)
    run.execute()
    return observer


@pytest.mark.parametrize("mode,student", [("mode = \"logits\"\ntop_k = 20", "qwen2-nano"), ("mode = \"traces\"", "v3-nano")])
def test_a_student_comes_nearer_to_its_teacher(home, mode, student):
    observer = execute(home, mode, student, "out")
    out = home / "out/stages/00-distil"
    teacher, taught = load_checkpoint(home / "base"), load_checkpoint(out)
    assert taught.config.architecture == preset(student).architecture and taught.tokenizer.vocabulary() == TOKENIZER.vocabulary()
    before = build_model(taught.config, seed=0)
    task = load_task(f"{home}/own_tasks.py:Even")
    held_out = sample_traces(teacher.model, TOKENIZER, task, stage_of(problems=20, max_tokens=40), 99, home, lambda: None,
                             lambda *_: None)
    documents = render(read_conversations(held_out), TOKENIZER, 256)
    gaps = [divergence(model, teacher.model, documents) for model in (before, taught.model)]
    assert gaps[1] < 0.9 * gaps[0], gaps
    lines = metrics(home / "out")
    note = next(x["text"] for x in lines if x["kind"] == "note")
    kept = len((out / "traces.jsonl").read_text().splitlines())
    assert note == f"the teacher's answers: {kept} of 80 kept, {kept} fit the student"
    steps = [x for x in lines if x["kind"] == "step"]
    assert len(steps) == -(-kept * 5 // 16) and ("kl" in steps[0]) == ("logits" in mode)
    assert [x["name"] for x in lines if x["kind"] == "eval"] == ["base", "distil"]
    assert observer.stages[0] == ("distil: answers", 0, 1)
    if student == "qwen2-nano":
        convert(out, "gguf", home / "student.gguf")
        assert (home / "student.gguf").read_bytes()[:4] == b"GGUF"


def test_stopped_anywhere_and_gone_on_is_the_same(home):
    mode = "mode = \"logits\"\nema_decay = 0.9"
    whole = execute(home, mode, "qwen2-nano", "whole")
    trained = [s for s in whole.steps if s[0] == "distil" and s[2] > 1]
    for stop in (1, random.randrange(2, len(trained) - 1)):
        with pytest.raises(Interrupted):
            execute(home, mode, "qwen2-nano", f"again{stop}", stop)
        execute(home, mode, "qwen2-nano", f"again{stop}")
        for name in ("model.safetensors", "ema/model.safetensors", "traces.jsonl"):
            a, b = (home / run / "stages/00-distil" / name for run in ("whole", f"again{stop}"))
            assert a.read_bytes() == b.read_bytes(), (stop, name)
        assert timeless(metrics(home / f"again{stop}")) == timeless(metrics(home / "whole"))


@pytest.mark.parametrize("lines,message", [
    ("mode = \"logit\"", "mode` = 'logit'"),
    ("mode = \"traces\"\ntop_k = 5", "top_k does nothing in mode \"traces\""),
    ("mode = \"logits\"\nkl_weight = 0", "kl_weight` = 0"),
    ("temperature = 0", "samples 2 at temperature 0 are 2 times the same; 1 would be right"),
    ("mode = \"logits\"\ntopk = 5", "unknown key `stages.0..topk`; the nearest known key is `stages.0..top_k`"),
    ("preset = \"v3\"", "preset 'v3' is not known for distil; r1 would be right"),
])
def test_mistakes_are_named(lines, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(RECIPE.replace("MODE", lines), "x.toml")


def test_a_student_that_is_no_preset(home):
    with pytest.raises(ValueError, match="preset 'qwen3-nano' is not one of .*qwen2-nano.*deepseek-v3"):
        execute(home, "", "qwen3-nano", "out")
    assert not (home / "out").exists()
