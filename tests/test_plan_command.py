"""`jevons plan` as a person runs it: names, files, recipes, widths, JSON, the page, and one line for what is wrong."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.config import PRESETS, ConfigError, ModelConfig, preset
from jevons.plan.counts import PlanError, Shape, count_parameters, forward_flops, training_flops
from jevons.plan.hardware import HARDWARE
from jevons.plan.price import Options, make_plan
from jevons.published import CONFIGS
from jevons.recipe import load_recipe


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `jevons plan` here: (exit status, stdout, stderr)."""
    def run(*arguments, width=80):
        from jevons.cli import main

        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "argv", ["jevons", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "r1-distill-llama-70b", "v3-tiny", "countdown-laptop"])
def test_the_tables_fit_the_terminal(command, name, width):
    code, out, _ = command(name, width=width)
    assert code == 0 and max(map(len, out.splitlines())) <= width
    assert "…" not in out, "nothing is cut off"
    for title in ("Parameters", "Cache per token", "FLOPs per token", "Memory of the fullest GPU", "Pipeline bubble", "Serving"):
        assert title in out


def test_what_v3s_tables_say(command):
    _, out, _ = command()
    for figure in ("671,026,419,200", "680,571,043,840", "3,918,786,560", "41,555,600", "37,552,282,624", "250.5 GFLOP", "70,272",
                   "3,997,696", "249,856", "56.9x", "54.3 days", "45 F", "14 F", "PP 16 x DP 128, EP 64"):
        assert figure in out
    for title in (hardware.title for key, hardware in HARDWARE.items() if key != "laptop"):
        assert title.split()[0] in out


def test_json_is_the_whole_plan(command):
    code, out, _ = command("deepseek-v2", "--json", "--gpus", 128, "--price", 3, "--tokens", "1.5T", "--utilisation", 0.5)
    plan = json.loads(out)
    shape = Shape.from_hf(CONFIGS["deepseek-v2"])
    flops = 1.5e12 * training_flops(shape, 1, 4096, mtp=False)
    assert code == 0 and plan["parameters"]["total"] == 235_741_434_880
    hours = flops / 989.4e12 / 0.5 / 3600
    assert plan["training"]["gpu_hours"] == pytest.approx(hours) and plan["training"]["dollars"] == pytest.approx(3 * hours)
    assert plan["training"]["days"] == pytest.approx(hours / 128 / 24)
    assert plan["layout"]["pp"] == 16 and plan["layout"]["ep"] == 8 and plan["layout"]["dp"] == 8
    assert make_plan("deepseek-v2", Options(gpus=128, price=3, tokens=1.5e12, utilisation=0.5)) == plan | {
        "serving": make_plan("deepseek-v2", Options(gpus=128, price=3))["serving"]}


def test_options_change_what_they_name():
    base = make_plan("deepseek-v3")
    assert make_plan("deepseek-r1")["parameters"] == base["parameters"]
    for options, path, check in (
            (Options(row=8192), ("flops", "training"), lambda a, b: a > b),
            (Options(context=10_000), ("serving", "on", "h800", "batch"), lambda a, b: a < b),
            (Options(per_user=60), ("serving", "on", "h800", "batch"), lambda a, b: a < b),
            (Options(serve_in="bf16"), ("serving", "weights"), lambda a, b: a > 1.9 * b),
            (Options(zero=0), ("memory_per_gpu", "optimizer"), lambda a, b: a > b),
            (Options(train_in="bf16"), ("memory_per_gpu", "weights"), lambda a, b: a > 1.5 * b),
            (Options(recompute="full"), ("memory_per_gpu", "activations"), lambda a, b: a < b),
            (Options(schedule="1f1b"), ("layout", "bubble_share"), lambda a, b: a > b),
            (Options(micro_batches=240), ("layout", "bubble_share"), lambda a, b: a < b),
            (Options(ep=128), ("memory_per_gpu", "weights"), lambda a, b: a < b),
            (Options(dp=64), ("training", "gpus"), lambda a, b: a == b / 2),
            (Options(tp=2), ("memory_per_gpu", "activations"), lambda a, b: a < b),
            (Options(pp=8), ("bubbles", "1f1b"), lambda a, b: (a, b) == (21, 45)),
            (Options(gpu="h200"), ("memory_per_gpu", "capacity"), lambda a, b: a > b)):
        a, b = make_plan("deepseek-v3", options), base
        for key in path:
            a, b = a[key], b[key]
        assert check(a, b), (options, a, b)


@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_every_name_is_priced(name):
    plan = make_plan(name)
    assert plan["parameters"]["total"] > 0 and plan["training"]["dollars"] > 0
    assert min(v["decode"] for v in plan["serving"]["on"].values()) > 0


