"""What clients meet over time: waiting, storms, departures, failures, a model that changes. A live server."""

import asyncio
import json
import socket
import sqlite3
import threading
import time
from collections import Counter

import httpx
import openai
import pytest
from fake_engine import FakeEngine, FakeTokenizer, Live, read_events

from jevons.chat import EOS
from jevons.engine.types import PromptTooLong, QueueFull, Request
from jevons.serve.app import Server, ServeSettings
from jevons.serve.host import EngineHost, ModelChanged, Unavailable
from jevons.serve.ledger import Entry, Ledger

LONG = "thinking about it " * 50 + "</think>done"


def in_thread(call):
    """Run `call` in a thread; the returned function waits for its result."""
    box = []
    thread = threading.Thread(target=lambda: box.append(call()), daemon=True)
    thread.start()

    def result():
        thread.join(30)
        return box[0]

    return result


def test_openai_client():
    with Live(says="because</think>42") as live:
        client = openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0)
        messages = [{"role": "user", "content": "what?"}]
        reply = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
        assert reply.choices[0].message.content == "42" and reply.choices[0].message.reasoning_content == "because"
        assert reply.usage.completion_tokens_details.reasoning_tokens == 8
        thought = answer = ""
        stream = client.chat.completions.create(model="tiny", messages=messages, stream=True,
                                                stream_options={"include_usage": True})
        for chunk in stream:
            for choice in chunk.choices:
                thought += getattr(choice.delta, "reasoning_content", None) or ""
                answer += choice.delta.content or ""
        assert (thought, answer, chunk.choices) == ("because", "42", []) and chunk.usage.total_tokens > 0
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.UnprocessableEntityError):
            client.chat.completions.create(model="tiny", messages=messages, temperature=9)
        with pytest.raises(openai.BadRequestError, match="does not exist"):
            client.chat.completions.create(model="other", messages=messages)


def test_keep_alives_while_nobody_pumps():
    with Live(owned=False, settings={"keep_alive": 0.1, "grace": 0.05, "blank_after": 0.05}) as live:
        whole = in_thread(live.ask)
        assert live.wait(lambda: live.host.counts() == (0, 1), 5)
        with httpx.stream("POST", live.url + "/v1/chat/completions", timeout=10,
                          json={"messages": [{"role": "user", "content": "x"}], "stream": True}) as response:
            assert response.status_code == 200
            text, pumped = "", False
            for piece in response.iter_text():
                text += piece
                if text.count(": keep-alive\n\n") == 3 and not pumped:
                    assert text == ": keep-alive\n\n" * 3
                    pumped = True
                    in_thread(live.host.pump)
        assert pumped and read_events(text)[-1]["choices"][0]["finish_reason"] == "stop"
        reply = whole()
        assert reply.status_code == 200 and reply.text.startswith("\n")
        assert reply.json()["choices"][0]["message"]["content"] == "two"


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_waits_for_ever(stream):
    with Live(owned=False, max_wait=0.4) as live:  # before the status is sent
        reply = live.ask(stream=stream)
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) >= 1
        assert live.host.counts() == (0, 0)
    with Live(owned=False, max_wait=0.4, settings={"keep_alive": 0.1, "grace": 0.1, "blank_after": 0.1}) as live:  # and after
        reply = live.ask(stream=stream)
        assert reply.status_code == 200
        error = read_events(reply.text)[-1]["error"] if stream else reply.json()["error"]
        assert error["code"] == "unavailable"
        assert live.host.pump() == 0


def test_storm():
    """200 clients against a queue of 16: each gets an answer or a clear refusal, and nothing is left behind."""
    with Live(max_waiting=16, engine={"max_batch": 4, "max_waiting": 8, "delay": 0.001}) as live:

        async def storm():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=30) as client:
                bodies = [{"messages": [{"role": "user", "content": f"{i}"}], "stream": i % 2 == 0} for i in range(200)]
                return await asyncio.gather(*(client.post(live.url + "/v1/chat/completions", json=b) for b in bodies))

        replies = asyncio.run(storm())
        statuses = Counter(reply.status_code for reply in replies)
        assert set(statuses) <= {200, 429, 503} and statuses[200] >= 16, statuses
        for reply in replies:
            if reply.status_code != 200:
                assert int(reply.headers["retry-after"]) >= 1 and reply.json()["error"]["message"]
            elif reply.headers["content-type"] == "application/json":
                assert reply.json()["choices"][0]["message"]["content"] == "two"
            else:
                assert "".join(e["choices"][0]["delta"]["content"] or "" for e in read_events(reply.text)) == "two"
        assert live.host.counts() == (0, 0) and live.wait(lambda: not live.engine.has_work, 2)
        assert live.ask().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("settings", [{}, {"keep_alive": 0.05, "grace": 0.05, "blank_after": 0.05}])
