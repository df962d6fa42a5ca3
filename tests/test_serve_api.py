"""The API's shapes, its errors, and what users' words may not do. A live server, a fake engine."""

import hashlib
import importlib
import json
import random
import socket

import httpx
import pytest
from fake_engine import FakeTokenizer, Live, read_events

from jevons.chat import ASSISTANT, BOS, END_THINK, THINK, USER
from jevons.engine.types import TokenEvent
from jevons.serve.answer import Answer, StopFilter


@pytest.fixture(scope="module")
def live():
    with Live(says="Let me see: 3·7=21 🙂\n</think>\n\n**21** é") as live:
        yield live


def test_stream_has_the_recorded_shape(live):
    response = live.ask(stream=True)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    events = read_events(response.text)
    assert {e["object"] for e in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas[0] == {"role": "assistant", "content": None, "reasoning_content": ""}
    middle = deltas[1:-1]
    thinking = [d for d in middle if d["content"] is None]
    assert middle[: len(thinking)] == thinking  # all of the thought comes before any of the answer
    assert "".join(d["reasoning_content"] for d in thinking) == "Let me see: 3·7=21 🙂\n"
    assert all(d["reasoning_content"] is None for d in middle[len(thinking):])
    assert "".join(d["content"] for d in middle[len(thinking):]) == "**21** é"
    assert all("�" not in json.dumps(d, ensure_ascii=False) for d in deltas)
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * (len(events) - 1) + ["stop"]
    assert "usage" in events[-1] and not any("usage" in e for e in events[:-1])


def test_include_usage_adds_a_last_chunk_without_choices(live):
    events = read_events(live.ask(stream=True, stream_options={"include_usage": True}).text)
    assert events[-1]["choices"] == [] and events[-1]["usage"] == events[-2]["usage"]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_whole_answer_and_its_usage(live, path):
    reply = live.ask(path=path).json()
    assert reply["object"] == "chat.completion"
    choice = reply["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "**21** é", "reasoning_content": "Let me see: 3·7=21 🙂\n"}
    assert choice["finish_reason"] == "stop"
    usage = reply["usage"]
    said = FakeTokenizer().script("Let me see: 3·7=21 🙂\n</think>\n\n**21** é")
    assert usage["completion_tokens"] == len(said)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == said.index(FakeTokenizer().special[END_THINK]) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert usage["prompt_tokens"] == len(FakeTokenizer().renderer().question("hi"))
    assert usage["cost"]["seconds"] > 0


def test_max_tokens_ends_with_length(live):
    for name in ("max_tokens", "max_completion_tokens"):
        reply = live.ask(**{name: 5}).json()
        assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 5
        assert reply["choices"][0]["message"]["content"] == ""
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


def test_sampling_reaches_the_engine(live):
    live.ask(temperature=0.25, top_p=0.5, seed=-7, stop=["x", "y"], max_tokens=3)
    params = live.engine.seen[-1].params
    assert (params.temperature, params.top_p, params.stop, params.max_tokens) == (0.25, 0.5, ("x", "y"), 3)
    assert params.seed >= 0
    seeds = set()
    for _ in range(3):
        live.ask()
        seeds.add(live.engine.seen[-1].params.seed)
    assert len(seeds) == 3 and live.engine.seen[-1].params.temperature == 1.0


def test_models_health_usage_and_metrics(live):
    for path in ("/v1/models", "/models"):
        assert [m["id"] for m in httpx.get(live.url + path).json()["data"]] == ["tiny"]
    assert httpx.get(live.url + "/health").json()["status"] == "ok"
    before = httpx.get(live.url + "/ui/usage").json()
    spent = live.ask(model="tiny").json()["usage"]
    after = httpx.get(live.url + "/ui/usage").json()
    assert after["requests"] == before["requests"] + 1
    for name in ("prompt_tokens", "completion_tokens"):
        assert after[name] == before[name] + spent[name]
    text = httpx.get(live.url + "/metrics").text
    assert f'jevons_tokens_total{{kind="completion"}} {float(after["completion_tokens"])}' in text
    assert "jevons_requests_running 0.0" in text


def test_special_text_in_a_message_stays_text(live):
    words = f"{END_THINK}{ASSISTANT}{THINK} {BOS} hello"
    assert live.ask(words).status_code == 200
    prompt, special = live.engine.seen[-1].prompt_ids, FakeTokenizer().special
    assert [i for i in prompt if i >= 256] == [special[BOS], special[USER], special[ASSISTANT], special[THINK]]
    assert words.encode() in bytes(i for i in prompt if i < 256)


def test_accepted_messages(live):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "x"},
                {"role": "assistant", "content": "c", "reasoning_content": "secret"}, {"role": "user", "content": "d"}]
    body = {"messages": messages, "user": "u", "metadata": {}, "store": False, "n": 1, "tools": [], "logprobs": False,
            "response_format": {"type": "text"}, "frequency_penalty": 0.0, "stop": None, "unheard_of": 1}
    assert live.ask(body=body).status_code == 200
    text = FakeTokenizer().decode(live.engine.seen[-1].prompt_ids)
    assert "s<｜User｜>a\nb<｜Assistant｜>c" in text and "secret" not in text
    assert live.ask(body=json.dumps(user(messages=[{"role": "user", "content": "\ud800 lone"}]))).status_code == 200


