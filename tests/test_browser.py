"""The pages in headless Chromium, against a small server with a made-up model in DeepSeek's stream shape."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from synthetic_metrics import RIGHT, make_lines, write_metrics

from jevons.serve.pages import PageInfo, add_pages

EXAMPLES = [
    "Reach 40 with 3, 7 and 19, each used once.",
    "3 7 19 -> 40",
    "Using the numbers 5, 8 and 12, make 28.",
    "2 4 11 -> 30",
]
TAUGHT = "Countdown: reach a target from three numbers with + - * /, each number used once."
MARKDOWN = """The answer is **2*3*4 + 16 = 40**.

| step | value |
|---|--:|
| `2*3*4` | 24 |
| + 16 | 40 |

In code:

```python
def reach(a: int, b: int) -> int:
    # multiply, then add
    return a * 4 + b  # "40"
```

and as a formula, $x = \\frac{40 - 16}{4}$:

$$\\sum_{k=1}^{n} k = \\frac{n(n+1)}{2}$$

<img src=x onerror="document.title='broken'"> stays text.
"""


def fake_app(metrics: Path | None, delay: float = 0.02, training: str | None = None) -> FastAPI:
    """Questions steer it: "busy" is refused, "break" dies mid-stream, "wait" waits, "long" thinks long, "rich" has Markdown,
    "circles" thinks in circles."""
    app = FastAPI()
    app.state.delay = delay
    app.state.bodies, app.state.busy, app.state.training = [], True, training
    app.state.asked, app.state.refuses = [], False
    info = PageInfo(lambda: "countdown-laptop", lambda: TAUGHT, lambda: EXAMPLES, 0.10, lambda: app.state.training)
    add_pages(app, info, metrics)

    @app.post("/v1/chat/completions")
    async def completions(request: Request):
        body = await request.json()
        app.state.bodies.append(body)
        question = body["messages"][-1]["content"]
        if "busy" in question and app.state.busy:
            error = {
                "message": "Too many questions at once; 64 are waiting.",
                "type": "overloaded",
                "param": None,
                "code": "overloaded",
            }
            return JSONResponse({"error": error}, 503, headers={"Retry-After": "2"})
        completion_id = f"chatcmpl-{len(app.state.bodies)}"
        pieces = stream(question, app.state.delay, lambda: completion_id in app.state.asked, body.get("votes", 0))
        return StreamingResponse(pieces, media_type="text/event-stream", headers={"X-Request-ID": completion_id})

    @app.post("/v1/chat/completions/{completion_id}/answer_now")
    async def answer_now(completion_id: str):
        if not app.state.refuses:
            app.state.asked.append(completion_id)
        return {"id": completion_id, "closes_thought": not app.state.refuses}

    return app


VOTES = {
    "asked": 8,
    "voted": 7,
    "winner": "3*7+19 = 40",
    "index": 1,
    "tally": [
        {"answer": "3*7+19 = 40", "count": 5, "share": 0.625, "indices": [1, 2, 3, 5, 7]},
        {"answer": "19+7*3 <b>" + " and so on" * 20, "count": 1, "share": 0.125, "indices": [0]},
        {"answer": "7-3", "count": 1, "share": 0.125, "indices": [4]},
    ],
}


async def stream(question: str, delay: float, asked=lambda: False, votes: int = 0) -> AsyncIterator[str]:
    def chunk(delta: dict, finish: str | None = None, **more: object) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        data = {"id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **more}
        return f"data: {json.dumps(data)}\n\n"

    for _ in range(30 if "wait" in question else 1):
        yield ": keep-alive\n\n"
        await asyncio.sleep(0.1 if "wait" in question else 0)
    for count in range(votes):
        yield f": keep-alive, {count} of {votes} answered\n\n"
        await asyncio.sleep(0 if asked() else 8 * delay)
    yield chunk({"role": "assistant", "content": None, "reasoning_content": ""})
    thought = re.findall(r"\S+\s*", RIGHT * (12 if "long" in question else 1))
    closed = "loop" if "circles" in question else None
    for index, word in enumerate(thought):
        if asked() and not votes:
            closed, thought = "asked", thought[:index]
            break
        yield chunk({"content": None, "reasoning_content": word})
        await asyncio.sleep(0 if votes else delay)
    if "break" in question:
        return
    answer = re.findall(r"\S+\s*", MARKDOWN if "rich" in question else "3*7+19 = 40")
    for word in answer:
        yield chunk({"content": word, "reasoning_content": None})
        await asyncio.sleep(delay)
    usage = {
        "prompt_tokens": 31,
        "completion_tokens": len(thought) + len(answer),
        "total_tokens": 31 + len(thought) + len(answer),
        "cost": {"seconds": 0.9, "dollars": 0.9 * 0.10 / 3600},
        "prompt_cache_hit_tokens": 24,
        "prompt_cache_miss_tokens": 7,
        "completion_tokens_details": {
            "reasoning_tokens": len(thought),
            "accepted_prediction_tokens": (len(thought) + len(answer)) // 2 if "draft" in question else 0,
            "rejected_prediction_tokens": 3 if "draft" in question else 0,
        },
        "jevons": {"thought_closed": closed, "loop": False, "preempted": 0},
    }
    more = {"votes": VOTES} if votes else {}
    yield chunk({"content": "", "reasoning_content": None}, "stop", usage=usage, **more)
    yield "data: [DONE]\n\n"


# ---- the browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def serving(app):
    """The app on a free port, in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def site(chromium, tmp_path):
    """open(path, **context) -> page, with the app, the metrics file, what the console said and what was asked elsewhere."""
    metrics = tmp_path / "metrics.jsonl"
    app = fake_app(metrics, delay=0.005)
    contexts, said, foreign, renders = [], [], [], []

    def note(request):
        if not request.url.startswith((base, "data:")):
            foreign.append(request.url)
        if request.url.endswith("/ui/render"):
            renders.append(request.post_data_json["text"])

    def open_page(path="/", **options):
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)  # a browser that has just started on a busy machine
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", note)
        page.goto(base + path)
        return page

    with serving(app) as base:
        yield SimpleNamespace(open=open_page, app=app, metrics=metrics, said=said, foreign=foreign, renders=renders)
        for context in contexts:
            context.close()


