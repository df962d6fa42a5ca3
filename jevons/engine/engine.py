"""The engine: continuous batching over the paged cache. Rollouts and HTTP both use `submit / step / cancel`.

One thread owns it, the one that owns the weights. It reads the model's live parameters: training needs no copy.

The life of a request: `submit` queues it; a `step` admits it, with the pages of a prefix that is known already; its prompt runs
in chunks beside those that decode, and gives its first token; every further step decodes one token for all running ones, or
several where the MTP module drafted them; at eos, a stop string, its limit or `cancel` it leaves, and its pages are free or
cached.

A token is always what its request's seed and its position say (greedy: the best logit), whether it was drafted or not: a draft
is accepted where it is the token that would have come anyway. So speculation changes no text and no distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import accumulate, chain
from typing import Any

import torch

from jevons.engine.disk import DiskTier
from jevons.engine.drafts import Drafts
from jevons.engine.graphs import Graphs, defaults
from jevons.engine.pace import Pace
from jevons.engine.pages import PagePool
from jevons.engine.passes import MIXED, Passes
from jevons.engine.rows import Rows
from jevons.engine.scheduler import Scheduler, Sequence, StopWatcher, in_calls
from jevons.engine.speculation import Speculation
from jevons.engine.types import Completion, Request, TokenEvent
from jevons.model import CausalLM, KVCache
from jevons.plan import count_parameters

PAGE = 32
SMALL = 8_000_000  # parameters; threads that share a smaller model's operations on a CPU cost more than they give
PREFILL_TOKENS = 8192  # prompts run in calls of about this many tokens, padded to the longest of a call
CHUNK = 512  # tokens of prompts that run between two tokens of those that decode


class Engine:
    """`eos_id` ends a sequence. `tokenizer` is needed only for requests with stop strings.

    `prefix_cache`: keep the pages of prompts and answers for those that begin the same; only while the weights do not change.
    `disk` keeps them over restarts. `speculate`: drafts of the MTP module per pass, None to find out what pays (by the clock).
    `pages`: of PAGE tokens each; by default as many as `max_batch` sequences of `max_len` need.
    `pace` (by the clock; None: no clock, prompts in chunks of CHUNK): chunks of prompts are as short as it takes that running
    streams hardly notice them; above 0, no token of theirs takes more than so many lone steps, and further requests wait.
    `deterministic`: every sequence is computed by itself, so that the same request has the same bits in any company.
    `graphs`: decode in steps of static shapes, captured on a GPU; None: there, where the model allows it.
    """

    def __init__(self, model: CausalLM, eos_id: int, max_batch: int = 64, max_len: int = 1024, max_waiting: int = 256,
                 tokenizer: Any = None, cache_dtype: torch.dtype | None = None, pages: int | None = None,
                 prefix_cache: bool = False, disk: DiskTier | None = None, root: bytes = b"", speculate: int | None = 0,
                 pace: float | None = None, deterministic: bool = False, graphs: bool | None = None):
        max_len = min(max_len, model.config.max_position_embeddings)
        self.model, self.eos_id, self.tokenizer, device = model, eos_id, tokenizer, model.embed_tokens.weight.device
        per_sequence = -(-max_len // PAGE)
        pages = max_batch * per_sequence if pages is None else pages
        if deterministic and pace:
            raise ValueError(f"pace {pace}: deterministic computes sequences one by one, at no pace; 0 would be right")
        if deterministic and pages < max_batch * per_sequence:
            raise ValueError(f"pages {pages}: deterministic needs {max_batch * per_sequence}, so that nothing is computed twice")
        pool = PagePool(pages, PAGE, prefix_cache and not deterministic, root)
        self.scheduler = Scheduler(max_batch, max_len, max_waiting, pool)
        self.deterministic, self.disk = deterministic, disk if pool.caching else None
        self.pace = None if pace is None else Pace(pace)
        self._alone = device.type == "cpu" and count_parameters(model.config).total < SMALL
        cache_dtype, graphs = defaults(model, cache_dtype, graphs)
        self.cache = KVCache(model.config, pages + graphs, PAGE, dtype=cache_dtype, device=device)  # one page for padding
        self._caches, self.rows, self.device = [self.cache], Rows(max_batch, per_sequence, device), device
        self.graphs = Graphs(model, self.cache, self.rows, scrap=pages) if graphs else None
        cores = torch.get_num_threads() if self._alone and not deterministic else 1
        self.passes = Passes(model, self.cache, self.rows, self.graphs, cores)
        self.drafts: Drafts | None = None
        if model.mtp and speculate != 0 and not deterministic:
            cache = KVCache(model.config, pages, PAGE, layers=1, dtype=cache_dtype, device=device)
            self.drafts = Drafts(model, self.rows, Speculation(speculate), cache)
            self._caches.append(cache)
        self._events: list[TokenEvent] = []  # for the next step to hand out
        self._begun = 0.0  # when the step began: what drafts save is saved of all of it
        self._counts = dict.fromkeys((f"{kind}_tokens" for kind in ("prompt", "cached", "drafted", "accepted", "generated")), 0)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._events)

    @property
    def max_len(self) -> int:
        return self.scheduler.max_len

    def submit(self, request: Request) -> str:
        """Queue a request; its id. Raises PromptTooLong, QueueFull, or ValueError for parameters that cannot be run."""
        request.check(self.model.config.vocab_size)
        params = request.params
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need an engine with a tokenizer")
        sequence = self.scheduler.submit(request)
        if params.stop:
            sequence.text = StopWatcher(params.stop, self.tokenizer.decode_stream())
        return request.request_id

    def cancel(self, request_id: str) -> None:
        """End a request; its row and pages are free at once. Unknown or finished ids are ignored."""
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            self._remove(sequence)
            self._events.append(TokenEvent(request_id, None, finish_reason="cancelled", usage=sequence.usage()))

    def end_thought(self, request_id: str) -> None:
        """Close the thought of a request now, so that its answer comes. Unknown ids, and thoughts that are over, are ignored."""
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            sequence.close_thought("asked")

    def stats(self) -> dict[str, float]:
        """Counters since the start, and how the pages are used now."""
        pool, drafting = self.scheduler.pool, self.drafts is not None and self.drafts.speculation.paying
        return self._counts | {"preemptions": self.scheduler.preemptions, "pages_free": pool.free, "pages_cached": pool.cached,
                               "pages_used": pool.used, "speculating": int(drafting), **self.model.expert_counts}

    def close(self) -> None:
        """Finish writing cached pages to the disk."""
        if self.disk is not None:
            self.disk.close()

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Decode for every running sequence, and run a chunk of the prompts that wait."""
        events, self._events, threads, self._begun = self._events, [], torch.get_num_threads(), time.perf_counter()
        begin, generated = self.pace.clock() if self.pace else 0.0, self._counts["generated_tokens"]
        try:
            if self._alone and threads > 1:
                torch.set_num_threads(1)
            if self.scheduler.waiting:
                self._admit()
            more, rows, prompt = self._advance()
        finally:
            if self._alone and threads > 1:
                torch.set_num_threads(threads)
        if self.pace and rows:
            tokens = self._counts["generated_tokens"] - generated
            self.pace.record(rows, prompt, max(1, tokens), self.pace.clock() - begin)
        return events + more

    def generate(self, requests: Seq[Request], on_step: Callable[[], None] | None = None) -> list[Completion]:
        """Run requests to their ends, in any number; completions come in the requests' order.

        Other requests in the engine run along; their events come with the next `step`. Where a request is refused, a
        step fails or `on_step`, called before each, raises, none of these stays behind."""
        done = {r.request_id: Completion(r.request_id, r.prompt_ids) for r in requests}
        pending, unfinished, others = list(reversed(requests)), set(done), []
        try:
            while unfinished:
                while pending and len(self.scheduler.waiting) < self.scheduler.max_waiting:
                    self.submit(pending.pop())
                if on_step is not None:
                    on_step()
                for event in self.step():
                    completion = done.get(event.request_id)
                    if completion is None:
                        others.append(event)
                        continue
                    if event.token_id is not None:
                        completion.token_ids.append(event.token_id)
                        completion.logprobs.append(event.logprob)
                    if event.finish_reason:
                        completion.finish_reason = event.finish_reason
                        completion.usage = event.usage
                        unfinished.discard(event.request_id)
        finally:
            for request_id in unfinished:
                self.cancel(request_id)
            self._events = others + [event for event in self._events if event.request_id not in done]
        return [done[r.request_id] for r in requests]

    # -- a step -------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        def copy(source: int, page: int) -> None:
            for cache in self._caches:
                cache.copy_page(source, page)

        restore, most = self._restore if self.disk is not None else None, self.pace.rows() if self.pace else None
        alone = len(self.scheduler.running) + len(self.scheduler.prefilling) == 0
        for sequence in self.scheduler.admit(lambda s: self.scheduler.adopt_prefix(s, copy, restore), most):
            if not sequence.preempted:
                self._counts["prompt_tokens"] += len(sequence.request.prompt_ids)
                self._counts["cached_tokens"] += sequence.cached_tokens
            if self.drafts is not None:
                # whether drafts pay again is not tried out at the cost of others' pace
                if alone or not most or self.drafts.speculation.paying:
                    self.drafts.admit(sequence)
                else:
                    self.drafts.pop(sequence, None)

    def _advance(self) -> tuple[list[TokenEvent], int, int]:
        """A token or more for all that run, and a chunk of the prompts, in one pass where a pace is to be kept: (events, how
        many rows decoded, tokens of prompts)."""
        for sequence in list(self.scheduler.running):
            more = 1 + len(self.drafts.get(sequence, ())) if self.drafts else 1
            if sequence.row is not None and sequence.computed + more > len(sequence.pages) * PAGE:
                self._grow(sequence)
        running, chunks = list(self.scheduler.running), self._chunks()
        rows, prompt = len(running), sum(count for _, count in chunks)
        if rows and 0 < prompt <= MIXED - rows and self.pace and not (self.graphs or self.deterministic):
            return self._pass(running, chunks), rows, prompt
        events = self._decode(running) if running else []
        for call in in_calls(chunks, PREFILL_TOKENS):
            events += self._pass([], call)
        return events, rows, prompt

    def _chunks(self) -> list[tuple[Sequence, int]]:
        """Who reads how many tokens of its prompt now."""
        prefilling, running = self.scheduler.prefilling, len(self.scheduler.running)
        if self.deterministic:  # chunks that depend on the prompt alone
            return [(s, min(CHUNK, s.goal - s.computed)) for s in prefilling[:1]]
        budget = CHUNK if running else PREFILL_TOKENS
        if running and self.pace and not self.graphs:  # on a GPU a pass of its own costs about the same whatever it holds
            budget = min(CHUNK, self.pace.chunk(running))
        return self.scheduler.plan_prefill(budget)

    def _grow(self, sequence: Sequence) -> None:
        """A page for the next token, at others' cost where none is left, and for its drafts where there is one."""
        held, (room, moves) = len(sequence.pages), self.scheduler.make_room(sequence, 1)
        for source, row in moves:
            self.rows.move(source, row)
        if not room:
            return
        drafts = self.drafts.get(sequence) if self.drafts else None
        if drafts and (more := -(-(sequence.computed + 1 + len(drafts)) // PAGE) - len(sequence.pages)) > 0:
            if (taken := self.scheduler.pool.take(more)) is not None:
                sequence.pages += taken
            else:
                del drafts[len(sequence.pages) * PAGE - sequence.computed - 1 :]
        self.rows.grow(sequence, held)

    def _decode(self, running: list[Sequence]) -> list[TokenEvent]:
        """One token for each of them, or several where there are drafts."""
        if self.drafts and any(sequence in self.drafts for sequence in running):
            return self._pass(running, [])
        events, ended = [], []
        for part in [[sequence] for sequence in running] if self.deterministic else [running]:
            logits, tokens, logprobs = self.passes.next_tokens(part[0].row, part[-1].row + 1)
            for i, (sequence, token, logprob) in enumerate(zip(part, tokens, logprobs, strict=True)):
                sequence.computed += 1
                forced = bool(sequence.forced)
                if self._emit(sequence, token, logprob, logits, i, events):
                    ended.append(sequence)
                elif forced:
                    self.rows.follow(sequence)
        self._end(ended)
        return events

    def _pass(self, running: list[Sequence], chunks: list[tuple[Sequence, int]]) -> list[TokenEvent]:
        """Every running row with its last token and its drafts, beside some tokens of some prompts. A row gives as many tokens
        as drafts were right, and one more; prompts that end give their first, and run from then on."""
        events, ended, fresh, count = [], [], [], len(running)
        drafts = [self.drafts.get(s, []) if self.drafts else [] for s in running]
        given = [[s.tokens[-1], *own] for s, own in zip(running, drafts, strict=True)]
        given += [s.tokens[s.computed : s.computed + more] for s, more in chunks]
        sequences = [*running, *(s for s, _ in chunks)]
        starts, ends, stride = [s.computed for s in sequences], list(accumulate(map(len, given))), 0
        if chunks and running and self.passes.together(given[count:], len(given)):
            for row, (sequence, _) in enumerate(chunks, count):
                self.rows.lend(sequence, row)
            chosen = [end - 1 for (s, more), end in zip(chunks, ends[count:], strict=True)
                      if s.computed + more >= s.goal and not s.produced]
            flat, picked = list(chain(*given)), [*range(ends[count - 1]), *chosen]
            hidden, logits, tokens, logprobs = self.rows.step(self.model, self.cache, 0, flat, list(map(len, given)), starts,
                                                              picked=picked)
            fresh = [(s, end - 1) for (s, more), end in zip(chunks, ends[count:], strict=True) if self._read_on(s, more)]
        elif chunks:
            hidden = self.passes.read(sequences, given)
            fresh = [(s, end - 1) for (s, more), end in zip(chunks, ends[count:], strict=True) if self._read_on(s, more)]
            logits, tokens, logprobs = self._choose(hidden, running, given, fresh)
        else:
            hidden, logits, tokens, logprobs, stride = (self.graphs or self.drafts).verify(running, given, starts, self.cache)
        parts, at = [], 0  # of what was computed, that which counts: (sequence, its first position, how many, the last one's row)
        for sequence, own, start in zip(running, drafts, starts, strict=False):
            accepted = 0
            for i in range(1 + len(own)):
                sequence.computed += 1
                over = self._emit(sequence, tokens[at + i], logprobs[at + i], logits, at + i, events)
                if over or i == len(own) or sequence.tokens[-1] != own[i]:
                    break
                accepted += 1
            if over:
                ended.append(sequence)
            else:
                self.rows.follow(sequence)
                parts.append((sequence, start, accepted + 1, at + accepted))
            sequence.drafted += len(own)
            sequence.accepted += accepted
            self._counts["drafted_tokens"] += len(own)
            self._counts["accepted_tokens"] += accepted
            at += stride or 1 + len(own)
        for i, (sequence, _) in enumerate(fresh):
            if self._emit(sequence, tokens[at + i], logprobs[at + i], logits, at + i, events):
                ended.append(sequence)
            else:
                self.rows.follow(sequence)
        passed = time.perf_counter() - self._begun
        if self.drafts:
            parts += [(s, s.computed - more, more, end - 1) for (s, more), end in zip(chunks, ends[count:], strict=True)
                      if s not in ended]
            self.drafts.make(hidden, parts, len(self.scheduler.running))
        if not chunks:
            asked = max(map(len, drafts))
            # without drafts, what the module does is for a comparison
            seconds = time.perf_counter() - self._begun if asked else passed
            mean = sum(sequence.computed - start for sequence, start in zip(running, starts, strict=True)) / count
            self.drafts.speculation.record(count, asked, seconds, mean)
        for sequence in (s for s, _ in chunks if s not in ended):
            self._register(sequence)
        self._end(ended)
        return events

    def _read_on(self, sequence: Sequence, count: int) -> bool:
        """So much of its prompt is in the cache; whether that is the end, and its first token comes."""
        sequence.computed += count
        if sequence.computed < sequence.goal:
            return False
        self.scheduler.start(sequence)
        self.rows.set(sequence)
        return not sequence.produced

    def _choose(self, hidden: torch.Tensor, running: list[Sequence], given: list[list[int]], fresh: list[tuple[Sequence, int]],
                ) -> tuple[torch.Tensor, list[int], list[float]]:
        """Logits, tokens and log-probs after every token of the running rows, and then of the prompts that ended."""
        places = [s.computed + i for s, own in zip(running, given, strict=False) for i in range(1, 1 + len(own))]
        count = len(places)
        if not count and not fresh:
            return hidden, [], []
        if fresh:
            hidden = torch.cat([hidden[:count], hidden[[at for _, at in fresh]]])
        slots: slice | torch.Tensor = slice(0, count)
        if fresh or count > len(running):
            rows = [s.row for s, own in zip(running, given, strict=False) for _ in own]
            slots = torch.tensor(rows + [s.row for s, _ in fresh])
        logits = self.model.logits(hidden[: count + len(fresh)])
        tokens, logprobs = self.rows.choose(logits, slots, torch.tensor(places + [s.computed for s, _ in fresh]))
        return logits, tokens.tolist(), logprobs.tolist()

    # -- what comes of it ---------------------------------------------------------------------------------------------

    def _emit(self, sequence: Sequence, token: int, logprob: float, logits: torch.Tensor, row: int, events: list) -> bool:
        """Append a token sampled from a row of logits, or the one that is forced; whether it was the last."""
        request, reason = sequence.request, None
        if logprob != logprob:
            error = "the model's logits are not finite; a weight is damaged"
            events.append(TokenEvent(request.request_id, None, 0.0, "error", error, sequence.usage()))
            sequence.keys, sequence.computed = [], 0  # nothing of it may be found again
            return True
        if sequence.forced:
            token = sequence.forced.popleft()
            heat = self.rows.temperature[sequence.row].item() or 1.0
            logprob = (logits[row].float() / heat).log_softmax(-1)[token].item()
        sequence.accept(token)
        self._counts["generated_tokens"] += 1
        if token == self.eos_id or token in request.params.stop_token_ids:
            reason = "stop"
        elif sequence.text is not None and sequence.text.feed(token):
            reason = "stop"
        elif sequence.loop or sequence.produced >= sequence.limit:
            reason = "length"
        events.append(TokenEvent(request.request_id, token, logprob, reason, None, sequence.usage() if reason else None))
        return reason is not None

    def _end(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._register(sequence)
            self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        if self.drafts:
            self.drafts.pop(sequence, None)
        move = self.scheduler.remove(sequence)
        if move is not None:
            self.rows.move(*move)

    # -- pages --------------------------------------------------------------------------------------------------------

    def _register(self, sequence: Sequence) -> None:
        for key, page in self.scheduler.register_pages(sequence):
            if self.disk is not None and key not in self.disk:
                self.disk.put(key, b"".join(cache.page_bytes(page) for cache in self._caches))

    def _restore(self, key: bytes, page: int) -> bool:
        """Fill a page from the disk; False where it is not there or of another size."""
        data, sizes = self.disk.get(key), [cache.data[:, page].nbytes for cache in self._caches]
        if data is None or len(data) != sum(sizes):
            return False
        for cache, size in zip(self._caches, sizes, strict=True):
            cache.fill_page(page, data[:size])
            data = data[size:]
        return True
