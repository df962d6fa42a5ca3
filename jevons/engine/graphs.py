"""Decode steps of fixed shapes: static buffers, and on a GPU a captured graph for each shape.

A step is one token for every running row, or the verification of its drafts. Its batch is padded up to a bucket and its queries
to the longest, its inputs are copied into buffers that stay where they are, and what it computes depends on these buffers alone:
so it can be captured once and replayed. Padding tokens write to a page that nobody owns and are seen by nobody. Without a GPU
the same step runs eagerly, which is how a CPU tests it.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from jevons.engine.rows import Rows
from jevons.engine.sampler import noise, sample
from jevons.engine.scheduler import Sequence
from jevons.model import BatchMeta, CausalLM, KVCache
from jevons.model.layers import Linear
from jevons.model.moe import ExpertBank, MoE
from jevons.numerics import IntWeight, triton_mla
from jevons.numerics.linear import Rows as Parts

log = logging.getLogger(__name__)
CONTEXT, COUNT, SEED, TEMPERATURE, TOP_P, FIELDS = 0, 1, 2, 3, 4, 5  # columns of the inputs, behind a row's tokens
WARM_UP = 2  # eager runs before a capture: kernels compile, libraries make their handles
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, logits, tokens, log-probs


def bucket(count: int, most: int) -> int:
    """Rows that a batch of `count` is padded to: a power of two up to 16, then a multiple of 8, over 64 of 32; at most `most`."""
    step = 1 << (count - 1).bit_length() if count <= 16 else 8 if count <= 64 else 32
    return min(-(-count // step) * step, most)


def obstacle(model: CausalLM, device: torch.device) -> str | None:
    """Why this model's steps cannot be captured on `device`: an operation that waits for a number from the device. None where
    they can."""
    if (why := triton_mla.why_not(device)) is not None:
        return why
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    for name, module in model.named_modules():
        if isinstance(module, MoE) and not isinstance(module.experts, ExpertBank):
            return f"{name}: experts lie in RAM, and which are needed is decided on the CPU"
        if isinstance(module, ExpertBank):
            if isinstance(module.down_proj, list):
                return f"{name}: experts are held one by one, and their rows are counted on the CPU"
            if not fast or module.down_proj.dtype != torch.bfloat16:
                return f"{name}: torch's grouped product waits for the device but in bf16 on capability 9 and 10"
        if isinstance(module, Linear):
            held = module.weight.parts if isinstance(module.weight, Parts) else [module.weight]
            if any(isinstance(w, IntWeight) for w in held):
                return f"{name}: integer weights are unpacked for CPUs"
    return None


def defaults(model: CausalLM, cache_dtype: torch.dtype | None, graphs: bool | None) -> tuple[torch.dtype, bool]:
    """What an engine does where it is not told: on a CPU a float32 cache and no graphs; on a GPU the model's type, and graphs
    where they can be."""
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    if graphs is None:
        graphs = device.type == "cuda" and obstacle(model, device) is None
    return cache_dtype or (torch.float32 if device.type == "cpu" else dtype), graphs


class StaticStep:
    """Buffers for `rows` sequences of `queries` tokens each, with tables of `pages` pages."""

    def __init__(self, rows: int, queries: int, pages: int, scrap: int, page_size: int, device: torch.device):
        self.rows, self.queries, self.scrap, self.page_size = rows, queries, scrap, page_size
        self.host = torch.zeros(rows, queries + FIELDS, dtype=torch.long, pin_memory=device.type == "cuda")
        self.inputs = torch.zeros(rows, queries + FIELDS, dtype=torch.long, device=device)
        self.table = torch.full((rows, pages), scrap, device=device)
        self.query_Q = torch.arange(queries, device=device)
        self.starts = torch.arange(rows + 1, device=device) * queries
        self.sequence_N = torch.arange(rows, device=device).repeat_interleave(queries)

    def fill(self, given: list[list[int]] | torch.Tensor, contexts: np.ndarray, seeds: np.ndarray, temperature: np.ndarray,
             top_p: np.ndarray, table_SP: torch.Tensor) -> None:
        """Copy a step's inputs in. Rows past `given`, and queries past a row's own, become padding."""
        n, q, host = len(given), self.queries, self.host.numpy()
        host[:] = 0  # 0 is a temperature too: padding is sampled greedily
        if isinstance(given, torch.Tensor):  # one token each
            host[:n, 0], host[:n, q + COUNT] = given.numpy(), 1
        else:
            for row, tokens in enumerate(given):
                host[row, : len(tokens)], host[row, q + COUNT] = tokens, len(tokens)
        host[:n, q + CONTEXT], host[:n, q + SEED] = contexts, seeds.view(np.int64)
        floats = host.view(np.float64)
        floats[:n, q + TEMPERATURE], floats[:n, q + TOP_P] = temperature, top_p
        self.inputs.copy_(self.host, non_blocking=True)
        self.table[:n].copy_(table_SP)

    def meta(self) -> BatchMeta:
        size, (context, count) = self.page_size, self.inputs[:, self.queries :].T[:2].contiguous()
        position = context[:, None] + self.query_Q
        real = self.query_Q < count[:, None]
        page = self.table.gather(1, (position // size).clamp_(max=self.table.shape[1] - 1))
        cells = torch.where(real, page, self.scrap) * size + position % size
        positions = torch.where(real, position, context[:, None]).flatten()  # padding may reach past the rotary table
        meta = BatchMeta(self.table, context, self.starts, positions, size, self.queries, static=True)
        meta.lengths_S, meta.on_device, meta.cells_N = context + count, (self.starts, context), cells.flatten()
        meta.max_context, meta.sequence_N = self.table.shape[1] * size, self.sequence_N
        meta.query_N = self.query_Q.repeat(self.rows)
        return meta

    def run(self, model: CausalLM, cache: KVCache, narrow: bool) -> Outputs:
        """The step, of static shapes, without a wait for the device. `narrow`: some row's top_p is below 1."""
        q, meta = self.queries, self.meta()
        hidden = model(self.inputs[:, :q].flatten(), meta.positions_N, cache, meta)
        logits = model.logits(hidden)
        seeds = self.inputs[:, q + SEED].repeat_interleave(q)
        heat, top_p = (self.inputs[:, q + c].view(torch.float64).float().repeat_interleave(q) for c in (TEMPERATURE, TOP_P))
        tokens, logprobs = sample(logits, heat, top_p, noise(seeds, meta.positions_N + 1), narrow)
        return hidden, logits, tokens, logprobs


