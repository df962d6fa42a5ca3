"""Byte-level BPE with Qwen2's pre-tokenizer (single digits, NFC), DeepSeek's special tokens and R1's chat template.

Text goes to ids by a tokenizer that knows no special tokens, so what a user types can never become one; ids go to
text by one that knows them all. What `save` writes, `transformers.AutoTokenizer` opens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from jevons import chat
from jevons.chat import ASSISTANT, BOS, CHAT_TEMPLATE, END_THINK, EOS, PAD, SPECIAL_TOKENS, THINK, USER, Renderer

# Qwen2's tokenizer.json, as llama.cpp knows it by the name "qwen2": every digit is a word of its own.
PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLACEHOLDER = "<｜place▁holder▁no▁{}｜>"  # DeepSeek's name for ids that mean nothing
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # DeepSeek's: before prefix, suffix, middle
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SHOWN = (THINK, END_THINK)  # R1 keeps its tags when special tokens are skipped; parsers rely on it


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained, read or used; the message names the file or the value."""


class DecodeStream:
    """Ids to text one at a time: `step` gives None while a character is incomplete, never a part of one."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special)

    def step(self, token_id: int) -> str | None:
        return self._stream.step(self._tokenizer, token_id)


class Tokenizer:
    """`special` maps each of chat.SPECIAL_TOKENS to its id; `vocab_size` is the largest id plus one.

    `chat_template` is the one of `config` (tokenizer_config.json) where a checkpoint brings its own, else ours; a token of
    ours that such a checkpoint does not have has the id -1. `stop_ids` end an answer too, beside eos: Llama 3 has several.
    """

    def __init__(self, full: tokenizers.Tokenizer, special: dict[str, int], config: dict[str, Any] | None = None,
                 source: str = "tokenizer_config.json"):
        self._full = full
        # A copy of it without added tokens: the one that reads text.
        raw = json.loads(full.to_str()) | {"added_tokens": [], "post_processor": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(raw))
        self._config, self._source = config or {}, source
        self.chat_template: str = self._config.get("chat_template", CHAT_TEMPLATE)
        self.special = special
        self.stop_ids: tuple[int, ...] = ()
        self.vocab_size = max(full.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int:
        return self.special[BOS]

    @property
    def eos_id(self) -> int:
        return self.special[EOS]

    @property
    def pad_id(self) -> int:
        return self.special[PAD]

    def vocabulary(self) -> dict[int, str]:
        """Token by id, special ones included."""
        return {index: token for token, index in self._full.get_vocab(with_added_tokens=True).items()}

    @property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """Ids of FIM_TOKENS, if it has them."""
        ids = tuple(index for token in FIM_TOKENS if (index := self._full.token_to_id(token)) is not None)
        return ids if len(ids) == 3 else None

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers that give equal ids for every text, and the same eos."""
        return hashlib.sha256(f"{self.eos_id} {self._plain.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; the text of a special token is text like any other. Lone surrogates become `?`."""
        return self._plain.encode(_clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, faster."""
        return [e.ids for e in self._plain.encode_batch_fast([_clean(t) for t in texts], add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids, special tokens as their text; `skip_special` leaves out all but `<think>` and `</think>`."""
        return self._full.decode(list(ids), skip_special_tokens=skip_special)

    def decode_stream(self, skip_special: bool = True) -> DecodeStream:
        """Ids to text as they come, by the same rules as `decode(ids, skip_special)`; the thought's tags are shown."""
        return DecodeStream(self._full, skip_special)

    def renderer(self) -> Renderer:
        """The renderer of the checkpoint's own template. Raises ChatError where that is none."""
        if self.chat_template == CHAT_TEMPLATE:
            return Renderer(self.encode, self.special)
        added = {token.content: index for index, token in self._full.get_added_tokens_decoder().items()}
        variables = {role: token for role in _ROLES if (token := _token(self._config.get(role)))}
        return chat.TemplateRenderer(self.chat_template, self.encode, self._encode_special, self.special, added, variables,
                                     self._source)

    def _encode_special(self, text: str) -> list[int]:
        return self._full.encode(_clean(text), add_special_tokens=False).ids

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json. The same tokenizer always gives the same bytes."""
        names = self.vocabulary()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": names[self.bos_id], "eos_token": names[self.eos_id], "pad_token": names[self.pad_id],
            "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000, "chat_template": CHAT_TEMPLATE,
        } | self._config
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._full.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a directory's tokenizer.json, Jevons' own or a foreign one.

        A foreign one with a chat template (chat_template.jinja, or in tokenizer_config.json) keeps it, and its tokens.
        One without may lack DeepSeek's tokens. Its own bos, eos and pad then take their part, and the chat tokens
        get ids that its model has rows for and its tokenizer leaves unused. Raises TokenizerError if there are none.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} does not exist; tokenizer.json belongs beside config.json")
        try:
            full = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from None
        model = _read_json(path.with_name("config.json"))
        source = path.with_name("tokenizer_config.json")
        config = _read_json(path.with_name("special_tokens_map.json")) | _read_json(source)
        template = _own_template(path.parent, config)
        if template is None:
            kept = {"model_max_length": config["model_max_length"]} if isinstance(config.get("model_max_length"), int) else None
            return cls(full, _find_special(full, model, config, str(path)), kept)
        raw = json.loads(full.to_str())  # a thought's tags must come out as text, whatever the file calls them
        raw["added_tokens"] = [t | {"special": t["special"] and t["content"] not in _SHOWN} for t in raw["added_tokens"]]
        full = tokenizers.Tokenizer.from_str(json.dumps(raw))
        tokenizer = cls(full, _find_special(full, model, config, str(path), add=False), config | {"chat_template": template},
                        str(source))
        for ends in (model.get("eos_token_id"), _read_json(path.with_name("generation_config.json")).get("eos_token_id")):
            ids = ends if isinstance(ends, list) else [ends]
            tokenizer.stop_ids += tuple(i for i in ids if type(i) is int and i not in (tokenizer.eos_id, *tokenizer.stop_ids))
        try:
            tokenizer.renderer()
        except chat.ChatError as error:
            raise TokenizerError(str(error)) from None
        return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, fim: bool = False) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` ids: special tokens (bos 0, eos 1, pad 2, ...; with `fim` those of DeepSeek
    for it too), 256 bytes, merges, and placeholders where the texts give fewer merges. Equal texts in equal order give
    an equal tokenizer.
    """
    tokens = (*SPECIAL_TOKENS, *FIM_TOKENS) if fim else SPECIAL_TOKENS
    least = -(-(len(tokens) + 256) // 32) * 32
    if vocab_size < least or vocab_size % 32:
        raise TokenizerError(f"vocab_size is {vocab_size}; a multiple of 32 not under {least} would be right")
    full = tokenizers.Tokenizer(models.BPE())
    full.normalizer = normalizers.NFC()
    full.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    full.decoder = decoders.ByteLevel()
    full.train_from_iterator(map(_clean, texts), trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[_added(t) for t in tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    ))
    full.add_tokens([_added(PLACEHOLDER.format(i)) for i in range(vocab_size - full.get_vocab_size())])
    raw = json.loads(full.to_str())  # the trainer marks every one of them special
    raw["added_tokens"] = [token | {"special": token["content"] not in _SHOWN} for token in raw["added_tokens"]]
    full = tokenizers.Tokenizer.from_str(json.dumps(raw))
    return Tokenizer(full, {token: full.token_to_id(token) for token in SPECIAL_TOKENS})


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=token not in _SHOWN)


def _clean(text: str) -> str:
    """Lone surrogates, which JSON can carry and UTF-8 cannot, as `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from None
    return raw if isinstance(raw, dict) else {}


def _token(value: Any) -> str | None:
    """A token of tokenizer_config.json, which is its text or an object that holds it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _own_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template that a checkpoint brings, None where there is none or it is ours. Raises TokenizerError."""
    file, template = directory / "chat_template.jinja", config.get("chat_template")
    try:
        if file.is_file():
            template = file.read_text(encoding="utf-8")
        elif isinstance(template, list):  # several by name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{directory}: the chat template cannot be read: {type(error).__name__}: {error}") from None
    return template if isinstance(template, str) and template != CHAT_TEMPLATE else None


def _find_special(full: tokenizers.Tokenizer, model: dict, config: dict, source: str, add: bool = True) -> dict[str, int]:
    """Ids of SPECIAL_TOKENS in a tokenizer that may lack some; those without a stand-in are added to it, or are -1."""
    special = {token: full.token_to_id(token) for token in SPECIAL_TOKENS}

    def own(role: str) -> int | None:
        """The id of its own bos, eos or pad: by tokenizer_config.json, else by config.json."""
        token = _token(config.get(f"{role}_token"))
        index = full.token_to_id(token) if token else None
        if index is None:
            index = model.get(f"{role}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        return index if isinstance(index, int) else None

    if special[EOS] is None or not add:
        special[EOS] = own("eos") if own("eos") is not None else special[EOS]
    if special[EOS] is None:
        raise TokenizerError(f"{source}: no end-of-sequence token; eos_token in tokenizer_config.json would name it")
    for token, role in ((BOS, "bos"), (PAD, "pad")):
        if special[token] is None:
            index = own(role)
            special[token] = special[EOS] if index is None else index
    missing = [token for token in (USER, ASSISTANT, THINK, END_THINK) if special[token] is None]
    if not add:
        special |= dict.fromkeys(missing, -1)
    elif missing:
        # Added tokens follow the largest id, which must not be past the model's last embedding row.
        used = max(full.get_vocab(with_added_tokens=True).values()) + 1
        rows = model.get("vocab_size", 0)
        if used + len(missing) > rows:
            raise TokenizerError(f"{source} lacks {', '.join(missing)}, and {used} of the model's {rows} embedding rows are "
                                 f"in use; a vocab_size of at least {used + len(missing)} would be right")
        full.add_tokens([_added(token) for token in missing])
        special |= {token: full.token_to_id(token) for token in missing}
    return special
