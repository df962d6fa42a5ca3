"""Recipes as a whole: stages in order or one by one, foreign models, one's own task, and what is refused before it begins."""

import json
import os
from pathlib import Path

import pytest
import torch
from whole_runs import RECIPE, metrics, timeless, write_recipe

from jevons.plan import dollars
from jevons.reason.pipeline import Run
from jevons.recipe import load_recipe
from jevons.runtime import Runtime
from jevons.store.checkpoint import load_checkpoint, read_provenance

CPU = Runtime("cpu", "float32", 1, False, "test", (), 1.0)
SMALL = RECIPE.replace("tokens = 4_500", "tokens = 2_000").replace("steps = 5", "steps = 2")
FROM_DIRECTORY = """
name = "foreign"
[model]
from = "base"
[task]
name = "own_tasks.py:Even"
[[stages]]
kind = "grpo"
steps = 2
problems = 3
group_size = 4
max_tokens = 8
mask_truncated = false
[[stages]]
kind = "eval"
n = 5
max_tokens = 8
"""


class Quiet:
    """An observer that remembers."""

    def __init__(self):
        self.models, self.stages, self.steps = [], [], []

    def on_model(self, model, tokenizer, name):
        self.models.append(name)

    def on_stage(self, name, done, budget):
        self.stages.append((name, done, budget))

    def on_step(self, record, budget):
        self.steps.append((record["stage"], record["step"], budget))

    def should_stop(self):
        return False


