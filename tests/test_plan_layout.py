"""Layouts: what every GPU holds against a count by hand, the pipeline against a simulation, serving against brute force."""

import math
import random
from dataclasses import replace

import pytest

from jevons.config import preset
from jevons.plan.counts import (
    PlanError,
    Shape,
    count_parameters,
    decode_attention_flops,
    forward_flops,
    kv_bytes_per_token,
)
from jevons.plan.hardware import HARDWARE, USABLE, serving, step_bytes, training_cost, weight_bytes
from jevons.plan.layout import BUBBLES, Layout, activation_bytes, bubble, memory_by_device
from jevons.published import CONFIGS

V3, LITE, LLAMA = (Shape.from_hf(CONFIGS[n]) for n in ("deepseek-v3", "deepseek-v2-lite", "r1-distill-llama-8b"))


@pytest.mark.parametrize("c", [V3, LITE, LLAMA, preset("v3-tiny")], ids=["v3", "v2-lite", "llama", "v3-tiny"])
def test_one_gpu_holds_everything(c):
    p = count_parameters(c)
    (m,) = memory_by_device(c, Layout(gpus=1))
    assert m.weights == 2 * (p.total + p.mtp) and m.gradients == 4 * (p.total + p.mtp) and m.optimizer == 12 * (p.total + p.mtp)
    (small,) = memory_by_device(c, Layout(gpus=1, precision="fp8"))
    assert m.weights / 2 < small.weights < 0.8 * m.weights and small.optimizer == 8 * (p.total + p.mtp)


