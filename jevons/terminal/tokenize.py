"""`jevons tokenize`: shards of text, with a progress bar; run again on whole ones, it checks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


def tokenize_sources(paths: list[str], out: Path, checkpoint: Path | None, train_vocab: int | None, fim: bool,
                     options: dict[str, Any], workers: int | None, shard_tokens: int) -> None:
    from pydantic import ValidationError

    from jevons.data.prepare import sample_texts
    from jevons.data.shards import INDEX, build_shards
    from jevons.data.tokenizer import Tokenizer, train_tokenizer
    from jevons.recipe import SourceTable, TokenizerTable

    if (checkpoint is None) == (train_vocab is None):
        raise ValueError("give exactly one of --tokenizer CHECKPOINT and --train-vocab IDS")
    if fim and checkpoint:
        raise ValueError("--fim goes with --train-vocab; a checkpoint's tokenizer has the fim tokens or has them not")
    try:
        sources = [SourceTable(path=path, **options) for path in paths]
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--{first['loc'][0]} {first['input']!r}: {first['msg']}") from None
    whole = (out / INDEX).is_file()
    if checkpoint is not None:
        tokenizer = Tokenizer.load(checkpoint)
    elif whole:  # begun before: the one that was trained then
        tokenizer = Tokenizer.load(out)
        if (tokenizer.vocab_size, tokenizer.fim_ids is not None) != (train_vocab, fim):
            tokens = "with" if tokenizer.fim_ids else "without"
            raise ValueError(f"{out} was begun with a tokenizer of {tokenizer.vocab_size} ids {tokens} fim tokens; say the "
                             "same, or give another --out")
    else:
        tokenizer = train_tokenizer(sample_texts(sources, TokenizerTable().samples, out / "download"), train_vocab, fim)
    bar = Progress(TextColumn("tokenize"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TextColumn("left"),
                   TimeRemainingColumn(), TextColumn("[dim]{task.fields[tokens]:,} tokens"), console=Console(stderr=True),
                   refresh_per_second=4)
    with bar:
        task = bar.add_task("", total=None, tokens=0)
        shards = build_shards(sources, tokenizer, out, workers, shard_tokens, lambda read, total, tokens: bar.update(
            task, completed=read, total=total, tokens=tokens))
        shards.verify()
    print(f"{out} is whole: {shards.total:,} tokens, {len(shards.ends_D):,} documents, {shards.empty:,} empty ones left out")