def test_files_and_checkpoints(command, tmp_path):
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine/config.json"
    file.write_text(json.dumps(CONFIGS["r1-distill-qwen-7b"] | {"rope_scaling": {"type": "odd"}, "unheard_of": 3}))
    for path in (file, file.parent):
        code, out, _ = command(path, "--json")
        assert code == 0 and json.loads(out)["name"] == "mine" and json.loads(out)["layout"]["gpus"] == 8
        assert json.loads(out)["parameters"]["total"] == 7_615_616_512


def test_a_directory_that_is_called_like_a_published_model(tmp_path):
    for raw, gpus in ((CONFIGS["deepseek-v2-lite"], 8), (CONFIGS["deepseek-v3"], 2048)):
        (tmp_path / "deepseek-v3").mkdir(exist_ok=True)
        (tmp_path / "deepseek-v3/config.json").write_text(json.dumps(raw))
        assert make_plan(str(tmp_path / "deepseek-v3"))["training"]["gpus"] == gpus


def test_a_recipe_by_hand(tmp_path):
    recipe, _ = load_recipe("countdown-laptop")
    plan = make_plan("countdown-laptop")
    shape = preset("v3-tiny", vocab_size=512)
    pretrain, grpo, score = recipe.stages
    forward = forward_flops(shape, 257 / 2)
    answers = grpo.steps * grpo.problems * grpo.group_size * grpo.max_tokens
    learning = 3 * forward_flops(shape, 257 / 2, True)
    by_hand = [pretrain.tokens * learning, answers * (forward + learning), 2 * score.n * score.max_tokens * forward]
    assert [s["flops"] for s in plan["stages"]] == pytest.approx(by_hand)
    assert plan["total"]["dollars"] == pytest.approx(sum(by_hand) / 0.2e12 / 0.39 / 3600 * recipe.cost.dollars_per_hour)
    path = tmp_path / "x.toml"
    text = '[model]\npreset="v3-nano"\n[[stages]]\nkind="pretrain"\ntokens=1000\n[[stages]]\nkind="grpo"\nsteps=2\n{}'
    path.write_text('name="x"\n' + text.format("kl_beta=0.1"))
    with_kl = make_plan(str(path))["stages"][1]
    path.write_text('name="x"\n' + text.format(""))
    without = make_plan(str(path))["stages"][1]
    nano = preset("v3-nano", vocab_size=512)
    assert with_kl["flops"] - without["flops"] == pytest.approx(without["tokens"] * forward_flops(nano, 257 / 2))


def test_published_beside_computed(command):
    code, out, _ = command("--published", width=120)
    assert code == 0 and "87,072" in out and "5,576,000" in out
    code, out, _ = command("--published", "--json")
    assert code == 0 and {"what", "published", "computed"} <= set(json.loads(out)[0])


# -- the page -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek-v3", "r1-distill-qwen-1.5b", "countdown-laptop"])
def test_the_page_holds_plots_and_tables_and_loads_nothing(command, tmp_path, name):
    file = tmp_path / "plan.html"
    code, _, _ = command(name, "--html", file, "--json")
    text = file.read_text(encoding="utf-8")
    assert code == 0 and "light-dark(" in text and not re.search(r"https?:|<script|src=|url\(", text)
    plots = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(plots) == 4
    for plot in plots:
        tree = ElementTree.fromstring(plot)
        width, height = map(float, tree.get("viewBox").split()[2:])
        for text_node in tree.iter("text"):  # nothing runs over an edge, at 6.6 units a character
            x, size, anchor = float(text_node.get("x")), 6.6 * len(text_node.text), text_node.get("text-anchor")
            start = {"start": x, "middle": x - size / 2, "end": x - size}[anchor]
            assert start >= -1 and start + size <= width + 1 and 0 < float(text_node.get("y")) <= height, text_node.text
        for bar in tree.iter("rect"):
            assert float(bar.get("x")) + float(bar.get("width")) <= width
    assert text.count("<table>") >= 8


def test_names_in_the_page_are_escaped(tmp_path):
    from jevons.terminal.plan import sections
    from jevons.terminal.plan_page import page

    plan = make_plan("v3-nano") | {"name": "<script>x</script>"}
    assert "<script" not in page(plan, sections(plan))