@pytest.fixture(scope="module")
def module_page(chromium):
    """A page whose modules can be imported and asked directly."""
    with serving(fake_app(None)) as base:
        page = chromium.new_page()
        page.goto(base)
        yield page
        page.close()


def ask(page, text):
    count = page.locator(".turn.assistant").count()
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.locator(".turn.assistant").nth(count).wait_for()
    return page.locator(".turn.assistant").nth(count)


def finished(turn):
    turn.locator(".usage span").first.wait_for()
    return turn


def test_a_question_from_the_examples(site):
    site.app.state.delay = 0.05  # the open thought must be there long enough to be seen on a busy machine
    page = site.open()
    page.locator(".example").first.wait_for()
    assert page.locator(".taught").inner_text() == TAUGHT
    assert page.locator(".example").all_inner_texts() == EXAMPLES
    page.locator(".example").first.click()
    turn = page.locator(".turn.assistant")
    turn.locator("details[open].thinking").wait_for()
    finished(turn)
    assert turn.locator(".markdown").inner_text() == "3*7+19 = 40"
    assert re.fullmatch(r"Thought for [\d.]+ s · \d+ tokens", turn.locator(".label").inner_text())
    assert not turn.locator("details").evaluate("d => d.open")
    turn.locator("summary").click()
    assert turn.locator(".thought-text").inner_text() == RIGHT
    turn.locator(".fold").click()
    assert not turn.locator("details").evaluate("d => d.open")
    assert "tokens/s" in turn.locator(".usage").inner_text() and "$0.000025" in turn.locator(".usage").inner_text()
    page.reload()  # kept in the browser
    page.locator(".turn.assistant .markdown p").wait_for()
    assert page.locator(".turn.user .bubble").inner_text() == EXAMPLES[0]
    assert (site.said, site.foreign) == ([], [])


