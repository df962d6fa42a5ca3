"""The renderer and the reasoning parser: what training, reinforcement learning and the server all send and read."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.chat import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    SPECIAL_TOKENS,
    THINK,
    USER,
    ChatError,
    ReasoningParser,
    Renderer,
    check_roles,
    split_thought,
)
from jevons.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["Reach 40 with 3, 7 and 19.\n"] * 3, 288)
RENDERER = TOKENIZER.renderer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
HOSTILE = st.lists(st.sampled_from([*SPECIAL_TOKENS, "\n", "a"]) | TEXT, max_size=5).map("".join)


def say(role, content):
    return {"role": role, "content": content}


def test_prompt_is_r1s_own():
    messages = [say("system", "Be brief."), say("user", "3 7 19 -> 40"), say("assistant", "3 + 7</think>\n\nno"),
                say("user", "again")]
    assert TOKENIZER.decode(RENDERER.prompt(messages)) == (
        f"{BOS}Be brief.{USER}3 7 19 -> 40{ASSISTANT}no{EOS}{USER}again{ASSISTANT}{THINK}\n")
    assert TOKENIZER.decode(RENDERER.question("hi")) == f"{BOS}{USER}hi{ASSISTANT}{THINK}\n"


@settings(deadline=None)
@given(st.lists(HOSTILE, min_size=1, max_size=4), HOSTILE)
def test_messages_cannot_forge_structure(texts, system):
    """Whatever users and earlier answers contain, the special ids are those of the frame and nothing else."""
    messages = [say("system", system)] + [say(role, text) for text in texts for role in ("user", "assistant")][:-1]
    special = {index: token for token, index in RENDERER.special.items()}
    found = [special[i] for i in RENDERER.prompt(messages) if i in special]
    turns = [USER, ASSISTANT, EOS] * (len(texts) - 1)
    assert found == [BOS, *turns, USER, ASSISTANT, THINK]


def test_encode_is_called_with_messages_only():
    """The renderer never joins a message with a special token's text before encoding."""
    seen = []

    def encode(text):
        seen.append(text)
        return [100]

    ids = Renderer(encode, {t: i for i, t in enumerate(SPECIAL_TOKENS)}).prompt([say("system", "s"), say("user", "u")])
    assert seen == ["s", "u", "\n"] and ids == [0, 100, 3, 100, 4, 5, 100]


@pytest.mark.parametrize("roles,where", [
    ([], "empty"), (["assistant"], r"messages\[0\]"), (["system"], "last message"), (["user", "user"], r"messages\[1\]"),
    (["user", "assistant"], "last message"), (["user", "system", "user"], r"messages\[1\]"), (["tool"], "'tool'"),
    ([None], "None"), (["user", "assistant", "assistant"], r"messages\[2\]"), (["system", "assistant"], r"messages\[1\]"),
])
def test_wrong_role_orders_are_refused(roles, where):
    with pytest.raises(ChatError, match=where):
        check_roles([say(role, "x") for role in roles])


@pytest.mark.parametrize("roles", [["user"], ["system", "user"], ["system", "system", "user"], ["user", "assistant", "user"]])
def test_right_role_orders_pass(roles):
    check_roles([say(role, "x") for role in roles])


@settings(deadline=None)
@given(TEXT, TEXT)
def test_example_trains_on_the_completion_only(question, thought):
    completion = f"{thought}{END_THINK}\n40"
    example = RENDERER.example(question, completion)
    prompt = RENDERER.question(question)
    assert example.ids[: len(prompt)] == prompt and len(example.ids) == len(example.loss_mask)
    assert example.loss_mask == [i >= len(prompt) for i in range(len(example.ids))]
    assert example.ids[len(prompt):] == RENDERER.completion(completion)
    assert example.ids[-1] == RENDERER.special[EOS] and example.ids.count(RENDERER.special[END_THINK]) == 1


def test_completion_without_end_is_all_thought():
    assert RENDERER.completion("ab") == [*TOKENIZER.encode("ab"), RENDERER.special[EOS]]


def test_decoding_a_completion_gives_it_back():
    text = f"3 + 7 = 10{END_THINK}\n(19 - 3) * 7"
    assert TOKENIZER.decode(RENDERER.completion(text), skip_special=True) == text


def feed(pieces, **options):
    parser = ReasoningParser(**options)
    deltas = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return "".join(d[0] for d in deltas), "".join(d[1] for d in deltas), deltas


def cut(text, rng):
    at = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


PIECES = st.sampled_from(["<", "</", "</think", "</think>", "think>", "\n", "<think>", "x"])
TAGGY = st.lists(PIECES | TEXT, max_size=8).map("".join)


@given(TAGGY, st.randoms(use_true_random=True))
def test_parser_is_the_same_however_the_text_is_cut(text, rng):
    thought, tag, answer = text.partition(END_THINK)
    for pieces in (cut(text, rng), list(text), [text]):
        reasoning, content, deltas = feed(pieces)
        assert reasoning == thought
        assert content == (answer.lstrip("\n") if tag else "")
        assert not any(END_THINK in r for r, _ in deltas)


def test_parser_holds_no_more_than_it_must():
    parser = ReasoningParser()
    assert parser.feed("a<") == ("a", "")
    assert parser.feed("/thin") == ("", "")
    assert parser.feed("g</think") == ("</thing", "")
    assert parser.feed(">\n") == ("", "")
    assert parser.feed("\nanswer</think>") == ("", "answer</think>")
    assert parser.feed("\n") == ("", "\n")


def test_parser_gives_back_what_it_held():
    parser = ReasoningParser()
    parser.feed("abc</thi")
    assert parser.finish() == ("</thi", "") and parser.finish() == ("", "")


def test_parser_outside_a_thought():
    assert feed(["a</think>", "\nb"], in_reasoning=False)[:2] == ("", "a</think>\nb")


def test_split_thought():
    thought = "".join(random.choices("ab\n<", k=20))
    assert split_thought(f"{thought}{END_THINK}\n 7 \n") == (thought, "7")
    assert split_thought(thought) == (thought, "")
    assert split_thought(f"a{END_THINK}b{END_THINK}c") == ("a", f"b{END_THINK}c")
