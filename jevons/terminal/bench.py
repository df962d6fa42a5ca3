"""`jevons bench` for a person: tables in the terminal, JSON, or a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jevons.terminal.plan import Section, print_sections, short

NAMES = {"offline": "many requests, tokens/s", "single": "one stream, tokens/s", "prefill": "prefill, tokens/s",
         "ttft": "first token, ms"}


def show_bench(options: Any, as_json: bool, html: Path | None) -> None:
    from rich.console import Console

    from jevons.bench.run import run

    if html is not None and not html.resolve().parent.is_dir():
        raise ValueError(f"--html {html}: there is no directory {html.parent}")
    console = Console(stderr=True)
    with console.status("starting") as status:
        record = run(options, lambda line: status.update(line))
    if html is not None:
        from jevons.terminal.bench_page import page

        html.write_text(page(record, sections(record)), encoding="utf-8")
    if as_json:
        print(json.dumps(record, indent=2))
        return
    print_sections(title(record), sections(record))
    if html is not None:
        print(f"wrote {html}")


def title(record: dict[str, Any]) -> str:
    model = record["model"]
    kind = "random" if model["random"] else model["architecture"]
    return (f"{model['name']}  {kind}, {short(model['parameters'])} parameters, {short(model['active_parameters'])} active, "
            f"{model['weights']}")


def figures(value: float) -> str:
    """Three of them."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def sections(record: dict[str, Any]) -> list[Section]:
    """The tables of a record, in reading order."""
    measures = record["measures"]
    out = []
    if compared := {what: m for what, m in measures.items() if what in NAMES}:
        out.append(_compared(record, compared))
    if "load" in measures:
        out.append(_load(measures["load"]))
    if "prefix" in measures:
        out.append(_pairs("Prefix cache", measures["prefix"], lambda f: [
            ["prompt, shared", f"{f['prompt_tokens']:,}, {f['shared_tokens']:,} tokens"],
            ["first token without, ms", figures(f["first_token_without_cache_ms"])],
            ["first token with, ms", figures(f["first_token_with_cache_ms"])], ["shorter", f"{f['gain']:.2f}x"],
            ["prompt from the cache", f"{f['cached_share']:.1%}"],
            ["same first tokens", f"{f['same_first_tokens']} of {f['requests']}"]]))
    if "speculation" in measures:
        out.append(_pairs("Speculation, greedy, one stream", measures["speculation"], lambda f: [
            ["tokens/s without, with", f"{figures(f['plain_tokens_per_second'])}, {figures(f['tokens_per_second'])}"],
            ["faster", f"{f['speedup']:.2f}x"], ["as the engine chooses", f"{f['automatic_speedup']:.2f}x"],
            ["tokens a pass", f"{f['tokens_per_pass']:.2f}"], ["drafts accepted", f"{f['acceptance']:.1%}"],
            ["cost of a pass", f"{f['relative_cost_of_a_pass']:.2f}"], ["share of the ideal", f"{f['share_of_ideal']:.1%}"],
            ["identical outputs", f"{f['identical_outputs']} of {f['prompts']}"]]))
    if "deterministic" in measures:
        out.append(_pairs("Each sequence by itself (--deterministic)", measures["deterministic"], lambda f: [
            ["tokens/s without", figures(f["ordinary_tokens_per_second"])],
            ["tokens/s with", f"{figures(f['deterministic_tokens_per_second'])}, {f['cost']:.2f}x slower"],
            ["same text alone, without", f"{f['ordinary_same_alone']} of {f['requests']}"],
            ["same text alone, with", f"{f['deterministic_same_alone']} of {f['requests']}"]]))
    out.append(_machine(record))
    return out