def test_markdown_streams_block_by_block(site):
    page = site.open()
    turn = finished(ask(page, "rich"))
    turn.locator("math[display=block]").wait_for()
    assert turn.locator("strong").inner_text() == "2*3*4 + 16 = 40"
    assert turn.locator("td").count() == 4 and turn.locator(".hl .k").count() > 0 and turn.locator("img").count() == 0
    with_first = ["The answer".startswith(text[:10]) for text in site.renders]
    assert with_first == sorted(with_first, reverse=True) and not all(with_first), "a finished block is not sent again"
    assert "broken" not in page.title()
    assert (site.said, site.foreign) == ([], [])


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("one\n\ntwo", "one\n\n"),
        ("one\ntwo", ""),
        ("one\n\n", ""),
        ("- a\n\n- b", ""),
        ("- a\n\n  more", ""),
        ("1. a\n\n2. b\n\nafter", "1. a\n\n2. b\n\n"),
        ("```\n\ncode\n\nmore", ""),
        ("```\n\ncode\n```\n\nmore", "```\n\ncode\n```\n\n"),
        ("~~~\n```\n\ncode", ""),
        ("````\n```\n\ncode\n````\n\nx", "````\n```\n\ncode\n````\n\n"),
        ("$$\n\na\n$$\n\nb", "$$\n\na\n$$\n\n"),
        ("$$\n\na", ""),
        ("\\[\n\na", ""),
        ("\\[\n\na\n\\]\n\nb", "\\[\n\na\n\\]\n\n"),
    ],
)
def test_where_the_unfinished_block_begins(module_page, text, finished):
    cut = module_page.evaluate("async text => (await import('/static/markdown.js')).lastBlock(text, 0)", text)
    assert text[:cut] == finished


def test_stop_again_edit_and_branches(site):
    page = site.open()
    turn = ask(page, "long")
    turn.locator(".thought-text").wait_for()
    page.click("#send[aria-label=Stop]")
    turn.get_by_text("You stopped this answer.").wait_for()
    finished(ask(page, "once more"))
    again = page.locator(".turn.assistant").nth(1)
    again.get_by_label("Ask again").click()
    page.get_by_text("2 / 2").wait_for()
    finished(page.locator(".turn.assistant").nth(1))
    page.locator(".turn.user").first.hover()
    page.get_by_label("Edit and ask again").first.click()
    page.get_by_label("Edit your question").fill("another question")
    page.get_by_label("Edit your question").press("Enter")
    finished(page.locator(".turn.assistant").first)
    assert page.locator(".bubble").all_inner_texts() == ["another question"]
    page.get_by_label("Earlier version").first.click()
    assert page.locator(".bubble").all_inner_texts() == ["long", "once more"]
    assert [len(body["messages"]) for body in site.app.state.bodies] == [1, 1, 1, 1]
    page.fill("#search", "another")
    assert page.locator(".conversation").count() == 1
    page.fill("#search", "nowhere in here")
    assert page.locator(".conversation").count() == 0
    assert (site.said, site.foreign) == ([], [])


