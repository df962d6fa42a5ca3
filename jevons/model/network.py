"""`CausalLM`: DeepSeek-V3 with its MTP module, or a dense Qwen2/Llama, from one `ModelConfig`.

Two forwards: `forward` on ragged flat tokens over a paged cache (everything the engine does), and `forward_train` on
training rows. Parameters may be fused in memory; `hf_state_dict` shows them under their published names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from jevons.config import ModelConfig
from jevons.model.attention import GQA, MLA, Segments
from jevons.model.cache import BatchMeta, KVCache
from jevons.model.layers import MLP, Fetch, HFView, Linear, RMSNorm, rotary_table
from jevons.model.moe import Gate, MoE, Routing
from jevons.model.native_pass import NativePass
from jevons.numerics import fused, recompute


class Block(nn.Module):
    """Pre-norm: x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.self_attn = MLA(config) if config.is_deepseek else GQA(config)
        self.mlp = MoE(config) if config.layer_is_moe(index) else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False  # see model/precision.py

    def forward(self, x_ND, attend, segments: Segments | None = None, real_N: torch.Tensor | None = None,
                ) -> tuple[torch.Tensor, Routing | None]:
        """`attend(module, x)` runs this layer's attention, cached or expanded."""
        h, norm = self.input_layernorm(x_ND, fused.autocast_dtype(x_ND)), self.post_attention_layernorm
        with recompute.remade(self.recompute, h, self.input_layernorm.again(x_ND, h.dtype)):
            y_ND = attend(self.self_attn, h)
        if segments is None:  # the engine's own norm takes few tokens
            x_ND = x_ND + y_ND
            h = norm(x_ND)
        else:
            x_ND, h = fused.add_norm(x_ND, y_ND, norm.weight, norm.eps, fused.autocast_dtype(x_ND))
        with recompute.remade(self.recompute, h, norm.again(x_ND, h.dtype)):
            y_ND, routing = self.mlp(h, segments, real_N) if isinstance(self.mlp, MoE) else (self.mlp(h), None)
        return (x_ND + y_ND if segments is None else fused.add(x_ND, y_ND)), routing


