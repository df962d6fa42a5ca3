"""report.html at the end of a run: one self-contained page from metrics.jsonl and the recipe.toml beside it, nothing else.

Curves are SVG drawn here, so that the page needs no script and can be mailed. The same lines give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from jevons.reason.against_plan import Line, against_plan, kept_steps, number_of

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 190, 50, 8, 22
# (title, unit, [(key, label)]) by kind of stage; a curve without values is left out
_CURVES: dict[str, list[tuple[str, str, list[tuple[str, str]]]]] = {
    "pretrain": [("Loss", "", [("loss", "next token"), ("mtp_loss", "MTP"), ("val_loss", "validation")]),
                 ("Tokens a second", "", [("time.tokens_per_second", "tokens/s")]),
                 ("Gradient norm before clipping", "", [("grad_norm", "norm")]),
                 ("Utilisation of this machine's matrix products", "%", [("time.mfu", "utilisation")])],
    "grpo": [("Reward and accuracy of sampled answers", "%", [("accuracy", "accuracy"), ("reward", "reward")]),
             ("Length in tokens", "", [("length_right", "right"), ("length_wrong", "wrong"), ("thinking_length", "thought")]),
             ("Shares", "%", [("zero_spread", "zero-spread groups"), ("truncated", "truncated"), ("clip_share", "clipped")]),
             ("Entropy, nats a token", "", [("entropy", "entropy")]),
             ("Log-prob gap, trainer against engine", "", [("logprob_gap", "gap")]),
             ("Tokens a second", "", [("time.tokens_per_second", "tokens/s")]),
             ("Gradient norm before clipping", "", [("grad_norm", "norm")]),
             ("Utilisation of this machine's matrix products", "%", [("time.mfu", "utilisation")])],
}
_STYLE = """
:root { color-scheme: light dark; --bg: light-dark(#faf9f6, #141618); --card: light-dark(#fff, #1b1e21);
  --sunken: light-dark(#f3f1ec, #101214); --line: light-dark(#e5e1d9, #2c3035); --text: light-dark(#1e2124, #e9e7e2);
  --soft: light-dark(#5e656c, #a3a9af); --c1: light-dark(#1f6f6b, #6cc5b9); --c2: light-dark(#b9721a, #e3ae62);
  --c3: light-dark(#6a5fb0, #a9a0ea); --wrong: light-dark(#a8431f, #eb9a7c); --right: light-dark(#23774a, #7bcb9a) }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 1000px; margin: 0 auto; padding: 40px 20px 70px }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 8px; text-wrap: balance }
h2 { font-size: 1.15rem; margin: 38px 0 12px } h3 { font-size: .95rem; margin: 0 } p { margin: 0 0 10px }
.soft, small { color: var(--soft) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 14px }
figure, .card { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 15px 17px }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 8px 18px 8px 0; border-top: 1px solid var(--line); font-weight: 400; white-space: nowrap }
thead th { border: 0; font-size: .84rem; color: var(--soft) } tbody th { font-weight: 600 }
.plan th, .plan td { padding: 6px 12px 6px 0; font-size: .92rem } .plan tbody th { font-weight: 400; white-space: normal }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--soft); font-size: 11px } .axis { stroke: var(--line) }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.key { font-size: .82rem; color: var(--soft); margin-right: 14px; white-space: nowrap }
.key i { display: inline-block; width: 11px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: middle }
pre { background: var(--sunken); border-radius: 10px; padding: 12px 14px; margin: 8px 0 0; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .82rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
.card + .soft { margin-top: 10px }
@media (max-width: 600px) { th, td { padding-right: 11px; font-size: .87rem } figure, .card { padding: 12px 13px } }
.sample { margin-bottom: 14px } .badge { font-weight: 600; font-size: .86rem; margin-right: 8px }
.ok { color: var(--right) } .no { color: var(--wrong) }
"""


def _read(path: Path) -> list[Line]:
    """The JSON objects of metrics.jsonl; a broken line (a crash cut it) is left out."""
    lines = []
    for raw in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(raw)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def _show(value: Any, form: str = ",.0f", unit: str = "") -> str:
    number = number_of(value)
    return "–" if number is None else f"{number:{form}}{unit}"


def _percent(value: Any) -> str:
    number = number_of(value)
    return "–" if number is None else f"{100 * number:.1f} %"


def _dollars(value: Any) -> str:
    number = number_of(value)
    if number is None:
        return "–"
    digits = 2 if number <= 0 else max(2, 1 - math.floor(math.log10(number)))
    return f"${number:,.{digits}f}"


def _duration(value: Any) -> str:
    number = number_of(value)
    if number is None:
        return "–"
    minutes, seconds = divmod(round(number), 60)
    return f"{number:.1f} s" if number < 10 else f"{seconds} s" if not minutes else (
        f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min")


def _ticks(low: float, high: float, count: int = 4, least: float = 0.0) -> list[float]:
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = max(least, next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= 0.8 * span / count))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _thin(points: list[tuple[float, float]], most: int = 1500) -> list[tuple[float, float]]:
    """At most about `most` points: means of neighbours, so that every line still counts."""
    width = -(-len(points) // most)
    parts = [points[i: i + width] for i in range(0, len(points), width or 1)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _curve(title: str, unit: str, keys: list[tuple[str, str]], steps: list[Line]) -> str:
    """One chart as a figure with an SVG in it, or nothing where no step has any of the keys."""
    scale = 100 if unit == "%" else 1
    data = []
    for key, label in keys:
        pairs = [(line["step"], number_of(line.get(key))) for line in steps if number_of(line.get("step")) is not None]
        data.append((label, [(x, scale * y) for x, y in pairs if y is not None]))
    points = [point for _, part in data for point in part]
    if not points:
        return ""
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    y0 = 0.0 if 0 <= y0 < 0.45 * y1 or 0 < y1 <= y0 * (1 + 1e-6) else y0
    y1 = y1 if y1 > y0 else y0 + 1

    def at(x: float, y: float) -> tuple[float, float]:
        return (_LEFT + (x - x0) / ((x1 - x0) or 1) * (_WIDTH - _LEFT - 8),
                _TOP + (1 - (y - y0) / (y1 - y0)) * (_HEIGHT - _TOP - _BOTTOM))

    parts, legend = [], []
    for tick in _ticks(y0, y1):
        y = at(x0, tick)[1]
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}{" %" if unit == "%" else ""}</text>')
    for tick in _ticks(x0, x1, 5, least=1):
        parts.append(f'<text x="{at(tick, y0)[0]:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{tick:,.6g}</text>')
    for (label, part), color in zip(data, ("c1", "c2", "c3"), strict=False):
        color = "wrong" if label == "wrong" else color
        if part:
            path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in _thin(part))
            parts.append(f'<polyline points="{path}" style="stroke:var(--{color})"/>')
            newest = part[-1][1]
            last = f"{newest:,.1f} %" if unit == "%" else f"{newest:,.0f}" if abs(newest) >= 1000 else f"{newest:.4g}"
            legend.append(f'<span class="key"><i style="background:var(--{color})"></i>{escape(label)} <b>{last}</b></span>')
    return (f'<figure><h3>{escape(title)}</h3><div>{"".join(legend)}</div><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{escape(title)} by step">{"".join(parts)}</svg></figure>')


def _headline(run: Line, evals: list[Line], done: Line) -> str:
    what, cost = str(run.get("recipe", "A run")), "a run that has not ended"
    if done:
        cost = f'{_duration(done.get("time.seconds"))} and {_dollars(done.get("time.dollars"))}'
    if len(evals) > 1:
        first, last = evals[0], evals[-1]
        return f'{what}: from {_percent(first.get("accuracy"))} to {_percent(last.get("accuracy"))} in {cost}'
    return f'{what}: {_percent(evals[0].get("accuracy"))} in {cost}' if evals else f"{what}: {cost}"


def _evals(evals: list[Line]) -> str:
    rows = "".join(
        f'<tr><th>{escape(str(e.get("name") or e.get("checkpoint")))}</th><td><b>{_percent(e.get("accuracy"))}</b></td>'
        f'<td>{_percent(e.get("low"))} to {_percent(e.get("high"))}</td><td>{_show(e.get("n"))}</td>'
        f'<td>{_show(e.get("thinking_length"))}</td><td>{_percent(e.get("mtp_acceptance"))}</td>'
        f'<td><small>{escape(str(e.get("checkpoint", "")))}</small></td></tr>' for e in evals)
    heads = "".join(f"<th>{head}</th>" for head in
                    ("", "accuracy", "95 % interval", "problems", "thinking tokens", "MTP acceptance", "checkpoint"))
    table = f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    return table if evals else '<p class="soft">No evaluation was logged.</p>'


def _cost(stages: list[tuple[str, list[Line]]], evals: list[Line], run: Line, done: Line) -> str:
    """Steps count from their stage's beginning, so that the last one holds its total; every evaluation has its own."""
    rows = []
    for name, steps in stages:
        last = steps[-1]
        rows.append(f'<tr><th>{escape(name)}</th><td>{_show(last.get("step"))}</td><td>{_show(last.get("tokens"))}</td>'
                    f'<td>{_duration(last.get("time.seconds"))}</td><td>{_dollars(last.get("time.dollars"))}</td></tr>')
    for line in evals:
        name = f'{line.get("stage", "eval")}: {line.get("name") or line.get("checkpoint")}'
        rows.append(f'<tr><th>{escape(name)}</th><td></td><td></td><td>{_duration(line.get("time.seconds"))}</td>'
                    f'<td>{_dollars(line.get("time.dollars"))}</td></tr>')
    if done:
        rows.append(f'<tr><th>whole run</th><td></td><td></td><td>{_duration(done.get("time.seconds"))}</td>'
                    f'<td>{_dollars(done.get("time.dollars"))}</td></tr>')
    rate = f'<p class="soft">At {_dollars(run.get("dollars_per_hour"))} an hour, the rate in the recipe.</p>'
    heads = "".join(f"<th>{head}</th>" for head in ("stage", "steps", "tokens", "time", "dollars"))
    return f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{rate}'


_FORMS: dict[str, Callable[[Any], str]] = {
    "s": _duration, "$": _dollars, "%": _percent, "": lambda v: _scaled(v, ""), "FLOP": lambda v: _scaled(v, "FLOP"),
    "B": lambda v: _scaled(v, "B"), "J": lambda v: _scaled(v, "J")}


def _scaled(value: Any, unit: str) -> str:
    """1.55 M, 12.3 GB: three figures."""
    number = number_of(value)
    if number is None:
        return "–"
    power = min(5, int(math.log10(number) / 3)) if number >= 1000 else 0
    scaled = number / 1000**power
    digits = 0 if scaled >= 100 or scaled == int(scaled) else 1 if scaled >= 10 else 2
    return f"{scaled:,.{digits}f} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}".rstrip()


def _against_plan(lines: list[Line]) -> str:
    cards = []
    for stage, rows in against_plan(lines).items():
        body = ""
        for what, unit, planned, measured in rows:
            share = f"{measured / planned:.3g}" if planned and measured is not None else ""
            body += (f"<tr><th>{what}</th><td>{_FORMS[unit](planned)}</td><td>{_FORMS[unit](measured)}</td>"
                     f"<td><small>{share}</small></td></tr>")
        heads = "<th></th><th>plan</th><th>measured</th><th>ratio</th>"
        cards.append(f'<div class="card scroll"><h3>{escape(stage)}</h3><table class="plan"><thead><tr>{heads}</tr></thead>'
                     f"<tbody>{body}</tbody></table></div>")
    note = ('<p class="soft">The plan counts every answer as long as its limit, and takes this machine’s own matrix products at '
            "the utilisation that V3’s report reached. The rest of memory is the program itself.</p>")
    return f'<h2>Plan against measured</h2>{note}<div class="grid">{"".join(cards)}</div>' if cards else ""


def _notes(lines: list[Line]) -> str:
    """What a person should know: notes, rollbacks, and the first bad batches of each stage."""
    said, bad = [], {}
    for line in lines:
        stage, step = line.get("stage", ""), _show(line.get("step"))
        if line.get("kind") == "note":
            said.append(f'{stage}: {line.get("text", "")}')
        elif line.get("kind") == "rollback":
            said.append(f'{stage}: at step {step} back to step {_show(line.get("to_step"))}, and on past the data of steps '
                        f'{_show(line.get("data_from"))} to {_show(line.get("data_to"))}, because {line.get("why", "")}')
        elif line.get("kind") == "bad_batch":
            bad.setdefault(stage, []).append(f'step {step}: {line.get("why", "")}')
    for stage, reasons in bad.items():
        first = "; ".join(reasons[:3]) + " ..." * (len(reasons) > 3)
        said.append(f'{stage}: {len(reasons)} update{"s" * (len(reasons) > 1)} skipped ({first})')
    return "".join(f'<p class="soft">{escape(text)}</p>' for text in said)


def _samples(lines: list[Line]) -> str:
    """Five of the newest sample thoughts: three right and two wrong ones where there are as many of either."""
    newest = [dict(sample, where=f'{line.get("stage", "")}, step {line.get("step", "?")}') for line in reversed(lines)
              if line.get("kind") == "samples" for sample in line.get("samples", []) if isinstance(sample, dict)]
    right, wrong = ([s for s in newest if bool(s.get("correct")) == kind] for kind in (True, False))
    count = min(len(right), max(3, 5 - len(wrong)))
    cards = []
    for s in right[:count] + wrong[: 5 - count]:
        mark = '<span class="badge ok">✓ right</span>' if s.get("correct") else '<span class="badge no">✗ wrong</span>'
        text = f'{str(s.get("thought", "")).rstrip()}\n→ {s.get("answer", "")}'
        cards.append(f'<div class="sample card">{mark}{escape(str(s.get("prompt", "")))} <small>({escape(s["where"])})</small>'
                     f'<pre>{escape(text)}</pre></div>')
    return "".join(cards) or '<p class="soft">No sample was logged.</p>'


def write_report(metrics_path: Path, out: Path) -> None:
    """Write the report of a run to `out`. Reads `metrics_path` and recipe.toml beside it; raises OSError on their absence."""
    lines = _read(metrics_path)
    recipe = metrics_path.with_name("recipe.toml")
    run = next((line for line in reversed(lines) if line.get("kind") == "run"), {})
    done = next((line for line in reversed(lines) if line.get("kind") == "done"), {})
    evals = [line for line in lines if line.get("kind") == "eval"]
    kinds = {stage.get("name"): stage.get("kind") for stage in run.get("stages", []) if isinstance(stage, dict)}
    names = list(dict.fromkeys(line.get("stage") for line in lines if line.get("kind") == "step"))
    stages = [(str(name), steps) for name in names if (steps := kept_steps(lines, name))]
    curves = ""
    for name, steps in stages:
        charts = "".join(_curve(*spec, steps) for spec in _CURVES.get(kinds.get(name, name), _CURVES["pretrain"]))
        curves += f'<h2>{escape(name)}</h2><div class="grid">{charts}</div>' if charts else ""
    size = f'{_show(run.get("parameters"))} parameters, {_show(run.get("active_parameters"))} active per token.'
    title = escape(_headline(run, evals, done))
    body = (f'<h1>{title}</h1><p class="soft">{escape(str(run.get("description", "")))} {size}</p>'
            f'<p class="soft">Taught: {escape(str(run.get("taught", "")))}</p>{_notes(lines)}'
            f'<h2>Before and after</h2>{_evals(evals)}'
            f'{curves}<h2>Cost</h2>{_cost(stages, evals, run, done)}{_against_plan(lines)}'
            f'<h2>Sample thoughts</h2>{_samples(lines)}'
            f'<h2>Recipe</h2><pre>{escape(recipe.read_text(encoding="utf-8") if recipe.is_file() else "(no recipe.toml)")}</pre>'
            f'<p class="soft"><small>Made from the {len(lines)} lines of metrics.jsonl.</small></p>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    page = (f'<!doctype html>\n<html lang="en"><head>{head}<title>{title}</title><style>{_STYLE}</style></head>'
            f"<body><main>{body}</main></body></html>\n")
    temporary = out.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out)