def test_a_client_that_leaves_frees_its_slot(stream, settings):
    with Live(says=LONG, engine={"max_batch": 1, "delay": 0.01}, settings=settings) as live:
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            if stream or settings:
                raw.settimeout(5)
                assert raw.recv(100).startswith(b"HTTP/1.1 200")
            assert live.wait(lambda: len(live.engine.running) == 1, 5)
        assert live.wait(lambda: not live.engine.running and live.host.counts() == (0, 0), 1)
        assert live.engine.cancelled == [live.engine.seen[0].request_id]
        assert live.wait(lambda: live.ledger.totals["requests"] == 1, 1) and live.ledger.recent[0].finish == "cancelled"


def test_a_client_that_leaves_while_waiting_leaves_the_queue():
    with Live(owned=False) as live:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(live.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]}, timeout=0.3)
        assert live.wait(lambda: live.host.counts() == (0, 0), 1)
        live.host.pump()
        assert live.engine.seen == []


def test_a_failing_step_is_an_error_of_its_requests_only():
    with Live(says=LONG[-200:], engine={"delay": 0.001}) as live:
        live.engine.failures.append(RuntimeError("boom"))
        reply = live.ask()
        assert reply.status_code == 500 and "boom" in reply.json()["error"]["message"]
        assert live.ask().status_code == 200
        text = ""
        with httpx.stream("POST", live.url + "/chat/completions",
                          json={"messages": [{"role": "user", "content": "x"}], "stream": True}) as response:
            for piece in response.iter_text():
                if not text:
                    live.engine.failures.append(RuntimeError("boom"))
                text += piece
        events = read_events(text)
        assert events[0]["choices"] and "boom" in events[-1]["error"]["message"]
        assert live.host.counts() == (0, 0) and not live.engine.has_work
        assert live.ask().status_code == 200


def test_loading_then_another_model():
    """A request sent while there is no model waits, is rendered for the model that comes, and again for the next."""
    with Live(owned=False) as live:
        other = FakeTokenizer()
        first, live.tokenizer = live.tokenizer, None
        live.host.set_engine(None)
        assert httpx.get(live.url + "/health").json()["status"] == "loading"
        reply = in_thread(lambda: live.ask("what"))
        assert live.wait(lambda: httpx.get(live.url + "/health").json()["waiting"] == 1, 5)
        live.tokenizer = first
        live.host.set_engine(live.engine, "stage-1")
        assert live.wait(lambda: live.host.counts() == (0, 1), 5)
        other.encode = lambda text: [7] * len(text)
        live.tokenizer = other
        next_engine = FakeEngine(lambda request: other.script("new</think>model"), other.special[EOS])
        live.host.set_engine(next_engine, "stage-2")
        assert live.wait(lambda: live.host.counts() == (0, 1), 5)
        live.host.pump()
        reply = reply().json()
        assert reply["choices"][0]["message"]["content"] == "model" and reply["model"] == "stage-2"
        assert live.engine.seen == [] and next_engine.seen[0].prompt_ids.count(7) == len("what") + 1


def test_loading_has_a_bound_and_an_end():
    with Live(owned=False, max_waiting=2, max_wait=1.0) as live:
        live.host.set_engine(None)
        waiting = [in_thread(live.ask) for _ in range(2)]
        assert live.wait(lambda: httpx.get(live.url + "/health").json()["waiting"] == 2, 5)
        assert live.ask().status_code == 429
        assert [reply().status_code for reply in waiting] == [503, 503]


def test_costs_add_up_to_the_engine_s_time(tmp_path):
    path = tmp_path / "ledger" / "usage.sqlite"
    settings = {"dollars_per_hour": 3.6, "ledger_path": path}
    with Live(says="a</think>b", engine={"delay": 0.01, "max_batch": 3}, settings=settings) as live:
        begin = time.perf_counter()
        replies = [in_thread(lambda i=i: live.ask(stream=i == 0)) for i in range(4)]
        replies = [reply() for reply in replies]
        elapsed = time.perf_counter() - begin
        costs = [read_events(r.text)[-1]["usage"]["cost"] if i == 0 else r.json()["usage"]["cost"] for i, r in enumerate(replies)]
        usage = httpx.get(live.url + "/ui/usage").json()
        assert usage["seconds"] == pytest.approx(sum(c["seconds"] for c in costs))
        assert usage["dollars"] == pytest.approx(usage["seconds"] * 3.6 / 3600) and usage["requests"] == 4
        assert 8 * 0.01 <= usage["seconds"] <= elapsed  # two batches of four steps at least; never more than the clock
    rows = sqlite3.connect(path).execute("SELECT SUM(seconds), COUNT(*), MAX(finish) FROM requests").fetchone()
    assert rows == (pytest.approx(usage["seconds"]), 4, "stop")
    again = Ledger(3.6, path)
    assert again.totals["requests"] == 4 and again.totals["dollars"] == pytest.approx(usage["dollars"])
    again._file.execute("DROP TABLE requests")
    again.record(Entry("x", 0.0, "m", 1, 2, 1, 0.5, 0.1, "stop"))  # a file that fails loses its row, nothing else
    assert again.totals["requests"] == 5
    with pytest.raises(OSError, match="ledger"):
        Ledger(0, tmp_path)


