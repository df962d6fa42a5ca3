"""A training layout over many GPUs: what each of them holds, and how long it waits in the pipeline.

`gpus = tp * devices * dp`, where `devices` is how many GPUs one pipeline of `pp` stages takes (DualPipeV folds two stages onto
each). Experts are spread over `ep` of the `dp * tp` ranks of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from jevons.config import ModelConfig
from jevons.plan.counts import PlanError, attention_parameters, ffn_parameters, norm_parameters

# (F, B with W, W, F and B overlapped) -> time lost; V3 report table 2. DualPipe also keeps every stage twice.
BUBBLES = {
    "1f1b": lambda pp, f, b, w, fb: (pp - 1) * (f + b),
    "zb1p": lambda pp, f, b, w, fb: (pp - 1) * (f + b - 2 * w),
    "dualpipe": lambda pp, f, b, w, fb: (pp / 2 - 1) * (fb + b - 3 * w),
    "dualpipev": lambda pp, f, b, w, fb: (pp / 2 - 1) * (fb + b - 3 * w),
}
GRADIENT_BYTES = 4  # FP32 accumulation
OPTIMIZER_BYTES = {"fp8": 8, "bf16": 12}  # FP32 master weights; two moments, bf16 in V3's FP8 recipe, FP32 otherwise
RECOMPUTE = ("none", "selective", "full")


def bubble(schedule: str, pp: int, forward: float = 1, backward: float = 2, weight: float = 1, overlapped: float = 3) -> float:
    """Time a pipeline of `pp` stages waits in one step, in units of one stage's forward of one micro-batch."""
    return BUBBLES[schedule](pp, forward, backward, weight, overlapped) if pp > 1 else 0.0


@dataclass(frozen=True)
class Layout:
    gpus: int = 8
    tp: int = 1
    pp: int = 1
    ep: int = 1
    schedule: str = "1f1b"
    micro_batches: int = 0  # per pipeline and step; 0: the least that fills the pipeline
    row: int = 4096  # tokens of a row; a micro-batch is one
    zero: int = 1  # 1 shards the optimizer over the replicas, 2 the gradients too, 3 the weights too
    recompute: str = "selective"  # V3's: norms, MLA up-projections and SwiGLU are computed again in the backward pass
    precision: str = "bf16"

    @property
    def devices(self) -> int:
        return self.pp // 2 if self.schedule == "dualpipev" else self.pp

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.devices)

    @property
    def in_step(self) -> int:
        return self.micro_batches or 2 * self.pp

    @property
    def expert_shards(self) -> int:
        return self.ep if self.ep > 1 else self.tp

    def check(self, c: ModelConfig) -> None:
        """Raises PlanError naming what does not divide."""
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise PlanError(message)

        for name in ("gpus", "tp", "pp", "ep", "row"):
            need(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; 1 or more would be right")
        for name, known in (("schedule", BUBBLES), ("recompute", RECOMPUTE), ("precision", OPTIMIZER_BYTES), ("zero", range(4))):
            need(getattr(self, name) in known, f"{name} {getattr(self, name)!r} is not one of {', '.join(map(str, known))}")
        heads = c.num_attention_heads if c.is_deepseek else c.kv_heads
        for name, size in (("attention heads" if c.is_deepseek else "key-value heads", heads),
                           ("columns of the feed-forward part", c.intermediate_size)):
            need(size % self.tp == 0, f"{size} {name} do not divide over tp {self.tp}")
        need(self.pp <= c.num_hidden_layers, f"pp {self.pp} is more than the {c.num_hidden_layers} layers")
        if self.schedule.startswith("dualpipe"):
            need(self.pp % 2 == 0, f"pp {self.pp} is odd; {self.schedule} pairs stages and needs an even number")
            need(self.in_step % 2 == 0 and self.in_step >= 2 * self.devices, f"micro-batches {self.in_step} must be even and "
                 f"at least {2 * self.devices}, twice the ranks of a {self.schedule} pipeline")
        need(self.micro_batches >= 0, f"micro-batches {self.micro_batches} is negative; 1 or more would be right")
        need(self.gpus % (self.tp * self.devices) == 0,
             f"{self.gpus} gpus are not a multiple of tp {self.tp} x {self.devices} pipeline devices")
        if self.ep > 1:
            need(c.is_moe, f"ep {self.ep} needs experts, and this model is dense; 1 would be right")
            need(c.n_routed_experts % self.ep == 0, f"{c.n_routed_experts} experts do not divide over ep {self.ep}")
            need(self.dp * self.tp % self.ep == 0, f"the {self.dp * self.tp} ranks of a stage (dp {self.dp} x tp {self.tp}) "
                 f"do not divide into groups of ep {self.ep}")

    def stages(self, c: ModelConfig) -> list[range]:
        """Layers of each stage: as even as they go, the ends last to get one more (they hold embedding, head and MTP)."""
        base, extra = divmod(c.num_hidden_layers, self.pp)
        order = [*range(1, self.pp - 1), 0, *([self.pp - 1] if self.pp > 1 else [])]
        sizes = [base + (order.index(stage) < extra) for stage in range(self.pp)]
        return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(self.pp)]

    def bubble_share(self) -> float:
        """Part of a step that a GPU waits for the pipeline; F 1, B 2, W 1."""
        lost = bubble(self.schedule, self.pp)
        return lost / (lost + 3 * self.in_step * self.pp / self.devices)


