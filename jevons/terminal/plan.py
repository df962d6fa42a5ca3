"""`jevons plan` for a person: tables in the terminal, JSON, or a page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Section:
    """One table; the first column is text, the others are right-aligned."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


def short(value: float, unit: str = "") -> str:
    """Four figures and a prefix: 671.0 B, 36.88 K; bytes and FLOPs count in G and T."""
    prefixes = " KMBT" if not unit else " KMGTPEZY"
    index = 0
    while abs(value) >= 999.95 and index < len(prefixes) - 1:
        value, index = value / 1000, index + 1
    digits = 0 if index == 0 and value == int(value) else 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{digits}f} {prefixes[index].strip()}{unit}".rstrip()


def money(value: float) -> str:
    return f"${value:,.0f}" if value >= 1000 else f"${value:,.2f}" if value >= 0.1 else f"${value:.2g}"


def duration(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"


def sections(plan: dict[str, Any]) -> list[Section]:
    """The tables of a plan, in reading order."""
    p, f, t, m, lay, serve = (plan[k] for k in ("parameters", "flops", "training", "memory_per_gpu", "layout", "serving"))
    names = {"experts": "experts and routers", "dense_mlp": "dense feed-forward"}
    parts = {names.get(k, k): p[k] for k in ("embedding", "attention", "experts", "dense_mlp", "norms", "head") if p[k]}
    counted = p["with_router_biases"]
    rows = [[name, f"{value:,}", f"{value / p['total']:.1%}"] for name, value in parts.items()]
    if p["router_biases"]:
        rows.append(["router biases", f"{p['router_biases']:,}", ""])
    rows += [["total", f"{counted:,}", ""], ["active a token", f"{p['active']:,}", f"{p['active'] / p['total']:.1%}"],
             ["active without embedding", f"{p['active'] - p['embedding']:,}", ""]]
    if p["mtp"]:
        rows.append(["MTP module (extra)", f"{p['mtp']:,}", ""])
    out = [Section("Parameters", ["part", "parameters", "share"], rows)]
    out.append(Section("Checkpoint elements", ["type"] + ["as " + k.upper() for k in plan["checkpoint"]], [
        *([name, *(f"{v[key]:,}" for v in plan["checkpoint"].values())] for key, name in (
            ("f8_e4m3", "FP8 E4M3"), ("bf16", "BF16"), ("f32", "F32"), ("elements", "all"))),
        ["size", *(short(v["bytes"], "B") for v in plan["checkpoint"].values())]],
        f"published in {plan['published_in'].upper()}" + ("; MTP layer and its copies included" if p["mtp"] else "")))
    kv = plan["kv_bytes_per_token"]
    own = next(iter(kv.values()))
    out.append(Section("Cache per token, bf16", ["kind", "bytes", "times"], [
        [name, f"{value:,}", f"{value / own:.1f}x"] for name, value in kv.items()]))
    out.append(Section("FLOPs per token", ["pass", "FLOPs"], [
        ["forward", short(f["forward"], "FLOP")], ["training", short(f["training"], "FLOP")],
        *([["training with MTP", short(f["training_with_mtp"], "FLOP")]] if p["mtp"] else []),
        ["share of attention", f"{f['attention_share']:.1%}"]], f"causal rows of {f['row']:,} tokens"))
    spare = m["capacity"] - m["total"]
    out.append(Section("Memory of the fullest GPU", ["what", "bytes", "share"], [
        *([k, short(m[k], "B"), f"{m[k] / m['total']:.1%}"] for k in ("weights", "gradients", "optimizer", "activations")),
        ["total", short(m["total"], "B"), ""],
        [f"{'left of' if spare >= 0 else 'too much for'} {short(m['capacity'], 'B')}", short(abs(spare), "B"), ""]],
        f"TP {lay['tp']} x PP {lay['pp']} x DP {lay['dp']}, EP {lay['ep']}, ZeRO-{lay['zero']}, {lay['schedule']}, "
        f"{lay['precision']}, recompute {lay['recompute']}, rows of {lay['row']:,}"))
    out.append(Section(f"Pipeline bubble, {plan['bubbles']['pp']} stages", ["schedule", "waits"], [
        [k, f"{v:g} F"] for k, v in plan["bubbles"].items() if k != "pp"],
        "F 1, B 2, W 1, F&B 3" + (f"; {lay['schedule']} waits {lay['bubble_share']:.1%} of a step of {lay['in_step']}"
                                  if lay["pp"] > 1 else "")))
    machines = (f"{t['gpus']:,} x {t['title']} at {money(t['dollars_per_hour'])}/h, {t['utilisation']:.0%} of "
                f"{short(t['peak'], 'FLOP/s')}")
    hours = f"{t['gpu_hours']:,.0f}" if t["gpu_hours"] >= 1000 else f"{t['gpu_hours']:.3g}"
    out.append(Section("Training", ["what", ""], [
        ["tokens", short(t["tokens"])], ["FLOPs", f"{t['flops']:.3g}"], ["GPU hours", hours], ["time", duration(t["days"])],
        ["cost", money(t["dollars"])]], machines + (", MTP not counted" if p["mtp"] else "")))
    if plan["kind"] == "recipe":
        stages = [*plan["stages"], {"stage": "in all"} | plan["total"]]
        out[-1] = Section(f"Recipe {plan['recipe']}", ["stage", "tokens", "FLOPs", "GPU hours", "time", "cost"], [
            [s["stage"], short(s["tokens"]), short(s["flops"], "FLOP"),
             f"{s['gpu_hours']:,.0f}" if s["gpu_hours"] >= 1000 else f"{s['gpu_hours']:.3g}", duration(s["seconds"] / 86400),
             money(s["dollars"])]
            for s in stages], f"every answer at its limit; {machines}")
    out.append(Section("Serving: bounds that no program passes", [
        "hardware", "n", "users", "alone", "memory", "compute", "$/M out", "$/M in"], [
        [v["title"], str(v["devices"]), f"{v['batch']:,}", short(v["single"]), short(v["by_bandwidth"]), short(v["by_compute"]),
         money(v["dollars_per_million"]), money(v["dollars_per_million_input"])] for v in serve["on"].values()],
        f"tokens/s; weights {serve['precision']}, {short(serve['weights'], 'B')}; {serve['context']:,} tokens cached a user, "
        f"{serve['per_user']:g} tokens/s for each where possible"))
    return out


def show_plan(model: str, options: Any, as_json: bool, html: Path | None, published: bool) -> None:
    from jevons.plan.price import make_plan

    if published:
        return _show_published(as_json)
    plan = make_plan(model, options)
    if html is not None:
        from jevons.terminal.plan_page import page

        html.write_text(page(plan, sections(plan)), encoding="utf-8")
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    print_sections(f"{plan['name']}  {plan['architecture']}", sections(plan))
    if html is not None:
        print(f"wrote {html}")


def _show_published(as_json: bool) -> None:
    from dataclasses import asdict

    from jevons.plan.reproduce import figures

    if as_json:
        print(json.dumps([asdict(f) for f in figures()], indent=2))
        return
    rows = [[f.what, f.show.format(f.published), f.show.format(f.computed), f.inputs] for f in figures()]
    print_sections("Published beside computed", [Section("", ["what", "published", "computed", "inputs"], rows)])


def print_sections(title: str, parts: list[Section]) -> None:
    """One column; two where the terminal is wide enough."""
    from rich import box
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def table(part: Section) -> Group:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim", show_edge=False)
        for i, name in enumerate(part.head):
            words = i == 0 or name == "inputs"
            grid.add_column(name, justify="left" if words else "right", no_wrap=not words)
        for row in part.rows:
            strong = row[0] in ("total", "in all", "active a token", "cost", "all") or row[0].startswith("this model")
            grid.add_row(*map(Text, row), style="bold" if strong else None)
        lines = [Text(part.title, style="bold cyan")] if part.title else []
        return Group(*lines, grid, *([Text(part.note, style="dim")] if part.note else []), "")

    console.print(Text(title, style="bold"))
    console.print()
    small = [part for part in parts if len(part.head) < 5 and part.title]
    if console.width >= 110 and small:
        both = Table.grid(padding=(0, 3))
        both.add_row(*(Group(*map(table, half)) for half in (small[::2], small[1::2])))
        console.print(both)
        parts = [part for part in parts if part not in small]
    for part in parts:
        console.print(table(part))
