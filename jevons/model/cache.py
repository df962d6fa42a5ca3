"""The paged cache, and `BatchMeta`, which tells a forward pass where each flat token belongs.

One tensor [layers, pages, page_size, width] holds what a layer keeps per token: for MLA the normed latent and the
rotated shared key (width = kv_lora_rank + qk_rope_head_dim), for dense attention keys and values of the KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from jevons.config import ModelConfig
from jevons.numerics import paged


def cache_width(config: ModelConfig) -> int:
    """Elements one layer keeps per token."""
    if config.is_deepseek:
        return config.kv_lora_rank + config.qk_rope_head_dim
    return 2 * config.kv_heads * config.per_head_dim


class KVCache:
    """Storage only; which page belongs to whom is the scheduler's business. The MTP layer has a cache of its own."""

    def __init__(self, config: ModelConfig, pages: int, page_size: int, layers: int | None = None,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        layers = config.num_hidden_layers if layers is None else layers
        self.page_size = page_size
        self.data = torch.zeros(layers, pages, page_size, cache_width(config), dtype=dtype, device=device)
        self.layers = [self.data[layer] for layer in range(layers)]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def copy_page(self, source: int, page: int) -> None:
        self.data[:, page] = self.data[:, source]

    def page_bytes(self, page: int) -> bytes:
        """A page of all layers, for `fill_page`."""
        return self.data[:, page].contiguous().view(torch.uint8).cpu().numpy().tobytes()

    def fill_page(self, page: int, data: bytes) -> None:
        cells = self.data[:, page]
        self.data[:, page] = torch.frombuffer(bytearray(data), dtype=cells.dtype).view(cells.shape).to(cells.device)

    def write(self, layer: int, cells_N: torch.Tensor, values_NW: torch.Tensor) -> None:
        self.layers[layer].view(-1, self.data.shape[-1]).index_copy_(0, cells_N, values_NW.to(self.data.dtype))

    def read(self, layer: int, meta: BatchMeta) -> torch.Tensor:
        """What sequences keep, [S, L, W] with L = meta.max_context: a copy, zero past a sequence's own length (what lies
        there may be NaN, and 0 * NaN is NaN)."""
        kept = self.layers[layer][meta.used_SP].flatten(1, 2)
        return kept[:, : meta.max_context].masked_fill_(meta.past_SL[..., None], 0.0)


@dataclass
class BatchMeta:
    """Where the flat tokens of one call belong. Sequence s owns tokens starts[s] : starts[s + 1], at positions from
    contexts[s] on. What only the gathering path needs is made when it is asked for."""

    page_table_SP: torch.Tensor  # page ids of each sequence, int64; columns past its pages are ignored
    contexts_S: torch.Tensor  # int64, on the CPU: tokens in the cache before this call
    starts: torch.Tensor  # [S + 1] int64, on the CPU
    positions_N: torch.Tensor
    page_size: int
    max_query: int  # longest query; 1 in plain decode
    static: bool = False  # buffers of a captured step: contexts and starts lie on the device, only their values change

    @property
    def sequences(self) -> int:
        return len(self.contexts_S)

    @cached_property
    def batch(self) -> paged.Batch:
        """The same for the native kernels."""
        return paged.Batch(self.page_table_SP, self.starts, self.contexts_S, self.page_size)

    @cached_property
    def seen(self) -> tuple[int, int]:
        """How many (query, cell) pairs the call scores, and how many cells there were before it."""
        lens = self.starts.diff()
        return int((lens * self.contexts_S + lens * (lens + 1) // 2).sum()), int(self.contexts_S.sum())

    @cached_property
    def in_order(self) -> tuple[torch.Tensor, paged.Batch]:
        """All pages that hold something of a sequence, one sequence after the other; and the batch over a copy of them in this
        order."""
        used = self.page_table_SP[:, : -(-self.max_context // self.page_size)]
        holding = torch.arange(used.shape[1]) * self.page_size < self.lengths_S[:, None]
        table = (holding.flatten().cumsum(0) - 1).view(used.shape)
        return used[holding], paged.Batch(table, self.starts, self.contexts_S, self.page_size)

    @cached_property
    def lengths_S(self) -> torch.Tensor:
        """Tokens in the cache after this call, on the table's device."""
        return (self.contexts_S + self.starts.diff()).to(self.page_table_SP.device)

    @cached_property
    def max_context(self) -> int:
        return int((self.contexts_S + self.starts.diff()).max())  # on the CPU: a device would have to be waited for

    @cached_property
    def on_device(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`starts` and `contexts_S` on the table's device."""
        device = self.page_table_SP.device
        return self.starts.to(device, non_blocking=True), self.contexts_S.to(device, non_blocking=True)

    @cached_property
    def fresh(self) -> list[tuple[int, int]] | None:
        """Segments of a call of whole prompts, of which the cache held nothing before; None for any other call."""
        if self.static or self.max_query == 1 or self.contexts_S.any():
            return None
        return [(1, n) for n in self.starts.diff().tolist()]

    @cached_property
    def sequence_N(self) -> torch.Tensor:
        """The sequence each token belongs to."""
        return torch.repeat_interleave(torch.arange(self.sequences), self.starts.diff()).to(self.positions_N.device)

    @cached_property
    def query_N(self) -> torch.Tensor:
        """A token's index among its sequence's new ones."""
        return self.positions_N - self.contexts_S.to(self.positions_N.device)[self.sequence_N]

    @cached_property
    def cells_N(self) -> torch.Tensor:
        """The cache cell (page * page_size + offset) that a token is written to."""
        page = self.page_table_SP[self.sequence_N, self.positions_N // self.page_size]
        return page * self.page_size + self.positions_N % self.page_size

    @cached_property
    def past_SL(self) -> torch.Tensor:
        """Cells past a sequence's own length."""
        return torch.arange(self.max_context, device=self.lengths_S.device) >= self.lengths_S[:, None]

    @cached_property
    def used_SP(self) -> torch.Tensor:
        """The table as far as the longest context goes, 0 where it is to be ignored."""
        pages = torch.arange(-(-self.max_context // self.page_size), device=self.lengths_S.device)
        return self.page_table_SP[:, : len(pages)].masked_fill(pages * self.page_size >= self.lengths_S[:, None], 0)

    @cached_property
    def mask_SQL(self) -> torch.Tensor:
        """Additive, 0 or -inf: what a query may see."""
        device = self.page_table_SP.device
        seen = self.contexts_S.to(device)[:, None] + torch.arange(self.max_query, device=device)
        hidden = torch.arange(self.max_context, device=device) > seen[:, :, None]
        return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))

    def halves(self) -> tuple[BatchMeta, BatchMeta]:
        """Two calls that do the work of this one, the first one's tokens first."""
        lens = self.starts.diff()
        if self.sequences == 1:
            lens, table = torch.cat([lens // 2, lens - lens // 2]), self.page_table_SP.expand(2, -1)
            contexts = self.contexts_S + torch.cat([lens.new_zeros(1), lens[:1]])
        else:
            contexts, table = self.contexts_S, self.page_table_SP
        cut = len(lens) // 2
        return tuple(build_meta(table[part], contexts[part], lens[part].tolist(), self.page_size)
                     for part in (slice(cut), slice(cut, None)))


def build_meta(page_table_SP: torch.Tensor, contexts: Sequence[int] | torch.Tensor, query_lens: Sequence[int] | None,
               page_size: int) -> BatchMeta:
    """Meta for sequences that hold `contexts[s]` tokens already and bring `query_lens[s]` new ones (None: one each).
    Raises ValueError where one brings none, or the table is not int64."""
    if page_table_SP.dtype != torch.long or page_table_SP.stride(-1) != 1:
        raise ValueError(f"page_table {page_table_SP.dtype} with strides {page_table_SP.stride()}: int64 in dense rows would be "
                         "right")
    contexts_S = torch.tensor(contexts) if isinstance(contexts, list) else torch.as_tensor(contexts).long().clone()
    sequences, longest = len(contexts_S), 1
    if query_lens is None:
        starts, positions = torch.arange(sequences + 1), contexts_S
    else:
        lens, longest = np.array(query_lens), max(query_lens)
        if lens.min() < 1:
            raise ValueError(f"query_lens {list(query_lens)}: every sequence of a call brings at least one token")
        ends = lens.cumsum()
        starts = torch.from_numpy(np.concatenate([[0], ends]))
        positions = torch.from_numpy(np.repeat(contexts_S.numpy() - ends + lens, lens) + np.arange(ends[-1]))
    return BatchMeta(page_table_SP, contexts_S, starts, positions.to(page_table_SP.device), page_size, longest)
