"""A recipe's `[data]` as streams: the tokenizer trained on its sources, the shards made or found, training and validation."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from jevons.data.packing import Document
from jevons.data.shards import INDEX, Shards, build_shards
from jevons.data.sources import HUB, DataError, find_files
from jevons.data.stream import Part, Stream, key_of
from jevons.data.tokenizer import Tokenizer, train_tokenizer
from jevons.recipe import DataTable, PretrainStage, SourceTable

TRAIN_CHARACTERS = 2**26  # of all sources together, at most, train a tokenizer
OnProgress = Callable[[str, int, int, int], None]  # which source, bytes read, of how many, tokens so far


def check_rows(stage: PretrainStage, table: DataTable, where: str, context: int) -> None:
    """Raises ValueError for rows longer than the model's context, and for batches that are not whole rows."""
    if table.seq_len > context:
        raise ValueError(f"data.seq_len {table.seq_len} does not fit the context of {context}; set max_position_embeddings in "
                         "the recipe's [model] set, or make the rows shorter")
    for key in ("batch_tokens", "micro_batch_tokens"):
        value = getattr(stage, key)
        if isinstance(value, int) and value % table.seq_len:  # a ramp's steps are cut into whole rows
            raise ValueError(f"{where}: {key} is {value}, no multiple of data.seq_len {table.seq_len}; "
                             f"{max(1, round(value / table.seq_len)) * table.seq_len} would be right")


def check_sources(table: DataTable) -> None:
    """Raises DataError naming the key of a source that does not exist here; what lies on a hub is asked for later."""
    for key, sources in (("sources", table.sources), ("validation", table.validation)):
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            try:
                if not source.path.startswith(HUB) and not is_shards(source):
                    find_files(source)
            except DataError as error:
                path = f"data.{key}.{number}.path"
                raise DataError(f"`{path}`: {error}; --set {path}=FILE names another") from None


def is_shards(source: SourceTable) -> bool:
    return (Path(source.path) / INDEX).is_file()


def sample_texts(sources: list[SourceTable], samples: int, scratch: Path) -> Iterator[str]:
    """The first texts of every source, the same number of each."""
    for source in sources:
        room, left = TRAIN_CHARACTERS // len(sources), -(-samples // len(sources))
        pieces = itertools.chain.from_iterable(file.pieces(scratch) for file in find_files(source))
        for piece in itertools.islice(pieces, left):
            yield piece.text[:room]
            room -= len(piece.text)
            if room <= 0:
                break


def tokenizer_for(table: DataTable, vocab_size: int, samples: int, directory: Path) -> Tokenizer:
    """The one that shards among the sources were made with, or one trained on the sources and kept in `directory`."""
    made = next((Path(source.path) for source in table.sources if is_shards(source)), None)
    kept = made or directory / "tokenizer"
    if not kept.exists():
        unfinished = kept.with_name("tokenizer.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        texts = sample_texts(table.sources, samples, directory / "download")
        train_tokenizer(texts, vocab_size, table.fim_rate > 0).save(unfinished)
        os.replace(unfinished, kept)
    tokenizer = Tokenizer.load(kept)
    if tokenizer.vocab_size != vocab_size:
        raise DataError(f"{kept}: its tokenizer has {tokenizer.vocab_size} ids, and the recipe's [tokenizer] vocab_size is "
                        f"{vocab_size}; set the one to the other, or give another `shards` directory")
    return tokenizer


def open_data(table: DataTable, tokenizer: Tokenizer, directory: Path, seed: int,
              on_progress: OnProgress = lambda name, read, total, tokens: None) -> tuple[Stream, list[Document]]:
    """The training stream, and the validation documents (none where the share is 0).

    Sources that are not shards yet are tokenised below `directory`. Raises DataError.
    """
    if table.fim_rate and tokenizer.fim_ids is None:
        raise DataError(f"data.fim_rate is {table.fim_rate}, but the tokenizer has no fim tokens; 0 would be right")

    def shards_of(source: SourceTable, name: str) -> Shards:
        if is_shards(source):
            return Shards(source.path, tokenizer)
        return build_shards([source], tokenizer, directory / name, table.workers, table.shard_tokens,
                            lambda *numbers: on_progress(name, *numbers))

    own = isinstance(table.validation, list)
    share, parts, held_out = 0.0 if own else table.validation, [], []
    for number, source in enumerate(table.sources):
        shards = shards_of(source, f"source-{number:02d}")
        cut = shards.total - int(shards.total * share)
        if cut < table.seq_len:
            raise DataError(f"{source.path}: {cut} tokens to train on are less than one row of data.seq_len {table.seq_len}")
        parts.append(Part(shards, 0, cut, table.seq_len, key_of(seed, "fim", number), table.fim_rate, tokenizer.fim_ids,
                          tokenizer.eos_id))
        if cut < shards.total:
            held_out.append(Part(shards, cut, shards.total, table.seq_len))
    for number, source in enumerate(table.validation if own else []):
        shards = shards_of(source, f"validation-{number:02d}")
        held_out.append(Part(shards, 0, shards.total, table.seq_len))
    weights = [source.weight for source in table.sources] if table.sources[0].weight else None
    most = -(-table.validation_tokens // (table.seq_len * max(1, len(held_out))))
    documents = [document for part in held_out for window in range(min(most, part.windows))
                 for document in part.read(window, 0, table.mask == "document")]
    return Stream(parts, weights, seed, table.mask == "document"), documents