def _compared(record: dict[str, Any], compared: dict[str, Any]) -> Section:
    sides = [name for name in record["sides"] if any(name in m["sides"] for m in compared.values())]
    rows, notes = [], []
    for what, m in compared.items():
        row = [NAMES[what]]
        for name in sides:
            side = m["sides"].get(name, {})
            if m["figure"] not in side:
                row += [""] * (name != "jevons") + ["-"]
                if "not_available" in side:
                    notes.append(f"{name}, {what}: not available, {side['not_available']}.")
                continue
            row.append(figures(side[m["figure"]]["median"]))
            if name != "jevons":
                better = side.get("jevons_is_times_better")
                row.append(f"{better:.2f}x" if better else "")
        rows.append(row)
    head = [""] + [column for name in sides for column in ([name] if name == "jevons" else [name, "ours"])]
    repeats = max(m["repeat"] for m in compared.values())
    notes.insert(0, f"Medians of {repeats} in turns; spread at most {_spread(compared):.0%} of the median."
                    + (" x: how many times better ours is." if len(sides) > 1 else ""))
    for name in sides:
        notes.append(_settings(name, record["sides"][name], compared))
    notes += [f"{name} is absent: {side['absent']}." for name, side in record["sides"].items() if "absent" in side]
    ours = compared.get("single", {}).get("sides", {}).get("jevons", {})
    if share := ours.get("share_of_read_rate"):
        notes.append(f"One stream of ours reads {ours['weights_gb_per_second']:.1f} GB/s of weights, {share:.0%} of the "
                     f"{record['machine']['read_gb_per_second']:.1f} that this machine reads.")
    return Section("Compared", head, rows, "\n".join(notes))


def _spread(compared: dict[str, Any]) -> float:
    spans = [(v["max"] - v["min"]) / v["median"] for m in compared.values() for side in m["sides"].values()
             if (v := side.get(m["figure"]))]
    return max(spans, default=0.0)


def _settings(name: str, about: dict[str, Any], compared: dict[str, Any]) -> str:
    """`llama.cpp v0.5.0: offline threads 2, slots 64; single threads 1.`"""
    each = []
    for what, m in compared.items():
        if settings := m["sides"].get(name, {}).get("settings"):
            words = [v if isinstance(v, str) else f"{k} {'automatic' if v is None else v}" for k, v in settings.items()]
            each.append(f"{what} {', '.join(words)}")
    own = f"{about['weights']}, {about['threads']} threads, its own defaults" if name == "jevons" else about.get("file", "")
    return f"{name} {about['version']}{f' ({own})' if own else ''}" + (f": {'; '.join(each)}" if each else "") + "."


def _load(load: dict[str, Any]) -> Section:
    rows = [("requests/s", "requests_per_second"), ("of a capacity of", "capacity_requests_per_second"),
            ("between tokens, median, ms", "inter_token_p50_ms"), ("between tokens, p99, ms", "inter_token_p99_ms"),
            ("unloaded median, ms", "unloaded_inter_token_ms"), ("first token, median, ms", "first_token_p50_ms"),
            ("first token, p99, ms", "first_token_p99_ms")]
    sides = {name: side for name, side in load["sides"].items() if "not_available" not in side}
    sides |= {f"{name}, no pace": side["without_pace"] for name, side in sides.items() if "without_pace" in side}
    table = [[text, *(figures(side[key]) for side in sides.values())] for text, key in rows]
    table.append(["p99 over unloaded", *(f"{side['p99_over_unloaded']:.2f}x" for side in sides.values())])
    notes = [f"{name}: not available, {side['not_available']}." for name, side in load["sides"].items() if name not in sides]
    notes += [f"{name} at a pace of {pace:g}." for name, side in sides.items() if (pace := side.get("settings", {}).get("pace"))]
    return Section("Under load, 70 % of capacity", ["", *sides], table if sides else [],
                   "\n".join([*notes, "Poisson arrivals; each side at its own capacity."]))


def _pairs(name: str, measure: dict[str, Any], rows: Any) -> Section:
    found = measure["sides"]["jevons"]
    if "not_available" in found:
        return Section(name, ["", "jevons"], [], f"not available: {found['not_available']}")
    return Section(name, ["", "jevons"], rows(found), found.get("of", ""))


def _machine(record: dict[str, Any]) -> Section:
    machine, ours = record["machine"], record["sides"]["jevons"]
    rows = [["cores", str(machine["cores"])], ["memory", f"{machine['memory_gib']:.0f} GiB"], ["torch", ours["torch"]],
            ["cache bytes a token", f"{ours['cache_bytes_per_token']:,.0f}"],
            ["as planned", f"{ours['planned_cache_bytes_per_token']:,.0f}"]]
    if "read_gb_per_second" in machine:
        rows.append(["reads", f"{machine['read_gb_per_second']:.1f} GB/s"])
    return Section("Machine", ["", ""], rows, machine["cpu"])
