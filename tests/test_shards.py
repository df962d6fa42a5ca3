"""Shards: every document's ids and eos, the same bytes however they were made, and nothing read that is not what was written."""

import hashlib
import json
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from whole_runs import Command, jevons

from jevons.data import shards as module
from jevons.data.shards import INDEX, Shards, build_shards
from jevons.data.sources import DataError
from jevons.data.tokenizer import FIM_TOKENS, Tokenizer, train_tokenizer
from jevons.recipe import SourceTable

WORDS = ("sun", "moon", "rain", "wind", "sea", "ähre", "tree", "☃", "7", "\n")


def some_text(words):
    return " ".join(random.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 5, 320)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceTable(path=str(path))


def digests(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(directory).iterdir()}


def documents_of(shards):
    starts = [0, *shards.ends_D[:-1]]
    return [shards.tokens(int(a), int(b)).tolist() for a, b in zip(starts, shards.ends_D, strict=True)]


def test_every_document_is_its_ids_and_eos(tmp_path, tokenizer):
    texts = [some_text(random.randint(1, 60)) for _ in range(60)]
    for at in (3, 3, 40, 63):
        texts.insert(at, random.choice(("", " \n\t ")))
    shards = build_shards([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer, tmp_path / "out", shard_tokens=300)
    wanted = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts if text.strip()]
    assert documents_of(shards) == wanted and shards.empty == sum(not t.strip() for t in texts) >= 4
    assert shards.total == sum(map(len, wanted)) and len(list((tmp_path / "out").glob("*.bin"))) > 3
    flat = [i for ids in wanted for i in ids]
    for _ in range(200):  # across shards too
        low = random.randrange(shards.total)
        high = random.randint(low + 1, shards.total)
        assert shards.tokens(low, high).tolist() == flat[low:high]
    shards.verify()
    assert shards.tokens(0, 1).dtype == np.uint16
    tokenizer_there = Tokenizer.load(tmp_path / "out")
    assert tokenizer_there.fingerprint == tokenizer.fingerprint and tokenizer_there.vocab_size == tokenizer.vocab_size


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 2**16 + 1)
    shards = build_shards([write_jsonl(tmp_path / "a.jsonl", ["sun moon"])], tokenizer, tmp_path / "out")
    assert shards.tokens(0, 2).dtype == np.uint32 and documents_of(shards) == [[*tokenizer.encode("sun moon"), tokenizer.eos_id]]


def test_the_same_bytes_whatever_the_workers(tmp_path, tokenizer, monkeypatch):
    sources = [write_jsonl(tmp_path / f"{k}.jsonl", [some_text(random.randint(0, 80)) for _ in range(150)]) for k in range(3)]
    (tmp_path / "d.txt").write_text(some_text(3000))
    sources.append(SourceTable(path=str(tmp_path / "d.txt")))
    made = []
    for workers, batch in ((1, 2**18), (4, 50), (2, 1000)):
        monkeypatch.setattr(module, "BATCH", batch)
        build_shards(sources, tokenizer, tmp_path / f"out{workers}", workers, shard_tokens=2000)
        made.append(digests(tmp_path / f"out{workers}"))
    assert made[0] == made[1] == made[2] and len(made[0]) > 12


class Stop(Exception):
    pass


