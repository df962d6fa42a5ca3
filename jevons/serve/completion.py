"""One chat request: rendered to ids, submitted to the host, its token events made text, its keep-alives, its usage.

It may ask for several answers: `n` gives them all, `votes` the one that most of them agree on. At its end it is booked in
the ledger.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jevons.chat import count_votes
from jevons.engine.types import Request, Thinking, TokenEvent
from jevons.serve.answer import Answer, EngineFailed, thinking_after
from jevons.serve.errors import ApiError, as_api_error
from jevons.serve.host import ModelChanged, TokenStream, Unavailable
from jevons.serve.ledger import Entry
from jevons.serve.schema import ChatRequest, Unsupported

if TYPE_CHECKING:
    from jevons.serve.api import ChatApi


class ChatRun:
    """One chat request, with one answer or several, from its submission to its line in the ledger."""

    def __init__(self, api: ChatApi, body: ChatRequest):
        self.api, self.body, self.conversation = api, body, body.conversation()
        self.id, self.created, self.begin = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), time.monotonic()
        self.model = body.model or api.model_names()[0]  # the engine's own name once it is submitted
        self.stream: TokenStream | None = None
        self.answers: dict[str, Answer] = {}  # by the engine's request ids, in the order of the choices
        self.answer_now = False

    @property
    def ended(self) -> bool:
        return bool(self.answers) and all(answer.finish for answer in self.answers.values())

    def end_thoughts(self) -> bool:
        """Close every thought that is open, now or when it begins; whether there is any."""
        self.answer_now = True
        thinking = [request_id for request_id, answer in self.answers.items()
                    if answer.thinking and self.stream.requests[request_id].params.thinking is not None]
        for request_id in thinking:
            self.api.host.end_thought(request_id)
        return bool(thinking) or not self.answers

    async def deltas(self, first_wait: float) -> AsyncIterator[tuple[int, str, str] | None]:
        """(choice, reasoning, content) as they come, and None whenever nothing came for a while (`first_wait`, then
        settings.keep_alive). Raises EngineFailed when every answer failed. Closing it cancels what still runs."""
        host, wait, limit = self.api.host, first_wait, time.monotonic() + self.api.host.max_wait
        finish = "error"
        self.api.open[self.id] = self
        try:
            while not self.ended:
                try:
                    if self.stream is None:
                        await self._submit(wait)
                    events = await self.stream.get(min(wait, max(0.0, limit - time.monotonic())))
                except TimeoutError:
                    if time.monotonic() >= limit:
                        raise Unavailable(f"no token came within {host.max_wait:g} seconds: the model is loading, "
                                          "training, or busy with others; try again later") from None
                    yield None
                    wait = self.api.settings.keep_alive
                    continue
                except ModelChanged:
                    if any(answer.tokens for answer in self.answers.values()):
                        raise
                    self.stream, self.answers = None, {}
                    continue
                if not any(answer.tokens for answer in self.answers.values()):
                    self.api.ledger.first_token.observe(time.monotonic() - self.begin)
                limit = time.monotonic() + host.max_wait
                for delta in self._feed(events):
                    yield delta
            finish = next((a.finish for a in self.answers.values() if not a.error), "error")
        except (asyncio.CancelledError, GeneratorExit):
            finish = next(iter(self.answers.values())).finish if self.ended else "cancelled"
            raise
        except Exception as error:
            finish = str(as_api_error(error).status_code)
            raise
        finally:
            del self.api.open[self.id]
            self._close(finish)

    def _feed(self, events: Sequence[TokenEvent]) -> Iterator[tuple[int, str, str]]:
        by_request: dict[str, list[TokenEvent]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        for index, (request_id, answer) in enumerate(self.answers.items()):
            if request_id not in by_request or answer.finish:
                continue
            thought, content = answer.feed(by_request[request_id])
            if answer.finish:
                self.api.host.cancel(request_id)  # at a stop string of which the engine does not know
            if self.ended and all(a.error for a in self.answers.values()):
                raise EngineFailed(answer.error)
            if thought or content or answer.finish:
                yield index, thought, content

    async def _submit(self, timeout: float) -> None:
        """Render and submit, once there is a model and a tokenizer. Raises TimeoutError; can be called again."""
        api, host, count = self.api, self.api.host, self.body.samples
        if count > host.max_waiting:
            raise ApiError(400, f"{count} answers do not fit this server's queue, which holds {host.max_waiting}",
                           "votes" if self.body.votes else "n", "invalid_parameter")
        host.check_room(count, api.loading)
        api.loading += count
        try:
            async with asyncio.timeout(timeout):
                while True:
                    epoch, tokenizer = host.epoch, api.tokenizer_getter()
                    if host.ready and tokenizer is not None:
                        break
                    await asyncio.sleep(0.05)
                    host.check_room()
            ids, thinking = await asyncio.to_thread(self._render, tokenizer)
        finally:
            api.loading -= count
        self.model = host.model_name or self.model
        requests = [Request(ids, replace(params, stop_token_ids=tokenizer.stop_ids, thinking=thinking))
                    for params in self.body.sampling()]
        self.answers = {request.request_id: Answer(tokenizer, self.body.stops(), ids) for request in requests}
        self.stream = host.submit(*requests, epoch=epoch)
        if self.answer_now:
            self.end_thoughts()

    def _render(self, tokenizer: Any) -> tuple[list[int], Thinking | None]:
        """The prompt, and how its thought may be closed. Raises Unsupported for a budget where there is none to close."""
        ids = tokenizer.renderer().prompt(self.conversation)
        field, budget = self.body.thinking_budget()
        settings = self.api.settings
        own = settings.max_thinking_tokens if budget is None else budget
        thinking = thinking_after(ids, tokenizer, own, settings.closing_words)
        if thinking is None and budget is not None:
            raise Unsupported(field, f"{field} is not supported here: this model's prompt opens no thought; leave it out")
        return ids, thinking

    def _close(self, finish: str) -> None:
        """Free the engine's slots and book what was used."""
        ledger, stream, answers = self.api.ledger, self.stream, self.answers.values()
        if stream is None:
            ledger.outcomes.labels(finish).inc()
            return
        for request_id in stream.requests:
            self.api.host.cancel(request_id)
        ledger.record(Entry(self.id, time.time(), self.model, len(stream.request.prompt_ids), sum(a.tokens for a in answers),
                            sum(a.reasoning_tokens for a in answers), stream.seconds, ledger.dollars(stream.seconds), finish))

    def usage(self) -> dict[str, Any]:
        """Of all answers together; the prompt, and what the cache knew of it before they came, counted once."""
        answers = list(self.answers.values())
        prompt, tokens = len(self.stream.request.prompt_ids), sum(a.tokens for a in answers)
        cached = min(a.usage.cached_tokens for a in answers)
        accepted = sum(a.usage.accepted_tokens for a in answers)
        own = [{"thought_closed": a.usage.thought_closed, "loop": a.usage.loop, "preempted": a.usage.preempted} for a in answers]
        first = next((each["thought_closed"] for each in own if each["thought_closed"]), None)
        together = {"thought_closed": first, "loop": any(each["loop"] for each in own),
                    "preempted": sum(each["preempted"] for each in own)}
        return {
            "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
            "prompt_cache_hit_tokens": cached, "prompt_cache_miss_tokens": prompt - cached,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "reasoning_tokens": sum(a.reasoning_tokens for a in answers), "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(a.usage.drafted_tokens for a in answers) - accepted},
            "cost": {"seconds": self.stream.seconds, "dollars": self.api.ledger.dollars(self.stream.seconds)},
            "jevons": together if len(own) == 1 else together | {"answers": own},
        }

    def votes(self) -> tuple[int, dict[str, Any]]:
        """The sample whose message wins, and the object that says how the votes fell. Only answers that came to an end of
        their own vote; where there is none, the first that did not fail is given."""
        answers = list(self.answers.values())
        tally = count_votes([a.content if a.finish == "stop" else None for a in answers])
        winner = tally[0][1][0] if tally else next(i for i, a in enumerate(answers) if not a.error)
        votes = [{"answer": final, "count": len(indices), "share": len(indices) / len(answers), "indices": indices}
                 for final, indices in tally]
        return winner, {"asked": len(answers), "voted": sum(vote["count"] for vote in votes),
                        "winner": votes[0]["answer"] if votes else None, "index": winner, "tally": votes}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The server-sent events of a stream, in the order and with the nulls that DeepSeek's service sends. Several choices
        come as they grow; where they vote, the winner alone comes, at the end."""
        begun: set[int] = set()

        def chunk(index: int, delta: dict[str, Any], finish: str | None = None, failed: dict | None = None, **more: Any) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish, **(failed or {})}
            return event(self._reply("chat.completion.chunk", [choice], **more))

        def grow(index: int, thought: str, content: str) -> Iterator[bytes]:
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": None, "reasoning_content": ""})
            if thought:
                yield chunk(index, {"content": None, "reasoning_content": thought})
            if content:
                yield chunk(index, {"content": content, "reasoning_content": None})

        def end(index: int, answer: Answer, **more: Any) -> bytes:
            return chunk(index, {"content": "", "reasoning_content": None}, answer.finish, _failure(answer), **more)

        if self.body.votes:
            async with aclosing(self._to_the_end(self.api.settings.grace)) as waits:
                async for _ in waits:
                    done = sum(bool(answer.finish) for answer in self.answers.values())
                    yield f": keep-alive, {done} of {self.body.votes} answered\n\n".encode()
            winner, votes = self.votes()
            answer = list(self.answers.values())[winner]
            for piece in grow(0, answer.thought, answer.content):
                yield piece
            yield end(0, answer, usage=self.usage(), votes=votes)
        else:
            async with aclosing(self.deltas(self.api.settings.grace)) as deltas:
                async for delta in deltas:
                    if delta is None:
                        yield b": keep-alive\n\n"
                        continue
                    index, answer = delta[0], list(self.answers.values())[delta[0]]
                    for piece in grow(*delta):
                        yield piece
                    if answer.finish and not self.ended:
                        yield end(index, answer)
            yield end(index, answer, usage=self.usage())
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield event(self._reply("chat.completion.chunk", [], usage=self.usage()))
        yield b"data: [DONE]\n\n"

    async def _to_the_end(self, first_wait: float) -> AsyncIterator[None]:
        """Lets all answers come to their ends; yields when a sign of life is due."""
        settings = self.api.settings
        due = self.begin + first_wait
        async with aclosing(self.deltas(min(settings.keep_alive, first_wait))) as deltas:
            async for _ in deltas:
                if time.monotonic() >= due and not self.ended:
                    due = time.monotonic() + settings.keep_alive
                    yield None

    async def whole(self) -> AsyncIterator[bytes]:
        """Blank lines while it takes long, then the completion as one JSON object (which may begin with blank lines)."""
        async with aclosing(self._to_the_end(self.api.settings.blank_after)) as waits:
            async for _ in waits:
                yield b"\n"
        answers, more = list(self.answers.values()), {}
        if self.body.votes:
            winner, more["votes"] = self.votes()
            answers = [answers[winner]]
        choices = [{"index": index, "message": {"role": "assistant", "content": a.content, "reasoning_content": a.thought},
                    "logprobs": None, "finish_reason": a.finish} | _failure(a) for index, a in enumerate(answers)]
        yield dump(self._reply("chat.completion", choices, usage=self.usage(), **more))

    def _reply(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}


def _failure(answer: Answer) -> dict[str, Any]:
    """What a choice that failed beside others says; the whole request failing is another matter (500)."""
    return ApiError(500, answer.error).body if answer.error else {}


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    return b"data: " + dump(value) + b"\n\n"