class Graphs:
    """Steps over `rows` and `cache`, whose page `scrap` belongs to nobody. What a step returns is overwritten by the next."""

    def __init__(self, model: CausalLM, cache: KVCache, rows: Rows, scrap: int):
        self.model, self.cache, self.kept, self.scrap = model, cache, rows, scrap
        self.device = rows.table.device
        self.capturing = self.device.type == "cuda"
        self.steps: dict[tuple[int, int], StaticStep] = {}
        self.captured: dict[tuple[int, int, bool], tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        self.replays = 0
        self._pool = None

    def decode(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A token for rows first .. end: logits, tokens and log-probs, the latter two on the CPU. The rows are moved on."""
        rows = self.kept
        _, logits, tokens, logprobs = self._run(rows.last[first:end], slice(first, end), rows.length[first:end].numpy())
        rows.length[first:end] += 1
        rows.last[first:end] = tokens
        return logits[: end - first], tokens, logprobs

    def verify(self, sequences: list[Sequence], given: list[list[int]], contexts: list[int], cache: KVCache,
               ) -> tuple[torch.Tensor, torch.Tensor, list[int], list[float], int]:
        """`Drafts.verify`, from one longest row to the next."""
        hidden, logits, tokens, logprobs = self._run(given, slice(0, len(given)), np.array(contexts))
        return hidden, logits, tokens.tolist(), logprobs.tolist(), max(map(len, given))

    def _run(self, given: list[list[int]] | torch.Tensor, where: slice, contexts: np.ndarray) -> Outputs:
        rows, count = self.kept, len(given)
        queries = 1 if isinstance(given, torch.Tensor) else max(map(len, given))
        size = bucket(count, len(rows.table))
        if (step := self.steps.get((size, queries))) is None:
            step = StaticStep(size, queries, rows.table.shape[1], self.scrap, self.cache.page_size, self.device)
            self.steps[size, queries] = step
        temperature, top_p = rows.temperature[where].numpy(), rows.top_p[where].numpy()
        step.fill(given, contexts, rows.seed[where], temperature, top_p, rows.table[where])
        narrow = bool(((top_p < 1) & (temperature > 0)).any())
        out = self._replay(step, narrow) if self.capturing else step.run(self.model, self.cache, narrow)
        hidden, logits, tokens, logprobs = out
        return hidden, logits, tokens[: count * queries].cpu(), logprobs[: count * queries].cpu()

    def _replay(self, step: StaticStep, narrow: bool) -> Outputs:
        key = step.rows, step.queries, narrow
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(step, narrow)
            except RuntimeError as error:  # what this driver or torch captures cannot be known beforehand
                log.warning("decode steps are not captured on this GPU, and run eagerly: %s", error)
                self.capturing = False
                return step.run(self.model, self.cache, narrow)
        graph, outputs = self.captured[key]
        graph.replay()
        self.replays += 1
        return outputs

    def _capture(self, step: StaticStep, narrow: bool) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # writes the same cells as the replay will
                step.run(self.model, self.cache, narrow)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = step.run(self.model, self.cache, narrow)
        self._pool = self._pool or graph.pool()
        return graph, outputs