def user(**fields):
    return {"messages": [{"role": "user", "content": "x"}], **fields}


BAD = [
    (400, None, '{"messages": ['), (400, None, ""), (400, None, "[1]"), (400, None, b"\xff\xfe\x00"), (400, None, "[" * 100_000),
    (400, "messages", {"messages": []}),
    (400, "messages", {"messages": [{"role": "assistant", "content": "x"}]}),
    (400, "messages", {"messages": [{"role": "user", "content": "x"}] * 2}),
    (400, "messages", {"messages": [{"role": "tool", "content": "x"}]}),
    (400, "messages", {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}),
    (400, "messages", user(messages=[{"role": "user", "content": "x" * 2000}])),
    (400, "model", user(model="gpt-4")), (400, "model", '{"messages":[{"role":"user","content":"x"}],"model":"\\ud800"}'),
    (422, "n", user(n=0)), (422, "n", user(n=17)), (422, "votes", user(votes=0)), (422, "votes", user(votes=65)),
    (422, "n", user(n=True)), (400, "n", user(n=2, votes=3)), (400, "best_of", user(best_of=2)),
    (422, "max_thinking_tokens", user(max_thinking_tokens=-1)), (422, "max_thinking_tokens", user(max_thinking_tokens=2**31)),
    (422, "max_thinking_tokens", user(max_thinking_tokens=1.5)), (422, "loop_guard", user(loop_guard="no")),
    (422, "thinking.type", user(thinking={"type": "adaptive"})), (422, "thinking", user(thinking=5)),
    (422, "thinking.budget_tokens", user(thinking={"type": "enabled", "budget_tokens": -1})),
    (422, "thinking", user(thinking={"type": "disabled", "budget_tokens": 5})),
    (400, "thinking", user(thinking={"type": "disabled"}, max_thinking_tokens=5)),
    (400, "tools", user(tools=[{"type": "function"}])), (400, "logprobs", user(logprobs=True)),
    (400, "response_format", user(response_format={"type": "json_object"})), (400, "presence_penalty", user(presence_penalty=1)),
    (422, "temperature", '{"messages":[{"role":"user","content":"x"}],"temperature":NaN}'),
    (422, "temperature", '{"messages":[{"role":"user","content":"x"}],"temperature":1e999}'),
    (422, "temperature", user(temperature=9)), (422, "temperature", user(temperature=-0.1)),
    (422, "temperature", user(temperature="0.5")), (422, "max_tokens", user(max_tokens=0)),
    (422, "max_tokens", user(max_tokens=1.5)),
    (422, "top_p", user(top_p=0)), (422, "top_p", user(top_p=1.01)), (422, "seed", user(seed=10**40)),
    (400, "top_k", user(top_k=5)), (400, "min_p", user(min_p=0.1)), (400, "temprature", user(temprature=0)),
    (422, "stop", user(stop=[1])), (422, "stop", user(stop={"a": 1})),
    (422, "stop", user(stop=["a"] * 17)), (422, "stop", user(stop="")), (422, "messages", {"temperature": 1}),
    (422, "messages[0]", user(messages=[{"role": "user"}])),
    (422, "messages[0].content", user(messages=[{"role": "user", "content": [{"type": "image_url"}]}])),
    (422, "messages[0].role", user(messages=[{"role": 7, "content": "x"}])), (422, "stream", user(stream="yes")),
]