class MTPLayer(Block):
    """One multi-token-prediction module (report section 2.2): predicts t_{i+2} from h_i and the embedding of t_{i+1}."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def merge(self, hidden_ND, embed_ND) -> torch.Tensor:
        # released weights want cat[embed, hidden], the reverse of the report's eq. 21; hidden comes after the final norm
        return self.eh_proj(torch.cat([self.enorm(embed_ND), self.hnorm(hidden_ND)], dim=-1))


@dataclass
class TrainOutput:
    """What `forward_train` returns. Hidden states are normed: the head goes on top as they are."""

    hidden_ND: torch.Tensor
    mtp_hidden_ND: torch.Tensor | None  # at token i: predicts token i + 2
    load_RE: torch.Tensor | None  # tokens per expert for every router, in the order of `routers()`, MTP last
    balance_loss: torch.Tensor  # mean over routers, before alpha


class CausalLM(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MTPLayer(config, config.num_hidden_layers + i) for i in range(config.num_nextn_predict_layers))
        self.register_buffer("rope", torch.empty(0), persistent=False)
        self.native = NativePass(self.layers, self.norm, self.embed_tokens, self.lm_head)
        self.native_mtp = [NativePass([layer], layer.shared_head["norm"], self.embed_tokens, self.lm_head, layer)
                           for layer in self.mtp]
        self.expert_counts: dict[str, float] = {}  # of experts that are mapped or offloaded: see offload.py

    def allocate(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        """Give a model that was built on the meta device its memory; parameters stay uninitialised."""
        self.to(dtype).to_empty(device=device)
        self._finish(device)

    def hold(self, fetch: Fetch, device: torch.device | str) -> None:
        """Take every tensor as `fetch(published name)` gives it: memory maps and FP8 blocks stay as they are. Without
        gradients, for inference; the model was built on the meta device."""
        _hold(self.embed_tokens, "model.embed_tokens", fetch)
        self._finish(device)
        _hold(self.norm, "model.norm", fetch)
        if not self.config.tie_word_embeddings:
            self.lm_head.hold("lm_head", fetch)
        for index, block in enumerate([*self.layers, *self.mtp]):
            _hold(block, f"model.layers.{index}", fetch)

    def _finish(self, device: torch.device | str) -> None:
        """Ties, and buffers, which are float32 whatever the parameters are."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rope = rotary_table(self.config).to(device)
        for gate in self.routers():
            gate.e_score_correction_bias = torch.zeros(self.config.n_routed_experts, device=device)

    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices and embeddings normal with std `initializer_range`, norms 1, biases 0 (report section 4.2)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() >= 2:  # drawn on the generator's device: the same numbers on every other
                    drawn = torch.empty(parameter.shape, device=generator.device)
                    parameter.copy_(drawn.normal_(0.0, self.config.initializer_range, generator=generator))
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            for gate in self.routers():
                gate.e_score_correction_bias.zero_()

    def routers(self) -> list[Gate]:
        """Every gate there is, the MTP module's last: balancing must reach all of them."""
        return [block.mlp.gate for block in [*self.layers, *self.mtp] if hasattr(block.mlp, "gate")]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    def forward(self, tokens_N: torch.Tensor, positions_N: torch.Tensor, cache: KVCache, meta: BatchMeta) -> torch.Tensor:
        """Ragged flat tokens of S sequences -> normed hidden states [N, D]. Prefill, chunked prefill, decode and the
        verification of drafts are this one call; `cache` receives the new tokens' entries."""
        out = self.native(None, tokens_N, positions_N, self.rope, cache, meta)
        if out is not None:
            return out
        rope = self.rope[positions_N]
        x = self.embed_tokens(tokens_N)
        for index, block in enumerate(self.layers):
            x, _ = block(x, lambda attn, h, index=index: attn.cached(h, rope, index, cache, meta))
        return self.norm(x)

    def forward_mtp(self, hidden_N: torch.Tensor, next_tokens_N: torch.Tensor, positions_N: torch.Tensor, cache: KVCache,
                    meta: BatchMeta, depth: int = 0) -> torch.Tensor:
        """The MTP module over a cache of its own: hidden states of `forward` and the tokens that follow them -> normed
        hidden states whose logits predict the token after those."""
        layer = self.mtp[depth]
        x = layer.merge(hidden_N, self.embed_tokens(next_tokens_N))
        out = self.native_mtp[depth](x, None, positions_N, self.rope, cache, meta, depth)
        if out is not None:
            return out
        rope = self.rope[positions_N]
        x, _ = layer(x, lambda attn, h: attn.cached(h, rope, depth, cache, meta))
        return layer.shared_head["norm"](x)

    def forward_train(self, tokens_N: torch.Tensor, positions_N: torch.Tensor, segments: Segments, mtp: bool = True,
                      detach_trunk: bool = False) -> TrainOutput:
        """Training rows, flat: `segments` says where rows begin and end; attention is causal within a row. Position -1
        marks padding, which counts in no statistic; tokens past the last segment must be padding.

        With `mtp` the MTP module runs too; at a row's last token it is fed the next row's first (its loss weight must
        be 0). `detach_trunk` keeps its gradient out of the trunk, the embedding included.
        """
        x, routings = self.run_blocks(self.layers, self.embed_tokens(tokens_N), positions_N, segments)
        return self.finish_train(x, routings, tokens_N, positions_N, segments, mtp, detach_trunk)

    def run_blocks(self, blocks: Iterable[Block], x_ND: torch.Tensor, positions_N: torch.Tensor, segments: Segments,
                   ) -> tuple[torch.Tensor, list[Routing]]:
        """Some of the blocks over training rows: a pipeline's stage runs its own."""
        rope = self.rope[positions_N]
        real = (positions_N >= 0).float()
        routings: list[Routing] = []
        for block in blocks:
            x_ND, routing = block(x_ND, lambda attn, h: attn.expanded(h, rope, segments), segments, real)
            routings += [routing] if routing is not None else []
        return x_ND, routings

    def finish_train(self, x_ND: torch.Tensor, routings: list[Routing], tokens_N: torch.Tensor, positions_N: torch.Tensor,
                     segments: Segments, mtp: bool, detach_trunk: bool) -> TrainOutput:
        """What comes after the last block: the final norm, and the MTP module."""
        hidden = self.norm(x_ND)
        mtp_hidden = None
        if mtp and self.mtp:
            layer = self.mtp[0]
            embed = self.embed_tokens(tokens_N.roll(-1))
            trunk = hidden
            if detach_trunk:
                trunk, embed = trunk.detach(), embed.detach()
            y, more = self.run_blocks([layer], layer.merge(trunk, embed), positions_N, segments)
            routings = [*routings, *more]
            mtp_hidden = layer.shared_head["norm"](y)
        load = torch.stack([r.load_E for r in routings]) if routings else None
        balance = torch.stack([r.balance_loss for r in routings]).mean() if routings else hidden.new_zeros(())
        return TrainOutput(hidden, mtp_hidden, load, balance)

    # -- published names --------------------------------------------------------------------------------------------

    def _hf_views(self) -> Iterator[HFView]:
        yield "model.embed_tokens.weight", self.embed_tokens.weight
        for index, block in enumerate([*self.layers, *self.mtp]):
            prefix = f"model.layers.{index}"
            yield from _walk(block, prefix)
            if isinstance(block, MTPLayer):  # published checkpoints carry copies of both under the MTP layer
                yield f"{prefix}.embed_tokens.weight", self.embed_tokens.weight
                yield f"{prefix}.shared_head.head.weight", self.lm_head.weight
        yield "model.norm.weight", self.norm.weight
        if not self.config.tie_word_embeddings:
            yield "lm_head.weight", self.lm_head.weight

    def hf_state_dict(self) -> dict[str, torch.Tensor]:
        """Published name -> view of the parameter (or of the rows of it) that holds the tensor. Raises ValueError for a weight
        that was packed into a form that checkpoints do not have."""
        views = dict(self._hf_views())
        for name, view in views.items():
            if not isinstance(view, torch.Tensor):
                raise ValueError(f"{name} was packed for inference, and checkpoints do not hold its form; save before packing")
        return {name: view.detach() for name, view in views.items()}

    def load_hf_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy published tensors in. Strict: raises KeyError for missing or surplus names, ValueError for a wrong shape or
        a copy that differs from what it copies; nothing is copied then."""
        views = self.hf_state_dict()
        copies = {name: "lm_head.weight" if "shared_head" in name else "model.embed_tokens.weight" for name in views
                  if name.endswith((".shared_head.head.weight", "embed_tokens.weight")) and name != "model.embed_tokens.weight"}
        if self.config.tie_word_embeddings:
            copies = dict.fromkeys([*copies, "lm_head.weight"], "model.embed_tokens.weight")
        missing = sorted(set(views) - set(copies) - set(tensors))
        surplus = sorted(set(tensors) - set(views) - set(copies))
        if missing or surplus:
            raise KeyError(f"checkpoint lacks {missing[:5] or 'nothing'} and has unknown {surplus[:5] or 'nothing'}")
        for name, tensor in tensors.items():
            if name in copies and not torch.equal(tensor, tensors[copies[name]]):
                raise ValueError(f"{name} differs from {copies[name]}, which it is a copy of")
            if name not in copies and views[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {tuple(views[name].shape)} would be right")
        for name in set(views) - set(copies):
            views[name].copy_(tensors[name])

    def matrix_parts(self) -> dict[str, list[int]]:
        """Rows of each published matrix within every matrix parameter (fused ones hold several), for Muon.

        Embedding, head and gates are left out: they are not hidden matrices."""
        parts: dict[str, list[int]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Linear) and module is not self.lm_head:
                parts[f"{name}.weight"] = list((module.parts or {"": module.weight.shape[0]}).values())
            elif isinstance(module, MoE):
                inter = module.experts.inter
                parts[f"{name}.experts.gate_up_proj"] = [inter, inter]
                parts[f"{name}.experts.down_proj"] = [module.experts.down_proj.shape[1]]
        return parts


def _walk(module: nn.Module, prefix: str) -> Iterator[HFView]:
    """Published names below `prefix`: a module with `hf_views` names its own, others go by their attributes' names."""
    for name, child in module.named_children():
        if hasattr(child, "hf_views"):
            for local, view in child.hf_views(name):
                yield f"{prefix}.{local}", view
        else:
            yield from _walk(child, f"{prefix}.{name}")
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}.{name}", parameter


def _hold(module: nn.Module, prefix: str, fetch: Fetch) -> None:
    """`hold` for everything below `prefix`; the counterpart of `_walk`."""
    for name, child in module.named_children():
        if hasattr(child, "hold"):
            child.hold(f"{prefix}.{name}", fetch)
        else:
            _hold(child, f"{prefix}.{name}", fetch)
    for name in dict(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(fetch(f"{prefix}.{name}"), requires_grad=False))


def build_model(config: ModelConfig, seed: int | None = None, device: torch.device | str = "cpu",
                dtype: torch.dtype = torch.float32) -> CausalLM:
    """The network of `config`; initialised with `seed`, or left uninitialised for loading (None). On the device "meta"
    it has shapes only, until `allocate` or `hold`."""
    with torch.device("meta"):
        model = CausalLM(config)
    if torch.device(device).type != "meta":
        model.allocate(device, dtype)
    if seed is not None:
        model.init_weights(torch.Generator(device="cpu").manual_seed(seed))
    return model
