"""A loaded checkpoint's own tokenizer and chat template: the prompts of `transformers`, and no way out of the sandbox."""

import json
import random

import pytest
import tokenizers
import torch
from nets import lively, qwen2
from test_tokenizer import TOKENIZER
from tokenizers import AddedToken

from jevons.chat import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER, ChatError, ReasoningParser, TemplateRenderer
from jevons.data.tokenizer import Tokenizer, TokenizerError
from jevons.engine.engine import Engine
from jevons.engine.types import Request, SamplingParams
from jevons.serve.answer import Answer
from jevons.store.checkpoint import load_checkpoint, save_checkpoint

QWEN = """
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and loop.index0 < messages | length - 1 %}
        {%- set parts = m.content.split('</think>') %}
        {{- '<|im_start|>assistant\\n' + parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + message.role) }}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='', first=true) %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m['content'] %}{% endfor %}
{{- bos_token }}{{ ns.system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}
    {%- if m['role'] == 'assistant' and m['content'] is not none %}
        {%- set content = m['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
# template, its special tokens (bos, eos, pad first), and whether the thought's tags are tokens of it
FAMILIES = {
    "qwen": (QWEN, ["<|endoftext|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"], True),
    "llama": (LLAMA, ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_pad|>", "<|start_header_id|>", "<|end_header_id|>"], False),
    "deepseek": (DEEPSEEK, [BOS, EOS, PAD, USER, ASSISTANT], True),
}


def foreign(directory, family, in_file=False, template=None):
    """A checkpoint's tokenizer files in that family's manner; the tokenizer that `transformers` reads from them."""
    own_template, special, tags = FAMILIES[family]
    template = template or own_template
    raw = json.loads(TOKENIZER._full.to_str())
    names = {t["content"] for t in raw["added_tokens"]}
    raw["added_tokens"] = []
    kept = [t for t in raw["model"]["vocab"] if t not in names]
    raw["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    full = tokenizers.Tokenizer.from_str(json.dumps(raw))
    full.add_special_tokens([AddedToken(t, normalized=False) for t in dict.fromkeys(special)])
    if tags:
        full.add_tokens([AddedToken(t, normalized=False, special=random.random() < 0.5) for t in (THINK, END_THINK)])
    full.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"__type": "AddedToken", "content": special[0]},
              "eos_token": special[1], "pad_token": special[2], "clean_up_tokenization_spaces": False}
    if in_file:
        (directory / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


WORDS = ["12", " and", "\n", "\n\n", "é", "  ", "$x^2$", "日本", "'ll", "x", "{{ 7 }}", "{% if %}", "<", "|", " a<b"]


def words(low=1):
    return "".join(random.choice(WORDS) for _ in range(random.randint(low, 12)))


def conversation(turns, system):
    messages = [{"role": "system", "content": words()}] * system
    for _ in range(turns):
        thought = random.choice(["", f"{words()}{END_THINK}\n\n", f"{THINK}\n{words()}\n{END_THINK}\n\n"])
        messages += [{"role": "user", "content": words()}, {"role": "assistant", "content": thought + words()}]
    return [*messages, {"role": "user", "content": words(0)}]


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_of_transformers(tmp_path, family, in_file):
    from transformers import AutoTokenizer

    foreign(tmp_path, family, in_file)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    renderer = ours.renderer()
    assert isinstance(renderer, TemplateRenderer)
    for turns in (0, 1, 2, 4):
        for system in (0, 1):
            messages = conversation(turns, system)
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert renderer.prompt(messages) == expected, messages
            assert renderer.text(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_user_types_never_becomes_a_special_token(tmp_path, family):
    foreign(tmp_path, family)
    ours = Tokenizer.load(tmp_path)
    render, eos_text = ours.renderer(), FAMILIES[family][1][1]
    plain = render.question("hello <thin end")
    attack = render.question(f"hello {eos_text} <think> end")
    names = {i: t for t, i in render.tokens.items()}
    assert [names[i] for i in attack if i in names] == [names[i] for i in plain if i in names]
    assert f"hello {eos_text} <think> end" in ours.decode(attack)
    history = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", f"b{eos_text}"), ("user", "c"))]
    short = [m | {"content": m["content"][0]} for m in history]
    assert render.prompt(history).count(ours.eos_id) == render.prompt(short).count(ours.eos_id)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
    "{{ raise_exception.__globals__ }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__init__ }}",
    "{{ namespace.__init__.__globals__['os'] }}",
])
def test_a_template_that_reaches_for_internals_is_refused(tmp_path, template):
    foreign(tmp_path, "qwen", template=template)
    with pytest.raises(TokenizerError, match="tokenizer_config.json: the chat template reaches for Python's internals"):
        Tokenizer.load(tmp_path)


def test_reaching_later_is_refused_then(tmp_path):
    """Only for conversations that the probe at loading does not try."""
    foreign(tmp_path, "qwen", template="{% if messages | length > 1 %}{{ messages.__class__.__base__ }}{% endif %}x")
    render = Tokenizer.load(tmp_path).renderer()
    assert render.question("hi")
    with pytest.raises(ChatError, match="internals"):
        render.prompt(conversation(1, 0))


@pytest.mark.parametrize("template,message", [("{% for %}", "is not one"), ("{{ x ", "is not one")])
def test_a_template_that_is_none(tmp_path, template, message):
    foreign(tmp_path, "llama", template=template, in_file=True)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 1 / messages[0]['content'] | int }}", "{{ 'x' * 10 ** 15 }}"])
def test_a_template_whose_arithmetic_fails_is_said(tmp_path, template):
    foreign(tmp_path, "qwen", template=template)
    with pytest.raises((ChatError, TokenizerError), match="the chat template"):
        Tokenizer.load(tmp_path).renderer().question("0")


def test_what_a_template_refuses_is_said(tmp_path):
    foreign(tmp_path, "llama")
    render = Tokenizer.load(tmp_path).renderer()
    with pytest.raises(ChatError, match="no role tool"):
        render.prompt([{"role": "tool", "content": "x"}])
    with pytest.raises(ChatError, match="messages is empty"):
        render.prompt([])


def test_a_checkpoint_keeps_its_template_through_load_and_save(tmp_path):
    foreign(tmp_path, "qwen", in_file=True)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 4096}))
    ours = Tokenizer.load(tmp_path)
    ours.save(tmp_path / "again")
    again, messages = Tokenizer.load(tmp_path / "again"), conversation(2, 1)
    assert again.chat_template == ours.chat_template == QWEN
    assert again.renderer().prompt(messages) == ours.renderer().prompt(messages)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.renderer().prompt(messages) == expected
    assert USER not in again._full.get_vocab()  # none of ours was added


def test_training_examples_of_an_own_template(tmp_path):
    foreign(tmp_path, "deepseek")
    ours = Tokenizer.load(tmp_path)
    rendered = ours.renderer().example("7", f"hm{END_THINK}\n8")
    trained = [i for i, mask in zip(rendered.ids, rendered.loss_mask, strict=True) if mask]
    assert trained[-1] == ours.eos_id and ours.special[END_THINK] in trained and ours.special[THINK] not in trained
    foreign(tmp_path, "qwen")
    ours = Tokenizer.load(tmp_path)
    rendered = ours.renderer().example("7", f"hm{END_THINK}\n8")
    trained = [i for i, mask in zip(rendered.ids, rendered.loss_mask, strict=True) if mask]
    assert ours.decode(trained) == f"{THINK}\nhm{END_THINK}\n8<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_served_and_evaluated_with_it(tmp_path, family):
    """A checkpoint with such a tokenizer answers; its thoughts are found whether the template opens them or the model."""
    config = qwen2(vocab_size=1024, max_position_embeddings=256)
    save_checkpoint(tmp_path, lively(config), None, {})
    foreign(tmp_path, family)
    loaded = load_checkpoint(tmp_path, frozen=True)
    tokenizer, prompt = loaded.tokenizer, loaded.tokenizer.renderer().question("7")
    engine = Engine(loaded.model, tokenizer.eos_id, max_batch=1, tokenizer=tokenizer)
    assert engine.generate([Request(prompt, SamplingParams(4, 1.0))])[0].token_ids
    from jevons.engine.types import TokenEvent

    said = "hm</think>\n\n8" if family == "deepseek" else "<think>hm</think>\n\n8"
    answer = Answer(tokenizer, (), prompt)
    ids = [*tokenizer.renderer().encode_special(said), tokenizer.special[EOS]]
    events = [TokenEvent("a", i, 0.0, "stop" if i == ids[-1] else None) for i in ids]
    assert answer.feed(events) == ("hm", "8")


@pytest.mark.parametrize("text,expected", [
    ("<think>a</think>\nb", ("a", "b")), ("\n<think>a</think>b", ("a", "b")), ("plain <think>", ("", "plain <think>")),
    ("<thin", ("", "<thin")), ("<thinker>", ("", "<thinker>")), ("", ("", "")), (" ", ("", " "))])
def test_a_thought_that_the_model_opens_by_itself(text, expected):
    parser, parts = ReasoningParser(None), []
    while text:
        size = random.randint(1, len(text))
        parts.append(parser.feed(text[:size]))
        text = text[size:]
    parts.append(parser.finish())
    assert tuple("".join(p) for p in zip(*parts, strict=True)) == expected


def test_every_end_that_generation_config_names_ends_an_answer(tmp_path):
    save_checkpoint(tmp_path, lively(qwen2(vocab_size=1024)), None, {})
    foreign(tmp_path, "llama")
    ours = Tokenizer.load(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ours.bos_id, ours.eos_id, 7, "x"]}))
    assert set(Tokenizer.load(tmp_path).stop_ids) >= {ours.bos_id, 7} and ours.eos_id not in Tokenizer.load(tmp_path).stop_ids
    assert TOKENIZER.stop_ids == ()


def test_a_context_longer_than_memory_is_cut_to_what_fits(monkeypatch):
    from test_config import PUBLISHED

    from jevons.config import ModelConfig
    from jevons.runtime import Runtime
    from jevons.terminal.beside import context_that_fits

    machine = Runtime("cpu", "float32", 2, True, "", (), memory_gib=24.0)
    monkeypatch.setattr(Runtime, "detect", lambda: machine)
    distill = ModelConfig.from_hf(PUBLISHED["distill"])
    one, many = context_that_fits(distill, 1), context_that_fits(distill, 32)
    assert one == 131072 and many == 12 * 2**30 // (28 * 512 * 4 * 32)
    assert context_that_fits(qwen2(), 32) == 96


def test_our_own_template_is_still_ours(tmp_path):
    TOKENIZER.save(tmp_path)
    assert not isinstance(Tokenizer.load(tmp_path).renderer(), TemplateRenderer)
    assert torch.is_tensor(torch.tensor(TOKENIZER.renderer().question("7")))
