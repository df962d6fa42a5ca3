"""What a model costs, before anything runs: parameters, FLOPs, bytes, hours, dollars. No torch here; the same functions price
a plan and a run."""

from jevons.plan.counts import (
           Parameters,
           PlanError,
           Shape,
           attention_parameters,
           count_parameters,
           ffn_parameters,
           forward_flops,
           kv_bytes_per_token,
           norm_parameters,
           training_flops,
)
from jevons.plan.hardware import dollars

__all__ = ["Parameters", "PlanError", "Shape", "attention_parameters", "count_parameters", "dollars", "ffn_parameters",
           "forward_flops", "kv_bytes_per_token", "norm_parameters", "training_flops"]
