"""The terminal's chat, as far as it is more than a loop of questions: what Ctrl-C means while an answer comes."""

import os
import signal

import pytest
from fake_engine import FakeEngine, FakeTokenizer

from jevons.chat import EOS
from jevons.engine.types import SamplingParams
from jevons.terminal.talk import Interrupts, answer

LONG = "thinking about it " * 20 + "</think>\n" + "done " * 20


def talk(says=LONG, max_thinking_tokens=None, words="", press=(), max_tokens=500, **engine):
    """(thought, answer, notes) of one question; Ctrl-C is pressed once when so many pieces came."""
    tokenizer = FakeTokenizer()
    engine = FakeEngine(lambda request: tokenizer.script(says), tokenizer.special[EOS], **engine)
    before, thought, text, pieces = signal.getsignal(signal.SIGINT), "", "", 0
    with Interrupts() as interrupts:
        parts = answer(engine, tokenizer, "hi", SamplingParams(max_tokens, 0.0), max_thinking_tokens, words, interrupts)
        for style, piece in parts:
            pieces += 1
            thought, text = thought + piece * (style == "dim"), text + piece * (style == "bold")
            if pieces in press:
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and not engine.has_work
    return thought, text


def test_an_answer_comes_whole():
    assert talk() == (LONG.partition("</think>")[0], "done " * 20)


def test_ctrl_c_in_a_thought_asks_for_the_answer():
    thought, text = talk(press=(20,), words="guess")
    assert thought.endswith("\nguess\n\n(the thought was closed when you asked)") and LONG.startswith(thought.partition("\n")[0])
    assert len(thought) < 100 and text == "done " * 20


@pytest.mark.parametrize("press", [(20, 60), (20, 22), (2 * LONG.index("</think>") + 30,)])
def test_ctrl_c_again_or_in_the_answer_ends_it(press):
    thought, text = talk(press=press)
    assert thought.endswith("\n(stopped)") and len(text) < len("done " * 20)


def test_a_budget_and_a_loop_are_said():
    assert talk(max_thinking_tokens=8) == ("thinking\n\n(the thought was closed at its limit)", "done " * 20)
    assert talk(says="a" * 99 + "</think>b")[0].endswith("(the thought went in circles and was closed)")
    assert talk(says="a</think>" + "b" * 99) == ("a\n(the answer went in circles and was ended)", "b" * 40)


def test_what_fails_is_raised():
    with pytest.raises(ValueError, match="damaged"):
        talk(poison=lambda request: "a weight is damaged")
