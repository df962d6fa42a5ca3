"""Markdown with code and math to sanitised HTML: markdown-it-py, Pygments, latex2mathml (MathML), nh3.

Raw HTML in the source is shown as text. Everything passes nh3 at the end, each formula once more on its own, so that no
library's slip reaches the page. Images are dropped: the page asks nobody else for anything.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

MAX_CODE, MAX_FORMULA = 20_000, 2_000  # longer ones are shown plain: both libraries are slower than linear on some inputs
_MATH_TAGS = set("math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd "
                 "mstyle mpadded mphantom menclose mmultiscripts mprescripts".split())
_TAGS = _MATH_TAGS | set("p br hr h1 h2 h3 h4 h5 h6 em strong s a ul ol li blockquote pre code span div table thead tbody tr "
                         "th td".split())
_ATTRIBUTES = {
    "a": {"href", "title"}, "ol": {"start"}, "span": {"class"}, "div": {"class"}, "pre": {"class"}, "code": {"class"},
    "th": {"class"}, "td": {"class"}, "math": {"display", "xmlns"},
    "mo": {"stretchy", "fence", "separator", "form", "lspace", "rspace", "minsize", "maxsize", "movablelimits", "accent"},
    "mi": {"mathvariant"}, "mn": {"mathvariant"}, "mtext": {"mathvariant"}, "mspace": {"width", "linebreak"},
    "mfrac": {"linethickness"}, "mstyle": {"displaystyle", "scriptlevel"}, "mtable": {"columnalign", "rowspacing", "columnlines"},
    "mtd": {"columnalign"}, "mover": {"accent"}, "munder": {"accentunder"}, "menclose": {"notation"}, "mpadded": {"width"},
}
_CLASS = re.compile(r"[a-z0-9 -]{0,60}\Z")  # what Pygments and this file write
_CLOSERS = {"$$": "$$", r"\[": r"\]", r"\(": r"\)", "$": "$"}


def _clean(html: str) -> str:
    def keep(tag: str, name: str, value: str) -> str | None:
        return value if name != "class" or _CLASS.match(value) else None

    return nh3.clean(html, tags=_TAGS, attributes=_ATTRIBUTES, attribute_filter=keep, link_rel="noopener noreferrer nofollow",
                     url_schemes={"http", "https", "mailto"}, clean_content_tags={"script", "style"})


def formula_html(source: str, display: bool) -> str:
    """MathML of a LaTeX formula, or its source in a code element where it cannot be converted."""
    if len(source) <= MAX_FORMULA:
        try:
            html = _clean(convert(source, display="block" if display else "inline"))
            return f'<span class="formula">{html}</span>' if display else html
        except Exception:  # noqa: BLE001 - the converter meets arbitrary text and raises IndexError, RecursionError and more
            pass
    return f'<code class="formula">{escape(source)}</code>'


def code_html(source: str, language: str) -> str:
    """A code block, highlighted by class names where the language is known."""
    body = escape(source)
    if language and len(source) <= MAX_CODE:
        try:
            body = highlight(source, get_lexer_by_name(language, stripnl=False), HtmlFormatter(nowrap=True))
        except ClassNotFound:
            pass
    name = re.sub(r"[^a-z0-9-]", "", language.lower())[:20]
    label = f'<span class="language">{name}</span>' if name else ""
    return f'<div class="code-block">{label}<pre><code class="hl">{body}</code></pre></div>\n'


def _opening(text: str, at: int) -> str:
    return next((mark for mark in _CLOSERS if text.startswith(mark, at)), "")


def _inline_math(state: StateInline, silent: bool) -> bool:
    r"""`$x$`, `$$x$$`, `\(x\)`, `\[x\]`. As in pandoc, `$` opens before a non-space and closes after one, not before a digit."""
    mark = _opening(state.src, state.pos)
    if not mark:
        return False
    start = state.pos + len(mark)
    limit = min(state.posMax, start + MAX_FORMULA)
    end = state.src.find(_CLOSERS[mark], start, limit)
    if mark == "$":
        while end > 0 and state.src[end - 1] == "\\":
            end = state.src.find("$", end + 1, limit)
        if state.src[start: start + 1].isspace() or state.src[end - 1].isspace() or state.src[end + 1: end + 2].isdigit():
            return False
    if end <= start or not state.src[start:end].strip():
        return False
    if not silent:
        token = state.push("math", "math", 0)
        token.content, token.block = state.src[start:end].strip(), mark in ("$$", r"\[")
    state.pos = end + len(_CLOSERS[mark])
    return True


def _block_math(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    r"""`$$ ... $$` or `\[ ... \]` over whole lines, so that a line that begins with `=` or `-` in it is no heading or list."""
    first = state.bMarks[start_line] + state.tShift[start_line]
    mark = _opening(state.src[first: first + 2], 0)
    if mark not in ("$$", r"\[") or state.is_code_block(start_line):
        return False
    end = state.src.find(_CLOSERS[mark], first + 2, min(state.eMarks[end_line - 1], first + MAX_FORMULA))
    if end < 0:
        return False
    line = next(n for n in range(start_line, end_line) if end <= state.eMarks[n])
    if state.src[end + 2: state.eMarks[line]].strip():
        return False
    if not silent:
        token = state.push("math", "math", 0)
        token.content, token.block, token.map = state.src[first + 2: end].strip(), True, [start_line, line + 1]
        state.line = line + 1
    return True


def _arithmetic(state: StateInline, silent: bool) -> bool:
    """Asterisks that multiply stay asterisks: `2*3*4`, `(1+2)*x`, `2**3`, and beside a digit also `3* 4 *5`."""
    text, at = state.src, state.pos
    if text[at] != "*":
        return False
    end = at
    while end < state.posMax and text[end] == "*":
        end += 1
    before, after = text[at - 1: at], text[end: end + 1]
    tight = before.isascii() and after.isascii() and (before.isalnum() or before == ")") and (after.isalnum() or after == "(")
    if tight and end - at == 2:
        tight = not (before.isalpha() or after.isalpha())  # bold inside a word stays bold
    if end - at == 1 and not tight:
        left, right = text[:at].rstrip(" ")[-1:], text[end:].lstrip(" ")[:1]
        tight = left.isdigit() and right.isdigit()
    if not tight or end - at > 2:
        return False
    if not silent:
        state.pending += text[at:end]
    state.pos = end
    return True


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 20}).enable(["table", "strikethrough"])
    md.disable("image")
    md.inline.ruler.before("escape", "math", _inline_math)
    md.inline.ruler.before("emphasis", "arithmetic", _arithmetic)
    md.block.ruler.before("fence", "math", _block_math, {"alt": ["paragraph", "blockquote", "list"]})

    def code(tokens, index, options, env):
        words = tokens[index].info.split()
        return code_html(tokens[index].content, words[0] if words else "")

    def math(tokens, index, options, env):
        html = formula_html(tokens[index].content, tokens[index].block)
        return f"<p>{html}</p>\n" if tokens[index].map else html

    def cell(tokens, index, options, env):
        style = tokens[index].attrs.pop("style", "")
        if style:
            tokens[index].attrs["class"] = str(style).removeprefix("text-align:")
        return md.renderer.renderToken(tokens, index, options, env)

    rules = {"fence": code, "code_block": code, "th_open": cell, "td_open": cell,
             "table_open": lambda *_: '<div class="table"><table>\n', "table_close": lambda *_: "</table></div>\n",
             "math": math}
    md.renderer.rules.update(rules)
    return md


def render_markdown(text: str) -> str:
    """Sanitised HTML of Markdown text. Never raises on any text."""
    try:
        return _clean(_markdown().render(text))
    except Exception:  # noqa: BLE001 - a bug in a parser shows the text plain instead of failing an answer
        return f"<p>{escape(text)}</p>"