def test_all_gpus_together_hold_the_model_as_often_as_the_layout_says():
    for _ in range(30):
        tp, ep, pp = random.choice((1, 2, 4)), random.choice((1, 4, 8, 16)), random.choice((2, 4, 6, 16))
        schedule, zero = random.choice(list(BUBBLES)), random.randrange(4)
        devices = pp // 2 if schedule == "dualpipev" else pp
        dp = max(1, ep // tp) * random.choice((1, 2))
        layout = Layout(gpus=tp * devices * dp, tp=tp, pp=pp, ep=ep, schedule=schedule, zero=zero)
        held, p = memory_by_device(V3, layout), count_parameters(V3)
        assert len(held) == devices and layout.dp == dp
        one = 3 * V3.hidden_size * V3.moe_intermediate_size * 256 * 59  # routed experts, the MTP layer's too
        rest = p.total + p.mtp + V3.vocab_size * V3.hidden_size - one  # the last stage embeds for the MTP module
        twice = 2 if schedule == "dualpipe" else 1
        replicas = dp * tp / (ep if ep > 1 else tp)
        for part, size, sharded in (("weights", 2, zero >= 3), ("gradients", 4, zero >= 2), ("optimizer", 12, zero >= 1)):
            everywhere = dp * tp * sum(getattr(m, part) for m in held)
            expected = size * twice * (one + rest if sharded else one * replicas + rest * dp)
            assert everywhere == pytest.approx(expected, rel=1e-9), (layout, part)


def test_stages_are_even_and_whole():
    for _ in range(50):
        layout = Layout(pp=random.randint(1, 61))
        stages = layout.stages(V3)
        assert [i for stage in stages for i in stage] == list(range(61))
        sizes = [len(stage) for stage in stages]
        assert max(sizes) - min(sizes) <= 1 and sizes[-1] == min(sizes)


def test_activations_follow_their_tensors():
    c, h = V3, V3.num_attention_heads
    by_hand = (2 * 2 * 7168 + 1.5 * h * 128 + 4 * h  # two residuals bf16, attention output 12 bits, log-sum-exp
               + 2 * (1536 + 512 + 64)  # latents
               + 4 * 256 + 9 * 7168 + 2 * 9 * 2048)  # router scores, inputs of 8 + 1 experts and of their SwiGLU in FP8
    assert activation_bytes(c, 30, "selective", "fp8") == by_hand
    dense = by_hand - (4 * 256 + 9 * 7168 + 2 * 9 * 2048) + 7168 + 2 * 18432
    assert activation_bytes(c, 0, "selective", "fp8") == dense
    for layer in (0, 40):
        none, selective, full = (activation_bytes(c, layer, r, "bf16") for r in ("none", "selective", "full"))
        assert none > selective > full == 2 * 7168


@pytest.mark.parametrize("schedule,in_flight", [("1f1b", 4), ("zb1p", 4), ("dualpipe", 5), ("dualpipev", 5)])
def test_micro_batches_in_flight_are_the_papers(schedule, in_flight):
    """V3 table 2: PP stages' activations, PP + 1 for DualPipe; a stage's layers, all dense and alike, times that."""
    c = Shape.from_hf(CONFIGS["r1-distill-llama-8b"] | {"vocab_size": 1})
    layout = Layout(gpus=4, pp=4, schedule=schedule, micro_batches=16)
    peak = max(m.activations for m in memory_by_device(c, layout))
    assert peak == pytest.approx(in_flight * 8 * activation_bytes(c, 0, "selective", "bf16") * 4096, rel=1e-3)


def simulate_1f1b(pp, m, forward, backward):
    """Makespan of `m` micro-batches: each stage runs its operations in 1F1B's order as soon as their inputs are there."""
    orders = []
    for stage in range(pp):
        warm = min(m, pp - 1 - stage)
        order = [("F", i) for i in range(warm)]
        for i in range(m - warm):
            order += [("F", warm + i), ("B", i)]
        orders.append(order + [("B", i) for i in range(m - warm, m)])
    done, clock = {}, [0.0] * pp
    while any(orders):
        for stage in range(pp):
            while orders[stage]:
                kind, i = orders[stage][0]
                needs = ("F", i, stage - 1) if kind == "F" else ("B", i, stage + 1) if stage < pp - 1 else ("F", i, stage)
                if needs not in done and not (kind == "F" and stage == 0):
                    break
                clock[stage] = max(clock[stage], done.get(needs, 0.0)) + (forward if kind == "F" else backward)
                done[(kind, i, stage)] = clock[stage]
                orders[stage].pop(0)
    return max(clock)


def test_the_bubble_is_the_time_a_simulated_pipeline_loses():
    for _ in range(10):
        pp, forward, backward = random.randint(1, 9), random.uniform(0.5, 2), random.uniform(0.5, 4)
        m = pp + random.randint(0, 12)
        lost = simulate_1f1b(pp, m, forward, backward) - m * (forward + backward)
        assert bubble("1f1b", pp, forward, backward) == pytest.approx(lost)
        share = Layout(pp=pp, micro_batches=m).bubble_share()
        assert share == pytest.approx((pp - 1) / (pp - 1 + m))
    assert Layout(pp=16, schedule="dualpipe", micro_batches=120).bubble_share() == pytest.approx(14 / (14 + 360))
    assert Layout(pp=16, schedule="dualpipev", micro_batches=120).bubble_share() == pytest.approx(14 / (14 + 720))


@pytest.mark.parametrize("c,changes,message", [
    (V3, dict(tp=3), "128 attention heads do not divide over tp 3"),
    (LLAMA, dict(tp=16, gpus=16), "8 key-value heads do not divide over tp 16"),
    (V3, dict(pp=62), "pp 62 is more than the 61 layers"),
    (V3, dict(pp=3), "8 gpus are not a multiple of tp 1 x 3 pipeline devices"),
    (V3, dict(ep=3), "256 experts do not divide over ep 3"),
    (V3, dict(ep=16), "do not divide into groups of ep 16"),
    (LLAMA, dict(ep=2), "this model is dense"),
    (V3, dict(pp=3, schedule="dualpipe"), "pp 3 is odd"),
    (V3, dict(pp=8, schedule="dualpipe", micro_batches=14), "micro-batches 14 must be even and at least 16"),
    (V3, dict(pp=8, schedule="dualpipe", micro_batches=17), "micro-batches 17 must be even"),
    (V3, dict(pp=1, schedule="dualpipev"), "pp 1 is odd"),
    (V3, dict(schedule="gpipe"), "schedule 'gpipe' is not one of 1f1b"),
    (V3, dict(zero=4), "zero 4 is not one of"),
    (V3, dict(tp=0), "tp is 0"),
    (V3, dict(gpus=-8), "gpus is -8"),
    (V3, dict(micro_batches=-1), "micro-batches -1"),
])
def test_layouts_that_do_not_divide(c, changes, message):
    with pytest.raises(PlanError, match=message.replace("(", r"\(")) as error:
        memory_by_device(c, Layout(**changes))
    assert "\n" not in str(error.value)


def test_hours_and_dollars():
    hours, gpus, price, peak = random.uniform(1, 1e6), random.randint(1, 5000), random.uniform(0, 9), random.uniform(1e12, 1e15)
    cost = training_cost(hours * 3600 * peak / 2, gpus, peak, 0.5, price)
    assert cost.gpu_hours == pytest.approx(hours) and cost.days == pytest.approx(hours / gpus / 24)
    assert cost.dollars == pytest.approx(hours * price)


def test_bytes_of_a_decoding_step():
    for c in (V3, LITE, LLAMA):
        p, context = count_parameters(c), random.randint(1, 9000)
        one = 2 * (p.active - p.embedding + c.hidden_size) + context * kv_bytes_per_token(c)
        assert step_bytes(c, 1, context, "bf16") == pytest.approx(one, rel=1e-9)
        many = 2 * (p.total - p.embedding) + 100_000 * (2 * c.hidden_size + context * kv_bytes_per_token(c))
        assert step_bytes(c, 100_000, context, "bf16") == pytest.approx(many, rel=1e-9)
    chosen = {e for _ in range(40) for e in random.sample(range(256), 8)}  # 40 users, one draw
    met = (step_bytes(V3, 40, 0, "bf16") - step_bytes(V3, 1, 0, "bf16") - 39 * 2 * 7168) / (58 * 2 * 3 * 7168 * 2048) + 8
    assert abs(len(chosen) - met) < 6 * math.sqrt(256 * 0.28 * 0.72)
    tied = LLAMA.model_copy(update={"tie_word_embeddings": True})
    assert step_bytes(tied, 1, 9, "bf16") == step_bytes(LLAMA, 1, 9, "bf16"), "the head is read, tied or not"


def test_weights_by_precision():
    p = count_parameters(V3)
    assert weight_bytes(V3, "bf16") == 2 * p.total
    assert p.total < weight_bytes(V3, "fp8") < 1.01 * p.total
    assert weight_bytes(V3, "q4") == pytest.approx(p.total * 18 / 32, rel=0.01)


@pytest.mark.parametrize("key", HARDWARE)
@pytest.mark.parametrize("c", [V3, LITE, LLAMA], ids=["v3", "v2-lite", "llama"])
def test_serving_takes_the_largest_batch_there_is(c, key):
    hardware, context, per_user = HARDWARE[key], random.randint(500, 20_000), random.uniform(5, 60)
    precision = random.choice(("bf16", "fp8", "q4"))
    s = serving(c, hardware, context, precision, per_user)
    room, weights, cache = hardware.memory * USABLE, weight_bytes(c, precision), context * kv_bytes_per_token(c)
    assert s.devices * room >= weights + cache and (s.devices == 1 or s.devices // 2 * room < weights + cache)

    def seconds(batch):
        linear, attention = forward_flops(c, 0), decode_attention_flops(c, context)
        peak = hardware.fp8 if precision == "fp8" else hardware.bf16
        compute = batch * (linear / peak + attention / hardware.bf16)
        return max(step_bytes(c, batch, context, precision) / hardware.bandwidth, compute) / s.devices

    def possible(batch):
        return batch == 1 or (weights + batch * cache <= s.devices * room and seconds(batch) * per_user <= 1)

    assert possible(s.batch) and not possible(s.batch + 1)
    assert s.decode == pytest.approx(s.batch / seconds(s.batch)) and s.single == pytest.approx(1 / seconds(1))
    assert s.dollars_per_million == pytest.approx(s.devices * hardware.dollars_per_hour / 3600 / s.decode * 1e6)
    assert s.curve[0] == (1, pytest.approx(s.single)) and s.curve[-1][0] >= s.batch
    assert serving(c, hardware, context, precision, per_user, 0.0).dollars_per_million == 0


def test_absorbed_attention_meets_the_latent():
    assert decode_attention_flops(V3, 1000) == 2 * 61 * 128 * 1000 * (512 + 64 + 512)
    assert decode_attention_flops(LLAMA, 1000) == 2 * 32 * 32 * 1000 * 256 == forward_flops(LLAMA, 1000) - forward_flops(LLAMA, 0)


def test_more_gpus_never_hold_more():
    base = Layout(gpus=2048, pp=16, ep=64, schedule="dualpipe", micro_batches=120, precision="fp8")
    published = max(m.total for m in memory_by_device(V3, base))
    assert published < 80e9, "V3 was trained on 80 GB devices in this layout"
    assert max(m.total for m in memory_by_device(V3, replace(base, zero=3))) < published
    assert max(m.total for m in memory_by_device(V3, replace(base, ep=128))) < published
