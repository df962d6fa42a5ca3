"""Machines by name, what an hour of them buys, and the bounds they set to serving."""

from __future__ import annotations

from dataclasses import dataclass

from jevons.config import ModelConfig
from jevons.plan.counts import (
    PlanError,
    count_parameters,
    decode_attention_flops,
    forward_flops,
    kv_bytes_per_token,
)

USABLE = 0.9  # of a device's memory; the rest is the runtime's
WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "q4": 18 / 32}  # q4: GGUF's Q4_0, 32 weights in 18 bytes


@dataclass(frozen=True)
class Hardware:
    """One device, by its data sheet. Dense FLOP/s, without sparsity; a device without FP8 units computes FP8 weights in bf16."""

    title: str
    memory: float  # bytes
    bandwidth: float  # bytes/s
    bf16: float  # FLOP/s
    fp8: float
    dollars_per_hour: float  # an assumption; H800's is the V3 report's

    def peak(self, precision: str) -> float:
        return self.fp8 if precision == "fp8" else self.bf16


def _device(title: str, gigabytes: float, gb_per_second: float, bf16: float, fp8: float, dollars_per_hour: float) -> Hardware:
    return Hardware(title, gigabytes * 1e9, gb_per_second * 1e9, bf16 * 1e12, (fp8 or bf16) * 1e12, dollars_per_hour)


HARDWARE = {
    "h800": _device("H800 SXM", 80, 3350, 989.4, 1978.9, 2.0),
    "h100": _device("H100 SXM", 80, 3350, 989.4, 1978.9, 2.5),
    "h200": _device("H200 SXM", 141, 4800, 989.4, 1978.9, 3.5),
    "a100": _device("A100 SXM", 80, 2039, 312, 0, 1.5),
    "rtx4090": _device("RTX 4090", 24, 1008, 165.2, 330.3, 0.4),
    "m3-ultra": _device("Apple M3 Ultra", 512, 819, 28, 0, 0.5),
    "epyc": _device("2x EPYC 9654, DDR5", 1536, 921.6, 29, 0, 1.5),
    "desktop": _device("desktop CPU, DDR5", 64, 89.6, 1.5, 0, 0.15),
    "laptop": _device("two laptop cores", 16, 35, 0.2, 0, 0.1),
}


def dollars(seconds: float, dollars_per_hour: float) -> float:
    return seconds / 3600 * dollars_per_hour


@dataclass(frozen=True)
class Cost:
    gpu_hours: float
    days: float
    dollars: float


def training_cost(flops: float, gpus: int, peak: float, utilisation: float, dollars_per_hour: float) -> Cost:
    """Time and money of `flops` on `gpus` devices of `peak` FLOP/s, used at `utilisation` (0..1, waiting included)."""
    for name, value, ok, right in (("gpus", gpus, gpus >= 1, "1 or more"), ("flops", flops, flops >= 0, "0 or more"),
                                   ("utilisation", utilisation, 0 < utilisation <= 1, "above 0 and at most 1"),
                                   ("price", dollars_per_hour, dollars_per_hour >= 0, "0 or more dollars an hour")):
        if not ok:
            raise PlanError(f"{name} is {value}; {right} would be right")
    hours = flops / (peak * utilisation) / 3600
    return Cost(hours, hours / gpus / 24, dollars(hours * 3600, dollars_per_hour))


@dataclass(frozen=True)
class Serving:
    """Bounds of `devices` devices together that no program passes: communication is free and every unit always busy."""

    devices: int
    batch: int  # sequences at once, all devices
    single: float  # tokens/s of one user alone
    by_bandwidth: float  # tokens/s of all users at `batch`
    by_compute: float
    prefill: float
    dollars_per_million: float  # generated tokens
    dollars_per_million_input: float
    curve: tuple[tuple[int, float], ...]  # (users, tokens/s of all), up to what memory holds

    @property
    def decode(self) -> float:
        return min(self.by_bandwidth, self.by_compute)


def weight_bytes(c: ModelConfig, precision: str) -> float:
    """Served weights, MTP module left out: projections in `precision`; embedding, head, norms and routers in bf16."""
    p = count_parameters(c)
    return (p.total - _bf16_parameters(c)) * WEIGHT_BYTES[precision] + 2 * _bf16_parameters(c)


def _bf16_parameters(c: ModelConfig) -> int:
    p = count_parameters(c)
    routers = c.hidden_size * c.n_routed_experts * sum(map(c.layer_is_moe, range(c.num_hidden_layers)))
    return p.embedding + p.head + p.norms + routers


def step_bytes(c: ModelConfig, batch: int, context: float, precision: str) -> float:
    """Bytes read to generate one token for each of `batch` sequences: the experts that any of them chose (uniform routing),
    every other weight once, each sequence's cache; of the embedding a row each."""
    moe_layers = sum(map(c.layer_is_moe, range(c.num_hidden_layers)))
    routed = moe_layers * c.n_routed_experts * 3 * c.hidden_size * c.moe_intermediate_size
    met = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** batch if c.is_moe else 0.0
    embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    weights = weight_bytes(c, precision) - routed * WEIGHT_BYTES[precision] * (1 - met) - 2 * embedding
    return weights + batch * (2 * c.hidden_size + context * kv_bytes_per_token(c))


def token_seconds(c: ModelConfig, hardware: Hardware, context: float, precision: str, decoding: bool) -> float:
    """Compute time of one token on one device: matrices at the weights' precision, attention in bf16. A prompt needs the head
    only once."""
    weights = forward_flops(c, 0)
    attention = decode_attention_flops(c, context) if decoding else forward_flops(c, context) - weights
    head = 0 if decoding else 2 * c.vocab_size * c.hidden_size
    return (weights - head) / hardware.peak(precision) + attention / hardware.bf16


def serving(c: ModelConfig, hardware: Hardware, context: int, precision: str, per_user: float = 20.0,
            dollars_per_hour: float | None = None, least: int = 1) -> Serving:
    """The smallest power of two (times `least`) of devices that holds the model, and the largest batch that fits beside it and
    gives every user at least `per_user` tokens/s (or one user, where the hardware is slower than that)."""
    price = hardware.dollars_per_hour if dollars_per_hour is None else dollars_per_hour
    weights, cache = weight_bytes(c, precision), context * kv_bytes_per_token(c)
    devices = least
    while devices * hardware.memory * USABLE < weights + cache:
        devices *= 2
    bandwidth, seconds = devices * hardware.bandwidth, token_seconds(c, hardware, context, precision, True) / devices

    def step(batch: int) -> float:
        return max(step_bytes(c, batch, context, precision) / bandwidth, batch * seconds)

    low, high = 1, max(1, int((devices * hardware.memory * USABLE - weights) / cache))
    curve = tuple((b, b / step(b)) for b in [2**i for i in range(high.bit_length())] + [high])
    while low < high:  # the largest batch whose step is quick enough
        middle = (low + high + 1) // 2
        low, high = (middle, high) if step(middle) * per_user <= 1 else (low, middle - 1)
    prefill = devices / token_seconds(c, hardware, context / 2, precision, False)
    million = devices * price / 3600 * 1e6
    return Serving(devices, low, 1 / step(1), low * bandwidth / step_bytes(c, low, context, precision), 1 / seconds, prefill,
                   million * step(low) / low, million / prefill, curve)