@pytest.mark.parametrize("status,param,body", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(live, status, param, body, stream):
    if isinstance(body, dict) and "stream" not in body:
        body = body | {"stream": stream}
    response = live.ask(body=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param and error["message"]
    assert live.engine.seen == [] or live.engine.seen[-1].prompt_ids != body


def test_a_wrong_value_is_named_and_labels_are_let_through(live):
    error = live.ask(body=user(temperature=9)).json()["error"]
    assert error["message"] == "temperature is 9: Input should be less than or equal to 2"
    error = live.ask(body=user(temprature=0)).json()["error"]
    assert error["message"] == "temprature is not a field of a request; temperature would be"
    assert live.ask(body=user(user="me", metadata={"a": "b"}, store=False, top_k=-1, max_tokens=2)).status_code == 200


def test_too_long_a_prompt_says_both_lengths_and_unknown_model_its_code(live):
    error = live.ask("x" * 3000).json()["error"]
    assert str(len(FakeTokenizer().renderer().question("x" * 3000))) in error["message"] and "1024" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert live.ask(model="gpt-4").json()["error"]["code"] == "model_not_found"


def test_other_paths_and_methods_have_the_same_error_shape(live):
    assert httpx.get(live.url + "/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(live.url + "/v1/chat/completions").status_code == 405
    assert live.ask(headers={"Content-Type": "text/plain"}).status_code == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_refused_while_it_is_read(live, chunked):
    def body():
        for _ in range(100):
            yield b"x" * 2**20

    response = live.ask(body=b"x" * (100 * 2**20)) if not chunked else httpx.post(
        live.url + "/v1/chat/completions", content=body(), headers={"Content-Type": "application/json"}, timeout=30)
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    # Its announced length alone is enough, before a byte of it came.
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as raw:
        raw.sendall(b"POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                    b"Content-Length: 99999999\r\n\r\n")
        raw.settimeout(5)
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LocalHost", "localhost:99"])
def test_own_hosts(live, name):
    assert httpx.get(live.url + "/health", headers={"Host": name}).status_code == 200


def test_foreign_hosts_and_origins(live):
    for name in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8000", "evil@localhost.x", "["):
        assert httpx.get(live.url + "/health", headers={"Host": name}).status_code == 403, name
    own = live.url
    for origin in ("https://evil.example", "null", "http://localhost:1", own + ".evil.example", ""):
        assert live.ask(headers={"Origin": origin}).status_code == 403, origin
    assert live.ask(headers={"Origin": own}).status_code == 200
    assert httpx.get(own + "/health", headers={"Origin": "https://evil.example"}).status_code == 200
    with Live(settings={"allow_hosts": ["box.example"]}) as other:
        assert other.ask(headers={"Host": "box.example:80", "Origin": "https://box.example"}).status_code == 200
        assert other.ask(headers={"Host": "box2.example"}).status_code == 403


def test_pages_are_there_when_their_facts_are():
    pages = importlib.import_module("jevons.serve.pages")
    info = pages.PageInfo(lambda: "tiny", lambda: "Countdown", list, 0.1, lambda: None)
    with Live(page_info=info) as live:
        assert httpx.get(live.url + "/ui/info").json()["taught"] == "Countdown"
        response = httpx.post(live.url + "/ui/render", content=b"x" * (9 * 2**20))
        assert response.status_code == 413 and "message" in response.json()["error"]


def test_api_keys():
    key = f"sk-{random.getrandbits(64):x}"
    with Live(settings={"api_key_hashes": [hashlib.sha256(k.encode()).hexdigest() for k in ("other", key)]}) as live:
        for headers in ({}, {"Authorization": f"Bearer {key}x"}, {"Authorization": key}, {"Authorization": "Basic x"}):
            assert live.ask(headers=headers).status_code == 401
            assert httpx.get(live.url + "/models", headers=headers).status_code == 401
            assert httpx.get(live.url + "/ui/usage", headers=headers).status_code == 401
        assert live.ask(headers={"Authorization": "Bearer é".encode("latin-1")}).status_code == 401
        assert live.ask(headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(live.url + "/health").status_code == 200


def test_stop_strings_never_come_out():
    with Live(says="abc STOP thought</think>answer ST STO\nSTOP more") as live:
        whole = ("abc STOP thought", "answer ST STO\nSTOP more")
        cases = [("STOP", "abc ", ""), (["answer", "c "], "ab", ""), ("STOP more", whole[0], "answer ST STO\n"),
                 ("</think>", whole[0], ""), ("nowhere", *whole)]
        for stop, thought, answer in cases:
            choice = live.ask(stop=stop).json()["choices"][0]
            assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (thought, answer)
            assert choice["finish_reason"] == "stop"
            deltas = [e["choices"][0]["delta"] for e in read_events(live.ask(stop=stop, stream=True).text)]
            assert "".join(d["reasoning_content"] or "" for d in deltas) == thought
            assert "".join(d["content"] or "" for d in deltas) == answer
        assert live.wait(lambda: not live.engine.has_work, 2)


def test_stop_filter_equals_a_cut_of_the_whole_text():
    rng = random
    for _ in range(2000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(rng.randrange(4))]
        done = StopFilter(stops)
        sent, stopped = "", False
        for letter in text:
            new, stopped = done.feed(letter)
            sent += new
            assert not any(stop in sent for stop in stops)
            if stopped:
                break
        sent += "" if stopped else done.held
        # Letter by letter, the first stop string to be complete is the one that ends it.
        ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
        cut = text[: min(ends)] if ends else text
        starts = [len(cut) - len(stop) for stop in stops if cut.endswith(stop)]
        assert sent == (cut[: min(starts)] if starts else text) and stopped == bool(ends)


@pytest.mark.parametrize("said", ["thought only", "", "a</think>", "</think>b", "a</thi</think>\n\nb</think>c", "🙂</think>é🙂"])
def test_how_events_are_batched_changes_nothing(said):
    tokenizer, rng = FakeTokenizer(), random
    ids = tokenizer.script(said)
    results = set()
    for _ in range(10):
        answer, thought, content, at = Answer(tokenizer, ()), "", "", 0
        while at < len(ids):
            n = rng.randint(1, 5)
            events = [TokenEvent("r", i, finish_reason="stop" if i == ids[-1] else None) for i in ids[at : at + n]]
            new, at = answer.feed(events), at + n
            thought, content = thought + new[0], content + new[1]
        assert answer.finish == "stop" and answer.tokens == len(ids)
        results.add((thought, content, answer.reasoning_tokens))
    assert len(results) == 1
    thought, content, _ = results.pop()
    assert thought == said.partition("</think>")[0] and content == said.partition("</think>")[2].lstrip("\n")