def run(recipe: Path, out: Path, stage: str | None = None) -> Quiet:
    loaded, text = load_recipe(str(recipe))
    observer = Quiet()
    Run(loaded, text, out, observer, CPU).execute(stage)
    return observer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(recipe, run directory, observer) of a small recipe from scratch."""
    home = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(home, SMALL)
    return recipe, home / "out", run(recipe, home / "out")


def test_the_observer_hears_of_every_stage(whole):
    _, _, observer = whole
    assert observer.models == ["nano-pretrain", "nano-grpo", "nano-eval"]
    assert observer.stages == [("pretrain", 0, 4), ("grpo", 0, 2), ("eval", 0, 2)]
    assert observer.steps == [("pretrain", i, 4) for i in (1, 2, 3, 4)] + [(s, i, 2) for s in ("grpo", "eval") for i in (1, 2)]


def test_the_log_has_the_documented_lines(whole):
    _, out, _ = whole
    lines = metrics(out)
    first, last = lines[0], lines[-1]
    assert first["kind"] == "run" and (first["recipe"], first["dollars_per_hour"]) == ("nano", 7.2)
    assert first["stages"] == [{"name": "pretrain", "kind": "pretrain", "unit": "steps", "budget": 4},
                               {"name": "grpo", "kind": "grpo", "unit": "steps", "budget": 2},
                               {"name": "eval", "kind": "eval", "unit": "problems", "budget": 6}]
    model = load_checkpoint(out / "final").model
    assert first["parameters"] == sum(p.numel() for p in model.parameters()) > first["active_parameters"]
    events = [(x["stage"], x["event"]) for x in lines if x["kind"] == "stage"]
    assert events == [(s, e) for s in ("pretrain", "grpo", "eval") for e in ("start", "end")]
    assert {x["name"]: x["checkpoint"] for x in lines if x["kind"] == "eval"} == {
        "pretrain": "stages/00-pretrain", "grpo": "stages/01-grpo"}
    for line in lines:
        if line["kind"] == "step":
            shares = torch.tensor(line["expert_load"]) if "expert_load" in line else torch.full((2, 8), 1 / 8)
            assert shares.shape == (2, 8) and torch.allclose(shares.sum(-1), torch.ones(2), atol=1e-3), "MTP's router is last"
    pretrain = [x for x in lines if x["kind"] == "step" and x["stage"] == "pretrain"]
    assert all({"loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "skipped", "max_violation"} <= set(x) for x in pretrain)
    grpo = [x for x in lines if x["kind"] == "step" and x["stage"] == "grpo"]
    assert all({"reward", "reward_parts", "accuracy", "zero_spread", "length", "length_right", "length_wrong",
                "thinking_length", "truncated"} <= set(x) for x in grpo)
    assert last["kind"] == "done" and (out / "report.html").stat().st_size > 1000


def test_money_follows_the_rate(whole):
    _, out, _ = whole
    lines = metrics(out)
    priced = [x for x in lines if "time.dollars" in x]
    assert {x["kind"] for x in priced} == {"step", "eval", "done"}
    for line in priced:
        assert line["time.dollars"] == pytest.approx(dollars(line["time.seconds"], 7.2), abs=2e-6), "to a millisecond"
    ends = {x["stage"]: x["time.seconds"] for x in lines if x["kind"] == "step"}
    total = sum(ends.values()) + sum(x["time.seconds"] for x in lines if x["kind"] == "eval")
    assert lines[-1]["time.seconds"] == pytest.approx(total)
    provenance = read_provenance(out / "stages/01-grpo")
    assert provenance["time.dollars"] == pytest.approx(dollars(ends["grpo"], 7.2), abs=2e-6)


def test_the_final_checkpoint_says_where_it_comes_from(whole):
    recipe, out, _ = whole
    provenance = read_provenance(out / "final")
    assert provenance["recipe_text"] == SMALL == (out / "recipe.toml").read_text() and provenance["stage"] == "grpo"
    assert provenance["task"]["name"] == f"{recipe.parent.resolve()}/own_tasks.py:Traced", "found from everywhere"
    assert timeless(provenance["scores"]) == timeless([x for x in metrics(out) if x["kind"] == "eval"])
    assert (out / "final/model.safetensors").read_bytes() == (out / "stages/01-grpo/model.safetensors").read_bytes()


def test_tensorboard_holds_each_step_once(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, out, _ = whole
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for stage, key, steps in (("pretrain", "loss", 4), ("grpo", "accuracy", 2)):
        logged = [x[key] for x in metrics(out) if x["kind"] == "step" and x["stage"] == stage]
        scalars = events.Scalars(f"{stage}/{key}")
        assert [s.step for s in scalars] == list(range(1, steps + 1))
        assert [s.value for s in scalars] == pytest.approx(logged)


def test_a_finished_run_is_not_begun_again(whole):
    recipe, out, _ = whole
    before = (out / "metrics.jsonl").read_bytes(), (out / "final/model.safetensors").stat().st_mtime_ns
    observer = run(recipe, out)
    assert observer.stages == [] and observer.models == []
    assert ((out / "metrics.jsonl").read_bytes(), (out / "final/model.safetensors").stat().st_mtime_ns) == before


def test_stages_one_by_one_are_the_whole(whole, tmp_path):
    recipe, reference, _ = whole
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="'rl' is not one of pretrain, grpo, eval"):
        run(recipe, out, "rl")
    assert not out.exists()
    for early, before in (("grpo", "pretrain"), ("eval", "grpo")):
        with pytest.raises(ValueError, match=f"run stage {before} first"):
            run(recipe, out, early)
    for stage in ("pretrain", "grpo", "eval"):
        assert [s for s, _, _ in run(recipe, out, stage).stages] == [stage]
        assert not (out / "final").exists()
    run(recipe, out)
    assert timeless(metrics(out)) == timeless(metrics(reference))
    assert (out / "final/model.safetensors").read_bytes() == (reference / "final/model.safetensors").read_bytes()


# -- from a directory -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A tiny random Qwen2 as somebody else would have saved it, with a tokenizer of ours beside it."""
    import random

    import transformers
    from own_tasks import Traced

    from jevons.data.tokenizer import train_tokenizer

    home = tmp_path_factory.mktemp("foreign")
    rng, task = random.Random(1), Traced()
    tokenizer = train_tokenizer([t for p in (task.sample(rng) for _ in range(40)) for t in (p.prompt, task.trace(p, rng))], 288)
    torch.manual_seed(random.SystemRandom().randrange(1000))
    config = transformers.Qwen2Config(vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768,
                                      bos_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    transformers.Qwen2ForCausalLM(config).save_pretrained(home / "base")
    tokenizer.save(home / "base")
    return home


def test_learning_from_a_directory_of_another_architecture(foreign):
    import transformers

    recipe, out = write_recipe(foreign, FROM_DIRECTORY), foreign / "out"
    run(recipe, out)
    evals = [x for x in metrics(out) if x["kind"] == "eval"]
    assert [x["name"] for x in evals] == ["base", "grpo"], "before and after"
    assert all("mtp_acceptance" not in x for x in evals)
    assert any("loss" in x for x in metrics(out) if x["kind"] == "step")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out / "final", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_checkpoint(out / "final").model
    base = load_checkpoint(foreign / "base").model
    assert any(not torch.equal(p, q) for p, q in zip(ours.parameters(), base.parameters(), strict=True)), "it has learned"
    ids = torch.randint(7, 288, (40,))
    with torch.no_grad():
        plain = ours.logits(ours.forward_train(ids, torch.arange(40), [(1, 40)]).hidden_ND)
        assert torch.allclose(theirs(ids[None]).logits[0], plain, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out / "final")("sun moon")["input_ids"]


def test_a_directory_can_be_only_evaluated(foreign, tmp_path):
    text = FROM_DIRECTORY.replace('from = "base"', f'from = "{foreign / "base"}"')
    recipe = write_recipe(tmp_path, text[: text.index("[[stages]]")] + '[[stages]]\nkind = "eval"\nn = 4\nmax_tokens = 6\n')
    observer = run(recipe, tmp_path / "out")
    assert observer.stages == [("eval", 0, 1)]
    (line,) = [x for x in metrics(tmp_path / "out") if x["kind"] == "eval"]
    assert line["name"] == "base" and line["n"] == 4
    assert (tmp_path / "out/final/model.safetensors").exists()


def test_prompts_longer_than_usual_find_room(foreign, tmp_path):
    text = FROM_DIRECTORY.replace('from = "base"', f'from = "{foreign / "base"}"').replace(":Even", ":LongPrompts")
    run(write_recipe(tmp_path, text), tmp_path / "out", "grpo")
    lengths = [x["length"] for x in metrics(tmp_path / "out") if x["kind"] == "step"]
    assert len(lengths) == 2 and all(0 < n <= 8 for n in lengths)


def test_a_longer_context_than_the_checkpoints(foreign, tmp_path):
    longest = load_checkpoint(foreign / "base").config.max_position_embeddings
    base = f'from = "{foreign / "base"}"'
    text = FROM_DIRECTORY.replace('from = "base"', f"{base}\nset = {{ max_position_embeddings = {2 * longest} }}")
    run(write_recipe(tmp_path, text), tmp_path / "out")
    assert load_checkpoint(tmp_path / "out/final").config.max_position_embeddings == 2 * longest


# -- what is refused before anything is written -----------------------------------------------------------------------


@pytest.mark.parametrize("change,message", [
    ((":Traced", ":Even"), "stage pretrain pretrains on worked solutions.*has no method `trace`"),
    ((":Traced", ":Nobody"), "has no class Nobody; it has Even, Traced, LongPrompts"),
    (("own_tasks.py:Traced", "countdwn"), "did you mean 'countdown'"),
    (('preset = "v3-nano"', 'preset = "v4"'), "preset 'v4' is not one of"),
    (('preset = "v3-nano"', 'preset = "v3-nano"\nset = { vocab_size = 64 }'), "vocab_size 64 is less than"),
    (('preset = "v3-nano"', 'preset = "v3-nano"\nset = { heads = 3 }'), "heads"),
    (('preset = "v3-nano"', 'preset = "v3-nano"\nset = { num_experts_per_tok = 9 }'), "num_experts_per_tok 9 must lie in"),
    (("vocab_size = 288", "vocab_size = 300"), "multiple of 32"),
    (('name = "nano"', 'name = "../nano"'), "name"),
    (("[cost]", "[task.args]\nlevel = 3\n[cost]"), "level"),
], ids=lambda value: value[1] if isinstance(value, tuple) else "")
def test_a_bad_recipe_leaves_nothing_behind(tmp_path, change, message):
    assert change[0] in RECIPE
    recipe = write_recipe(tmp_path, RECIPE.replace(*change))
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_directory_to_start_from_is_named(tmp_path):
    recipe = write_recipe(tmp_path, FROM_DIRECTORY)
    with pytest.raises(ValueError, match="base/config.json does not exist"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_are_taken_from_here_before_beside_the_recipe(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    recipe = write_recipe(home, FROM_DIRECTORY)
    (home / "base").mkdir()
    monkeypatch.chdir(here)
    loaded, _ = load_recipe(os.path.relpath(recipe))
    assert (loaded.model.from_dir, loaded.task.name) == ("../home/base", "../home/own_tasks.py:Even")
    (here / "base").mkdir()
    (here / "own_tasks.py").write_text("")
    loaded, text = load_recipe(str(recipe))
    assert (loaded.model.from_dir, loaded.task.name) == ("base", "own_tasks.py:Even") and text == FROM_DIRECTORY
    (here / "own_tasks.py").unlink()
    with pytest.raises(ValueError, match="nowhere"):
        run(write_recipe(home, FROM_DIRECTORY.replace('"base"', '"nowhere"')), tmp_path / "out")


def test_a_recipe_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "x.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(ValueError, match="x.toml is not UTF-8"):
        load_recipe(str(tmp_path / "x.toml"))


def test_results_of_an_evaluation_are_kept(whole):
    _, out, _ = whole
    assert json.loads((out / "stages/02-eval/results.json").read_text()) == [x for x in metrics(out) if x["kind"] == "eval"]
