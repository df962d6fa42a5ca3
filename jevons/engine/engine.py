"""The engine: continuous batching over the latent cache. Rollouts and HTTP both use `submit / step / cancel`.

One thread owns it, the one that owns the weights. It reads the model's live parameters: training needs no copy.

The life of a request: `submit` queues it; the next `step` admits it into a slot and runs its prompt (one ragged call
for all that were admitted), which gives its first token; every further step decodes one token for all running ones;
at eos, a stop string, its limit or `cancel` it leaves, and the last running sequence takes over its slot.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch

from jevons.engine.sampler import sample, uniform
from jevons.engine.scheduler import Scheduler, Sequence, StopWatcher
from jevons.engine.types import Completion, Request, TokenEvent
from jevons.model import CausalLM, KVCache, build_meta
from jevons.plan import count_parameters

PAGE = 32
COLDEST = 1e-5  # below it sampling is greedy: logits divided by less would not be finite
SMALL = 8_000_000  # parameters; threads that share a smaller model's decode step on a CPU cost more than they give
PREFILL_TOKENS = 8192  # prompts run in calls of about this many tokens, padded to the longest of a call


class Engine:
    """`eos_id` ends a sequence. `tokenizer` is needed only for requests with stop strings."""

    def __init__(self, model: CausalLM, eos_id: int, max_batch: int = 64, max_len: int = 1024, max_waiting: int = 256,
                 tokenizer: Any = None, cache_dtype: torch.dtype = torch.float32):
        max_len = min(max_len, model.config.max_position_embeddings)
        self.model, self.eos_id, self.tokenizer = model, eos_id, tokenizer
        self.scheduler = Scheduler(max_batch, max_len, max_waiting)
        device = model.embed_tokens.weight.device
        self._alone = device.type == "cpu" and count_parameters(model.config).total < SMALL
        self._pages = -(-max_len // PAGE)  # per slot
        self.cache = KVCache(model.config, max_batch * self._pages, PAGE, dtype=cache_dtype, device=device)
        self._table = torch.arange(max_batch * self._pages, device=device).view(max_batch, self._pages)
        # one row a slot; kept as tensors so that a decode step builds nothing from Python lists
        self._length = torch.zeros(max_batch, dtype=torch.long)  # tokens in the cache
        self._last = torch.zeros(max_batch, dtype=torch.long)
        self._temperature = torch.ones(max_batch)
        self._top_p = torch.ones(max_batch)
        self._seed = np.zeros(max_batch, dtype=np.uint64)
        self._events: list[TokenEvent] = []  # for the next step to hand out

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
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need an engine with a tokenizer")
        if not all(params.stop):
            raise ValueError(f"stop {list(params.stop)} holds an empty string, which every text contains")
        sequence = self.scheduler.submit(request)
        if params.stop:
            sequence.text = StopWatcher(params.stop, self.tokenizer.decode_stream())
        return request.request_id

    def cancel(self, request_id: str) -> None:
        """End a request; its slot is free at once. Unknown or finished ids are ignored."""
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            self._remove(sequence)
            self._events.append(TokenEvent(request_id, None, finish_reason="cancelled"))

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Admit and prefill what waits, or decode one token for every running sequence."""
        events, self._events = self._events, []
        running = len(self.scheduler.running)
        threads = torch.get_num_threads()
        try:
            if self._alone and threads > 1:
                torch.set_num_threads(1)
            if self.scheduler.waiting and running < self.scheduler.max_batch:
                events += self._prefill(self.scheduler.admit())
            elif running:
                events += self._emit(list(self.scheduler.running), self._decode(running))
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
                    completion.finish_reason = event.finish_reason
                    if event.finish_reason:
                        unfinished.discard(event.request_id)
        finally:
            for request_id in unfinished:
                self.cancel(request_id)
            self._events = others + [event for event in self._events if event.request_id not in done]
        return [done[r.request_id] for r in requests]

    # -- one call of the model ----------------------------------------------------------------------------------------

    def _prefill(self, sequences: list[Sequence]) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for sequence in sequences:
            params, slot = sequence.request.params, sequence.slot
            self._temperature[slot] = params.temperature if params.temperature > COLDEST else 0.0
            self._top_p[slot] = params.top_p
            self._seed[slot] = params.seed % 2**64
            self._length[slot] = len(sequence.request.prompt_ids)
        outputs = []
        first = 0
        while first < len(sequences):  # the slots are consecutive: what was admitted follows what was running
            end, longest = first, 0
            while end < len(sequences):
                longest = max(longest, len(sequences[end].request.prompt_ids))
                if end > first and (end + 1 - first) * longest > PREFILL_TOKENS:
                    break
                end += 1
            outputs.append(self._run_prompts(sequences[first:end]))
            first = end
        tokens = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
        events += self._emit(sequences, (tokens[0], tokens[1]))
        return events

    def _run_prompts(self, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        slot, count = sequences[0].slot, len(sequences)
        prompts = [s.request.prompt_ids for s in sequences]
        table = self._table[slot : slot + count]
        meta = build_meta(table, [0] * count, [len(p) for p in prompts], PAGE, first_page=int(table[0, 0]))
        flat = torch.tensor([i for p in prompts for i in p], device=table.device)
        hidden = self.model(flat, meta.positions_N, self.cache, meta)
        ends = torch.tensor([len(p) for p in prompts], device=hidden.device).cumsum(0) - 1
        return self._sample(hidden[ends], slot, slot + count)

    def _decode(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = self._table[:count]
        meta = build_meta(table, self._length[:count], None, PAGE, first_page=0)
        hidden = self.model(self._last[:count].to(table.device), meta.positions_N, self.cache, meta)
        self._length[:count] += 1
        return self._sample(hidden, 0, count)

    def _sample(self, hidden: torch.Tensor, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model.logits(hidden).cpu()
        positions = self._length[first:end].numpy().astype(np.uint64)
        noise = torch.from_numpy(uniform(self._seed[first:end], positions))
        tokens, logprobs = sample(logits, self._temperature[first:end], self._top_p[first:end], noise)
        self._last[first:end] = tokens
        return tokens, logprobs

    # -- what comes of it ---------------------------------------------------------------------------------------------

    def _emit(self, sequences: list[Sequence], output: tuple[torch.Tensor, torch.Tensor]) -> list[TokenEvent]:
        events = []
        ended = []
        damaged = []
        for sequence, token, logprob in zip(sequences, output[0].tolist(), output[1].tolist(), strict=True):
            sequence.produced += 1
            request = sequence.request
            reason = error = None
            if logprob != logprob:
                reason, error = "error", "the model's logits are not finite; a weight is damaged"
                token, logprob = None, 0.0
                damaged.append(sequence.slot)
            elif token == self.eos_id or token in request.params.stop_token_ids:
                reason = "stop"
            elif sequence.text is not None and sequence.text.feed(token):
                reason = "stop"
            elif sequence.produced >= sequence.limit:
                reason = "length"
            events.append(TokenEvent(request.request_id, token, logprob, reason, error))
            if reason:
                ended.append(sequence)
        for slot in damaged:  # others read these cells past their own length, and 0 * NaN is NaN
            self.cache.data[:, self._table[slot]] = 0
        for sequence in ended:
            self._remove(sequence)
        return events

    def _remove(self, sequence: Sequence) -> None:
        move = self.scheduler.remove(sequence)
        if move is None:
            return
        source, slot = move
        pages = -(-int(self._length[source]) // PAGE)
        self.cache.data[:, self._table[slot, :pages]] = self.cache.data[:, self._table[source, :pages]]
        for row in (self._length, self._last, self._temperature, self._top_p, self._seed):
            row[slot] = row[source]
