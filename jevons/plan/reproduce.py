"""The published figures, computed again from their inputs: `jevons plan --published`."""

from __future__ import annotations

from dataclasses import dataclass

from jevons.plan.counts import Shape, census, count_parameters, kv_beside, kv_bytes_per_token, training_flops
from jevons.plan.hardware import HARDWARE, dollars, serving, training_cost
from jevons.plan.layout import BUBBLES, bubble
from jevons.published import CONFIGS, R1_RUNS, SERVING_DAY, V3_HOURS


@dataclass(frozen=True)
class Figure:
    what: str
    inputs: str
    published: float
    computed: float
    show: str = "{:,.0f}"
    tolerance: float | None = 0.0  # relative; what rounding in print accounts for. None: what was reached, beside a bound

    @property
    def agrees(self) -> bool:
        if self.tolerance is None:
            return self.published < self.computed
        return abs(self.computed - self.published) <= self.tolerance * abs(self.published)


def figures() -> list[Figure]:
    v3, v2, lite = (Shape.from_hf(CONFIGS[name], name) for name in ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite"))
    p, stored, mha = count_parameters(v3), census(v3, True), kv_beside(v3)["MHA, 128 heads of 128"]
    rows = [Figure("V3 parameters", "shape; with 58 x 256 router biases", 671_026_419_200, p.total + p.router_biases),
            Figure("V3 checkpoint: FP8 elements", "all projections, MTP layer too", 680_571_043_840, stored.f8_e4m3),
            Figure("V3 checkpoint: BF16 elements", "2 embeddings and heads, routers, norms, eh_proj", 3_918_786_560, stored.bf16),
            Figure("V3 checkpoint: F32 elements", "a scale per 128x128 block, 59 x 256 biases", 41_555_600, stored.f32),
            Figure("V2 parameters", "shape", 235_741_434_880, count_parameters(v2).total),
            Figure("V2-Lite parameters", "shape", 15_706_484_224, count_parameters(lite).total),
            Figure("V3 cache, bytes/token", "(512 + 64) x 61 layers x 2 bytes", 70_272, kv_bytes_per_token(v3)),
            Figure("V2 cache, bytes/token", "(512 + 64) x 60 x 2", 69_120, kv_bytes_per_token(v2)),
            Figure("V2-Lite cache, bytes/token", "(512 + 64) x 27 x 2", 31_104, kv_bytes_per_token(lite)),
            Figure("MHA over MLA, V3's shape", "2 x 128 x 128 / 576", 56.9, mha / 70_272, "{:.1f}x", 1e-3)]

    h, flops = V3_HOURS, training_flops(v3, 1, 4096, mtp=False)
    tokens, pretraining = h["trillions"] * 1e12, h["per_trillion"] * h["trillions"]
    peak, gpus, rate = HARDWARE["h800"].bf16, int(h["gpus"]), h["dollars_per_hour"]
    by_flops = training_cost(flops * tokens, gpus, peak, 0.39, rate)
    total = pretraining + h["context"] + h["post_training"]
    rows += [Figure("V3 training, GFLOP/token", "3 x forward; causal rows of 4096; no MTP", 250.5, flops / 1e9, "{:.1f}", 1e-3),
             Figure("V3 pre-training, GPU hours", "180K a trillion x 14.8", 2664e3, pretraining),
             Figure("V3 pre-training, GPU hours", "FLOPs; 39 % of 989.4 TFLOPS", 2664e3, by_flops.gpu_hours, tolerance=0.005),
             Figure("V3 days a trillion tokens", "180K / 2048 GPUs / 24", 3.7, h["per_trillion"] / gpus / 24, "{:.2f}", 0.015),
             Figure("V3 pre-training, days", "2664K / 2048 / 24", 54.2, pretraining / gpus / 24, "{:.1f}", 1e-3),
             Figure("V3 all training, GPU hours", "2664K + 119K context + 5K post-training", 2788e3, total),
             Figure("V3 all training", "2788K x $2", 5.576e6, dollars(total * 3600, rate), "${:,.0f}")]
    for pp, published in ((8, (21, 7, 6, 6)), (16, (45, 15, 14, 14))):
        rows += [Figure(f"bubble, PP{pp}, {name}", "F 1, B 2, W 1, F&B 3", figure, bubble(name, pp), "{:.0f}")
                 for name, figure in zip(BUBBLES, published, strict=True)]

    r, d = R1_RUNS, SERVING_DAY
    r1_hours = r["zero_hours"] + r["sft_hours"] + r["r1_hours"]
    cost = d["nodes"] * d["gpus_per_node"] * 24 * d["dollars_per_hour"]
    revenue = (d["hits"] * d["price_hit"] + d["misses"] * d["price_miss"] + d["output"] * d["price_output"]) / 1e6
    bound = serving(v3, HARDWARE["h800"], d["mean_context"], "fp8", 20, least=144)
    return rows + [
        Figure("R1-Zero, GPU hours", "512 GPUs x 198 h", 101e3, r["zero"][0] * r["zero"][1], tolerance=0.005),
        Figure("R1 second run, GPU hours", "512 GPUs x 80 h", 41e3, r["r1"][0] * r["r1"][1], tolerance=0.005),
        Figure("R1 in all, GPU hours", "101K + 5K data + 41K", 147e3, r1_hours),
        Figure("R1 in all", "147K x $2", 294e3, dollars(r1_hours * 3600, r["dollars_per_hour"]), "${:,.0f}"),
        Figure("serving day, cost", "226.75 nodes x 8 x 24 h x $2", 87_072, cost, "${:,.0f}"),
        Figure("serving day, revenue", "342B x $0.14 + 266B x $0.55 + 168B x $2.19 per M", 562_027, revenue, "${:,.0f}", 2e-4),
        Figure("serving day, margin", "printed revenue / cost - 1", 545, 100 * (d["revenue"] / cost - 1), "{:.0f} %", 1e-3),
        Figure("decode, tokens/s per 8 H800", "reached; the bound of EP144 at 4,989 tokens, 20 tokens/s a user",
               d["decode_per_node"], 8 * bound.decode / bound.devices, tolerance=None),
    ]


def markdown() -> str:
    """The table of docs/plan.md."""
    lines = ["| What | Inputs | Published | Computed |", "|---|---|---:|---:|"]
    lines += [f"| {f.what} | {f.inputs} | {f.show.format(f.published)} | {f.show.format(f.computed)} |" for f in figures()]
    return "\n".join(lines) + "\n"
