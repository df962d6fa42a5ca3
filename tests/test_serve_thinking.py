"""Control of thinking, several answers, votes, and what users are told of the engine. A live server, a fake engine."""

import json
import random
import re
import socket
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import FakeTokenizer, Live, read_events
from test_serve_live import in_thread

from jevons.chat import ASSISTANT, END_THINK, THINK, ChatError, Renderer, TemplateRenderer, count_votes, final_answer
from jevons.engine.types import Usage
from jevons.serve.schema import ChatRequest
from jevons.tasks.countdown import Countdown
from jevons.terminal.beside import words_of

LONG = "thinking about it " * 50 + "</think>\ndone"
CLOSE = "\n</think>\n"
BODY = {"messages": [{"role": "user", "content": "x"}]}


def texts(choice):
    return choice["message"]["reasoning_content"], choice["message"]["content"]


def joined(events, index=0):
    """(thought, answer, finish reason) of one choice of a stream."""
    choices = [c for e in events for c in e["choices"] if c["index"] == index]
    assert choices[0]["delta"] == {"role": "assistant", "content": None, "reasoning_content": ""}
    finishes = [c["finish_reason"] for c in choices]
    assert finishes[:-1] == [None] * (len(choices) - 1) and finishes[-1], "the finish reason is the choice's last word"
    return *("".join(c["delta"].get(name) or "" for c in choices) for name in ("reasoning_content", "content")), finishes[-1]


# ---- the thought's budget


@pytest.fixture(scope="module")
def live():
    with Live(says=LONG) as live:
        yield live


@pytest.mark.parametrize("budget", [0, 1, 40])
@pytest.mark.parametrize("burst", [1, 3])
def test_a_budget_closes_the_thought_and_the_answer_comes(budget, burst):
    with Live(says=LONG, engine={"burst": burst}) as live:
        reply = live.ask(max_thinking_tokens=budget).json()
        assert texts(reply["choices"][0]) == (LONG[:budget] + "\n", "done") and reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == budget + 2  # the newline and the tag
        assert reply["usage"]["jevons"] == {"thought_closed": "budget", "loop": False, "preempted": 0}
        events = read_events(live.ask(max_thinking_tokens=budget, stream=True).text)
        assert joined(events) == (LONG[:budget] + "\n", "done", "stop")


def test_where_a_budget_comes_from(live):
    said = {"type": "enabled", "budget_tokens": 7}
    cases = [({}, None), ({"max_thinking_tokens": 5}, 5), ({"thinking": said}, 7), ({"thinking": {"type": "enabled"}}, None),
             ({"thinking": {"type": "disabled"}}, 0), ({"thinking": said, "max_thinking_tokens": 7}, 7),
             ({"thinking": {"type": "enabled"}, "max_thinking_tokens": 9}, 9)]
    for fields, budget in cases:
        assert live.ask(**fields, max_tokens=2).status_code == 200
        thinking = live.engine.seen[-1].params.thinking
        assert thinking.max_tokens == budget, fields
        assert FakeTokenizer().decode(thinking.close_ids) == CLOSE and thinking.end_id == FakeTokenizer().special[END_THINK]
    with Live(says=LONG, settings={"max_thinking_tokens": 3}) as other:
        for fields, budget in cases:
            other.ask(**fields, max_tokens=2)
            assert other.engine.seen[-1].params.thinking.max_tokens == (3 if budget is None else budget), fields
        assert texts(other.ask().json()["choices"][0]) == (LONG[:3] + "\n", "done")


@pytest.mark.parametrize("fields", [{"max_thinking_tokens": 5}, {"thinking": {"type": "disabled"}}])
def test_a_budget_for_a_model_that_opens_no_thought_is_refused(fields):
    class Plain(Renderer):
        def prompt(self, messages):
            return super().prompt(messages)[:-2]  # neither <think> nor its newline

    with Live(says="hello", settings={"max_thinking_tokens": 3}) as live:
        live.tokenizer.renderer = lambda: Plain(live.tokenizer.encode, live.tokenizer.special)
        error = live.ask(**fields)
        assert error.status_code == 400 and error.json()["error"]["param"] in fields and "opens no thought" in error.text
        assert live.ask(thinking={"type": "enabled"}).json()["choices"][0]["message"]["content"] == "hello"
        assert live.engine.seen[-1].params.thinking is None


