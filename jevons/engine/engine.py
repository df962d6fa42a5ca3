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
from typing import Any

import numpy as np
import torch

from jevons.engine.disk import DiskTier
from jevons.engine.pages import PagePool
from jevons.engine.sampler import sample, uniform
from jevons.engine.scheduler import Scheduler, Sequence, StopWatcher
from jevons.engine.speculation import Speculation
from jevons.engine.types import Completion, Request, TokenEvent
from jevons.model import CausalLM, KVCache, build_meta
from jevons.plan import count_parameters

PAGE = 32
COLDEST = 1e-5  # below it sampling is greedy: logits divided by less would not be finite
SMALL = 8_000_000  # parameters; threads that share a smaller model's decode step on a CPU cost more than they give
PREFILL_TOKENS = 8192  # prompts run in calls of about this many tokens, padded to the longest of a call
CHUNK = 512  # tokens of prompts that run between two tokens of those that decode


class Engine:
    """`eos_id` ends a sequence. `tokenizer` is needed only for requests with stop strings.

    `prefix_cache`: keep the pages of prompts and answers for those that begin the same; only while the weights do not change.
    `disk` keeps them over restarts. `speculate`: drafts of the MTP module per pass, None to find out what pays (by the clock).
    `pages`: of PAGE tokens each; by default as many as `max_batch` sequences of `max_len` need.
    `patient`: chunks of prompts are as short as it takes that running streams hardly notice them (by the clock).
    `deterministic`: every sequence is computed by itself, so that the same request has the same bits in any company.
    """

    def __init__(self, model: CausalLM, eos_id: int, max_batch: int = 64, max_len: int = 1024, max_waiting: int = 256,
                 tokenizer: Any = None, cache_dtype: torch.dtype = torch.float32, pages: int | None = None,
                 prefix_cache: bool = False, disk: DiskTier | None = None, root: bytes = b"", speculate: int | None = 0,
                 patient: bool = False, deterministic: bool = False):
        max_len = min(max_len, model.config.max_position_embeddings)
        self.model, self.eos_id, self.tokenizer = model, eos_id, tokenizer
        per_sequence = -(-max_len // PAGE)
        pages = max_batch * per_sequence if pages is None else pages
        pool = PagePool(pages, PAGE, prefix_cache and not deterministic, root)
        self.scheduler = Scheduler(max_batch, max_len, max_waiting, pool)
        self.deterministic, self.patient, self.disk = deterministic, patient, disk if pool.caching else None
        device = model.embed_tokens.weight.device
        self._alone = device.type == "cpu" and count_parameters(model.config).total < SMALL
        self.cache = KVCache(model.config, pages, PAGE, dtype=cache_dtype, device=device)
        self._caches = [self.cache]
        drafting = bool(model.mtp) and speculate != 0 and not deterministic
        self.speculation = Speculation(speculate) if drafting else None
        if drafting:
            # Entry j holds what the MTP module made of token j+1 and the hidden state at j. A shared page's last entry so depends
            # on a token that is not in its key: another branch's may be read there. It only makes a draft worse.
            self.mtp_cache = KVCache(model.config, pages, PAGE, layers=1, dtype=cache_dtype, device=device)
            self._caches.append(self.mtp_cache)
        # one row a running sequence; kept as tensors so that a decode step builds nothing from Python lists
        self._table = torch.zeros(max_batch, per_sequence, dtype=torch.long, device=device)
        self._length = torch.zeros(max_batch, dtype=torch.long)  # tokens in the cache
        self._last = torch.zeros(max_batch, dtype=torch.long)
        self._temperature = torch.ones(max_batch)
        self._top_p = torch.ones(max_batch)
        self._seed = np.zeros(max_batch, dtype=np.uint64)
        self._drafts: dict[Sequence, list[int]] = {}  # for the next pass; a sequence that is not in it does not draft
        self._events: list[TokenEvent] = []  # for the next step to hand out
        self._counts = dict.fromkeys((f"{kind}_tokens" for kind in ("prompt", "cached", "drafted", "accepted", "generated")), 0)
        self._decode_seconds, self._prefill_rate = 0.0, 0.0  # of the last steps, for `patient`

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._events)

    @property
    def max_len(self) -> int:
        return self.scheduler.max_len

    def submit(self, request: Request) -> str:
        """Queue a request; its id. Raises PromptTooLong, QueueFull, or ValueError for parameters that cannot be run."""
        params, vocab = request.params, self.model.config.vocab_size
        if not 0 <= params.temperature <= 100 or not 0 < params.top_p <= 1:
            raise ValueError(f"temperature {params.temperature} must lie in 0..100 and top_p {params.top_p} in (0, 1]")
        if any(not 0 <= i < vocab for i in request.prompt_ids):
            raise ValueError(f"a prompt id lies outside the vocabulary of {vocab}")
        if params.thinking and any(not 0 <= i < vocab for i in params.thinking.close_ids):
            raise ValueError(f"thinking.close_ids {list(params.thinking.close_ids)} reach outside the vocabulary of {vocab}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need an engine with a tokenizer")
        if not all(params.stop):
            raise ValueError(f"stop {list(params.stop)} holds an empty string, which every text contains")
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
        pool = self.scheduler.pool
        return self._counts | {"preemptions": self.scheduler.preemptions, "pages_free": pool.free, "pages_cached": pool.cached,
                               "pages_used": pool.used, "speculating": int(bool(self.speculation and self.speculation.paying))}

    def close(self) -> None:
        """Finish writing cached pages to the disk."""
        if self.disk is not None:
            self.disk.close()

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Decode for every running sequence, and run a chunk of the prompts that wait."""
        events, self._events = self._events, []
        threads = torch.get_num_threads()
        try:
            if self._alone and threads > 1:
                torch.set_num_threads(1)
            if self.scheduler.waiting:
                self._admit()
            if self.scheduler.running:
                events += self._decode()
            if self.scheduler.prefilling:
                events += self._prefill()
        finally:
            if self._alone and threads > 1:
                torch.set_num_threads(threads)
        return events

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

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        def copy(source: int, page: int) -> None:
            for cache in self._caches:
                cache.data[:, page] = cache.data[:, source]

        restore = self._restore if self.disk is not None else None
        for sequence in self.scheduler.admit(lambda s: self.scheduler.adopt_prefix(s, copy, restore)):
            if not sequence.preempted:
                self._counts["prompt_tokens"] += len(sequence.request.prompt_ids)
                self._counts["cached_tokens"] += sequence.cached_tokens
            self._drafts.pop(sequence, None)
            if self.speculation is not None and self.speculation.enrol():
                self._drafts[sequence] = []

    def _prefill(self) -> list[TokenEvent]:
        budget = PREFILL_TOKENS
        if self.scheduler.running:
            budget = CHUNK
            if self.patient and self._prefill_rate:  # about as long as a decode step takes
                budget = min(CHUNK, max(PAGE, int(self._decode_seconds * self._prefill_rate)))
        plan, begin, events = self.scheduler.plan_prefill(budget), time.perf_counter(), []
        for group in self._groups(plan):
            events += self._run_prompts(group)
        rate = sum(count for _, count in plan) / (time.perf_counter() - begin)
        self._prefill_rate += (0.3 if self._prefill_rate else 1.0) * (rate - self._prefill_rate)
        return events

    def _groups(self, plan: list[tuple[Sequence, int]]) -> list[list[tuple[Sequence, int]]]:
        """Calls of about PREFILL_TOKENS tokens, padded to the longest; deterministic: one sequence a call."""
        groups: list[list[tuple[Sequence, int]]] = []
        longest = 0
        for sequence, count in plan:
            longest = max(longest, count)
            if not groups or self.deterministic or (len(groups[-1]) + 1) * longest > PREFILL_TOKENS:
                groups.append([])
                longest = count
            groups[-1].append((sequence, count))
        return groups

    def _run_prompts(self, chunks: list[tuple[Sequence, int]]) -> list[TokenEvent]:
        """Some tokens of some prompts; those that end give their first token and run from then on."""
        sequences, counts = [s for s, _ in chunks], [count for _, count in chunks]
        starts = [s.computed for s in sequences]
        meta = build_meta(self._tables(sequences), starts, counts, PAGE)
        flat = [i for s, n in chunks for i in s.tokens[s.computed : s.computed + n]]
        hidden = self.model(torch.tensor(flat, device=self._table.device), meta.positions_N, self.cache, meta)
        last = (np.cumsum(counts) - 1).tolist()
        fresh, events, ended = [], [], []
        for (sequence, count), at in zip(chunks, last, strict=True):
            sequence.computed += count
            if sequence.computed == sequence.goal:
                self.scheduler.start(sequence)
                self._set_row(sequence)
                if not sequence.produced:
                    fresh.append((sequence, at))
        if fresh:
            logits = self.model.logits(hidden[[at for _, at in fresh]]).cpu()
            tokens, logprobs = self._choose(logits, torch.tensor([s.row for s, _ in fresh]))
            for i, ((sequence, _), token, logprob) in enumerate(zip(fresh, tokens.tolist(), logprobs.tolist(), strict=True)):
                if self._emit(sequence, token, logprob, logits[i], events):
                    ended.append(sequence)
                else:
                    self._last[sequence.row] = sequence.tokens[-1]
        if self._drafts:
            self._draft(hidden, [part for part in zip(sequences, starts, counts, last, strict=True) if part[0] not in ended])
        for sequence in sequences:
            if sequence not in ended:
                self._register(sequence)
        self._end(ended)
        return events

    # -- decoding -----------------------------------------------------------------------------------------------------

    def _decode(self) -> list[TokenEvent]:
        begin, events = time.perf_counter(), []
        for sequence in list(self.scheduler.running):
            drafts = self._drafts.get(sequence, ())
            if sequence.row is not None and sequence.computed + 1 + len(drafts) > len(sequence.pages) * PAGE:
                self._grow(sequence)
        running = list(self.scheduler.running)
        if not running:
            return events
        if self.deterministic:
            ended = [gone for sequence in running for gone in self._decode_rows([sequence], events)]
        elif any(sequence in self._drafts for sequence in running):
            ended = self._verify(running, events)
        else:
            ended = self._decode_rows(running, events)
        self._end(ended)
        self._decode_seconds += (0.3 if self._decode_seconds else 1.0) * (time.perf_counter() - begin - self._decode_seconds)
        return events

    def _grow(self, sequence: Sequence) -> None:
        """A page for the next token, at others' cost where none is left, and for its drafts where there is one."""
        held = len(sequence.pages)
        room, moves = self.scheduler.make_room(sequence, 1)
        for source, row in moves:
            self._move(source, row)
        if not room:
            return
        drafts = self._drafts.get(sequence)
        if drafts and (more := -(-(sequence.computed + 1 + len(drafts)) // PAGE) - len(sequence.pages)) > 0:
            if (taken := self.scheduler.pool.take(more)) is not None:
                sequence.pages += taken
            else:
                del drafts[len(sequence.pages) * PAGE - sequence.computed - 1 :]
        self._table[sequence.row, held : len(sequence.pages)] = torch.tensor(sequence.pages[held:], device=self._table.device)

    def _decode_rows(self, sequences: list[Sequence], events: list[TokenEvent]) -> list[Sequence]:
        """One token for each of some consecutive rows. Returns those that ended."""
        first, end = sequences[0].row, sequences[-1].row + 1
        meta = build_meta(self._table[first:end], self._length[first:end], None, PAGE)
        hidden = self.model(self._last[first:end].to(self._table.device), meta.positions_N, self.cache, meta)
        self._length[first:end] += 1
        logits = self.model.logits(hidden).cpu()
        tokens, logprobs = self._choose(logits, slice(first, end))
        self._last[first:end] = tokens
        ended = []
        for i, (sequence, token, logprob) in enumerate(zip(sequences, tokens.tolist(), logprobs.tolist(), strict=True)):
            sequence.computed += 1
            forced = bool(sequence.forced)
            if self._emit(sequence, token, logprob, logits[i], events):
                ended.append(sequence)
            elif forced:
                self._last[first + i] = sequence.tokens[-1]
        return ended

    def _verify(self, sequences: list[Sequence], events: list[TokenEvent]) -> list[Sequence]:
        """All rows at once, each with its last token and its drafts: as many tokens as drafts were right, and one more."""
        begin = time.perf_counter()
        drafts = [self._drafts.get(sequence, []) for sequence in sequences]
        counts = [1 + len(d) for d in drafts]
        starts = [s.computed for s in sequences]
        meta = build_meta(self._table[: len(sequences)], starts, counts, PAGE)
        flat = [i for s, d in zip(sequences, drafts, strict=True) for i in (s.tokens[-1], *d)]
        hidden = self.model(torch.tensor(flat, device=self._table.device), meta.positions_N, self.cache, meta)
        logits = self.model.logits(hidden).cpu()
        rows = meta.sequence_N.cpu()
        tokens, logprobs = (t.tolist() for t in self._choose(logits, rows, meta.positions_N.cpu() + 1))
        ended, kept, at = [], [], 0
        for sequence, own, count in zip(sequences, drafts, counts, strict=True):
            accepted = 0
            for i in range(count):
                sequence.computed += 1
                over = self._emit(sequence, tokens[at + i], logprobs[at + i], logits[at + i], events)
                if over or i == len(own) or sequence.tokens[-1] != own[i]:
                    break
                accepted += 1
            if over:
                ended.append(sequence)
            else:
                self._length[sequence.row], self._last[sequence.row] = sequence.computed, sequence.tokens[-1]
            sequence.drafted += len(own)
            sequence.accepted += accepted
            self._counts["drafted_tokens"] += len(own)
            self._counts["accepted_tokens"] += accepted
            if not over:
                kept.append((sequence, sequence.computed - accepted - 1, accepted + 1, at + accepted))
            at += count
        passed = time.perf_counter() - begin
        self._draft(hidden, kept)
        asked = max(map(len, drafts))
        seconds = time.perf_counter() - begin if asked else passed  # no drafts: what the module does is for a comparison
        mean = sum(sequence.computed - start for sequence, start in zip(sequences, starts, strict=True)) / len(sequences)
        self.speculation.record(len(sequences), asked, seconds, mean)
        return ended

    def _draft(self, hidden: torch.Tensor, parts: list[tuple[Sequence, int, int, int]]) -> None:
        """Run the MTP module over what was just computed, and set the drafts of the running sequences' next pass.

        `parts`: (sequence, the position of its first token, how many, the row of `hidden` that holds its last)."""
        batch = max(1, len(self.scheduler.running))
        most = self.speculation.drafts(batch)
        parts = [part for part in parts if part[0] in self._drafts]
        if most is None:
            for sequence, *_ in parts:
                del self._drafts[sequence]
            return
        if not parts:
            return
        device, sequences = self._table.device, [part[0] for part in parts]
        starts, counts = [part[1] for part in parts], [part[2] for part in parts]
        table = self._tables(sequences)
        meta = build_meta(table, starts, counts, PAGE)
        picked = [row for _, _, count, last in parts for row in range(last - count + 1, last + 1)]
        flat = [i for s, start, count, _ in parts for i in s.tokens[start + 1 : start + count + 1]]
        out = self.model.forward_mtp(hidden[picked], torch.tensor(flat, device=device), meta.positions_N, self.mtp_cache, meta)
        ends = np.cumsum(counts) - 1
        for sequence in sequences:
            self._drafts[sequence] = []
        # no draft past a sequence's limit, and none whose entry would need another page
        live = [(i, int(ends[i]), min(most, s.limit - s.produced - 1, len(s.pages) * PAGE - starts[i] - counts[i] + 1))
                for i, s in enumerate(sequences) if s.row is not None]
        tokens = None
        for depth in range(most):
            live = [(i, row, wanted) for i, row, wanted in live if wanted > depth]
            if not live:
                break
            if depth:
                indices = [i for i, *_ in live]
                meta = build_meta(table[indices], [starts[i] + counts[i] + depth - 1 for i in indices], None, PAGE)
                rows = [row for _, row, _ in live]
                out = self.model.forward_mtp(out[rows], tokens[rows].to(device), meta.positions_N, self.mtp_cache, meta)
            else:
                out = out[[row for _, row, _ in live]]
            live = [(i, row, wanted) for row, (i, _, wanted) in enumerate(live)]
            # drawn with the noise of the very token that it foretells: where the two distributions agree, so do the draws
            slots = torch.tensor([sequences[i].row for i, *_ in live])
            after = torch.tensor([len(sequences[i].tokens) + depth for i, *_ in live])
            tokens, _ = self._choose(self.model.logits(out).cpu(), slots, after)
            for (i, *_), token in zip(live, tokens.tolist(), strict=True):
                self._drafts[sequences[i]].append(token)

    # -- what comes of it ---------------------------------------------------------------------------------------------

    def _choose(self, logits: torch.Tensor, rows: torch.Tensor | slice, positions: torch.Tensor | None = None,
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and log-probs by the parameters of `rows`; `positions` are the tokens' own, by default the next ones."""
        at = (self._length[rows] if positions is None else positions).numpy().astype(np.uint64)
        seeds = self._seed[rows] if isinstance(rows, slice) else self._seed[rows.numpy()]
        return sample(logits, self._temperature[rows], self._top_p[rows], torch.from_numpy(uniform(seeds, at)))

    def _emit(self, sequence: Sequence, token: int, logprob: float, logits_V: torch.Tensor, events: list[TokenEvent]) -> bool:
        """Append a sampled token, or the one that is forced; whether it was the last."""
        request, reason = sequence.request, None
        if logprob != logprob:
            error = "the model's logits are not finite; a weight is damaged"
            events.append(TokenEvent(request.request_id, None, 0.0, "error", error, sequence.usage()))
            for page in filter(self.scheduler.pool.sole, sequence.pages):
                for cache in self._caches:  # others read these cells past their own length, and 0 * NaN is NaN
                    cache.data[:, page] = 0
            sequence.keys, sequence.computed = [], 0  # nothing of it may be found again
            return True
        if sequence.forced:
            token = sequence.forced.popleft()
            heat = self._temperature[sequence.row].item() or 1.0
            logprob = (logits_V.float() / heat).log_softmax(-1)[token].item()
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
        self._drafts.pop(sequence, None)
        move = self.scheduler.remove(sequence)
        if move is not None:
            self._move(*move)

    # -- rows and pages -----------------------------------------------------------------------------------------------

    def _set_row(self, sequence: Sequence) -> None:
        row, params = sequence.row, sequence.request.params
        self._temperature[row] = params.temperature if params.temperature > COLDEST else 0.0
        self._top_p[row] = params.top_p
        self._seed[row] = params.seed % 2**64
        self._length[row], self._last[row] = sequence.computed, sequence.tokens[-1]
        self._table[row, : len(sequence.pages)] = torch.tensor(sequence.pages, device=self._table.device)

    def _move(self, source: int, row: int) -> None:
        for rows in (self._length, self._last, self._temperature, self._top_p, self._seed, self._table):
            rows[row] = rows[source]

    def _tables(self, sequences: list[Sequence]) -> torch.Tensor:
        longest = max(len(s.pages) for s in sequences)
        return torch.tensor([s.pages + [0] * (longest - len(s.pages)) for s in sequences], device=self._table.device)

    def _register(self, sequence: Sequence) -> None:
        for key, page in self.scheduler.register_pages(sequence):
            if self.disk is not None and key not in self.disk:
                parts = [cache.data[:, page].contiguous().view(torch.uint8).cpu().numpy().tobytes() for cache in self._caches]
                self.disk.put(key, b"".join(parts))

    def _restore(self, key: bytes, page: int) -> bool:
        """Fill a page from the disk; False where it is not there or of another size."""
        data = self.disk.get(key)
        if data is None or len(data) != sum(cache.data[:, page].nbytes for cache in self._caches):
            return False
        at = 0
        for cache in self._caches:
            cells = cache.data[:, page]
            part = torch.frombuffer(bytearray(data[at : at + cells.nbytes]), dtype=cells.dtype)
            cache.data[:, page] = part.view(cells.shape).to(cells.device)
            at += cells.nbytes
        return True
