"""A bench record as one self-contained page: bars as inline SVG and the tables. No script, light and dark."""

from __future__ import annotations

from html import escape
from typing import Any

from jevons.terminal.bench import NAMES, figures, title
from jevons.terminal.plan import Section
from jevons.terminal.plan_page import STYLE, bars, figure, table


def page(record: dict[str, Any], parts: list[Section]) -> str:
    plots = []
    for what, m in record["measures"].items():
        if what in NAMES:
            found = {name: side[m["figure"]] for name, side in m["sides"].items() if m["figure"] in side}
            rows = [(name, v["median"], figures(v["median"])) for name, v in found.items()]
            spans = ", ".join(f"{name} {figures(v['min'])} to {figures(v['max'])}" for name, v in found.items())
            if rows:
                plots.append(figure(NAMES[what], bars(rows), f"medians of {m['repeat']}; {spans}"))
        elif what == "load":
            rows = [(f"{name} {part}", side[key], f"{figures(side[key])} ms") for name, side in m["sides"].items()
                    if "not_available" not in side
                    for part, key in (("alone", "unloaded_inter_token_ms"), ("p50", "inter_token_p50_ms"),
                                      ("p99", "inter_token_p99_ms"))]
            if rows:
                plots.append(figure("Between tokens at 70 % of capacity", bars(rows), "each side at its own capacity"))
    name, _, what = title(record).partition("  ")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{escape(name)}: measured</title><style>{STYLE}.note {{ white-space: pre-line }}</style><main>"
            f'<h1>{escape(name)}</h1><p class="soft">{escape(what)}; {escape(record["machine"]["cpu"])}</p>'
            f'<div class="flow" style="margin-top: 20px">{"".join(plots)}{"".join(map(table, parts))}</div></main></html>\n')
