"""Supervised fine-tuning: every row through the one renderer, the loss on the assistant's words alone, bad rows named."""

import json
import random

import pytest
import torch
from nets import lively, llama, nano
from test_pipeline import CPU, Quiet
from test_templates import FAMILIES, foreign
from whole_runs import metrics

from jevons.chat import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, ChatError
from jevons.data.tokenizer import Tokenizer, train_tokenizer
from jevons.reason.pipeline import Run
from jevons.recipe import RecipeError, SFTStage, load_recipe, parse_recipe
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.train.objective import token_losses
from jevons.train.schedule import lr_factor
from jevons.train.sft import SFT, DataError, answers, read_conversations, render

WORDS = ("sun", "moon", "rain", "wind", "sea")
TOKENIZER = train_tokenizer([" ".join(WORDS)] * 3, 288)


def stage_of(**values):
    return SFTStage(**dict(kind="sft", data=["x"]) | values)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_rows(count):
    def text():
        return " ".join(random.choices(WORDS, k=random.randint(1, 8)))

    kinds = [lambda: {"question": text(), "answer": text()},
             lambda: {"prompt": text(), "completion": f"{text()}</think>\n{text()}"},
             lambda: {"messages": [{"role": "system", "content": text()}, {"role": "user", "content": text()},
                                   {"role": "assistant", "content": text(), "reasoning_content": text()},
                                   {"role": "user", "content": text()}, {"role": "assistant", "content": text()}]}]
    return [random.choice(kinds)() for _ in range(count)]


def own_words(document):
    """(what the model is trained on, what it only reads), as text."""
    ids, weights = document
    assert all(w in (0.0, 1.0) for w in weights) and weights == sorted(weights), "the answer is the end"
    start = weights.index(1.0)
    return TOKENIZER.decode(ids[start:]), TOKENIZER.decode(ids[:start])


def test_every_answer_is_an_example_as_the_server_would_ask_for_it(tmp_path):
    row = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sun?"},
                        {"role": "assistant", "reasoning_content": "hm", "content": "moon"},
                        {"role": "user", "content": "and?"}, {"role": "assistant", "content": "a\nb</think>\n\nrain"}]}
    conversations = read_conversations(write_rows(tmp_path / "x.jsonl", [row]))
    first, second = render(conversations, TOKENIZER, 1000)
    assert answers(conversations) == 2
    assert own_words(first) == (f"hm\n{END_THINK}\nmoon{EOS}", f"{BOS}be brief{USER}sun?{ASSISTANT}{THINK}\n")
    own, read = own_words(second)
    assert own == f"a\nb{END_THINK}\n\nrain{EOS}"
    assert read == f"{BOS}be brief{USER}sun?{ASSISTANT}moon{EOS}{USER}and?{ASSISTANT}{THINK}\n"
    assert second[0][: len(second[1]) - int(sum(second[1]))] == TOKENIZER.renderer().prompt(row["messages"][:-1])


