"""The tokenizer: exact ids, special tokens that text cannot forge, and the same prompts through `transformers`."""

import json
import random
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.chat import ASSISTANT, BOS, END_THINK, EOS, PAD, SPECIAL_TOKENS, THINK, USER
from jevons.data.tokenizer import Tokenizer, TokenizerError, train_tokenizer

TEXTS = [f"Using the numbers {i}, {i * 7 % 31} and 19, reach {i * 13 % 100}.\nLet me try {i} + 19 = {i + 19}: no.\n"
         for i in range(300)]
TOKENIZER = train_tokenizer(TEXTS, 512)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


@pytest.fixture
def rng():
    return random.Random()


def test_ids_and_size():
    assert [TOKENIZER.special[t] for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert (TOKENIZER.special[BOS], TOKENIZER.special[EOS], TOKENIZER.special[PAD]) == (0, 1, 2)
    assert TOKENIZER.vocab_size == 512
    assert train_tokenizer(["a"], 288).vocab_size == 288  # far fewer merges than ids


@pytest.mark.parametrize("size", [256, 500, 32])
def test_wrong_sizes_are_refused(size):
    with pytest.raises(TokenizerError, match=str(size)):
        train_tokenizer(TEXTS, size)


@settings(deadline=None)
@given(ANY_TEXT)
def test_round_trip_is_nfc(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)
    assert TOKENIZER.encode_batch([text, text]) == [ids, ids]


def test_merges_help_and_digits_stay_single(rng):
    number = str(rng.randrange(10**9, 10**10))
    assert len(TOKENIZER.encode(number)) == 10
    text = rng.choice(TEXTS)
    assert len(TOKENIZER.encode(text)) < len(text) * 0.7


@given(st.lists(st.sampled_from(SPECIAL_TOKENS) | ANY_TEXT, max_size=6))
@settings(deadline=None)
def test_text_cannot_forge_a_special_token(parts):
    ids = TOKENIZER.encode("".join(parts))
    assert not set(ids) & set(TOKENIZER.special.values())


def test_decode_shows_specials_and_skips_all_but_the_tags():
    bos, think, end_think, eos = (TOKENIZER.special[t] for t in (BOS, THINK, END_THINK, EOS))
    ids = [bos, *TOKENIZER.encode("hi"), think, end_think, eos]
    assert TOKENIZER.decode(ids) == f"{BOS}hi{THINK}{END_THINK}{EOS}"
    assert TOKENIZER.decode(ids, skip_special=True) == f"hi{THINK}{END_THINK}"


def test_surrogates_become_question_marks():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800é")) == "a?é"
    learned = train_tokenizer(["a\ud800é"] * 3, 288)
    assert learned.decode(learned.encode("é")) == "é", "a text with one is learned from too"


@settings(deadline=None)
@given(ANY_TEXT)
def test_stream_equals_whole_and_breaks_no_character(text):
    stream = TOKENIZER.decode_stream()
    ids = [*TOKENIZER.encode(text), TOKENIZER.special[END_THINK], *TOKENIZER.encode("é"), TOKENIZER.special[EOS]]
    pieces = [piece for piece in (stream.step(i) for i in ids) if piece is not None]
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special=True)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, 511), max_size=60))
def test_stream_survives_any_ids(ids):
    """A model may emit bytes that are no UTF-8 at all: nothing raises, and what comes out is a prefix of the whole."""
    for skip in (True, False):
        stream = TOKENIZER.decode_stream(skip)
        text = "".join(stream.step(i) or "" for i in ids)
        assert TOKENIZER.decode(ids, skip).startswith(text)


def test_training_is_deterministic(tmp_path):
    for name in ("one", "two"):
        train_tokenizer(iter(TEXTS), 384).save(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_save_and_load(tmp_path, rng):
    TOKENIZER.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert again.special == TOKENIZER.special and again.vocab_size == TOKENIZER.vocab_size
    text = rng.choice(TEXTS) + EOS + "ü\n"
    assert again.encode(text) == TOKENIZER.encode(text)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_transformers_renders_the_same_prompts(tmp_path, rng):
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), TOKENIZER.renderer()
    assert len(theirs) == TOKENIZER.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    words = ["12", " and", "\n", "\n\n", "é", "e\u0301", "  ", "$x^2$", "日本", "'ll", "x"]

    def text():
        return "".join(rng.choice(words) for _ in range(rng.randrange(1, 12)))

    for turns in (0, 1, 3):
        for system in (0, 1, 2):
            messages = [{"role": "system", "content": text()} for _ in range(system)]
            for _ in range(turns):
                messages.append({"role": "user", "content": text()})
                thought = text() + END_THINK + "\n\n" if rng.random() < 0.7 else ""
                messages.append({"role": "assistant", "content": thought + text()})
            messages.append({"role": "user", "content": text()})
            rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert rendered["input_ids"] == ours.prompt(messages), messages
    ids = [*ours.question(text()), *ours.completion(f"thinking{END_THINK}\n12")]
    assert theirs.decode(ids) == TOKENIZER.decode(ids)
    assert theirs.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids, skip_special=True)


def foreign(directory, vocab_rows: int, **config):
    """A tokenizer in Qwen2's manner: its own eos, none of DeepSeek's tokens."""
    raw = json.loads(TOKENIZER._full.to_str())
    raw["added_tokens"] = []
    shift = len(SPECIAL_TOKENS)
    raw["model"]["vocab"] = {t: i - shift for t, i in raw["model"]["vocab"].items() if i >= shift}
    other = tokenizers.Tokenizer.from_str(json.dumps(raw))
    other.add_special_tokens(["<|endoftext|>"])
    other.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"vocab_size": vocab_rows}))
    return other


def test_foreign_tokenizer_gets_the_chat_tokens_in_unused_rows(tmp_path):
    other = foreign(tmp_path, 512, eos_token={"content": "<|endoftext|>"}, pad_token="<|endoftext|>")
    ours, eos = Tokenizer.load(tmp_path), other.token_to_id("<|endoftext|>")
    assert {ours.special[t] for t in (BOS, EOS, PAD)} == {eos}
    assert [ours.special[t] for t in (USER, ASSISTANT, THINK, END_THINK)] == list(range(eos + 1, eos + 5))
    assert ours.encode("Using the <|endoftext|>") == other.encode("Using the ").ids + ours.encode("<|endoftext|>")
    assert ours.decode(ours.renderer().question("7")).endswith(f"{USER}7{ASSISTANT}{THINK}\n")
    ours.save(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text('{"vocab_size": 512}')
    assert Tokenizer.load(tmp_path / "again").special == ours.special


def test_foreign_tokenizer_without_room_or_eos_is_refused(tmp_path):
    used = foreign(tmp_path, 512).get_vocab_size()
    foreign(tmp_path, used + 3, eos_token="<|endoftext|>")
    with pytest.raises(TokenizerError, match=f"{used + 3} embedding rows"):
        Tokenizer.load(tmp_path)
    foreign(tmp_path, used + 4)
    with pytest.raises(TokenizerError, match="eos_token"):
        Tokenizer.load(tmp_path)