def test_stopped_anywhere_it_goes_on_behind_the_last_finished_shard(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS", 1)
    monkeypatch.setattr(module, "BATCH", 200)
    sources = [write_jsonl(tmp_path / f"{k}.jsonl", [some_text(random.randint(0, 80)) for _ in range(100)]) for k in range(3)]
    out = tmp_path / "out"
    build_shards(sources, tokenizer, tmp_path / "whole", shard_tokens=1500)
    said = []

    def stop_at(tokens):
        def on_progress(read, total, done):
            said.append(done)
            assert read <= total == sum((tmp_path / f"{k}.jsonl").stat().st_size for k in range(3))
            if done > tokens:
                raise Stop
        return on_progress

    kept, whole, tokens = {}, digests(tmp_path / "whole"), 0
    while True:
        tokens += random.randint(500, 6000)
        try:
            build_shards(sources, tokenizer, out, shard_tokens=1500, on_progress=stop_at(tokens))
            break
        except Stop:
            assert not list(out.glob("shard-*.tmp"))
            now = {p.name: p.stat().st_mtime_ns for p in out.glob("*.bin")}
            assert all(now[name] == stamp for name, stamp in kept.items()), "a finished shard was written again"
            kept = now
            with pytest.raises(DataError, match="out is not complete; run the command that began it again"):
                Shards(out, tokenizer)
    assert digests(out) == whole and len(kept) > 1
    said.clear()
    build_shards(sources, tokenizer, out, shard_tokens=1500, on_progress=stop_at(0))
    assert not said  # whole already


def slow_tokenizer():
    encode = Tokenizer.encode_batch
    Tokenizer.encode_batch = lambda self, texts: (time.sleep(0.03), encode(self, texts))[1]
    module.BATCH, module.PROGRESS = 500, 1


def test_the_command_killed_in_a_shard_ends_with_the_same_bytes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"sun {some_text(random.randint(1, 80))}" for _ in range(240)])
    arguments = ("tokenize", tmp_path / "a.jsonl", "--train-vocab", 320, "--fim", "--workers", 1, "--shard-tokens", 2500, "--out")
    code, text = jevons(*arguments, tmp_path / "whole", log=tmp_path / "log")
    assert code == 0, text
    out = tmp_path / "out"
    for count in (0, 2, 3):
        command = Command(*arguments, out, log=tmp_path / "log", patch=slow_tokenizer)
        assert command.wait_for(lambda count=count: (out / f"shard-{count:05d}.tmp").exists()), command.text
        time.sleep(random.uniform(0, 0.05))
        command.send(signal.SIGKILL)
        assert command.end() == -signal.SIGKILL
    code, text = jevons(*arguments, out, log=tmp_path / "log")
    assert code == 0 and "is whole:" in text and "240 documents, 0 empty" in text.replace("\n", " "), text
    assert digests(out) == digests(tmp_path / "whole")
    assert Tokenizer.load(out).fim_ids is not None
    code, text = jevons(*arguments[:-1], "--out", out, log=tmp_path / "log")  # whole: checked
    assert code == 0, text
    shard = out / "shard-00001.bin"
    data = bytearray(shard.read_bytes())
    data[random.randrange(len(data))] ^= 1
    shard.write_bytes(data)
    code, text = jevons(*arguments, out, log=tmp_path / "log")
    assert code == 1 and f"{shard} is damaged: its SHA-256" in text.replace("\n", " ")
    code, text = jevons("tokenize", tmp_path / "a.jsonl", "--out", out, log=tmp_path / "log")
    assert code == 1 and "exactly one of --tokenizer CHECKPOINT and --train-vocab" in text.replace("\n", " ")
    code, text = jevons(*(a for a in arguments if a != "--fim"), out, log=tmp_path / "log")
    assert code == 1 and "was begun with a tokenizer of 320 ids with fim tokens" in text.replace("\n", " ")


def small_files():
    slow_tokenizer()
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_is_said_and_finished_shards_stay(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"sun {some_text(9)}" for _ in range(90)] + [some_text(70_000)])
    arguments = ("tokenize", tmp_path / "a.jsonl", "--train-vocab", 320, "--shard-tokens", 200, "--out", tmp_path / "out")
    code, text = jevons(*arguments, log=tmp_path / "log", patch=small_files)
    text = " ".join(text.split())
    assert code == 1 and f"error: {tmp_path / 'out'} could not be written: File too large; finished shards stay" in text
    kept = digests(tmp_path / "out")
    assert sum(name.endswith(".bin") for name in kept) > 1 and not any(name.endswith(".tmp") for name in kept)
    code, text = jevons(*arguments, log=tmp_path / "log")
    now = digests(tmp_path / "out")
    assert code == 0 and all(now[name] == kept[name] for name in kept if name != INDEX), text