@pytest.mark.parametrize("row,own", [
    ({"question": "a", "answer": "moon"}, f"{END_THINK}\nmoon"),  # what the prompt opens is closed at once
    ({"question": "a", "answer": "why</think>moon"}, f"why{END_THINK}moon"),
    ({"prompt": "a", "completion": "<think>\nwhy\n</think>\n\nmoon"}, f"why\n{END_THINK}\n\nmoon"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": USER}]}, f"{END_THINK}\n{USER}"),
])
def test_thoughts(tmp_path, row, own):
    (document,) = render(read_conversations(write_rows(tmp_path / "x.jsonl", [row])), TOKENIZER, 1000)
    assert own_words(document)[0] == own + EOS
    assert TOKENIZER.special[USER] not in document[0][document[1].index(1.0):], "text stays text"


@pytest.mark.parametrize("family,plain,thought", [
    ("deepseek", f"{END_THINK}\n\nmoon", f"hm\n{END_THINK}\n\nmoon"),  # its prompt opens the thought
    ("qwen", "moon", f"{THINK}\nhm\n{END_THINK}\n\nmoon"), ("llama", "moon", f"{THINK}\nhm\n{END_THINK}\n\nmoon")])
def test_a_foreign_template_decides_how_answers_begin(tmp_path, family, plain, thought):
    foreign(tmp_path, family)
    tokenizer = Tokenizer.load(tmp_path)
    for more, own in (({}, plain), ({"reasoning_content": "hm"}, thought)):
        messages = [{"role": "user", "content": "sun?"}, {"role": "assistant", "content": "moon"} | more]
        rendered = tokenizer.renderer().conversation(messages)
        prompt = tokenizer.renderer().prompt(messages[:1])
        assert rendered.ids[: len(prompt)] == prompt
        assert rendered.loss_mask == [i >= len(prompt) for i in range(len(rendered.ids))]
        assert tokenizer.decode(rendered.ids[len(prompt):-1]) == own and rendered.ids[-1] == tokenizer.eos_id
    token = FAMILIES[family][1][1]
    for content in (f"a{token}", f"x</think>a{token}"):
        ids = tokenizer.renderer().conversation([messages[0], {"role": "assistant", "content": content}]).ids
        assert ids.count(tokenizer.eos_id) == 1 + prompt.count(tokenizer.eos_id), "written by a person, it is text"


@pytest.mark.parametrize("line,message", [
    (b"{", "not JSON"),
    (b"\xff\xfe", "not UTF-8 text"),
    (b"[1]", "needs `messages`"),
    (b'{"text": "x"}', "needs `messages`"),
    (b'{"messages": []}', "needs `messages`"),
    (b'{"question": 3, "answer": "x"}', r"messages\[0\].content is 3; text would be right"),
    (b'{"question": "x", "answer": " "}', r"messages\[1\].content, an assistant's answer, is empty"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', r"messages\[0\].role is 'user'; the last message must be the assist"),
    (b'{"messages": [{"role": "assistant", "content": "x"}]}', "at least one user message"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}',
     r"messages\[1\].role is 'user'; 'assistant' was expected here"),
    (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}', r"messages\[0\].content is None"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "reasoning_content": 1}]}',
     r"messages\[1\].reasoning_content is 1"),
])
def test_a_bad_row_is_named(tmp_path, line, message):
    rows = [json.dumps(row).encode() for row in some_rows(random.randint(0, 5))]
    rows.append(b"")  # an empty line is no row
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*rows, line, *rows]))
    with pytest.raises(DataError, match=message) as error:
        read_conversations(path)
    assert str(error.value).startswith(f"{path}:{len(rows) + 1}: ")


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_conversations(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no row"):
        read_conversations(tmp_path / "empty.jsonl")


def test_rows_past_the_context(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "sun " * 60, "answer": "b"}, {"question": "a", "answer": "c"}]
    conversations = read_conversations(write_rows(tmp_path / "x.jsonl", rows))
    with pytest.raises(DataError, match=r"x.jsonl:2: \d+ tokens do not fit the context of 64; longer = \"drop\""):
        render(conversations, TOKENIZER, 64)
    assert len(render(conversations, TOKENIZER, 64, "drop")) == 2
    with pytest.raises(DataError, match="no example fits the context of 3"):
        render(conversations, TOKENIZER, 3, "drop")
    model = lively(nano(vocab_size=288, max_position_embeddings=64))
    objective = SFT.of(model, TOKENIZER, stage_of(data=[str(tmp_path / "x.jsonl")], longer="drop"), 0)
    assert objective.opening() == ["1 of 3 examples are longer than the context and left out"]


