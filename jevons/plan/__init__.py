"""What a model costs, before anything runs: parameters, FLOPs, bytes, hours, dollars. No torch here; the same functions price
a plan and a run."""

from jevons.plan.counts import Parameters, count_parameters, forward_flops, kv_bytes_per_token, training_flops
from jevons.plan.hardware import dollars

__all__ = ["Parameters", "count_parameters", "dollars", "forward_flops", "kv_bytes_per_token", "training_flops"]