# -- what is wrong is one line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments,named", [
    (("deepsek-v3",), "the nearest known name is 'deepseek-v3'"),
    (("countdown-lap",), "the nearest known name is 'countdown-laptop'"),
    (("--gpu", "h801"), "the nearest known name is 'h80"),
    (("--price", "-1"), "price is -1.0; 0 or more dollars an hour would be right"),
    (("--price", "nan"), "price is nan"),
    (("--utilisation", "1.2"), "utilisation is 1.2; above 0 and at most 1 would be right"),
    (("--utilisation", "0"), "utilisation is 0.0"),
    (("--tokens", "-5"), "tokens is -5.0; above 0 would be right"),
    (("--tokens", "nan"), "tokens is nan"),
    (("--gpus", "0"), "gpus is 0; above 0 would be right"),
    (("--gpus", "100"), "100 gpus are not a multiple of tp 1 x 16"),
    (("--tp", "3"), "128 attention heads do not divide over tp 3"),
    (("--tp", "0"), "tp is 0"),
    (("--pp", "7"), "pp 7 is odd; dualpipe pairs stages"),
    (("--ep", "96"), "256 experts do not divide over ep 96"),
    (("--dp", "3", "--gpus", "4"), "dp 3 with 16 GPUs a replica makes 48 gpus, not 4"),
    (("--schedule", "gpipe"), "schedule 'gpipe' is not one of"),
    (("--serve-in", "q9"), "serve-in 'q9' is not one of bf16, fp8, q4"),
    (("--train-in", "fp4"), "precision 'fp4' is not one of fp8, bf16"),
    (("--context", "0"), "context is 0"),
    (("nothing.json",), "nothing.json does not exist"),
    (("nothing.toml",), "recipe file nothing.toml does not exist"),
    (("--html", "no/such/dir/x.html"), "no/such/dir/x.html"),
    (("BAD:{",), "is not JSON"),
    (("BAD:[1]",), "holds list; an object would be right"),
    (("BAD:{}",), "architectures None is not one of DeepseekV3ForCausalLM"),
    (("V3:hidden_size",), "hidden_size is missing"),
    (("QWEN:num_attention_heads=13",), "hidden_size 1536 is not a multiple of num_attention_heads 13"),
    (("QWEN:num_key_value_heads=5",), "num_attention_heads 12 is not a multiple of num_key_value_heads 5"),
    (("V3:kv_lora_rank=0",), "kv_lora_rank"),
    (("V3:vocab_size=-1",), "vocab_size is -1"),
    (("V3:vocab_size=\"wide\"",), "vocab_size = 'wide'"),
    (("V3:attention_bias=true",), "attention_bias True is not supported"),
    (("V3:moe_layer_freq=2",), "moe_layer_freq 2 is not supported"),
])
def test_mistakes_are_one_line(command, tmp_path, arguments, named):
    kind, _, rest = arguments[0].partition(":")
    if kind in ("BAD", "V3", "QWEN"):
        raw = dict(CONFIGS[{"QWEN": "r1-distill-qwen-1.5b"}.get(kind, "deepseek-v3")])
        key, _, value = rest.partition("=")
        raw.pop(key, None)
        (tmp_path / "c.json").write_text(rest if kind == "BAD" else json.dumps(raw | ({key: json.loads(value)} if value else {})))
        arguments = (tmp_path / "c.json",)
    code, out, err = command(*arguments)
    (line,) = err.strip().splitlines()
    assert code == 1 and out == "" and line.startswith("error: ") and named in line


@pytest.mark.parametrize("text", ["ten", "", "1.2.3T", "T"])
def test_tokens_that_are_no_number(command, text):
    code, out, err = command("--tokens", text)
    assert code == 2 and "Traceback" not in err and "4.2M" in err


SIMPLE = st.none() | st.booleans() | st.integers(-9, 10**12) | st.floats() | st.text(max_size=4)


@pytest.mark.parametrize("named", [None, [], [[]], [None], {}, "", "GPT2LMHeadModel", [7]])
def test_what_names_no_known_architecture_is_refused(named):
    for reader, error in ((Shape, PlanError), (ModelConfig, ConfigError)):
        with pytest.raises(error, match="^config.json: architectures .* is not one of DeepseekV3ForCausalLM, "):
            reader.from_hf(CONFIGS["deepseek-v3"] | {"architectures": named})


@settings(max_examples=150)
@given(st.sampled_from(["deepseek-v3", "deepseek-v2-lite", "r1-distill-llama-8b"]), st.data())
def test_any_value_of_any_field_is_priced_or_refused_clearly(name, data):
    raw = dict(CONFIGS[name])
    field = data.draw(st.sampled_from(sorted([*raw, "head_dim", "num_key_value_heads"])))
    raw[field] = data.draw(SIMPLE | st.lists(SIMPLE, max_size=2))
    try:
        shape = Shape.from_hf(raw)
    except PlanError as error:
        assert "\n" not in str(error) and str(error).startswith("config.json: ")
        return
    assert count_parameters(shape).total > 0


def test_planning_loads_no_torch(tmp_path):
    program = ("import sys; sys.argv = ['jevons', 'plan', 'countdown-laptop', '--html', sys.argv[1]]\n"
               "from jevons.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
               "assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules), sorted(sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x.html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
