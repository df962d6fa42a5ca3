"""The paged cache, and `BatchMeta`, which tells a forward pass where each flat token belongs.

One tensor [layers, pages, page_size, width] holds what a layer keeps per token: for MLA the normed latent and the
rotated shared key (width = kv_lora_rank + qk_rope_head_dim), for dense attention keys and values of the KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jevons.config import ModelConfig


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

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def write(self, layer: int, cells_N: torch.Tensor, values_NW: torch.Tensor) -> None:
        self.data[layer].view(-1, self.data.shape[-1]).index_copy_(0, cells_N, values_NW.to(self.data.dtype))

    def read(self, layer: int, meta: BatchMeta) -> torch.Tensor:
        """What sequences keep, [S, L, W] with L = meta.max_context; cells past a sequence's own length are garbage."""
        data = self.data[layer]
        if meta.first_page is not None:  # pages of all sequences lie in order: a view, no copy
            per_seq = meta.page_table_SP.shape[1]
            pages = data[meta.first_page : meta.first_page + per_seq * meta.sequences]
            return pages.view(meta.sequences, per_seq * self.page_size, -1)[:, : meta.max_context]
        pages_needed = -(-meta.max_context // self.page_size)
        picked = data[meta.page_table_SP[:, :pages_needed]]
        return picked.flatten(1, 2)[:, : meta.max_context]


@dataclass
class BatchMeta:
    """Where the flat tokens of one call belong. Sequence s owns tokens starts[s] : starts[s] + query_lens[s]."""

    page_table_SP: torch.Tensor  # page ids of each sequence, int64; columns past its pages are ignored
    cells_N: torch.Tensor  # cache cell (page * page_size + offset) each new token is written to
    positions_N: torch.Tensor
    sequence_N: torch.Tensor  # the sequence each token belongs to
    query_N: torch.Tensor  # its index among its sequence's new tokens
    sequences: int
    max_query: int  # longest query; 1 in plain decode
    max_context: int  # longest context after this call
    mask: torch.Tensor  # additive [S, max_query, max_context], 0 or -inf: what a query may see (causal, own length)
    first_page: int | None = None  # set where the table is first_page, first_page + 1, ... row by row


def build_meta(page_table_SP: torch.Tensor, contexts: Sequence[int] | torch.Tensor, query_lens: Sequence[int] | None,
               page_size: int, first_page: int | None = None) -> BatchMeta:
    """Meta for sequences that hold `contexts[s]` tokens already and bring `query_lens[s]` new ones (None: one each).
    Raises ValueError where one brings none."""
    if query_lens is not None and min(query_lens) < 1:
        raise ValueError(f"query_lens {list(query_lens)}: every sequence of a call brings at least one token")
    device = page_table_SP.device
    ctx = torch.as_tensor(contexts, dtype=torch.long)
    sequences = len(ctx)
    if query_lens is None or max(query_lens) == 1:
        max_query, sequence, query = 1, torch.arange(sequences), torch.zeros(sequences, dtype=torch.long)
        positions, max_context = ctx.clone(), int(ctx.max()) + 1
    else:
        lens = torch.tensor(query_lens, dtype=torch.long)
        max_query, max_context = max(query_lens), int((ctx + lens).max())
        sequence = torch.repeat_interleave(torch.arange(sequences), lens)
        query = torch.arange(int(lens.sum())) - (lens.cumsum(0) - lens)[sequence]
        positions = ctx[sequence] + query
    seen = ctx[:, None] + torch.arange(max_query)  # [S, max_query]: last position a query may see
    mask = torch.zeros(sequences, max_query, max_context)
    mask.masked_fill_(torch.arange(max_context) > seen[:, :, None], float("-inf"))
    sequence, positions = sequence.to(device), positions.to(device)
    cells = page_table_SP[sequence, positions // page_size] * page_size + positions % page_size
    return BatchMeta(page_table_SP, cells, positions, sequence, query.to(device), sequences, max_query, max_context,
                     mask.to(device), first_page)
