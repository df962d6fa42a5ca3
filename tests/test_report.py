"""report.html: from metrics.jsonl and recipe.toml alone, self-contained, and different when a line is missing."""

import json
import random
import re

import pytest
from synthetic_metrics import make_lines

from jevons.reason.report import write_report


@pytest.fixture
def made(tmp_path):
    def make(lines, recipe='name = "mine"\n'):
        (tmp_path / "metrics.jsonl").write_text(
            "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        )
        (tmp_path / "recipe.toml").write_text(recipe)
        write_report(tmp_path / "metrics.jsonl", tmp_path / "report.html")
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return make


def test_says_what_the_run_says(made):
    seed = random.randrange(10**6)
    lines = make_lines(seed=seed, pretrain=30, grpo=20)
    page = made(lines, 'name = "<mine>"\n')
    first, last = [line for line in lines if line["kind"] == "eval"]
    for part in (
        f"{100 * first['accuracy']:.1f} %",
        f"{100 * last['accuracy']:.1f} %",
        f"{100 * last['low']:.1f} % to {100 * last['high']:.1f} %",
        "name = &quot;&lt;mine&gt;&quot;",
        "✓ right",
        "✗ wrong",
        f"Made from the {len(lines)} lines",
    ):
        assert part in page, (seed, part)
    assert page.count('class="sample card"') == 5
    steps = [line for line in lines if line["kind"] == "step" and line["stage"] == "grpo"]
    assert any(len(points.split()) == len(steps) for points in re.findall(r'<polyline points="([^"]*)"', page))
    assert not re.search(r"<(script|link|img|iframe)|https?://|@import|url\(", page), "the report needs nothing else"


def test_any_missing_line_changes_it(made):
    lines = make_lines(seed=random.randrange(10**6), pretrain=12, grpo=6)
    whole = made(lines)
    assert made(lines) == whole
    for index in range(len(lines)):
        assert made(lines[:index] + lines[index + 1 :]) != whole, lines[index]["kind"]
    for kind in ("step", "eval", "samples", "run", "done"):  # and not only in the number of lines
        index = random.choice([i for i, line in enumerate(lines) if line["kind"] == kind])
        page = made(lines[:index] + lines[index + 1 :] + [{"kind": "stage", "stage": "x", "event": "end"}])
        assert page != whole, kind


def test_dollars_follow_the_logged_ones(made):
    rate = random.uniform(1, 9)
    lines = make_lines(pretrain=5, grpo=3, rate=rate)
    page = made(lines)
    total = f"${lines[-1]['time.dollars']:.2f}"
    if lines[-1]["time.dollars"] >= 0.1:
        assert total in page
    assert f"At ${rate:.2f} an hour" in page


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["garbage\n", "[1]\n", '{"kind": "step"'],
        [{"kind": "run"}, {"kind": "eval"}, {"kind": "samples"}],
        [{"kind": "step", "stage": "grpo", "step": 1, "accuracy": None, "entropy": float("nan"), "loss": "x"}],
        [{"kind": "step", "stage": "<b>", "step": 3, "loss": 2.5}],
    ],
)
def test_survives_a_broken_or_empty_run(made, lines):
    page = made(lines)
    assert "<h1>" in page and "<b>&" not in page and "<h2><b>" not in page


def test_text_of_the_model_stays_text(made):
    sample = {"prompt": "<script>alert(1)</script>", "thought": "</pre><img src=x>", "answer": "<b>", "correct": 0}
    page = made(
        [
            {"kind": "samples", "stage": "<i>", "step": 1, "samples": [sample]},
            {"kind": "run", "recipe": "<u>", "description": "<s>"},
        ]
    )
    assert not re.search(r"<(script|img|u|s|i)>|<img", page)


def cost_table(page):
    return re.search(r"<h2>Plan against measured</h2>.*?(?=<h2>)", page, re.S).group()


def test_plan_beside_what_was_measured(made):
    lines = make_lines(seed=random.randrange(10**6), pretrain=12, grpo=6)
    table = cost_table(made(lines))
    for stage in ("pretrain", "grpo"):
        assert f"<h3>{stage}</h3>" in table
    steps = [line for line in lines if line["kind"] == "step" and line["stage"] == "pretrain"]
    plan = next(line for line in lines if line["kind"] == "plan" and line["stage"] == "pretrain")
    rows = dict(re.findall(r"<tr><th>([^<]*)</th>(.*?)</tr>", table[: table.index("<h3>grpo")]))
    used = sum(line["flops"] for line in steps)
    assert f"<td>{100 * plan['utilisation']:.1f} %</td>" in rows["utilisation"]
    assert f"<td>{100 * used / steps[-1]['time.seconds'] / plan['time.peak_flops']:.1f} %</td>" in rows["utilisation"]
    assert f"{used / plan['flops']:.3g}</small>" in rows["model FLOPs"]
    assert "energy" not in rows, "what the machine does not tell is not there"
    steps[-1]["time.joules"] = 12_345
    assert "<td>–</td><td>12.3 kJ</td>" in cost_table(made(lines))


def test_any_line_that_is_gone_changes_what_was_measured(made):
    lines = make_lines(seed=random.randrange(10**6), pretrain=12, grpo=6)
    whole = cost_table(made(lines))
    for index, line in enumerate(lines):
        if line["kind"] in ("plan", "memory", "step"):
            assert cost_table(made(lines[:index] + lines[index + 1 :])) != whole, line


def test_what_a_rollback_left_behind_is_not_drawn_but_was_paid_for(made):
    lines = make_lines(seed=random.randrange(10**6), pretrain=12, grpo=6)
    last = next(i for i, line in enumerate(lines) if line.get("stage") == "pretrain" and line.get("step") == 9)
    again = [dict(line) for line in lines[last - 2 : last + 1]]
    back = {"kind": "rollback", "stage": "pretrain", "step": 9, "to_step": 6, "data_from": 6, "data_to": 9, "rollbacks": 1,
            "why": "the gradient norm is <nan>"}
    bad = {"kind": "bad_batch", "stage": "pretrain", "step": 9, "why": "the gradient norm is <nan>"}
    page = made([*lines[: last + 1], bad, back, *again, *lines[last + 1 :]])
    charts = [len(points.split()) for points in re.findall(r'<polyline points="([^"]*)"', page)]
    assert 12 in charts and 15 not in charts
    assert "at step 9 back to step 6, and on past the data of steps 6 to 9, because the gradient norm is &lt;nan&gt;" in page
    assert "pretrain: 1 update skipped (step 9: the gradient norm is &lt;nan&gt;)" in page
    assert cost_table(page) != cost_table(made(lines))
