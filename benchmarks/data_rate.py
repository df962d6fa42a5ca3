"""How fast text becomes shards, and shards batches: CPU seconds of this process, so that a busy machine changes little.

    python benchmarks/data_rate.py TEXT_FILE [--vocab 8192] [--repeat 5] [--quick]

One table: tokenisation in MB of text per CPU second (one worker; CPU time does not shrink with more of them, wall time does:
both are shown), and reading in millions of tokens per CPU second, for rows of 256 and 4096 tokens, with masks and FIM.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from jevons.data.packing import pack
from jevons.data.prepare import open_data
from jevons.data.shards import build_shards
from jevons.data.tokenizer import train_tokenizer
from jevons.recipe import DataTable, SourceTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="once, and a twentieth of the reading")
    args = parser.parse_args()
    repeat, tokens = (1, 50_000) if args.quick else (args.repeat, 1_000_000)
    text = args.text.read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text[: 2**22]], args.vocab, fim=True)
    source, megabytes = SourceTable(path=str(args.text), separator="\n\n"), args.text.stat().st_size / 1e6
    with tempfile.TemporaryDirectory() as home:
        print(f"{'tokenise':<34}{'MB/s of CPU':>12}{'MB/s of wall':>14}")
        for workers in (1, 2, 4):
            cpu, wall = [], []
            for number in range(repeat):
                began, used = time.perf_counter(), time.process_time()
                shards = build_shards([source], tokenizer, Path(home) / f"{workers}-{number}", workers)
                cpu.append(megabytes / (time.process_time() - used))
                wall.append(megabytes / (time.perf_counter() - began))
            print(f"{workers} workers, {shards.total / megabytes / 1e3:.0f}k tokens/MB"
                  f"{statistics.median(cpu):>24.2f}{statistics.median(wall):>14.2f}")
        print(f"\n{'read':<34}{'M tokens/s':>12}{'with packing':>14}")
        for seq_len in (256, 4096):
            for mask, fim_rate in (("none", 0.0), ("document", 0.0), ("none", 0.1), ("document", 0.1)):
                table = DataTable(sources=[source], seq_len=seq_len, mask=mask, fim_rate=fim_rate)
                rows = max(1, 16_384 // seq_len)
                stream, _ = open_data(table, tokenizer, Path(home) / "data", 0)
                rates = [[], []]
                for _ in range(repeat):
                    for packed in (False, True):
                        used = time.process_time()
                        for step in range(max(1, tokens // (rows * seq_len))):
                            sequences = stream.sequences(step * rows, rows)
                            if packed:
                                pack([document for sequence in sequences for document in sequence], tokenizer.pad_id, 16)
                        rates[packed].append(max(1, tokens // (rows * seq_len)) * rows * seq_len
                                             / (time.process_time() - used) / 1e6)
                print(f"{f'rows of {seq_len}, mask {mask}, fim {fim_rate}':<34}{statistics.median(rates[0]):>12.2f}"
                      f"{statistics.median(rates[1]):>14.2f}")


if __name__ == "__main__":
    main()
