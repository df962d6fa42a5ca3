"""What a recipe costs, stage by stage; the paper's own run beside what it printed; and what no machine here can hold."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_pipeline import CPU, Quiet

from jevons.config import ConfigError, preset
from jevons.plan import count_parameters, forward_flops, training_flops
from jevons.plan.counts import PlanError
from jevons.plan.fit import check_fits, stage_configs, training_bytes
from jevons.plan.price import Options, make_plan
from jevons.published import V3_HOURS
from jevons.reason.pipeline import Run
from jevons.recipe import RECIPE_DIR, load_recipe, parse_recipe
from jevons.terminal.plan import sections

DOC = Path(__file__).parent.parent / "docs/training.md"
SMALL = """
name = "x"
[model]
preset = "v3-tiny"
[[stages]]
kind = "pretrain"
tokens = 100_000
context = 256
batch_tokens = [{ until = 0.5, from = 1000, to = 3000, shape = "linear" }, { to = 3000 }]
mtp_weight = [{ until = 0.5, to = 0.3 }, { to = 0.0 }]
ema_decay = 0.9
[[stages]]
kind = "distil"
mode = "logits"
problems = 10
samples = 3
max_tokens = 128
epochs = 2
[stages.student]
preset = "qwen2-tiny"
[[stages]]
kind = "sft"
data = ["rows.jsonl"]
epochs = 3
mean_tokens = 60
[[stages]]
kind = "eval"
n = 7
max_tokens = 128
"""


def test_the_papers_own_run():
    plan = make_plan("v3-671b")
    stages = {s["stage"]: s for s in plan["stages"]}
    hours = {name: s["gpu_hours"] for name, s in stages.items()}
    assert hours["pretrain"] == pytest.approx(V3_HOURS["per_trillion"] * V3_HOURS["trillions"], rel=0.002)
    assert stages["pretrain"]["seconds"] / 86400 == pytest.approx(54.2, rel=0.005)
    published = 2664e3 + V3_HOURS["context"] + V3_HOURS["post_training"]
    assert plan["total"]["gpu_hours"] == pytest.approx(published, rel=0.03)
    assert plan["total"]["dollars"] == pytest.approx(5.576e6, rel=0.03) and plan["training"]["gpus"] == 2048
    context = hours["context-32k"] + hours["context-128k"]
    assert 0.55 < context / V3_HOURS["context"] < 0.7, "docs/training.md says 62 % of the published hours"
    assert 0.5 < hours["sft"] / V3_HOURS["post_training"] < 0.7, "and the rest of post-training is not published"
    assert stages["context-32k"]["tokens"] == 1000 * 1920 * 32_768 == 1000 * 480 * 131_072 == stages["context-128k"]["tokens"]
    assert plan["memory_per_gpu"]["total"] < 80e9 and plan["layout"]["pp"] == 16 and plan["layout"]["ep"] == 64
    assert plan["parameters"]["with_router_biases"] == 671_026_419_200
    told = DOC.read_text(encoding="utf-8")
    for figure in (hours["pretrain"], context, hours["sft"], plan["total"]["gpu_hours"]):
        assert f"{figure / 1000:,.0f}K" in told, f"{figure / 1000:,.0f}K is not in {DOC.name}"
    line = load_recipe("v3-671b")[0].stages[0].timeline
    ramp = sum(line.batch(i) < 15360 * 4096 for i in range(line.steps))
    assert f"{line.steps:,} steps, of which {ramp:,} belong to the ramp" in " ".join(told.split())


def test_the_commands_options_go_before_the_recipes():
    plan = make_plan("v3-671b", Options(gpus=1024, price=3.0, utilisation=0.3, gpu="h200"))
    base = make_plan("v3-671b")
    assert plan["training"]["gpus"] == 1024 and plan["total"]["flops"] == base["total"]["flops"]
    assert plan["total"]["gpu_hours"] == pytest.approx(base["total"]["gpu_hours"] * 0.4065 / 0.3)
    assert plan["total"]["dollars"] == pytest.approx(3 * plan["total"]["gpu_hours"])


def test_stages_by_hand(tmp_path):
    (tmp_path / "x.toml").write_text(SMALL)
    with pytest.raises(PlanError, match="rows.jsonl does not exist, so its examples cannot be counted; `examples`"):
        make_plan(str(tmp_path / "x.toml"))
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n\n' * 5)
    plan = make_plan(str(tmp_path / "x.toml"))
    pretrain, distil, sft, score = plan["stages"]
    teacher = preset("v3-tiny", vocab_size=512, max_position_embeddings=256)
    student = preset("qwen2-tiny", vocab_size=512, max_position_embeddings=256)
    assert stage_configs(parse_recipe(SMALL)) == [(teacher, None), (student, teacher), (student, None), (student, None)]
    assert pretrain["flops"] == pytest.approx(training_flops(teacher, 100_000, 256, mtp=True))
    sampled = 10 * 3 * 128
    once = forward_flops(teacher, 129 / 2)
    assert distil["tokens"] == 2 * sampled
    assert distil["flops"] == pytest.approx(sampled * once + 2 * sampled * once + training_flops(student, 2 * sampled, 128))
    assert sft["tokens"] == 3 * 5 * 60 and sft["flops"] == pytest.approx(training_flops(student, 900, 60))
    assert score["tokens"] == 7 * 128 * 4, "the averaged weights of the first stage are scored too"
    (tmp_path / "x.toml").write_text(SMALL.replace("mean_tokens", "examples = 11\nmean_tokens"))
    assert make_plan(str(tmp_path / "x.toml"))["stages"][2]["tokens"] == 3 * 11 * 60
    table = next(s for s in sections(plan) if s.title == "Recipe x")
    assert [row[0] for row in table.rows] == ["pretrain", "distil", "sft", "eval", "in all"]


def test_a_recipe_that_does_not_fit_is_refused_with_the_plan(tmp_path):
    recipe, text = load_recipe("v3-671b")
    with pytest.raises(PlanError) as error:
        Run(recipe, text, tmp_path / "out", Quiet(), CPU)
    said = str(error.value)
    assert said.startswith("recipe v3-671b, stage pretrain does not fit in memory; this machine has 1.1 GB, and it needs\n")
    for row in ("weights", "gradients", "optimizer", "average of the weights", "activations", "in all"):
        assert re.search(rf"^  {row} +[\d,.]+ GB$", said, re.M), row
    with pytest.raises(ValueError, match="v3-sft.jsonl cannot be read: No such file"):  # what was not published either
        Run(recipe, text, tmp_path / "out", Quiet(), replace(CPU, memory_gib=2e4))
    assert "`jevons plan v3-671b` says 66.8 of 80 GB on each of 2,048 x H800 SXM" in said
    assert not (tmp_path / "out").exists()


def test_the_border_of_what_fits():
    recipe = parse_recipe(SMALL)
    for index, (config, teacher) in enumerate(stage_configs(recipe)[:3]):
        stage = recipe.stages[index]
        parts = training_bytes(config, stage, teacher)
        p = count_parameters(config)
        assert parts["weights"] == 4 * (p.total + p.mtp)
        matrices = p.total + p.mtp - p.embedding - p.head - p.norms
        assert parts["optimizer"] == 2 * parts["weights"] - (0 if stage.optimizer.matrices == "adamw" else 4 * matrices)
        assert parts.get("average of the weights", 0) == (parts["weights"] if index == 0 else 0)
        only = recipe.model_copy(update={"stages": recipe.stages[: index + 1]})
        need = sum(parts.values())
        if index == 0:
            check_fits(only, need * 1.001, 1, lambda: "")
            with pytest.raises(PlanError, match="stage pretrain does not fit"):
                check_fits(only, need * 0.999, 1, lambda: "the plan")
            check_fits(only, need * 0.999, 2, lambda: "")  # two devices share what is not activations


def test_shipped_recipes_fit_a_laptop():
    for name in ("countdown-laptop",):
        check_fits(load_recipe(name)[0], 2e9, 1, lambda: "")
    Run(*load_recipe("countdown-laptop"), Path("nowhere"), Quiet(), replace(CPU, memory_gib=2.0))
    assert not Path("nowhere").exists()


def test_a_published_shape_by_name():
    recipe = parse_recipe(SMALL.replace("v3-tiny", "deepseek-v2-lite").replace("context = 256\n", ""))
    assert count_parameters(stage_configs(recipe)[0][0]).total == 15_706_484_224
    with pytest.raises(ConfigError, match="preset 'v3-huge' is not one of .*v3-tiny.*, nor a published shape .deepseek-v3, "):
        stage_configs(parse_recipe(SMALL.replace("v3-tiny", "v3-huge")))


# -- docs/training.md -------------------------------------------------------------------------------------------------------

HEAD = 'name = "snippet"\n[model]\nfrom = "some/dir"\n'
SNIPPETS = re.findall(r"```toml\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S) if DOC.exists() else []


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.splitlines()[1][:30])
def test_the_documents_snippets_are_recipes(snippet):
    assert parse_recipe(snippet if "[model]" in snippet else HEAD + snippet, str(DOC)).stages


def test_the_document_names_what_exists():
    text = DOC.read_text(encoding="utf-8")
    assert len(SNIPPETS) >= 6
    for path in re.findall(r"`((?:jevons|tests)/[\w/.]+\.\w+)`", text):
        assert (DOC.parent.parent / path).is_file(), path
    for name in re.findall(r"`jevons (?:plan|run|up) ([\w-]+)`", text):
        assert (RECIPE_DIR / f"{name}.toml").is_file(), name