TEMPLATES = {  # what a template may show of thoughts -> what closes one
    "{% for m in messages %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% endfor %}<｜Assistant｜>{{ '<think>\n' }}": "\n</think>\n\n",
    "{% for m in messages %}{{ m.reasoning_content }} </think> {{ m.content }}{% endfor %}<think>": " </think> ",
    "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}<｜Assistant｜>{{ '<think>\n' }}": "\n</think>\n\n",
    "{% for m in messages %}{{ m.content }}{% endfor %}<｜Assistant｜><think>": "</think>",
    "{% if messages[-1].role != 'user' %}{{ raise_exception('user last') }}{% endif %}"
    "<｜Assistant｜>{{ '<think>\n' }}": "\n</think>\n\n",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_thought_is_closed_as_its_template_writes(template):
    tokenizer = FakeTokenizer()
    renderer = TemplateRenderer(template, tokenizer.encode, lambda text: tokenizer.script(text)[:-1], tokenizer.special,
                                {text: tokenizer.special[text] for text in (THINK, END_THINK, ASSISTANT)}, {}, "here")
    ids = renderer.close_thought()
    assert tokenizer.decode(ids) == TEMPLATES[template] and ids.count(tokenizer.special[END_THINK]) == 1
    tokenizer.special[END_THINK] = -1
    with pytest.raises(ChatError, match="</think>"):
        renderer.close_thought()


def test_a_thought_is_closed_as_worked_solutions_are():
    tokenizer = FakeTokenizer()
    renderer = tokenizer.renderer()
    worked = renderer.completion(f"it is so\n{END_THINK}\n42")
    close = renderer.close_thought()
    at = worked.index(tokenizer.special[END_THINK])
    assert worked[at - 1 : at + 2] == close


def test_closing_words_are_those_of_thoughts_that_found_nothing():
    """By a flag, else the task's own, and Countdown's are really how its worked solutions end."""
    task, rng = Countdown(authors={"hasty": 1.0}), random.Random(random.random())
    assert [words_of(task, None), words_of(task, "so"), words_of(None, None), words_of(object(), "")] == ["guess", "so", "", ""]
    problems = [task.sample(rng) for _ in range(60)]
    ends = {task.trace(problem, rng).partition(END_THINK)[0].splitlines()[-1] for problem in problems}
    assert {end for end in ends if not end.endswith(" yes")} == {"guess"}
    with Live(says=LONG, settings={"closing_words": "guess"}) as live:
        assert texts(live.ask(max_thinking_tokens=8).json()["choices"][0]) == ("thinking\nguess\n", "done")


# ---- answer now


def streaming(live, **fields):
    return httpx.stream("POST", live.url + "/v1/chat/completions", json=BODY | {"stream": True} | fields, timeout=30)


def answer_now(live, completion_id, **more):
    return httpx.post(f"{live.url}/v1/chat/completions/{completion_id}/answer_now", **more)


BESIDE = {"owned": False, "settings": {"grace": 0.05, "keep_alive": 0.05}}  # the test pumps; the id comes before any token


@pytest.mark.parametrize("n", [1, 3])
def test_answer_now_during_a_stream(n):
    with Live(says=LONG, **BESIDE) as live:
        with streaming(live, n=n) as response:
            completion_id = response.headers["x-request-id"]
            assert live.wait(lambda: live.host.counts() == (0, n), 5)
            live.host.pump(max_steps=10)
            for reply in [answer_now(live, completion_id) for _ in range(2)]:
                assert reply.status_code == 200 and reply.json()["closes_thought"] and reply.json()["id"] == completion_id
            live.host.pump()
            events = read_events("".join(response.iter_text()))
        assert {event["id"] for event in events} == {completion_id}
        for index in range(n):
            assert joined(events, index) == (LONG[:10] + "\n", "done", "stop")
        assert events[-1]["usage"]["jevons"]["thought_closed"] == "asked"
        assert sorted(live.engine.asked) == sorted(r.request_id for r in live.engine.seen)
        gone = answer_now(live, completion_id)
        assert gone.status_code == 404 and set(gone.json()["error"]) == {"message", "type", "param", "code"}
        assert answer_now(live, "chatcmpl-unknown").status_code == 404 and answer_now(live, "%00").status_code == 404


@pytest.mark.parametrize("loading", [False, True])
def test_answer_now_waits_for_a_request_that_waits(loading):
    """Asked before the engine has room, or a model is there at all, it holds from the thought's beginning."""
    with Live(says=LONG, engine={"max_waiting": 1}, **BESIDE) as live:
        engine = live.engine
        if loading:
            live.host.set_engine(None)
        else:
            full = in_thread(lambda: live.ask(max_tokens=50))
            assert live.wait(lambda: live.host.counts() == (0, 1), 5)
            live.host.pump(max_steps=0)
        with streaming(live) as response:
            assert answer_now(live, response.headers["x-request-id"]).json()["closes_thought"]
            live.host.set_engine(engine, "tiny") if loading else None
            assert live.wait(lambda: live.host.counts()[1] == 1 + (not loading), 5)
            live.host.pump()
            assert joined(read_events("".join(response.iter_text())))[:2] == ("\n", "done")
        assert engine.asked == [engine.seen[-1].request_id]
        assert loading or texts(full().json()["choices"][0]) == (LONG[:50], ""), "others think on"


def test_answer_now_after_the_thought():
    with Live(says="a</think>" + "b" * 300, **BESIDE) as live:
        with streaming(live) as response:
            assert live.wait(lambda: live.host.counts() == (0, 1), 5)
            live.host.pump(max_steps=5)
            text, pieces = "", response.iter_text()
            while '"content":"b' not in text:
                text += next(pieces)
            reply = answer_now(live, response.headers["x-request-id"])
            assert reply.status_code == 200 and not reply.json()["closes_thought"]


def test_answer_now_needs_the_key():
    import hashlib

    with Live(says=LONG, settings={"api_key_hashes": [hashlib.sha256(b"k").hexdigest()]}) as live:
        assert answer_now(live, "x").status_code == 401
        assert answer_now(live, "x", headers={"Authorization": "Bearer k"}).status_code == 404


# ---- the loop guard


def test_the_loop_guard_is_on_and_can_be_switched_off():
    with Live(says="a" * 100 + "</think>b") as live:
        reply = live.ask().json()
        assert texts(reply["choices"][0]) == ("a" * 40 + "\n", "b") and reply["usage"]["jevons"]["thought_closed"] == "loop"
        reply = live.ask(loop_guard=False).json()
        assert texts(reply["choices"][0]) == ("a" * 100, "b") and reply["usage"]["jevons"]["thought_closed"] is None
    with Live(says="a</think>" + "b" * 100) as live:
        reply = live.ask().json()
        assert reply["choices"][0]["finish_reason"] == "length" and reply["choices"][0]["message"]["content"] == "b" * 40
        assert reply["usage"]["jevons"] == {"thought_closed": None, "loop": True, "preempted": 0}
        assert live.ask(loop_guard=False).json()["choices"][0]["message"]["content"] == "b" * 100


# ---- several answers


def by_seed(request):
    return f"seed {request.params.seed}</think>answer {request.params.seed}"


@pytest.mark.parametrize("burst", [1, 4])
def test_n_choices_with_seeds_that_follow(burst):
    n, seed = random.randint(2, 16), random.randrange(10**6)
    with Live(says=by_seed, engine={"burst": burst, "cached": 3}) as live:
        reply = live.ask(n=n, seed=seed).json()
        assert [c["index"] for c in reply["choices"]] == list(range(n))
        assert [texts(c) for c in reply["choices"]] == [(f"seed {seed + i}", f"answer {seed + i}") for i in range(n)]
        events = read_events(live.ask(n=n, seed=seed, stream=True, stream_options={"include_usage": True}).text)
        for i in range(n):
            assert joined(events[:-1], i) == (f"seed {seed + i}", f"answer {seed + i}", "stop")
        usage = reply["usage"]
        assert [bool(e.get("usage")) for e in events] == [False] * (len(events) - 2) + [True, True]
        assert events[-1]["choices"] == [] and events[-1]["usage"] | {"cost": 0} == usage | {"cost": 0}
        assert usage["prompt_tokens"] == len(live.engine.seen[0].prompt_ids), "the prompt is counted once"
        assert usage["completion_tokens"] == sum(len(FakeTokenizer().script(by_seed(r))) for r in live.engine.seen[:n])
        assert len(usage["jevons"]["answers"]) == n
        assert live.ledger.recent[0].completion_tokens == usage["completion_tokens"] and live.ledger.totals["requests"] == 2
        live.ask(n=2, seed=2**63 - 1)
        assert [r.params.seed for r in live.engine.seen[-2:]] == [2**63 - 1, 0]


def test_greedy_choices_are_equal(live):
    choices = live.ask(n=3, temperature=0).json()["choices"]
    assert len({texts(c) for c in choices}) == 1 and len(choices) == 3
    assert all(r.params.temperature == 0 for r in live.engine.seen[-3:])


def test_a_stop_string_ends_one_choice_and_not_the_others():
    says = lambda request: f"t</think>{'STOP' if request.params.seed == 5 else ''} go on for a while"  # noqa: E731
    with Live(says=says, engine={"delay": 0.001}) as live:
        for stream in (False, True):
            live.engine.cancelled.clear()
            reply = live.ask(n=3, seed=4, stop="STOP", stream=stream)
            if stream:
                contents = [joined(read_events(reply.text), i)[1] for i in range(3)]
            else:
                contents = [texts(choice)[1] for choice in reply.json()["choices"]]
            assert contents == [" go on for a while", "", " go on for a while"]
            assert live.engine.cancelled == [live.engine.seen[-2].request_id], "it does not go on in the engine"


@pytest.mark.parametrize("fields", [{"n": 4}, {"votes": 4}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_all(fields, stream):
    with Live(says=LONG, engine={"max_batch": 2, "delay": 0.01}) as live:
        body = json.dumps(BODY | {"stream": stream} | fields).encode()
        with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            assert live.wait(lambda: len(live.engine.running) == 2 and len(live.engine.seen) == 4, 5)
        assert live.wait(lambda: not live.engine.has_work and live.host.counts() == (0, 0), 5)
        assert set(live.engine.cancelled) == {r.request_id for r in live.engine.seen}
        assert live.wait(lambda: live.ledger.totals["requests"] == 1, 5) and live.ledger.recent[0].finish == "cancelled"


def test_answers_that_do_not_all_fit_are_refused_together():
    with Live(owned=False, max_waiting=5) as live:
        first = in_thread(lambda: live.ask(n=3))
        assert live.wait(lambda: live.host.counts() == (0, 3), 5)
        reply = live.ask(n=3)
        assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
        assert live.host.counts() == (0, 3), "none of them was left behind"
        second = in_thread(lambda: live.ask(votes=2))
        assert live.wait(lambda: live.host.counts() == (0, 5), 5)
        never = live.ask(n=6)
        assert never.status_code == 400 and never.json()["error"]["param"] == "n", "trying again would not help"
        live.host.pump()
        assert first().status_code == second().status_code == 200 and len(live.engine.seen) == 5


def test_an_error_is_that_of_its_request_only():
    def poison(request):
        return "the model's logits are not finite" if request.params.seed == 7 else None

    with Live(says=by_seed, engine={"poison": poison}) as live:
        good = in_thread(lambda: live.ask(seed=1))
        reply = live.ask(seed=7)
        assert reply.status_code == 500 and "not finite" in reply.json()["error"]["message"] and good().status_code == 200
        for stream in (False, True):
            reply = live.ask(n=3, seed=6, stream=stream)
            assert reply.status_code == 200
            if stream:
                events = read_events(reply.text)
                assert [joined(events, i)[1:] for i in range(3)] == [("answer 6", "stop"), ("", "error"), ("answer 8", "stop")]
                (failed,) = [c for e in events for c in e["choices"] if c.get("error")]
                assert "usage" in events[-1]
            else:
                choices = reply.json()["choices"]
                assert [c["finish_reason"] for c in choices] == ["stop", "error", "stop"]
                assert [texts(c)[1] for c in choices] == ["answer 6", "", "answer 8"]
                failed = choices[1]
            assert failed["index"] == 1 and "not finite" in failed["error"]["message"]
            assert failed["error"]["type"] == "server_error"
        live.engine.poison = lambda request: "all are damaged"
        reply = live.ask(n=3)
        assert reply.status_code == 500 and "all are damaged" in reply.json()["error"]["message"]
        assert live.host.counts() == (0, 0) and not live.engine.has_work
        assert live.ask(votes=3).status_code == 500


# ---- votes


def test_the_majority_wins():
    answers = ["42", " 42\n", "41", "the answer is \\boxed{ 42 }", "7", "41"]
    with Live(says=lambda r: f"thought {r.params.seed}</think>{answers[r.params.seed - 10]}", engine={"burst": 2}) as live:
        fields = {"votes": 6, "seed": 10}
        reply = live.ask(**fields).json()
        assert len(reply["choices"]) == 1 and texts(reply["choices"][0]) == ("thought 10", "42")
        tally = [("42", 3, [0, 1, 3]), ("41", 2, [2, 5]), ("7", 1, [4])]
        assert reply["votes"] == {"asked": 6, "voted": 6, "winner": "42", "index": 0, "tally": [
            {"answer": answer, "count": count, "share": count / 6, "indices": indices} for answer, count, indices in tally]}
        assert reply["usage"]["completion_tokens"] == sum(len(live.engine.script(r)) for r in live.engine.seen)
        events = read_events(live.ask(**fields, stream=True).text)
        assert joined(events) == ("thought 10", "42", "stop")
        assert events[-1]["votes"] == reply["votes"]
        assert events[-1]["usage"]["completion_tokens"] == reply["usage"]["completion_tokens"]
        assert live.ask(votes=1, seed=12).json()["votes"]["winner"] == "41"


def test_who_may_vote():
    """An answer that was cut off, is empty or failed does not vote; without any vote the first that did not fail is given."""
    says = {0: "never mind", 1: "x</think>" + "b" * 50, 2: "x</think>ok", 3: "x</think>"}
    poison = lambda request: "damaged" if request.params.seed == 4 else None  # noqa: E731
    with Live(says=lambda r: says.get(r.params.seed, "y</think>ok"), engine={"poison": poison}) as live:
        reply = live.ask(votes=6, seed=0, max_tokens=20).json()
        assert reply["votes"]["tally"] == [{"answer": "ok", "count": 2, "share": 2 / 6, "indices": [2, 5]}]
        assert reply["votes"]["voted"] == 2
        assert reply["votes"]["index"] == 2 and reply["choices"][0]["message"]["content"] == "ok"
        reply = live.ask(votes=2, seed=0, max_tokens=20).json()
        assert reply["votes"] == {"asked": 2, "voted": 0, "winner": None, "index": 0, "tally": []}
        assert texts(reply["choices"][0]) == ("never mind", "") and reply["choices"][0]["finish_reason"] == "stop"


def test_a_vote_says_how_far_it_is_while_it_streams():
    settings = {"keep_alive": 0.03, "grace": 0.02, "blank_after": 0.02}
    with Live(says=lambda r: f"{'a' * 20 * (r.params.seed + 1)}</think>b", engine={"delay": 0.005}, settings=settings) as live:
        text = live.ask(votes=3, seed=0, stream=True, loop_guard=False).text
        signs = [line for line in text.split("\n") if line.startswith(":")]
        assert len(signs) > 2 and all(sign.startswith(": keep-alive, ") and sign.endswith(" of 3 answered") for sign in signs)
        done = [int(sign.split()[2]) for sign in signs]
        assert done == sorted(done) and done[-1] >= 1
        assert joined(read_events(text))[1:] == ("b", "stop")
        whole = live.ask(votes=3, seed=0, loop_guard=False)
        assert whole.text.startswith("\n") and whole.json()["votes"]["winner"] == "b"


@pytest.mark.parametrize("text,answer", [
    (" 3 * 7\n +  1 ", "3 * 7 + 1"), ("so \\boxed{1} or \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
    ("\\boxed{never closed", "\\boxed{never closed"),
    ("", ""), ("\\boxed{}", ""),
])
def test_what_an_answer_comes_down_to(text, answer):
    assert final_answer(text) == answer


def test_votes_are_counted_as_they_are_by_hand():
    for _ in range(300):
        answers = [random.choice(["a", "b", " b", "c ", "", None]) for _ in range(random.randrange(9))]
        tally = count_votes(answers)
        plain = [(a or "").strip() for a in answers]
        assert dict(tally) == {v: [i for i, p in enumerate(plain) if p == v] for v in set(plain) - {""}}
        order = [(-len(indices), indices[0]) for _, indices in tally]
        assert order == sorted(order), "most first, then the first to come"


# ---- what users are told


def test_the_documentation_has_every_field(live):
    text = (Path(__file__).resolve().parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    usage = live.ask(n=2).json()["usage"]
    votes = live.ask(votes=2).json()["votes"]
    names = {*ChatRequest.model_fields, *usage, *usage["completion_tokens_details"], *usage["jevons"], *usage["cost"]}
    names |= live.host.stats.keys()
    missing = [name for name in names if not re.search(rf"[`.]{name}\b", text)]
    assert missing == [] and all(f'"{name}"' in text for name in [*votes, *votes["tally"][0]])


def test_usage_tells_of_cache_and_drafts():
    with Live(says="one</think>two", engine={"burst": 3, "cached": 4}) as live:
        usage = live.ask().json()["usage"]
        prompt, tokens = len(live.engine.seen[0].prompt_ids), len(FakeTokenizer().script("one</think>two"))
        assert (usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]) == (4, prompt - 4)
        assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
        details, passes = usage["completion_tokens_details"], -(-tokens // 3)
        assert details["accepted_prediction_tokens"] == tokens - passes
        assert details["rejected_prediction_tokens"] == 2 * passes - (tokens - passes)
        text = httpx.get(live.url + "/metrics").text
        for name, value in [("prompt_tokens_total", prompt), ("cached_tokens_total", 4), ("generated_tokens_total", tokens),
                            ("drafted_tokens_total", 2 * passes), ("accepted_tokens_total", tokens - passes),
                            ("preemptions_total", 0), ("pages_free", 4), ("pages_used", 0), ("speculating", 1)]:
            assert f"\njevons_engine_{name} {float(value)}\n" in text, name
        assert "# TYPE jevons_engine_pages_free gauge" in text and "# TYPE jevons_engine_prompt_tokens_total counter" in text


def test_several_answers_share_what_the_cache_knew_before_them(monkeypatch):
    with Live(says=by_seed) as live:
        found = iter([0, 5, 5])
        monkeypatch.setattr("fake_engine.Speech.usage", lambda speech, cached: Usage(next(found), preempted=1))
        usage = live.ask(n=3).json()["usage"]
        assert usage["prompt_cache_hit_tokens"] == 0 and usage["jevons"]["preempted"] == 3


def test_openai_client_asks_for_all_of_it():
    with Live(says=by_seed) as live:
        client = openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0)
        reply = client.chat.completions.create(model="tiny", messages=BODY["messages"], n=2, seed=3)
        assert [c.message.content for c in reply.choices] == ["answer 3", "answer 4"] and reply._request_id == reply.id
        reply = client.chat.completions.create(model="tiny", messages=BODY["messages"], seed=3,
                                               extra_body={"votes": 3, "max_thinking_tokens": 2})
        assert reply.votes["winner"] == "answer 3" and reply.choices[0].message.reasoning_content == "se\n"
        assert reply.usage.completion_tokens_details.accepted_prediction_tokens == 0
        assert reply.usage.jevons["thought_closed"] == "budget"
