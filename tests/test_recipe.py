"""Recipes: every mistake is named, with the file, the key and what would be right."""

import random
import re
import tomllib

import pytest

from jevons.recipe import RECIPE_DIR, RecipeError, find_recipe, load_recipe, parse_recipe

GOOD = """
name = "x"
[model]
preset = "v3-tiny"
set = { hidden_size = 64 }
[task]
name = "countdown"
args = { numbers = 3 }
[tokenizer]
vocab_size = 512
[[stages]]
kind = "pretrain"
tokens = 1_000
[stages.optimizer]
lr = 1e-3
[[stages]]
kind = "grpo"
steps = 2
[[stages]]
kind = "eval"
n = 10
"""


@pytest.mark.parametrize("path", sorted(RECIPE_DIR.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_good(path):
    recipe, text = load_recipe(path.stem)
    assert recipe.name == path.stem and recipe.description and text == path.read_text(encoding="utf-8")
    assert load_recipe(str(path))[0] == recipe


def test_values_arrive():
    recipe = parse_recipe(GOOD)
    assert recipe.model.set == {"hidden_size": 64} and recipe.task.args == {"numbers": 3}
    assert [recipe.stage_name(i) for i in range(3)] == ["pretrain", "grpo", "eval"]
    assert recipe.stages[0].optimizer.lr == 1e-3 and recipe.stages[0].optimizer.matrices == "muon"
    assert recipe.stages[1].optimizer.matrices == "adamw"


@pytest.mark.parametrize("old,new,key,near", [
    ("name = \"x\"", "name = \"x\"\nsede = 1", "sede", "seed"),
    ("preset =", "presett =", "model.presett", "model.preset"),
    ("vocab_size", "vocabsize", "tokenizer.vocabsize", "tokenizer.vocab_size"),
    ("tokens =", "token =", "stages[0].token", "stages[0].tokens"),
    ("steps =", "step =", "stages[1].step", "stages[1].steps"),
    ("lr =", "Lr =", "stages[0].optimizer.Lr", "stages[0].optimizer.lr"),
    ("n = 10", "m = 10", "stages[2].m", "stages[2]."),
])
def test_unknown_keys_name_the_nearest(old, new, key, near):
    with pytest.raises(RecipeError) as error:
        parse_recipe(GOOD.replace(old, new, 1), "my.toml")
    assert str(error.value).startswith(f"my.toml: unknown key `{key}`") and f"nearest known key is `{near}" in str(error.value)


def test_any_misspelt_key_is_refused():
    lines = GOOD.splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\w+ = ", line)]
    index = random.choice(keys)
    key, rest = lines[index].split(" = ", 1)
    lines[index] = f"{key}_{random.randrange(1000)} = {rest}"
    with pytest.raises(RecipeError):
        parse_recipe("\n".join(lines))


@pytest.mark.parametrize("old,new,message", [
    ("tokens = 1_000", "tokens = 0", r"stages\.0\.tokens. = 0.*greater than 0"),
    ("tokens = 1_000", "tokens = 'many'", r"tokens. = 'many'"),
    ("tokens = 1_000", "", r"stages\.0\.tokens"),
    ("vocab_size = 512", "vocab_size = 100", r"tokenizer\.vocab_size. = 100.*288"),
    ('kind = "grpo"', 'kind = "ppo"', r"stages\[1\]\.kind is 'ppo'.*eval.*grpo.*pretrain"),
    ('kind = "grpo"', "", r"stages\[1\]\.kind is None"),
    ('kind = "pretrain"\ntokens = 1_000\n[stages.optimizer]\nlr = 1e-3', 'name = "a"\nkind = "eval"', "begins with a pretrain"),
    ('kind = "eval"\nn = 10', 'kind = "grpo"\nsteps = 1', "^my.toml: stage names .*not distinct"),
    ('preset = "v3-tiny"', "", "exactly one of"),
    ('preset = "v3-tiny"', 'preset = "v3-tiny"\nfrom = "dir"', "exactly one of"),
    ("lr = 1e-3", "lr = -1", r"optimizer\.lr. = -1"),
    ("lr = 1e-3", "lr = inf", r"optimizer\.lr. = inf.*finite"),
    ("tokens = 1_000", "tokens = 1_000\nmtp_weight = inf", r"mtp_weight. = inf.*finite"),
    ("[model]", f"seed = {2**70}\n[model]", r"`seed` = \d+.*less than"),
    ("lr = 1e-3", 'matrices = "sgd"', "matrices"),
    ("[model]", "[model", "is not TOML"),
])
def test_wrong_values_are_named(old, new, message):
    assert old in GOOD
    with pytest.raises(RecipeError, match=message) as error:
        parse_recipe(GOOD.replace(old, new, 1), "my.toml")
    assert "my.toml" in str(error.value)


@pytest.mark.parametrize("text", ["", "stages = 3", "name = 1", "stages = [1]", 'model = "v3"', "stages = [[]]",
                                  "[stages]\nkind = 'grpo'"])
def test_wrong_shapes_are_refused(text):
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_r1_preset_gives_the_published_recipe_where_the_file_is_silent():
    text = GOOD.replace("steps = 2", 'steps = 2\npreset = "r1"\ngroup_size = 4')
    stage = parse_recipe(text).stages[1]
    assert (stage.kl_beta, stage.clip_low, stage.std_normalise, stage.loss_normaliser) == (0.001, 10.0, True, "sequence")
    assert stage.group_size == 4
    modern = parse_recipe(GOOD).stages[1]
    assert (modern.kl_beta, modern.clip_low, modern.clip_high, modern.std_normalise) == (0.0, 0.2, 0.28, False)


def test_from_a_directory_needs_no_pretraining():
    text = 'name = "x"\n[model]\nfrom = "some/dir"\n[[stages]]\nkind = "grpo"\nsteps = 1\n'
    assert parse_recipe(text).model.from_dir == "some/dir"


def test_what_can_be_set_beside_a_directory():
    text = 'name = "x"\n[model]\nfrom = "dir"\nset = {}\n[[stages]]\nkind = "grpo"\nsteps = 1\n'
    assert parse_recipe(text.replace("{}", "{ max_position_embeddings = 64 }")).model.set == {"max_position_embeddings": 64}
    with pytest.raises(RecipeError, match="set.hidden_size is the checkpoint's own; .*max_position_embeddings"):
        parse_recipe(text.replace("{}", "{ hidden_size = 64 }"))


def test_recipes_by_name_and_path(tmp_path):
    with pytest.raises(RecipeError, match="countdown-laptop"):
        find_recipe("nothing")
    with pytest.raises(RecipeError, match="does not exist"):
        find_recipe(str(tmp_path / "x.toml"))
    (tmp_path / "x.toml").write_text(GOOD)
    recipe, text = load_recipe(str(tmp_path / "x.toml"))
    assert text == GOOD and tomllib.loads(text)["name"] == recipe.name
