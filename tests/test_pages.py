"""Markdown to safe HTML, and the routes that feed the pages."""

import json
import random
import re
import string
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_metrics import make_lines

from jevons.serve.pages import MAX_RENDER, STATIC, PageInfo, add_pages
from jevons.serve.render import render_markdown

SAFE = set(
    "p br hr h1 h2 h3 h4 h5 h6 em strong s a ul ol li blockquote pre code span div table thead tbody tr th td".split()
)


class Audit(HTMLParser):
    """Collects what a browser would act on: foreign tags, handlers, styles, schemes."""

    def __init__(self, html):
        super().__init__()
        self.bad = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        mathml = re.fullmatch(r"math|m[a-z]+", tag)
        if tag not in SAFE and not mathml:
            self.bad.append(tag)
        for name, value in attrs:
            if name.startswith("on") or name in ("style", "src", "srcset", "formaction", "xlink:href", "id", "name"):
                self.bad.append(f"{tag} {name}")
            if name == "href" and not re.match(r"https?://|mailto:|[/#.\w%?-]+(?!.*:)", value or ""):
                self.bad.append(f"{tag} {name}={value}")


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html,<script>1</script>)",
    "![x](https://evil.example/track.png)",
    "<svg/onload=alert(1)>",
    "$\\text{<script>alert(1)</script>}$",
    "$\\href{javascript:alert(1)}{x}$",
    "$\\style{background:url(//evil)}{x}$",
    '$\\class{x" onclick="alert(1)}{y}$',
    '```x"><script>alert(1)</script>\n1\n```',
    "```html\n<script>alert(1)</script>\n```",
    '<https://e.com/"onclick=alert(1)>',
    '[a](<https://e.com" onclick="alert(1)>)',
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "|a|\n|---|\n|<iframe src=//evil>|",
    "[x]: javascript:alert(1)\n\n[x]",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "$\\text{<!--}$ x <!-- y -->",
    "vbscript:x [y](vbscript:x)",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_a_browser_would_act_on(text):
    html = render_markdown(text)
    assert Audit(html).bad == [], html
    assert "<script" not in html and "<img" not in html


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *ATTACKS,
                "*",
                "$",
                "$$",
                "\\(",
                "\\)",
                "`",
                "```\n",
                "\n\n",
                "> ",
                "- ",
                "|",
                "2*3",
                "<",
                ">",
                '"',
                "&",
                "_",
                "[",
                "]",
                "(",
                ")",
                "\x00",
                "\ud800",
            ]
        ),
        max_size=14,
    ).map("".join)
)
def test_nothing_in_any_mixture_either(text):
    html = render_markdown(text)
    assert Audit(html).bad == [], html


@pytest.mark.parametrize(
    "text",
    [
        "3*7+19 = 40",
        "2*3*4",
        "(3+4)*2*(5)",
        "a*b*c",
        "3* 4* 5 *6 = 2* 3",
        "2**3**4",
        "10-3*(2+1)*4",
        "5 * 6 * 7",
        "2*3*4 + 5*6*7",
    ],
)
def test_multiplication_is_no_emphasis(text):
    assert render_markdown(text) == f"<p>{text}</p>\n"


def test_any_product_stays_as_it_is():
    parts = [random.choice(["(1+2)", *map(str, range(30))]) for _ in range(random.randint(2, 6))]
    text = "*".join(parts) + f" = {random.randrange(100)}"
    assert render_markdown(text) == f"<p>{text}</p>\n"


def test_markdown_code_and_math():
    html = render_markdown(
        "**bold** *it* `x*y*z` and $\\frac{1}{2}$ for $5 or $6\n\n| a | b |\n|--|--:|\n| 1 | 2 |\n\n"
        "```python\nx = 'a'\n```\n\n$$\na\n= b\n$$\n\n\\[c_1\\] \\(d\\)"
    )
    for part in (
        "<strong>bold</strong>",
        "<em>it</em>",
        "<code>x*y*z</code>",
        "<mfrac>",
        "for $5 or $6",
        '<td class="right">2</td>',
        '<span class="s1">',
        'display="block"',
        "<msub>",
    ):
        assert part in html, part
    assert "<h1>" not in html and "<em>y" not in html


@pytest.mark.parametrize(
    "formula", ["\\frac{", "{{{{", "a^b^c", "\\left(", "}", "\\begin{matrix}", "x" * 5000, "{" * 900]
)
def test_a_bad_formula_shows_its_source(formula):
    assert formula[:3] in re.sub(r"<[^>]*>", "", render_markdown(f"${formula}$"))


@pytest.mark.parametrize(
    "text",
    ["[" * 60000, "$a " * 20000, "\\(" * 30000, "*a " * 20000, "> " * 30000, "```python\n" + "'" * 60000, "- " * 30000],
)
def test_long_nonsense_is_rendered(text):
    assert render_markdown(text)


# ---- routes


def client(metrics=None, **info):
    app = FastAPI()
    values = (
        dict(
            model=lambda: "m", taught=lambda: "t", examples=lambda: ["q"], dollars_per_hour=0.25, training=lambda: None
        )
        | info
    )
    add_pages(app, PageInfo(**values), metrics)
    return TestClient(app)


