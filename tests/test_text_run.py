"""Recipes that pretrain on text: whole runs, killed while they tokenise and while they train, and what they leave served."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from fake_engine import Live
from whole_runs import Command, digest, jevons, last_step, metrics, timeless

from jevons.data import shards
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.store.checkpoint import load_checkpoint, read_provenance

ROOT = Path(__file__).resolve().parent.parent
SHARED = [Path(p) for p in (os.environ.get("JEVONS_SHARED", ""), ROOT / "shared", ROOT.parent / "shared") if p]
RECIPE = """
name = "text"
seed = 3
[model]
preset = "v3-nano"
[data]
sources = [{ path = "a.txt", separator = "\\n\\n", weight = 0.75 }, { path = "b.jsonl", key = ["q", "a"], weight = 0.25 }]
seq_len = 32
fim_rate = 0.2
mask = "document"
validation = 0.1
validate_every = 4
validation_tokens = 256
shard_tokens = 600
workers = 1
[tokenizer]
vocab_size = 288
[[stages]]
kind = "pretrain"
tokens = 2_560
batch_tokens = 256
micro_batch_tokens = 128
save_every = 2
"""


def shared(name):
    found = next((p / "data" / name for p in SHARED if (p / "data" / name).exists()), None)
    return found or pytest.skip(f"no data/{name} in JEVONS_SHARED or a folder `shared` in or beside the repository")


def write(home, text=RECIPE):
    rng, words = random.Random(1), ["sun", "moon", "rain", "wind", "sea", "hill"]
    some = lambda n: " ".join(rng.choices(words, k=n))  # noqa: E731
    (home / "a.txt").write_text("\n\n".join(some(rng.randint(3, 60)) for _ in range(90)))
    (home / "b.jsonl").write_text("".join(json.dumps({"q": some(9), "a": some(4)}) + "\n" for _ in range(90)))
    (home / "text.toml").write_text(text)
    return home / "text.toml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("text")
    recipe = write(home)
    code, text = jevons("run", recipe, "--out", home / "out", log=home / "log")
    assert code == 0, text
    return recipe, home / "out"


def test_a_text_recipe_runs_to_its_end(whole):
    _, out = whole
    lines = metrics(out)
    assert [x["kind"] for x in lines if x["kind"] != "step"] == ["run", "stage", "plan", "memory", "stage", "done"]
    steps = [x for x in lines if x["kind"] == "step"]
    assert [x["step"] for x in steps if "val_loss" in x] == [4, 8, 10] and lines[0]["task"] is None
    assert all(0 < x["val_bits_per_byte"] < x["val_loss"] and x["val_mtp_loss"] > 0 for x in steps if "val_loss" in x)
    assert steps[-1]["loss"] < steps[0]["loss"] and 2000 < steps[-1]["tokens"] <= 2560
    provenance = read_provenance(out / "final")
    assert provenance["val_loss"] == steps[-1]["val_loss"] and provenance["task"] is None
    assert "val_loss" not in (out / "report.html").read_text() and "validation" in (out / "report.html").read_text()


def test_what_it_leaves_is_served(whole):
    loaded = load_checkpoint(whole[1] / "final")
    with Live(owned=True, settings={}) as live:
        live.tokenizer, live.model = loaded.tokenizer, loaded.model
        live.real = Engine(loaded.model, loaded.tokenizer.eos_id, max_batch=2, max_len=128, tokenizer=loaded.tokenizer)
        live.host.set_engine(live.real, "text")
        answer = live.ask("sun moon", max_tokens=12, temperature=0).json()
    assert answer["usage"]["completion_tokens"] >= 1 and answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert Tokenizer.load(whole[1] / "final").fim_ids is not None


def slowly():
    """Tokenising and training last long enough to be killed in."""
    from jevons.train.pretrain import Pretrain

    encode, update = Tokenizer.encode_batch, Pretrain.after_update
    Tokenizer.encode_batch = lambda self, texts: (time.sleep(0.05), encode(self, texts))[1]
    Pretrain.after_update = lambda self, load: (time.sleep(0.02), update(self, load))[1]
    shards.BATCH, shards.PROGRESS = 400, 1


def test_killed_in_a_shard_and_in_training_it_ends_with_the_same_numbers(tmp_path, whole):
    recipe, reference = whole
    out = tmp_path / "out"
    data = out / "data"
    moments = [(data / "source-00" / "shard-00001.tmp").exists, (data / "source-01" / "shard-00000.tmp").exists,
               lambda: last_step(out, "pretrain") >= 3, lambda: last_step(out, "pretrain") >= 7]
    for number, moment in enumerate(moments):
        command = Command("run", recipe, "--out", out, log=tmp_path / "log", patch=slowly)
        assert command.wait_for(moment), command.text
        time.sleep(random.uniform(0, 0.03))
        command.send(signal.SIGKILL)
        assert command.end() == -signal.SIGKILL, number
        if number == 0:
            kept = (data / "source-00" / "shard-00000.bin").stat().st_mtime_ns
    code, text = jevons("run", recipe, "--out", out, log=tmp_path / "log")
    assert code == 0, text
    assert timeless(metrics(out)) == timeless(metrics(reference))
    assert digest(out / "final/model.safetensors") == digest(reference / "final/model.safetensors")
    assert (data / "source-00" / "shard-00000.bin").stat().st_mtime_ns == kept
    names = [p.relative_to(data) for p in data.rglob("shard-*")]
    assert len(names) > 8 and all(digest(data / n) == digest(reference / "data" / n) for n in names)


def test_stopped_while_it_tokenises_it_says_so(tmp_path, whole):
    out = tmp_path / "out"
    command = Command("run", whole[0], "--out", out, log=tmp_path / "log", patch=slowly)
    assert command.wait_for((out / "data" / "source-00" / "shard-00000.tmp").exists), command.text
    command.send(signal.SIGINT)
    assert command.end() == 130 and "The same command goes on from there" in command.text.replace("\n", " ")


@pytest.mark.parametrize("old,new,message", [
    ('path = "a.txt"', 'path = "no.txt"', "`data.sources.0.path`: no.txt does not exist; a file"),
    ("batch_tokens = 256\nmicro", "batch_tokens = 250\nmicro", "batch_tokens is 250, no multiple of data.seq_len 32; 256 would "
     "be right"),
    ("micro_batch_tokens = 128", "micro_batch_tokens = 100", "micro_batch_tokens is 100, no multiple of data.seq_len 32"),
    ("seq_len = 32", "seq_len = 512", "batch_tokens is 256, no multiple of data.seq_len 512; 512 would be right"),
    ('preset = "v3-nano"', 'preset = "v3-nano"\nset = { max_position_embeddings = 16 }', "data.seq_len 32 does not fit the "
     "context of 16; set max_position_embeddings"),
])
def test_what_is_refused(tmp_path, old, new, message):
    recipe = write(tmp_path, RECIPE.replace(old, new, 1))
    code, text = jevons("run", recipe, "--out", tmp_path / "out", log=tmp_path / "log")
    assert code == 1 and message in text.replace("\n", " ") and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_the_shipped_recipe_on_a_file_of_one_s_own(tmp_path):
    """With --set, which the run's recipe keeps: it goes on without them from its own text, and refuses others."""
    path = shared("tinyshakespeare/input.txt")
    small = {"data.sources.0.path": path, "model.preset": "v3-nano", "stages.0.tokens": 8192, "data.seq_len": 64,
             "data.validation_tokens": 512, "stages.0.batch_tokens": 2048, "tokenizer.vocab_size": 512}
    sets = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    out = tmp_path / "out"
    code, text = jevons("run", "text-laptop", *sets, "--out", out, log=tmp_path / "log")
    assert code == 0, text
    steps = [x for x in metrics(out) if x["kind"] == "step"]
    assert len(steps) == 4 and 3 < steps[-1]["val_loss"] < 6.3 and 1 < steps[-1]["val_bits_per_byte"] < 5
    before = (out / "metrics.jsonl").read_bytes()
    code, text = jevons("run", out / "recipe.toml", "--out", out, log=tmp_path / "log")
    assert code == 0 and (out / "metrics.jsonl").read_bytes() == before, text
    code, text = jevons("run", "text-laptop", *sets, "--set", "seed=9", "--out", out, log=tmp_path / "log")
    assert code == 1 and '+"seed" = 9' in text