def test_every_example_is_seen_once_an_epoch(tmp_path):
    count, batch, epochs = random.randint(1, 23), random.randint(1, 9), random.randint(1, 3)
    documents = [([i + 10, i + 11, 1], [0.0, 1.0, 1.0]) for i in range(count)]
    model = lively(nano(vocab_size=288))

    def all_steps(seed):
        objective = SFT(model, TOKENIZER, documents, stage_of(batch=batch, epochs=epochs, micro_batch_tokens=8), seed)
        seen = []
        for step in range(objective.steps):
            (update,) = objective.next_batch(step)
            assert sum(b.share for b in update) == pytest.approx(1)
            rows = [int(b.tokens_N[i]) for b in update for i in (b.positions_N == 0).nonzero().flatten()]
            assert len(rows) == min(batch, count * epochs - step * batch)
            seen += [set(rows)] if batch == count else [rows]
        return seen, objective

    seen, objective = all_steps(4)
    flat = [i for rows in seen for i in rows]
    assert sorted(flat) == sorted(list(range(10, 10 + count)) * epochs)
    assert all_steps(4)[0] == seen, "a function of the seed and the step"
    assert objective.steps == -(-count * epochs // batch)


@pytest.mark.parametrize("dense", [False, True])
def test_the_loss_is_the_mean_over_the_answers_tokens(tmp_path, dense):
    rows = read_conversations(write_rows(tmp_path / "x.jsonl", some_rows(12)))
    model = lively((llama if dense else nano)(vocab_size=288, max_position_embeddings=200))
    documents = render(rows, TOKENIZER, 200)
    objective = SFT(model, TOKENIZER, documents, stage_of(batch=len(documents), micro_batch_tokens=150, mtp_weight=0.0), 1)
    (update,) = objective.next_batch(0)
    assert len(update) > 1
    parts = [objective.loss(b) for b in update]
    total = count = 0.0
    for ids, weights in documents:  # one by one: nothing that lies beside a row may reach it
        out = model.forward_train(torch.tensor(ids), torch.arange(len(ids)), [(1, len(ids))], mtp=False)
        own = torch.tensor([*weights[1:], 0.0])
        total += token_losses(model, out.hidden_ND, torch.tensor([*ids[1:], 0]), own).item()
        count += own.sum().item()
    assert sum(p.sums["loss"] for p in parts) == pytest.approx(total / count, rel=1e-4)
    shown = objective.metrics({k: sum(p.sums[k] for p in parts) for k in parts[0].sums})
    assert ("balance_loss" in shown) == (not dense) and ("mtp_loss" in shown) == (not dense) and shown["tokens"] > count


def test_presets_are_the_published_settings():
    text = 'name = "x"\n[model]\nfrom = "dir"\n[[stages]]\nkind = "sft"\ndata = ["a.jsonl"]\npreset = "{}"\n{}'
    stage = parse_recipe(text.format("r1", "")).stages[0]
    assert (stage.epochs, stage.batch, stage.optimizer.lr, stage.optimizer.matrices) == (2, 128, 5e-5, "adamw")
    rates = [5e-5 * lr_factor(i, 1001, stage.optimizer) for i in (0, 500, 1000)]
    assert rates == pytest.approx([5e-5, 2.75e-5, 5e-6], rel=1e-2)
    v3 = parse_recipe(text.format("v3", "epochs = 3\noptimizer = { warmup_steps = 9 }")).stages[0]
    assert (v3.epochs, v3.optimizer.lr, v3.optimizer.final_lr_fraction, v3.optimizer.warmup_steps) == (3, 5e-6, 0.2, 9)
    with pytest.raises(RecipeError, match="preset"):
        parse_recipe(text.format("r2", ""))
    with pytest.raises(RecipeError, match="unknown key `stages.0..epoch`; the nearest known key is `stages.0..epochs`"):
        parse_recipe(text.format("r1", "epoch = 3"))


RECIPE = """
name = "tuned"
[model]
from = "base"
[task]
name = "own_tasks.py:Even"
[[stages]]
kind = "sft"
data = ["rows.jsonl"]
batch = 6
epochs = 3
ema_decay = 0.8
save_every = 2
[[stages]]
kind = "eval"
n = 4
max_tokens = 6
"""


@pytest.fixture
def home(tmp_path):
    import shutil
    from pathlib import Path

    shutil.copy(Path(__file__).parent / "own_tasks.py", tmp_path)
    save_checkpoint(tmp_path / "base", lively(nano(vocab_size=288, max_position_embeddings=300)), TOKENIZER, {})
    write_rows(tmp_path / "rows.jsonl", [{"question": w, "answer": f"{w} {w}</think>\n{w}"} for w in WORDS * 2])
    (tmp_path / "x.toml").write_text(RECIPE)
    return tmp_path


def test_a_recipe_that_tunes_a_directory(home):
    recipe, text = load_recipe(str(home / "x.toml"))
    observer = Quiet()
    Run(recipe, text, home / "out", observer, CPU).execute()
    steps = [x for x in metrics(home / "out") if x["kind"] == "step"]
    assert [x["step"] for x in steps] == [1, 2, 3, 4, 5] and steps[-1]["loss"] < steps[0]["loss"]
    assert metrics(home / "out")[0]["stages"][0] == {"name": "sft", "kind": "sft", "budget": 5, "unit": "steps"}
    scored = [x["name"] for x in metrics(home / "out") if x["kind"] == "eval"]
    assert scored == ["base", "sft", "sft, averaged"]
    tuned, averaged = (load_checkpoint(home / "out/stages/00-sft" / name).model for name in ("", "ema"))
    base = load_checkpoint(home / "base").model
    gaps = [sum((a - b).square().sum().item() for a, b in zip(m.parameters(), base.parameters(), strict=True))
            for m in (averaged, tuned)]
    assert 0 < gaps[0] < gaps[1], "the average lags behind"


def test_what_is_refused_before_the_directory_is_begun(home):
    def refused(match, text=RECIPE):
        (home / "x.toml").write_text(text)
        recipe, text = load_recipe(str(home / "x.toml"))
        with pytest.raises(ValueError, match=match):
            Run(recipe, text, home / "out", Quiet(), CPU)
        assert not (home / "out").exists()

    refused("examples is 11, and .*rows.jsonl holds 10", RECIPE.replace("batch = 6", "batch = 6\nexamples = 11"))
    with (home / "rows.jsonl").open("a") as file:
        file.write('{"question": 1}\n')
    refused(r"rows.jsonl:11: needs `messages`")
    (home / "rows.jsonl").unlink()
    refused("rows.jsonl cannot be read")


def test_a_conversation_must_end_with_the_assistant():
    with pytest.raises(ChatError, match=r"messages\[0\].role is 'user'"):
        TOKENIZER.renderer().conversation([{"role": "user", "content": "x"}])
    assert isinstance(TOKENIZER, Tokenizer)