def test_settings_and_memory_reach_the_request(site):
    page = site.open()
    page.click("[aria-label=Settings]")
    page.fill("#max-tokens", "77")
    page.fill("#max-thinking", "0")
    page.locator("#temperature").fill("1.5")
    page.keyboard.press("Escape")
    page.fill("#question", "one")
    page.press("#question", "Shift+Enter")
    page.type("#question", "two")
    page.press("#question", "Enter")
    finished(page.locator(".turn.assistant"))
    page.get_by_text("Remember earlier turns").click()
    finished(ask(page, "three"))
    first, second = site.app.state.bodies
    assert (first["max_tokens"], first["temperature"], first["stream"], first["model"]) == (
        77,
        1.5,
        True,
        "countdown-laptop",
    )
    assert first["max_thinking_tokens"] == 0 and "votes" not in first
    assert first["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert [m["content"] for m in second["messages"]] == ["one\ntwo", "3*7+19 = 40", "three"]


def test_answer_now_closes_the_thought(site):
    site.app.state.delay = 0.03
    page = site.open()
    turn = ask(page, "long")
    button = turn.get_by_role("button", name="Answer now")
    button.wait_for()
    page.keyboard.press("Shift+Tab")  # back from the question box
    assert button.evaluate("button => button === document.activeElement")
    page.keyboard.press("Enter")
    turn.get_by_text("You asked for the answer; the thought was closed there.").wait_for()
    finished(turn)
    assert site.app.state.asked == ["chatcmpl-1"]
    assert turn.locator(".markdown").inner_text() == "3*7+19 = 40"
    assert not turn.locator(".answer-now").is_visible()
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY", "the focus is not lost with the button"
    page.reload()
    page.get_by_text("You asked for the answer; the thought was closed there.").wait_for()
    site.app.state.refuses = True
    turn = ask(page, "long again")
    turn.get_by_role("button", name="Answer now").click()
    turn.get_by_role("button", name="Answer now", disabled=False).wait_for()  # it was too late: nothing was closed
    page.keyboard.press("Escape")
    turn.get_by_text("You stopped this answer.").wait_for()
    assert not turn.locator(".answer-now").is_visible()
    assert (site.said, site.foreign) == ([], [])


def test_what_the_engine_did_is_said(site):
    page = site.open()
    turn = finished(ask(page, "circles and drafts"))
    assert turn.locator(".notice").inner_text() == "The thought went in circles and was closed."
    usage = turn.locator(".usage").inner_text()
    assert "31 in (24 cached)" in usage and re.search(r"(2\.00|1\.9\d) tokens/pass", usage)
    assert "were right" in turn.locator(".usage span", has_text="tokens/pass").get_attribute("title")
    assert "tokens/pass" not in finished(ask(page, "plain")).locator(".usage").inner_text()


def test_asking_several_times_and_voting(site):
    site.app.state.delay = 0.03
    page = site.open()
    page.select_option("#votes", "8")
    turn = ask(page, "vote")
    turn.get_by_text(re.compile(r"Asking 8 times; \d has|have answered so far")).wait_for()
    turn.get_by_role("button", name="Answer now").click()
    turn.locator(".tally").wait_for()
    finished(turn)
    rows = turn.locator(".tally li")
    assert rows.locator(".count").all_inner_texts() == ["5 of 8", "1 of 8", "1 of 8", "1 of 8"]
    assert rows.first.get_attribute("class") == "winner" and rows.last.inner_text().startswith("no answer")
    assert turn.locator("b").count() == 0, "an answer is text, never HTML"
    width = rows.first.locator("i").evaluate("bar => bar.offsetWidth / bar.parentElement.offsetWidth")
    assert width == pytest.approx(5 / 8, abs=0.02)
    assert turn.locator(".label").inner_text() == "Thought of the answer chosen"
    assert [body.get("votes") for body in site.app.state.bodies] == [8] and site.app.state.asked == ["chatcmpl-1"]
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.reload()
    page.locator(".tally li").first.wait_for()
    assert page.locator("#votes").input_value() == "8"
    assert (site.said, site.foreign) == ([], [])


def test_errors_are_shown_in_place(site):
    page = site.open()
    turn = ask(page, "busy")
    turn.get_by_text("64 are waiting").wait_for()
    assert "wait 2 s" in turn.locator(".notice").inner_text()
    site.app.state.busy = False
    turn.get_by_text("Try again").click()
    finished(page.locator(".turn.assistant"))
    turn = ask(page, "break")
    turn.get_by_text("closed before the answer was complete").wait_for()
    turn.locator("summary").click()
    page.context.set_offline(True)
    turn = ask(page, "anybody?")
    turn.get_by_text("The server does not answer.").wait_for()
    page.locator(".banner.down").wait_for()
    page.context.set_offline(False)
    page.locator(".banner").wait_for(state="hidden")
    turn.get_by_text("Try again").click()
    finished(page.locator(".turn.assistant").last)
    assert site.foreign == []


def test_waiting_for_training(site):
    site.app.state.training = "pretrain, step 7 of 9"
    page = site.open()
    turn = ask(page, "wait")
    turn.get_by_text("answered at the next step (pretrain, step 7 of 9)").wait_for()
    finished(turn)
    assert (site.said, site.foreign) == ([], [])


def test_phone_width_and_themes(site):
    page = site.open(viewport={"width": 390, "height": 780}, color_scheme="dark", has_touch=True)
    finished(ask(page, "rich"))
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.get_by_label("Switch between dark and light").click()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != dark
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_label("Show conversations").click()
    page.locator("#new-chat").click()
    page.locator(".example").first.wait_for()
    write_metrics(site.metrics, pretrain=20, grpo=10)
    page.goto(page.url.split("#")[0].rstrip("/") + "/runs")
    page.locator(".tile").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert (site.said, site.foreign) == ([], [])


def test_live_page_follows_the_metrics_file(site):
    page = site.open("/runs")
    page.get_by_text("No run yet").wait_for()
    lines = make_lines(pretrain=30, grpo=20)
    evals = [line for line in lines if line["kind"] == "eval"]
    steps = [i for i, line in enumerate(lines) if line["kind"] == "step" and line["stage"] == "grpo"]
    cut = steps[7] + 1
    write = lambda part: site.metrics.write_text("".join(json.dumps(line) + "\n" for line in part))  # noqa: E731
    write(lines[:cut])
    page.get_by_text("running grpo").or_(page.get_by_text("no news for")).first.wait_for()
    assert page.locator(".stage.done .stage-name").inner_text().startswith("pretrain")
    curve = page.locator(".chart", has_text="Reward and accuracy").locator(".curve").first
    before = curve.get_attribute("d")
    assert before.count("L") == 7
    write(lines[: steps[5]] + lines[steps[5] + 1 : cut])  # a line less
    page.wait_for_function("d => document.querySelector('.chart .curve').getAttribute('d') !== d", arg=before)
    write(lines)
    page.get_by_text("finished").wait_for()
    assert page.locator(".tile strong").first.inner_text() == f"{100 * evals[-1]['accuracy']:.1f} %"
    assert page.locator("#evals tbody tr").count() == 2 and page.locator(".sample").count() == 4
    assert page.locator(".cells").count() == 4
    page.locator(".plot").first.hover()
    assert page.locator(".cursor").count() > 1
    assert page.locator("#costs tbody tr").count() == 2 * 11, "no row for energy, of which nothing was said"
    used = sum(line["flops"] for line in lines if line["kind"] == "step" and line["stage"] == "grpo")
    costs = page.locator("#costs").inner_text()
    assert f"{float(f'{used / 1e9:.3g}'):g} GFLOP" in costs
    write(lines[: steps[5]] + lines[steps[5] + 1 :])
    page.wait_for_function("t => document.querySelector('#costs').innerText !== t", arg=costs)
    end = steps[-1] + 1
    write(lines[:end] + [{"kind": "rollback", "stage": "grpo", "step": 20, "to_step": 12, "data_from": 12, "data_to": 20}])
    page.get_by_text("grpo: at step 20 back to step 12, and on past the data of steps 12 to 20").wait_for()
    assert page.locator(".chart", has_text="Reward and accuracy").locator(".curve").first.get_attribute("d").count("L") == 11
    assert (site.said, site.foreign) == ([], [])