def activation_bytes(c: ModelConfig, layer: int, recompute: str, precision: str) -> float:
    """Bytes that one token leaves in one layer for the backward pass.

    Selective keeps what the V3 report keeps: residuals and latents in bf16; the attention output in 12 bits and the inputs of
    the feed-forward matrices in 8 under FP8. Full keeps the layer's input alone.
    """
    d, h, small = c.hidden_size, c.num_attention_heads, 1 if precision == "fp8" else 2
    if recompute == "full":
        return 2 * d
    width = c.v_head_dim if c.is_deepseek else c.per_head_dim
    kept = 4 * d + h * width * (1.5 if precision == "fp8" else 2) + 4 * h  # two residuals, attention output, log-sum-exp
    if c.is_deepseek:
        kept += 2 * ((c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim)
    if not c.is_deepseek or recompute == "none":
        kept += 2 * (h * c.per_head_dim + c.kv_heads * (c.per_head_dim + width))
    if c.layer_is_moe(layer):
        inputs, inner = c.num_experts_per_tok + 1, c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
        kept += 4 * c.n_routed_experts
    else:
        inputs, inner = 1, c.intermediate_size
    kept += small * (inputs * d + 2 * inner)
    return kept + (4 * d + small * inner if recompute == "none" else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_by_device(c: ModelConfig, layout: Layout) -> list[Memory]:
    """What each GPU of one pipeline holds. Norms and routers are counted as sharded like the matrices; buffers of communication
    and the allocator's waste are not counted."""
    layout.check(c)
    stages, last, group = layout.stages(c), layout.pp - 1, layout.dp * layout.tp // layout.expert_shards
    vocabulary = c.vocab_size * c.hidden_size
    routed = 3 * c.hidden_size * c.moe_intermediate_size * c.n_routed_experts

    def chunk(stage: int) -> Memory:
        mtp = c.num_nextn_predict_layers if stage == last else 0
        layers = [*stages[stage], *range(c.num_hidden_layers, c.num_hidden_layers + mtp)]
        experts = routed * sum(map(c.layer_is_moe, layers)) / layout.expert_shards
        matrices = sum(attention_parameters(c) + ffn_parameters(c, i, False) for i in layers) / layout.tp
        matrices -= routed * sum(map(c.layer_is_moe, layers)) / layout.tp
        ends = (stage == 0) + (stage == last and (not c.tie_word_embeddings or last > 0)) + (mtp > 0 and last > 0)
        others = ends * vocabulary + len(layers) * norm_parameters(c) + (stage == last) * c.hidden_size
        others = (others + mtp * (2 * c.hidden_size**2 + 3 * c.hidden_size)) / layout.tp
        replicas = {"weights": layout.zero >= 3, "gradients": layout.zero >= 2, "optimizer": layout.zero >= 1}
        small = 1 if layout.precision == "fp8" else 2

        def held(part: str, of_matrix: float, of_other: float) -> float:
            dense, expert = (layout.dp, group) if replicas[part] else (1, 1)
            return (matrices * of_matrix + others * of_other) / dense + experts * of_matrix / expert

        kept = sum(activation_bytes(c, i, layout.recompute, layout.precision) for i in layers)
        running = kept * min(layout.in_step, layout.pp - stage)
        if layout.recompute == "full":
            running += activation_bytes(c, layers[-1], "none", layout.precision)
        if stage == last:
            running += 4 * c.vocab_size * (1 + mtp)  # FP32 logits
        optimizer = OPTIMIZER_BYTES[layout.precision]
        return Memory(held("weights", small, 2), held("gradients", GRADIENT_BYTES, GRADIENT_BYTES),
                      held("optimizer", optimizer, optimizer), running * layout.row / layout.tp)

    chunks = [chunk(stage) for stage in range(layout.pp)]
    if layout.schedule.startswith("dualpipe"):
        pairs = [(chunks[i], chunks[last - i]) for i in range(layout.pp // 2)]
        chunks = [Memory(*(getattr(a, f) + getattr(b, f) for f in ("weights", "gradients", "optimizer", "activations")))
                  for a, b in pairs]
        chunks += chunks if layout.schedule == "dualpipe" else []  # the other half of the GPUs holds the same pairs
    return chunks