def test_pages_and_files_need_nothing_from_elsewhere():
    web = client()
    for path in ("/", "/runs"):
        reply = web.get(path)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/html")
        assert "script-src 'self';" in reply.headers["content-security-policy"]
        for wanted in re.findall(r'(?:src|href)="(/static/[^"]+)"', reply.text):
            assert web.get(wanted).status_code == 200, wanted
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), file.name
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert (STATIC / module).is_file()


def test_static_types_tags_and_no_other_file():
    web = client()
    for name, kind in (("chat.js", "text/javascript"), ("base.css", "text/css"), ("icon.svg", "image/svg+xml")):
        reply = web.get(f"/static/{name}")
        assert reply.headers["content-type"].startswith(kind) and reply.headers["cache-control"] == "no-cache"
        assert web.get(f"/static/{name}", headers={"If-None-Match": reply.headers["etag"]}).status_code == 304
    for name in (
        "../pages.py",
        "..%2Fpages.py",
        "%2e%2e%2fpages.py",
        "nothing.js",
        "",
        "%2e%2e",
        "%2Fetc%2Fpasswd",
        "a%00.js",
        "x" * 5000 + ".js",
    ):
        assert web.get(f"/static/{name}").status_code == 404, name


def test_render_limits_and_errors():
    web = client()
    assert web.post("/ui/render", json={"text": "*hi*"}).json() == {"html": "<p><em>hi</em></p>\n"}
    assert web.post("/ui/render", content=b'{"text": "\\ud800"}').status_code == 200
    assert web.post("/ui/render", json={"text": "x" * (MAX_RENDER + 1)}).status_code == 413
    assert web.post("/ui/render", content=b"x" * (4 * MAX_RENDER)).status_code == 413
    for body in (b"", b"[]", b"{}", b"{", b'{"text": 1}', b'{"text": null}', b"[" * 100_000, b"\xff"):
        assert web.post("/ui/render", content=body).status_code == 400, body[:10]


def test_info():
    web = client(training=lambda: "grpo, step 3 of 40", model=lambda: None)
    assert web.get("/ui/info").json() == {
        "model": None,
        "taught": "t",
        "examples": ["q"],
        "dollars_per_hour": 0.25,
        "training": "grpo, step 3 of 40",
    }


def read_all(web, start=0, mark=""):
    lines = []
    while True:
        reply = web.get("/ui/metrics", params={"from": start, "mark": mark}).json()
        lines, start, mark = ([] if reply["reset"] else lines) + reply["lines"], reply["next"], reply["mark"]
        if start >= reply["size"] or not reply["lines"]:
            return lines, start, mark


def test_metrics_arrive_once_whole_and_in_order(tmp_path):
    path, web = tmp_path / "metrics.jsonl", None
    web = client(path)
    assert web.get("/ui/metrics").json() == {"next": 0, "mark": "", "size": 0, "lines": [], "reset": False}
    lines = make_lines(seed=random.randrange(10**6), pretrain=20, grpo=10)
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    seen, start, mark, written = [], 0, "", 0
    while written < len(data):
        written = min(len(data), written + random.randint(1, 9000))
        path.write_bytes(data[:written])  # as a reader may find it: the last line not whole yet
        more, start, mark = read_all(web, start, mark)
        seen += more
    assert seen == lines


def test_metrics_longer_than_a_reply(tmp_path, monkeypatch):
    monkeypatch.setattr("jevons.serve.pages.MAX_READ", 1000)
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "step", "step": i, "pad": "x" * random.randrange(3000)} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_all(client(path))[0] == lines


def test_metrics_begin_again_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "time.unix": 1}}\n' for i in range(40)))
    web = client(path)
    _, start, mark = read_all(web)
    path.write_text("".join(f'{{"step": {i}, "time.unix": 1}}\n' for i in range(30)))
    reply = web.get("/ui/metrics", params={"from": start, "mark": mark}).json()
    assert reply["reset"] and [line["step"] for line in reply["lines"]] == list(range(30))
    path.write_text(
        "".join(f'{{"step": {i}, "time.unix": {1 if i < 20 else 2}}}\n' for i in range(90))
    )  # cut, and past the old end again
    reply = web.get("/ui/metrics", params={"from": reply["next"], "mark": reply["mark"]}).json()
    assert reply["reset"] and len(reply["lines"]) == 90


def test_metrics_tolerate_garbage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    junk = "".join(
        random.choices(
            string.printable.replace("\n", "").replace("\r", "").replace("\x0b", "").replace("\x0c", ""), k=50
        )
    )
    path.write_bytes(
        b'{"step": 1, "loss": NaN, "kl": Infinity}\n\xff\xfe\x00\n'
        + ("!" + junk).encode()
        + b'\n[1]\n\n{"step": 2\n'
        + b"[" * 5000
        + b'\n{"step": 3}\n'
    )
    reply = client(path).get("/ui/metrics").json()
    assert reply["lines"] == [{"step": 1, "loss": None, "kl": None}, {"step": 3}]
    assert client(path).get("/ui/metrics?from=-1").status_code == 422
    assert client(path).get(f"/ui/metrics?from={10**30}").status_code == 200