def test_what_is_refused(tmp_path, tokenizer):
    source, out = write_jsonl(tmp_path / "a.jsonl", [some_text(40) for _ in range(30)]), tmp_path / "out"
    build_shards([source], tokenizer, out, shard_tokens=400)
    other = train_tokenizer(["other words altogether"] * 3, 320)
    for call in (lambda: build_shards([source], other, out, shard_tokens=400), lambda: Shards(out, other)):
        with pytest.raises(DataError, match=rf"out was tokenised by another tokenizer \({tokenizer.fingerprint[:12]}, and this"):
            call()
    with pytest.raises(DataError, match="a.jsonl with separator '', and that of a.jsonl is 'x'"):
        build_shards([source.model_copy(update={"separator": "x"})], tokenizer, out, shard_tokens=400)
    with pytest.raises(DataError, match="1 files into shards of 400 tokens, and these are 1 into 500"):
        build_shards([source], tokenizer, out, shard_tokens=500)
    write_jsonl(tmp_path / "a.jsonl", ["changed"])
    with pytest.raises(DataError, match="was made of a.jsonl with size"):
        build_shards([source], tokenizer, out, shard_tokens=400)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").touch()
    with pytest.raises(DataError, match="foreign holds 'thesis.doc' but no index.json"):
        build_shards([source], tokenizer, tmp_path / "foreign")
    (tmp_path / "e.txt").write_text("  \n \n")
    with pytest.raises(DataError, match="e.txt: no text; all of 1 documents are empty"):
        build_shards([SourceTable(path=str(tmp_path / "e.txt"))], tokenizer, tmp_path / "white")
    write_jsonl(tmp_path / "e.jsonl", ["", "  "])
    with pytest.raises(DataError, match="e.jsonl: no text; all of 2 documents are empty"):
        build_shards([SourceTable(path=str(tmp_path / "e.jsonl"))], tokenizer, tmp_path / "empty")
    (tmp_path / "e.jsonl").write_text("[")
    with pytest.raises(DataError, match="e.jsonl line 1: not JSON"):
        build_shards([SourceTable(path=str(tmp_path / "e.jsonl"))], tokenizer, tmp_path / "begun")
    (tmp_path / "e.txt").write_text("sun\n \n\n")
    assert build_shards([SourceTable(path=str(tmp_path / "e.txt"))], tokenizer, tmp_path / "begun").total > 1, "no shard was lost"
    with pytest.raises(DataError, match="index.json does not exist; `jevons tokenize` makes one"):
        Shards(tmp_path, tokenizer)


def test_a_shard_that_is_not_what_was_written(tmp_path, tokenizer):
    out = tmp_path / "out"
    build_shards([write_jsonl(tmp_path / "a.jsonl", [some_text(40) for _ in range(30)])], tokenizer, out, shard_tokens=400)
    shard = out / "shard-00001.bin"
    good = shard.read_bytes()
    ids = np.frombuffer(good, "<u2").copy()
    at = random.randrange(len(ids))
    ids[at] = 320
    shard.write_bytes(ids.tobytes())
    shards = Shards(out, tokenizer)
    first = json.loads((out / INDEX).read_text())["shards"][0]["tokens"]
    with pytest.raises(DataError, match=rf"shard-00001.bin: token {at} is 320, past the vocabulary of 320; the shard is damaged"):
        shards.tokens(first - 5, first + at + 1)
    if at:
        shards.tokens(first - 5, first + at)
    with pytest.raises(DataError, match=r"shard-00001.bin is damaged: its SHA-256"):
        shards.verify()
    shard.write_bytes(good[:-2])
    with pytest.raises(DataError, match=rf"shard-00001.bin has {len(good) - 2:,} bytes; {len(good):,} bytes would be right"):
        Shards(out, tokenizer)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001.bin does not exist; .* restore it"):
        Shards(out, tokenizer)
    index = out / INDEX
    text = index.read_text()
    index.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match=r"index.json: format 2; this version reads 1"):
        Shards(out, tokenizer)
    index.write_text(text[:100])
    with pytest.raises(DataError, match=r"index.json is no index of shards"):
        Shards(out, tokenizer)


def test_two_builders_of_one_directory_wait_for_each_other(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [some_text(40) for _ in range(30)])
    waited = []

    def during(read, total, tokens):
        """Called by the first, in the middle of its work: a second one must wait, and may give up."""
        def give_up(read, total, tokens):
            waited.append(read)
            raise Stop

        with pytest.raises(Stop):
            build_shards([source], tokenizer, tmp_path / "out", on_progress=give_up)

    build_shards([source], tokenizer, tmp_path / "out", on_progress=during)
    assert waited


def test_fim_tokens_are_deepseek_s_and_never_come_from_text():
    plain, fim = (train_tokenizer(["sun moon"] * 3, 320, fim=f) for f in (False, True))
    assert plain.fim_ids is None and [fim.decode([i]) for i in fim.fim_ids] == list(FIM_TOKENS)
    assert FIM_TOKENS == ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    assert not set(fim.encode("".join(FIM_TOKENS))) & set(fim.fim_ids)
    assert plain.fingerprint != fim.fingerprint == train_tokenizer(["sun moon"] * 3, 320, fim=True).fingerprint