def test_port_in_use_is_named():
    with Live() as live:
        port = int(live.url.rpartition(":")[2])
        with pytest.raises(OSError, match=f"port {port} on 127.0.0.1 is in use"):
            Server(live.app, ServeSettings(port=port)).start()
        assert live.ask().status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(live.url + "/health")


# The host by itself.


def collect(stream, after=lambda: None):
    async def read():
        task = asyncio.ensure_future(_list(stream))
        await asyncio.sleep(0)
        await asyncio.to_thread(after)
        return await asyncio.wait_for(task, 10)

    return asyncio.run(read())


async def _list(stream):
    return [event async for event in stream]


def make_host(says="abc", **engine):
    tokenizer = FakeTokenizer()
    engine = FakeEngine(lambda request: tokenizer.script(says), tokenizer.special[EOS], **engine)
    return EngineHost(engine, "m", max_waiting=3), engine


def test_pump_and_iterate():
    host, engine = make_host()
    streams = [host.submit(Request([1, 2])) for _ in range(2)]
    assert host.pump(max_steps=2) == 2 and host.counts() == (2, 0)
    assert host.pump() == 2 and host.pump() == 0
    for stream in streams:
        events = collect(stream)
        assert [e.token_id for e in events[:-1]] == list(b"abc") and events[-1].finish_reason == "stop"
    late = host.submit(Request([1]))
    engine.owner = None
    assert len(collect(late, host.pump)) == 4


def test_submit_refuses_at_once():
    host, engine = make_host(max_len=8)
    with pytest.raises(PromptTooLong, match=r"9 tokens.*8"):
        host.submit(Request([0] * 9))
    with pytest.raises(PromptTooLong):
        host.submit(Request([0] * 8))
    for _ in range(3):
        host.submit(Request([0] * 7))
    with pytest.raises(QueueFull):
        host.submit(Request([0]))
    host.pump()
    with pytest.raises(ModelChanged):
        host.submit(Request([0]), epoch=host.epoch - 1)
    assert len(engine.seen) == 3


def test_a_full_engine_holds_requests_back_in_order():
    host, engine = make_host(max_waiting=1, max_batch=1)
    requests = [Request([i]) for i in range(3)]
    streams = [host.submit(request) for request in requests]
    host.pump()
    assert [r.request_id for r in engine.seen] == [r.request_id for r in requests]
    assert all(collect(stream)[-1].finish_reason == "stop" for stream in streams)


def test_cancel_waiting_and_running():
    host, engine = make_host()
    running = host.submit(Request([1]))
    host.pump(max_steps=1)
    waiting = host.submit(Request([2]))
    for stream in (running, waiting):
        host.cancel(stream.request.request_id)
        assert collect(stream)[-1].finish_reason == "cancelled"
    host.cancel("unknown")
    assert host.pump() == 0 and engine.cancelled == [running.request.request_id] and len(engine.seen) == 1


@pytest.mark.parametrize("by_signal", [False, True])
def test_stop_ends_everything(by_signal):
    host, _ = make_host()
    owner = threading.Thread(target=host.run_forever)
    stream = host.submit(Request([1]))
    if by_signal:
        with host._wake:  # what a signal handler may interrupt
            host.ask_to_stop()
    else:
        host.stop()
    owner.start()
    owner.join(5)
    assert not owner.is_alive()
    with pytest.raises(Unavailable):
        collect(stream)
    with pytest.raises(Unavailable):
        host.submit(Request([1]))


def test_idle_owner_sleeps():
    calls = []

    class Counted(FakeEngine):
        @property
        def has_work(self):
            calls.append(1)
            return bool(self.waiting or self.running)

    tokenizer = FakeTokenizer()
    host = EngineHost(Counted(lambda request: tokenizer.script("abc"), tokenizer.special[EOS]), "m")
    owner = threading.Thread(target=host.run_forever)
    owner.start()
    time.sleep(0.3)
    assert len(calls) < 10
    stream = host.submit(Request([1]))
    assert len(collect(stream)) == 4
    host.stop()
    owner.join(5)
